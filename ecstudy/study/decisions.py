"""What decides a claim from the rows of one data set: functions that return such functions, one per kind of claim."""
from __future__ import annotations

import json
import math
from typing import Sequence

import numpy as np
import pandas as pd

from ..extras import need
from .verdicts import (CLOSE, DOES_NOT, FULL, HOLDS, MARGIN, RANKS_AGREE, UNDECIDED, UNTESTED, Cells, Item,
                       Verdict, cell_name, figure, judge, name_of, spread)

INTER = ("compo", "tt_rec", "dhe", "robe", "dedup", "mgqe", "adapt_emb")
INTRA = ("int_quant", "alpt", "mde", "auto_dim", "opt_embed", "deeplight", "autosrh")
PAPERS = INTER + INTRA                   # the fourteen of the paper
# -- memory, from modules weighed at the true field sizes -----------------------------------------------------------

def _share(rows: pd.DataFrame, method: str, budget: float, column: str) -> Item:
    own = rows[(rows["method"] == method) & np.isclose(rows["budget"], budget) & rows["status"].eq("ok")]
    value = (100 * own[column] / own["bytes_full"]).to_numpy()
    return Item(cell_name(method, budget), value[:1] if len(value) else None)


def reaches(wanted: Sequence[tuple[str, float]], reached: bool = True):
    """Each (method, budget) is reached, or none of them is."""
    def one(rows):
        state = {(m, round(float(b), 9)): s for m, b, s in rows[["method", "budget", "status"]].itertuples(index=False)}
        there = [c for c in wanted if (c[0], round(c[1], 9)) in state]
        if not there:
            return Verdict(UNTESTED)
        wrong = [c for c in there if (state[c[0], round(c[1], 9)] == "ok") != reached]
        word = "reached" if reached else "out of reach"
        if len(there) <= 3:
            word, other = ("reached", "out of reach") if reached else ("out of reach", "reached")
            text = ", ".join(f"{cell_name(*c)} {other if c in wrong else word}" for c in there)
        else:
            text = f"{len(there) - len(wrong)} of {len(there)} cells {word}"
            text += f", not {' and '.join(cell_name(*c) for c in wrong)}" * bool(wrong)
        verdict = DOES_NOT if wrong else HOLDS if len(there) == len(wanted) else UNTESTED
        return Verdict(verdict, float(len(there) - len(wrong)), text=text)

    return one


def _shares(rows, methods, column: str, budgets=(0.5625, 0.5, 0.3125, 0.25, 0.1, 0.01, 0.001)) -> list[Item]:
    return [i for m in methods for b in budgets if (i := _share(rows, m, b, column)).values is not None]


def training(methods, low: float, high: float):
    """Training memory lies in [low, high) per cent of the full table at every size that is reached."""
    def one(rows):
        values = [float(i.values[0]) for i in _shares(rows, methods, "bytes_training")]
        if not values:
            return Verdict(UNTESTED)
        wrong = [v for v in values if not low <= v < high]
        return Verdict(DOES_NOT if wrong else HOLDS, (wrong or [min(values)])[0], unit="%",
                       text=f"{spread(values, '{:.4g} %')} of the full table")

    return one


def in_place(methods):
    """Training memory is three times what is deployed, within 5 %."""
    def one(rows):
        training, deployed = (_shares(rows, methods, c) for c in ("bytes_training", "bytes_inference"))
        ratios = [float(t.values[0] / d.values[0]) for t, d in zip(training, deployed)]
        if not ratios:
            return Verdict(UNTESTED)
        worst = max(ratios, key=lambda r: abs(r - 3))
        return Verdict(HOLDS if abs(worst / 3 - 1) < 0.05 else DOES_NOT, worst, unit="×",
                       text=f"{spread(ratios, '{:.3g}×')} what is deployed")

    return one


def most_training(method: str):
    def one(rows):
        own = [float(i.values[0]) for i in _shares(rows, [method], "bytes_training")]
        rest = {m: max(float(i.values[0]) for i in shares) for m in rows["method"].unique() if m not in (method, FULL)
                and (shares := _shares(rows, [m], "bytes_training"))}
        if not own or not rest:
            return Verdict(UNTESTED)
        second = max(rest, key=rest.get)
        return Verdict(HOLDS if max(own) > rest[second] else DOES_NOT, max(own), unit="%",
                       text=f"{max(own):.4g} % of the full table, next {name_of(second)} with {rest[second]:.4g} %")

    return one


