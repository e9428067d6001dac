"""Where a page's figures come from: versions, commit, device, seeds, data; and the mark that names the kind of data."""
from __future__ import annotations

import platform
from datetime import datetime, timezone
from html import escape

import pandas as pd

from .picture import Html

QUICK = "synthetic_"                     # names of generated data sets begin so


def facts(rows: pd.DataFrame | None = None) -> dict[str, str]:
    """The stamp as ``{name: text}``: of this machine and checkout, or of the ``rows`` where they say it."""
    from .. import __version__
    from ..study.row import provenance

    now = provenance()
    out = {"ecstudy": __version__, "torch": now["torch"], "Python": platform.python_version(),
           "commit": _commit(now["commit"], now["dirty"]),
           "built": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    if rows is None or not len(rows):
        return out
    several = {"ecstudy": "version", "torch": "torch", "Python": "python", "data": "dataset",
               "data fingerprint": "data_fingerprint", "device": "device", "machine": "machine", "threads": "threads",
               "learning rate": "lr", "batch": "batch", "seeds": "seed"}
    for name, column in several.items():
        if column in rows and (found := _distinct(rows[column])):
            out[name] = found
    commits = [_commit(c, bool(d)) for c, d in rows[["commit", "dirty"]].drop_duplicates().itertuples(index=False)]
    out["commit"] = ", ".join(dict.fromkeys(commits))
    out["measured"] = " to ".join(dict.fromkeys(str(t)[:10] for t in (rows["created"].min(), rows["created"].max())))
    return out


def stamp(rows: pd.DataFrame | None = None) -> Html:
    """The facts as a list for the foot of a page."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(rows).items())
    return Html(f'<dl class="ec-stamp">{items}</dl>')


def mark(rows: pd.DataFrame, profile: str = "") -> Html:
    """One box at the head of a page: generated or real data, how many rows of it and seeds, and what that allows."""
    datasets = sorted(rows["dataset"].unique())
    seeds = rows["seed"].nunique()
    names = escape(", ".join(datasets))
    if all(name.startswith(QUICK) for name in datasets):
        profile, rag = profile.partition("/")[0] or "quick", "task" in rows and rows["task"].eq("rag").all()
        begin = "Made to run anywhere in minutes: it" if profile == "quick" else "It"
        text = (f"<strong>Generated data, {escape(profile)} profile.</strong> {names}, {seeds} seed"
                f"{'s' * (seeds != 1)}. {begin} shows how methods behave and what they weigh; its "
                f"{'exact match' if rag else 'AUC'} says nothing about a real {'corpus' if rag else 'log'}.")
        return Html(f'<div class="ec-mark">{text}</div>')
    text = (f"<strong>Real data.</strong> {names}, {seeds} seed{'s' * (seeds != 1)}; "
            f"{len(rows)} runs of {rows['method'].nunique()} methods.")
    return Html(f'<div class="ec-mark ec-real">{text}</div>')


def _commit(commit: str, dirty: bool) -> str:
    return "not a checkout" if not commit or pd.isna(commit) else commit[:10] + (" with changes" if dirty else "")


def _distinct(values: pd.Series) -> str:
    found = [v for v in dict.fromkeys(values.tolist()) if not pd.isna(v) and v != ""]
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found)
