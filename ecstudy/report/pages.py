"""Writes the generated part of the book: a page per method and the fragments other pages include.

``python -m ecstudy.report.pages`` writes into ``book/methods`` and ``book/generated`` (both ignored by git). A page is
made of what exists: the method's docstring and source, its registry entry, what the solver says it weighs at Criteo's
field sizes, its schedule as a rehearsal lists it, and its rows. Pages without rows say so.
"""
from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from .. import paths
from ..data import statistics as data_statistics
from ..registry import docstring, names
from ..registry import table as registry
from ..study.statistics import chosen
from . import claims, datasets, drawings, figures, guidelines, identities, significance, speed, tables, taxonomy
from .explorer import explorer
from .picture import Html, frame_html, raw
from .stamp import QUICK, mark, stamp
from .retrieval import CORPUS, table6
from .style import FAMILIES, FULL, beyond, families, in_order, title
from .tables import paper_link
from .weights import BUDGETS, DIM, PASSAGES, dim_of, home, shipped, sizes_of, weighed

REAL = "criteo_137k"                     # the real sample whose published rows the book shows
DATA = ("synthetic_criteo_xs", REAL)      # the data page compares these
LITTLE = 0.005                          # AUC, of what is said in passing
ABOUT = {
    "inter-feature": ("Inter-feature methods", "Ids share what is stored: a hash, a product of small tables, codes "
                      "into a common dictionary, or a network stands in for rows of their own."),
    "intra-feature": ("Intra-feature methods", "Every id keeps a row of its own, and the row is made smaller: fewer "
                      "bits, fewer dimensions, or fewer values that are not zero."),
    "baseline": ("Baselines", "What any method must beat to be worth its trouble, and the uncompressed table that all "
                 "ratios refer to."),
    "post-training": ("Compressors of trained vectors", "They take vectors as they are, such as those of passages that "
                      "an encoder made, and do not train. TT-Rec, Dedup and INT8/16 can do that too."),
}


def real_rows() -> pd.DataFrame:
    """Published rows of the real sample: DLRM at the study's dimension."""
    from ..study import results

    return results(section="dlrm", dataset=REAL, model="dlrm", dim=DIM)


def yardstick_rows() -> pd.DataFrame:
    """What the real sample yields without embeddings (``ecstudy yardsticks``)."""
    from ..study import results

    return results(section="dlrm", dataset=REAL, model="none")


def ablation_rows() -> pd.DataFrame:
    """Published runs of the real sample that explain a result rather than belong to the table."""
    from ..study import results

    return results(section="ablation", dataset=REAL, model="dlrm", dim=DIM)


def quick_rows() -> pd.DataFrame:
    """Rows of the quick profile, on generated data."""
    from ..study import results

    rows = results(section="quick", model="dlrm", dim=DIM)
    return rows[rows["dataset"].str.startswith(QUICK)]


def retrieval_rows() -> list[tuple[pd.DataFrame, str]]:
    """Rows of retrieval on real passages and on generated ones, each of one set of questions, and the page of each."""
    from ..study import results

    found = []
    for page, section, asked in (("real", "rag", f"{CORPUS}/nq"), ("quick", "quick_rag", "synthetic_facts/facts")):
        rows = results(section=section, task="rag", dataset=asked, status="ok")
        found.append((rows[rows["em"].notna()], f"../../notebooks/{page}/rag.ipynb"))
    return found


