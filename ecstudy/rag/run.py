"""Retrieval as cells of the study: compress the vectors of a corpus, search, read, score, weigh, time -> one row.

A row has task ``rag``; its dataset is ``<corpus>/<questions>``, its model the reader. ``seconds`` is the time of
compression, ``decode_ms`` that of decoding 1,024 rows (``latency_full_ms``: of looking them up in the float32 matrix,
timed in turn), ``search_ms`` that of a query when all are searched together. Rows are stored and resumed as all others
(:mod:`ecstudy.study`); what was found for each question stays in ``runs/rag`` (:func:`found`), so that comparisons
over questions can be made later.
"""
from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Callable, NamedTuple, Sequence

import numpy as np
import pandas as pd
import torch

from .. import paths
from ..api import compress
from ..budget import Unreachable, budget_bytes, build, full_bytes
from ..data.layout import DataError
from ..measure.latency import measure_latency
from ..measure.peak import peak
from ..memory import breakdown, memory
from ..registry import get
from ..spec import parse
from ..study import store
from ..study.row import CellError, check_budget, check_device, complete, hash_of, known
from ..study.sweep import _sized_by_budget, attempt, fill, there
from .corpus import Corpus, folder_of
from .generated import PRESETS, TemplateReader, open_generated
from .popularity import popularity
from .score import KS, exact, f1, gold_rank, has_answer, recall, rule
from .search import HOW, search, way

DECODED = 1_024                          # rows of a batch that is timed (Table 6)
BATCHES = 50
READERS = ("none", "template")
WEIGHTS = ("norms", "own", "retrieved")
THIN = 0.3                               # share of questions with a passage to read, below which a sample is read
Z = 1.959964                             # of a 95 % interval
SPLIT = "_split"                         # ends the section of runs that differ from others by their weights alone


def open_corpus(name_or_folder) -> Corpus:
    """A corpus by name or folder; one of ``generated.PRESETS`` is generated, and encoded by MiniLM, on first use."""
    if str(name_or_folder) not in PRESETS:
        return Corpus.open(name_or_folder)
    from .encode import encode

    corpus = open_generated(str(name_or_folder))
    try:
        corpus.encoding
    except DataError:
        encode(corpus)
    return Corpus.open(corpus.folder)


def open_reader(reader, device: str = "cpu"):
    """A reader by name (``none``, ``template``), by the folder of a trained one, or the callable itself; None for none.

    Raises
    ------
    CellError
        If it is neither.
    """
    if reader is None or callable(reader):
        return reader
    if reader == "none":
        return None
    if reader == "template":
        return TemplateReader()
    from pathlib import Path

    if not Path(reader).expanduser().is_dir():
        raise CellError(f"reader {reader!r}: expected {', '.join(READERS)}, the folder of a trained reader, or a "
                        "callable")
    return _local_reader(str(Path(reader).expanduser()), device)


@functools.lru_cache(maxsize=1)
def _local_reader(folder: str, device: str):
    from .generator import GeneratorReader, generates
    from .reader import SpanReader

    return (GeneratorReader if generates(folder) else SpanReader).open(folder, device=device)


