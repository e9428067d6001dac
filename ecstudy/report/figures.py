"""One function per figure. Each takes rows (or facts) and returns a :class:`Picture`; none reads a file or trains."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .picture import Picture, svg_of
from .style import FULL, INK, beyond, drawing, looks, title
from .summary import cells, check_rows

MIB = 2 ** 20


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions in [low, high] at least ``gap`` apart, in the order of ``wanted`` and close to it."""
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(1, len(wanted)))
    placed = np.clip(np.asarray(wanted, dtype=float)[order], low, high)
    for _ in range(200):                                  # relax overlaps from both ends until none is left
        moved = False
        for i in range(len(placed) - 1):
            if (short := gap - (placed[i + 1] - placed[i])) > 1e-9 * max(1, abs(gap)):
                placed[i] -= short / 2
                placed[i + 1] += short / 2
                moved = True
        placed += max(0, low - placed[0]) if len(placed) else 0
        placed -= max(0, placed[-1] - high) if len(placed) else 0
        if not moved:
            break
    out = np.empty(len(placed))
    out[order] = placed
    return out.tolist()


def _where(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['dataset']}, {str(first['model']).upper()}, dimension {int(first['dim'])}"


def _seeds(table: pd.DataFrame) -> str:
    counts = sorted(table.loc[table["status"] == "ok", "seeds"].unique())
    if not counts or counts == [1]:
        return "one seed, so no intervals"
    return f"{'–'.join(str(c) for c in dict.fromkeys((counts[0], counts[-1])))} seeds, bars and band: 95 % t-intervals"


def _percent(value, _position=None) -> str:
    return f"{value:g} %"


def _end_labels(ax, ends: list[tuple[str, float, float, object]], right: float, apart: float) -> None:
    """Names of the lines in the right margin, each tied by a thin leader to the end of its line."""
    # in parts of the axis' height, so that labels stand evenly on a logarithmic one too
    heights = (ax.transScale + ax.transLimits).transform([(x, y) for _, x, y, _ in ends])[:, 1]
    for (name, x, y, look), place in zip(ends, _spread(heights.tolist(), apart, 0.01, 1)):
        ax.annotate(look.title, (x, y), (right, place), textcoords="axes fraction", color=look.color, va="center",
                    fontsize=10, annotation_clip=False,
                    arrowprops=dict(arrowstyle="-", color=look.color, lw=0.6, alpha=0.55, shrinkA=1, shrinkB=4,
                                    relpos=(0, 0.5)))                         # the leader ends where the name begins


PANELS = {"inter-feature": "inter-feature: ids share storage", "intra-feature": "intra-feature: smaller rows",
          "baseline": "baselines"}
CROWD = 8                                # more lines than this are drawn in a panel per family


