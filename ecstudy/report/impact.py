"""What changes a result: the model on top, the dimension, who gets the parameters, look-up time, a single choice.

The paper's Figures 4, 5 and 6, and the ablations. Differences are paired by seed.
"""
from __future__ import annotations

import itertools
import json
import math
from html import escape

import numpy as np
import pandas as pd

from ..spec import parse
from .figures import (PANELS, _bytes_axes, _bytes_limits, _end_labels, _lines, _panels, _seeds, _where)
from .picture import Html, Picture, Table, frame_html, svg_of
from .style import FULL, INK, drawing, in_order, looks, title
from .summary import best_by_validation, cells, check_rows, t_interval
from .tables import _plus_minus, by_family

MODELS = {"dlrm": "DLRM", "wdl": "WDL", "dcn": "DCN"}      # in the paper's order
_MODEL_MARKERS = ["o", "D", "^", "s", "v"]
AWARE = ("importance-aware", "frequency-aware", "static")


def _by(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Cells of each value of ``column``, the values one after the other; all else must be alike."""
    check_rows(rows, free=column)
    return pd.concat([cells(part).assign(**{column: value}) for value, part in rows.groupby(column, sort=False)],
                     ignore_index=True)


def _finished(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    done = table[table["status"] == "ok"]
    if not len(done[done["method"] != FULL]):
        raise ValueError(f"none of the {len(rows)} rows of a compressed method finished (status ok); nothing to draw")
    return done


def _budget(value: float) -> str:
    """A budget as a reader says it: a share of the full table, or bytes."""
    return "fixed size" if math.isnan(value) else f"{100 * value:g} %" if value <= 1 else f"{value / 2 ** 20:.3g} MiB"


def _names(values) -> list[str]:
    """Models in the paper's order, others behind."""
    found = list(dict.fromkeys(values))
    return sorted(found, key=lambda m: (list(MODELS).index(m) if m in MODELS else len(MODELS), found.index(m)))


def _model(name: str) -> str:
    return MODELS.get(name, str(name).upper())


# -- the model on top (Figure 4) -------------------------------------------------------------------------------------

def models(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """How far each method falls below Full under each model, one panel per budget (the paper's Figure 4).

    ``rows`` are of one data set and dimension and of two models or more, each with rows of Full: AUC itself differs
    between models, so the difference to the same model's Full is drawn, paired by seed.
    """
    table = _by(rows, "model")
    done = _finished(table, rows)
    names = _names(rows["model"])
    if len(names) < 2:
        raise ValueError(f"rows of the model {names[0]!r} alone; a comparison needs two or more of {', '.join(MODELS)}")
    full = done[done["method"] == FULL].drop_duplicates("model").set_index("model")["auc"]
    if missing := [m for m in names if m not in full]:
        raise ValueError(f"no finished row of {FULL!r} under {', '.join(missing)}: differences are to the same model's "
                         f"Full; run `ecstudy sweep` with the method {FULL!r} for it")
    done = done[done["method"] != FULL].dropna(subset=["gap"])
    if not len(done):
        raise ValueError("no method shares a seed with Full of its model; differences are paired by seed")
    look = looks(check_rows(rows, free="model"))
    order = in_order(done["method"], dict(done[["method", "family"]].itertuples(index=False)))
    place = {m: len(order) - 1 - i for i, m in enumerate(order)}
    budgets = sorted(done["budget"].unique(), reverse=True)
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        across = min(len(budgets), 5)
        down = -(-len(budgets) // across)
        tall = 0.13 * len(order) * len(names) + 0.5
        figure, axes = plt.subplots(down, across, figsize=(max(5.2, 1.4 + 1.75 * across), 0.8 + tall * down),
                                    sharey=True, squeeze=False)
        for ax, budget in itertools.zip_longest(axes.flat, budgets):
            if budget is None:
                ax.axis("off")
                continue
            own = done[done["budget"] == budget]
            for (method, model), line in own.groupby(["method", "model"]):
                aside = 0.27 * ((len(names) - 1) / 2 - names.index(model))
                ax.errorbar(line["gap"], [place[method] + aside], xerr=line["gap_half"].fillna(0), ls="", ms=4.5,
                            marker=_MODEL_MARKERS[names.index(model) % 5], color=look[method].color, elinewidth=0.9,
                            markerfacecolor=look[method].color if names.index(model) == 0 else "none",
                            markeredgewidth=1.1)
            ax.axvline(0, color=INK, lw=1.2, ls=(0, (6, 3)), zorder=1)
            for y in range(1, len(order)):
                ax.axhline(y - 0.5, color=INK, lw=0.5, alpha=0.18)
            low, high = own["gap"].min(), max(own["gap"].max(), 0)       # a wide interval may leave the frame
            reach = min(own["gap_half"].max(), 0.3 * (high - low)) if own["gap_half"].notna().any() else 0
            edge = reach + 0.05 * max(high - low, 1e-4)
            ax.set(xlim=(low - edge, high + edge), ylim=(-0.6, len(order) - 0.4))
            ax.set_title(_budget(budget))
            ax.grid(axis="y", visible=False)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes[0, 0].set_yticks(range(len(order)), [look[m].title for m in order[::-1]])
        figure.supxlabel("test AUC minus that of the same model's Full", color=INK, fontsize=10.5)
        handles = [plt.Line2D([], [], color=INK, marker=_MODEL_MARKERS[i % 5], ls="", ms=5, markeredgewidth=1.1,
                              markerfacecolor=INK if i == 0 else "none") for i in range(len(names))]
        figure.legend(handles, [_model(m) for m in names], loc="outside upper right", ncols=len(names), labelcolor=INK,
                      handletextpad=0.2, borderaxespad=0)
        svg = svg_of(figure)
    said = []
    for budget in budgets:
        own = done[done["budget"] == budget]
        best = own.loc[own.groupby("model")["gap"].idxmax()].set_index("model")
        said.append(f"at {_budget(budget)}: " + ", ".join(
            f"{_model(m)} {title(best['method'][m])} {best['gap'][m]:+.4f}" for m in names if m in best.index))
    alt = (f"Dot plot of test AUC minus Full's of the same model, by method and budget, under "
           f"{', '.join(map(_model, names))} on {rows['dataset'].iloc[0]}. Nearest to Full or above it, "
           + "; ".join(said) + ".")
    levels = ", ".join(f"{_model(m)} {full[m]:.4f}" for m in names)
    caption = (f"Methods under several models on {rows['dataset'].iloc[0]}, dimension {int(rows['dim'].iloc[0])}; "
               f"{_seeds(done)}. AUC of Full (dashed): {levels}.")
    return Picture(svg, alt, caption.replace("bars and band", "bars"), rows, command)


def rank_agreement(rows: pd.DataFrame, *, command: str = "") -> Table:
    """Do methods keep their order under another model? Kendall's tau-b of their mean AUC, per budget and two models.

    The figures are those of :func:`ecstudy.study.statistics.kendall`, its columns and ``model_a model_b``; the budget
    NaN is the mean over budgets. Raises ValueError for one model alone or fewer than three methods in common.
    """
    from ..study import statistics

    check_rows(rows, free="model")
    names = _names(rows["model"])
    if len(names) < 2:
        raise ValueError(f"rows of the model {names[0]!r} alone; agreement needs two models or more")
    found = []
    for a, b in itertools.combinations(names, 2):
        try:
            own = statistics.kendall(*(rows[rows["model"] == m] for m in (a, b)))
        except statistics.TooFew as error:
            few = error
            continue
        found.append(own.assign(model_a=a, model_b=b))
    if not found:
        raise ValueError(str(few))
    frame = pd.concat(found, ignore_index=True)
    lines = []
    for r, head in zip(frame.to_dict("records"), ~frame["model_a"].add(frame["model_b"]).duplicated()):
        lines.append({
            "Models": f"{_model(r['model_a'])} and {_model(r['model_b'])}" if head else "",
            "Budget": "mean of these" if math.isnan(r["budget"]) else _budget(r["budget"]),
            "Methods": "" if pd.isna(r["methods"]) else f"{int(r['methods'])}", "Kendall's τ": f"{r['tau']:.2f}",
            "95 % interval": "" if math.isnan(r["low"]) else f"{r['low']:.2f} to {r['high']:.2f}"})
    caption = (f"Agreement of the methods' order on {rows['dataset'].iloc[0]}, dimension {int(rows['dim'].iloc[0])}: "
               "tau-b of mean AUC, 1 is the same order, 0 none in common. Intervals: seeds drawn again; from three "
               "seeds they are too narrow rather than too wide.")
    return Table(frame, frame_html(pd.DataFrame(lines), index=False), caption, rows, command)


# -- the dimension (Figure 5) ----------------------------------------------------------------------------------------

def _same_bytes(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one limit in bytes at several dimensions, and Full's."""
    check_rows(rows, free="dim")
    limit = pd.to_numeric(rows["budget_bytes"], errors="coerce")
    full = rows["method"] == FULL
    found = sorted(limit[~full].dropna().unique())
    if not found:
        raise ValueError("no rows with a limit in bytes; the dimension study fixes bytes: `ecstudy sweep --base-dim "
                         "16`")
    if len(found) > 1:
        raise ValueError(f"rows of several limits {[int(b) for b in found]} bytes; choose one, e.g. "
                         f"rows[(rows.method == 'full') | (rows.budget_bytes == {int(found[0])})]")
    if rows["dim"].nunique() < 2:
        raise ValueError(f"rows of the dimension {int(rows['dim'].iloc[0])} alone; a comparison needs two or more")
    return rows.assign(budget=limit.where(~full, 1.0))[full | limit.notna()]


def dimensions(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """AUC against the embedding dimension while the bytes stay the same, a panel per family (the paper's Figure 5).

    ``rows`` are of one data set, model and limit in bytes (``budget_bytes``) and of two dimensions or more; rows of
    Full, whose bytes grow with the dimension, are drawn as a dashed line.
    """
    rows = _same_bytes(rows)
    done = _finished(_by(rows, "dim"), rows)
    look, dims = looks(check_rows(rows, free="dim")), sorted(int(d) for d in done["dim"].unique())
    drawn = [m for m in look if m != FULL and (done["method"] == m).any()]
    family = dict(done[["method", "family"]].itertuples(index=False))
    full = done[done["method"] == FULL].sort_values("dim")
    kinds = [f for f in dict.fromkeys((*PANELS, *family.values())) if any(family[m] == f for m in drawn)]
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        wide = [m for f in kinds for m in [[m for m in drawn if family[m] == f]]]
        height = max(4.0, 1.2 + 0.23 * max(map(len, wide)))
        figure, axes = plt.subplots(1, len(kinds), figsize=(1.0 + 2.95 * len(kinds), height), sharey=True,
                                    squeeze=False)
        bottom, top = done["auc"].min(), done["auc"].max()
        reach = min(done["auc_half"].max(), 0.25 * (top - bottom)) if done["auc_half"].notna().any() else 0
        margin = reach + 0.05 * max(top - bottom, 1e-4)
        for ax, kind, own in zip(axes[0], kinds, wide):
            ax.set_xscale("log", base=2)
            ax.set_xlim(dims[0] / 1.25, dims[-1] * 1.25)
            ax.set_ylim(bottom - margin, top + margin)
            if len(full):
                ax.errorbar(full["dim"], full["auc"], yerr=full["auc_half"].fillna(0), color=INK, lw=1.2,
                            ls=(0, (6, 3)), capsize=2, elinewidth=0.8)
            # the lines end at the largest dimension, where names stand
            ends = _lines(ax, done, look, own, own, "auc", ("auc_half", "auc_half"), x="dim",
                          apart=1.022, rising=True)
            if len(full):
                ends.append((FULL, full["dim"].iloc[-1], full["auc"].iloc[-1], look[FULL]))
            _end_labels(ax, ends, 1.04, 0.055 * 4.0 / height)
            ax.xaxis.set_major_locator(FixedLocator(dims))
            ax.xaxis.set_major_formatter(FixedFormatter([str(d) for d in dims]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_title({"baseline": "baselines"}.get(kind, kind))
            ax.set_xlabel("embedding dimension")
        axes[0, 0].set_ylabel("test AUC")
        svg = svg_of(figure)
    gains = _gains(rows).dropna(subset=["gain"])
    gains, said = gains[gains["method"] != FULL], ""
    if len(gains):
        most, least = gains.loc[gains["gain"].idxmax()], gains.loc[gains["gain"].idxmin()]
        said = (f" From {dims[0]} to {dims[-1]} the differences go from {title(least['method'])} {least['gain']:+.4f} "
                f"to {title(most['method'])} {most['gain']:+.4f}.")
    limit = rows.loc[rows["method"] != FULL, "budget"].iloc[0]
    first = rows.iloc[0]
    where = f"{first['dataset']}, {_model(first['model'])}"
    alt = (f"Line charts of test AUC at dimensions {', '.join(map(str, dims))} within {limit:,.0f} bytes on {where}, "
           f"one panel for each of: {', '.join(kinds)}.{said}")
    caption = (f"AUC at a fixed size of {_budget(limit)} while the dimension grows, on {where}; "
               f"{_seeds(done).replace('bars and band', 'bars')}"
               + ("; dashed: Full, whose size grows with the dimension." if len(full) else "."))
    return Picture(svg, alt, caption, rows, command)


def _aware(method: str) -> str:
    """What a method's allocation depends on, in the words of the table."""
    from ..registry import get

    try:
        aware = get(parse(method).name).aware
    except ValueError:                                      # rows of a method that is not registered here
        return "static"
    return "importance-aware" if "importance" in aware else "frequency-aware" if aware == "frequency" else "static"


def _gains(rows: pd.DataFrame) -> pd.DataFrame:
    """AUC at the largest dimension minus that at the smallest, paired by seed: one line per method."""
    low, high = int(rows["dim"].min()), int(rows["dim"].max())
    kept = pd.concat([best_by_validation(check_rows(part)) for _, part in rows.groupby("dim")])
    wide = kept[kept["status"] == "ok"].pivot_table(index="method", columns=["dim", "seed"], values="auc")
    nothing = pd.DataFrame(index=wide.index)
    change = (wide[high] if high in wide else nothing) - (wide[low] if low in wide else nothing)   # [methods, seeds]
    lines = []
    for method in in_order(kept["method"], dict(kept[["method", "family"]].itertuples(index=False))):
        own = change.loc[method].dropna() if method in change.index else []
        gain, half = t_interval(own)
        lines.append(dict(method=method, aware="" if method == FULL else _aware(method), gain=gain, gain_half=half,
                          seeds=len(own), low=low, high=high))
    return pd.DataFrame(lines)


def dimension_gains(rows: pd.DataFrame, *, command: str = "") -> Table:
    """Who gains by a larger dimension at fixed bytes: AUC at the largest minus AUC at the smallest, paired by seed.

    Methods stand by what their allocation depends on; a kind's own line is the mean over its methods, at the seeds that
    all of them have at both dimensions; a method of one seed is left out of it where others have more. ``.frame``:
    ``method aware gain gain_half seeds low high``, a kind's line with an empty ``method``.
    """
    rows = _same_bytes(rows)
    frame = _gains(rows)
    kept = pd.concat([best_by_validation(check_rows(part)) for _, part in rows.groupby("dim")])
    low, high = frame["low"].iloc[0], frame["high"].iloc[0]
    ok = kept[(kept["status"] == "ok") & kept["dim"].isin([low, high]) & (kept["method"] != FULL)]
    wide = ok.pivot_table(index=["method", "seed"], columns="dim", values="auc").dropna()
    parts, shown = [], []
    for kind in AWARE:
        own = frame[frame["aware"] == kind]
        if not len(own):
            continue
        both = wide[wide.index.get_level_values(0).isin(own["method"])] if len(wide) else wide
        mean, half, seeds = math.nan, math.nan, 0
        if len(both):
            per = (both[high] - both[low]).unstack("seed")
            several = per.notna().sum(axis=1).gt(1)
            per = (per[several] if several.any() else per).dropna(axis=1)       # seeds that all its methods have
            (mean, half), seeds = t_interval(per.mean()), per.shape[1]
        parts += [own, pd.DataFrame([dict(method="", aware=kind, gain=mean, gain_half=half, seeds=seeds, low=low,
                                          high=high)])]
    parts.append(frame[frame["method"] == FULL])
    frame = pd.concat(parts, ignore_index=True)
    auc = kept[kept["status"] == "ok"].groupby(["method", "dim"])["auc"].mean()
    for r in frame.to_dict("records"):
        at = [f"{auc[r['method'], d]:.4f}" if (r["method"], d) in auc.index else "" for d in (low, high)]
        shown.append({"Method": title(r["method"]) if r["method"] else "mean of these", f"AUC at {low}": at[0],
                      f"at {high}": at[1], "Gain": _plus_minus(r["gain"], r["gain_half"], sign="+") or "/"})
    html = frame_html(pd.DataFrame(shown), index=False)
    html = by_family(html, [a or "uncompressed, larger with the dimension" for a in frame["aware"]])
    first = rows.iloc[0]
    limit = rows.loc[rows["method"] != FULL, "budget"].iloc[0]
    caption = (f"From dimension {low} to {high} within {_budget(limit)} on {first['dataset']}, "
               f"{_model(first['model'])}: differences paired by seed, ± half the 95 % t-interval; a slash: not "
               "reached at both.")
    return Table(frame, html, caption, rows, command)


# -- who gets the parameters (Figure 6) ------------------------------------------------------------------------------

def _told(rows: pd.DataFrame, dim: int | None) -> tuple[pd.DataFrame, int]:
    """Finished rows that say who got the numbers, of one dimension and one size per method, their JSON read."""
    if not len(rows):
        check_rows(rows)
    dims = sorted(int(d) for d in rows["dim"].unique())
    dim = dims[0] if dim is None else dim
    rows = check_rows(rows[rows["dim"] == dim])
    text = rows["allocation"].fillna("") if "allocation" in rows else pd.Series("", index=rows.index)
    told = rows[text.ne("") & rows["status"].eq("ok") & rows["method"].ne(FULL)]
    if not len(told):
        raise ValueError(f"none of the {len(rows)} rows of dimension {dim} says who got the parameters (column "
                         "allocation); rows measured before it existed do not: run them again with force=True")
    sizes = told.groupby("method")["budget"].nunique(dropna=False)
    if (sizes > 1).any():
        found = sorted(told.loc[told["method"] == sizes.idxmax(), "budget"].unique().tolist(), reverse=True)
        raise ValueError(f"rows of {sizes.idxmax()} at several budgets {found}; choose one, e.g. "
                         f"rows[rows.budget == {found[0]!r}]")
    told = best_by_validation(told)
    return told.assign(allocation=told["allocation"].map(json.loads)), dim


def _mean_of(own: pd.DataFrame, part: str) -> pd.DataFrame:
    """``bins`` or ``fields`` of a method's seeds, averaged line by line (ids and counts are the same for all)."""
    frames = [pd.DataFrame(a[part]) for a in own["allocation"]]
    return sum(frames[1:], frames[0].astype(float)) / len(frames)


def _long(told: pd.DataFrame, part: str) -> pd.DataFrame:
    """What is drawn, to be kept as CSV: one line per run and bin (or field)."""
    keys = ["run_id", "dataset", "model", "dim", "method", "budget", "seed"]
    frames = [pd.DataFrame({k: r[k] for k in keys} | dict(spearman=r["allocation"]["spearman"]) | r["allocation"][part])
              for r in told.to_dict("records")]
    return pd.concat(frames, ignore_index=True)


def _grid_of_panels(count: int, height: float):
    import matplotlib.pyplot as plt

    across = min(count, 3)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(1.0 + 2.45 * across, 0.5 + height * down), sharex=True,
                                sharey=True, squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    for i, ax in enumerate(axes.flat[:count]):
        ax.tick_params(labelbottom=i + across >= count)
    return figure, axes


def _correlation(own: pd.DataFrame) -> str:
    found = [a["spearman"] for a in own["allocation"] if a["spearman"] is not None]
    return f"rank correlation {np.mean(found):+.2f}" if found else "all ids alike"


def allocation(rows: pd.DataFrame, *, dim: int | None = None, command: str = "") -> Picture:
    """Numbers per id against the id's training occurrences, one panel per method (the paper's Figure 6).

    ``rows`` are of one data set and model, with one size per method; of several dimensions ``dim`` is taken, the
    smallest unless told. Drawn are the mean over the ids of a bin (occurrences 0, 1, 2-3, 4-7 and so on), the range
    from the 10th to the 90th percentile, both averaged over seeds, and the share of all ids in the bin.
    """
    told, dim = _told(rows, dim)
    look, order = looks(told), in_order(told["method"], dict(told[["method", "family"]].itertuples(index=False)))
    said = []
    with drawing():
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        figure, axes = _grid_of_panels(len(order), 1.85)
        most = 0
        for ax, method in zip(axes.flat, order):
            own = told[told["method"] == method]
            bins, text = _mean_of(own, "bins"), _correlation(own)
            # a bin is drawn at the middle of its counts on the logarithmic axis, ids never seen left of it
            x = np.where(bins["low"] == 0, 0.35, np.sqrt(bins["low"].clip(lower=1) * bins["high"].clip(lower=1)))
            most = max(most, x.max())
            share = bins["ids"] / bins["ids"].sum()
            ax.bar(x, share * dim, width=0.45 * x, color=INK, alpha=0.22, lw=0)
            ax.fill_between(x, bins["q10"], bins["q90"], color=look[method].color, alpha=0.2, lw=0)
            ax.plot(x, bins["mean"], color=look[method].color, marker=look[method].marker, ms=4)
            ax.set_xscale("log")
            ax.set_ylim(-0.03 * dim, 1.06 * dim)
            ax.set_yticks([0, dim / 4, dim / 2, 3 * dim / 4, dim], ["0", "", f"{dim / 2:g}", "", f"{dim}"])
            ax.set_title(f"{look[method].title}: {text}", color=look[method].color, fontsize=9.5, loc="left")
            said.append(f"{title(method)} from {bins['mean'].iloc[0]:.3g} for the rarest to "
                        f"{bins['mean'].iloc[-1]:.3g} for the most frequent, {text}")
        ticks = [t for t in (1, 10, 100, 1000, 10 ** 4, 10 ** 5, 10 ** 6, 10 ** 7, 10 ** 8) if t <= 1.5 * most]
        ax.set_xlim(0.22, 1.6 * most)
        ax.xaxis.set_major_locator(FixedLocator([0.35, *ticks]))
        ax.xaxis.set_major_formatter(FixedFormatter(["0", *(f"{t:,}" if t < 10 ** 4 else f"$10^{len(str(t)) - 1}$"
                                                            for t in ticks)]))
        ax.xaxis.set_minor_locator(NullLocator())
        for row in axes:
            row[0].set_ylabel("numbers per id")
        figure.supxlabel("training occurrences of the id", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    first = told.iloc[0]
    where = f"{first['dataset']}, {_model(first['model'])}, dimension {dim}"
    alt = f"Line charts of numbers per id against training occurrences on {where}. " + "; ".join(said) + "."
    caption = (f"Who gets the parameters on {where}: mean over the ids of a bin, band: 10th to 90th percentile, grey: "
               f"share of all ids (full height: all of them). {_sizes(told)} Rank correlation of numbers with "
               "occurrences over all ids (Spearman).")
    return Picture(svg, alt, caption, _long(told, "bins"), command)


def _sizes(told: pd.DataFrame) -> str:
    """The sizes drawn, as a sentence."""
    share = 100 * pd.to_numeric(told["bytes_inference"]) / pd.to_numeric(told["bytes_full"])
    low, high, seeds = share.min(), share.max(), told["seed"].nunique()
    sizes = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    return f"Deployed sizes {sizes} % of the full table; {seeds} seed{'s' * (seeds != 1)}."


def allocation_fields(rows: pd.DataFrame, *, dim: int | None = None, command: str = "") -> Picture:
    """Mean numbers per id of each field against the field's cardinality, one panel per method; rows as for
    :func:`allocation`."""
    told, dim = _told(rows, dim)
    look, order = looks(told), in_order(told["method"], dict(told[["method", "family"]].itertuples(index=False)))
    said = []
    with drawing():
        figure, axes = _grid_of_panels(len(order), 1.5)
        for ax, method in zip(axes.flat, order):
            fields = _mean_of(told[told["method"] == method], "fields")
            ax.scatter(fields["cardinality"], fields["mean"], s=22, color=look[method].color, alpha=0.75, linewidths=0,
                       marker=look[method].marker)
            ax.set_xscale("log")
            ax.set_ylim(-0.05 * dim, 1.08 * dim)
            ax.set_yticks([0, dim / 2, dim], ["0", f"{dim / 2:g}", f"{dim}"])
            ax.set_title(look[method].title, color=look[method].color, fontsize=9.5, loc="left")
            large = fields.loc[fields["cardinality"].idxmax(), "mean"]
            small = fields.loc[fields["cardinality"].idxmin(), "mean"]
            said.append(f"{title(method)} {small:.3g} in the smallest field, {large:.3g} in the largest")
        for row in axes:
            row[0].set_ylabel("numbers per id")
        figure.supxlabel("ids of the field", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    first = told.iloc[0]
    where = f"{first['dataset']}, {_model(first['model'])}, dimension {dim}"
    alt = f"Scatter plots of mean numbers per id against the cardinality of the field on {where}. {'; '.join(said)}."
    caption = f"Mean numbers per id, one dot per field, on {where}. {_sizes(told)}"
    return Picture(svg, alt, caption, _long(told, "fields"), command)


# -- look-up time ----------------------------------------------------------------------------------------------------

def latency(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells with ``ratio low high``: latency as a multiple of Full's timed beside it, the geometric mean over seeds and
    its 95 % t-interval (of the logarithms); NaN below two seeds."""
    table = cells(rows)
    kept = best_by_validation(check_rows(rows))
    ratio = np.log(pd.to_numeric(kept["latency_ms"]) / pd.to_numeric(kept["latency_full_ms"]))
    ratio = ratio.where(kept["status"] == "ok")
    found = {key: t_interval(own) for key, own in ratio.groupby([kept["method"], kept["budget"]], dropna=False)}
    found = {(m, None if pd.isna(b) else b): value for (m, b), value in found.items()}
    pairs = [found[m, None if pd.isna(b) else b] for m, b in zip(table["method"], table["budget"])]
    mean, half = np.array(pairs).T
    return table.assign(ratio=np.exp(mean), low=np.exp(mean - half), high=np.exp(mean + half))


def latency_against_bytes(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """Look-up latency as a multiple of Full's against the bytes of the deployed embedding, one line per method.

    ``rows`` are of one data set, model and dimension. Both axes are logarithmic; panels as in
    :func:`~ecstudy.report.auc_against_bytes`.
    """
    table = latency(rows)
    done = _finished(table, rows)
    done = done[(done["method"] != FULL) & done["ratio"].notna()]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows has a latency beside Full's (latency_ms, latency_full_ms)")
    done = done.assign(below=done["ratio"] - done["low"], above=done["high"] - done["ratio"])
    look = looks(check_rows(rows))
    drawn = [m for m in look if (done["method"] == m).any()]
    panels = _panels(drawn, dict(done[["method", "family"]].itertuples(index=False)))
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        heights = [4.2] if len(panels) == 1 else [1.2 + max(1.0, 0.22 * len(own)) for _, own in panels]
        figure, axes = plt.subplots(len(panels), 1, figsize=(7.6, sum(heights)), sharex=True, sharey=True,
                                    squeeze=False, height_ratios=heights)
        least = done["reached_pct"].min()
        bottom, top = min(done["ratio"].min(), 1), max(done["ratio"].max(), 1)
        for ax, height, (text, own) in zip(axes[:, 0], heights, panels):
            _bytes_limits(ax, least)
            ax.set_yscale("log")
            ax.set_ylim(bottom / 1.35, top * (2.6 if text else 1.35))          # room for the heading
            ax.axhline(1, color=INK, lw=1.2, ls=(0, (6, 3)))
            ax.annotate("Full", (110, 1), (4, 4), textcoords="offset points", color=INK)
            _end_labels(ax, _lines(ax, done, look, drawn, own, "ratio", ("below", "above")), 1.03, 0.052 * 4.4 / height)
            if text:
                ax.text(0.005, 0.975, text, transform=ax.transAxes, color=INK, fontsize=10.5, weight="bold", va="top")
            ax.set_ylabel("latency ÷ Full's")
            ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if top < 60 * bottom else (1,)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        _bytes_axes(axes[:, 0], least, float(pd.to_numeric(rows["bytes_full"], errors="coerce").max()))
        svg = svg_of(figure)
    fast, slow = done.loc[done["ratio"].idxmin()], done.loc[done["ratio"].idxmax()]
    alt = (f"Line chart of look-up latency as a multiple of Full's against deployed size on {_where(rows)}. Fastest: "
           f"{title(fast['method'])} at {fast['reached_pct']:.3g} %, {fast['ratio']:.2g}×; slowest: "
           f"{title(slow['method'])} at {slow['reached_pct']:.3g} %, {slow['ratio']:.2g}×.")
    batch, device = (", ".join(map(str, dict.fromkeys(rows[c]))) for c in ("batch", "device"))
    note = "; faint: the methods of the other panels" if len(panels) > 1 else ""
    caption = (f"Latency of one look-up of a batch of {batch} ({device}) beside Full's timed in turn, on "
               f"{_where(rows)}; geometric means of {_seeds(done).replace('bars and band', 'bars')}{note}.")
    return Picture(svg, alt, caption, rows, command)


# -- one choice changed ----------------------------------------------------------------------------------------------

def _pairs_of(rows: pd.DataFrame) -> list[dict]:
    """The pairs that rows of :func:`ecstudy.study.ablations.run` hold: each further variant beside the first."""
    from ..study import ablations

    titles = {a.name: a.title for a in ablations.ABLATIONS}
    known = {a.name: [v.label for v in a.variants] for a in ablations.ABLATIONS}
    pairs = []
    for name, own in rows.groupby("ablation", sort=False):
        order = known.get(name, [])
        found = sorted(dict.fromkeys(own["variant"]), key=lambda v: order.index(v) if v in order else len(order))
        first = order[0] if order else found[0]
        pairs += [dict(label=titles.get(name, name), a_label=first, b_label=other,
                       a=dict(ablation=name, variant=first), b=dict(ablation=name, variant=other))
                  for other in found if other != first and first in found]
    return pairs


def _side(rows: pd.DataFrame, wanted, label: str) -> pd.DataFrame:
    """The finished rows of one side of a pair: a spec, or values by column."""
    where = {"spec": wanted} if isinstance(wanted, str) else dict(wanted)
    keep = rows["status"] == "ok"
    for column, value in where.items():
        if column not in rows:
            raise ValueError(f"{label}: no column {column!r} in the rows; there are {', '.join(rows.columns)}")
        keep &= rows[column] == value
    own = rows[keep]
    at = own["at"] if "at" in own else own["budget"]
    base = own["base"] if "base" in own else own["method"]
    own = own.assign(at=pd.to_numeric(at), base=base.where(base.fillna("").ne(""), own["method"]))
    # of several learning rates the best on validation
    return own.sort_values("valid_auc", ascending=False, kind="stable").drop_duplicates(["base", "at", "seed"])


def ablated(rows: pd.DataFrame, pairs: list[dict] | None = None) -> pd.DataFrame:
    """Paired comparisons, one line per pair, method and budget: ``label a_label b_label method budget auc_a auc_b
    difference half seeds``. Seeds that both sides have count; ``half`` is half the 95 % t-interval."""
    if not len(rows):
        raise ValueError("no rows to report; run `ecstudy study` with the notebook ablations first")
    if pairs is None:
        if not {"ablation", "variant"} <= set(rows.columns):
            raise ValueError("pairs is missing: give a list of dicts with label, a and b (a spec, or values by "
                             "column), or the rows of ecstudy.study.ablations.run")
        pairs = _pairs_of(rows)
    lines = []
    for pair in pairs:
        if not {"label", "a", "b"} <= set(pair):
            raise ValueError(f"pair {pair!r}: expected label, a and b (a spec, or values by column)")
        a, b = (_side(rows, pair[side], pair["label"]) for side in "ab")
        keys = ["base", "at", "seed"]
        if a["base"].nunique() == b["base"].nunique() == 1 and isinstance(pair["a"], str):
            b = b.assign(base=a["base"].iloc[0])             # two methods against each other
        both = a[[*keys, "family", "auc"]].merge(b[[*keys, "auc"]], on=keys, suffixes=("_a", "_b"))
        for (base, at), own in both.groupby(["base", "at"], sort=False, dropna=False):
            difference, half = t_interval(own["auc_b"] - own["auc_a"])
            lines.append(dict(label=pair["label"], a_label=pair.get("a_label", str(pair["a"])),
                              b_label=pair.get("b_label", str(pair["b"])), method=base, family=own["family"].iloc[0],
                              budget=at, auc_a=own["auc_a"].mean(), auc_b=own["auc_b"].mean(), difference=difference,
                              half=half, seeds=len(own)))
    if not lines:
        raise ValueError(f"none of {len(pairs)} pairs has finished rows of both sides on one seed, method and budget")
    frame = pd.DataFrame(lines)
    order = {m: i for i, m in enumerate(in_order(frame["method"], dict(frame[["method", "family"]].itertuples(
        index=False))))}
    pair = {key: i for i, key in enumerate(dict.fromkeys(zip(frame["label"], frame["b_label"])))}
    frame["_pair"] = [pair[key] for key in zip(frame["label"], frame["b_label"])]
    frame["_method"] = frame["method"].map(order)
    return frame.sort_values(["_pair", "_method", "budget"], ascending=[True, True, False], ignore_index=True).drop(
        columns=["_pair", "_method"])


def ablation_questions(rows: pd.DataFrame) -> Html:
    """What each ablation of the rows (those of :func:`ecstudy.study.ablations.run`) asks, and where the choice comes
    from. Raises ValueError without rows, or for rows that name none of the list."""
    from ..study import ablations

    names = set(rows["ablation"]) if "ablation" in rows else set()
    lines = [f'<dt>{escape(a.title)}</dt><dd>{escape(a.question)} <span class="ec-small">{escape(a.source)}.</span></dd>'
             for a in ablations.ABLATIONS if a.name in names]
    if not lines:
        raise ValueError("no rows of the list of ablations; run `ecstudy study` with the notebook ablations first")
    return Html("<dl>\n" + "\n".join(lines) + "\n</dl>")


MATTERS = 0.001                                             # differences of AUC that the paper calls considerable


def ablation(rows: pd.DataFrame, pairs: list[dict] | None = None, *, command: str = "") -> Picture:
    """What one choice changes: AUC of the alternative minus AUC of the study's own choice, paired by seed.

    Parameters
    ----------
    pairs:
        A list of dicts: ``label``; ``a`` and ``b``, each a spec or a dict of values by column; ``a_label`` and
        ``b_label``, how a reader knows them. None takes the pairs from the columns ``ablation`` and ``variant`` of
        :func:`ecstudy.study.ablations.run`. Compared are rows of the same seed, method (column ``base`` if there is
        one) and budget (column ``at``).

    Raises
    ------
    ValueError
        Without rows, for a column that is not there, or if no pair has rows of both sides.
    """
    frame = ablated(rows, pairs)
    look = looks(rows.assign(method=rows["method"]))
    heads, y, places, ticks = [], 0.0, [], []
    before = None
    for line in frame.to_dict("records"):
        head = (line["label"], line["a_label"], line["b_label"])
        if head != before:
            y += 1.5 if before else 0.9
            heads.append((y - 0.85, f"{line['label']}:", f"{line['b_label']} − {line['a_label']}"))
        before = head
        places.append(y)
        name, at = title(line["method"]), line["budget"]
        ticks.append(name if math.isnan(at) or at == 1 else f"{name}, {_budget(at)}")
        y += 1
    widest = float(np.nanmax(np.abs(frame["difference"]))) if len(frame) else 0
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FixedLocator, FuncFormatter

        figure, ax = plt.subplots(figsize=(7.6, 0.9 + 0.215 * (y + 0.5)))
        for at, line in zip(places, frame.to_dict("records")):
            style = look.get(parse(line["method"]).name)
            ax.errorbar(line["difference"], at, xerr=0 if math.isnan(line["half"]) else line["half"], fmt="o", ms=5,
                        color=style.color if style else INK, elinewidth=1.2, capsize=2)
            ax.annotate(f"{line['auc_a']:.4f} → {line['auc_b']:.4f}", (1.02, at), xycoords=("axes fraction", "data"),
                        va="center", fontsize=9, color=INK, annotation_clip=False)
        for at, text, change in heads:
            ax.annotate(text, (0, at), (-6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                        va="center", ha="right", fontsize=9.5, color=INK, weight="bold", annotation_clip=False)
            ax.annotate(change, (0, at), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                        va="center", ha="left", fontsize=9.5, color=INK, annotation_clip=False)
        ax.axvline(0, color=INK, lw=1.2)
        ax.axvspan(-MATTERS, MATTERS, color=INK, alpha=0.12, lw=0)
        if widest > 0.012:                                   # small and large differences in one figure
            ax.set_xscale("symlog", linthresh=2 * MATTERS, linscale=0.8)
            ax.xaxis.set_major_locator(FixedLocator([-0.1, -0.01, 0, 0.01, 0.1]))
        halves = frame["half"].fillna(0)
        low = min((frame["difference"] - halves.clip(upper=2 * widest)).min(), -2 * MATTERS)
        high = max((frame["difference"] + halves.clip(upper=2 * widest)).max(), 2 * MATTERS)
        ax.set_xlim(1.1 * low, 1.1 * high)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else f"{v:+g}"))
        ax.set_ylim(y - 0.3, -0.6)
        ax.set_yticks(places, ticks)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("difference of test AUC")
        svg = svg_of(figure)
    sure = frame[(frame["difference"].abs() > frame["half"]) & (frame["difference"].abs() > MATTERS)]
    said = "; ".join(f"{r['label']}, {r['b_label']}, {title(r['method'])} at {_budget(r['budget'])}: "
                     f"{r['difference']:+.4f} ± {r['half']:.4f}" for r in sure.to_dict("records"))
    alt = (f"Dot plot of {len(frame)} paired differences of test AUC, a single choice changed in each. "
           + (f"Above {MATTERS:g} and outside their interval: {said}." if said else
              f"None is above {MATTERS:g} and outside its interval."))
    counts = sorted({int(n) for n in frame["seeds"]})
    seeds = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    caption = (f"One choice changed: difference of test AUC on {', '.join(dict.fromkeys(rows['dataset']))}, paired by "
               f"seed; {seeds} seed{'s' * (counts[-1] != 1)}" + ("; bars: 95 % t-intervals" if counts[-1] > 1 else "")
               + f". Shaded: up to {MATTERS:g}. Right: mean AUC before and after.")
    return Picture(svg, alt, caption, rows, command)


def ablation_table(rows: pd.DataFrame, pairs: list[dict] | None = None, *, command: str = "") -> Table:
    """The numbers of :func:`ablation` as a table; ``.frame`` is that of :func:`ablated`."""
    frame = ablated(rows, pairs)
    shown = pd.DataFrame([{
        "Method": title(r["method"]), "Budget": "" if math.isnan(r["budget"]) else _budget(r["budget"]),
        "From": r["a_label"], "AUC": f"{r['auc_a']:.4f}", "To": r["b_label"], "AUC ": f"{r['auc_b']:.4f}",
        "Difference": _plus_minus(r["difference"], r["half"], sign="+"), "Seeds": r["seeds"],
    } for r in frame.to_dict("records")])
    html = by_family(frame_html(shown, index=False), frame["label"].tolist())
    caption = "One choice changed, everything else the same: differences paired by seed, ± half the 95 % t-interval."
    return Table(frame, html, caption, rows, command)