@dataclass(frozen=True)
class RagCell:
    """The full specification of one run.

    Parameters
    ----------
    method:
        A spec text of a method that takes trained vectors, for example ``"pq"`` or ``"full"``.
    corpus:
        A name or folder of a prepared and encoded corpus.
    questions:
        A group or set of its questions, None for all; those for testing are asked.
    budget:
        A float in (0, 1] is a fraction of the float32 vectors, an int is bytes, None leaves the method's own size.
    seed:
        Of what a method draws.
    k:
        Passages given to the reader.
    reader:
        ``none``, ``template``, the folder of a trained reader, or a callable (see :mod:`ecstudy.rag`).
    how:
        The way of searching (``search.HOW``), None for the method's own.
    judge:
        ``gold``: recall counts passages known to hold the answer; ``answer``: passages in which an answer stands as a
        run of words (DPR), for corpora of which nobody knows gold passages.
    limit:
        Ask only so many of the questions, drawn by a fixed seed.
    sample:
        Read only so many of them, drawn alike, where the answer was found for less than three tenths (recall@``k``):
        a poor cell finds passages that no other finds, so that it takes longest to read and says least. EM and F1 are
        then of that sample, recall of all.
    weights:
        What methods that group rows go by: ``norms`` of the vectors before normalisation, ``own`` those of what is
        stored, ``retrieved`` one more than how often the questions for training find a passage.
    section, device:
        A label, and where vectors are decoded and scored.
    """

    method: str
    corpus: str
    questions: str | None = None
    budget: float | int | None = None
    seed: int = 0
    k: int = 10
    reader: str | Callable | None = field(default="none", hash=False)
    how: str | None = None
    judge: str = "gold"
    limit: int | None = None
    sample: int | None = None
    weights: str = "norms"
    section: str = "rag"
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "corpus", str(self.corpus))
        object.__setattr__(self, "budget", check_budget(self.budget))
        for name, least in (("seed", 0), ("k", 1), ("limit", 1), ("sample", 1)):
            value = getattr(self, name)
            if name in ("limit", "sample") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise CellError(f"{name} {value!r}: expected an integer of at least {least}")
        known("judge", self.judge, ("gold", "answer"))
        known("weights", self.weights, WEIGHTS)
        if self.how is not None:
            known("way of searching", self.how, HOW)

    # what study.sweep asks of a cell

    @cached_property
    def spec(self):
        return parse(self.method)

    @cached_property
    def opened(self) -> Corpus:
        return open_corpus(self.corpus)

    @cached_property
    def read(self):
        return open_reader(self.reader, self.device)

    @property
    def model(self) -> str:
        """The reader, as a row names it."""
        if self.reader is None or self.reader in READERS:
            return self.reader or "none"
        return getattr(self.read, "__name__", type(self.read).__name__.removesuffix("Reader").lower())

    @property
    def dataset(self) -> str:
        return f"{self.opened.name}/{self.questions or 'all'}"

    @cached_property
    def fingerprint(self) -> str:
        """Of passages, questions and vectors."""
        return hash_of(dict(corpus=self.opened.fingerprint, vectors=self.opened.encoding["fingerprint"]))

    @cached_property
    def run_id(self) -> str:
        return hash_of(self.settings | dict(data=self.fingerprint))

    @cached_property
    def settings(self) -> dict:
        """What decides the row."""
        reader = None if self.read is None else getattr(self.read, "fingerprint", type(self.read).__name__)
        return dict(task="rag", method=self.spec.canonical, budget=self.budget, seed=self.seed, k=self.k,
                    questions=self.questions, reader=reader, how=self.how, judge=self.judge, limit=self.limit,
                    weights=self.weights) | ({} if self.sample is None else dict(sample=self.sample))

    @cached_property
    def asked(self) -> list:
        """The questions, in the order of the corpus."""
        found = self.opened.questions(self.questions, "test")
        return [found[i] for i in _drawn(len(found), self.limit)]

    def check(self) -> None:
        """Look up method, corpus, vectors, questions, reader and device; one clear ValueError before any work."""
        check_device(self.device)
        corpus = self.opened
        dim = corpus.encoding["dim"]
        build(self.spec, len(corpus), dim, device="meta")
        if get(self.spec.name).trains and self.spec.name not in _fits():
            raise CellError(f"method {self.method!r} must be trained; retrieval compresses vectors that are there: "
                            f"{', '.join(_fits())}")
        if self.k > len(corpus):
            raise CellError(f"k {self.k}: {corpus.name} has {len(corpus)} passages")
        self.asked, self.read                                   # noqa: B018

    def measure(self, progress=None) -> dict:
        return run_cell(self, progress)

    def row(self, measured: dict) -> dict:
        """The complete row: what was asked, what was measured, where it comes from."""
        budget = self.budget
        if budget is None and measured.get("bytes_full") and measured.get("bytes_inference"):
            budget = float(f"{measured['bytes_inference'] / measured['bytes_full']:.6g}")
        more = measured.pop("more", {})
        return complete(
            dict(run_id=self.run_id, section=self.section, task="rag", method=self.spec.name, budget=budget,
                 spec=self.spec.canonical, dataset=self.dataset, model=self.model, seed=self.seed,
                 dim=self.opened.encoding["dim"], device=self.device, data_fingerprint=self.fingerprint,
                 settings=self.settings | dict(corpus=self.opened.name) | more) | measured)


def _drawn(n: int, count: int | None) -> np.ndarray:
    """``count`` of ``n`` places, in order; all of them for None."""
    return np.arange(n) if count is None else np.sort(np.random.default_rng(0).permutation(n)[:count])


@functools.lru_cache(maxsize=1)
def _fits() -> list[str]:
    """Methods that take trained vectors."""
    from ..method import Method
    from ..registry import names

    return [name for name in names() if get(name).fit is not Method.fit]


class _Made(NamedTuple):
    emb: torch.nn.Module
    seconds: float
    peak_bytes: int


_last: dict[str, _Made] = {}             # the module of the cell before: question sets of one corpus share it