def auc_against_bytes(rows: pd.DataFrame, *, highlight: str | None = None, command: str = "") -> Picture:
    """Test AUC against the bytes of the deployed embedding, one line per method, Full as a band.

    ``rows`` are of one data set, model and dimension. The horizontal axis is logarithmic, in per cent of the float32
    full table (below) and in MiB (above); points are moved aside by up to some per cent so that their bars can be told
    apart. ``highlight`` draws one method in colour and the others faint. More methods than a reader can tell apart are
    drawn in one panel per family on the same axes, the other families faint behind.
    """
    table = cells(rows)
    done = table[table["status"] == "ok"]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows finished (status ok); nothing to draw")
    full_bytes = float(pd.to_numeric(rows["bytes_full"], errors="coerce").max())
    look = looks(check_rows(rows))
    drawn = [m for m in look if m != FULL and (done["method"] == m).any()]
    family = dict(done[["method", "family"]].itertuples(index=False))
    panels = [("", [highlight])] if highlight in drawn else [("", [])] if highlight else _panels(drawn, family)
    with drawing():
        import matplotlib.pyplot as plt

        heights = [4.4] if len(panels) == 1 else [1.3 + max(1.0, 0.24 * len(own)) for _, own in panels]
        figure, axes = plt.subplots(len(panels), 1, figsize=(7.6, sum(heights)), sharex=True, sharey=True,
                                    squeeze=False, height_ratios=heights)
        low = done["reached_pct"].min()
        bottom, top = done["auc"].min(), done["auc"].max()     # a wide interval may leave the frame, a mean may not
        reach = min(done["auc_half"].max(), 0.35 * (top - bottom)) if done["auc_half"].notna().any() else 0
        margin = reach + 0.06 * max(top - bottom, 1e-4)
        for ax, height, (text, own) in zip(axes[:, 0], heights, panels):
            _bytes_limits(ax, low)
            ax.set_ylim(bottom - margin, top + margin)
            ends = _auc_lines(ax, done, look, drawn, own)
            full = done[done["method"] == FULL]
            if len(full):
                ax.annotate("Full", (ax.get_xlim()[0], full["auc"].iloc[0]), (4, 4), textcoords="offset points",
                            color=INK)
            if ends:
                _end_labels(ax, ends, 1.03, 0.052 * 4.4 / height)
            if text:
                ax.text(0.005, 0.03, text, transform=ax.transAxes, color=INK, fontsize=10.5, weight="bold")
            ax.set_ylabel("test AUC")
        _bytes_axes(axes[:, 0], low, full_bytes)
        svg = svg_of(figure)
    best = done[done["method"] != FULL].sort_values("auc").tail(1)
    alt = f"Line chart of test AUC against deployed size in per cent of the full table on {_where(rows)}."
    if len(full):
        alt += f" Full reaches {full['auc'].iloc[0]:.4f}."
    if len(best):
        b = best.iloc[0]
        alt += f" The highest compressed cell is {title(b['method'])} at {b['reached_pct']:.3g} %: {b['auc']:.4f}."
    note = "; faint: the methods of the other panels" if len(panels) > 1 else ""
    caption = f"AUC against memory on {_where(rows)}; {_seeds(table)}; dashed: Full{note}."
    return Picture(svg, alt, caption, rows, command)


def _panels(drawn: list[str], family: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Headings and methods of the panels: one for all, or one per family and block of the tables where they are too
    many to be told apart."""
    if len(drawn) <= CROWD:
        return [("", drawn)]
    panels = {}
    for later in (False, True):
        for kind in dict.fromkeys((*PANELS, *family.values())):
            if own := [m for m in drawn if family[m] == kind and beyond(m) == later]:
                panels[PANELS.get(kind, kind) + ", beyond the paper's" * later] = own
    return list(panels.items())


def _bytes_limits(ax, low: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(110, low / 1.25)                              # compression grows to the right, where methods part


def _bytes_axes(axes, low: float, full_bytes: float) -> None:
    """Deployed size from 100 % down to ``low`` %: below the last of ``axes`` in per cent, above the first in MiB."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    values = (100, 50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
    if low < 0.03:                                          # over more than three decades these would meet
        values = [10.0 ** k for k in range(2, -6, -1)]
    ticks = [t for t in values if low / 1.25 <= t <= 110]
    axes[-1].set_xticks(ticks if len(ticks) > 1 else [low, 100.0])
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].xaxis.set_major_formatter(FuncFormatter(_percent))
    axes[-1].set_xlabel("deployed embedding, % of the float32 full table (measured bytes)")
    above = axes[0].secondary_xaxis("top", functions=(lambda p: p * full_bytes / 100 / MIB,
                                                      lambda m: m * MIB * 100 / full_bytes))
    above.set_xlabel("MiB")
    above.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    above.xaxis.set_minor_locator(NullLocator())


def _auc_lines(ax, done: pd.DataFrame, look: dict, drawn: list[str], own: list[str]) -> list[tuple]:
    """Full's band and all lines, those of ``own`` in colour; returns where the coloured ones end."""
    full = done[done["method"] == FULL]
    if len(full):
        mean, half = full[["auc", "auc_half"]].iloc[0]
        ax.axhline(mean, color=INK, lw=1.2, ls=(0, (6, 3)))
        if not math.isnan(half):
            ax.axhspan(mean - half, mean + half, color=INK, alpha=0.13, lw=0)
    return _lines(ax, done, look, drawn, own, "auc", ("auc_half", "auc_half"))