def write_pages(book: Path | None = None, *, weights: bool = True, progress: bool = False) -> list[Path]:
    """Write every generated page and fragment under ``book`` (default: the checkout's) and return their paths.

    ``weights=False`` leaves out the weighing at the paper's field sizes, which takes some seconds in all.
    """
    book = Path(book) if book else paths.root() / "book"
    real, quick, by_data = real_rows(), quick_rows(), guidelines.real_rows()
    family, passages = families(), retrieval_rows()
    pages = {f"methods/{family[name]}/{name}.md": _method_page(name, real, quick, passages, weights)
             for name in _seen(in_order(names()), progress)}
    pages |= {f"methods/{kind}.md": _family_page(kind) for kind in FAMILIES}
    later = "This part is written with `weights=True`.\n"
    pages |= {"generated/taxonomy.md": taxonomy.fragment() if weights else later,
              "generated/identities.md": identities.fragment() if weights else later}
    pages |= {"generated/methods.md": _methods_table(), "generated/deviations.md": _deviations(),
              "generated/first.md": _first_result(real, quick),
              "generated/claims.md": claims.fragment() if weights else later,
              "generated/guidelines.md": guidelines.fragment(by_data),
              "generated/real.md": _real(real, yardstick_rows(), ablation_rows(),
                                         pd.concat(by_data.values(), ignore_index=True) if by_data else real[:0]),
              "generated/speed.md": speed.fragment(datasets.published("benchmarks.csv")),
              "generated/compressors.md": speed.compressors(datasets.published("benchmarks.csv")),
              "generated/data.md": _data(), "generated/explorer.md": _explorer(real, quick),
              "generated/stamp.md": raw(stamp())}
    for folder in ("methods", "generated"):
        for old in (book / folder).rglob("*.md"):             # a method that is gone leaves no page behind
            if str(old.relative_to(book)) not in pages:
                old.unlink()
    written = []
    for name, text in pages.items():
        path = book / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:     # unchanged pages are not built again
            path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _seen(items, progress: bool):
    for i, item in enumerate(items, 1):
        if progress:
            print(f"page {i} of {len(items)}: {item}", file=sys.stderr)
        yield item


# -- a page per method ----------------------------------------------------------------------------------------------

def _method_page(name: str, real: pd.DataFrame, quick: pd.DataFrame, passages: list[tuple[pd.DataFrame, str]],
                 weights: bool) -> str:
    entry = registry().loc[name]
    first, _, rest = docstring(name).partition("\n")
    parts = [f"# {title(name)}", first, _facts(name, entry), markdown(rest)]
    if entry["trains"] and (stages := _stages(name)):
        parts += ["## How it trains", raw(figures.timeline(stages))]
    if weights:
        drawn = drawings.storage(name, shipped(name), sum(sizes_of(home(name))))
        parts += ["## What is stored", raw(drawn), "## What it weighs", _weights(name)]
    parts += ["## What it achieved", _achieved(name, real, quick, passages), "## Source", _source(name)]
    return "\n\n".join(p.strip() for p in parts if p) + "\n"


def _facts(name: str, entry: pd.Series) -> str:
    options = ", ".join(f"`{k}={v!r}`" for k, v in entry["options"].items()) or "none"
    family = f"[{entry['family']}](../{entry['family']}.md)"
    lines = [("name", f"`{name}`"), ("family", f"{family}, {entry['group']}" if entry["group"] else family),
             ("paper", paper_link(entry["paper"])),
             ("numbers stored", taxonomy.math(entry["space"])), ("look-up of one id", taxonomy.math(entry["time"])),
             ("sizes by", f"`{entry['knob']}`" if entry["knob"] else "nothing: its size is fixed"),
             ("allocates by", entry["aware"] if entry["aware"] != "none" else "nothing: all ids alike"),
             ("needs counts", "yes" if entry["needs_counts"] else "no"), ("options", options)]
    lines = [(k, str(v).replace("|", "\\|")) for k, v in lines if v]
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in lines)])


def markdown(text: str) -> str:
    """A docstring's body as Markdown: roles become code, a trailing ``::`` opens an indented block, arXiv ids link.

    An equation in double dollars stands in a block of its own, as MyST wants it. A number stays with its ``%``, also
    because MyST takes a line that begins with one for a comment.
    """
    text = re.sub(r"(\d)\s+%", "\\1\N{NO-BREAK SPACE}%", text)
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"``\1``", text)
    text = re.sub(r"::[ \t]*$", ":", text, flags=re.M)
    text = re.sub(r"\s*\$\$\s*(.+?)\s*\$\$\s*", r"\n\n$$\n\1\n$$\n\n", text, flags=re.S)
    return paper_link(text).strip()