def _made(cell: RagCell) -> _Made:
    key = hash_of({k: cell.settings[k] for k in ("method", "budget", "seed", "weights")}
                  | dict(data=cell.fingerprint, device=cell.device))
    if key not in _last:
        _last.clear()
        corpus = cell.opened
        weights = None
        if hasattr(get(cell.spec.name), "weights"):              # others take none
            weights = corpus.norms if cell.weights == "norms" else \
                1.0 + popularity(corpus) if cell.weights == "retrieved" else None
        with peak(cell.device) as most:
            start = time.perf_counter()
            emb = compress(corpus.vectors, cell.spec, cell.budget, seed=cell.seed, weights=weights, device=cell.device)
            seconds = time.perf_counter() - start
        _last[key] = _Made(emb.eval(), seconds, most.bytes)
    return _last[key]


def run_cell(cell: RagCell, progress=None) -> dict:
    """The measured columns of a row. ``progress`` as in :func:`ecstudy.study.sweep.run` (stages without an AUC)."""
    corpus, asked = cell.opened, cell.asked
    n, dim = len(corpus), corpus.encoding["dim"]
    full = full_bytes(n, dim)
    row = dict(family=get(cell.spec.name).family, bytes_full=full)
    if cell.budget is not None:
        row["budget_bytes"] = budget_bytes(cell.budget, n, dim)
    try:
        made = _made(cell)
    except Unreachable as error:
        return row | dict(status="unreachable", reason=error.reason, bytes_inference=error.closest,
                          reached=error.closest / full)
    emb, size = made.emb, memory(made.emb)
    if "budget_bytes" in row and size > row["budget_bytes"]:
        raise RuntimeError(f"{cell.spec} deployed {size} bytes, over the budget of {row['budget_bytes']}")
    vectors = np.asarray(corpus.question_vectors)[[q.id for q in asked]]
    start = time.perf_counter()
    hits = search(emb, vectors, min(max(*KS, cell.k), n), how=cell.how, device=cell.device)
    search_seconds = time.perf_counter() - start
    rank = _rank(cell, hits)
    row |= {f"recall_{k}": recall(rank, k) for k in KS if k <= n}
    start = time.perf_counter()
    answers, right, overlap = _read(cell, hits, rank)
    if answers is not None:
        row |= dict(em=float(np.nanmean(right)), f1=float(np.nanmean(overlap)))
    read_seconds = time.perf_counter() - start
    _keep(cell.run_id, question=np.array([q.id for q in asked]), ids=hits.ids, scores=hits.scores, rank=rank,
          **({} if answers is None else dict(em=right, f1=overlap, answers=answers)))
    return row | dict(
        status="ok", reason="", reached=size / full, bytes_inference=size, bytes_breakdown=breakdown(emb),
        peak_bytes=made.peak_bytes, seconds=made.seconds, search_ms=1000 * search_seconds / len(asked),
        **_latency(cell, emb), more=dict(asked=len(asked), searched=cell.how or way(emb),
                                         read_seconds=round(read_seconds, 3), passages=n,
                                         read=0 if right is None else int(np.isfinite(right).sum())))


def _rank(cell: RagCell, hits) -> np.ndarray:
    """Rank of the first passage that holds the answer, int64 [Q], from 1; 0 where none was found."""
    if cell.judge == "gold":
        return gold_rank(hits.ids, [q.gold for q in cell.asked])
    rank = np.zeros(len(cell.asked), np.int64)
    for i, (question, ids) in enumerate(zip(cell.asked, hits.ids)):
        for place, passage in enumerate(cell.opened.passages(ids), 1):
            if has_answer(passage.text, question.answers):
                rank[i] = place
                break
    return rank


def _read(cell: RagCell, hits, rank):
    """Answers, whether each is right, and its F1 (None and NaN for questions not read); three Nones without a reader.
    """
    if cell.read is None:
        return None, None, None
    thin = recall(rank, cell.k) < THIN
    chosen = _drawn(len(cell.asked), cell.sample if thin else None)
    asked = [cell.asked[i] for i in chosen]
    passages = [cell.opened.passages(ids[:cell.k]) for ids in hits.ids[chosen]]
    found = list(cell.read([q.question for q in asked], passages, hits.scores[chosen, :cell.k]))
    if len(found) != len(asked):
        raise RuntimeError(f"reader {cell.model} gave {len(found)} answers to {len(asked)} questions")
    answers, right, overlap = [None] * len(cell.asked), *np.full((2, len(cell.asked)), np.nan, np.float32)
    for place, question, answer in zip(chosen, asked, found):
        how = rule(question.group)
        answers[place] = answer
        right[place], overlap[place] = (score(answer, question.answers, how) for score in (exact, f1))
    return answers, right, overlap


