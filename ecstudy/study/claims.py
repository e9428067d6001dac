"""The paper's claims (arXiv 2311.15578, sections 5.1 to 5.5) as a literal list, each with a function that decides it.

The last group is what FIITED, our second system, claims for itself (arXiv 2401.04408).

``CLAIMS`` is the list; ``decide`` reads one frame, :func:`evidence`, whose column ``section`` says what a row is: a
run (``dlrm``, ``models``, ``dims``, ``ablation``, ``retrieval``), a module weighed at a log's true field sizes
(``weights``), a timed look-up at Criteo's size (``lookup``), or statistics of training rows (``data``).

Data sets are judged one by one, by the rules of :mod:`.verdicts`. Over all, a claim holds (does not hold) if it does on
each real data set; where they differ it is undecided. Generated data is shown and never counts.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import pandas as pd

from .. import paths
from . import decisions as by
from . import retrieval_claims as rag
from .decisions import IMPORTANCE, PAPERS
from .verdicts import (BUDGETS, CLOSE, DOES_NOT, FULL, HOLDS, RANKS_AGREE, UNDECIDED, UNTESTED, Verdict, cell_name,
                       name_of, serves, spread)

SIMULATION = "synthetic_"                # names of generated data sets begin so
LOOKUP = "look-up at Criteo's field sizes"
_LOGS = {"criteo": "Criteo", "avazu": "Avazu", "company": "Company"}


@dataclass(frozen=True)
class Claim:
    """A numbered claim.

    Attributes
    ----------
    text, where:
        The claim in our words, and where the paper has it.
    paper:
        The paper's figures in words, computed from its Table 5 where they are in it.
    section:
        Which rows of the evidence decide it.
    one:
        Decides it from the rows of one data set.
    page:
        The page of the book with the evidence.
    ablations:
        Methods whose ablations (``tt_rec(init='paper')``) are tried where the claim does not hold.
    because:
        The reason where no ablation is needed to know it, from the methods themselves.
    shown_on:
        The logs on which the paper's own figures show it.
    """

    id: str
    group: str
    text: str
    where: str
    paper: Callable[[], str]
    section: str
    one: Callable[[pd.DataFrame], Verdict]
    page: str = "real.md"
    ablations: tuple[str, ...] = ()
    shown_on: tuple[str, ...] = ("criteo", "avazu")
    because: Callable[[], str] | None = None

    def decide(self, rows: pd.DataFrame) -> Verdict:
        """The verdict over all data sets of ``rows`` (as :func:`evidence` gives them)."""
        parts = {}
        for name, own in _by_dataset(rows, self.section):
            found = self.one(own)
            if found.verdict != UNTESTED or found.text:
                parts[name] = found
        return _over_all(parts)

    def reason(self, rows: pd.DataFrame, verdict: str | None = None) -> str:
        """Where the claim does not hold: what it becomes with the ablations that were measured, or that none was."""
        if (verdict or self.decide(rows).verdict) != DOES_NOT:
            return ""
        if self.because:
            return self.because()
        if not self.ablations:
            return ""
        tried = _ablations(rows, self.ablations)
        if not tried:
            return "no ablation yet"
        said = []
        for spec, changed in tried.items():
            found = self.decide(changed)
            said.append(f"with {spec} it {_SAID[found.verdict]} ({found.text})")
        return "; ".join(said)


_SAID = {HOLDS: "holds", DOES_NOT: "does not hold either", UNDECIDED: "is undecided", UNTESTED: "is not tested"}


# -- evidence -------------------------------------------------------------------------------------------------------

def evidence(runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """All that claims are decided from: ``runs`` (default: all published and cached), weights, look-ups, statistics."""
    from .store import results

    runs = results() if runs is None else runs
    parts = (runs, weights(), _lookups(), _statistics(), rag.evidence(runs))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def weights() -> pd.DataFrame:
    """The paper's methods and FIITED weighed at the true field sizes of its three logs: rows of section ``weights``."""
    from ..report.identities import IDENTITIES
    from ..report.weights import weighed

    rows = []
    for method in (*IDENTITIES, "fiited"):
        for log in _LOGS:
            for budget in (1.0,) if method == FULL else (0.5625, 0.5, 0.3125, 0.25, *BUDGETS[1:]):
                found = weighed(method, log, None if method == FULL else budget)
                rows.append(dict(section="weights", dataset=log, method=method, spec=method, budget=budget,
                                 status="ok" if found["reachable"] else "unreachable", reason=found["reason"],
                                 bytes_full=found["bytes_full"], bytes_inference=found["bytes_inference"],
                                 bytes_training=found["bytes_training"]))
    return pd.DataFrame(rows)


