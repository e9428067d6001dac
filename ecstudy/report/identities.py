"""Every memory figure of the paper's Table 5 beside ours: their formula, our bytes, and why where they differ.

``IDENTITIES`` is the one place for formulas and reasons. A difference beyond :data:`CLOSE` must lie in a stated range
and have a stated reason; ``tests/test_table5.py`` holds all rows of the paper's table to that.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

import pandas as pd

from ..registry import names
from .picture import Html, frame_html, raw
from .style import FULL, families, in_order, title
from .tables import PAPER_NAMES, UNREACHABLE, by_family, paper_table5
from .weights import weighed

CLOSE = 0.5                              # points of the full table within which two figures agree
LOGS = ("criteo", "avazu", "company")


@dataclass(frozen=True)
class Differs:
    """Where ours may differ, in points of the full table (ours minus the paper's), and why."""

    low: float
    high: float
    why: str


@dataclass(frozen=True)
class Identity:
    """A method of the paper's table: its formulas in per cent of n d words, and what ours weighs beside them.

    ``specs`` and ``budgets`` map the paper's budget (per cent) to our spec and budget where they are not the method's
    name and the same figure. ``slash`` says why a cell the paper could not reach is reached, or the other way round.
    """

    deployed: str
    training: str
    specs: dict[float, str] = field(default_factory=dict)
    budgets: dict[float, float] = field(default_factory=dict)
    deployed_differs: Differs | None = None
    training_differs: Differs | None = None
    slash: str = ""


IN_PLACE = "3 R: the parameters and both Adam moments"
_LEARNED = "the size is learned; what is weighed is the limit given to the search, which ends at or below it"
IDENTITIES: dict[str, Identity] = {
    "full": Identity("100", "3 × 100"),
    "compo": Identity("R = rows of both tables ÷ n", IN_PLACE),
    "tt_rec": Identity("R = Σ of the three cores ÷ n d, the same rank for all fields", IN_PLACE),
    "dhe": Identity("R = Σ of the networks' weights ÷ n d, the same width for all fields; hash constants not counted",
                    IN_PLACE),
    "robe": Identity("R = M ÷ n d", IN_PLACE),
    "dedup": Identity("B: the blocks that are kept, and one integer per block", "300: training the full table "
                      "dominates"),
    "mgqe": Identity(
        "6.25 (an int32 per id: frequent or not) + packed codes + centroids: 8 parts at 50 %, 4 parts at 10 %",
        "300 + deployed + 6.25 (a counter per id)", specs={50: "mgqe(parts=8)", 10: "mgqe(parts=4)"},
        deployed_differs=Differs(-6.5, -5.5, "frequent ids are marked by a bit each with running counts (1.25 bits "
                                 "per id), not by an int32; a tenth of each field's ids is frequent, ties cut"),
        training_differs=Differs(-23, -16, "codes exist only once deployed, not beside the trained vectors, and "
                                 "occurrences are counted before training")),
    "adapt_emb": Identity(
        "B = E + 6.25 p: rows, and one key for each of the share p of ids with rows of their own",
        "3 E + 6.25: an int32 per id", training_differs=Differs(
            -6.3, 0.5, "the map from id to row is a bit per id or the sorted frequent ids, whichever is lighter, not "
            "an int32 per id, and more rows fit the budget")),
    "int_quant": Identity("25 or 50", "deployed + 200: both moments in float32"),
    "alpt": Identity("25 or 50, + 6.25: a float32 scale per row", "25 or 50, + 200, + 3 × 6.25",
                     budgets={50: 0.5625, 25: 0.3125}),
    "mde": Identity(
        "Σ n_f d_f + d_f d over fields, widths powers of two", IN_PLACE, deployed_differs=Differs(
            -18, 0, "a budget is never exceeded: the paper's widths at 50 % (every field 8 or 16) weigh a little more "
            "than 50 %, the next smaller powers of two are what is left"),
        training_differs=Differs(-54, 0, "three times what is deployed, as there")),
    "auto_dim": Identity("Σ n_f d_f + projections, as the search ends", "3 × (2 + 4 + 8 + 16) ÷ 16: one table for each "
                         "candidate width", deployed_differs=Differs(0, 12.8, _LEARNED)),
    "opt_embed": Identity("Σ rows kept × (width + 1) ÷ n d, as the search ends; the int32 map per id is not counted",
                          "300", deployed_differs=Differs(0, 3.8, _LEARNED)),
    "deeplight": Identity(
        "CSR (2 nnz + n words) if B d ≥ 3, else COO (3 nnz)", "300 + 6.25: a float per row to find thresholds",
        training_differs=Differs(-6.35, -6.2, "the threshold is found in small blocks, without a buffer")),
    "autosrh": Identity(
        "CSR (2 nnz + n words) if B d ≥ 3, else COO (3 nnz)", "300 + 6.25: the group of each id as int32",
        training_differs=Differs(-4.8, -4.6, "the group of each id is one byte")),
}


def compare() -> pd.DataFrame:
    """One row per row of the paper's Table 5 whose method is here.

    Columns: method, dataset, budget_pct, budget (ours), formula_deployed, formula_training, paper_reached (bool),
    paper_deployed, paper_training, spec, reached, deployed, training, reason_deployed, reason_training,
    reason_reached and ``verdict``: ``agrees``, ``differs`` (a stated reason and range cover it) or ``unexplained``.
    """
    rows = paper_table5().to_dict("records")
    return pd.DataFrame([judge(row) for row in rows if OURS.get(row["method"]) in names()])


OURS = {theirs: name for name, theirs in PAPER_NAMES.items()}


def judge(row: dict) -> dict:
    """One row of the paper's table (as :func:`paper_table5` has it) beside ours, as :func:`compare` describes it."""
    method, pct = OURS[row["method"]], float(row["budget_pct"])
    known = IDENTITIES[method]
    spec = known.specs.get(pct, method)
    budget = None if method == FULL else known.budgets.get(pct, pct / 100)
    found = weighed(spec, row["dataset"], budget)
    line = dict(method=method, dataset=row["dataset"], budget_pct=pct, budget=budget, formula_deployed=known.deployed,
                formula_training=known.training, paper_reached=row["reached"] != "no",
                paper_deployed=row["reached_pct"], paper_training=row["train_memory_pct"], spec=spec,
                reached=found["reachable"], deployed=found["inference_pct"], training=found["training_pct"],
                reason_deployed="", reason_training="", reason_reached="")
    return line | _judged(line, known)


def _judged(line: dict, known: Identity) -> dict:
    if line["reached"] != line["paper_reached"]:
        return dict(reason_reached=known.slash, verdict="differs" if known.slash else "unexplained")
    if not line["reached"]:
        return dict(verdict="agrees")
    out, verdict = {}, "agrees"
    for kind, differs in (("deployed", known.deployed_differs), ("training", known.training_differs)):
        gap = line[kind] - line["paper_" + kind]
        if abs(gap) <= CLOSE:
            continue
        if differs and differs.low <= gap <= differs.high:
            out["reason_" + kind] = differs.why
            verdict = "differs" if verdict == "agrees" else verdict
        else:
            verdict = "unexplained"
    return out | dict(verdict=verdict)


def _gap(ours: float, theirs: float) -> str:
    gap = ours - theirs
    if abs(gap) <= CLOSE:
        return '<span class="ec-small">=</span>'
    return f'<b class="ec-{"below" if gap < 0 else "above"}">{"−" if gap < 0 else "+"}{abs(gap):.3g}</b>'


def table(dataset: str, found: pd.DataFrame | None = None) -> Html:
    """The paper's figures and ours for one log, all of them in per cent of the float32 full table."""
    found = compare() if found is None else found
    found = found[found["dataset"] == dataset]
    order = {m: i for i, m in enumerate(in_order(found["method"]))}
    found = found.sort_values("method", key=lambda c: c.map(order), kind="stable")
    lines, before = [], None
    for r in found.to_dict("records"):
        theirs, mine = r["paper_reached"], r["reached"]
        both = theirs and mine
        lines.append({
            "Method": "" if r["method"] == before else escape(title(r["method"])), "Budget": f"{r['budget_pct']:g}",
            "Deployed: paper": f"{r['paper_deployed']:g}" if theirs else UNREACHABLE,
            "ours": f"{r['deployed']:.4g}" if mine else f"{UNREACHABLE} <span class='ec-small'>(least "
            f"{r['deployed']:.3g})</span>",
            "difference": _gap(r["deployed"], r["paper_deployed"]) if both else "",
            "Training: paper": f"{r['paper_training']:g}" if theirs else UNREACHABLE,
            "ours ": f"{r['training']:.4g}" if mine else UNREACHABLE,
            "difference ": _gap(r["training"], r["paper_training"]) if both else ""})
        before = r["method"]
    kinds = families() | {FULL: FULL}
    family = [kinds[m] for m in found["method"]]
    html = by_family(frame_html(pd.DataFrame(lines), index=False, escape_text=False), family)
    return Html(f'<div class="ec-scroll">{html}</div>')


def formulas(found: pd.DataFrame) -> str:
    """Each method's formula in the paper's accounting and, where ours differs, the reason."""
    lines = []
    for method in in_order(found["method"]):
        own = found[found["method"] == method]
        reasons = list(dict.fromkeys(r for column in ("reason_deployed", "reason_training", "reason_reached")
                                     for r in own[column] if r))
        text = "; ".join(reasons)
        lines.append({"Method": title(method), "Paper, deployed": IDENTITIES[method].deployed,
                      "Paper, training": IDENTITIES[method].training,
                      "Ours": text[:1].upper() + text[1:] + "." if text else "the same"})
    html = frame_html(pd.DataFrame(lines), index=False).replace("ec-table", "ec-table ec-prose")
    return raw(Html(f'<div class="ec-scroll">{html}</div>'))


def fragment() -> str:
    found = compare()
    agrees, differs = (int((found["verdict"] == v).sum()) for v in ("agrees", "differs"))
    text = (f"{len(found)} of the {len(paper_table5())} rows of the paper's Table 5 belong to methods that are here. "
            f"In {agrees} both figures agree within {CLOSE:g} points; in {differs} one differs for the reason stated.")
    if wrong := found[found["verdict"] == "unexplained"]["method"].map(title).unique().tolist():
        text += f" Not explained: {', '.join(wrong)}."
    tabs = "\n\n".join(f"::::{{tab-item}} {name.capitalize()}\n{raw(table(name, found))}::::" for name in LOGS)
    return "\n\n".join([text, "## Formulas and reasons", formulas(found), "## All figures",
                        "In per cent of the float32 full table. `=`: within half a point; blue: lower, orange: higher.",
                        f":::::{{tab-set}}\n{tabs}\n:::::"]) + "\n"