def _latency(cell: RagCell, emb) -> dict:
    """Milliseconds of decoding DECODED rows, and of looking them up in the float32 matrix, in turn."""
    n = len(cell.opened)
    matrix = torch.from_numpy(np.load(cell.opened.folder / "vectors.npy", mmap_mode="c", allow_pickle=False))
    if cell.device != "cpu":
        matrix = matrix.to(cell.device)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(n, (DECODED,), generator=generator).to(cell.device) for _ in range(BATCHES)]
    found = measure_latency({"full": lambda ids: torch.nn.functional.embedding(ids, matrix), "emb": emb},
                            batches=batches, device=cell.device, limit=1.0)
    return dict(decode_ms=found["emb"].median, latency_p10_ms=found["emb"].p10, latency_p90_ms=found["emb"].p90,
                latency_full_ms=found["full"].median)


# -- what was found, question by question ----------------------------------------------------------------------------

def _keep(run_id: str, answers: Sequence[str] | None = None, **arrays) -> None:
    path = paths.runs() / "rag" / f"{run_id}.npz"
    arrays["ids"] = arrays["ids"].astype(np.int32 if arrays["ids"].max(initial=0) < 2 ** 31 else np.int64)
    if answers is not None:
        arrays["answers"] = np.frombuffer(json.dumps(list(answers)).encode(), np.uint8)
    with store._whole(path, binary=True) as file:
        np.savez(file, **arrays)