def section(name: str, heading: str) -> str:
    """The part of a method's docstring under ``**heading**``, up to the next bold heading; "" if there is none."""
    found = re.search(rf"\*\*{heading}\*\*\s*(.*?)(?=\n\s*\n\*\*|\Z)", docstring(name), flags=re.S)
    return markdown(found.group(1)) if found else ""


def _stages(name: str):
    from .. import training

    timeline = getattr(training, "timeline", None)
    return timeline(name) if timeline else None


def _weights(name: str) -> str:
    data = home(name)
    sizes = sizes_of(data)
    paper = tables.paper_table5()
    paper = paper[(paper["dataset"] == "criteo") & (paper["method"] == tables.PAPER_NAMES.get(name))]
    theirs = paper.set_index("budget_pct")
    beside = {budget: 100 * budget for budget in BUDGETS}             # our budget -> the paper's column
    if known := identities.IDENTITIES.get(name):
        moved = {budget: pct for pct, budget in known.budgets.items()}
        beside = {b: pct for b, pct in beside.items() if pct not in known.budgets} | moved
        beside |= {pct / 100: pct for pct in theirs.index if pct not in (*beside.values(), 100)}
    lines = []
    for budget in sorted(beside, reverse=True) if registry().loc[name, "knob"] else (None,):
        found = weighed(name, data, budget)
        other = theirs.loc[beside[budget]] if budget and beside[budget] in theirs.index else None
        line = {"Budget": "100 %" if budget is None else f"{100 * budget:.4g} %",
                registry().loc[name, "knob"] or "size": "fixed" if found["knob"] is None and found["reachable"] else
                "" if found["knob"] is None else f"{found['knob']:,}" if isinstance(found["knob"], int) else
                str(found["knob"]),
                "Deployed": f"{found['inference_pct']:.4g} %" if found["reachable"] else
                f"/ (at least {found['inference_pct']:.3g} %)",
                "Training": "" if found["training_pct"] is None else f"{found['training_pct']:.4g} %"}
        if len(theirs) and name != FULL:
            reached = other is not None and other["reached"] != "no"
            line |= {"Paper, deployed": "" if other is None else f"{other['reached_pct']:g} %" if reached else "/",
                     "Paper, training": f"{other['train_memory_pct']:g} %" if reached else ""}
        lines.append(line)
    where = "for DPR's {:,} passages" if data == PASSAGES else "at Criteo's {:,} ids"
    text = (f"Bytes of the module the solver builds for each of the paper's budgets {where.format(sum(sizes))} and "
            f"dimension {dim_of(data)}, in per cent of the float32 full table. `/` is out of reach.")
    table = Html(f'<div class="ec-scroll">{frame_html(pd.DataFrame(lines), index=False)}</div>')
    return f"{text}\n\n{raw(table)}"


def _achieved(name: str, real: pd.DataFrame, quick: pd.DataFrame, passages: list[tuple[pd.DataFrame, str]]) -> str:
    parts, retrieved = [], _retrieved(name, passages) if name != FULL else ""
    if not registry().loc[name, "trains"]:
        return "It takes no part in the study of recommendation models.\n\n" + (
            retrieved or "There are no rows of retrieval yet; `make study PROFILE=real` measures them.")
    for rows, page in ((real, "../../real.md"), (quick, "../../notebooks/quick/dlrm.ipynb")):
        own = rows[rows["method"] == name] if len(rows) else rows
        if not len(own) or not own["status"].eq("ok").any():
            continue
        parts.append(raw(mark(rows)))
        try:
            shown = figures.auc_against_bytes(rows, highlight=None if name == FULL else name)
        except ValueError:
            continue
        parts += [raw(replace(shown, rows=None)), raw(tables.cell_list(rows, name)),
                  f"All methods: [the page of these rows]({page})."]
    if retrieved:
        parts += ["### Compressing passages", retrieved]
    return "\n\n".join(parts) or (
        "No rows yet. `make report` measures the quick profile; `make study` fills what is missing.")


