"""How a verdict is reached: figures by seed, intervals, and the rule that turns them into one word.

* Differences are paired by seed. *Holds*: the 95 % t-interval lies on the claim's side of its threshold, for every
  method and budget that the claim names. *Does not hold*: for at least one of them it lies on the other side, at a
  level that allows for their number (Bonferroni). *Not tested*: it does not fail, and rows of something it names are
  missing (a small data set may have no such size). *Undecided*: none of these, or a single seed.
* The best of a group is chosen by validation AUC and judged by test AUC.
* Weights are exact. A look-up timed once must be a factor :data:`MARGIN` clear of its threshold.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple, Sequence

import numpy as np
import pandas as pd

FULL = "full"
HOLDS, DOES_NOT, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"
VERDICTS = (HOLDS, DOES_NOT, UNDECIDED, UNTESTED)
CLOSE = 0.001                            # AUC: the paper's considerable difference, our margin of equivalence
MARGIN = 1.25                            # a timing without repetition is good to this factor
RANKS_AGREE = 0.6                        # Kendall's tau: four of five pairs in the same order
BUDGETS = (0.5, 0.1, 0.01, 0.001)        # the paper's


@dataclass(frozen=True)
class Verdict:
    """``ours`` with its 95 % interval [low, high], and the figures in words.

    ``unit`` is ``auc``, ``×``, ``%``, ``share``, ``points`` or ``τ``; ``parts`` has one verdict per data set, where
    there are several or one that does not count.
    """

    verdict: str
    ours: float = math.nan
    low: float = math.nan
    high: float = math.nan
    text: str = ""
    unit: str = ""
    parts: dict[str, Verdict] = field(default_factory=dict)


class Estimate(NamedTuple):
    """A figure with a standard error of its own, over questions and not over seeds."""

    mean: float
    se: float


class Item(NamedTuple):
    """One thing a claim is about: its name and one figure per seed, or an estimate (None: no rows)."""

    name: str
    values: Sequence[float] | Estimate | None


def serves(rows: pd.DataFrame, *sections: str) -> pd.DataFrame:
    """The rows that serve one of ``sections`` (a run may serve several: ``dlrm+models``)."""
    if not len(rows):
        return rows
    return rows[[not set(sections).isdisjoint(str(s).split("+")) for s in rows["section"]]]


class Cells:
    """The finished runs of one data set (and model and dimension): figures by seed for a method and a budget.

    Where a method's own settings do not reach a budget, a variant of it that does stands in (``dedup(block=80)`` at
    0.1 %: the paper too chose block sizes per budget).
    """

    COLUMNS = ("auc", "valid_auc", "seconds", "latency_ms", "latency_full_ms")

    def __init__(self, rows: pd.DataFrame):
        from ..report.summary import best_by_validation

        self.cells: dict[tuple[str, float], pd.DataFrame] = {}
        if not len(rows):
            return
        own = rows.assign(method=rows["spec"].where(rows["spec"].fillna("").ne(""), rows["method"]))
        own = own.reindex(columns=["method", "budget", "seed", "lr", "status", *self.COLUMNS])
        own = best_by_validation(own)
        own = own[own["status"].eq("ok") & ~own["method"].str.contains("|", regex=False)]
        variants: dict[tuple[str, float], pd.DataFrame] = {}
        for (spec, budget), cell in own.groupby(["method", "budget"], dropna=False, sort=False):
            name = spec.partition("(")[0]
            key = (name, 1.0 if name == FULL else round(float(budget), 9))
            if spec == name:
                self.cells[key] = cell.set_index("seed")
            elif key not in variants or cell["valid_auc"].mean() > variants[key]["valid_auc"].mean():
                variants[key] = cell.set_index("seed")
        self.cells = variants | self.cells

    def of(self, method: str, budget: float, column: str = "auc") -> pd.Series | None:
        cell = self.cells.get((method, round(float(budget), 9)))
        if cell is None:
            return None
        values = pd.to_numeric(cell[column], errors="coerce").dropna()
        return values if len(values) else None

    def budgets(self, method: str) -> list[float]:
        return sorted((b for m, b in self.cells if m == method), reverse=True)

    def gap(self, method: str, budget: float) -> Item:
        """AUC minus Full's on the same seed."""
        return self.minus((method, budget), (FULL, 1.0))

    def minus(self, a: tuple[str, float], b: tuple[str, float], column: str = "auc", log: bool = False) -> Item:
        """``a`` minus ``b`` by seed, cells given as (method, budget); of logarithms if ``log``."""
        name = cell_name(*a) if b[0] == FULL else f"{cell_name(*a)} − {cell_name(*b)}"
        left, right = self.of(*a, column), self.of(*b, column)
        if left is None or right is None:
            return Item(name, None)
        both = left.index.intersection(right.index)
        left, right = left.loc[both], right.loc[both]
        return Item(name, ((np.log(left) - np.log(right)) if log else left - right).to_numpy() if len(both) else None)

    def latency(self, method: str, budget: float) -> Item:
        """Logarithm of the look-up's time as a multiple of Full's, timed in turn in the same run."""
        ms, full = self.of(method, budget, "latency_ms"), self.of(method, budget, "latency_full_ms")
        return Item(cell_name(method, budget), None if ms is None or full is None else np.log(ms / full).to_numpy())

    def best(self, methods: Sequence[str], budget: float) -> str | None:
        """The method with the highest mean validation AUC at a budget."""
        found = {m: v.mean() for m in methods if (v := self.of(m, budget, "valid_auc")) is not None}
        return max(found, key=found.get) if found else None