def found(run_id: str) -> dict | None:
    """What a run found, or None if that was not kept: ``question`` ids [Q], ``ids`` and ``scores`` [Q, k], ``rank`` of
    the first gold passage [Q] (0: none), and with a reader ``em`` and ``f1`` [Q] and ``answers``, a list of texts; NaN
    and None for questions that were not read."""
    try:
        with np.load(paths.runs() / "rag" / f"{run_id}.npz", allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
    except (FileNotFoundError, ValueError, EOFError, OSError):
        return None
    if "answers" in kept:
        kept["answers"] = json.loads(kept["answers"].tobytes().decode())
    return kept


def retrieved(run_id: str, passages: int, k: int = 10) -> np.ndarray:
    """How often each passage was among the first ``k``, int64 [passages]. Raises CellError if nothing was kept."""
    if (kept := found(run_id)) is None:
        raise CellError(f"run {run_id}: what it found was not kept here; run it again with force=True")
    return np.bincount(kept["ids"][:, :k].ravel(), minlength=passages)


def contrast(run_id: str, base: str, measure: str = "em") -> dict:
    """Difference of two runs on the same questions: ``difference``, its 95 % interval ``low`` to ``high``, ``count``,
    and the means over those questions, ``value`` and ``base_value``.

    Parameters
    ----------
    measure:
        ``em``, ``f1``, or ``recall_<k>``.

    The interval is paired and normal over the questions that both read, whose outcomes are taken as independent.

    Raises
    ------
    CellError
        If one of them was not kept, has no such measure, or they asked different questions.
    """
    values = []
    for one in (run_id, base):
        if (kept := found(one)) is None:
            raise CellError(f"run {one}: what it found was not kept here; run it again with force=True")
        if measure.startswith("recall_"):
            kept[measure] = (kept["rank"] >= 1) & (kept["rank"] <= int(measure[7:]))
        if measure not in kept or measure in ("question", "ids", "scores", "rank", "answers"):
            raise CellError(f"run {one} has no {measure!r}: expected em, f1 (with a reader) or recall_10")
        values.append((kept["question"], kept[measure].astype(np.float64)))
    if not np.array_equal(values[0][0], values[1][0]):
        raise CellError(f"runs {run_id} and {base} asked different questions: nothing to compare in pairs")
    both = np.isfinite(values[0][1]) & np.isfinite(values[1][1])
    own, other = values[0][1][both], values[1][1][both]
    difference = own - other
    half = Z * difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else float("nan")
    mean = difference.mean()
    return dict(difference=float(mean), low=float(mean - half), high=float(mean + half), count=len(difference),
                value=float(own.mean()), base_value=float(other.mean()))


def setting(rows: pd.DataFrame, name: str) -> pd.Series:
    """A setting of each row that has no column of its own."""
    return rows["settings"].map(lambda text: json.loads(text or "{}").get(name))


# -- running ---------------------------------------------------------------------------------------------------------

def evaluate(corpus, method: str, budget: float | int | None = None, *, force: bool = False, progress=None,
             **settings) -> dict:
    """Compress, search, read and score one cell; its row. A row that is there already is returned as it is.

    Parameters
    ----------
    corpus, method, budget, settings:
        Fields of :class:`RagCell`. Without a reader, generated corpora get the template reader.
    force:
        Measure again and replace the row.

    Raises
    ------
    CellError, SpecError, DataError
        Before any work, for a value that cannot be used.
    RunFailed
        If the run itself failed; the store then holds a row with status ``failed``.
    """
    cell = RagCell(method, corpus, budget=budget, **_reader(corpus, settings))
    if not force and (row := store.rows().get(cell.run_id)) and row["status"] != "failed":
        return store.add_section(row, cell.section)
    cell.check()
    row = attempt(cell, force=force, raising=True, progress=progress)
    if not isinstance(row, dict):
        raise CellError(f"{method} on {cell.dataset} is being run by {store.holder(cell.run_id)}; wait for it")
    return row


def sweep(corpus, methods, budgets=(None,), *, questions=(None,), seeds=(0,), missing: str = "run",
          progress: bool | None = None, force: bool = False, fail_fast: bool = False, **settings) -> pd.DataFrame:
    """Run the missing cells of a grid, one row per cell. A method of fixed size runs once, not once per budget.

    Parameters
    ----------
    methods, budgets, questions, seeds:
        A value or a list of values each. Question sets of one module follow one another, and share its compression.
    missing:
        ``"run"``, or ``"skip"`` to return only rows that are there; the corpus itself is then not needed.
    settings:
        Further fields of :class:`RagCell`.
    """
    methods, budgets, questions, seeds = (list(v) if isinstance(v, (list, tuple)) else [v]
                                          for v in (methods, budgets, questions, seeds))
    known("missing", missing, ("run", "skip"))
    if missing == "skip" and not (folder_of(corpus) / "vectors.json").is_file():
        specs, name = [parse(m) for m in methods], folder_of(corpus).name
        rows = store.results(task="rag", spec=[s.canonical for s in specs], seed=seeds,
                             dataset=[f"{name}/{asked or 'all'}" for asked in questions])
        fixed = rows["spec"].isin([s.canonical for s in specs if not _sized_by_budget(s)])
        asked = {name: settings.get(name, default) for name, default in
                 dict(weights="norms", limit=None, sample=None).items()}
        alike = np.logical_and.reduce([setting(rows, name).fillna(0).eq(value or 0) for name, value in asked.items()])
        reader = _reader(corpus, settings)["reader"]
        read = rows["model"].eq(reader) if reader in READERS else ~rows["model"].isin(READERS)
        return rows[(fixed | rows["budget"].isin(budgets)) & alike & read].reset_index(drop=True)
    settings = _reader(corpus, settings)
    cells = {}
    for seed in seeds:
        for method in methods:
            for budget in budgets:
                for asked in questions:
                    cell = RagCell(method, corpus, asked, budget, seed, **settings)
                    if not _sized_by_budget(cell.spec):
                        cell = RagCell(method, corpus, asked, None, seed, **settings)
                    cells.setdefault(cell.run_id, cell)
    if missing == "skip":
        return there(cells.values())
    return fill(cells.values(), progress=progress, force=force, fail_fast=fail_fast)


def study(dataset, methods, budgets, *, section: str = "rag", small=None, small_methods: Sequence[str] | None = None,
          small_reader=None, split: Sequence[str] = (), **settings) -> dict[str, pd.DataFrame]:
    """The grids of one notebook, as :func:`sweep` fills them, by name:

    ``rows``, the corpus; ``small``, the same, or ``small_methods`` alone, on a part of it (a corpus by name or folder),
    with ``small_reader`` if that is given (``"none"``: recall alone);
    ``split``, the methods of ``split`` once more with their rows grouped by how often they are retrieved, in the
    section ``<section>_split``. ``settings`` go to :func:`sweep`. Grids that are not asked for have no rows.
    """
    rows = sweep(dataset, methods, budgets, section=section, **settings)
    part = settings | ({} if small_reader is None else dict(reader=small_reader))
    return dict(
        rows=rows,
        small=rows[:0] if small is None else sweep(small, small_methods or methods, budgets, section=section, **part),
        split=rows[:0] if not split else sweep(dataset, split, budgets, section=section + SPLIT, weights="retrieved",
                                               **settings))


def _reader(corpus, settings: dict) -> dict:
    if "reader" in settings:
        return settings
    return settings | dict(reader="template" if str(corpus) in PRESETS else "none")
