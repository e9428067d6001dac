"""Retrieval (section 5.5): exact match and recall against bytes, the shape of Table 6, costs, skew of retrieval.

Rows have task ``rag`` (:mod:`ecstudy.rag.run`), those of one figure are of one corpus, set of questions and reader.
Intervals are over questions, for the vectors and the reader at hand.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ..rag.run import Z
from ..registry import get
from ..spec import parse
from ..study.statistics import by_spec
from .figures import _bytes_axes, _bytes_limits, _dots, _end_labels, _lines
from .picture import Html, Picture, Table, frame_html, svg_of
from .style import FULL, INK, drawing, in_order, looks, title
from .tables import _number, _plus_minus, duration

MEASURES = {"em": "exact match", "f1": "F1", **{f"recall_{k}": f"recall@{k}" for k in (1, 5, 10, 20, 100)}}
PAPER = {"full": "Full", "tt_rec": "TT", "dedup": "Dedup", "pq": "PQ", "mag_pq": "MagPQ", "int_quant": "INT8/16",
         "svd": "SVD", "mag_svd": "MagSVD", "prune": "Pruning"}
CORPUS = "wiki_183k"                     # real passages whose published rows the book shows
NEAR = 1.0                               # points of exact match within which compressors count as equally good


def paper_table6() -> pd.DataFrame:
    """Table 6 of arXiv 2311.15578 as data: EM, seconds of compression, milliseconds of decompression."""
    return pd.read_csv(Path(__file__).with_name("paper_table6.csv"), comment="#")


def paper_cell(method: str, pct: float) -> tuple[float, float, float]:
    """The paper's memory (per cent), EM as a share of its Full's, and decompression milliseconds.

    They are of the cell nearest in size; NaN where there is none within a factor of 1.5.
    """
    paper = paper_table6()
    own = paper[paper["method"] == PAPER.get(parse(method).name)]
    apart = (own["memory_pct"] / pct).map(math.log).abs() if len(own) else pd.Series(dtype=float)
    if not len(own) or apart.min() > math.log(1.5):
        return math.nan, math.nan, math.nan
    cell = own.loc[apart.idxmin()]
    full = paper.loc[paper["method"] == "Full", "em"].iloc[0]
    return float(cell["memory_pct"]), float(cell["em"] / full), float(cell["decompress_latency_ms_batch1024"])


def retrieval_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per method and budget: means over seeds of measures in per cent, sizes and times.

    Columns: ``method family group budget status reason seeds asked read reached_pct seconds decode_ms decode_ratio
    search_ms`` and each of :data:`MEASURES` with ``<measure>_half``, half its 95 % interval (Wilson) over the questions
    asked, of answers over those read.
    Raises ValueError for no rows, rows of another task, or of several corpora, question sets or readers.
    """
    rows = rows[rows["task"] == "rag"] if "task" in rows else rows
    if not len(rows):
        raise ValueError("no rows of retrieval; run `ecstudy rag eval` first")
    for column in ("dataset", "model"):
        if len(found := sorted(rows[column].unique())) > 1:
            raise ValueError(f"rows of several {column}s {found}; choose one, e.g. rows[rows.{column} == {found[0]!r}]")
    lines = []
    for (method, budget), group in by_spec(rows).groupby(["method", "budget"], sort=False, dropna=False):
        ok = group[group["status"] == "ok"]
        first = (ok if len(ok) else group).iloc[0]
        line = dict(method=method, family=first["family"], group=get(parse(method).name).group, budget=float(budget),
                    status=first["status"], reason="" if len(ok) else str(first["reason"] or ""), seeds=len(ok))
        if len(ok):
            settings = json.loads(first["settings"])
            asked = int(settings["asked"])
            read = int(settings.get("read") or asked)
            line |= dict(asked=asked, read=read,
                         reached_pct=100 * float((ok["bytes_inference"] / ok["bytes_full"]).mean()),
                         decode_ratio=(ok["decode_ms"] / ok["latency_full_ms"]).mean(),
                         **ok[["seconds", "decode_ms", "search_ms"]].mean().to_dict())
            for measure in MEASURES:
                share, n = ok[measure].mean(), read if measure in ("em", "f1") else asked
                half = Z * math.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2) / (1 + Z ** 2 / n) \
                    if share == share else math.nan
                line |= {measure: 100 * share, f"{measure}_half": 100 * half}
        lines.append(line)
    return pd.DataFrame(lines)


