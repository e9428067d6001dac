"""What rows of retrieval do not tell by themselves: differences over questions, and how unevenly passages are found.

Both are computed from what runs kept (``runs/rag``) and published as small tables of their own, which stand in where
nothing was kept: ``results/rag_differences.csv`` and ``results/rag_skew.csv``.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from .. import paths
from ..data.layout import DataError
from ..spec import Part, Spec, parse
from ..study import store
from ..study.row import CellError
from ..study.row import known as known_as
from .popularity import popularity
from .run import SPLIT, Z, contrast, open_corpus, retrieved, setting

FULL = "full"
MEASURES = ("em", "f1", "recall_1", "recall_10", "recall_100")
DIFFERENCES = ["run", "base", "against", "dataset", "model", "spec", "budget", "seed", "measure", "value", "base_value",
               "difference", "low", "high", "count"]
SKEW = ["dataset", "order", "passages", "retrievals", "found", "id_share", "occurrence_share"]
AGAINST = (FULL, "ungrouped", "norms", "in order")
POINTS = 200
ORDERS = ("found", "by chance", "by other questions")


def differences(rows: pd.DataFrame, against: str = FULL, measures=MEASURES) -> pd.DataFrame:
    """Differences of runs over the same questions, one line per run and measure.

    Parameters
    ----------
    rows:
        Runs of retrieval, the bases among them.
    against:
        ``full`` subtracts the uncompressed vectors' run; ``ungrouped`` subtracts, from methods that split rows by norm
        (``mag_pq``), the same without groups (``pq``); ``norms`` subtracts, from those that split rows by how often
        they are retrieved, the same split by norms.

    Returns
    -------
    DataFrame with the columns :data:`DIFFERENCES`: ``value - base_value``, with its 95 % interval over the ``count``
    questions that both answered (paired, normal). Pairs of which neither the answers nor a published line is there are
    left out.
    """
    known_as("against", against, AGAINST)
    rows = rows[rows["task"].eq("rag") & rows["status"].eq("ok")]
    if not len(rows):
        return pd.DataFrame(columns=DIFFERENCES)
    rows = rows.drop_duplicates("run_id").assign(k=setting(rows, "k"), judge=setting(rows, "judge"),
                                                 limit=setting(rows, "limit").fillna(0),
                                                 weights=setting(rows, "weights"))
    same = ["dataset", "model", "k", "judge", "limit"]
    plain = rows["weights"].eq("norms")
    if against == FULL:
        base, own = rows[rows["spec"].eq(FULL)], rows[rows["spec"].ne(FULL) & plain]
    elif against == "norms":
        same += ["spec", "budget", "seed"]
        base, own = rows[plain], rows[rows["weights"].eq("retrieved")]
    else:
        same += ["inner", "budget", "seed"]
        inner = _ungrouped if against == "ungrouped" else _in_order
        rows = rows[plain].assign(inner=rows["spec"].map(inner))
        base, own = rows[rows["spec"].eq(rows["inner"])], rows[rows["spec"].ne(rows["inner"])]
    pairs = own.merge(base.drop_duplicates(same), on=same, suffixes=("", "_base"))
    known, lines = _published(), []
    for pair in pairs.to_dict("records"):
        for measure in measures:
            key = (pair["run_id"], pair["run_id_base"], measure)
            try:
                found = contrast(*key)
            except CellError:
                if key not in known:
                    continue
                found = known[key]
            lines.append(dict(run=key[0], base=key[1], against=against, dataset=pair["dataset"], model=pair["model"],
                              spec=pair["spec"], budget=pair["budget"], seed=pair["seed"], measure=measure, **found))
    return pd.DataFrame(lines, columns=DIFFERENCES)


def _ungrouped(spec: str) -> str:
    return spec.removeprefix("mag_")


def _in_order(spec: str) -> str:
    found = parse(spec)
    options = {k: v for k, v in found.options.items() if k != "order"}
    return Spec(Part(found.name, options), found.wrappers).canonical


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` of :func:`differences` with ``share``, value ÷ base_value, and ``share_half``, half its 95 % interval.

    The interval is that of a ratio of means over the same questions (delta method), so it is narrow both where nearly
    nothing is lost and where nearly nothing is left. For measures that are 0 or 1 for each question (EM, recall): what
    both runs get right follows from the width of the difference's interval. NaN for others and for a base of 0.
    """
    n, own, base = (table[c].astype(float) for c in ("count", "value", "base_value"))
    spread = n / (n - 1).where(n > 1)
    of_own, of_base = spread * own * (1 - own), spread * base * (1 - base)
    of_difference = n * ((table["high"] - table["low"]) / (2 * Z)) ** 2
    share = own / base.where(base > 0)
    together = (of_own + of_base - of_difference) / 2
    left = (of_own + share ** 2 * of_base - 2 * share * together).clip(lower=0)
    half = Z * np.sqrt(left / n) / base
    binary = table["measure"].eq("em") | table["measure"].str.startswith("recall_")
    return table.assign(share=share, share_half=half.where(binary))