def _lines(ax, done: pd.DataFrame, look: dict, drawn: list[str], own: list[str], y: str, bars: tuple[str, str],
           x: str = "reached_pct", apart: float = 1.018, rising: bool = False) -> list[tuple]:
    """A line per method of ``own``, its bars in the columns ``bars`` (below, above), the others faint.

    Returns where the coloured ones end: at the smallest ``x``, or ``rising`` at the largest. Points of neighbours are a
    factor ``apart``.
    """
    ends = []
    crowd = len(drawn) > CROWD
    for i, method in enumerate(own if crowd else drawn):
        line = done[done["method"] == method].sort_values(x, ascending=rising)
        faint, style, many = method not in own, look[method], len(own if crowd else drawn)
        aside = apart ** (i - (many - 1) / 2) if line[bars[0]].notna().any() else 1
        ax.errorbar(line[x] * aside, line[y], yerr=line[list(bars)].fillna(0).to_numpy().T, color=style.color,
                    marker=style.marker, ls=style.dash, capsize=2.5, elinewidth=1, zorder=2 if faint else 3,
                    alpha=0.2 if faint else 1)
        if not faint:
            ends.append((method, line[x].iloc[-1] * aside, line[y].iloc[-1], style))
    for method in [m for m in drawn if crowd and m not in own]:
        line = done[done["method"] == method].sort_values(x, ascending=rising)
        ax.plot(line[x], line[y], color=INK, lw=0.9, alpha=0.3, zorder=1, marker=".", ms=4)
    return ends


def costs(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """What a method costs beside Full: training memory, training time and latency, one dot per budget."""
    table = cells(rows)
    done = table[(table["status"] == "ok") & (table["method"] != FULL)]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows of a compressed method finished (status ok); nothing to draw")
    svg = _dots(done, looks(check_rows(rows)),
                [("training_pct", "training memory, % of the full table", 300.0),
                 ("time_ratio", "training time ÷ Full's", 1.0), ("latency_ratio", "latency ÷ Full's", 1.0)])
    slow = done.loc[done["latency_ratio"].idxmax()] if done["latency_ratio"].notna().any() else None
    alt = f"Dot plots of training memory, training time and latency beside Full's on {_where(rows)}."
    if slow is not None:
        alt += f" The slowest look-up is {title(slow['method'])}: {slow['latency_ratio']:.2g} times Full's."
    return Picture(svg, alt, f"Costs beside Full (dashed) on {_where(rows)}; a larger dot is a larger budget.",
                   rows, command)


def _dots(done: pd.DataFrame, look: dict, panels: list[tuple[str, str, float]]) -> str:
    """Methods down, a panel per ``(column, label, dashed reference or NaN)``, one dot per budget; the SVG."""
    names = [m for m in look if m in set(done["method"])][::-1]
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        figure, axes = plt.subplots(1, len(panels), figsize=(8.6, 0.9 + 0.34 * len(names)), sharey=True)
        for ax, (column, label, reference) in zip(axes, panels):
            for y, method in enumerate(names):
                line = done[done["method"] == method].dropna(subset=[column])
                ax.plot(line[column], [y] * len(line), color=look[method].color, lw=1, alpha=0.5)
                ax.scatter(line[column], [y] * len(line), color=look[method].color, marker=look[method].marker,
                           s=18 + 30 * np.sqrt(line["budget"]), linewidths=0)
            values = done[column].dropna().tolist()
            if not math.isnan(reference):
                ax.axvline(reference, color=INK, lw=1, ls=(0, (6, 3)))
                values.append(reference)
            ax.set_xscale("log")
            low, high = min(values) / 1.5, max(values) * 1.5
            ax.set_xlim(low, high)
            ax.xaxis.set_major_locator(MaxNLocator(4) if high < 8 * low else LogLocator(base=10))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel(label)
            ax.set_ylim(-0.6, len(names) - 0.4)
        axes[0].set_yticks(range(len(names)), [look[m].title for m in names])
        return svg_of(figure)


def frequency(curves: pd.DataFrame, *, of: str = "ids", held: str = "occurrences", command: str = "") -> Picture:
    """How few ids hold most occurrences: ``curves`` has columns ``dataset id_share occurrence_share`` (fractions).

    ``of`` and ``held`` name other things counted."""
    names = list(dict.fromkeys(curves["dataset"]))
    if not names:
        raise ValueError("no curves to draw; ecstudy.data.statistics.frequency_curve makes one")
    colours = ["#d9772b", "#2a9d6c", "#2f7fd1", "#a066d3", "#d6504b"]
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter

        figure, ax = plt.subplots(figsize=(7.6, 3.8))
        lines = [curves[curves["dataset"] == name].sort_values("id_share") for name in names]
        for i, (name, line) in enumerate(zip(names, lines)):
            colour, dash = colours[i % len(colours)], ["-", (0, (5, 1.6)), (0, (1.5, 1.3))][i % 3]
            ax.plot(100 * line["id_share"], 100 * line["occurrence_share"], color=colour, ls=dash)
            height = 0.35 + min(0.2, 0.55 / max(1, len(names) - 1)) * i          # labels one above the other
            x = [np.interp(height, other["occurrence_share"], other["id_share"]) for other in lines]
            last = len(names) > 1 and x[i] == max(x)                             # beside the others, not across them
            ax.annotate(name, (100 * x[i], 100 * height), (8, -10) if last else (-8, 6), color=colour,
                        textcoords="offset points", ha="left" if last else "right")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_percent))
        ax.yaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set_ylim(0, 102)
        ax.set_xlabel(f"most frequent {of}, % of all")
        ax.set_ylabel(f"{held} they hold")
        svg = svg_of(figure)
    said = []
    for name in names:
        line = curves[curves["dataset"] == name].sort_values("id_share")
        said.append(f"{name} {100 * np.interp(0.01, line['id_share'], line['occurrence_share']):.0f} %")
    alt = (f"Line chart of the share of {held} held by the most frequent {of}. The top 1 % of {of} hold: "
           + ", ".join(said))
    rows = ", training rows" if of == "ids" else ""
    caption = f"Skew: the share of {held} that the most frequent {of} hold{rows}."
    return Picture(svg, alt + ".", caption, curves, command)


