"""Raw click logs to the one layout of :mod:`ecstudy.data.layout`, the way of the paper (Section 5.1.2).

Four passes, each bounded by a chunk of rows or by one field's vocabulary:

1. read: records are checked; each chunk's categorical columns become codes into a sorted dictionary of the chunk;
2. split: every row gets its split by the rule of the data set;
3. encode: per field, the chunk dictionaries are merged into the vocabulary in sorted-string order (the order of the
   paper's ``LabelEncoder``), and codes become ids;
4. write: columns are interleaved into rows, in file (or time) order.

Ids. A missing categorical value is a value like any other: the string ``"0"`` for Criteo and Avazu as in the paper, the
empty string for one's own tables. With ``vocab="all"`` and ``min_count=1`` (the paper) there is no reserved id. With
``vocab="train"`` (values are counted in training rows only) or ``min_count > 1`` id 0 of every field is reserved for
the values that are not in its vocabulary, and ids of the vocabulary begin at 1.
"""
from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..extras import need
from .cardinalities import FIELDS
from .layout import SPLITS, DataError, Dataset, DatasetWriter
from .prepare_read import ParquetLog, Progress, Rejects, TextLog, check_file, read_header
from .prepare_split import TRAIN, avazu_split, criteo_split, fraction_split
from .prepare_stage import WRITE_ROWS, Stage, first_rows, transform

CHUNK_ROWS = 100_000

CRITEO_DENSE = [f"I{i}" for i in range(1, 14)]
CRITEO_FIELDS, AVAZU_FIELDS = list(FIELDS["criteo"][0]), list(FIELDS["avazu"][0])


# ---------------------------------------------------------------- public functions


def prepare_criteo(path, out, *, vocab="all", min_count=1, max_bad=0.001, split="paper", fractions=(0.8, 0.1, 0.1),
                   seed=0, name=None, overwrite=False, progress=None, chunk_rows=CHUNK_ROWS) -> Dataset:
    """Prepare ``train.txt`` of the Criteo Kaggle challenge (plain or gzip) into the folder ``out``.

    26 fields C1..C26 and 13 numeric features I1..I13: missing or not positive -> 0, x > 0 -> ln(x + 1).

    Parameters
    ----------
    path, out:
        The raw file (no header, tabs: label, I1..I13, C1..C26) and the folder to create.
    vocab:
        ``"all"``: ids from all rows (the paper); ``"train"``: from training rows, other values share id 0.
    min_count:
        Values with fewer occurrences (in the rows of ``vocab``) share the reserved id 0.
    max_bad:
        Largest share of malformed rows that is skipped with a warning; more is an error.
    split:
        ``"paper"``: rows in file order are seven equal days; six train, the first half of the last tests, its second
        half validates. ``"chronological"`` / ``"random"``: ``fractions`` of train, valid, test (``seed`` for random).
    name, overwrite:
        Name in ``meta.json`` (the folder's name by default); replace an existing folder.
    progress:
        None: a bar on a terminal; True, False; or a callable ``(stage, fraction)``.
    chunk_rows:
        Rows held at a time, roughly; the result does not depend on it.

    Raises
    ------
    DataError
        For a file that cannot be used, too many malformed rows, a bad option or a full disk. Nothing is left behind.
    """
    columns = ["label", *CRITEO_DENSE, *CRITEO_FIELDS]
    job = Job("criteo", path, out, vocab, min_count, max_bad, split, fractions, seed, name, overwrite, chunk_rows)
    recipe = Recipe("label", CRITEO_FIELDS, CRITEO_DENSE, fill="0", split_by=criteo_split)
    return _prepare(job, recipe, progress, lambda path, bar: TextLog(
        path, "\t", columns, columns, header=False, quote=None, chunk_rows=chunk_rows, progress=bar))