def _retrieved(name: str, passages: list[tuple[pd.DataFrame, str]]) -> str:
    """Its rows of retrieval beside those of uncompressed vectors; "" if there are none."""
    parts = []
    for rows, page in passages:
        own = rows[rows["method"].isin((FULL, name))]
        if own["method"].eq(name).any():
            parts += [raw(mark(own)), raw(replace(table6(own), rows=None)),
                      f"All compressors, figures and other questions: [the page of these rows]({page})."]
    return "\n\n".join(parts)


def _source(name: str) -> str:
    path = paths.PACKAGE / "methods" / f"{name}.py"
    first = ast.parse(path.read_text(encoding="utf-8")).body[1].lineno          # behind the docstring, shown above
    return (f"`ecstudy/methods/{name}.py`, from its first import on:\n\n"
            f"```{{literalinclude}} ../../../ecstudy/methods/{name}.py\n:language: python\n:lines: {first}-\n```")


# -- fragments ------------------------------------------------------------------------------------------------------

def _family_page(family: str) -> str:
    head, text = ABOUT[family]
    return f"# {head}\n\n{text}\n\n{_methods_list(family, f'{family}/')}"


def _methods_list(family: str, folder: str) -> str:
    lines = ["| Method | Kind | In one line | Sizes by | Paper |", "|---|---|---|---|---|"]
    entries = registry()
    for name in in_order(entries.index[entries["family"] == family]):
        entry = entries.loc[name]
        knob = f"`{entry['knob']}`" if entry["knob"] else "fixed"
        summary = entry["summary"].replace("|", "\\|")
        lines.append(f"| [{title(name)}]({folder}{name}.md) | {entry['group']} | {summary} | {knob} | "
                     f"{paper_link(entry['paper'])} |")
    return "\n".join(lines) + "\n"


def _methods_table() -> str:
    return "\n".join(f"## {ABOUT[family][0]}\n\n{ABOUT[family][1]}\n\n{_methods_list(family, f'methods/{family}/')}"
                     for family in FAMILIES)


def _deviations() -> str:
    """Each method's own list, from its docstring, so that it stands in one place."""
    family = families()
    parts = [f"### {title(name)}\n\n{text}\n\n[The method's page](methods/{family[name]}/{name}.md)"
             for name in in_order(names()) if (text := section(name, "Deviations"))]
    return "\n\n".join(parts) + "\n"


def _best(rows: pd.DataFrame, budget: float):
    from .summary import cells

    table = cells(rows)
    reached = table[(table["budget"] == budget) & (table["status"] == "ok")].sort_values("auc")
    full = table[(table["method"] == FULL) & (table["status"] == "ok")]
    return (reached.iloc[-1], full.iloc[0]) if len(reached) and len(full) else None


def _first_result(real: pd.DataFrame, quick: pd.DataFrame) -> str:
    """The first figure of the book: real rows if there are any, else the quick profile, said to be that."""
    for rows, page in ((real, "real.md"), (quick, "notebooks/quick/dlrm.ipynb")):
        found = _best(rows, 0.1) if len(rows) and rows["status"].eq("ok").any() else None
        if found is None:
            continue
        best, full = found
        half = "" if pd.isna(best["gap_half"]) else f" ± {best['gap_half']:.4f}"
        text = (f"At one tenth of the memory, **{title(best['method'])}** holds the highest AUC, {best['auc']:.4f}; "
                f"the uncompressed table has {full['auc']:.4f} (difference {best['gap']:+.4f}{half}, paired by seed). "
                f"[All methods and budgets]({page}).")
        return "\n\n".join([raw(mark(rows)), text, raw(figures.auc_against_bytes(rows))]) + "\n"
    return "No rows are published and none have been measured here yet: run `make report`.\n"