_STAGE = {"all": "#2f7fd1", "emb": "#2a9d6c", "aux": "#d9772b"}

_UPDATES = {"all": "embedding and network", "emb": "embedding only", "aux": "auxiliary state, on validation rows"}


def timeline(stages, *, command: str = "") -> Picture:
    """The stages of a method's schedule from left to right: ``stages`` is ``[(stage, steps, update), ...]``.

    Stages follow one another; several kinds of update within a stage take turns. Steps are those of a rehearsed run, so
    their number says nothing about data.
    """
    stages = [(str(stage), int(steps), str(update)) for stage, steps, update in stages]
    if not stages:
        raise ValueError("a schedule without stages; a method yields at least one step")
    names = list(dict.fromkeys(stage for stage, _, _ in stages))
    kinds = list(dict.fromkeys(update for _, _, update in stages))
    colour = {kind: _STAGE.get(kind, ["#a066d3", "#1ca3a8", "#b08600"][i % 3]) for i, kind in enumerate(kinds)}
    with drawing():
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(7.6, 0.85 + 0.42 * len(names)))
        start = 0
        for y, name in zip(range(len(names) - 1, -1, -1), names):
            own = [(steps, update) for stage, steps, update in stages if stage == name]
            total = sum(steps for steps, _ in own)
            for i, (steps, update) in enumerate(own):        # kinds of one stage alternate: side by side, full length
                ax.barh(y + 0.28 - (i + 0.5) * 0.56 / len(own), total, left=start, height=0.56 / len(own) - 0.03,
                        color=colour[update], alpha=0.85, lw=0)
            start += total
        ax.set_yticks(range(len(names)), names[::-1])
        ax.set_xlabel("steps of a rehearsed run")
        ax.grid(axis="y", visible=False)
        ax.legend([plt.Rectangle((0, 0), 1, 1, color=colour[k], alpha=0.85) for k in kinds],
                  [_UPDATES.get(k, k) for k in kinds], loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds),
                  borderaxespad=0.2, handlelength=1, fontsize=9.5, labelcolor=INK)
        svg = svg_of(figure)
    said = "; ".join(f"{name}: {sum(s for n, s, _ in stages if n == name)} steps updating "
                     f"{', then '.join(dict.fromkeys(_UPDATES.get(u, u) for n, _, u in stages if n == name))}"
                     for name in names)
    return Picture(svg, f"Timeline of the training schedule. {said}.", said + ".", None, command)