def curve(counts: np.ndarray, order: np.ndarray) -> pd.DataFrame:
    """``id_share`` and ``occurrence_share``: what the first passages of an ``order`` hold of all retrievals."""
    held = counts[order].cumsum()
    if not held[-1]:
        raise CellError("nothing was retrieved, so there is no share to draw")
    at = np.unique(np.rint(np.geomspace(1, len(order), POINTS)).astype(np.int64))
    return pd.DataFrame(dict(id_share=at / len(order), occurrence_share=held[at - 1] / held[-1]))


def skew(rows: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """How unevenly the uncompressed vectors' first ``k`` fall on the passages, a curve of three orders per data set.

    ``found``: passages by falling count. ``by chance``: the same if every retrieval fell on any passage alike, which is
    uneven, too, where retrievals are few. ``by other questions``: passages by how often the questions for training
    find them, the part of the skew that could be known in advance; as published where the corpus is not at hand.
    Columns: :data:`SKEW`; ``found`` is the number of passages found at all.
    """
    known, parts = _published_skew(), []
    full = rows[rows["task"].eq("rag") & rows["status"].eq("ok") & rows["spec"].eq(FULL)]
    for row in full.drop_duplicates("dataset").to_dict("records"):
        passages = json.loads(row["settings"])["passages"]
        try:
            counts = retrieved(row["run_id"], passages, k)
        except CellError:
            parts.append(known[known["dataset"] == row["dataset"]])
            continue
        chance = np.bincount(np.random.default_rng(0).integers(passages, size=counts.sum()), minlength=passages)
        orders = dict(zip(ORDERS, ((counts, counts), (chance, chance))))
        try:
            orders[ORDERS[2]] = counts, popularity(open_corpus(json.loads(row["settings"])["corpus"]), k)
        except DataError:                                      # no corpus here: what was published of the same counts
            parts.append(known[known["dataset"].eq(row["dataset"]) & known["order"].eq(ORDERS[2])
                               & known["retrievals"].eq(counts.sum()) & known["found"].eq((counts > 0).sum())])
        for name, (held, by) in orders.items():
            order = np.argsort(-by, kind="stable")
            parts.append(curve(held, order).assign(dataset=row["dataset"], order=name, passages=passages,
                                                   retrievals=int(held.sum()), found=int((held > 0).sum())))
    return pd.concat(parts, ignore_index=True)[SKEW] if parts else pd.DataFrame(columns=SKEW)


# -- published ------------------------------------------------------------------------------------------------------

def _file(name: str) -> Path:
    return paths.results() / name


def _published() -> dict[tuple[str, str, str], dict]:
    path = _file("rag_differences.csv")
    if not path.is_file():
        return {}
    return {(line["run"], line["base"], line["measure"]): {n: line[n] for n in (
        "difference", "low", "high", "count", "value", "base_value")}
            for line in pd.read_csv(path).to_dict("records")}


def _published_skew() -> pd.DataFrame:
    path = _file("rag_skew.csv")
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=SKEW)


def publish(section: str) -> list[Path]:
    """Write the differences and curves of a section's published rows beside those of others; the files written.

    Raises CellError if none can be computed here.
    """
    rows = pd.concat([store.results(name) for name in (section, section + SPLIT)], ignore_index=True)
    tables = {"rag_differences.csv": (pd.concat([differences(rows, against) for against in AGAINST]),
                                      ["run", "base", "measure"]),
              "rag_skew.csv": (skew(rows), ["dataset", "order", "id_share"])}
    written = []
    for name, (table, keys) in tables.items():
        if not len(table):
            continue
        path = _file(name)
        if path.is_file():
            before = pd.read_csv(path)
            # a curve is one thing: its points are replaced together
            before = before[~before["dataset"].isin(table["dataset"])] if "order" in keys else before
            table = pd.concat([before, table]).drop_duplicates(keys, keep="last")
        table = table.sort_values([c for c in ("dataset", "order", "spec", "budget", "measure", "id_share")
                                   if c in table], kind="stable")
        with store._whole(path) as file:
            table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
        written.append(path)
    if not written:
        raise CellError(f"section {section!r}: no run of retrieval with what it found; nothing to publish")
    return written
