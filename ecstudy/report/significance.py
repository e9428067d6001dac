"""Figures and tables of what differs and what does not: differences to Full, ranks over blocks, learning rates."""
from __future__ import annotations

import math
from html import escape

import pandas as pd

from ..study.statistics import FEWEST_BLOCKS, MARGIN, TooFew, best_by_validation, by_spec
from ..study.statistics import contrasts as differences
from ..study.statistics import ranks as ranks_of
from .figures import _where
from .picture import Html, Picture, Table, frame_html, svg_of
from .style import FULL, INK, drawing, in_order, looks, title
from .summary import check_rows
from .tables import UNREACHABLE, _headings, by_family

_MINUS = "\N{MINUS SIGN}"


def _signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def _total(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with ``from`` and ``to``: the interval with both sources where it is there and asked for."""
    both = table["sources"].eq("seeds+rows")
    return table.assign(**{"from": table["total_low"].where(both, table["low"]),
                           "to": table["total_high"].where(both, table["high"])})


def _sources(table: pd.DataFrame) -> str:
    """What the intervals contain, in words."""
    kinds = set(table.loc[table["sources"].ne(""), "sources"])
    if not kinds:
        return "one seed, so no intervals"
    if kinds == {"seeds"}:
        return "95 % intervals over seeds, for these very test rows"
    both = "95 % intervals over seeds and test rows"
    return both if kinds == {"seeds+rows"} else both + " where test logits are at hand, over seeds alone elsewhere"


def _seeds(table: pd.DataFrame) -> str:
    low, high = int(table["seeds"].min()), int(table["seeds"].max())
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def _tally(table: pd.DataFrame) -> str:
    counts = table["verdict"].value_counts()
    return ", ".join(f"{counts[v]} {v}" for v in ("equivalent", "better", "worse", "undecided") if counts.get(v))


def equivalence(rows: pd.DataFrame, *, reference: str = FULL, margin: float = MARGIN, sources: str = "all",
                command: str = "") -> Picture:
    """Test AUC minus Full's with intervals, a panel per budget; the band is the margin of equivalence.

    ``rows`` are of one data set, model and dimension. The axis is linear within the margin and logarithmic beyond. A
    filled marker is a verdict after Holm (equivalent, better, worse: written beside it), a hollow one is undecided.
    ``sources="seeds"`` leaves the test rows' error out; see :func:`ecstudy.study.statistics.contrasts`.
    """
    named = check_rows(rows)
    table = _total(differences(rows, reference, margin=margin, sources=sources))
    table = table[table["seeds"].gt(0)]
    if table.empty:
        raise ValueError(f"no method shares a finished seed with {reference!r}; nothing to draw")
    look, order = looks(named), in_order(table["method"], dict(named[["method", "family"]].itertuples(index=False)))
    count = table.groupby("budget")["method"].nunique()
    budgets = sorted(count.index, reverse=True)
    columns = min(2, len(budgets))
    lines = [budgets[i:i + columns] for i in range(0, len(budgets), columns)]
    heights = [0.55 + 0.205 * max(count[b] for b in line) for line in lines]
    reach = max(table[["from", "to", "difference"]].abs().max().max(), 1.5 * margin)
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        figure, axes = plt.subplots(len(lines), columns, figsize=(4.3 * columns, sum(heights) + 0.4), squeeze=False,
                                    height_ratios=heights, sharex=True)
        for ax in axes.flat[len(budgets):]:
            ax.axis("off")
        low, high = _limits(table, margin)
        ticks = [10 ** k * margin for k in range(4)]
        ticks = [t for t in (*(-t for t in ticks[::-1]), 0.0, *ticks) if low <= t <= high and abs(t) <= reach]
        for ax, budget in zip(axes.flat, budgets):
            own = table[table["budget"].eq(budget)].set_index("method")
            names = [m for m in order if m in own.index][::-1]
            ax.set_xscale("symlog", linthresh=margin, linscale=0.8)
            ax.axvspan(-margin, margin, color=INK, alpha=0.16, lw=0)
            ax.axvline(0, color=INK, lw=1, ls=(0, (6, 3)))
            for y, method in enumerate(names):
                _line(ax, y, own.loc[method], look[method], high)
            ax.set_yticks(range(len(names)), [look[m].title for m in names], fontsize=9.5)
            for text, method in zip(ax.get_yticklabels(), names):
                text.set_color(look[method].color)
            ax.set(ylim=(-0.7, len(names) - 0.3), xlim=(low, high))
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_major_formatter(FixedFormatter([_signed(t, 3) if t else "0" for t in ticks]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.tick_params(labelbottom=True, labelsize=8.5)
            ax.grid(axis="y", visible=False)
            ax.set_title(_budget(budget), loc="left", color=INK, weight="bold", fontsize=10.5)
        for ax in axes[-1, :]:
            ax.set_xlabel(f"test AUC {_MINUS} {title(reference)}'s")
        if len(budgets) % columns:
            axes.flat[len(budgets) - columns].set_xlabel(f"test AUC {_MINUS} {title(reference)}'s")
        svg = svg_of(figure)
    said = "; ".join(f"{_budget(b)}: {_tally(table[table['budget'].eq(b)])}" for b in budgets)
    alt = (f"Forest plot of test AUC minus {title(reference)}'s on {_where(rows)}, margin of equivalence {margin:g}. "
           f"Verdicts at {said}.")
    caption = (f"Test AUC minus {title(reference)}'s on {_where(rows)}; {_seeds(table)}, {_sources(table)}; band: "
               f"±{margin:g}. Filled: decided at 5 % after Holm over the methods of a panel; hollow: undecided.")
    return Picture(svg, alt, caption, rows, command)


def _line(ax, y: int, cell: pd.Series, look, right: float) -> None:
    """One method: interval over seeds (thick), with both sources (thin), and a marker that tells the verdict."""
    decided = cell["verdict"] != "undecided"
    if not math.isnan(cell["from"]):
        ax.plot([cell["from"], cell["to"]], [y, y], color=look.color, lw=1.2, alpha=0.9, solid_capstyle="butt")
    if not math.isnan(cell["low"]) and cell["sources"] == "seeds+rows":
        ax.plot([cell["low"], cell["high"]], [y, y], color=look.color, lw=4, alpha=0.35, solid_capstyle="butt")
    ax.plot(cell["difference"], y, marker=look.marker, color=look.color, ms=7.5, ls="",
            mfc=look.color if decided else "none", mew=1)
    if decided:
        ax.annotate(cell["verdict"], (right, y), (-2, 0), textcoords="offset points", ha="right", va="center",
                    color=INK, fontsize=8.5)


def _limits(table: pd.DataFrame, margin: float) -> tuple[float, float]:
    """Of the axis: all means, the bulk of the intervals, and room at the right for the verdicts."""
    low = min(table["difference"].min() * 1.3, table["from"].quantile(0.05), -3 * margin)
    high = max(table["difference"].max() * 1.3, table["to"].quantile(0.95), 3 * margin)
    return 1.15 * low, 6 * high


def _budget(budget: float) -> str:
    return "own size" if math.isnan(budget) else f"{100 * budget:g} %" if budget <= 1 else f"{budget:,.0f} bytes"


def contrasts_table(rows: pd.DataFrame, *, reference: str = FULL, margin: float = MARGIN, sources: str = "all",
                    command: str = "") -> Table:
    """Differences to Full with intervals and verdicts: methods down, budgets across.

    ``.frame`` is the table of :func:`ecstudy.study.statistics.contrasts`, with all p-values.
    """
    named = check_rows(rows)
    table = differences(rows, reference, margin=margin, sources=sources)
    order = in_order(table["method"], dict(named[["method", "family"]].itertuples(index=False)))
    budgets = sorted(table["budget"].dropna().unique(), reverse=True)
    cell = {(c["method"], c["budget"]): c for c in _total(table).to_dict("records")}
    lines = [[title(m), *(_difference(cell.get((m, b))) for b in budgets)] for m in order]
    html = frame_html(pd.DataFrame(lines, columns=["Method", *map(_budget, budgets)]), index=False, escape_text=False)
    html = by_family(html, _headings(named, order)) if lines else html
    caption = (f"{_where(rows)}: test AUC minus {title(reference)}'s, paired by seed; {_sources(table)}, half width "
               "below the difference. Verdict at 5 % after Holm over the methods of a column; equivalent: within "
               f"±{margin:g} by two one-sided tests. Adjusted p of difference and of equivalence appear on pointing.")
    return Table(table, html, caption, rows, command)


def _difference(cell: dict | None) -> str:
    if cell is None:
        return ""
    if not cell["seeds"]:
        return f'<span class="ec-miss">{UNREACHABLE if cell["status"] == "unreachable" else cell["status"]}</span>'
    half = (cell["to"] - cell["from"]) / 2
    tip = (f"{cell['seeds']} seed{'s' * (cell['seeds'] != 1)}" if math.isnan(cell["se"]) else
           f"{cell['seeds']} seeds; p of difference {cell['p_difference_holm']:.2g}, of equivalence "
           f"{cell['p_equivalence_holm']:.2g} (Holm); error from {cell['sources'].replace('+', ' and ')}")
    below = cell["verdict"] if math.isnan(half) else f"± {half:.4f}<br>{cell['verdict']}"
    return f'<span title="{escape(tip)}">{_signed(cell["difference"])}<br><span class="ec-small">{below}</span></span>'


def critical_difference(rows: pd.DataFrame, *, fewest: int = FEWEST_BLOCKS, command: str = "") -> Picture | Html:
    """Average ranks over data sets, models and budgets; bars join methods closer than Nemenyi's critical difference.

    With fewer than six blocks or three methods that reached all of them there is nothing to draw; a line says so.
    """
    try:
        found = ranks_of(rows, fewest=fewest)
    except TooFew as error:
        return Html(f'<p class="ec-small">No critical-difference diagram: {escape(str(error))}.</p>')
    named = by_spec(rows)
    look, names = looks(named), list(found.average.index)
    k, blocks = len(names), len(found.auc)
    half = (k + 1) // 2
    bars = cliques(found.average.tolist(), found.critical)
    with drawing():
        import matplotlib.pyplot as plt

        top = 0.55 + 0.22 * len(bars)                            # of the labels, below the axis and the bars
        depth = top + 0.42 * half
        figure, ax = plt.subplots(figsize=(7.6, 0.75 + 0.55 * depth))
        ax.set(xlim=(1 - 0.34 * (k - 1) - 0.2, k + 0.34 * (k - 1) + 0.2), ylim=(depth, -0.95))
        ax.axis("off")
        ax.plot([1, k], [0, 0], color=INK, lw=1.2)
        for rank in range(1, k + 1):
            ax.plot([rank, rank], [0, -0.12], color=INK, lw=1)
            ax.text(rank, -0.18, f"{rank}", color=INK, ha="center", va="bottom", fontsize=9.5)
        span = min(found.critical, k - 1)
        ax.plot([1, 1 + span], [-0.72, -0.72], color=INK, lw=2.5, solid_capstyle="butt")
        ax.text(1 + span + 0.06, -0.72, f"critical difference {found.critical:.2f}", color=INK, va="center",
                fontsize=9.5)
        for i, (first, last) in enumerate(bars):
            ax.plot([found.average.iloc[first] - 0.03, found.average.iloc[last] + 0.03], [0.25 + 0.22 * i] * 2,
                    color=INK, lw=3.5, solid_capstyle="butt")
        for i, method in enumerate(names):
            rank, left = found.average.iloc[i], i < half
            y = top + 0.42 * (i if left else k - 1 - i)
            edge = 1 - 0.06 * (k - 1) if left else k + 0.06 * (k - 1)
            ax.plot([rank, rank, edge], [0, y, y], color=look[method].color, lw=1.1)
            ax.plot(rank, 0, marker=look[method].marker, color=look[method].color, ms=5.5)
            text = f"{look[method].title}  {rank:.2f}" if left else f"{rank:.2f}  {look[method].title}"
            ax.text(edge + (-0.05 if left else 0.05), y, text, color=look[method].color, va="center",
                    ha="right" if left else "left", fontsize=10)
        svg = svg_of(figure)
    said = ", ".join(f"{title(m)} {rank:.2f}" for m, rank in found.average.items())
    alt = (f"Critical-difference diagram over {blocks} blocks. Average ranks: {said}. Nemenyi's critical difference is "
           f"{found.critical:.2f}.")
    out = f"; left out, for a block they did not reach: {', '.join(map(title, found.left_out))}" * bool(found.left_out)
    caption = (f"Average ranks of test AUC over {blocks} blocks (data set, model, dimension, budget); 1 is best. Bars "
               f"join methods whose ranks differ by less than Nemenyi's critical difference at {100 * found.level:g} "
               f"%; Friedman's p {found.p:.2g}{out}. Blocks of one data set are not independent of one another.")
    return Picture(svg, alt, caption, rows, command)


def cliques(average: list[float], critical: float) -> list[tuple[int, int]]:
    """Longest runs of neighbours in rising ``average`` that span at most ``critical``: (first, last), two or more."""
    bars = []
    for first in range(len(average)):
        last = max(i for i in range(first, len(average)) if average[i] - average[first] <= critical)
        if last > first and (not bars or last > bars[-1][1]):
            bars.append((first, last))
    return bars


def learning_rates(rows: pd.DataFrame, *, command: str = "") -> Table:
    """The learning rates that validation chose, methods down and budgets across.

    ``.frame`` has ``method budget lr tried valid_auc ahead``: how many rates were tried, the mean validation AUC of the
    chosen one, and how far it lies ahead of the next best (NaN where one was tried), over the seeds each has.
    """
    named = check_rows(rows)
    kept = best_by_validation(named)
    kept = kept[kept["status"].eq("ok") & kept["lr"].gt(0)]
    tried = {(method, _budget(budget)): group for (method, budget), group
             in named[named["lr"].gt(0)].groupby(["method", "budget"], dropna=False)}       # NaN is not equal to NaN
    lines = []
    for (method, budget), group in kept.groupby(["method", "budget"], dropna=False, sort=False):
        rates, best = tried[method, _budget(budget)], group["lr"].iloc[0]
        other = rates[rates["lr"].ne(best) & rates["status"].eq("ok")].groupby("lr")["valid_auc"].mean()
        value = group["valid_auc"].mean()
        lines.append(dict(method=method, budget=budget, lr=best, tried=rates["lr"].nunique(), valid_auc=value,
                          ahead=value - other.max() if len(other) else math.nan))
    table = pd.DataFrame(lines, columns=["method", "budget", "lr", "tried", "valid_auc", "ahead"])
    order = in_order(table["method"], dict(named[["method", "family"]].itertuples(index=False)))
    budgets = sorted(table.loc[table["method"].ne(FULL), "budget"].dropna().unique(), reverse=True)
    cell = {(c["method"], c["budget"]): c for c in table.to_dict("records")}
    shown = []
    for method in order:
        own = [c for (m, _), c in cell.items() if m == method]
        shown.append([title(method), *([_rate(own[0])] + [""] * (len(budgets) - 1) if method == FULL and budgets else
                                       [_rate(cell.get((method, b))) for b in budgets])])
    html = frame_html(pd.DataFrame(shown, columns=["Method", *map(_budget, budgets)]), index=False, escape_text=False)
    html = by_family(html, _headings(named, order)) if shown else html
    grid = ", ".join(f"{rate:g}" for rate in sorted(named["lr"].dropna().unique()) if rate > 0)
    caption = (f"{_where(rows)}: learning rate of the best validation AUC among {grid}; below, how far ahead of the "
               "next (validation AUC), or that no other was tried. Full has one size; its rate stands first.")
    return Table(table, html, caption, rows, command)


def _rate(cell: dict | None) -> str:
    if cell is None:
        return ""
    below = "only one tried" if cell["tried"] == 1 else "" if math.isnan(cell["ahead"]) else f"{cell['ahead']:+.4f}"
    return f'{cell["lr"]:g}<br><span class="ec-small">{below.replace("-", _MINUS)}</span>'
