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

from ..registry import get
from ..spec import parse
from ..study.statistics import by_spec
from .figures import _bytes_axes, _bytes_limits, _dots, _end_labels, _lines, frequency
from .picture import Picture, Table, frame_html, svg_of
from .style import FULL, INK, drawing, in_order, looks, title
from .tables import _number, _plus_minus, duration

MEASURES = {"em": "exact match", "f1": "F1", **{f"recall_{k}": f"recall@{k}" for k in (1, 5, 10, 20, 100)}}
PAPER = {"full": "Full", "tt_rec": "TT", "dedup": "Dedup", "pq": "PQ", "mag_pq": "MagPQ", "int_quant": "INT8/16",
         "svd": "SVD", "mag_svd": "MagSVD", "prune": "Pruning"}
_Z = 1.959964


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

    Columns: ``method family group budget status reason seeds asked reached_pct seconds decode_ms decode_ratio
    search_ms`` and each of :data:`MEASURES` with ``<measure>_half``, half its 95 % interval over the questions asked
    (Wilson).
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
            asked = int(json.loads(first["settings"])["asked"])
            line |= dict(asked=asked, reached_pct=100 * float((ok["bytes_inference"] / ok["bytes_full"]).mean()),
                         decode_ratio=(ok["decode_ms"] / ok["latency_full_ms"]).mean(),
                         **ok[["seconds", "decode_ms", "search_ms"]].mean().to_dict())
            for measure in MEASURES:
                share = ok[measure].mean()
                half = _Z * math.sqrt(share * (1 - share) / asked + (_Z / 2 / asked) ** 2) / (1 + _Z ** 2 / asked) \
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
    return f"{rows['dataset'].iloc[0]}, {int(done['asked'].max()):,} questions, reader: {rows['model'].iloc[0]}"


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
        import matplotlib.pyplot as plt
        from matplotlib.ticker import NullLocator

        across = min(2, len(budgets))
        figure, axes = plt.subplots(-(-len(budgets) // across), across, sharey=True, squeeze=False,
                                    figsize=(3.9 * across, 2.9 * -(-len(budgets) // across)))
        for ax in axes.flat[len(budgets):]:
            ax.axis("off")
        for ax, budget in zip(axes.flat, budgets):
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
            _end_labels(ax, ends, 1.04, 0.088)
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
    """The shape of the paper's Table 6 beside its figures: EM as a share of that of uncompressed vectors."""
    done, full = _done(rows)
    place = {m: i for i, m in enumerate(in_order(done["method"]))}
    done = done.sort_values(["method", "reached_pct"], key=lambda c: c.map(place) if c.name == "method" else -c)
    measure = "em" if done["em"].notna().any() else "recall_10"
    lines, before = [], None
    for cell in done.to_dict("records"):
        pct, share, ms = paper_cell(cell["method"], cell["reached_pct"])
        same = cell["method"] == FULL
        lines.append({
            "Method": "" if cell["method"] == before else title(cell["method"]),
            "Memory": f"{cell['reached_pct']:.3g} %",
            MEASURES[measure]: _plus_minus(cell[measure], cell[f"{measure}_half"], 1),
            "of Full's": "" if full is None or same else f"{100 * cell[measure] / full[measure]:.1f} %",
            "paper": "" if math.isnan(share) or same else f"{100 * share:.1f} % at {pct:g} %",
            "recall@1": _number(cell["recall_1"]), "recall@10": _number(cell["recall_10"]),
            "Compression": duration(cell["seconds"]), "Decoding": _number(cell["decode_ms"], " ms"),
            "paper ": "" if math.isnan(ms) else _number(ms, " ms"), "Search": _number(cell["search_ms"], " ms")})
        before = cell["method"]
    html = f'<div class="ec-scroll">{frame_html(pd.DataFrame(lines), index=False)}</div>'
    return Table(done, html, f"{_of(rows, done)}; ± is half the 95 % interval over questions. Decoding: 1,024 rows; "
                 "search: one query, all asked together. The paper: Natural Questions, 21 million passages, dimension "
                 "768, its latencies on a GPU; its cell nearest in size.", rows, command)


def retrieval_skew(counts: dict[str, np.ndarray], *, command: str = "") -> Picture:
    """How unevenly passages are retrieved: ``counts`` gives, by name, how often each passage was among the first."""
    curves = []
    for name, count in counts.items():
        count = np.sort(np.asarray(count, dtype=np.float64))[::-1]
        if not len(count) or not count.sum():
            raise ValueError(f"{name}: nothing was retrieved, so there is no share to draw")
        at = np.unique(np.geomspace(1, len(count), 200).astype(int))
        curves.append(pd.DataFrame(dict(dataset=name, id_share=at / len(count),
                                        occurrence_share=count.cumsum()[at - 1] / count.sum())))
    return frequency(pd.concat(curves, ignore_index=True), command=command, of="passages", held="retrievals")