def _explorer(real: pd.DataFrame, quick: pd.DataFrame) -> str:
    """The interactive figure: real rows if there are any, else the quick profile, said to be that."""
    for rows, command in ((real, "make study PROFILE=real"), (quick, "make report")):
        if len(rows) and rows["status"].eq("ok").any():
            return "\n\n".join([raw(mark(rows)), raw(explorer(rows, command=command))]) + "\n"
    return "No rows are published and none have been measured here yet: run `make report`.\n"


def _yardsticks(real: pd.DataFrame, yardsticks: pd.DataFrame) -> list[str]:
    """Full beside what needs no embeddings, so that a reader sees the room in which methods differ."""
    from .summary import cells

    full = cells(real)
    full = full[(full["method"] == FULL) & (full["status"] == "ok")]
    if not len(yardsticks) or not len(full):
        return []
    full, known = full.iloc[0], {
        "base_rate": "the base rate of the training rows", "logistic_regression(c=1.0)":
        "one-hot logistic regression, scikit-learn's default penalty", "logistic_regression":
        "one-hot logistic regression, penalty chosen on validation"}
    lines = [{"Model": known.get(r["spec"], r["spec"]), "AUC": f"{r['auc']:.4f}",
              "95 % interval, test rows": f"{r['auc_low']:.4f} to {r['auc_high']:.4f}",
              "Log loss": f"{r['logloss']:.4f}", "Full minus this": f"{full['auc'] - r['auc']:+.4f}"}
             for _, r in yardsticks.sort_values("auc").iterrows()]
    tuned = yardsticks.loc[yardsticks["spec"] == "logistic_regression", "auc"]
    text = f"DLRM with the full table reaches {full['auc']:.4f}, the mean of {int(full['seeds'])} seeds."
    if len(tuned):
        word = "no better than" if full["auc"] <= tuned.iloc[0] else "better than"
        text += (f" On so few rows that is {word} a well penalised linear model ({tuned.iloc[0]:.4f}): the sample says "
                 "how much of Full a method keeps, not how good embeddings can be.")
    table = Html(f'<div class="ec-scroll">{frame_html(pd.DataFrame(lines), index=False)}</div>')
    return ["## Yardsticks", text, raw(table)]


