"""A prepared corpus on disk: passages, questions, and their vectors.

::

    <folder>/
        passages.jsonl        {"id", "title", "text"} per line; ids count from 0
        passages.npy          int64 [n + 1], where each line begins
        questions.jsonl       {"id", "question", "answers": [...], "gold": [passage ids] or null,
                               "group", "split": "train" | "test", "article"} per line
        meta.json             name, counts, sets of questions, source, fingerprint
        vectors.npy           float32 [n, D], memory-mapped        norms.npy   float32 [n], before normalisation
        question_vectors.npy  float32 [questions, D]               vectors.json   encoder, and how far encoding came

``gold`` is null where no passage is known to hold the answer; a search cannot find it then, which counts as a miss.
``split`` says what a reader may be trained on: articles, and the questions about them, are in one split only.
The first four files are written under a temporary name and renamed, so a folder that exists is whole; the vectors come
later (:mod:`ecstudy.rag.encode`) and may be incomplete, which ``vectors.json`` tells.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from .. import paths
from ..data.layout import DataError, NpyStream, read_meta

FORMAT = "passages-1"
SPLITS = ("train", "test")


class Passage(NamedTuple):
    """A passage: its id (a row of the vectors), the title of its article, its text."""

    id: int
    title: str
    text: str

    @property
    def joined(self) -> str:
        """Title and text, as they are encoded and read."""
        return f"{self.title}. {self.text}" if self.title else self.text


class Question(NamedTuple):
    """A question; ``id`` is its row in ``question_vectors.npy``, ``gold`` the passages that hold the answer."""

    id: int
    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...] | None
    group: str
    split: str
    article: str


def check_lists(questions: Sequence[str], passages: Sequence[Sequence[Passage]], scores) -> None:
    """ValueError unless a reader gets a list of passages, and a score for each, with every question."""
    if not len(questions) == len(passages) == len(scores):
        raise ValueError(f"{len(questions)} questions, {len(passages)} lists of passages, {len(scores)} of scores: "
                         "expected one each")
    if bad := [i for i, (p, s) in enumerate(zip(passages, scores)) if len(s) < len(p)]:
        raise ValueError(f"{len(scores[bad[0]])} scores for {len(passages[bad[0]])} passages: expected one each")


def digest_of(files: Iterable[Path]) -> str:
    """Tells the contents of some files from others, 64 digits."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def folder_of(name_or_folder: str | os.PathLike) -> Path:
    """A folder as it is, or ``data/rag/<name>``."""
    text = os.fspath(name_or_folder)
    is_name = isinstance(name_or_folder, str) and Path(text).name == text
    return paths.data() / "rag" / text if is_name and not (Path(text) / "meta.json").is_file() else \
        Path(text).expanduser()


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened without reading its passages. ``Corpus.open("wiki_183k")`` or a folder."""

    folder: Path
    meta: dict

    @classmethod
    def open(cls, name_or_folder) -> Corpus:
        """Raises DataError if there is no corpus of this form."""
        folder = folder_of(name_or_folder)
        return cls(folder, read_meta(folder, FORMAT, "corpus", "rag prep"))

    name = property(lambda self: self.meta["name"])
    sets = property(lambda self: self.meta["sets"])
    fingerprint = property(lambda self: self.meta["fingerprint"])

    def __len__(self) -> int:
        return self.meta["passages"]

    # -- text -------------------------------------------------------------------------------------------------------

    @cached_property
    def _lines(self) -> np.ndarray:
        return np.load(self.folder / "passages.npy", mmap_mode="r", allow_pickle=False)

    def passages(self, ids: Iterable[int]) -> list[Passage]:
        """The passages of some ids, in that order. Raises IndexError for an id that is none."""
        found = []
        with open(self.folder / "passages.jsonl", "rb") as file:
            for i in ids:
                if not 0 <= i < len(self):
                    raise IndexError(f"passage {i}: {self.name} has passages 0 to {len(self) - 1}")
                file.seek(int(self._lines[i]))
                found.append(_passage(file.readline()))
        return found

    def block(self, start: int, stop: int) -> Iterator[Passage]:
        """Passages [start, stop) in one sequential read."""
        with open(self.folder / "passages.jsonl", "rb") as file:
            file.seek(int(self._lines[start]))
            for _ in range(min(stop, len(self)) - start):
                yield _passage(file.readline())

    @cached_property
    def asked(self) -> list[Question]:
        """All questions; ``asked[i].id == i``."""
        with open(self.folder / "questions.jsonl", encoding="utf-8") as file:
            return [_question(line) for line in file]

    def questions(self, which: str | None = None, split: str | None = None) -> list[Question]:
        """The questions of a group or set (``corpus.sets``: names and the groups they join), None for all.

        Raises DataError if there is no such group or set, or no question of the split in it.
        """
        groups = {q.group for q in self.asked}
        if which is not None:
            if which not in self.sets and which not in groups:
                raise DataError(f"questions {which!r}: {self.name} has {', '.join(sorted({*self.sets, *groups}))}")
            groups = set(self.sets.get(which, [which]))
        if split is not None and split not in SPLITS:
            raise DataError(f"split {split!r}: expected {' or '.join(SPLITS)}")
        found = [q for q in self.asked if q.group in groups and (split is None or q.split == split)]
        if not found:
            raise DataError(f"{self.name} has no {split or ''} questions of {which or 'any group'}".replace("  ", " "))
        return found

    # -- vectors ----------------------------------------------------------------------------------------------------

    @cached_property
    def encoding(self) -> dict:
        """``vectors.json``: encoder, dim, normalised, fingerprint. Raises DataError while vectors are missing."""
        path = self.folder / "vectors.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found is None or found["done"] < len(self) or not found["questions_done"]:
            so_far = "no vectors" if found is None else f"{found['done']:,} of {len(self):,} vectors"
            raise DataError(f"{self.folder} has {so_far}; run `ecstudy rag encode {self.folder}`")
        if found["corpus"] != self.fingerprint:
            raise DataError(f"{self.folder}: the vectors are of another corpus ({found['corpus']}, this one is "
                            f"{self.fingerprint}); remove vectors.json and encode again")
        return found

    def _array(self, name: str) -> np.ndarray:
        self.encoding                                             # noqa: B018   raises while they are incomplete
        return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)

    @cached_property
    def vectors(self) -> np.ndarray:
        """float32 [n, D], a memory map."""
        return self._array("vectors.npy")

    @cached_property
    def norms(self) -> np.ndarray:
        """float32 [n]: length of each vector before normalisation."""
        return self._array("norms.npy")

    @cached_property
    def question_vectors(self) -> np.ndarray:
        """float32 [questions, D]; row ``q.id`` belongs to question ``q``."""
        return self._array("question_vectors.npy")


def _passage(line: bytes) -> Passage:
    found = json.loads(line)
    return Passage(found["id"], found["title"], found["text"])


def _question(line: str) -> Question:
    found = json.loads(line)
    gold = found["gold"]
    return Question(found["id"], found["question"], tuple(found["answers"]), None if gold is None else tuple(gold),
                    found["group"], found["split"], found["article"])


class CorpusWriter:
    """Writes one corpus; use as a context manager, then nothing half-written stays behind.

    Parameters
    ----------
    folder:
        The folder to create. It must not exist unless ``overwrite`` is set, which drops its vectors, too.
    name:
        Of the corpus; generated ones begin with ``synthetic_``.
    source:
        JSON-able provenance.
    distinct:
        Join passages of equal title and text. Turn it off for a corpus known to have none (16 bytes a passage).

    Raises
    ------
    DataError
        If the folder exists, a question has no text or names a passage that does not exist, or nothing was added.
    """

    def __init__(self, folder, *, name: str, source: dict | None = None, distinct: bool = True,
                 overwrite: bool = False):
        self.folder, self.name, self.source, self.distinct = Path(folder), name, source or {}, distinct
        if self.folder.exists() and not overwrite:
            raise DataError(f"{self.folder} exists; choose another folder or pass overwrite=True (--overwrite)")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "meta.json").is_file():
            raise DataError(f"{self.folder} exists and is not a prepared corpus; it is not overwritten")
        self.count, self.asked, self._end, self._ends = 0, 0, 0, [0]
        self.dropped = dict(empty_passages=0, duplicate_passages=0, empty_questions=0, questions_without_answers=0)
        self._known: dict[bytes, int] = {}
        self.groups: dict[str, dict[str, int]] = {}
        self._hash = [hashlib.sha256(), hashlib.sha256()]
        self._temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")

    def __enter__(self) -> CorpusWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        try:
            self._passages = open(self._temporary / "passages.jsonl", "wb")
            self._questions = open(self._temporary / "questions.jsonl", "wb")
            self._lines = NpyStream(self._temporary / "passages.npy", np.int64, None)
        except BaseException:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        return self

    def add(self, title: str, text: str) -> int | None:
        """Write a passage; its id. One that is there already keeps its id; an empty one is dropped: None."""
        title, text = " ".join(title.split()), " ".join(text.split())
        if not text:
            self.dropped["empty_passages"] += 1
            return None
        if self.distinct:
            key = hashlib.blake2b(f"{title}\n{text}".encode(), digest_size=16).digest()
            if key in self._known:
                self.dropped["duplicate_passages"] += 1
                return self._known[key]
            self._known[key] = self.count
        self._end += self._write(0, self._passages, dict(id=self.count, title=title, text=text))
        self._ends.append(self._end)
        self._note(1 << 16)
        self.count += 1
        return self.count - 1

    def ask(self, question: str, answers: Sequence[str], *, group: str, split: str, gold: Iterable[int] | None = None,
            article: str = "") -> int | None:
        """Write a question; its id. Without text or without an answer it cannot be scored and is dropped: None."""
        question = " ".join(question.split())
        answers = list(dict.fromkeys(a for a in (" ".join(a.split()) for a in answers) if a))
        if not question or not answers:
            self.dropped["empty_questions" if not question else "questions_without_answers"] += 1
            return None
        if split not in SPLITS:
            raise DataError(f"split {split!r} of question {question!r}: expected {' or '.join(SPLITS)}")
        gold = None if gold is None else sorted({int(i) for i in gold})
        if gold is not None and (not gold or gold[0] < 0 or gold[-1] >= self.count):
            raise DataError(f"gold passages {gold} of question {question!r}: expected ids below {self.count}, or None")
        self._write(1, self._questions, dict(id=self.asked, question=question, answers=answers, gold=gold, group=group,
                                             split=split, article=article))
        self.groups.setdefault(group, dict.fromkeys(SPLITS, 0))[split] += 1
        self.asked += 1
        return self.asked - 1

    def _write(self, which: int, file, record: dict) -> int:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        file.write(line)
        self._hash[which].update(line)
        return len(line)

    def _note(self, least: int = 1) -> None:
        if len(self._ends) >= least:
            self._lines.append(self._ends)
            self._ends.clear()

    def join(self, sets: dict[str, list[str]]) -> None:
        """Say which groups of questions are asked together, by name (default: each group by itself)."""
        self._sets = {name: list(groups) for name, groups in sets.items()}

    def __exit__(self, kind, error, trace):
        try:
            self._note()
            self._lines.close()
            self._passages.close()
            self._questions.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        from .. import __version__

        if not self.count:
            raise DataError(f"no passages for {self.folder}: the files hold none with text")
        sets = getattr(self, "_sets", {group: [group] for group in self.groups})
        for name, groups in sets.items():
            if missing := [g for g in groups if g not in self.groups]:
                raise DataError(f"set {name!r} names the group {missing[0]!r}, which has no question")
        whole = "".join(h.hexdigest() for h in self._hash)
        meta = dict(format=FORMAT, name=self.name, passages=self.count, questions=self.groups, sets=sets,
                    dropped=self.dropped, source=self.source, version=__version__,
                    fingerprint=hashlib.sha256(whole.encode()).hexdigest()[:16])
        (self._temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n",
                                                   encoding="utf-8")
        if self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
            self.folder.rename(old)
            self._temporary.rename(self.folder)
            shutil.rmtree(old)
        else:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.rename(self.folder)
