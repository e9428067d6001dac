"""Which method when: Pareto fronts of AUC against bytes, look-up time and training memory, and what methods ask for.

Everything is read off rows (one data set, DLRM, the study's dimension) and off the methods' own files.
"""
from __future__ import annotations

import ast
import contextlib
import io
import math
import tokenize
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from .. import paths
from ..budget import build, solve
from ..extras import need
from ..fields import Fields
from ..memory import stored
from ..registry import table as registry
from .figures import _percent, _spread, _where
from .picture import Picture, Table, frame_html, raw, svg_of
from .retrieval import CORPUS, best_compressors
from .stamp import mark
from .style import FULL, INK, drawing, in_order, looks, title
from .summary import best_by_validation, check_rows, t_interval
from .weights import DIM, sizes_of, weighed

COSTS = {                                # name -> (axis label, unit)
    "bytes": ("deployed embedding, % of the float32 full table", "%"),
    "latency": ("look-up, multiples of Full's on the same machine", "×"),
    "training": ("memory while training, % of the full table (Full takes 300)", "%"),
}
_COLUMNS = {"bytes": "bytes_inference", "training": "bytes_training"}
COMMAND = "make study PROFILE=real"


# -- the front ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Points:
    """Finished cells of one data set: ``frame`` has a line per cell, the matrices a figure per cell and seed (or NaN).

    ``frame``: method, family, budget, seeds, auc, auc_half, valid_auc, bytes, latency, training (means; costs in the
    units of :data:`COSTS`). ``auc`` and ``log_latency`` are [cells, seeds].
    """

    frame: pd.DataFrame
    auc: np.ndarray
    log_latency: np.ndarray


def points(rows: pd.DataFrame) -> Points:
    """The finished cells among ``rows`` of one data set, model and dimension."""
    rows = best_by_validation(check_rows(rows))
    done = rows[rows["status"] == "ok"]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows finished (status ok); there is no front")
    seeds = sorted(done["seed"].unique())
    lines, auc, latency = [], [], []
    for (method, budget), own in done.groupby(["method", "budget"], dropna=False, sort=False):
        own = own.set_index("seed")
        ratio = own["latency_ms"] / own["latency_full_ms"]
        shares = {name: float((100 * own[c] / own["bytes_full"]).mean()) for name, c in _COLUMNS.items()}
        mean, half = t_interval(own["auc"])
        lines.append(dict(method=method, family=own["family"].iloc[0], budget=float(budget), seeds=len(own), auc=mean,
                          auc_half=half, valid_auc=own["valid_auc"].mean(), latency=float(np.exp(np.log(ratio).mean())),
                          **shares))
        auc.append(own["auc"].reindex(seeds).to_numpy(float))
        latency.append(np.log(ratio).reindex(seeds).to_numpy(float))
    return Points(pd.DataFrame(lines), np.array(auc), np.array(latency))


def differences(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high [n, n] of ``values[i] - values[j]`` paired by seed; NaN intervals below two common seeds."""
    gaps = values[:, None, :] - values[None, :, :]
    number = (~np.isnan(gaps)).sum(-1)
    with np.errstate(all="ignore"):
        mean = np.where(number > 0, np.nansum(gaps, -1) / number, np.nan)
        spread = np.sqrt(np.nansum((gaps - mean[..., None]) ** 2, -1) / (number - 1))
        half = need("scipy.stats", "book").t.ppf(0.5 + level / 2, np.maximum(number - 1, 1)) * spread / np.sqrt(number)
    half = np.where(number > 1, half, np.nan)
    return mean, mean - half, mean + half


def dominated(found: Points, cost: str) -> np.ndarray:
    """For each cell whether another is at least as good in AUC and in ``cost``, better in one: the intervals say so.

    Bytes are exact; of AUC and look-up time the whole 95 % interval of the difference must be on that side. bool [n].
    """
    _, better, _ = differences(found.auc)                          # [i, j]: i's AUC above j's, at the least
    if cost == "latency":
        _, _, dearer = differences(found.log_latency)              # i's time above j's, at the most
        no_dearer, cheaper = dearer <= 0, dearer < 0
    else:
        own = found.frame[cost].to_numpy()
        no_dearer, cheaper = own[:, None] <= own[None, :], own[:, None] < own[None, :]
    beats = (better >= 0) & no_dearer & ((better > 0) | cheaper)
    np.fill_diagonal(beats, False)
    return beats.any(0)


def front_of_means(auc, cost) -> np.ndarray:
    """The cells that no other's means beat: bool [n], the line of the figure."""
    auc, cost = np.asarray(auc, float), np.asarray(cost, float)
    order = np.lexsort((-auc, cost))                               # cheapest first, of equal cost the best first
    out, best, at = np.zeros(len(auc), dtype=bool), -math.inf, math.nan
    for i in order:
        out[i] = auc[i] > best or (auc[i] == best and cost[i] == at)
        if auc[i] > best:
            best, at = auc[i], cost[i]
    return out


def _apart(x, y, least: float = 0.06) -> list[int]:
    """Indices, in order, of points (in shares of the axes) to name: the highest, and those ``least`` away from all."""
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(y), kind="stable"):
        if all(math.hypot(x[i] - x[j], y[i] - y[j]) >= least for j in chosen):
            chosen.append(int(i))
    return sorted(chosen)


