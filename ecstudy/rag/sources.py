"""Raw passages and questions to a corpus folder: which files are read, and how questions are split.

Files may be plain, gzip or xz. Passages: OTT-QA's JSON ``{link: text}``, JSON lines with ``title`` and ``text``, DPR's
``psgs_w100.tsv`` (id, text, title). Questions with the passage that answers them: SQuAD JSON (1.1 and 2.0), JSON lines
with ``ctxs`` of which one ``isgold`` (NQ-open with gold passages). Questions alone: JSON lines ``question, answer``
(NQ-open), or two columns, the second a list of answers (DPR's question files).
"""
from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import re
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import unquote

import numpy as np

from ..data.layout import DataError
from ..data.prepare_read import Progress
from .corpus import Corpus, CorpusWriter, folder_of

TEST = {"squad": 0.3, "nq": 0.5}         # of the questions: 14 SQuAD articles, half of the NQ articles


class Asked(NamedTuple):
    """A question as a file has it: the title and text of its gold passage, or two Nones."""

    question: str
    answers: list[str]
    title: str | None
    text: str | None


def prepare(out, *, passages: Sequence = (), squad: Sequence = (), gold: Sequence = (), questions: Sequence = (),
            train: Sequence = (), name: str | None = None, keep: int | None = None, test_squad: float = TEST["squad"],
            test_gold: float = TEST["nq"], seed: int = 0, distinct: bool = True, overwrite: bool = False,
            progress=None) -> Corpus:
    """Prepare a corpus from raw files.

    Every question of ``squad`` and ``gold`` belongs to an article, and an article with all its questions to one split;
    which one follows from a hash of seed and title, so it does not depend on the other articles' text. A question in
    ``questions`` that is in ``gold``, too, is not asked twice; the others have no known passage and are tested only. A
    question in ``train`` that is asked elsewhere is left out.

    Groups of questions: ``squad``, ``nq`` (``gold``), ``nq_rest`` (``questions`` without gold), ``nq_train``. Sets:
    each group by itself, and ``nq_open``, all test questions of ``nq`` and ``nq_rest``.

    Parameters
    ----------
    out:
        The folder to create, or a name for ``data/rag/<name>``.
    passages:
        Files of background passages.
    squad, gold:
        Files of questions with their passages, which join the corpus.
    questions, train:
        Files of questions alone: to be tested, and for the training of readers.
    keep:
        Keep so many background passages, drawn by ``seed`` (default: all). Gold passages always stay.
    test_squad, test_gold:
        Share of questions whose articles are for testing.
    distinct:
        Join passages of equal title and text; turn it off for files that have none, where memory counts.

    Raises
    ------
    DataError
        For a file of another form (with its line), or an option out of range; nothing stays behind.
    """
    for option, share in (("test_squad", test_squad), ("test_gold", test_gold)):
        if not 0 <= share <= 1:
            raise DataError(f"{option} {share}: expected a share between 0 and 1")
    if keep is not None and keep < 0:
        raise DataError(f"keep {keep}: expected a number of passages, at least 0")
    if not (passages or squad or gold):
        raise DataError("nothing to prepare: pass files of passages, squad or gold")
    files = dict(passages=passages, squad=squad, gold=gold, questions=questions, train=train)
    for path in itertools.chain(*files.values()):
        _check(path)
    folder = folder_of(out)
    settings = dict(keep=keep, test_squad=test_squad, test_gold=test_gold, seed=seed, distinct=distinct)
    source = dict(kind="files", **{kind: [_fingerprint(p) for p in paths] for kind, paths in files.items()}, **settings)
    bar = Progress(progress)
    try:
        with CorpusWriter(folder, name=name or folder.name, source=source, distinct=distinct,
                          overwrite=overwrite) as writer:
            background = itertools.chain.from_iterable(read_passages(p, bar) for p in passages)
            if keep is not None:
                background = draw(background, keep, seed)
            for title, text in background:
                writer.add(title, text)
            seen: set[str] = set()
            split_of: dict[str, str] = {}
            for group, paths, read, share in (("squad", squad, read_squad, test_squad),
                                              ("nq", gold, read_gold, test_gold)):
                found = [asked for path in paths for asked in read(path)]
                _with_gold(writer, group, found, share, seed, split_of)
                seen |= {_same(a.question) for a in found}
            for group, paths, split in (("nq_rest", questions, "test"), ("nq_train", train, "train")):
                for asked in (a for path in paths for a in read_questions(path)):
                    if (key := _same(asked.question)) not in seen:
                        seen.add(key)
                        writer.ask(asked.question, asked.answers, group=group, split=split)
            if {"nq", "nq_rest"} <= set(writer.groups):
                writer.join({group: [group] for group in writer.groups} | {"nq_open": ["nq", "nq_rest"]})
    finally:
        bar.close()
    return Corpus.open(folder)


