"""The claims ledger as a page: the paper's figure, ours with its interval, the verdict, and the reason we found."""
from __future__ import annotations

import re
from html import escape

import pandas as pd

from .. import paths
from ..study.claims import SIMULATION, ledger
from ..study.verdicts import DOES_NOT, HOLDS, UNDECIDED, UNTESTED, VERDICTS, Verdict
from .picture import Html, Table, frame_html, raw
from .tables import by_family

MARKS = {HOLDS: "✓", DOES_NOT: "✗", UNDECIDED: "?", UNTESTED: "–"}
_CLASSES = {v: "ec-" + v.replace(" ", "-") for v in VERDICTS}
_LOGS = {"criteo": "Criteo", "avazu": "Avazu", "company": "Company"}
COMMAND = "ecstudy claims"


def badge(verdict: str) -> str:
    """The verdict as coloured text with a mark, so that it is read without colour too."""
    return f'<span class="ec-verdict {_CLASSES[verdict]}">{MARKS[verdict]}\N{NO-BREAK SPACE}{verdict}</span>'


def summary(found: pd.DataFrame) -> str:
    """How many claims hold, in one sentence; ``found`` as :func:`ecstudy.study.claims.ledger` gives it."""
    counts = found["verdict"].value_counts()
    n = {v: int(counts.get(v, 0)) for v in VERDICTS}
    return (f"Of {len(found)} claims, **{n[HOLDS]} hold**, **{n[DOES_NOT]} {'does' if n[DOES_NOT] == 1 else 'do'} not "
            f"hold**, {n[UNDECIDED]} {'is' if n[UNDECIDED] == 1 else 'are'} undecided (the intervals reach to both "
            f"sides, seeds are too few, or data sets differ) and {n[UNTESTED]} {'is' if n[UNTESTED] == 1 else 'are'} "
            "not tested yet.")


def strip(found: pd.DataFrame) -> Html:
    """All verdicts at a glance: a tile per claim, by group, each a link to its line of the table."""
    lines = []
    for group, own in found.groupby("group", sort=False):
        tiles = "".join(
            f'<a class="ec-tile {_CLASSES[r.verdict]}" href="#claim-{r.id}" title="{escape(r.claim)}: {r.verdict}">'
            f"{r.id}\N{NO-BREAK SPACE}{MARKS[r.verdict]}</a>" for r in own.itertuples())
        name = f'<span class="ec-strip-name">{escape(group)}</span>'
        lines.append(f'<div class="ec-strip">{name}<span>{tiles}</span></div>')
    key = " ".join(badge(v) for v in VERDICTS)
    return Html(f'<nav class="ec-strips" aria-label="All verdicts">{"".join(lines)}<p class="ec-small">{key}</p></nav>')


def _figures(text: str) -> str:
    """Signs as signs: a minus before a figure, and no line break within ``± 0.001``."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", escape(text))
    return text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def _name(dataset: str) -> str:
    return _LOGS.get(dataset, dataset).replace("_", "_\N{ZERO WIDTH SPACE}")


def _here(verdict: str, text: str, parts: dict[str, Verdict]) -> str:
    """What was found, a line per data set; those that agree to the letter share one; generated data last."""
    real = {n: v for n, v in parts.items() if not n.startswith(SIMULATION)}
    generated = {n: v for n, v in parts.items() if n.startswith(SIMULATION)}
    same: dict[tuple[str, str], list[str]] = {}
    for name, v in real.items():
        same.setdefault((v.verdict, v.text), []).append(_name(name))
    lines = [f'<span class="ec-small">{", ".join(names)}:</span> {_figures(t)}'
             + f" {badge(v)}" * (len(same) > 1) for (v, t), names in same.items()]
    if len(generated) > 2:
        counts = {v: sum(p.verdict == v for p in generated.values()) for v in VERDICTS}
        said = ", ".join(f"{v} on {n}" for v, n in counts.items() if n)
        lines.append(f'<span class="ec-small">generated data, not counted: {said}</span>')
    else:
        lines += [f'<span class="ec-small">{_name(n)}, not counted: {v.verdict}; {_figures(v.text)}</span>'
                  for n, v in generated.items()]
    return "<br>".join(lines) or ("" if verdict == UNTESTED else _figures(text))


def _link(page: str) -> str:
    """A link to the evidence if the book has the page."""
    toc = paths.root() / "_toc.yml"
    stem = page.rsplit(".", 1)[0]
    if not toc.is_file() or not re.search(rf"book/{re.escape(stem)}\s*$", toc.read_text(encoding="utf-8"), re.M):
        return ""
    return f' · <a href="{stem}.html">evidence</a>'


def table(found: pd.DataFrame) -> Table:
    """All claims by group: claim, paper, ours per data set, verdict, and where we disagree what ablations say."""
    lines = []
    for r in found.to_dict("records"):
        reason = f'<br><span class="ec-small">Why: {_figures(r["reason"])}.</span>' if r["reason"] else ""
        lines.append({
            "Claim": f'<span id="claim-{r["id"]}"><b>{r["id"]}</b> {_figures(r["claim"])}</span><br>'
                     f'<span class="ec-small">{escape(r["where"])}{_link(r["page"])}</span>',
            "Paper": _figures(r["paper"]).replace("; ", "<br>"),
            "Here": _here(r["verdict"], r["text"], r["parts"]) + reason, "Verdict": badge(r["verdict"])})
    html = frame_html(pd.DataFrame(lines), index=False, escape_text=False)
    html = by_family(html, found["group"].tolist()).replace("ec-table", "ec-table ec-claims", 1)
    caption = ("Figures are means over seeds ± half the 95 % t-interval, or with the interval in brackets; differences "
               "are paired by seed, those of retrieval (R) by question. Bytes (M) are of modules weighed at the logs' "
               "true field sizes.")
    return Table(found, html, caption, found.drop(columns=["parts", "shown_on"]), COMMAND)


def fragment(found: pd.DataFrame | None = None) -> str:
    """The generated part of the page; ``found`` defaults to the ledger over all published and cached rows."""
    found = ledger() if found is None else found
    return "\n\n".join([summary(found), raw(strip(found)), "## Claim by claim", raw(table(found))]) + "\n"