def pareto(rows: pd.DataFrame, *, costs=tuple(COSTS), command: str = "") -> Picture:
    """AUC against each of ``costs``, a panel each: the front of the means as a line, dominated cells faint.

    ``rows`` are of one data set, model and dimension. Cells on the front are named with their budget, or what they take
    where that is far less; of those that stand close the best one.
    """
    found = points(rows)
    frame, look = found.frame, looks(check_rows(rows))
    said = []
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure, axes = plt.subplots(len(costs), 1, figsize=(7.6, 3.7 * len(costs)), squeeze=False)
        for ax, cost in zip(axes[:, 0], costs):
            x, y = frame[cost].to_numpy(), frame["auc"].to_numpy()
            lost, front = dominated(found, cost), front_of_means(y, x)
            ax.set_xscale("log")
            for r, faint in zip(frame.itertuples(), lost):
                own = look.get(r.method) or look[FULL]
                marker, colour = own.marker or "o", own.color
                if not math.isnan(r.auc_half) and not faint:
                    ax.plot([getattr(r, cost)] * 2, [r.auc - r.auc_half, r.auc + r.auc_half], color=colour, lw=0.8,
                            alpha=0.35, zorder=1)
                ax.plot(getattr(r, cost), r.auc, marker=marker, color=colour, ls="", ms=6.5 if not faint else 4.5,
                        mew=0, alpha=0.2 if faint else 0.95, zorder=2)
            line = np.argsort(x[front])
            ax.plot(np.append(x[front][line], x.max()), np.append(y[front][line], y[front].max()), color=INK, lw=1.2,
                    drawstyle="steps-post", alpha=0.8, zorder=0)
            low, high = y[~lost].min(), y.max()
            reach = min(np.nan_to_num(frame["auc_half"][~lost]).max(), 0.3 * (high - low))
            margin = max(reach, 0.05 * max(high - low, 1e-4))
            low = min(low, np.quantile(y, 0.15))
            ax.set_ylim(low - margin, high + margin + 0.06 * (high - low))
            ax.set_xlim(x.min() / max(6, (x.max() / x.min()) ** 0.25), x.max() * 1.6)     # names stand to the left
            names = [_cell(r) for r in frame[front].itertuples()]
            bottom, top = ax.get_ylim()
            left, right = np.log(ax.get_xlim())
            apart = _apart((np.log(x[front]) - left) / (right - left), (y[front] - bottom) / (top - bottom))
            places = _spread([v + 0.05 * (top - bottom) for v in y[front][apart]], 0.062 * (top - bottom), bottom, top)
            for i, place, r in zip(apart, places, frame[front].iloc[apart].itertuples()):
                name, at, value = _cell(r, short=True), x[front][i], y[front][i]
                ax.annotate(name, (at, value), (at / 1.18, place), ha="right", va="center", fontsize=9.5,
                            color=(look.get(r.method) or look[FULL]).color,
                            arrowprops=dict(arrowstyle="-", color=INK, lw=0.5, alpha=0.6, shrinkA=1, shrinkB=3))
            ax.xaxis.set_major_locator(LogLocator(base=10))
            form = _percent if COSTS[cost][1] == "%" else (lambda v, _=None: f"{v:g}×")
            ax.xaxis.set_major_formatter(FuncFormatter(form))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel(COSTS[cost][0])
            ax.set_ylabel("test AUC")
            listed = [f"{n} {v:.4f}" for _, n, v in sorted(zip(x[front], names, y[front]))]
            said.append(f"{cost}: {', '.join(listed)}; {int(lost.sum())} of {len(frame)} cells are dominated")
        svg = svg_of(figure)
    alt = f"Pareto fronts of test AUC on {_where(rows)}, from the cheapest. " + ". ".join(said) + "."
    caption = (f"AUC against bytes, look-up time and training memory on {_where(rows)}. Line: the front of the means, "
               "its cells named with their budget, or what they take where that is far less, of close ones the best; "
               "faint: dominated, the 95 % interval of the difference says so; the rest cannot be told from the front.")
    return Picture(svg, alt, caption, rows, command)