def _published(name: str) -> pd.DataFrame:
    path = paths.results() / name
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _lookups() -> pd.DataFrame:
    found = _published("benchmarks.csv")
    if not len(found):
        return found
    found = found[(found["benchmark"] == "lookup") & (found["batch"] == 128)]          # the paper's batch
    if "compiled" in found:                                # the paper's modules are not
        found = found[~found["compiled"].eq(True)]
    return pd.DataFrame(dict(section="lookup", dataset=LOOKUP, method=found["method"], spec=found["method"],
                             budget=found["budget"], status="ok", seed=0, latency_ms=found["ms"],
                             latency_full_ms=found["full_ms"]))


def _statistics() -> pd.DataFrame:
    found = _published("data_statistics.csv")
    return found[found["split"] == "train"].assign(section="data") if len(found) else found


def _by_dataset(rows: pd.DataFrame, section: str):
    sections = {"models": ("models", "dlrm"), "dims": ("dims", "dlrm"), "latency": ("dlrm", "lookup")}
    own = serves(rows, *sections.get(section, (section,)))
    if not len(own):
        return
    if section in ("dlrm", "latency") and "model" in own:       # the tables are DLRM's at the study's dimension
        own = own[_tables_own(own)]
    order = {name: i for i, name in enumerate(_LOGS)} | {LOOKUP: 90}
    for name in sorted(own["dataset"].dropna().unique(), key=lambda n: (n.startswith(SIMULATION), order.get(n, 50), n)):
        yield name, own[own["dataset"] == name]


def _tables_own(own: pd.DataFrame) -> pd.Series:
    """DLRM at dimension 16, and rows without a model (look-ups)."""
    model = own["model"].isna() | own["model"].eq("dlrm")
    return model & (own["dim"].isna() | own["dim"].eq(16) if "dim" in own else True)


def _over_all(parts: dict[str, Verdict]) -> Verdict:
    counted = {name: v for name, v in parts.items() if not name.startswith(SIMULATION) and v.verdict != UNTESTED}
    if not counted:
        return Verdict(UNTESTED, text="; ".join(f"{n}: {v.text}" for n, v in parts.items() if v.text) or "no rows",
                       parts=parts)
    found = list(dict.fromkeys(v.verdict for v in counted.values()))
    first = next(iter(counted.values()))
    names = [_LOGS.get(n, n) for n in counted]
    if len({v.text for v in counted.values()}) == 1:
        text = first.text + f" ({', '.join(names)})" * (len(names) > 1)
    else:
        text = "; ".join(f"{n}: {v.text}" for n, v in zip(names, counted.values()))
    if len(found) == 1:
        return Verdict(found[0], first.ours, first.low, first.high, text, first.unit, parts)
    return Verdict(UNDECIDED, math.nan, math.nan, math.nan, text, first.unit, parts)


def _ablations(rows: pd.DataFrame, methods: Sequence[str]) -> dict[str, pd.DataFrame]:
    """``{spec: rows}`` with the method's own runs replaced by those of one measured variant."""
    ablation, out = serves(rows, "ablation"), {}
    if not len(ablation):
        return out
    for method in methods:
        for spec in sorted(s for s in ablation["spec"].unique() if s.startswith(f"{method}(") and "|" not in s):
            variant = ablation[(ablation["spec"] == spec) & (ablation["status"] == "ok")]
            if len(variant):
                variant = variant.assign(budget=[_nominal(b, r) for b, r in zip(variant["budget"], variant["reached"])]
                                         if "reached" in variant else variant["budget"])
                own = np.array(["dlrm" in str(s).split("+") for s in rows["section"]])
                kept = rows[~(rows["method"].eq(method) & rows["dataset"].isin(variant["dataset"]) & own)]
                out[spec] = pd.concat([kept, variant.assign(section="dlrm", spec=method)], ignore_index=True)
    return out


def _nominal(budget: float, reached: float) -> float:
    """A spec that gives its size has no budget: the paper's nearest to what it reached."""
    if not math.isnan(budget) or math.isnan(reached):
        return budget
    return min((*BUDGETS, 0.25), key=lambda b: abs(math.log(b / reached)))


