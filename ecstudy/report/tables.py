"""One function per table. Each returns a :class:`Table`: ``.frame`` holds the numbers, displaying it shows them."""
from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd

from .figures import _where
from .picture import Table, frame_html
from .style import FULL, beyond, in_order, title
from .summary import cells

UNREACHABLE = "/"                                        # the paper's mark for a budget a method cannot reach
PAPER_NAMES = {"full": "Full", "compo": "CompoEmb", "robe": "ROBE", "int_quant": "INT8/16", "deeplight": "DeepLight",
               "autosrh": "AutoSrh", "tt_rec": "TT-Rec", "dhe": "DHE", "dedup": "Dedup", "mgqe": "MGQE",
               "adapt_emb": "AdaptEmb", "alpt": "ALPT", "mde": "MDE", "auto_dim": "AutoDim", "opt_embed": "OptEmbed"}


def paper_table5() -> pd.DataFrame:
    """Table 5 of arXiv 2311.15578 as data: AUC, memory, time and latency by method, data set and budget (DLRM)."""
    return pd.read_csv(Path(__file__).with_name("paper_table5.csv"), comment="#")


def paper_link(text: str) -> str:
    """``arXiv 2108.02191`` as a link; other texts as they are."""
    return re.sub(r"arXiv[ :](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _plus_minus(mean: float, half: float, digits: int = 4, sign: str = "") -> str:
    if math.isnan(mean):
        return ""
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as a reader says them: ``4.2s``, ``3m05s``, ``2h10m``."""
    if math.isnan(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _number(value: float, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:.3g}{unit}" if value < 1000 else f"{value:,.0f}{unit}"


def by_family(html: str, family: list[str]) -> str:
    """``html`` of a table with a line above the first row of each family; ``family`` has one entry per row."""
    head, *rows = html.split("<tbody>")[0], *re.findall(r"<tr>.*?</tr>", html.split("<tbody>")[1], flags=re.S)
    columns, out = head.count("<th"), []
    columns -= head.count("<thead")
    for row, kind, before in zip(rows, family, [FULL, *family]):
        if kind != before and kind:
            out.append(f'<tr class="ec-family"><th colspan="{columns}">{kind}</th></tr>')
        out.append(row)
    return head + "<tbody>\n" + "\n".join(out) + "\n</tbody>\n</table>"


def _families(table: pd.DataFrame) -> dict[str, str]:
    return dict(table[["method", "family"]].itertuples(index=False))


def _headings(table: pd.DataFrame, methods) -> list[str]:
    """The family of each of ``methods`` as a heading, in a second block for what the paper does not benchmark; Full
    stands before all."""
    family = _families(table)

    def heading(method: str) -> str:
        kind = {"baseline": "baselines"}.get(family[method], family[method])
        return kind + ", beyond the paper's" * beyond(method)

    return [FULL if m == FULL else heading(m) for m in methods]


def table5(rows: pd.DataFrame, *, command: str = "") -> Table:
    """The study in the shape of the paper's Table 5: methods down, budgets across.

    ``rows`` are of one data set, model and dimension. A cell gives the mean AUC over seeds and, as a
    superscript, the rank among the methods that reached that budget; below, half the 95 % t-interval and the memory
    really reached.
    Then training memory (% of the full table), training time and latency, the last two also as multiples of Full's.
    A budget that cannot be reached shows as ``/``, with the reason as a tooltip. ``.frame`` is the table of
    :func:`~ecstudy.report.summary.cells`.
    """
    table = cells(rows)
    order = in_order(table["method"], _families(table))
    budgets = sorted((b for m, b in zip(table["method"], table["budget"]) if m != FULL), reverse=True)
    budgets = [b for b in dict.fromkeys(budgets) if not math.isnan(b)]
    by_cell = {(c["method"], c["budget"]): c for c in table.to_dict("records")}
    head = ["Method", *(f"{100 * b:g} %" for b in budgets), "Training memory", "Training time", "Latency"]
    lines = []
    for method in order:
        own = table[(table["method"] == method) & (table["status"] == "ok")]
        line = [title(method)]
        for budget in budgets:
            cell = by_cell.get((method, budget)) if method != FULL else None
            line.append("" if cell is None else _cell(cell))
        if method == FULL and len(own) and budgets:       # Full has no budget: one figure over the first column
            line[1] = _cell(own.iloc[0].to_dict())
        line += [_range(own["training_pct"], _number, " %"), _range(own["seconds"], duration)
                 + _times(own["time_ratio"], method), _range(own["latency_ms"], _number, " ms")
                 + _times(own["latency_ratio"], method)]
        lines.append(line)
    html = frame_html(pd.DataFrame(lines, columns=head), index=False, escape_text=False)
    html = by_family(html, _headings(table, order))
    seeds = int(table["seeds"].max()) if len(table) else 0
    caption = (f"{_where(rows)}. AUC: mean over {seeds} seed{'s' * (seeds != 1)}"
               + ", superscript: rank at that budget; below: " + ("± half the 95 % t-interval, " if seeds > 1 else "")
               + "memory reached. Training columns give the range over budgets, from the largest to the smallest.")
    return Table(table, html, caption, rows, command)


def _cell(cell: dict) -> str:
    if cell["status"] == "unreachable":
        reason = str(cell["reason"]).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return f'<span class="ec-miss" title="{reason}">{UNREACHABLE}</span>'
    if cell["status"] != "ok":
        return f'<span class="ec-miss">{cell["status"]}</span>'
    rank = "" if math.isnan(cell.get("rank", math.nan)) else f"<sup>{int(cell['rank'])}</sup>"
    first = "<b>" if rank == "<sup>1</sup>" else ""
    half = "" if math.isnan(cell["auc_half"]) else f"± {cell['auc_half']:.4f}<br>"
    return (f"{first}{cell['auc']:.4f}{first.replace('<', '</')}{rank}"
            f'<br><span class="ec-small">{half}{_number(cell["reached_pct"], " %")}</span>')


def _range(values: pd.Series, form, unit: str = "") -> str:
    """From the largest budget to the smallest: ``150 … 0.3 %``, or one figure where they read the same."""
    values = values.dropna()
    if not len(values):
        return ""
    return " … ".join(dict.fromkeys(form(v) for v in (values.iloc[0], values.iloc[-1]))) + unit


def _times(values: pd.Series, method: str) -> str:
    text = "" if method == FULL else _range(values, "{:.2g}".format, "×")
    return f'<br><span class="ec-small">{text}</span>' if text else ""


def beside_paper(rows: pd.DataFrame, *, paper_dataset: str = "criteo", command: str = "") -> Table:
    """Our cells beside the paper's: differences of AUC to Full, training memory and latency as multiples.

    Absolute AUC depends on the data, so what is compared is the gap to Full on the same rows (paired by seed) and
    costs relative to Full. ``paper_dataset`` is ``criteo``, ``avazu`` or ``company``.
    """
    paper = paper_table5()
    if paper_dataset not in set(paper["dataset"]):
        raise ValueError(f"paper_dataset {paper_dataset!r}, expected one of {sorted(set(paper['dataset']))}")
    paper = paper[paper["dataset"] == paper_dataset]
    full = paper[paper["method"] == "Full"].iloc[0]
    theirs = {(r["method"], r["budget_pct"]): r for r in paper.to_dict("records")}
    table = cells(rows)
    lines = []
    for cell in table.to_dict("records"):
        other = theirs.get((PAPER_NAMES.get(cell["method"]), round(100 * cell["budget"], 6)))
        if cell["method"] == FULL or other is None:
            continue
        reached = other["reached"] != "no"
        lines.append(dict(
            method=cell["method"], budget=cell["budget"], status=cell["status"], gap=cell["gap"],
            gap_half=cell["gap_half"], paper_gap=other["auc"] - full["auc"] if reached else math.nan,
            training_pct=cell["training_pct"], paper_training_pct=other["train_memory_pct"],
            time_ratio=cell["time_ratio"],
            paper_time_ratio=math.nan if other["reached"] == "unclear time"
            else other["train_seconds"] / full["train_seconds"],
            latency_ratio=cell["latency_ratio"], paper_latency_ratio=other["latency_ms"] / full["latency_ms"],
            paper_reached=reached))
    columns = ["method", "budget", "status", "gap", "gap_half", "paper_gap", "training_pct", "paper_training_pct",
               "time_ratio", "paper_time_ratio", "latency_ratio", "paper_latency_ratio", "paper_reached"]
    frame = pd.DataFrame(lines, columns=columns)
    order = {m: i for i, m in enumerate(in_order(table["method"], _families(table)))}
    frame = frame.sort_values(["method", "budget"], key=lambda c: c.map(order) if c.name == "method" else -c,
                              ignore_index=True)
    repeated = frame["method"].eq(frame["method"].shift()).tolist()
    shown = pd.DataFrame([{
        "Method": "" if again else title(r["method"]), "Budget": f"{100 * r['budget']:g} %",
        "AUC − Full": _plus_minus(r["gap"], r["gap_half"], sign="+") if r["status"] == "ok" else
        UNREACHABLE if r["status"] == "unreachable" else r["status"],
        "paper": _plus_minus(r["paper_gap"], math.nan, sign="+") if r["paper_reached"] else UNREACHABLE,
        "Training memory": _number(r["training_pct"], " %"), "paper ": _number(r["paper_training_pct"], " %"),
        "Time ÷ Full": _number(r["time_ratio"], "×"), "paper  ": _number(r["paper_time_ratio"], "×"),
        "Latency ÷ Full": _number(r["latency_ratio"], "×"), "paper   ": _number(r["paper_latency_ratio"], "×"),
    } for r, again in zip(frame.to_dict("records"), repeated)])
    html = frame_html(shown, index=False)
    html = by_family(html, _headings(table, frame["method"])) if len(frame) else html
    caption = (f"{_where(rows)}, beside Table 5 of arXiv 2311.15578 ({paper_dataset.capitalize()}, DLRM, one seed). "
               "Gaps to Full are paired by seed, ± half the 95 % t-interval.")
    return Table(frame, html, caption, rows, command)


def ran(rows: pd.DataFrame) -> Table:
    """What lies behind the figures: runs by status, seeds, training time and devices, one line per method."""
    if not len(rows):
        raise ValueError("no rows to report; run `ecstudy sweep` first or widen the filter of ec.results(...)")
    rows = rows.assign(method=rows["spec"].where(rows["spec"].ne(""), rows["method"])) if "spec" in rows else rows
    grouped = rows.groupby("method", sort=False)
    frame = pd.DataFrame({
        "runs": grouped.size(), "ok": grouped["status"].agg(lambda s: int((s == "ok").sum())),
        "unreachable": grouped["status"].agg(lambda s: int((s == "unreachable").sum())),
        "diverged or failed": grouped["status"].agg(lambda s: int(s.isin(["diverged", "failed"]).sum())),
        "seeds": grouped["seed"].nunique(), "seconds": grouped["seconds"].sum(),
    }).reindex(in_order(rows["method"]))
    shown = frame.assign(seconds=frame["seconds"].map(duration)).rename(columns={"seconds": "training time, all runs"})
    shown.index = pd.Index([title(m) for m in shown.index], name="Method")
    return Table(frame, frame_html(shown.reset_index(), index=False), "Runs behind this page.", rows)


def cell_list(rows: pd.DataFrame, method: str) -> Table:
    """All cells of one method, one line per budget: AUC, gap to Full, memory, time, latency, rank or the reason."""
    frame = cells(rows)
    frame = frame[frame["method"] == method].reset_index(drop=True)
    if not len(frame):
        raise ValueError(f"no rows of {method!r}; there are {', '.join(in_order(cells(rows).method))}")
    shown = pd.DataFrame([{
        "Budget": "fixed" if math.isnan(c["budget"]) else f"{100 * c['budget']:g} %",
        "AUC": _plus_minus(c["auc"], c["auc_half"]) if c["status"] == "ok" else
        f"{UNREACHABLE} {c['reason']}" if c["status"] == "unreachable" else c["status"],
        "AUC − Full": "" if method == FULL else _plus_minus(c["gap"], c["gap_half"], sign="+"),
        "Rank": "" if math.isnan(c["rank"]) else f"{int(c['rank'])}", "Deployed": _number(c["reached_pct"], " %"),
        "Training": _number(c["training_pct"], " %"), "Time": duration(c["seconds"]),
        "Latency ÷ Full": _number(c["latency_ratio"], "×"),
    } for c in frame.to_dict("records")])
    return Table(frame, frame_html(shown, index=False), "", rows[rows["method"] == method])


_STATISTICS = {                         # column of ecstudy.data.statistics -> what a reader reads
    "rows": "rows", "base_rate": "click rate", "fields": "categorical fields", "ids": "ids (sum of cardinalities)",
    "numeric": "numeric columns", "seen_ids": "ids seen in these rows",
    "top10_share": "occurrences held by the top 10 % of ids",
    "under5_share": "ids with fewer than 5 occurrences", "once_share": "ids that occur once",
    "unseen_test_share": "test occurrences of ids never seen in training", "zero_share": "zeros among numeric values",
    "ceiling_auc": "best AUC possible (known for generated data)",
}


def statistics(frame: pd.DataFrame) -> Table:
    """Statistics of data sets side by side; ``frame`` has one row per data set, as ecstudy.data.statistics gives."""
    lines = []
    for column, text in _STATISTICS.items():
        share = column.endswith(("_share", "_rate"))
        lines.append([text, *("" if pd.isna(v) else f"{100 * v:.1f} %" if share else
                              f"{v:.4f}" if column == "ceiling_auc" else f"{int(v):,}"
                              for v in frame[column].astype(float))])
    # long names may break at their underscores
    shown = pd.DataFrame(lines, columns=["Training rows", *frame["dataset"].str.replace("_", "_\N{ZERO WIDTH SPACE}")])
    return Table(frame, frame_html(shown, index=False), "Generated and real logs side by side, training split.", frame)