# -- choosing under a constraint ------------------------------------------------------------------------------------

def choose(found: Points, allowed) -> dict | None:
    """The best cell among ``allowed`` (bool [n], Full left out), chosen on validation, and what cannot be told from it.

    ``best`` and ``others`` are indices into ``found.frame``, one per method (its best on validation), ``gap low high``
    the best's difference to Full, ``cells`` how many were allowed. None if nothing is.
    """
    frame = found.frame
    allowed = np.asarray(allowed) & (frame["method"] != FULL).to_numpy()
    if not allowed.any():
        return None
    ranked = frame[allowed].sort_values("valid_auc", ascending=False, kind="stable")
    per_method = ranked.drop_duplicates("method")
    best = int(per_method.index[0])
    _, low, high = differences(found.auc)
    # a method with too few common seeds cannot be told apart either
    others = [int(i) for i in per_method.index[1:] if not high[i, best] < 0]
    out = dict(best=best, others=others, cells=int(allowed.sum()), gap=math.nan, low=math.nan, high=math.nan)
    if (full := np.flatnonzero(frame["method"] == FULL)).size:
        mean, low, high = (m[best, full[0]] for m in differences(found.auc))
        out |= dict(gap=float(mean), low=float(low), high=float(high))
    return out


def constraints(found: Points, asked: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """What a reader may be bound by, as (text, cells allowed); ``asked`` is :func:`demands`."""
    frame = found.frame
    known = frame["method"].map(lambda m: m.partition("(")[0].partition("|")[0])

    def having(column, value):
        return known.map(lambda m: m in asked.index and asked.loc[m, column] == value).to_numpy()

    out = [(f"Deployed at {b:g} % of the full table or less", (frame["bytes"] <= b).to_numpy())
           for b in (50, 25, 10, 1, 0.1)]
    out += [(f"Trained in {p:g} % of Full's training memory or less", (frame["training"] <= 3 * p).to_numpy())
            for p in (50, 10, 1)]
    out += [(f"Look-up within {r:g} times Full's", (frame["latency"] <= r).to_numpy()) for r in (1.25, 2)]
    out += [("Trains on as it ships: one stage, no counts, no conversion", having("online", ONLINE[0]))]
    tenth = (frame["bytes"] <= 10).to_numpy()
    out += [("… and a tenth of the memory or less", having("online", ONLINE[0]) & tenth),
            ("A tenth of the memory and look-up within twice Full's", tenth & (frame["latency"] <= 2).to_numpy()),
            ("A tenth of the memory, deployed and in training", tenth & (frame["training"] <= 30).to_numpy())]
    return out


def _cell(r, short: bool = False) -> str:
    """A cell's name and budget, and what it takes where that is far less: some methods find their own size.

    ``short``: only what it takes, then.
    """
    space, notes = "\N{NO-BREAK SPACE}", []
    size = f"{100 * r.budget:.3g}{space}%"
    if r.bytes < 0.8 * 100 * r.budget:
        takes = f"{r.bytes:.2g}{space}%"
        if short:
            size = takes
        else:
            notes.append(f"takes{space}{takes}")
    if r.seeds == 1:
        notes.append("one seed")
    name = title(r.method) if r.method == FULL else title(r.method) + space + size
    return name + (f" ({', '.join(notes)})" if notes else "")


def decisions(rows: pd.DataFrame, *, command: str = "") -> Table:
    """Your constraint, the best method under it (chosen on validation), and those that cannot be told from it."""
    found, lines, shown = points(rows), [], []
    for text, allowed in constraints(found, demands()):
        hit = choose(found, allowed)
        if hit is None:
            lines.append(dict(constraint=text, cells=0))
            shown.append({"Your constraint": text, "Best": "nothing measured", "AUC − Full": "",
                          "Cannot be told from it": ""})
            continue
        best = found.frame.loc[hit["best"]]
        others = [found.frame.loc[i] for i in hit["others"]]
        lines.append(dict(constraint=text, cells=hit["cells"], best=best["method"], budget=best["budget"],
                          gap=hit["gap"], low=hit["low"], high=hit["high"],
                          others=" ".join(o["method"] for o in others)))
        half = (hit["high"] - hit["low"]) / 2
        gap = "" if math.isnan(hit["gap"]) else f"{hit['gap']:+.4f}".replace("-", "−") + (
            "" if math.isnan(half) else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.4f}")
        shown.append({"Your constraint": text, "Best": _cell(best), "AUC − Full": gap,
                      "Cannot be told from it": ", ".join(_cell(o) for o in others) or "no other"})
    html = frame_html(pd.DataFrame(shown), index=False).replace("ec-table", "ec-table ec-prose", 1)
    caption = (f"{_where(rows)}. Under each constraint every method stands with its best budget by validation AUC; the "
               "best of all is chosen by validation AUC too, its difference to Full is on test rows, paired by seed. "
               "Methods whose 95 % interval of the difference to the best includes zero cannot be told from it.")
    return Table(pd.DataFrame(lines), html, caption, pd.DataFrame(lines), command)


# -- what a method asks for -----------------------------------------------------------------------------------------

ONLINE = ("as it ships", "converted to ship", "after counting", "no: in stages")


def code_lines(text: str) -> int:
    """Lines of Python that hold code: no blank lines, no comments, no docstrings."""
    strings = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and ast.get_docstring(node, False) is not None:
            strings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in skip
            for line in range(token.start[0], token.end[0] + 1)}
    return len(held - strings)