def shrinks(method: str, budgets: Sequence[float]):
    """Training memory falls with the budget and is below Full's at each."""
    def one(rows):
        full = _shares(rows, [FULL], "bytes_training", (1.0,))
        own = _shares(rows, [method], "bytes_training", sorted(budgets, reverse=True))
        if not full or not own:
            return Verdict(UNTESTED)
        values = [float(i.values[0]) for i in (*full, *own)]
        right = all(after < before for before, after in zip(values, values[1:]))
        verdict = DOES_NOT if not right else HOLDS if len(own) == len(budgets) else UNTESTED
        return Verdict(verdict, values[-1], unit="%", text=", ".join(
            f"{i.name} {v:.4g} %" for i, v in zip((*own, *full), (*values[1:], values[0]))))

    return one


# -- quality --------------------------------------------------------------------------------------------------------



def gaps(methods, budgets, threshold: float, above: bool):
    def one(rows):
        cells = Cells(rows)
        items = []
        for m in methods:                                       # budgets without rows matter only if all are
            own = [cells.gap(m, b) for b in budgets]
            items += [i for i in own if i.values is not None] or [Item(name_of(m), None)]
        return judge(items, threshold, above=above, all_needed=True)

    return one


def beats(method: str, other: str):
    """AUC of ``method`` is above that of ``other`` at every budget that both reached."""
    def one(rows):
        cells = Cells(rows)
        both = [b for b in cells.budgets(method) if b < 1 and cells.of(other, b) is not None]
        return judge([cells.minus((method, b), (other, b)) for b in both], 0.0)

    return one


def best_keeps(budget: float):
    """The best method at a budget is within 0.001 of Full, or above."""
    def one(rows):
        cells = Cells(rows)
        best = cells.best(PAPERS, budget)
        return judge([cells.gap(best, budget)], -CLOSE) if best else Verdict(UNTESTED)

    return one


def best_of(group, others, budgets):
    def one(rows):
        cells, items = Cells(rows), []
        for b in budgets:
            first, second = cells.best(group, b), cells.best(others, b)
            items.append(cells.minus((first, b), (second, b)) if first and second else Item(f"{100 * b:g} %", None))
        return judge(items, 0.0, all_needed=True)

    return one


def steps(methods, large: float, small: float, threshold: float = 0.0, above: bool = True):
    """AUC at the small budget, or the smallest above it that a method reached, minus AUC at the large one."""
    def one(rows):
        cells, items = Cells(rows), []
        for m in methods:
            reached = [b for b in cells.budgets(m) if small <= b < large]
            items.append(cells.minus((m, min(reached)), (m, large)) if reached else Item(name_of(m), None))
        return judge(items, threshold, above=above, all_needed=True)

    return one


def one_run_tells(rows) -> Verdict:
    """Whether two runs that differ in their seed alone stay within 0.001 of each other, 95 times in 100."""
    squares, freedom = 0.0, 0
    for cell in Cells(rows).cells.values():
        if len(cell) > 1 and cell["auc"].notna().all():
            squares += float(cell["auc"].var(ddof=1)) * (len(cell) - 1)
            freedom += len(cell) - 1
    if not freedom:
        return Verdict(UNTESTED)
    chi2 = need("scipy.stats", "book").chi2

    def apart(quantile):
        return 1.96 * math.sqrt(2 * squares / quantile)

    ours, low, high = apart(freedom), apart(chi2.ppf(0.975, freedom)), apart(chi2.ppf(0.025, freedom))
    verdict = HOLDS if high < CLOSE else DOES_NOT if low > CLOSE else UNDECIDED
    return Verdict(verdict, ours, low, high, f"two runs differ by up to {figure(ours, low, high, 'noise')} for their "
                   f"seed alone (95 %, {freedom} degrees of freedom)", "noise")


# -- time and latency -----------------------------------------------------------------------------------------------



def _single(rows: pd.DataFrame) -> float:
    """Half width, of a logarithm, that a time measured once is given: benchmarks alone are of many batches."""
    return math.log(MARGIN) if rows["section"].eq("lookup").all() else math.nan


def slower(slow, quick, column: str, budget: float):
    """Each of ``slow`` takes longer than each of ``quick``, by seed."""
    def one(rows):
        cells = Cells(rows)
        there = [(a, b) for a in slow for b in quick
                 if cells.of(a, budget, column) is not None and cells.of(b, budget, column) is not None]
        if not {a for a, _ in there} or not {b for _, b in there}:
            return Verdict(UNTESTED)
        items = []
        for a in dict.fromkeys(a for a, _ in there):         # the closest pair of each
            pairs = [cells.minus((a, budget), (b, budget), column, log=True) for x, b in there if x == a]
            pairs = [Item(i.name.replace(" − ", " ÷ "), i.values) for i in pairs if i.values is not None]
            if pairs:
                items.append(min(pairs, key=lambda i: float(np.mean(i.values))))
        absent = [m for m in (*slow, *quick) if cells.of(m, budget, column) is None]
        found = judge(items, 1.0, unit="×", log=True, single=_single(rows))
        if absent and found.verdict == HOLDS:
            return Verdict(UNTESTED, found.ours, found.low, found.high,
                           f"{found.text}; no rows: {', '.join(map(name_of, absent))}", found.unit)
        return found

    return one