def prepare_avazu(path, out, *, split_hour=False, vocab="all", min_count=1, max_bad=0.001, split="paper",
                  fractions=(0.8, 0.1, 0.1), seed=0, name=None, overwrite=False, progress=None,
                  chunk_rows=CHUNK_ROWS) -> Dataset:
    """Prepare ``train.csv`` of the Avazu Kaggle challenge (plain or gzip) into the folder ``out``.

    22 fields, no numeric features; ``id`` is dropped. ``hour`` (YYMMDDHH) is a field as in the paper, so the values of
    the last day never occur in training; ``split_hour=True`` puts ``day`` and ``hour_of_day`` in its place.

    The paper's split: rows of the last day, in file order, are halved: the first half tests, the second validates; all
    earlier rows train. Other options and errors as in :func:`prepare_criteo`.
    """
    job = Job("avazu", path, out, vocab, min_count, max_bad, split, fractions, seed, name, overwrite, chunk_rows,
              dict(split_hour=split_hour))
    fields = ["day", "hour_of_day", *AVAZU_FIELDS[1:]] if split_hour else AVAZU_FIELDS
    recipe = Recipe("click", fields, fill="0", time="hour", split_by=avazu_split, check=_check_hour,
                    derive=_split_hour if split_hour else None)

    def log(path, bar):
        columns = read_header(path, None)[","]
        _require(["click", *AVAZU_FIELDS], columns, path)
        return TextLog(path, ",", columns, ["click", *AVAZU_FIELDS], header=True, quote=None,
                       chunk_rows=chunk_rows, progress=bar)

    return _prepare(job, recipe, progress, log)


def prepare_table(path, out, *, label, categorical, numeric=(), time=None, numeric_transform="log",
                  label_threshold=None, distinct=(), separator=None, columns=None, quote='"', missing=("",),
                  vocab="all", min_count=1, max_bad=0.001, split="chronological", fractions=(0.8, 0.1, 0.1), seed=0,
                  name=None, overwrite=False, progress=None, chunk_rows=CHUNK_ROWS) -> Dataset:
    """Prepare one's own log: CSV or TSV (plain or gzip), or parquet.

    Parameters
    ----------
    label:
        The column of 0/1 (or true/false) labels, or of numbers when ``label_threshold`` is given.
    categorical, numeric:
        Names of the fields and of the numeric features.
    time:
        A column of numbers or of ISO dates. Rows are put in its order (stable) before they are split and written.
    numeric_transform:
        ``"log"``: x > 0 -> ln(x + 1), else 0; ``"standard"``: zero mean and unit variance by the training rows, missing
        -> 0; ``"none"``: as they are, missing -> 0.
    label_threshold:
        label = value >= label_threshold.
    distinct:
        Fields of which each combination of values keeps its first row in file order.
    separator, columns, quote, missing:
        For text: the separator (found in the header by default), the names of the columns of a file without header, the
        quoting character or None, and the cell texts that mean "no value".
    split, fractions, seed:
        ``"chronological"`` (file or time order) or ``"random"`` (``seed``), with the shares of train, valid, test.

    Other options and errors as in :func:`prepare_criteo`.
    """
    categorical, numeric, distinct, missing = map(_names, (categorical, numeric, distinct, missing))
    job = Job("table", path, out, vocab, min_count, max_bad, split, fractions, seed, name, overwrite, chunk_rows,
              dict(label=label, categorical=categorical, numeric=numeric, time=time,
                   numeric_transform=numeric_transform, label_threshold=label_threshold, distinct=distinct))
    wanted = list(dict.fromkeys([label, *categorical, *numeric, *([time] if time else [])]))
    if not categorical:
        raise DataError("no categorical column given; name at least one (--categorical)")
    for role, names in (("categorical", categorical), ("numeric", numeric)):
        if len(set(names)) < len(names):
            raise DataError(f"{role} columns name {next(n for n in names if names.count(n) > 1)!r} twice")
        if label in names:
            raise DataError(f"the label {label!r} is among the {role} columns; a model would read it off")
    if reserved := [name for name in wanted if name.startswith("#")]:
        raise DataError(f"column name {reserved[0]!r}; names that begin with # are kept for the preparation, rename it")
    if unknown := [field for field in distinct if field not in categorical]:
        raise DataError(f"distinct names {unknown[0]!r}, which is not among the categorical columns")
    if numeric_transform not in ("log", "standard", "none"):
        raise DataError(f"numeric_transform {numeric_transform!r}, expected 'log', 'standard' or 'none'")
    recipe = Recipe(label, categorical, numeric, fill="", time=time, sort=time is not None,
                    transform=numeric_transform, threshold=label_threshold, distinct=distinct)

    def log(path, bar):
        with open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
        if parquet:
            pl = need("polars", "prep")
            _require(wanted, pl.read_parquet_schema(path), path)
            return ParquetLog(path, wanted, missing=missing, chunk_rows=chunk_rows, progress=bar)
        names, by = (list(columns), separator or ",") if columns else _header(path, wanted, separator, quote)
        if columns:
            _require(wanted, names, path)
        return TextLog(path, by, names, wanted, header=not columns, quote=quote or None, missing=missing,
                       chunk_rows=chunk_rows, progress=bar)

    return _prepare(job, recipe, progress, log)


