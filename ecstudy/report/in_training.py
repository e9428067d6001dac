"""Compression while training goes on: progressive quality, memory and what is kept over a stream, drift, the ladder.

``found`` is what :func:`ecstudy.study.stream.traces` reads: a line per run and window. Differences are to Full's on the
same rows of the stream and the same seed; lines are means over seeds, bands reach from the lowest seed to the highest.
"""
from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..study.stream import CHOICES, LADDER, choice, kept
from .figures import _dots, _end_labels
from .picture import Picture, Table, frame_html, svg_of
from .retrieval import _grid
from .style import FULL, INK, drawing, in_order, looks, title
from .summary import by_spec, cells, check_rows, t_interval
from .tables import _number, _plus_minus, duration

MEASURES = {"ne": "normalised entropy", "auc": "AUC"}
_LOGS = {"still": (0, (1.5, 1.3)), "drifting": "-"}
_UNITS = {"rows": ("o", "#148f94"), "chunks, uniform": ("s", "#a066d3"), "chunks, dynamic": ("D", "#d9772b")}


def _checked(found: pd.DataFrame) -> pd.DataFrame:
    """Lines of one log, with the method a whole spec; raises ValueError if there are none."""
    if not len(found):
        raise ValueError("no traces to draw; ecstudy.study.stream.sweep measures them, and traces(rows) reads them")
    return check_rows(found)


def beside_full(found: pd.DataFrame) -> pd.DataFrame:
    """Each line with ``ne_gap`` and ``auc_gap``: its measure minus Full's in the same window and of the same seed.

    Raises ValueError without lines of Full: there is nothing to compare with.
    """
    full = found[found["method"] == FULL]
    if not len(full):
        raise ValueError(f"no trace of {FULL!r}: quality over time is drawn as the difference to it")
    keys = ["dataset", "seed", "examples"]
    both = found.merge(full.drop_duplicates(keys)[[*keys, *MEASURES]], on=keys, suffixes=("", "_full"))
    return both.assign(**{f"{m}_gap": both[m] - both[f"{m}_full"] for m in MEASURES})


def over_seeds(lines: pd.DataFrame, column: str) -> pd.DataFrame:
    """``method budget examples`` with ``mean low high seeds`` of a column over seeds, in the order of the stream."""
    grouped = lines.groupby(["method", "budget", "examples"], dropna=False)[column]
    return grouped.agg(mean="mean", low="min", high="max", seeds="count").reset_index().sort_values("examples")