def groups(slow, quick, column: str, budget: float):
    """The geometric mean of the slow group's times over that of the quick group, by seed."""
    def one(rows):
        cells = Cells(rows)
        groups = [{m: np.log(v) for m in group if (v := cells.of(m, budget, column)) is not None}
                  for group in (slow, quick)]
        if not all(groups):
            return Verdict(UNTESTED)
        means = [pd.DataFrame(g).dropna().mean(axis=1) for g in _common(groups)]
        values = (means[0] - means[1]).dropna().to_numpy()
        if not len(values):
            return Verdict(UNTESTED)
        name = f"{len(groups[0])} others ÷ {', '.join(map(name_of, groups[1]))}"
        return judge([Item(name, values)], 1.0, unit="×", log=True)

    return one


def _common(groups: list[dict[str, pd.Series]]) -> list[dict[str, pd.Series]]:
    """Methods with as many seeds as most have, so that a mean over methods is of the same ones at every seed."""
    several = [len(v) for g in groups for v in g.values()]
    least = 2 if max(several) > 1 else 1
    return [{m: v for m, v in g.items() if len(v) >= least} for g in groups]


def grows(method: str, column: str, large: float, small: float):
    def one(rows):
        found = Cells(rows).minus((method, small), (method, large), column, log=True)
        return judge([Item(found.name.replace(" − ", " ÷ "), found.values)], 1.0, unit="×", log=True)

    return one


def latencies(methods, threshold: float, above: bool):
    def one(rows):
        cells = Cells(rows)
        items = [cells.latency(m, b) for m in methods for b in cells.budgets(m) if b <= 0.5625]
        items = [i for i in items if i.values is not None]
        absent = [m for m in methods if not any(b <= 0.5625 for b in cells.budgets(m))]
        found = judge(items, threshold, above=above, unit="×", log=True, single=_single(rows))
        if absent and found.verdict == HOLDS:
            return Verdict(UNTESTED, found.ours, found.low, found.high,
                           f"{found.text}; no rows: {', '.join(map(name_of, absent))}", found.unit)
        return found

    return one


# -- models, dimensions, allocation, data ---------------------------------------------------------------------------

def ranks(models=("wdl", "dcn"), reference: str = "dlrm", budget: float = 0.1, draws: int = 1000):
    """Kendall's tau between rankings by mean AUC at one budget, with a bootstrap over seeds.

    Scatter over seeds alone lowers tau. So rankings differ only if tau is also below what two models with one and the
    same order would show, drawn with the scatter that the seeds have.
    """
    def one(rows):
        rows = rows[rows["dim"].eq(16)]
        by_model = {m: Cells(rows[rows["model"] == m]) for m in (reference, *models)}
        items, said, wrong = {}, [], False
        for model in models:
            names = [m for m in PAPERS if all(by_model[k].of(m, budget) is not None for k in (reference, model))]
            if len(names) < 4:
                continue
            pair = [[by_model[k].of(m, budget).to_numpy() for m in names] for k in (reference, model)]
            items[model], same = _agreement(pair, draws)
            said.append(f"{model.upper()} {figure(*items[model], 'τ')} over {len(names)} methods")
            wrong |= items[model][2] < RANKS_AGREE and items[model][0] < same
        if not items:
            return Verdict(UNTESTED)
        ours, low, high = min(items.values())
        right = len(items) == len(models) and all(lo > RANKS_AGREE for _, lo, _ in items.values())
        return Verdict(DOES_NOT if wrong else HOLDS if right else UNDECIDED, ours, low, high, ", ".join(said), "τ")

    return one