def _done(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series | None]:
    table = retrieval_cells(rows)
    done = table[table["status"] == "ok"]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows finished (status ok); nothing to draw")
    full = done[done["method"] == FULL]
    return done, full.iloc[0] if len(full) else None


def _of(rows: pd.DataFrame, done: pd.DataFrame) -> str:
    fewer = done.loc[done["read"] < done["asked"], "read"]
    part = f" ({int(fewer.min()):,} of them read where little was found)" if len(fewer) else ""
    return f"{rows['dataset'].iloc[0]}, {int(done['asked'].max()):,} questions{part}, reader: {rows['model'].iloc[0]}"


def quality(rows: pd.DataFrame, measure: str = "em", *, command: str = "") -> Picture:
    """A measure (of :data:`MEASURES`) against the bytes of what is searched, a panel per kind of compressor."""
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r}: expected one of {', '.join(MEASURES)}")
    done, full = _done(rows)
    done = done.dropna(subset=[measure])
    if not len(done):
        raise ValueError(f"no row has {measure!r}: exact match and F1 need a reader")
    look = looks(by_spec(rows))
    drawn = in_order(m for m in done["method"].unique() if m != FULL)
    kind = dict(done[["method", "group"]].itertuples(index=False))
    panels = [(k, [m for m in drawn if kind[m] == k]) for k in dict.fromkeys(kind[m] for m in drawn)]
    small = [m for _, own in panels for m in own if len(own) == 1]        # kinds with a method each share a panel
    panels = [p for p in panels if len(p[1]) > 1] + ([("others", small)] if small else [])
    with drawing():
        import matplotlib.pyplot as plt

        heights = [1.5 + 0.22 * len(own) for _, own in panels]
        figure, axes = plt.subplots(len(panels), 1, figsize=(7.6, sum(heights)), sharex=True, sharey=True,
                                    squeeze=False, height_ratios=heights)
        low = done["reached_pct"].min()
        for ax, height, (text, own) in zip(axes[:, 0], heights, panels):
            _bytes_limits(ax, low)
            ax.set_ylim(0, 1.06 * (done[measure] + done[f"{measure}_half"].fillna(0)).max())
            if full is not None:
                ax.axhline(full[measure], color=INK, lw=1.2, ls=(0, (6, 3)))
            ends = _lines(ax, done[done["method"].isin(own)], look, own, own, measure, (f"{measure}_half",) * 2)
            _end_labels(ax, ends, 1.03, 0.052 * 4.4 / height)
            ax.text(0.005, 0.03, text, transform=ax.transAxes, color=INK, fontsize=10.5, weight="bold")
        figure.supylabel(f"{MEASURES[measure]}, %", color=INK, fontsize=10.5)
        _bytes_axes(axes[:, 0], low, float(rows["bytes_full"].max()))
        svg = svg_of(figure)
    said = "" if full is None else f" Uncompressed vectors reach {full[measure]:.1f} %."
    small = done[(done["method"] != FULL) & (done["reached_pct"] <= 7)]
    if len(small):
        best = small.loc[small[measure].idxmax()]
        said += f" Below 7 % of the memory {title(best['method'])} is best: {best[measure]:.1f} % at " \
                f"{best['reached_pct']:.3g} %."
    name = MEASURES[measure]
    return Picture(svg, f"Line charts of {name} against memory on {_of(rows, done)}.{said}",
                   f"{name[0].upper() + name[1:]} against memory on {_of(rows, done)}; dashed: Full; bars: 95 % over "
                   "questions.", rows, command)