# -- the paper's figures --------------------------------------------------------------------------------------------

def paper(method: str, log: str, pct: float, column: str) -> float:
    """A figure of the paper's Table 5; NaN where the cell is "/", absent or unclear."""
    own = _paper_cells().get((method, log, pct), {"reached": "no"})
    unclear = column == "train_seconds" and own["reached"] == "unclear time"
    return math.nan if own["reached"] == "no" or unclear else float(own[column])


@functools.lru_cache(maxsize=1)
def _paper_cells() -> dict[tuple[str, str, float], dict]:
    from ..report.tables import PAPER_NAMES, paper_table5

    ours = {theirs: name for name, theirs in PAPER_NAMES.items()}
    return {(ours[r["method"]], r["dataset"], r["budget_pct"]): r for r in paper_table5().to_dict("records")}


def _logs(function, logs=("criteo", "avazu")) -> Callable[[], str]:
    return lambda: "; ".join(f"{_LOGS[log]} {function(log)}" for log in logs)


def _paper_gaps(methods, pcts=(50, 10, 1, 0.1)):
    return _logs(lambda log: spread([paper(m, log, p, "auc") - paper(FULL, log, 100, "auc")
                                     for m in methods for p in pcts], "{:+.4f}"))


def _paper_steps(methods, large: float, small: float):
    return _logs(lambda log: spread([paper(m, log, small, "auc") - paper(m, log, large, "auc") for m in methods],
                                    "{:+.4f}"))


def _paper_best(group, others, pcts):
    def best(methods, log, pct):
        return max(v for m in methods if not math.isnan(v := paper(m, log, pct, "auc")))

    return _logs(lambda log: ", ".join(f"{best(group, log, p) - best(others, log, p):+.4f} at {p:g} %" for p in pcts))


def _paper_latency(methods, pcts=(50, 25, 10, 1, 0.1)):
    return _logs(lambda log: spread([paper(m, log, p, "latency_ms") / paper(FULL, log, 100, "latency_ms")
                                     for m in methods for p in pcts], "{:.3g}×"))


def _paper_time(over, under, pct: float):
    def ratio(log):
        return spread([paper(a, log, pct, "train_seconds") / paper(b, log, pct, "train_seconds")
                       for a in over for b in under], "{:.3g}×")

    return _logs(ratio)


def _paper_groups(slow, quick, pct: float):
    def mean(group, log):
        return math.exp(np.nanmean([math.log(paper(m, log, pct, "train_seconds")) for m in group]))

    return _logs(lambda log: f"{mean(slow, log) / mean(quick, log):.3g}×")


def _paper_growth(method: str, large: float, small: float):
    def ratio(log):
        return paper(method, log, small, "train_seconds") / paper(method, log, large, "train_seconds")

    return _logs(lambda log: f"{ratio(log):.3g}×")


def _paper_top(pct: float):
    def top(log):
        return np.nanmax([paper(m, log, pct, "auc") for m in PAPERS]) - paper(FULL, log, 100, "auc")

    return _logs(lambda log: f"{top(log):+.4f}")


def _paper_kept(*cells: tuple[str, float]) -> Callable[[], str]:
    """Exact match as a share of Full's, of cells of Table 6."""
    def kept(method, pct):
        return 100 * _paper_rag(method, pct, "em") / _paper_rag(FULL, 100, "em")

    return lambda: ", ".join(f"{name_of(m)} {pct:g} %: {kept(m, pct):.1f} %" for m, pct in cells)


def _paper_decoding(*cells: tuple[str, float]) -> Callable[[], str]:
    return lambda: ", ".join(f"{name_of(m)} {pct:g} %: {_paper_rag(m, pct, 'decompress_latency_ms_batch1024'):g} ms"
                             for m, pct in cells)


def _paper_rag(method: str, pct: float, column: str) -> float:
    from ..report.retrieval import PAPER, paper_table6

    own = paper_table6()
    return float(own.loc[own["method"].eq(PAPER[method]) & own["memory_pct"].eq(pct), column].iloc[0])


# -- the list -------------------------------------------------------------------------------------------------------