def _converts(name: str) -> bool:
    """Whether a method holds other numbers once deployed: how many of each type, on a ``meta`` build for Criteo.

    The same numbers in another order (MDE joins tables of equal width) are no conversion.
    """
    def held(emb):
        return pd.Series([t.numel() for t in stored(emb).values()]).groupby(
            [str(t.dtype) for t in stored(emb).values()]).sum().to_dict()

    sizes, found = sizes_of("criteo"), weighed(name, "criteo", 0.1)
    knob = solve(name, sizes, DIM, None if found["knob"] is None and found["reachable"] else
                 max(found["bytes_inference"], int(0.1 * found["bytes_full"]))).knob
    emb = build(name, Fields(sizes), DIM, knob=knob, device="meta")
    before = held(emb)
    return before != held(emb.deploy())


@lru_cache(maxsize=1)
def demands() -> pd.DataFrame:
    """What each method asks of those who train it, indexed by method.

    Columns: ``stages`` (of its schedule, rehearsed), ``needs_counts``, ``converts`` (what ships is not what trains;
    true of several stages), ``online`` (one of :data:`ONLINE`), ``options`` (beyond the one that sets the size),
    ``lines`` (of code in its file).
    """
    from ..training.timeline import timeline

    lines = []
    for name, entry in registry().query("trains").iterrows():
        stages = len(dict.fromkeys(stage for stage, _, _ in timeline(name)))
        converts = stages > 1 or _converts(name)
        online = ONLINE[3] if stages > 1 else ONLINE[2] if entry["needs_counts"] else ONLINE[converts]
        path = paths.PACKAGE / "methods" / f"{name}.py"
        lines.append(dict(method=name, stages=stages, needs_counts=entry["needs_counts"], converts=converts,
                          online=online, options=len(entry["options"]),
                          lines=code_lines(path.read_text(encoding="utf-8"))))
    return pd.DataFrame(lines).set_index("method")