def recall_curves(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """Share of questions with a right passage among the first k, a panel per budget, Full dashed."""
    done, full = _done(rows)
    ks = [int(m[7:]) for m in MEASURES if m.startswith("recall_") and done[m].notna().any()]
    sized = done[(done["method"] != FULL)]
    sized = sized.assign(at=sized["budget"].where(sized["budget"] <= 1, sized["reached_pct"] / 100))
    budgets = sorted(sized["at"].unique(), reverse=True)
    if not budgets:
        raise ValueError("rows of Full alone; recall is compared between methods")
    look = looks(by_spec(rows))
    with drawing():
        from matplotlib.ticker import NullLocator

        lines = [int((sized["at"] == budget).sum()) for budget in budgets]
        heights = [max(2.9, 0.5 + 0.24 * max(lines[i:i + 2])) for i in range(0, len(lines), 2)]    # room for all names
        figure, axes = _grid(len(budgets), 2, 3.9, heights)
        for i, (ax, budget) in enumerate(zip(axes, budgets)):
            own, ends = sized[sized["at"] == budget], []
            for line in own.sort_values("method", key=lambda c: c.map({m: i for i, m in enumerate(in_order(c))})
                                        ).to_dict("records"):
                style, values = look[line["method"]], [line[f"recall_{k}"] for k in ks]
                ax.plot(ks, values, color=style.color, marker=style.marker, ls=style.dash, ms=4.5)
                ends.append((line["method"], ks[-1], values[-1], style))
            if full is not None:
                ax.plot(ks, [full[f"recall_{k}"] for k in ks], color=INK, lw=1.2, ls=(0, (6, 3)))
            ax.set_xscale("log")
            ax.set_xticks(ks, [str(k) for k in ks])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_ylim(0, 103)
            ax.set_title(f"{100 * budget:.3g} % of the memory")
            _end_labels(ax, ends, 1.04, 0.255 / heights[i // 2])
        figure.supxlabel("passages looked at", color=INK, fontsize=10.5)
        figure.supylabel("questions with a right passage, %", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    said = "; ".join(f"at {100 * b:.3g} % the best recall@10 is {best['recall_10']:.1f} % ({title(best['method'])})"
                     for b in budgets if len(own := sized[sized["at"] == b].dropna(subset=["recall_10"]))
                     for best in [own.loc[own["recall_10"].idxmax()]])
    return Picture(svg, f"Recall against the number of passages on {_of(rows, done)}: {said}.",
                   f"Recall on {_of(rows, done)}; dashed: Full.", rows, command)


def retrieval_costs(rows: pd.DataFrame, *, command: str = "") -> Picture:
    """Time to compress, to decode 1,024 rows, and to search, one dot per budget."""
    done, full = _done(rows)
    done = done[done["method"] != FULL]
    if not len(done):
        raise ValueError("rows of Full alone; costs are compared between methods")
    look = looks(by_spec(rows))
    panels = [("seconds", "compression, seconds", math.nan), ("decode_ratio", "decoding ÷ a plain look-up", 1.0),
              ("search_ms", "search, ms per query", math.nan if full is None else full["search_ms"])]
    svg = _dots(done, look, panels)
    slow = done.loc[done["decode_ratio"].idxmax()]
    return Picture(svg, f"Dot plots of the time of compression, decoding and search on {_of(rows, done)}. The slowest "
                   f"to decode is {title(slow['method'])}: {slow['decode_ratio']:.2g} times a look-up of floats.",
                   f"Times on {_of(rows, done)}; dashed: uncompressed vectors; a larger dot is a larger budget.", rows,
                   command)


def table6(rows: pd.DataFrame, *, command: str = "") -> Table:
    """The shape of the paper's Table 6 beside its figures: EM as a share of that of uncompressed vectors.

    The share's interval is that of :func:`ecstudy.rag.compare.shares`; without the answers (neither here nor published)
    the share is that of the two means, without an interval.
    """
    done, full = _done(rows)
    place = {m: i for i, m in enumerate(in_order(done["method"]))}
    done = done.sort_values(["method", "reached_pct"], key=lambda c: c.map(place) if c.name == "method" else -c)
    # a method that cannot use more memory has the same cell at several budgets
    done = done.drop_duplicates(["method", "reached_pct", *MEASURES])
    measure = "em" if done["em"].notna().any() else "recall_10"
    paired = _shares(rows, measure)
    lines, before = [], None
    for cell in done.to_dict("records"):
        pct, share, ms = paper_cell(cell["method"], cell["reached_pct"])
        same = cell["method"] == FULL
        lines.append({
            "Method": "" if cell["method"] == before else title(cell["method"]),
            "Memory": f"{cell['reached_pct']:.3g} %",
            MEASURES[measure]: _plus_minus(cell[measure], cell[f"{measure}_half"], 1),
            "of Full's": "" if full is None or same else paired.get(
                (cell["method"], cell["budget"]), f"{100 * cell[measure] / full[measure]:.1f} %"),
            "paper": "" if math.isnan(share) or same else f"{100 * share:.1f} % at {pct:g} %",
            "recall@1": _number(cell["recall_1"]), "recall@10": _number(cell["recall_10"]),
            "Compression": duration(cell["seconds"]), "Decoding": _number(cell["decode_ms"], " ms"),
            "paper ": "" if math.isnan(ms) else _number(ms, " ms"), "Search": _number(cell["search_ms"], " ms")})
        before = cell["method"]
    html = f'<div class="ec-scroll">{frame_html(pd.DataFrame(lines), index=False)}</div>'
    return Table(done, html, f"{_of(rows, done)}; ± is half the 95 % interval over questions. Decoding: 1,024 rows; "
                 "search: one query, all asked together. The paper: Natural Questions, 21 million passages, dimension "
                 "768, its latencies on a GPU; its cell nearest in size.", rows, command)


def _shares(rows: pd.DataFrame, measure: str) -> dict[tuple[str, float], str]:
    """What each method keeps of Full's measure on the same questions, by method and budget; means over seeds."""
    from ..rag.compare import differences, shares

    found = shares(differences(rows, measures=(measure,)))
    found = found.merge(by_spec(rows)[["run_id", "method"]], left_on="run", right_on="run_id").dropna(subset=["share"])
    means = found.groupby(["method", "budget"])[["share", "share_half"]].mean()
    return {cell: _plus_minus(100 * share, 100 * half, 1) + " %" for cell, share, half in
            means.itertuples(name=None)}


_ORDERS = {"found": ("#2f7fd1", "-"), "by other questions": ("#d9772b", (0, (5, 1.6))),
           "by chance": (INK, (0, (1.5, 1.3)))}


def _grid(count: int, across: int, width: float, height: float | list[float]):
    """``count`` axes of a figure in rows of ``across``, and the figure; ``height`` of each row of axes, or of all."""
    import matplotlib.pyplot as plt

    across = min(across, count)
    down = -(-count // across)
    heights = height if isinstance(height, list) else [height] * down
    figure, axes = plt.subplots(down, across, sharey=True, squeeze=False, height_ratios=heights,
                                figsize=(width * across, sum(heights)))
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, axes.flat[:count]


def retrieval_skew(curves: pd.DataFrame, *, command: str = "") -> Picture:
    """How unevenly passages are retrieved: ``curves`` of :func:`ecstudy.rag.compare.skew`, a panel per data set."""
    names = list(dict.fromkeys(curves["dataset"]))
    if not names:
        raise ValueError("no curves to draw; ecstudy.rag.compare.skew makes them from the rows of Full")
    with drawing():
        from matplotlib.ticker import FuncFormatter, PercentFormatter

        figure, axes = _grid(len(names), 2, 4.1, 3.1)
        for ax, name in zip(axes, names):
            own = curves[curves["dataset"] == name]
            for i, (order, (colour, dash)) in enumerate(_ORDERS.items()):
                line = own[own["order"] == order]
                if len(line):
                    ax.plot(100 * line["id_share"], 100 * line["occurrence_share"], color=colour, ls=dash)
                    ax.text(0.03, 0.96 - 0.085 * i, order, color=colour, transform=ax.transAxes, va="top", fontsize=9.5)
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
            ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            ax.set_ylim(0, 102)
            ax.set_title(name)
        figure.supxlabel("first passages of the order, % of all", color=INK, fontsize=10.5)
        figure.supylabel("retrievals they hold", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    said = "; ".join(_skewed(curves[curves["dataset"] == name], name) for name in names)
    return Picture(svg, f"Line charts of the share of retrievals that the first passages of an order hold. {said}.",
                   "Share of all retrievals (ten per question) that the first passages of an order hold. By chance: as "
                   f"many retrievals spread over all passages alike. {said}.", curves, command)


def _skewed(own: pd.DataFrame, name: str) -> str:
    first = own[own["order"].eq("found")].iloc[0]
    text = f"{name}: {first['retrievals']:,.0f} retrievals of {first['passages']:,.0f} passages"
    # where few passages are found at all, a tenth of the corpus holds everything
    part, words = (0.1, "a tenth") if first["found"] > 0.1 * first["passages"] else (0.01, "a hundredth")
    shares = []
    for order in _ORDERS:
        line = own[own["order"] == order]
        if len(line):
            share = 100 * np.interp(part, line["id_share"], line["occurrence_share"])
            shares.append(f"{share:.0f} % {'found' if order == 'found' else order}")
    return f"{text}, {words} of the passages holds {', '.join(shares)}"


def split_gains(table: pd.DataFrame, measure: str = "em", *, command: str = "") -> Picture:
    """Rows grouped by how often they are retrieved against the same grouped by norm: differences with intervals.

    ``table`` comes from ``ecstudy.rag.compare.differences(rows, "norms")``.
    """
    return _forest(table, measure, "norms", "by retrievals - by norm", "splitting by retrievals",
                   "rows split by how often training questions find them, minus rows split by norm", command)


def order_gains(table: pd.DataFrame, measure: str = "em", *, command: str = "") -> Picture:
    """Rows scattered over a method's codes against rows in the order of the corpus: differences with intervals.

    ``table`` comes from ``ecstudy.rag.compare.differences(rows, "in order")``.
    """
    return _forest(table, measure, "in order", "scattered - in order", "scattering",
                   "rows scattered, minus rows in the order of the corpus", command)


def _forest(table: pd.DataFrame, measure: str, against: str, axis: str, what: str, told: str, command: str) -> Picture:
    """A panel per data set, a line per method and budget of ``table``'s differences against ``against``."""
    own = table[table["measure"].eq(measure) & table["against"].eq(against)]
    if not len(own):
        raise ValueError(f"no differences of {measure!r} against {against!r}; run both of each pair first")
    names = sorted(own["dataset"].unique())
    cells = own[["spec", "budget"]].drop_duplicates().sort_values(["spec", "budget"], ascending=[False, True])
    place = {cell: y for y, cell in enumerate(cells.itertuples(index=False, name=None))}
    with drawing():
        figure, axes = _grid(len(names), 2, 4.1, 0.8 + 0.3 * len(place))
        for ax, name in zip(axes, names):
            ax.axvline(0, color=INK, lw=1, ls=(0, (6, 3)))
            for line in own[own["dataset"] == name].to_dict("records"):
                y = place[line["spec"], line["budget"]]
                ax.plot([100 * line["low"], 100 * line["high"]], [y, y], color="#2f7fd1", lw=1.4)
                ax.plot(100 * line["difference"], y, "o", color="#2f7fd1", ms=6)
            ax.set_yticks(list(place.values()), [f"{title(parse(s).name)} {100 * b:g} %" for s, b in place])
            ax.set_ylim(-0.6, len(place) - 0.4)
            ax.set_title(name)
        figure.supxlabel(f"{MEASURES[measure]}, points: {axis}", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    better, worse = int((own["low"] > 0).sum()), int((own["high"] < 0).sum())
    said = (f"Of {len(own)} pairs, {what} is better in {better} and worse in {worse} (95 % intervals over the "
            "questions)")
    return Picture(svg, f"Forest plot of {MEASURES[measure]}: {told}. {said}.", f"{said}.", table, command)


def corpus_size(large: pd.DataFrame, small: pd.DataFrame, measure: str = "recall_10", *, command: str = "") -> Picture:
    """What a larger corpus does: each method's share of the uncompressed vectors' measure in both, by size.

    ``large`` and ``small`` are rows of the same questions in two corpora, one a part of the other.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r}: expected one of {', '.join(MEASURES)}")
    tables = [_done(rows)[0] for rows in (large, small)]
    full = [t.loc[t["method"] == FULL, measure] for t in tables]
    if not all(len(f) for f in full):
        raise ValueError("uncompressed vectors (method full) are missing in one of the corpora; nothing to relate to")
    sizes = [int(json.loads(rows.loc[rows["status"].eq("ok"), "settings"].iloc[0])["passages"])
             for rows in (large, small)]
    both = tables[0].merge(tables[1], on=["method", "budget"], suffixes=("", "_small"))
    both = both[both["method"].ne(FULL)].dropna(subset=[measure, f"{measure}_small"])
    if not len(both):
        raise ValueError("no method and size in both corpora; nothing to compare")
    both = both.assign(share=100 * both[measure] / full[0].iloc[0],
                       share_small=100 * both[f"{measure}_small"] / full[1].iloc[0])
    look, budgets = looks(by_spec(large)), sorted(both["budget"].unique(), reverse=True)
    order = in_order(both["method"])
    with drawing():
        figure, axes = _grid(len(budgets), 2, 4.1, 0.7 + 0.23 * len(order))
        for ax, budget in zip(axes, budgets):
            own = both[both["budget"] == budget].set_index("method")
            for y, method in enumerate(order[::-1]):
                if method not in own.index:
                    continue
                line, colour = own.loc[method], look[method].color
                ax.plot([line["share_small"], line["share"]], [y, y], color=colour, lw=1.4, alpha=0.6)
                ax.plot(line["share_small"], y, "o", color=colour, ms=6, mfc="none")
                ax.plot(line["share"], y, "o", color=colour, ms=6)
            ax.set_yticks(range(len(order)), [title(m) for m in order[::-1]], fontsize=9)
            ax.set_ylim(-0.6, len(order) - 0.4)
            ax.set_xlim(0, max(104, 1.02 * both[["share", "share_small"]].max().max()))
            ax.set_title(f"{100 * budget:.3g} % of the memory" if budget <= 1 else f"{budget:,.0f} bytes")
        figure.supxlabel(f"{MEASURES[measure]}, % of uncompressed vectors'", color=INK, fontsize=10.5)
        svg = svg_of(figure)
    loss = round((both["share"] - both["share_small"]).median(), 1) + 0.0        # no minus before a zero
    said = (f"From {sizes[1]:,} to {sizes[0]:,} passages uncompressed vectors go from {full[1].iloc[0]:.1f} to "
            f"{full[0].iloc[0]:.1f} %; the median method's share of that changes by {loss:+.1f} points")
    return Picture(svg, f"Dot plots of {MEASURES[measure]} as a share of Full's, in two corpora. {said}.",
                   f"{said}. Hollow: {small['dataset'].iloc[0]}; filled: {large['dataset'].iloc[0]}.",
                   pd.concat([large, small], ignore_index=True), command)


def best_compressors(rows: pd.DataFrame, *, command: str = "") -> Table:
    """By budget: the compressor of the best exact match, those near it, and which of these decodes fastest.

    ``rows`` of one corpus and reader; sets of questions are averaged, each with the same weight, over compressors that
    answered all of them. One may stay below a budget. Options are left out where the method itself was measured.
    Raises ValueError without rows of Full or of any compressor.
    """
    rows = rows[rows["task"].eq("rag") & rows["status"].eq("ok") & rows["em"].notna()].reset_index(drop=True)
    plain = rows["spec"].eq(rows["method"])
    rows = rows[plain | ~rows["method"].isin(rows.loc[plain, "method"])]
    full = rows[rows["method"].eq(FULL)]
    if not len(full) or len(full) == len(rows):
        raise ValueError("no rows of Full and a compressor; run `ecstudy study real --only rag`")
    sets = set(full["dataset"])
    named = by_spec(rows[rows["dataset"].isin(sets) & rows["method"].ne(FULL)])
    named = named[named.groupby(["method", "budget"])["dataset"].transform("nunique") == len(sets)].assign(
        pct=lambda r: 100 * r["bytes_inference"] / r["bytes_full"])
    cells = named.groupby(["method", "budget", "pct"])[["em", "decode_ms"]].mean().reset_index()
    base, lines = 100 * full["em"].mean(), []
    for budget in sorted({float(b) for b in cells["budget"]}, reverse=True):
        fits = cells[cells["pct"] <= 100 * budget * (1 + 1e-9)].sort_values("em", ascending=False)
        fits = fits.drop_duplicates("method")
        if not len(fits):
            continue
        top = fits.iloc[0]
        near = fits[100 * fits["em"] >= 100 * top["em"] - NEAR]
        fast = near.loc[near["decode_ms"].idxmin()]
        others = in_order(m for m in near["method"] if m != top["method"])
        lines.append({"Memory": f"at most {100 * budget:.3g} %", "Best": f"{title(top['method'])} ({top['pct']:.3g} %)",
                      "exact match": f"{100 * top['em']:.1f} %", "of Full's": f"{10_000 * top['em'] / base:.1f} %",
                      f"within {NEAR:g} point": "; ".join(map(title, others)) or "none",
                      "of these decodes fastest": f"{title(fast['method'])} ({_number(fast['decode_ms'], ' ms')})"})
    asked = ", ".join(sorted(name.partition("/")[2] for name in sets))
    found = pd.DataFrame(lines)
    held = found.map(lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ms", "\N{NO-BREAK SPACE}ms"))
    html = frame_html(held, index=False).replace("ec-table", "ec-table ec-prose", 1)
    return Table(found, html, f"{rows['dataset'].iloc[0].partition('/')[0]}, questions: {asked}; uncompressed vectors "
                 f"reach {base:.1f} %. Decoding: 1,024 rows.", rows, command)


def each(draw, rows: pd.DataFrame, **options) -> Html:
    """A figure or table for every set of questions in ``rows``, one below the other.

    Of an option that holds rows, too, those of the same questions are passed on; without any the set is left out."""
    parts = []
    for name in dict.fromkeys(rows["dataset"]):
        asked = name.partition("/")[2]
        own = {k: v[v["dataset"].str.partition("/")[2].eq(asked)] if isinstance(v, pd.DataFrame) else v
               for k, v in options.items()}
        if all(len(v) for v in own.values() if isinstance(v, pd.DataFrame)):
            parts.append(draw(rows[rows["dataset"] == name], **own)._repr_html_())
    if not parts:
        raise ValueError("no rows of retrieval; run `ecstudy rag eval` first")
    return Html("\n".join(parts))