WHOLE_TABLE_FIRST = ("dedup", "deeplight", "autosrh", "dhe")
FASTEST = ("int_quant", "alpt", "dedup")
STATIC = ("compo", "tt_rec", "dhe", "robe", "mde")
ALL_BUDGETS = ("tt_rec", "dhe", "robe", "dedup", "adapt_emb", "deeplight", "autosrh")
TRAINED_IN_PLACE = ("compo", "tt_rec", "dhe", "robe", "mde")
WHOLE_TRAINED = ("dedup", "mgqe", "auto_dim", "opt_embed", "deeplight", "autosrh")
QUICK_LOOKUP = ("robe", "dedup", "int_quant", "alpt", "opt_embed", "deeplight", "autosrh")
SLOW_LOOKUP = ("compo", "mgqe", "adapt_emb", "mde")
LOGS3 = ("criteo", "avazu", "company")
TABLE5 = "section 5.2, Table 5"


def _memory(number: int, text: str, paper_says, one, where: str = TABLE5, because=None) -> Claim:
    return Claim(f"M{number}", "Memory", text, where, paper_says, "weights", one, "identities.md", (), LOGS3, because)


def _takes_a_limit() -> str:
    from ..registry import get

    knobs = {m: get(m).knob for m in ("auto_dim", "opt_embed")}
    said = " and ".join(f"{name_of(m)} ({k})" for m, k in knobs.items() if k)
    return f"here the search is given a limit to keep to: {said}"


def _larger_batches() -> str:
    """What the same look-ups take at the larger batch that was timed."""
    found = _published("benchmarks.csv")
    if not len(found):
        return "at batch 128 a look-up is a few dozen calls, whatever they read"
    found = found[found["benchmark"].eq("lookup") & found["method"].isin(QUICK_LOOKUP) & found["batch"].gt(128)]
    found = found[~found["compiled"].eq(True)] if "compiled" in found else found
    slow = found.loc[found["ratio_full"].idxmax()]
    within = int((found["ratio_full"] <= 2).sum())
    return (f"at batch 128 Full's one gather is so short that every further call of a look-up shows; at batch "
            f"{int(slow['batch']):,} {within} of {len(found)} are within twice Full's time (most: "
            f"{cell_name(slow['method'], slow['budget'])} {slow['ratio_full']:.2g}×)")