def _draw(ax, table: pd.DataFrame, look: dict, dash=None) -> list[tuple]:
    """A line with its band for each method of a table of :func:`over_seeds`; where they end."""
    ends = []
    for method in [m for m in look if (table["method"] == m).any()]:
        own, style = table[table["method"] == method], look[method]
        every = max(1, len(own) // 4)                        # hues of one family lie close: markers tell them apart
        ax.plot(own["examples"], own["mean"], color=style.color, ls=style.dash if dash is None else dash,
                marker=style.marker, markevery=(len(own) % every, every), ms=5)
        if (own["seeds"] > 1).any():
            ax.fill_between(own["examples"], own["low"], own["high"], color=style.color, alpha=0.16, lw=0)
        ends.append((method, own["examples"].iloc[-1], own["mean"].iloc[-1], style))
    return ends


def _examples(ax) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def _seeds_of(found: pd.DataFrame) -> str:
    n = found["seed"].nunique()
    return f"means over {n} seeds, bands from the lowest to the highest" if n > 1 else "one seed"


def _late(table: pd.DataFrame, column: str = "mean") -> pd.Series:
    """Mean over the second half of the stream, by method."""
    return table[table["examples"] > table["examples"].max() / 2].groupby("method")[column].mean()


def _listed(budgets: list[float], values: list[pd.Series], form: str = "{:+.4f}") -> str:
    """Figures of methods in words, from the lowest to the highest, budget by budget."""
    return "; ".join(f"at {100 * b:.3g} % " + ", ".join(f"{title(m)} {form.format(v)}" for m, v in
                                                         own.sort_values().items()) for b, own in zip(budgets, values))


def progressive(found: pd.DataFrame, *, command: str = "") -> Picture:
    """Normalised entropy and AUC of rows not yet seen, over the stream: Full's, and below it differences to it.

    A row of panels per budget. NE is better when lower, AUC when higher.
    """
    found = _checked(found)
    lines = beside_full(found)
    rest = lines[lines["method"] != FULL]
    budgets = sorted(rest["budget"].unique(), reverse=True)
    if not budgets:
        raise ValueError("traces of Full alone; quality over time is compared between methods")
    look = looks(found)
    with drawing():
        import matplotlib.pyplot as plt

        heights = [1.7] + [1.1 + 0.2 * max(4, rest[rest["budget"] == b]["method"].nunique()) for b in budgets]
        figure, axes = plt.subplots(len(heights), 2, figsize=(8.6, sum(heights)), sharex=True, squeeze=False,
                                    height_ratios=heights)
        for column, measure in enumerate(MEASURES):
            own = lines[lines["method"] == FULL]
            _draw(axes[0, column], over_seeds(own, measure), look)
            axes[0, column].set_title(f"Full: {MEASURES[measure]}")
            for row, budget in enumerate(budgets, 1):
                ax = axes[row, column]
                table = over_seeds(rest[rest["budget"] == budget], f"{measure}_gap")
                ends = _draw(ax, table, look)
                ax.axhline(0, color=INK, lw=1.2, ls=(0, (6, 3)))
                ax.set_title(f"{100 * budget:.3g} %: {measure.upper()} minus Full's")
                _examples(ax)
                if column:
                    _end_labels(ax, ends, 1.05, 0.12 * 1.9 / heights[row])
        figure.supxlabel("examples seen", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    late = [_late(over_seeds(rest[rest["budget"] == b], "ne_gap")) for b in budgets]
    text = f"NE minus Full's in the second half of the stream (lower is better): {_listed(budgets, late)}"
    return Picture(svg, f"Line charts of progressive NE and AUC over a stream of {found['dataset'].iloc[0]}. {text}.",
                   f"Progressive validation on {found['dataset'].iloc[0]}: every batch is predicted before it is "
                   f"trained on; {_seeds_of(found)}. {text}.", lines.drop(columns=["settings", "kept"]), command)


def training_memory(found: pd.DataFrame, *, command: str = "") -> Picture:
    """Bytes held while training (weights, moments, all that is auxiliary) over the stream, a panel per budget."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = _checked(found)
    found = found.assign(pct=100 * found["training_bytes"] / found["bytes_full"],
                         ships=100 * found["bytes_inference"] / found["bytes_full"])
    rest, full = found[found["method"] != FULL], found[found["method"] == FULL]
    budgets = sorted(rest["budget"].unique(), reverse=True)
    if not budgets:
        raise ValueError("traces of Full alone; memory is compared between methods")
    look = looks(found)
    with drawing():
        figure, axes = _grid(len(budgets), 2, 4.3 if len(budgets) > 1 else 7.6, 3.2)
        for ax, budget in zip(axes, budgets):
            own = rest[rest["budget"] == budget]
            ax.set_yscale("log")
            table = pd.concat([full, own])
            ax.set_ylim(0.8 * rest["ships"].min(), 1.4 * max(rest["pct"].max(), full["pct"].max() if len(full) else 0))
            ends = _draw(ax, over_seeds(table, "pct"), look)
            for method, part in own.groupby("method"):
                ax.plot(part["examples"].max(), part["ships"].mean(), "o", mfc="none", color=look[method].color, ms=6)
            _examples(ax)
            _end_labels(ax, ends, 1.06, 0.085)
            ax.set_title(f"{100 * budget:.3g} % of the memory")
            ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        figure.supxlabel("examples seen", color=INK, fontsize=10.5)
        figure.supylabel("while training, % of full weights", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    said = _listed(budgets, [rest[rest["budget"] == b].groupby("method")["pct"].max() for b in budgets], "{:.0f} %")
    text = (f"Full holds {full['pct'].max():.0f} %; " if len(full) else "") + said
    return Picture(svg, f"Line charts of memory while training on {found['dataset'].iloc[0]}. {text}.",
                   f"Memory while training, in per cent of the full table's weights, on {found['dataset'].iloc[0]}: "
                   f"weights, both moments and auxiliary state; hollow: what ships. {text}.",
                   found.drop(columns=["settings", "kept"]), command)


def kept_chunks(found: pd.DataFrame, method: str = "fiited", budget: float | None = None, *,
                command: str = "") -> Picture:
    """Which share of its chunks each field keeps: over the stream, at the end by chunk position, and of the memory.

    Fields are in the order of their sizes, the largest above. ``budget``: default the largest below a quarter, or the
    only one. Shares are means over seeds.

    Raises
    ------
    ValueError
        For a method whose traces do not tell what is kept.
    """
    found = _checked(found)
    own = found[(found["method"] == method) & found["kept"].notna()]
    if not len(own):
        raise ValueError(f"no trace of {method!r} tells what is kept; expected a method with chunks, such as fiited or "
                         "ada_embed")
    budgets = sorted(own["budget"].unique())
    budget = max([b for b in budgets if b < 0.25] or budgets[:1]) if budget is None else budget
    own = own[np.isclose(own["budget"], budget)]
    if not len(own):
        raise ValueError(f"no trace of {method!r} at the budget {budget!r}; there are {budgets}")
    at = sorted(own["examples"].unique())
    shares = [np.mean([kept(line)[1] for line in own[own["examples"] == x].to_dict("records")], axis=0) for x in at]
    names, sizes = zip(*kept(own.iloc[0].to_dict())[0])
    over_time, last, sizes = np.stack([s.mean(axis=1) for s in shares], axis=1), shares[-1], np.array(sizes)
    held = over_time[:, -1] * sizes / (over_time[:, -1] * sizes).sum()
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter

        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(8.6, 1.3 + 0.2 * len(names)), sharey=True, width_ratios=[5, 0.9 + 0.35 * last.shape[1], 2.4])
        colours = dict(cmap="viridis", vmin=0, vmax=1, edgecolors="face", linewidth=0.4)    # no seams between cells
        rows = np.arange(len(names) + 1) - 0.5
        drawn = left.pcolormesh([0, *at], rows, over_time, **colours)
        middle.pcolormesh(np.arange(last.shape[1] + 1) + 0.5, rows, last, **colours)
        right.barh(range(len(names)), 100 * held, color="#d9772b", height=0.7)
        for ax, text in (left, "kept, over the stream"), (middle, "by position"), (right, "of the memory, %"):
            ax.set_title(text)
            ax.grid(False)
        left.set_yticks(range(len(names)), [f"{n}  {s:,}" for n, s in zip(names, sizes)], fontsize=8.5)
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_xlabel("examples seen")
        _examples(left)
        middle.set_xticks(range(1, last.shape[1] + 1))
        middle.set_xlabel("chunk")
        right.grid(axis="x", visible=True)
        bar = figure.colorbar(drawn, ax=[left, middle], location="bottom", aspect=45, pad=0.02,
                              format=FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        bar.outline.set_visible(False)
        svg = svg_of(figure)
    large, small = over_time[0, -1], over_time[len(names) // 2:, -1].mean()
    moved = np.abs(np.diff(over_time, axis=1)).sum(1)
    said = (f"At the end the largest field, {names[0]}, keeps {100 * large:.1f} % of its chunks and holds "
            f"{100 * held[0]:.0f} % of the memory; the smaller half of the fields keeps {100 * small:.0f} %. The share "
            f"of {names[int(moved.argmax())]} moved most")
    return Picture(svg, f"Heat maps of the chunks that {title(method)} keeps at {100 * budget:.3g} % on "
                   f"{found['dataset'].iloc[0]}. {said}.",
                   f"Share of its chunks that each field keeps, {title(method)} at {100 * budget:.3g} % of the memory, "
                   f"{found['dataset'].iloc[0]}; beside the names, sizes. {said}.", _long(names, sizes, at, shares),
                   command)


def _long(names, sizes, at, shares) -> pd.DataFrame:
    return pd.DataFrame([dict(examples=x, field=n, size=size, position=j + 1, kept=share[f, j])
                         for x, share in zip(at, shares) for f, (n, size) in enumerate(zip(names, sizes))
                         for j in range(share.shape[1])])


def drift(still: pd.DataFrame, moving: pd.DataFrame, *, command: str = "") -> Picture:
    """What a planted drift does to NE over the stream: to Full, and to each method's difference to Full.

    ``still`` and ``moving`` are traces of the same log without and with drift; only budgets and methods of both count.
    The right panel has ``(NE - Full's NE)`` with drift minus the same without: above 0 a method adapts less well than
    Full does.
    """
    pair = {"still": beside_full(_checked(still)), "drifting": beside_full(_checked(moving))}
    look = looks(still)
    keys = ["method", "family", "budget", "seed", "examples"]
    both = pair["drifting"].merge(pair["still"][[*keys, "ne_gap"]], on=keys, suffixes=("", "_still"))
    both = both[both["method"] != FULL].assign(effect=lambda t: t["ne_gap"] - t["ne_gap_still"])
    if not len(both):
        raise ValueError("no method and budget in both logs; nothing to compare")
    budgets = sorted(both["budget"].unique(), reverse=True)
    with drawing():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 1 + len(budgets), figsize=(4.2 * (1 + len(budgets)), 3.4), squeeze=False)
        ax = axes[0, 0]
        for name, lines in pair.items():
            full = over_seeds(lines[lines["method"] == FULL], "ne")
            _draw(ax, full, look, _LOGS[name])
            ax.annotate(name, (full["examples"].iloc[-1], full["mean"].iloc[-1]), (0, 7), ha="right", color=INK,
                        textcoords="offset points")
        ax.set_title("Full: NE")
        _examples(ax)
        for ax, budget in zip(axes[0, 1:], budgets):
            ends = _draw(ax, over_seeds(both[both["budget"] == budget], "effect"), look)
            ax.axhline(0, color=INK, lw=1.2, ls=(0, (6, 3)))
            ax.set_title(f"{100 * budget:.3g} %: drift's effect on NE − Full's")
            _examples(ax)
            _end_labels(ax, ends, 1.05, 0.085)
        figure.supxlabel("examples seen", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    levels = [_late(over_seeds(pair[n][pair[n]["method"] == FULL], "ne"))[FULL] for n in _LOGS]
    late = [_late(over_seeds(both[both["budget"] == b], "effect")) for b in budgets]
    said = (f"Drift takes Full's NE from {levels[0]:.4f} to {levels[1]:.4f} in the second half of the stream; beyond "
            f"that it adds {_listed(budgets, late)}")
    return Picture(svg, f"Line charts of the effect of drift on progressive NE. {said}.",
                   f"A log whose effects and popular ids turn over time against the same log at rest; "
                   f"{_seeds_of(moving)}. {said}.", both.drop(columns=["settings", "kept"]), command)


def _done(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells with ``ne_gap ne_gap_half`` (paired with Full by seed) and ``throughput``, a multiple of Full's."""
    table, lines = cells(rows), []
    ok = check_rows(rows)
    ok = ok[ok["status"] == "ok"]
    full = ok[ok["method"] == FULL].drop_duplicates("seed").set_index("seed")["ne"]
    for cell in table.to_dict("records"):
        own = ok[(ok["method"] == cell["method"]) & np.isclose(ok["budget"], cell["budget"], equal_nan=True)]
        mean, half = t_interval((own.set_index("seed")["ne"] - full).dropna()) if len(own) else (math.nan, math.nan)
        lines.append(dict(ne=own["ne"].mean(), ne_gap=mean, ne_gap_half=half))
    return pd.concat([table, pd.DataFrame(lines)], axis=1).assign(throughput=1 / table["time_ratio"])


def stream_costs(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """What training costs beside Full's: memory while training, what ships, and examples a second."""
    table = _done(rows)
    done = table[(table["status"] == "ok") & (table["method"] != FULL)]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows of a compressed method finished (status ok); nothing to draw")
    svg = _dots(done, looks(by_spec(rows)), [
        ("training_pct", "while training, % of weights", 300.0), ("reached_pct", "deployed, % of weights", 100.0),
        ("throughput", "examples a second ÷ Full's", 1.0)])
    least, slow = done.loc[done["training_pct"].idxmin()], done.loc[done["throughput"].idxmin()]
    said = (f"Least memory while training: {title(least['method'])} at {100 * least['budget']:.3g} %, "
            f"{least['training_pct']:.0f} %; slowest: {title(slow['method'])} at {100 * slow['budget']:.3g} %, "
            f"{slow['throughput']:.2f} of Full's examples a second")
    return Picture(svg, f"Dot plots of memory while training, deployed size and throughput beside Full's. {said}.",
                   f"Costs of training beside Full's (dashed) on {rows['dataset'].iloc[0]}, batch "
                   f"{int(rows['batch'].iloc[0])}; a larger dot is a larger budget. Full holds 300 %: weights and both "
                   f"moments. {said}.", rows, command)


def stream_table(rows: pd.DataFrame, *, command: str = "") -> Table:
    """The numbers: progressive NE and AUC beside Full's, bytes while training and deployed, time."""
    table = _done(rows)
    place = {m: i for i, m in enumerate(in_order(table["method"]))}
    table = table.sort_values(["budget", "method"], key=lambda c: c.map(place) if c.name == "method" else -c,
                              ignore_index=True)
    lines, before = [], None
    for c in table.to_dict("records"):
        ok, same, head = c["status"] == "ok", c["method"] == FULL, f"{100 * c['budget']:.3g} %"
        lines.append({
            "Budget": "" if head == before else head, "Method": title(c["method"]),
            "NE": f"{c['ne']:.4f}" if ok else c["status"],
            "NE − Full": "" if same or not ok else _plus_minus(c["ne_gap"], c["ne_gap_half"], sign="+"),
            "AUC": f"{c['auc']:.4f}" if ok else "",
            "AUC − Full": "" if same or not ok else _plus_minus(c["gap"], c["gap_half"], sign="+"),
            "While training": _number(c["training_pct"], " %"), "Ships": _number(c["reached_pct"], " %"),
            "Time": duration(c["seconds"]) if ok else "",
            "÷ Full's": "" if same or not ok else _number(c["time_ratio"], "×")})
        before = head
    caption = (f"Progressive over the second half of the stream of {rows['dataset'].iloc[0]}; NE is better when lower. "
               "± is half the 95 % t-interval of differences paired by seed. Memory in per cent of the full weights.")
    return Table(table, frame_html(pd.DataFrame(lines), index=False), caption, rows, command)


def ladder(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """What each choice of FIITED is worth: counts, gradients or their product; rows or chunks; equal ratios or not.

    ``rows`` are those of :data:`ecstudy.study.stream.LADDER` and of Full at one budget. Drawn is progressive NE minus
    Full's, paired by seed.
    """
    table = _done(rows)
    table = table[table["status"].eq("ok")].set_index("method")
    there = {key: table.loc[spec] for key, spec in LADDER.items() if spec in table.index}
    if not there:
        raise ValueError("none of the ladder's specs has finished rows; ecstudy.study.stream.study(..., ladder=0.1) "
                         "measures them")
    groups = list(dict.fromkeys(utility for utility, _ in LADDER))
    with drawing():
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(7.6, 0.9 + 0.75 * len(groups)))
        for (utility, unit), cell in there.items():
            y = groups.index(utility) + 0.25 * (list(_UNITS).index(unit) - 1)
            marker, colour = _UNITS[unit]
            half = 0 if math.isnan(cell["ne_gap_half"]) else cell["ne_gap_half"]
            ax.errorbar(cell["ne_gap"], y, xerr=half, fmt=marker, color=colour, ms=6, elinewidth=1.2, capsize=2)
        values = [c["ne_gap"] for c in there.values()]
        room = max(max(values) - min(values), 1e-4)
        ax.set_xlim(min(values) - 0.35 * room, max(values) + 0.35 * room)
        ax.axvline(0, color=INK, lw=1.2, ls=(0, (6, 3)))
        names = {"count": "times looked up", "gradient": "gradient", "product": "their product"}
        ax.set_yticks(range(len(groups)), [names[g] for g in groups])
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_xlabel("progressive NE minus Full's (left is better)")
        handles = [plt.Line2D([], [], marker=m, ls="", color=c) for m, c in _UNITS.values()]
        ax.legend(handles, _UNITS, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_UNITS), borderaxespad=0.2,
                  handletextpad=0.2, labelcolor=INK)
        svg = svg_of(figure)
    best, worst = (pick(there, key=lambda k: there[k]["ne_gap"]) for pick in (min, max))
    said = "; ".join(f"{' by '.join(key[::-1])} " + _plus_minus(*there[key][["ne_gap", "ne_gap_half"]], sign="+")
                     for key in (best, worst))
    budget, seeds = table.loc[[LADDER[k] for k in there], ["budget", "seeds"]].max()
    over = f"bars: 95 % t-intervals over {seeds:.0f} seeds" if seeds > 1 else "one seed, so no intervals"
    return Picture(svg, f"Dot plot of {len(there)} variants of FIITED. Best and worst NE minus Full's: {said}.",
                   f"Variants of FIITED at {100 * budget:.3g} % on {rows['dataset'].iloc[0]}: what a chunk is worth "
                   f"by, and what competes. Rows have one position, so one ratio; {over}. Best and worst: {said}.",
                   rows, command)


def choices(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """What FIITED's constants are worth: progressive NE with another value minus NE with this study's, by seed.

    ``rows`` are those of :data:`ecstudy.study.stream.CHOICES` at one budget.
    """
    ok = check_rows(rows)
    by_seed = {spec: own.drop_duplicates("seed").set_index("seed")["ne"]
               for spec, own in ok[ok["status"] == "ok"].groupby("method")}
    lines = [dict(choice=name, value=value, spec=choice(option), ours=group[""], seeds=len(paired),
                  **dict(zip(("difference", "half"), t_interval(paired))))
             for name, group in CHOICES.items() for option, value in group.items()
             if option and choice(option) in by_seed and "fiited" in by_seed
             and len(paired := (by_seed[choice(option)] - by_seed["fiited"]).dropna())]
    if not lines:
        raise ValueError("no variant of FIITED has a seed in common with it; ecstudy.study.stream.study(..., "
                         "choices=0.1) measures them")
    table = pd.DataFrame(lines)
    with drawing():
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(7.6, 0.9 + 0.27 * len(table)))
        marker, colour = _UNITS["chunks, dynamic"]
        places = list(range(len(table)))
        ax.errorbar(table["difference"], places, xerr=table["half"].fillna(0), fmt=marker, color=colour, ms=6, ls="",
                    elinewidth=1.2, capsize=2)
        ax.axvline(0, color=INK, lw=1.2, ls=(0, (6, 3)))
        ax.set_yticks(places, [f"{line.choice}: {line.value} (here {line.ours})" for line in table.itertuples()])
        ax.set_ylim(len(table) - 0.5, -0.5)
        ax.set_xlabel("progressive NE minus ours (left is better)")
        svg = svg_of(figure)
    low, high = table.loc[table["difference"].idxmin()], table.loc[table["difference"].idxmax()]
    said = "; ".join(f"{line['choice']} {line['value']} " + _plus_minus(line["difference"], line["half"], sign="+")
                     for line in (low, high))
    better = table[table["difference"] + table["half"] < 0]
    told = (f"Better than the choice here, beyond the interval: "
            f"{', '.join(f'{c} {v}' for c, v in zip(better['choice'], better['value']))}" if len(better)
            else "No other value is better beyond its interval")
    seeds = table["seeds"].max()
    over = f"bars: 95 % t-intervals over {seeds} seeds" if seeds > 1 else "one seed, so no intervals"
    budget = ok.loc[ok["method"] == "fiited", "budget"].iloc[0]
    return Picture(svg, f"Dot plot of {len(table)} other values of FIITED's constants. Lowest and highest: {said}.",
                   f"FIITED with one constant changed at {100 * budget:.3g} % on {rows['dataset'].iloc[0]}; {over}. "
                   f"Lowest and highest: {said}. {told}.", rows, command)