# ---------------------------------------------------------------- what to do


@dataclass(frozen=True)
class Job:
    """Options that every source shares; checked before work starts."""

    kind: str
    path: str | Path
    out: str | Path
    vocab: str
    min_count: int
    max_bad: float
    split: str
    fractions: tuple
    seed: int
    name: str | None
    overwrite: bool
    chunk_rows: int
    options: dict | None = None

    @property
    def reserved(self) -> bool:
        return self.vocab == "train" or self.min_count > 1

    def checked(self) -> "Job":
        own = "chronological" if self.kind == "table" else "paper"
        splits = sorted({own, "chronological", "random"})
        fractions = tuple(float(share) for share in self.fractions)
        for wrong, message in (
            (self.vocab not in ("all", "train"), f"vocab {self.vocab!r}, expected 'all' or 'train'"),
            (self.min_count < 1, f"min_count {self.min_count}, expected at least 1"),
            (not 0 <= self.max_bad <= 1, f"max_bad {self.max_bad}, expected a share between 0 and 1"),
            (self.chunk_rows < 1, f"chunk_rows {self.chunk_rows}, expected at least 1"),
            (self.split not in splits, f"split {self.split!r}, expected one of {', '.join(splits)}"),
            (len(fractions) != 3 or min(fractions) < 0 or not fractions[0] or abs(sum(fractions) - 1) > 1e-9,
             f"fractions {fractions}, expected three shares of train, valid, test that sum to 1, train above 0"),
        ):
            if wrong:
                raise DataError(message)
        out = Path(self.out).expanduser().absolute()
        if out.exists() and not self.overwrite:
            raise DataError(f"{out} exists; choose another folder or pass overwrite=True (--overwrite)")
        if out.exists() and not (out / "meta.json").is_file():
            raise DataError(f"{out} exists and is not a prepared data set; it is not overwritten")
        path = check_file(self.path)
        if out in path.resolve().parents:
            raise DataError(f"{path} lies in {out}, which would be replaced; choose another folder")
        return replace(self, path=path, out=out, fractions=fractions)


@dataclass(frozen=True)
class Recipe:
    """What a source's columns are: label, fields, numeric features, and how their values are read."""

    label: str
    fields: list[str]
    numeric: list[str] = ()
    fill: str = "0"                     # the text a missing categorical value becomes
    time: str | None = None
    sort: bool = False                  # put rows in the order of ``time``
    transform: str = "log"
    threshold: float | None = None
    distinct: list[str] = ()
    split_by: object = None             # (rows, times) -> uint8 [rows]
    check: object = None                # frame -> [(mask expression, reason)]
    derive: object = None               # frame -> frame with further columns


def _names(names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _require(wanted, columns, path) -> None:
    columns = list(columns)
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise DataError(f"{path}: no column {', '.join(map(repr, absent[:5]))}; it has {', '.join(columns[:40])}")
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}: the header names {next(c for c in columns if columns.count(c) > 1)!r} twice")


def _header(path, wanted, separator, quote) -> tuple[list[str], str]:
    """Column names and separator: the given one, else the one under which all wanted columns are found."""
    headers = read_header(path, quote)
    if separator is not None:
        if separator not in headers:
            raise DataError(f"separator {separator!r}, expected a tab, comma, semicolon or vertical bar")
        headers = {separator: headers[separator]}
    best = max(headers, key=lambda s: (sum(name in headers[s] for name in wanted), len(headers[s])))
    _require(wanted, headers[best], path)
    return headers[best], best


def _check_hour(pl):
    yield ~pl.col("hour").str.contains(r"^\d{8}$").fill_null(False), "hour", "YYMMDDHH"


def _split_hour(frame):
    pl = need("polars", "prep")
    return frame.with_columns(day=pl.col("hour").str.slice(0, 6), hour_of_day=pl.col("hour").str.slice(6))


# ---------------------------------------------------------------- the passes