CLAIMS: tuple[Claim, ...] = (
    _memory(1, "Hashing into one array, networks, tensor trains, deduplication, the frequency split and pruning reach "
            "every budget down to 0.1 %.", lambda: "TT-Rec, DHE, ROBE, Dedup, AdaptEmb, DeepLight, AutoSrh: all four",
            by.reaches([(m, b) for m in ALL_BUDGETS for b in BUDGETS]), "section 5.2.1, Table 5"),
    _memory(2, "CompoEmb reaches 1 % but not 0.1 %.", lambda: "“/” at 0.1 % on Criteo and Avazu",
            by.both(by.reaches([("compo", 0.01)]), by.reaches([("compo", 0.001)], False)),
            "section 5.2.1, Table 5"),
    _memory(3, "Quantisation has a few fixed sizes and stops far above a tenth of the memory.",
            lambda: "INT8/16 25 and 50 %, ALPT 31.3 and 56.3 %, nothing lower",
            by.reaches([(m, b) for m in ("int_quant", "alpt") for b in BUDGETS[1:]], False), "section 5.2.1, Table 5"),
    _memory(4, "MDE and MGQE cannot reach 1 %: every id keeps at least one number, or a code.",
            lambda: "MDE least 8.1 % (Avazu), MGQE least 11.1 %; “/” for MDE at 1 %",
            by.reaches([(m, 0.01) for m in ("mde", "mgqe")], False), "section 5.2.1, Table 5"),
    _memory(5, "AutoDim and OptEmbed do not control their size: they end near half of the memory and serve no smaller "
            "budget.", _logs(lambda log: spread([paper(m, log, 50, "reached_pct") for m in ("auto_dim", "opt_embed")],
                                                "{:.3g} %"), LOGS3),
            by.reaches([(m, b) for m in ("auto_dim", "opt_embed") for b in BUDGETS[1:]], False),
            "section 5.2.1, Table 5", _takes_a_limit),
    _memory(6, "Methods trained in place need three times their deployed size to train (parameters and two moments): "
            "training memory shrinks with the budget.",
            _logs(lambda log: spread([paper(m, log, p, "train_memory_pct") / paper(m, log, p, "reached_pct")
                                      for m in TRAINED_IN_PLACE for p in (50, 10, 1)], "{:.3g}×"), LOGS3),
            by.in_place(TRAINED_IN_PLACE)),
    _memory(7, "Methods that begin with the whole table (Dedup, MGQE, AutoDim, OptEmbed, pruning) save no training "
            "memory: 300 % and more, at any budget.",
            _logs(lambda log: spread([paper(m, log, p, "train_memory_pct") for m in WHOLE_TRAINED
                                      for p in (50, 10, 1, 0.1)], "{:.4g} %"), LOGS3),
            by.training(WHOLE_TRAINED, 299.5, math.inf)),
    _memory(8, "AutoDim needs the most training memory: a table for each width it considers.",
            _logs(lambda log: spread([paper("auto_dim", log, 50, "train_memory_pct")], "{:.4g} %"), LOGS3),
            by.most_training("auto_dim")),
    _memory(9, "Quantised training saves a little memory only: codes shrink, the moments stay in float32.",
            _logs(lambda log: spread([paper(m, log, p, "train_memory_pct") for m in ("int_quant", "alpt")
                                      for p in (50, 25)], "{:.4g} %"), LOGS3),
            by.training(("int_quant", "alpt"), 200, 299.5)),

    Claim("Q1", "Quality", "A difference of 0.001 AUC is considerable (and is read from one run per cell).",
          "section 5.2, Table 5", lambda: "one seed per cell", "dlrm", by.one_run_tells,
          because=lambda: "a seed draws initial values and the order of rows; on the paper's 45.8 million rows that "
                          "may move a run less than on this sample: with one seed the paper cannot say"),
    Claim("Q2", "Quality", "A tenth of the memory costs no AUC: the best method is within 0.001 of Full or above.",
          TABLE5, _paper_top(10), "dlrm", by.best_keeps(0.1)),
    Claim("Q3", "Quality", "So does a hundredth: the best method at 1 % is within 0.001 of Full or above.",
          TABLE5, _paper_top(1), "dlrm", by.best_keeps(0.01)),
    Claim("Q4", "Quality", "At 10, 1 and 0.1 % the highest AUC belongs to Dedup, a pruning method or DHE.", TABLE5,
          _paper_best(WHOLE_TABLE_FIRST, [m for m in PAPERS if m not in WHOLE_TABLE_FIRST], (10, 1, 0.1)), "dlrm",
          by.best_of(WHOLE_TABLE_FIRST, [m for m in PAPERS if m not in WHOLE_TABLE_FIRST], (0.1, 0.01, 0.001)),
          ablations=("autosrh", "deeplight", "dedup", "dhe")),
    Claim("Q5", "Quality", "ROBE lies far below Full at every budget (here: by more than 0.02).", TABLE5,
          _paper_gaps(["robe"]), "dlrm", by.gaps(["robe"], BUDGETS, -0.02, False), ablations=("robe",)),
    Claim("Q6", "Quality", "Sixteen bits lose nothing: within 0.001 of Full, or above.", TABLE5,
          _paper_gaps(["int_quant"], (50,)), "dlrm", by.gaps(["int_quant"], (0.5,), -CLOSE, True),
          ablations=("int_quant",)),
    Claim("Q7", "Quality", "Eight bits with one fixed scale cost more than 0.001.", TABLE5,
          _paper_gaps(["int_quant"], (25,)), "dlrm", by.gaps(["int_quant"], (0.25,), -CLOSE, False),
          ablations=("int_quant",)),
    Claim("Q8", "Quality", "MGQE loses more than 0.01 at the sizes it reaches.", TABLE5, _paper_gaps(["mgqe"]), "dlrm",
          by.gaps(["mgqe"], (0.5, 0.1), -0.01, False), ablations=("mgqe",)),
    Claim("Q9", "Quality", "Choosing dimensions (MDE, AutoDim, OptEmbed) costs more than 0.001 already at half of the "
          "memory.", TABLE5, _paper_gaps(["mde", "auto_dim", "opt_embed"], (50,)), "dlrm",
          by.gaps(["mde", "auto_dim", "opt_embed"], (0.5,), -CLOSE, False), ablations=("mde", "auto_dim", "opt_embed")),
    Claim("Q10", "Quality", "CompoEmb and AdaptEmb lose AUC as memory is taken away: 1 % is below 50 %.", TABLE5,
          _paper_steps(["compo", "adapt_emb"], 50, 1), "dlrm",
          by.steps(["compo", "adapt_emb"], 0.5, 0.01, 0.0, False), ablations=("compo", "adapt_emb")),
    Claim("Q11", "Quality", "More memory is not always better: TT-Rec at 1 % is above TT-Rec at 50 %.", TABLE5,
          _paper_steps(["tt_rec"], 50, 1), "dlrm", by.steps(["tt_rec"], 0.5, 0.01), ablations=("tt_rec",)),
    Claim("Q12", "Quality", "More memory is not always better: DHE at 1 % is above DHE at 50 %.", TABLE5,
          _paper_steps(["dhe"], 50, 1), "dlrm",
          by.steps(["dhe"], 0.5, 0.01), ablations=("dhe",), shown_on=("avazu",)),
    Claim("Q13", "Quality", "More memory is not always better: Dedup at 1 % is above Dedup at 50 %.", TABLE5,
          _paper_steps(["dedup"], 50, 1), "dlrm",
          by.steps(["dedup"], 0.5, 0.01), ablations=("dedup",), shown_on=("avazu",)),
    Claim("Q14", "Quality", "More memory is not always better: DeepLight and AutoSrh at 1 % are above 50 %.", TABLE5,
          _paper_steps(["deeplight", "autosrh"], 50, 1), "dlrm", by.steps(["deeplight", "autosrh"], 0.5, 0.01),
          ablations=("deeplight", "autosrh")),

    Claim("T1", "Training time", "INT8/16, ALPT and Dedup converge first: at half of the memory the other methods take "
          "longer (geometric means).", "section 5.2.4, Table 5",
          _paper_groups([m for m in PAPERS if m not in FASTEST], FASTEST, 50), "dlrm",
          by.groups([m for m in PAPERS if m not in FASTEST], FASTEST, "seconds", 0.5)),
    Claim("T2", "Training time", "TT-Rec at half of the memory takes longest of all.", "section 5.2.4, Table 5",
          _paper_time(["tt_rec"], [m for m in PAPERS if m != "tt_rec"], 50), "dlrm",
          by.slower(["tt_rec"], [m for m in PAPERS if m != "tt_rec"], "seconds", 0.5), ablations=("tt_rec",)),
    Claim("T3", "Training time", "Progressive pruning takes longer the less is kept: DeepLight at 0.1 % against 10 %.",
          "section 5.2.4, Table 5",
          _paper_growth("deeplight", 10, 0.1), "dlrm", by.grows("deeplight", "seconds", 0.1, 0.001),
          ablations=("deeplight",)),

    Claim("L1", "Latency", "ROBE, Dedup, quantised, masked and pruned tables are looked up within twice Full's time.",
          "section 5.2, Table 5, batch 128", _paper_latency(QUICK_LOOKUP), "latency",
          by.latencies(QUICK_LOOKUP, 2.0, False), "reproduce.md", because=_larger_batches),
    Claim("L2", "Latency", "CompoEmb, MGQE, AdaptEmb and MDE take more than twice Full's time.",
          "section 5.2, Table 5, batch 128", _paper_latency(SLOW_LOOKUP), "latency",
          by.latencies(SLOW_LOOKUP, 2.0, True), "reproduce.md",
          because=lambda: "here one gather serves all fields of a batch, where the published code looks up field by "
                          "field"),
    Claim("L3", "Latency", "DHE and TT-Rec compute their vectors and take several times Full's time at any size.",
          "section 5.2, Table 5, batch 128", _paper_latency(("dhe", "tt_rec")), "latency",
          by.latencies(("dhe", "tt_rec"), 2.0, True), "reproduce.md"),
    Claim("L4", "Latency", "TT-Rec at half of the memory is the slowest look-up of all.",
          "section 5.2, Table 5, batch 128",
          _logs(lambda log: spread([paper("tt_rec", log, 50, "latency_ms") / paper(m, log, 50, "latency_ms")
                                    for m in PAPERS if m != "tt_rec"], "{:.3g}×")), "latency",
          by.slower(["tt_rec"], [m for m in PAPERS if m != "tt_rec"], "latency_ms", 0.5), "reproduce.md"),

    Claim("S1", "Other models and dimensions", "The ranking of methods is the same for DLRM, WDL and DCN (here: "
          f"Kendall's tau above {RANKS_AGREE:g} at a tenth of the memory).", "section 5.3, Figure 4",
          lambda: "unchanged (a figure, no numbers)", "models", by.ranks(), "notebooks/real/model_impact.ipynb"),
    Claim("S2", "Other models and dimensions", "At fixed bytes, methods that weigh importance gain from dimension 64 "
          "over 16.", "section 5.4, Figure 5", lambda: "gain (a figure, no numbers)", "dims",
          by.dims(IMPORTANCE, 0.0, True), "notebooks/real/dimension_impact.ipynb"),
    Claim("S3", "Other models and dimensions", "At fixed bytes, static methods gain nothing from dimension 64 over 16 "
          "(here: no more than 0.001).", "section 5.4, Figure 5", lambda: "no gain (a figure, no numbers)", "dims",
          by.dims(STATIC, CLOSE, False), "notebooks/real/dimension_impact.ipynb"),
    Claim("S4", "Other models and dimensions", "Importance is not frequency alone: numbers given to an id do "
          "not follow its occurrences only (here: rank correlation below 0.9).", "section 5.4, Figure 6",
          lambda: "scattered (a figure, no numbers)", "dims", by.allocation, "notebooks/real/dimension_impact.ipynb"),

    Claim("D1", "Data", "Few ids hold most occurrences: the most frequent tenth more than 95 %, and more than 80 % of "
          "ids occur fewer than 5 times.", "section 5.1, frequency figure",
          lambda: "over 95 % and over 80 % on Criteo and Avazu", "data", by.skew, "data.md",
          because=lambda: "the sample of Criteo holds its rare ids once and its frequent ids less often, so its top "
                          "tenth has less than that of the whole log"),
)