def subset(corpus: Corpus, out, keep: int, *, name: str | None = None, seed: int = 0,
           overwrite: bool = False) -> Corpus:
    """A smaller corpus: all gold passages and questions, and ``keep`` of the other passages, drawn by ``seed``.

    Vectors come along if the corpus has them, so the effect of its size can be seen without encoding again.

    Raises
    ------
    DataError
        If the folder exists, or ``keep`` is out of range.
    """
    from .encode import inherit

    chosen = np.zeros(len(corpus), bool)
    chosen[[i for q in corpus.asked for i in q.gold or ()]] = True
    others = np.flatnonzero(~chosen)
    if isinstance(keep, bool) or not 0 <= keep <= len(others):
        raise DataError(f"keep {keep}: expected 0 to {len(others)}, the passages of {corpus.name} that are not gold")
    chosen[np.random.default_rng(seed).permutation(others)[:keep]] = True
    rows = np.flatnonzero(chosen)
    place = np.cumsum(chosen) - 1
    folder = folder_of(out)
    source = dict(kind="subset", of=corpus.name, fingerprint=corpus.fingerprint, keep=keep, seed=seed)
    with CorpusWriter(folder, name=name or folder.name, source=source, distinct=False, overwrite=overwrite) as writer:
        for passage in corpus.block(0, len(corpus)):
            if chosen[passage.id]:
                writer.add(passage.title, passage.text)
        for q in corpus.asked:
            writer.ask(q.question, q.answers, group=q.group, split=q.split, article=q.article,
                       gold=None if q.gold is None else place[list(q.gold)].tolist())
        writer.join(corpus.sets)
    made = Corpus.open(folder)
    inherit(corpus, made, rows)
    return Corpus.open(folder)


def _with_gold(writer: CorpusWriter, group: str, asked: list[Asked], share: float, seed: int,
               split_of: dict[str, str]) -> None:
    test = by_article([a.title for a in asked], share, seed)
    place: dict[tuple[str, str], int | None] = {}
    for a in asked:
        split = split_of.setdefault(a.title, "test" if a.title in test else "train")      # one split in all groups
        key = a.title, a.text
        if key not in place:
            place[key] = writer.add(*key)
        writer.ask(a.question, a.answers, group=group, split=split, gold=None if place[key] is None else [place[key]],
                   article=a.title)


def by_article(articles: Iterable[str], share: float, seed: int = 0) -> set[str]:
    """Articles for testing: in the order of a hash of seed and title until they hold ``share`` of the questions."""
    counts: dict[str, int] = {}
    for article in articles:
        counts[article] = counts.get(article, 0) + 1
    wanted, test = share * sum(counts.values()), set()
    for article in sorted(counts, key=lambda a: hashlib.sha256(f"{seed}/{a}".encode()).digest()):
        if wanted < counts[article] / 2:                     # nearer without it
            break
        test.add(article)
        wanted -= counts[article]
    return test


def draw(items: Iterable, keep: int, seed: int) -> Iterator:
    """``keep`` of the items, uniformly by ``seed``, in their order (two passes over a list in memory)."""
    items = list(items)
    if keep >= len(items):
        return iter(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:keep]
    return (items[i] for i in np.sort(chosen))