def _reading(real: pd.DataFrame, ablation: pd.DataFrame) -> list[str]:
    """What the rows say beside the paper, each sentence only if its rows are there; every number is read off them."""
    from .summary import cells

    found = cells(real)
    found = found[found["status"] == "ok"]
    full = found.loc[found["method"] == FULL, "auc"]
    if not len(full):
        return []
    full = full.iloc[0]

    def at(method: str, budget: float):
        hit = found[(found["method"] == method) & (found["budget"] == budget)]
        return hit.iloc[0] if len(hit) else None

    def gap(line) -> str:
        return f"{line['gap']:+.4f} ± {line['gap_half']:.4f}"

    points = []
    half = found[(found["budget"] == 0.5) & (found["method"] != FULL)]
    if len(half):
        worst = half.loc[half["auc"].idxmin()]
        near = int((half["gap"] > -LITTLE).sum())
        if near == len(half):
            points.append(f"**At half the memory little is lost by any method**: the lowest of {len(half)} is "
                          f"{title(worst['method'])}, {gap(worst)} to Full.")
        else:
            points.append(f"**At half the memory** {near} of {len(half)} methods are less than {LITTLE:g} below Full; "
                          f"the lowest is {title(worst['method'])}, {gap(worst)}.")
    if real["ne"].notna().any() and real["ne"].max() < 1:
        points.append(f"**Nothing is worse than predicting the click rate**: normalised entropy is at most "
                      f"{real['ne'].max():.3f} over all {int(real['ne'].notna().sum())} runs (1 is the click rate).")
    if (top := at("top_k", 0.1)) is not None:
        better = found[(found["budget"] == 0.1) & (found["auc"] > top["auc"])]["method"].map(title).tolist()
        points.append(f"**The trivial baseline is the bar.** Own rows for the most frequent ids and one shared row for "
                      f"the rest ({title('top_k')}) stands at {gap(top)} to Full with a tenth of the bytes; higher "
                      f"there: {', '.join(better) or 'no method'}.")
    later, ours = found["method"].map(beyond), found["family"].eq("baseline")
    said = []
    for budget in (0.1, 0.01, 0.001):
        best = [own.loc[own["auc"].idxmax()] for kind in (later, ~later & ~ours)
                if len(own := found[kind & found["budget"].eq(budget)])]
        if len(best) == 2:
            said.append(f"at {100 * budget:g} % {title(best[0]['method'])} ({gap(best[0])} to Full), of the paper's "
                        f"{title(best[1]['method'])} ({gap(best[1])})")
    if said:
        points.append("**Beyond the paper's methods** the highest is " + "; ".join(said) + ".")
    high, low = at("robe", 0.5), at("robe", 0.001)
    if high is not None and low is not None and low["gap"] > -0.03:
        points.append(f"**ROBE is not the loser the paper saw.** There it lies about 0.055 below Full at every budget; "
                      f"here {gap(high)} at 50 % and {gap(low)} at 0.1 %, with blocks as long as in the original.")
    def variant(spec: str, budget: float):
        hit = ablation[(ablation["spec"] == spec) & (ablation["budget"] == budget) & (ablation["status"] == "ok")]
        return hit["auc"].mean() if len(hit) else None

    pruned, last = at("autosrh", 0.001), variant("autosrh(order='published')", 0.001)
    if pruned is not None and last is not None and pruned["auc"] > last:
        points.append(f"**Pruning once, at the very end, is not enough at small budgets.** AutoSrh fine-tunes what is "
                      f"left, as the paper's text says, and has {pruned['auc']:.4f} at 0.1 %; in the order of its "
                      f"published code, which prunes last, {last:.4f}.")
    small, large = at("tt_rec", 0.01), at("tt_rec", 0.5)
    if small is not None and large is not None and large["auc"] > small["auc"]:
        published = [(budget, variant("tt_rec(init='paper')", budget)) for budget in (0.01, 0.5)]
        both = " and ".join(f"{auc:.4f} at {100 * budget:g} %" for budget, auc in published if auc is not None)
        points.append(f"**TT-Rec does not fall with more memory here**, its initial scale being free of the rank: "
                      f"{gap(small)} at 1 %, {gap(large)} at 50 %. In the paper it falls from 0.8025 to 0.7876. "
                      + (f"With the published initial values it has {both} here." if both else ""))
    whole = ablation[(ablation["spec"] == "deeplight") & (ablation["budget"] == 1.0) & (ablation["status"] == "ok")]
    most, one = at("deeplight", 0.5), at("deeplight", 0.01)
    if most is not None and one is not None and len(whole) and most["auc"] < one["auc"] and whole["auc"].mean() < full:
        points.append(f"**DeepLight gets worse with more memory** ({most['auc']:.4f} at 50 %, {one['auc']:.4f} at "
                      f"1 %), and pruning is not the cause: with a budget of 100 % the same schedule ends at "
                      f"{whole['auc'].mean():.4f} (mean of {len(whole)} seeds; Full has {full:.4f}). Its second stage "
                      "trains on for half an epoch past the best state of the first, which on so few rows overfits.")
    late = [(budget, at("cce", budget), variant("cce(every=0.25)", budget)) for budget in (0.1, 0.01)]
    late = [(budget, whole["auc"], quarter) for budget, whole, quarter in late if whole is not None and quarter]
    if late and late[0][2] > late[0][1]:
        both = " and ".join(f"{quarter:.4f} instead of {whole:.4f} at {100 * budget:g} %"
                            for budget, whole, quarter in late)
        points.append("**CCE gains from clustering earlier.** Here it does so at the end of an epoch; every quarter of "
                      f"one, it has {both}.")
    return ["## Reading it", "\n".join(f"- {point}" for point in points)] if points else []