def _retrieval(number: int, text: str, paper_says, one, because=None) -> Claim:
    return Claim(f"R{number}", "Retrieval", text, "section 5.5, Table 6", paper_says, rag.SECTION, one,
                 "notebooks/real/rag.ipynb", because=because)


CLAIMS += (
    _retrieval(1, "Sixteen bits keep exact match: at least 99 % of Full's.", _paper_kept(("int_quant", 50)),
               rag.keeps([("int_quant", 0.5)], 0.99)),
    _retrieval(2, "Eight bits cost more than a twentieth of it.", _paper_kept(("int_quant", 25)),
               rag.keeps([("int_quant", 0.25)], 0.95, False),
               because=lambda: "not the step by itself: with the paper's fixed 0.01 in place of a fitted scale these "
                               "vectors of norm one, whose values lie well within its range of ±1.28, lose as little; "
                               "here codes are the nearest, there rounded at random"),
    _retrieval(3, "Product quantisation keeps more than 80 % at 3 % of the memory.",
               _paper_kept(("pq", 3.14), ("mag_pq", 2.99)), rag.keeps([("pq", 0.03), ("mag_pq", 0.03)], 0.8)),
    _retrieval(4, "More centroids for passages of large norm help where memory is least: MagPQ is above PQ at 1.6 %.",
               _paper_kept(("mag_pq", 1.57), ("pq", 1.58)), rag.gains("mag_pq", 0.016, 0.0),
               because=lambda: "centroids of a ninth bit are paid for with fewer parts, and the norm that the encoder "
                               "divides by does not tell which passages are asked for; split by how often they are "
                               "retrieved MagPQ stays below PQ, too"),
    _retrieval(5, "Grouping by norm does not help a decomposition: MagSVD is at most a point above SVD at 10 %.",
               _paper_kept(("mag_svd", 10), ("svd", 10)), rag.gains("mag_svd", 0.1, 1.0, False)),
    _retrieval(6, "A decomposition keeps more than two thirds at a tenth of the memory and less than a quarter at a "
                  "hundredth.", _paper_kept(("svd", 10), ("svd", 1)),
               by.both(rag.keeps([("svd", 0.1)], 2 / 3), rag.keeps([("svd", 0.01)], 0.25, False)),
               because=lambda: "a tenth of the paper's 768 dimensions are 76, of the 384 here 38: at a quarter of the "
                               "memory, 95 dimensions, SVD keeps more than two thirds"),
    _retrieval(7, "Tensor trains and deduplication lose more than a third already at half of the memory.",
               _paper_kept(("tt_rec", 50), ("dedup", 50)),
               rag.keeps([("tt_rec", 0.5), ("dedup", 0.5)], 2 / 3, False),
               because=lambda: "what a tensor train keeps depends on the order of the passages: SQuAD's lie article by "
                               "article and lose nothing, those of Natural Questions lose nearly a half; over "
                               "scattered rows both keep more than five sixths. Deduplication loses two fifths of "
                               "SQuAD's answers and a quarter of the others"),
    _retrieval(8, "Pruning keeps more than 80 % at half of the memory and less than a half at a tenth.",
               _paper_kept(("prune", 50), ("prune", 10)),
               by.both(rag.keeps([("prune", 0.5)], 0.8), rag.keeps([("prune", 0.1)], 0.5, False)),
               because=lambda: "an index of 16 bits per value leaves room for nearly a third more values than the "
                               "paper's of 32 bits, and the vectors are others"),
    _retrieval(9, "At a hundredth of the memory every method that reaches it keeps less than a fifth.",
               _paper_kept(*((m, 1) for m in ("tt_rec", "dedup", "svd", "mag_svd", "prune"))),
               rag.keeps([(m, 0.01) for m in ("tt_rec", "dedup", "svd", "mag_svd", "prune")], 0.2, False)),
    _retrieval(10, "Tensor trains are the slowest to decode, at half and at a tenth of the memory.",
               _paper_decoding(("tt_rec", 50), ("tt_rec", 10), ("dedup", 50), ("svd", 10), ("prune", 50)),
               rag.decodes([("tt_rec", 0.5), ("tt_rec", 0.1)],
                           [(m, b) for m in ("dedup", "int_quant", "svd", "mag_svd", "prune") for b in (0.5, 0.1)])),
    _retrieval(11, "A pruned matrix of 0.1 % takes a hundred times as long to decode as one of 10 %.",
               _paper_decoding(("prune", 0.1), ("prune", 10)), rag.decodes([("prune", 0.001)], [("prune", 0.1)], 100),
               because=lambda: "positions are found by a bounded search within groups, and not by a pass over all of "
                               "them for each row"),
)