def effort() -> Table:
    """What each method asks for before, during and after training, and how much code it is."""
    asked, entries = demands(), registry()
    order = in_order(asked.index)
    shown = pd.DataFrame([{
        "Method": title(m), "Stages of training": asked.loc[m, "stages"],
        "Counts before": "yes" if asked.loc[m, "needs_counts"] else "no", "Trains on online": asked.loc[m, "online"],
        "Size by": entries.loc[m, "knob"] or "fixed", "Further options": asked.loc[m, "options"],
        "Lines of code": asked.loc[m, "lines"]} for m in order])
    caption = ("Read off the methods' files: stages as a rehearsed schedule lists them; converted: a deployed module "
               "holds other numbers than one in training, so what serves is not what goes on learning; lines without "
               "comments and docstrings, shared parts not counted.")
    return Table(asked.loc[order].reset_index(), frame_html(shown, index=False), caption)


# -- the page -------------------------------------------------------------------------------------------------------

def reading(rows: pd.DataFrame) -> list[str]:
    """What stands out, in sentences no stronger than their intervals."""
    found, asked = points(rows), demands()
    out = []
    for text, allowed in constraints(found, asked):
        if not text.startswith("Deployed at") or (hit := choose(found, allowed)) is None:
            continue
        best, share = found.frame.loc[hit["best"]], text.split(" ")[2]
        names = dict.fromkeys(title(found.frame.loc[i, "method"]) for i in hit["others"])
        to_full = ""
        if not math.isnan(hit["low"]):
            to_full = (", below Full" if hit["high"] < 0 else ", above Full" if hit["low"] > 0 else
                       ", not told apart from Full") + f" ({hit['gap']:+.4f} ± {(hit['high'] - hit['low']) / 2:.4f})"
        rest = f"; {len(names)} other methods cannot be told from it" if len(names) > 4 else (
            f"; {', '.join(names)} cannot be told from it" if names else "; every other method is below")
        out.append(f"**{share} % of the memory or less**: {title(best['method'])}{to_full}{rest}.")
    for cost, (label, _) in COSTS.items():
        lost = dominated(found, cost)
        own = found.frame.assign(lost=lost)
        always = [m for m in in_order(own["method"]) if m != FULL and own.loc[own["method"] == m, "lost"].all()]
        said = ", ".join(map(title, always)) or "no method"
        out.append(f"**Dominated at every budget** in AUC and {_SHORT[cost]}: {said}.")
    return [line.replace("(-", "(−") for line in out]


_SHORT = {"bytes": "deployed bytes", "latency": "look-up time", "training": "training memory"}


def fragment(by_dataset: dict[str, pd.DataFrame]) -> str:
    """The generated part of the page: a section per data set (real ones), then what methods ask for."""
    from ..study import results

    parts = []
    for name, rows in by_dataset.items():
        if not len(rows) or not rows["status"].eq("ok").any():
            continue
        parts += [f"## On `{name}`", raw(mark(rows)), "\n".join(f"- {line}" for line in reading(rows)),
                  "### Your constraint", raw(decisions(rows, command=COMMAND)),
                  "### The Pareto front", raw(pareto(rows, command=COMMAND))]
    if not parts:
        parts = ["No rows are published yet: run `make study`."]
    with contextlib.suppress(ValueError):                  # no rows of retrieval
        found = best_compressors(results(section="rag", dataset=[f"{CORPUS}/squad", f"{CORPUS}/nq"]),
                                 command=COMMAND)
        parts += ["## Vectors of passages", "Trained vectors, compressed for a reader that gets the ten nearest "
                  "passages ([all rows](notebooks/real/rag.ipynb)).", raw(found)]
    parts += ["## What a method asks for", raw(effort())]
    return "\n\n".join(parts) + "\n"


def real_rows() -> dict[str, pd.DataFrame]:
    """Rows of the study's table by real data set: DLRM at the study's dimension."""
    from ..study import results
    from .stamp import QUICK

    rows = results(section="dlrm", model="dlrm", dim=DIM)
    names = [n for n in dict.fromkeys(rows["dataset"]) if not str(n).startswith(QUICK)]
    return {name: rows[rows["dataset"] == name] for name in names}