def _real(real: pd.DataFrame, yardsticks: pd.DataFrame, ablation: pd.DataFrame, every: pd.DataFrame) -> str:
    """``every``: rows of all real data sets, for ranks over them."""
    if not len(real):
        return (f"There are no published rows of `{REAL}` yet, so this page has no figures. [Reproduce](reproduce.md) "
                "says how to prepare the data and fill them.\n")
    command = "make study PROFILE=real"
    parts = [raw(mark(real)), "## AUC against memory"]
    if real["status"].eq("ok").any():
        parts += [raw(figures.auc_against_bytes(real, command=command))]
    parts += _reading(chosen(real), ablation) + _yardsticks(real, yardsticks)
    parts += ["## The table", raw(tables.table5(real, command=command)), "## Beside the paper",
              "The paper trained on all 45.8 million rows, this sample is 0.3 % of them, so absolute AUC is lower and "
              "intervals are wide. What can be compared is the gap to Full and the costs as multiples of Full's.",
              raw(tables.beside_paper(real, command=command))]
    if (real["status"].eq("ok") & real["method"].ne(FULL)).any():
        parts += ["## What it costs", raw(figures.costs(real, command=command))]
    parts += ["## Learning rates", "Rates are compared on validation rows; the figures above are of those chosen "
              "here.", raw(significance.learning_rates(real, command=command))]
    if len(every):
        both = every[~every["method"].map(beyond)]           # the others ran on one data set, at other budgets, too
        parts += ["## Ranks over data sets and budgets", "Methods beyond the paper's ran on one "
                  "data set and are left out.",
                  raw(significance.critical_difference(both, command=command))]
    parts += ["## Runs behind this page", raw(tables.ran(real)), raw(stamp(real))]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def _data(names_of=DATA) -> str:
    """Statistics and frequency curves: published ones (aggregates), else measured where the data is at hand."""
    statistics, curves = datasets.known(names_of)
    if not len(statistics):
        return "No statistics are published and no data is at hand yet: run `make report`.\n"
    statistics = statistics.sort_values("dataset", key=lambda names: names.map(lambda n: (n.startswith(QUICK), n)))
    criteo = statistics["dataset"].str.contains("criteo")
    parts = [raw(tables.statistics(part)) for part in (statistics[criteo], statistics[~criteo]) if len(part)]
    if len(curves):
        parts.append(raw(figures.frequency(curves)))
    return "\n".join(parts)


def publish_data(names_of=DATA) -> list[Path]:
    """Write statistics and frequency curves of prepared data sets, aggregates only, into ``results/``.

    Data sets that are not at hand keep what is published of them.
    """
    from ..data import open_dataset

    here = [open_dataset(n) for n in names_of if n.startswith(QUICK) or (paths.data() / n / "meta.json").is_file()]
    if not here:
        return []
    fresh = {"data_statistics.csv": pd.DataFrame([data_statistics.statistics(d) for d in here]),
             "data_frequency.csv": pd.concat([datasets.curve(d) for d in here])}
    written = []
    for name, table in fresh.items():
        old = datasets.published(name)
        if len(old):
            table = pd.concat([old[~old["dataset"].isin(table["dataset"])], table])
        path = paths.results() / name
        part = path.with_name(f".{name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(part, index=False, float_format="%.6g")
        written.append(part.replace(path))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ecstudy.report.pages",
                                     description="Write the book's generated pages.")
    parser.add_argument("--publish-data", action="store_true",
                        help="write statistics of the data into results/ instead")
    if parser.parse_args().publish_data:
        print("wrote " + ", ".join(map(str, publish_data())), file=sys.stderr)
        return
    written = write_pages(progress=True)
    print(f"wrote {len(written)} pages under {paths.root() / 'book'}", file=sys.stderr)


if __name__ == "__main__":
    main()
