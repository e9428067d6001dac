"""From rows (one per run) to cells (one per method and budget): means, 95 % t-intervals, gaps to Full, ranks."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..study.statistics import best_by_validation, by_spec, t_interval
from .style import FULL

_ONE = ("dataset", "model", "dim")          # a table or figure never mixes these silently


def check_rows(rows: pd.DataFrame, free: str = "") -> pd.DataFrame:
    """``rows`` with ``method`` naming the whole spec (``compo|int8`` is a method of its own).

    Raises ValueError if there are none or if they mix data sets, models or dimensions, the column ``free`` excepted.
    """
    if not len(rows):
        raise ValueError("no rows to report; run `ecstudy sweep` first or widen the filter of ec.results(...)")
    for column in _ONE:
        found = sorted(rows[column].dropna().unique().tolist()) if column in rows else []
        if len(found) > 1 and column != free:
            raise ValueError(f"rows of several {column}s {found}; choose one, e.g. rows[rows.{column} == {found[0]!r}]")
    return by_spec(rows)


def _ratio(above, below) -> float:
    values = pd.to_numeric(above, errors="coerce") / pd.to_numeric(below, errors="coerce").replace(0, np.nan)
    return float(values.mean()) if values.notna().any() else math.nan


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per method and budget, from rows of one data set, model and dimension.

    Columns: ``method family budget status reason seeds auc auc_half gap gap_half rank reached_pct bytes training_pct
    seconds time_ratio latency_ms latency_ratio``. ``auc`` is the mean over seeds and ``auc_half`` the half width of its
    95 % t-interval; ``gap`` is the mean of the differences to Full on the same seed (paired), ``gap_half`` its half
    width. ``rank`` counts from 1 among the methods that reached the budget, Full left out; ties share the better rank.
    ``budget`` is as in the rows: a fraction of the float32 full table, NaN for a method without one.
    ``time_ratio`` divides by Full's mean training seconds, ``latency_ratio`` by Full's latency taken beside each run.
    A cell with no finished run keeps the status and reason of its first row.
    """
    rows = best_by_validation(check_rows(rows))
    done = rows[rows["status"] == "ok"]
    full = done[done["method"] == FULL]
    full_auc = full.drop_duplicates("seed").set_index("seed")["auc"]
    full_seconds = full["seconds"].mean() if len(full) else math.nan
    lines = []
    for (method, budget), group in rows.groupby(["method", "budget"], sort=False, dropna=False):
        ok = group[group["status"] == "ok"]
        line = dict(method=method, family=group["family"].iloc[0], budget=float(budget), seeds=len(ok),
                    status="ok" if len(ok) else group["status"].iloc[0],
                    reason="" if len(ok) else str(group["reason"].iloc[0] or ""))
        if len(ok):
            line["auc"], line["auc_half"] = t_interval(ok["auc"])
            paired = ok.set_index("seed")["auc"] - full_auc
            line["gap"], line["gap_half"] = (0.0, math.nan) if method == FULL else t_interval(paired.dropna())
            line |= dict(
                reached_pct=100 * _ratio(ok["bytes_inference"], ok["bytes_full"]), bytes=ok["bytes_inference"].mean(),
                training_pct=100 * _ratio(ok["bytes_training"], ok["bytes_full"]),
                seconds=ok["seconds"].mean(), time_ratio=ok["seconds"].mean() / full_seconds,
                latency_ms=ok["latency_ms"].mean(), latency_ratio=_ratio(ok["latency_ms"], ok["latency_full_ms"]),
            )
        lines.append(line)
    columns = ["method", "family", "budget", "status", "reason", "seeds", "auc", "auc_half", "gap", "gap_half",
               "reached_pct", "bytes", "training_pct", "seconds", "time_ratio", "latency_ms", "latency_ratio"]
    table = pd.DataFrame(lines, columns=columns)
    ranked = table[(table["status"] == "ok") & (table["method"] != FULL)]
    table["rank"] = ranked.groupby("budget")["auc"].rank(ascending=False, method="min")
    return table