def name_of(method: str) -> str:
    from ..report.style import title

    return title(method)


def cell_name(method: str, budget: float) -> str:
    return name_of(method) if method == FULL else f"{name_of(method)} {100 * budget:.4g} %"


def interval(values, level: float = 0.95, single: float = math.nan) -> tuple[float, float, float]:
    """Mean and t-interval, of an :class:`Estimate` the normal one; a lone value has the half width ``single``."""
    from ..report.summary import t_interval

    if isinstance(values, Estimate):
        half = NormalDist().inv_cdf((1 + level) / 2) * values.se
        return values.mean, values.mean - half, values.mean + half
    mean, half = t_interval(values, level)
    half = single if len(values) == 1 else half
    return mean, mean - half, mean + half


def judge(items: Sequence[Item], threshold: float, *, above: bool = True, unit: str = "auc", log: bool = False,
          single: float = math.nan, all_needed: bool = False) -> Verdict:
    """Whether every item lies above (below) ``threshold``: the rule at the top of this file.

    ``threshold`` is in the items' unit; with ``log`` the items are logarithms of it. ``all_needed``: without rows of
    every item the claim is not tested, unless those there are refute it.
    """
    there, missing = [i for i in items if i.values is not None], [i.name for i in items if i.values is None]
    if not there:
        return Verdict(UNTESTED, unit=unit)
    back = math.exp if log else float
    limit, sign = math.log(threshold) if log else threshold, 1 if above else -1
    # in units of the claim's direction: how far each item is on its side, mean and both ends of the interval
    spans = sorted(((i.name, *interval(i.values, single=single)) for i in there), key=lambda s: sign * s[1])
    sure = [sign * (s[2] if above else s[3]) > sign * limit for s in spans]
    strict = {i.name: interval(i.values, 1 - 0.05 / len(there), single) for i in there}
    wrong = [s for s in spans if sign * strict[s[0]][2 if above else 1] < sign * limit]
    verdict = DOES_NOT if wrong else UNTESTED if missing and all_needed else HOLDS if all(sure) else UNDECIDED
    _, mean, low, high = (wrong or spans)[0]
    said = list(dict.fromkeys([*wrong[:1], *spans]))
    text = ", ".join(f"{n} {figure(back(m), back(lo), back(hi), unit)}" for n, m, lo, hi in said[:3])
    if len(said) > 3:
        text += f" and {len(said) - 3} more" + " on the same side" * _clear(said, limit, sign)
    if missing and all_needed:
        text += f"; no rows: {', '.join(missing)}"
    return Verdict(verdict, back(mean), back(low), back(high), text, unit)


def _clear(spans, limit: float, sign: int) -> bool:
    """All means on the claim's side, or none."""
    return len({sign * (mean - limit) > 0 for _, mean, _, _ in spans}) == 1


def figure(value: float, low: float = math.nan, high: float = math.nan, unit: str = "auc") -> str:
    """``+0.0012 ± 0.0004``, ``3.4× (3.1 to 3.8)``, ``150 %``."""
    if math.isnan(value):
        return ""
    if unit == "auc":
        half = (high - low) / 2
        return f"{value:+.4f}" if math.isnan(half) else f"{value:+.4f} ± {half:.4f}"
    if unit in ("share", "points"):                      # fractions of Full's figure, and differences of such figures
        text = f"{100 * value:{'.1f' if unit == 'share' else '+.1f'}}"
        text += "" if math.isnan(low) else f" ± {50 * (high - low):.1f}"
        return text + (" %" if unit == "share" else " points")
    form = {"×": "{:.3g}×", "%": "{:.4g} %", "τ": "τ = {:.2f}", "ρ": "ρ = {:.2f}", "noise": "{:.4f}"}[unit]
    if math.isnan(low) or low == high:
        return form.format(value)
    digits = {"τ": ".2f", "ρ": ".2f", "noise": ".4f"}.get(unit, ".3g")
    return f"{form.format(value)} ({low:{digits}} to {high:{digits}})"


def spread(values, form: str) -> str:
    values = [v for v in values if not math.isnan(v)]
    ends = list(dict.fromkeys(form.format(v) for v in (min(values), max(values)))) if values else ["–"]
    return " to ".join(ends)