def _same(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?").rstrip()


# -- files -----------------------------------------------------------------------------------------------------------

def _check(path) -> None:
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path} does not exist or is a folder; pass the path of a file")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")


def _fingerprint(path) -> dict:
    with open(Path(path).expanduser(), "rb") as file:
        return dict(file=Path(path).name, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _told(file, tell) -> Iterator[str]:
    """The lines of a file; ``tell`` is called now and then."""
    for number, line in enumerate(file):
        if number % 10_000 == 0:
            tell()
        yield line


@contextlib.contextmanager
def opened(path, progress=None):
    """A text file, plain, gzip or xz (told by its first bytes); damage becomes one DataError.

    With ``progress(name, share read)`` only its lines can be read.
    """
    path = Path(path).expanduser()
    size = path.stat().st_size
    try:
        with open(path, "rb") as raw:
            head = raw.read(6)
            raw.seek(0)
            kind = gzip.open if head[:2] == b"\x1f\x8b" else lzma.open if head == b"\xfd7zXZ\x00" else None
            form = dict(encoding="utf-8", newline="")
            with kind(raw, "rt", **form) if kind else io.TextIOWrapper(raw, **form) as file:
                yield _told(file, lambda: progress(path.name, raw.tell() / size)) if progress else file
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged, incomplete or not UTF-8 ({error}); fetch it again") from None


def _records(path, progress=None) -> Iterator[tuple[int, dict]]:
    """Line numbers and objects of a file of JSON lines."""
    with opened(path, progress) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: {type(record).__name__}, expected an object")
            yield number, record


def _whole(path):
    with opened(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON ({error})") from None


def _get(record: dict, keys: Sequence[str], kind, where: str):
    """The value of the first key that is there, of the right kind."""
    for key in keys:
        if key in record:
            if not isinstance(record[key], kind):
                raise DataError(f"{where}: {key} is {record[key]!r:.60}, expected {kind.__name__}")
            return record[key]
    raise DataError(f"{where}: no {' or '.join(keys)}, it has {', '.join(record) or 'nothing'}")


def read_passages(path, progress=None) -> Iterator[tuple[str, str]]:
    """Title and text of each passage of a file, told apart by its name: ``.tsv``, ``.jsonl`` or ``.json``.

    ``progress(name, share read)`` is called now and then while lines are read; OTT-QA's one object is read at once.
    """
    name = Path(path).name.lower()
    for ending in (".gz", ".xz"):
        name = name.removesuffix(ending)
    if name.endswith(".tsv"):
        yield from _tsv(path, progress)
    elif name.endswith(".jsonl"):
        for number, record in _records(path, progress):
            where = f"{path}, line {number}"
            yield str(record.get("title") or ""), _get(record, ("text", "contents", "passage"), str, where)
    elif name.endswith(".json"):
        found = _whole(path)
        if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
            raise DataError(f"{path}: expected one object of links and texts, as OTT-QA's")
        for link, text in found.items():
            yield unquote(link.removeprefix("/wiki/")).replace("_", " "), text
    else:
        raise DataError(f"{path}: a file of passages ends in .tsv, .jsonl or .json (and .gz or .xz)")


def _tsv(path, progress=None) -> Iterator[tuple[str, str]]:
    with opened(path, progress) as file:
        rows = csv.reader(file, delimiter="\t")
        head = next(rows)
        if not {"text", "title"} <= set(head):
            raise DataError(f"{path}: columns {head[:5]}, expected id, text and title (DPR's psgs_w100.tsv)")
        text, title = head.index("text"), head.index("title")
        for row in rows:
            if len(row) != len(head):
                raise DataError(f"{path}, line {rows.line_num}: {len(row)} columns, expected {len(head)}")
            yield row[title], row[text]


def read_squad(path) -> Iterator[Asked]:
    """SQuAD 1.1 or 2.0; questions without an answer come with an empty list."""
    found = _whole(path)
    articles = found.get("data") if isinstance(found, dict) else found
    if not isinstance(articles, list):
        raise DataError(f"{path}: expected SQuAD's list of articles, or an object with 'data'")
    for i, article in enumerate(articles):
        where = f"{path}, article {i}"
        title = _get(article, ("title",), str, where).replace("_", " ")
        for paragraph in _get(article, ("paragraphs",), list, where):
            text = _get(paragraph, ("context",), str, where)
            for asked in _get(paragraph, ("qas",), list, where):
                answers = [a if isinstance(a, str) else _get(a, ("text",), str, where)
                           for a in _get(asked, ("answers",), list, where)]
                yield Asked(_get(asked, ("question",), str, where), answers, title, text)


def read_gold(path) -> Iterator[Asked]:
    """Questions with passages (``ctxs``) of which one is gold, as NQ-open's with annotated passages."""
    for number, record in _records(path):
        where = f"{path}, line {number}"
        gold = [c for c in _get(record, ("ctxs",), list, where) if c.get("isgold")]
        if not gold:
            raise DataError(f"{where}: none of its passages is marked isgold")
        yield Asked(_get(record, ("question",), str, where), _get(record, ("answers", "answer"), list, where),
                    _get(gold[0], ("title",), str, where), _get(gold[0], ("text",), str, where))


def read_questions(path) -> Iterator[Asked]:
    """Questions with answers and no passages: JSON lines, or two tab-separated columns (DPR)."""
    name = Path(path).name.lower().removesuffix(".gz").removesuffix(".xz")
    if name.endswith(".jsonl"):
        for number, record in _records(path):
            where = f"{path}, line {number}"
            yield Asked(_get(record, ("question",), str, where), _get(record, ("answer", "answers"), list, where),
                        None, None)
        return
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            question, tab, answers = line.rstrip("\r\n").partition("\t")
            if answers.startswith('"'):                    # a list that holds quotes is itself quoted
                answers = next(csv.reader(io.StringIO(answers)))[0]
            try:
                found = ast.literal_eval(answers) if tab else None
            except (ValueError, SyntaxError):
                found = None
            if not isinstance(found, list) or not all(isinstance(a, str) for a in found):
                raise DataError(f"{path}, line {number}: expected a question, a tab and a list of answers as "
                                "['one', 'two']")
            yield Asked(question, found, None, None)


# -- published vectors -----------------------------------------------------------------------------------------------

#: what a pickle of numpy arrays names, before and after numpy 2 renamed its core
_ALLOWED = {(module, name) for name in ("_reconstruct", "scalar", "_frombuffer")
            for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
                           "numpy._core.numeric")} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    """Reads lists, tuples, texts, numbers and numpy arrays; a file that names anything else is refused unread."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise DataError(f"the file asks for {module}.{name}: not a list of (passage id, vector); it was not run")
        return super().find_class(module, name)


def in_order(path) -> list[Path]:
    """A file as it is, or the ``.npy`` and ``.pkl`` files of a folder in the order of the numbers in their names."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    files = [p for p in path.iterdir() if p.suffix in (".npy", ".pkl")]
    if not files:
        raise DataError(f"{path} holds no shards: expected .npy or .pkl files")
    return sorted(files, key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.name))


def read_vectors(path) -> np.ndarray:
    """Vectors [m, D] of a shard: ``.npy``, or one of DPR's published ``.pkl`` files.

    Raises
    ------
    DataError
        If the file is of another form or names anything but numpy arrays.
    """
    path = Path(os.fspath(path)).expanduser()
    _check(path)
    if path.suffix == ".npy":
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    elif path.suffix == ".pkl":
        with open(path, "rb") as file:
            try:
                pairs = _ArraysOnly(file).load()
                found = np.stack([np.asarray(vector) for _, vector in pairs])
            except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise DataError(f"{path}: not a list of (passage id, vector): {error}") from None
    else:
        raise DataError(f"{path}: expected .npy, or .pkl as DPR publishes")
    if found.ndim != 2 or found.dtype.kind != "f":
        raise DataError(f"{path}: {found.dtype} of shape {found.shape}, expected floats [m, D]")
    return found.astype(np.float32, copy=False)