def _prepare(job: Job, recipe: Recipe, progress, open_log) -> Dataset:
    polars = need("polars", "prep")
    job = job.checked()
    bar = Progress(progress)
    try:
        with _workspace(job.out) as folder:
            log = open_log(job.path, bar)
            stage = Stage(folder, recipe)
            rejects = stage.read(log, job.max_bad)
            rows, splits = _split(stage, recipe, job)
            used = np.ones(stage.rows, bool)
            if job.vocab == "train" or rows is not None:
                used[:] = False
                chosen = splits == TRAIN if job.vocab == "train" else slice(None)
                used[rows[chosen] if rows is not None else chosen] = True
            sizes = []
            for number, name in enumerate(recipe.fields):
                bar("encode", number / len(recipe.fields))
                vocabulary = stage.vocabulary(name, used, job.min_count)
                stage.encode(name, vocabulary, job.reserved)
                sizes.append(len(vocabulary) + job.reserved)
            bar("encode", 1.0)
            numeric = transform(stage, rows, splits)
            source = _source(job, recipe, log, rejects, stage, splits)
            with DatasetWriter(job.out, name=job.name or job.out.name, fields=recipe.fields, cardinalities=sizes,
                               dense=recipe.numeric, source=source, overwrite=job.overwrite) as writer:
                _write(writer, stage, rows, splits, numeric, bar)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"no room left on the disk of {job.out}; preparing needs about twice the size of the raw "
                            "text there. Nothing was kept") from error
        raise DataError(f"{error.filename or job.out}: {error.strerror or error}. Nothing was kept") from error
    except polars.exceptions.PolarsError as error:
        raise DataError(f"{job.path}: a column cannot be read as declared ({str(error).splitlines()[0]})") from error
    finally:
        bar.close()
    return Dataset.open(job.out)


@contextmanager
def _workspace(out: Path):
    """A hidden folder beside ``out``; it and, after a failure, everything else that was created goes."""
    created = [parent for parent in out.parents if not parent.exists()]
    folder = out.with_name(f".{out.name}.{os.getpid()}.prep")
    try:
        folder.mkdir(parents=True)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            parent.rmdir() if parent.is_dir() and not any(parent.iterdir()) else None
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _split(stage: Stage, recipe: Recipe, job: Job):
    """Rows to write in their order, int64 [N] (None: all as read), and the split of each, uint8 [N]."""
    rows = None
    times = stage.at("#time", slice(None)) if recipe.time else None
    if recipe.distinct:
        rows = first_rows(stage, recipe.distinct)
    if recipe.sort:
        order = np.argsort(times if rows is None else times[rows], kind="stable")
        rows = order if rows is None else rows[order]
    count = stage.rows if rows is None else len(rows)
    if job.split == "paper":
        splits = recipe.split_by(count, times)
        allowed = 1.0, 1.0, 1.0
    else:
        splits = fraction_split(count, job.fractions, job.seed if job.split == "random" else None)
        allowed = job.fractions
    empty = [name for code, name in enumerate(SPLITS) if allowed[code] and not (splits == code).any()]
    if empty:
        raise DataError(f"{job.path}: {count:,} rows leave the {empty[0]} split empty (split {job.split!r}); "
                        "more rows (for Avazu: of more than one day) are needed")
    return rows, splits


def _write(writer: DatasetWriter, stage: Stage, rows, splits, transform, bar: Progress) -> None:
    fields = stage.recipe.fields
    for start in range(0, len(splits), WRITE_ROWS):
        bar("write", start / len(splits))
        block = splits[start:start + WRITE_ROWS]
        at = slice(start, start + WRITE_ROWS) if rows is None else rows[start:start + WRITE_ROWS]
        ids = np.empty((len(block), len(fields)), np.int32)
        for i, name in enumerate(fields):
            ids[:, i] = stage.at(name, at)
        label = stage.at("#label", at)
        dense = transform(stage.at("#numeric", at)).astype(np.float32) if stage.recipe.numeric else None
        for code, split in enumerate(SPLITS):
            if (chosen := block == code).all():
                writer.append(split, ids, dense, label)
            elif chosen.any():
                writer.append(split, ids[chosen], None if dense is None else dense[chosen], label[chosen])
    bar("write", 1.0)


def _source(job: Job, recipe: Recipe, log, rejects: Rejects, stage: Stage, splits) -> dict:
    """Provenance for ``meta.json``."""
    return dict(
        kind=job.kind, file=job.path.name, **log.checksum, rows_read=rejects.read, rows_rejected=rejects.count,
        rejected_first=rejects.first, rows_dropped=stage.rows - len(splits), vocab=job.vocab, min_count=job.min_count,
        reserved=dict(id=0, meaning="values outside the vocabulary") if job.reserved else None, missing=recipe.fill,
        order="time" if recipe.sort else "file",
        options=dict(split=job.split, max_bad=job.max_bad,
                     **(dict(fractions=job.fractions) if job.split != "paper" else {}),
                     **(dict(seed=job.seed) if job.split == "random" else {}), **(job.options or {})),
    )
