"""The paper's Tables 2 and 3 from the methods' own metadata, with the reach of each verified by weighing it."""
from __future__ import annotations

import pandas as pd

from ..data.cardinalities import FIELDS
from ..registry import table as registry
from . import drawings
from .picture import raw
from .style import FAMILIES, FULL, in_order, title
from .tables import UNREACHABLE, paper_link
from .weights import BUDGETS, FEW, PASSAGES, Reach, dim_of, home, reach, sizes_of, weighed

LOGS = ("criteo", "avazu", "company")
HEADING = {"inter-feature": "## Inter-feature: ids share what is stored", "intra-feature":
           "## Intra-feature: every id keeps a row, made smaller", "baseline": "## Baselines",
           "post-training": "## Compressors of trained vectors"}


def math(latex: str) -> str:
    """LaTeX in a cell of a Markdown table, which reads ``|`` as the next cell."""
    return f"${latex.replace('|', chr(92) + 'vert ')}$" if latex else ""


def share(value: float) -> str:
    """Per cent with four figures; very small ones as a bound."""
    return "below 0.001\N{NO-BREAK SPACE}%" if value < 0.001 else f"{value:.4g}\N{NO-BREAK SPACE}%"


def capability(entry: pd.Series, found: Reach) -> str:
    """In words, how freely a method's size can be chosen."""
    if not entry["knob"]:
        return "one size"
    if entry["learns_size"]:
        return "learned, up to a limit"
    return f"{found.number} sizes" if found.number <= FEW else "any"


def _lines(head: list[str], cells: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def metadata(methods: list[str], entries: pd.DataFrame) -> str:
    """What each method is: kind, what allocation depends on, numbers stored and work of a look-up."""
    cells = []
    for name in methods:
        entry = entries.loc[name]
        cells.append([f"[{title(name)}](methods/{entry['family']}/{name}.md)", entry["group"],
                      entry["aware"] if entry["aware"] != "none" else "", math(entry["space"]), math(entry["time"]),
                      paper_link(entry["paper"])])
    return _lines(["Method", "Kind", "Allocates by", "Numbers stored", "Look-up of one id", "Paper"], cells)


def compression(methods: list[str], entries: pd.DataFrame) -> str:
    """How small each method gets, and which of the paper's budgets it reaches: all of it weighed."""
    cells, logs = [], LOGS if home(methods[0]) != PASSAGES else (PASSAGES,)
    for name in methods:
        smallest = [reach(name, log) for log in logs]
        cells.append([title(name), f"`{entries.loc[name, 'knob']}`" if entries.loc[name, "knob"] else "",
                      capability(entries.loc[name], smallest[0]), *(share(r.smallest) for r in smallest),
                      *(_reached(name, b, logs) for b in BUDGETS)])
    return _lines(["Method", "Size by", "Sizes", *(f"Smallest, {log.capitalize()}" for log in logs),
                   *(f"{100 * b:g}\N{NO-BREAK SPACE}%" for b in BUDGETS)], cells)


def _reached(method: str, budget: float, logs: tuple[str, ...]) -> str:
    """A tick, a slash, or the names of the logs on which the budget is reached."""
    yes = [log for log in logs if weighed(method, log, budget)["reachable"]]
    return "✓" if len(yes) == len(logs) else ", ".join(log.capitalize() for log in yes) or UNREACHABLE


def fragment() -> str:
    entries = registry()
    methods = [m for m in in_order(entries.index) if m != FULL]
    parts = []
    for family in FAMILIES:
        if own := [m for m in methods if entries.loc[m, "family"] == family]:
            parts += [HEADING[family], metadata(own, entries), compression(own, entries)]
    figure = drawings.reach({m: reach(m) for m in methods if home(m) != PASSAGES})
    parts += ["## Reach", raw(figure)]
    sums = ", ".join(f"{name.capitalize()} {sum(FIELDS[name][1]):,}" for name in LOGS)
    passages = f"{sum(sizes_of(PASSAGES)):,} passages of {dim_of(PASSAGES)} dimensions"
    parts.append(f"Field sizes are the true ones: {sums} ids; compressors of trained vectors are weighed for DPR's "
                 f"{passages}. Every size here is the weight of a module that was built, without allocating it, and "
                 "deployed; none comes from the formulas in the tables.")
    return "\n\n".join(parts) + "\n"
