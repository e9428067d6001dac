"""What the paper says of retrieval (arXiv 2311.15578, section 5.5, Table 6), as claims of the ledger.

Differences are paired over the questions: intervals are normal, over questions, for the vectors and the reader at hand.
"""
from __future__ import annotations

import math
from typing import Sequence

import numpy as np
import pandas as pd

from .verdicts import MARGIN, UNTESTED, Estimate, Item, Verdict, cell_name, judge

SECTION = "retrieval"
COMPRESSORS = ("tt_rec", "dedup", "pq", "mag_pq", "int_quant", "svd", "mag_svd", "prune")     # the paper's


def evidence(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of section ``retrieval``, one per finished run of a compressor with its defaults.

    Columns beside those of a run: ``share`` of the uncompressed vectors' exact match (recall@10 without a reader) with
    its standard error ``share_se``; ``gain`` over the same method without groups, with ``gain_se``; NaN where the
    answers are neither here nor published. Where a reader answered in any run, runs without one are left out.
    """
    from ..rag.compare import Z, differences, shares

    runs = runs[runs["task"].eq("rag")] if "task" in runs else runs[:0]
    if not len(runs):
        return runs
    if (read := runs["em"].notna()).any():
        runs = runs[read]
    table = {}
    for against in ("full", "ungrouped"):
        found = differences(runs, against, ("em", "recall_10"))
        # exact match where a reader answered
        table[against] = shares(found.dropna(subset=["value"]).drop_duplicates("run")).set_index("run")
    full, plain = table["full"], table["ungrouped"]
    own = runs[runs["run_id"].isin(full.index)].drop_duplicates("run_id").set_index("run_id")
    full = full.reindex(own.index)
    plain = plain.reindex(own.index)
    own = own.assign(section=SECTION, share=full["share"], share_se=full["share_half"] / Z,
                     gain=plain["difference"], gain_se=(plain["high"] - plain["low"]) / (2 * Z))
    return own.reset_index(drop=True)


def _cell(rows: pd.DataFrame, method: str, budget: float) -> pd.DataFrame:
    """The runs of a method at a budget: its defaults, or a variant where only that was measured."""
    own = rows[rows["method"].eq(method) & np.isclose(rows["budget"].astype(float), budget, rtol=1e-6)]
    plain = own[own["spec"].eq(method)]
    return plain if len(plain) else own[own["spec"].eq(own["spec"].min())]


def _estimate(rows: pd.DataFrame, method: str, budget: float, column: str) -> Item:
    """Mean over seeds; seeds answer the same questions, so their standard errors do not average out."""
    own = _cell(rows, method, budget).dropna(subset=[column])
    found = Estimate(float(own[column].mean()), float(own[f"{column}_se"].mean())) if len(own) else None
    return Item(cell_name(method, budget), found)


def keeps(cells: Sequence[tuple[str, float]], share: float, above: bool = True):
    """Each (method, budget) keeps at least (at most) such a share of the uncompressed vectors' exact match."""
    def one(rows):
        return judge([_estimate(rows, *c, "share") for c in cells], share, above=above, unit="share", all_needed=True)

    return one


def gains(method: str, budget: float, points: float, above: bool = True):
    """Exact match of a method with groups minus without, above (below) so many points."""
    def one(rows):
        return judge([_estimate(rows, method, budget, "gain")], points / 100, above=above, unit="points")

    return one


def decodes(over: Sequence[tuple[str, float]], under: Sequence[tuple[str, float]], factor: float = 1.0):
    """Decoding 1,024 rows takes each of ``over`` more than ``factor`` times as long as each of ``under``."""
    def one(rows):
        time = {c: np.log(own["decode_ms"].to_numpy(float)).mean() for c in (*over, *under)
                if len(own := _cell(rows, *c).dropna(subset=["decode_ms"]))}
        items = []
        for a in over:
            there = [b for b in under if b in time and b != a]
            if a in time and there:
                b = max(there, key=time.get)                 # the closest pair of each
                items.append(Item(f"{cell_name(*a)} ÷ {cell_name(*b)}", [time[a] - time[b]]))
            else:
                items.append(Item(cell_name(*a), None))
        found = judge(items, factor, unit="×", log=True, single=math.log(MARGIN), all_needed=True)
        return found if any(i.values is not None for i in items) else Verdict(UNTESTED)

    return one