def _agreement(pair: list[list[np.ndarray]], draws: int) -> tuple[tuple[float, float, float], float]:
    """(tau, its bootstrap interval) of two lists of AUCs by seed, and the 2.5 % quantile of tau for one true order."""
    kendall, rng = need("scipy.stats", "book").kendalltau, np.random.default_rng(0)
    means = np.array([[v.mean() for v in model] for model in pair])                        # [2, methods]
    tau = float(kendall(*means).statistic)
    if min(len(v) for model in pair for v in model) < 2:
        return (tau, math.nan, math.nan), math.nan
    drawn = [np.stack([v[rng.integers(len(v), size=(draws, len(v)))].mean(1) for v in model], 1) for model in pair]
    low, high = np.quantile(_taus(*drawn), [0.025, 0.975])
    noise = np.array([[math.sqrt(np.mean([v.var(ddof=1) for v in model]) / len(w)) for w in model] for model in pair])
    order = (means - means.mean(axis=1, keepdims=True)).mean(axis=0)
    scatter = np.mean(noise ** 2) / 2                              # of a mean over both models
    order = order * math.sqrt(max(0.0, 1 - scatter / max(order.var(ddof=1), 1e-30)))
    same = [order + rng.normal(0, 1, (draws, len(order))) * n for n in noise]
    return (tau, float(low), float(high)), float(np.quantile(_taus(*same), 0.025))


def _taus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau of each row of ``a`` with that of ``b`` [draws, methods]; draws of means have no ties."""
    i, j = np.triu_indices(a.shape[1], 1)
    return np.sign((a[:, i] - a[:, j]) * (b[:, i] - b[:, j])).mean(1)


IMPORTANCE = ("auto_dim", "opt_embed", "deeplight", "autosrh")


def dims(methods, threshold: float, above: bool, small: int = 16, large: int = 64):
    """AUC at the large dimension minus at the small one, with the same bytes: a tenth of the small one's full table."""
    def one(rows):
        if not {"budget_bytes", "bytes_full"} <= set(rows):
            return Verdict(UNTESTED)
        rows = rows[rows["model"].eq("dlrm") & rows["dim"].isin([small, large])]
        base = rows.loc[rows["dim"].eq(small), "bytes_full"].dropna()
        if not len(base):
            return Verdict(UNTESTED)
        limit = int(base.max() * 0.1)
        rows = rows[(rows["budget_bytes"] - limit).abs() <= 1].assign(budget=0.1)
        low, high = (Cells(rows[rows["dim"] == d]) for d in (small, large))
        items = []
        for m in methods:
            a, b = low.of(m, 0.1), high.of(m, 0.1)
            both = a.index.intersection(b.index) if a is not None and b is not None else []
            items.append(Item(name_of(m), (b.loc[both] - a.loc[both]).to_numpy() if len(both) else None))
        there = [i for i in items if i.values is not None]
        if not there:
            return Verdict(UNTESTED)
        return judge(there, threshold, above=above)

    return one


def allocation(rows) -> Verdict:
    """Rank correlation over ids of occurrences with the numbers given to an id (column ``allocation``), below 0.9."""
    if "allocation" not in rows:
        return Verdict(UNTESTED)
    rows, items = rows[rows["model"].eq("dlrm") & rows["dim"].eq(16)], []
    if (rows["budget"] > 1).any():                         # sizes in bytes, as a share
        share = (rows["budget"] / rows["bytes_full"]).round(6)
        rows = rows.assign(budget=rows["budget"].where(rows["budget"] <= 1, share))
    for method in IMPORTANCE:
        own = rows[rows["method"].eq(method) & rows["spec"].eq(method) & rows["status"].eq("ok")]
        for budget, cell in own.groupby("budget"):
            told = [json.loads(text) for text in cell["allocation"] if isinstance(text, str) and text]
            values = [t["spearman"] for t in told if t and t.get("spearman") is not None]
            if values:
                items.append(Item(cell_name(method, budget), np.array(values)))
    return judge(items, 0.9, above=False, unit="ρ")


def skew(rows) -> Verdict:
    shares = {c: pd.to_numeric(rows[c], errors="coerce").dropna() for c in ("top10_share", "under5_share")
              if c in rows}
    if len(shares) < 2 or not all(map(len, shares.values())):
        return Verdict(UNTESTED)
    top, rare = (100 * float(s.iloc[0]) for s in shares.values())
    return Verdict(HOLDS if top > 95 and rare > 80 else DOES_NOT, top, text=f"the top tenth holds {top:.1f} % of "
                   f"occurrences, {rare:.1f} % of ids occur fewer than 5 times", unit="%")


def both(*tests):
    def one(rows):
        found = [t(rows) for t in tests]
        order = (DOES_NOT, UNTESTED, UNDECIDED, HOLDS)
        worst = min(found, key=lambda v: order.index(v.verdict))
        return Verdict(worst.verdict, worst.ours, text=", ".join(v.text for v in found if v.text))

    return one