def _fiited(number: int, text: str, paper_says: str, section: str, one, page: str = "real.md", because=None) -> Claim:
    return Claim(f"F{number}", "In training", text, "arXiv 2401.04408", lambda: paper_says, section, one, page,
                 because=because)


CLAIMS += (
    _fiited(1, "FIITED makes tables 93.75 to 99.75 % smaller without a considerable loss (here: within 0.001 of Full, "
               "or above, at 6.25 and 0.25 % of the memory, the index that finds what is kept counted).",
            "93.75 to 99.75 % smaller on public click logs; values alone are counted", "dlrm",
            by.gaps(["fiited"], (0.0625, 0.0025), -CLOSE, True),
            because=lambda: "not because the index counts: it is an eighth of these bytes at most; two thirds of this "
                            "sample's ids occur once, and which loss the authors call significant could not be read"),
    _fiited(2, "FIITED is better than AdaEmbed at the same size.", "better (no figures in what could be read)", "dlrm",
            by.beats("fiited", "ada_embed")),
    _fiited(3, "FIITED is better than ESAPN at the same size.", "better (no figures in what could be read)", "dlrm",
            by.beats("fiited", "esapn")),
    _fiited(4, "FIITED saves memory while training: it falls with the budget and is below Full's.",
            "smaller than Full's (no figures in what could be read)", "weights",
            by.shrinks("fiited", (0.5, 0.1, 0.01)), "identities.md"),
)


def claim(number: str) -> Claim:
    """The claim of a number such as ``Q11``. Raises KeyError with the numbers there are."""
    found = {c.id: c for c in CLAIMS}
    if number not in found:
        raise KeyError(f"no claim {number!r}; there are {', '.join(found)}")
    return found[number]


def ledger(rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line per claim: ``id group claim where paper verdict ours low high unit text reason page shown_on parts``.

    ``rows`` default to :func:`evidence`; ``parts`` maps data sets to their :class:`Verdict`.
    """
    rows = evidence() if rows is None else rows
    lines = []
    for c in CLAIMS:
        v = c.decide(rows)
        lines.append(dict(id=c.id, group=c.group, claim=c.text, where=c.where, paper=c.paper(), verdict=v.verdict,
                          ours=v.ours, low=v.low, high=v.high, unit=v.unit, text=v.text,
                          reason=c.reason(rows, v.verdict), page=c.page, shown_on=c.shown_on, parts=v.parts))
    return pd.DataFrame(lines)
