"""Columns between reading and writing, on disk: what keeps the preparation's memory bounded."""
from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np

from ..extras import need
from .layout import DataError
from .prepare_read import Rejects
from .prepare_split import TRAIN

WRITE_ROWS = 65_536             # rows put together and written at once
FLOAT_MAX = float(np.finfo(np.float32).max)


class Stage:
    """Columns between reading and writing, on disk: labels, numbers, times, and per field the codes of each chunk.

    ``codes/<field>``: int32 [rows], positions in the sorted dictionary of the row's chunk, after :meth:`encode` ids.
    ``part-<i>.parquet``: one row of lists, the dictionary of each field in chunk i.
    """

    def __init__(self, folder: Path, recipe):
        self.folder, self.recipe = folder, recipe
        self.bounds = [0]                               # rows before each chunk
        self.number_type = np.float64 if recipe.transform == "standard" else np.float32
        self.dates: bool | None = None                  # is the time column one of dates

    rows = property(lambda self: self.bounds[-1])

    def read(self, log, max_bad: float) -> Rejects:
        """Stage every good row of the log; too many bad ones, or none that is good, is a :class:`DataError`."""
        rejects = Rejects(log.unit)
        files = {name: open(self.folder / name, "wb") for name in ("label", "numeric", "time")}
        files |= {i: open(self.folder / f"codes-{i}", "wb") for i in range(len(self.recipe.fields))}
        try:
            for frame, lines in log.frames(rejects):
                frame = self._accept(frame, lines, rejects)
                if len(frame):
                    self._append(frame, files)
        finally:
            for file in files.values():
                file.close()
        if rejects.read == 0:
            raise DataError(f"{log.path} holds no rows; pass the training file")
        if rejects.count > max_bad * rejects.read or not self.rows:
            raise DataError(f"{log.path}: {rejects.summary()}. At most {max_bad:.2%} are "
                            "skipped; mend the file or raise max_bad (--max-bad)")
        if rejects.count:
            warnings.warn(f"{log.path}: {rejects.summary()}. They are skipped",
                          stacklevel=4)
        for name in ("#label", "#numeric", *(["#time"] if self.recipe.time else []), *self.recipe.fields):
            path, dtype, width = self._column(name)     # every column has every row, or nothing is written
            if path.stat().st_size != dtype.itemsize * width * self.rows:
                raise RuntimeError(f"{path.name} holds {path.stat().st_size} bytes for {self.rows} rows")
        return rejects

    def _accept(self, frame, lines, rejects: Rejects):
        """The frame's good rows as ``label`` UInt8, fields String, ``#i`` numbers, ``#time``; bad rows are reported."""
        pl = need("polars", "prep")
        recipe, checks = self.recipe, list(self.recipe.check(pl)) if self.recipe.check else []
        label = _number(pl, frame, recipe.label, booleans=True)
        if recipe.threshold is None:
            checks.append((~label.is_in([0.0, 1.0]).fill_null(False), recipe.label, "0 or 1"))
        else:
            checks.append((~label.is_finite().fill_null(False), recipe.label, "a number"))
            label = label >= recipe.threshold
        outputs = [label.cast(pl.UInt8, strict=False).alias("#label")]
        for i, name in enumerate(recipe.numeric):
            value = _number(pl, frame, name)
            checks.append((pl.col(name).is_not_null() & ~(value.is_nan() | (value.abs() <= FLOAT_MAX)).fill_null(False),
                           name, "a number"))
            outputs.append(value.fill_null(math.nan).alias(f"#{i}"))
        if recipe.time:
            if self.dates is None:
                numbers = frame.select(_number(pl, frame, recipe.time).is_not_null().sum()).item()
                self.dates = recipe.sort and 2 * numbers < frame[recipe.time].drop_nulls().len()
            value = _date(pl, frame, recipe.time) if self.dates else _number(pl, frame, recipe.time)
            good = value.is_not_null() if self.dates else value.is_finite().fill_null(False)
            checks.append((~good, recipe.time, "an ISO date" if self.dates else "a number"))
            outputs.append(value.fill_null(0).alias("#time"))
        bad = frame.select(mask.alias(str(i)) for i, (mask, _, _) in enumerate(checks)).with_columns(
            any=pl.any_horizontal(pl.all()))
        if bad["any"].any():
            at = np.flatnonzero(bad["any"].to_numpy())
            first = ((row, *next(c[1:] for i, c in enumerate(checks) if bad[str(i)][row])) for row in at.tolist())
            rejects.add(lines[at], (f"{name} = {_shown(frame[name][row])}, expected {text}"
                                    for row, name, text in first))
            frame = frame.filter(~bad["any"])
        values = recipe.derive(frame) if recipe.derive else frame
        texts = [pl.col(name).cast(pl.String).fill_null(recipe.fill).alias(name) for name in recipe.fields]
        return values.select(*texts, *outputs)

    def _append(self, frame, files) -> None:
        pl = need("polars", "prep")
        files["label"].write(_bytes(frame["#label"].to_numpy()))
        if self.recipe.numeric:
            numbers = frame.select(f"#{i}" for i in range(len(self.recipe.numeric))).to_numpy()
            if self.recipe.transform == "log":
                numbers = _log(numbers)
            files["numeric"].write(_bytes(numbers.astype(self.number_type)))
        if self.recipe.time:
            files["time"].write(_bytes(frame["#time"].to_numpy()))
        dictionaries = {}
        for i, name in enumerate(self.recipe.fields):
            values = frame[name]
            dictionary = values.unique().sort()
            codes = values.cast(pl.Enum(dictionary)).to_physical().cast(pl.Int32)
            if not (dictionary.gather(codes) == values).all():      # also proves the order of rows
                raise RuntimeError(f"codes of {name} do not decode to the values they were made from")
            files[i].write(_bytes(codes.to_numpy()))
            dictionaries[name] = [dictionary]
        buffer = io.BytesIO()                           # a plain write says clearly when the disk is full
        pl.DataFrame(dictionaries).write_parquet(buffer, compression="lz4")
        (self.folder / f"part-{len(self.bounds) - 1}.parquet").write_bytes(buffer.getvalue())
        self.bounds.append(self.rows + len(frame))

    def _column(self, name: str) -> tuple[Path, np.dtype, int]:
        """File, type and width of a column."""
        if name in self.recipe.fields:
            return self.folder / f"codes-{self.recipe.fields.index(name)}", np.dtype(np.int32), 1
        return self.folder / name[1:], np.dtype({"#label": np.uint8, "#time": np.int64 if self.dates else np.float64,
                                                 "#numeric": self.number_type}[name]), \
            len(self.recipe.numeric) if name == "#numeric" else 1

    def at(self, name: str, rows) -> np.ndarray:
        """Values of a column at a slice of rows (read, not mapped: pages do not pile up) or at an array of rows."""
        path, dtype, width = self._column(name)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.rows)
            size = dtype.itemsize * width
            values = np.fromfile(path, dtype, (stop - start) * width, offset=start * size)
        else:
            values = np.memmap(path, dtype, mode="r", shape=(self.rows, width))[rows].ravel()
        return values.reshape(-1, width) if name == "#numeric" else values

    def parts(self, name: str):
        """Per chunk: its first and last row and the field's dictionary."""
        pl = need("polars", "prep")
        for i, (start, stop) in enumerate(zip(self.bounds, self.bounds[1:])):
            yield start, stop, pl.read_parquet(self.folder / f"part-{i}.parquet", columns=[name])[name].item()

    def vocabulary(self, name: str, used: np.ndarray, min_count: int):
        """Values with ``min_count`` occurrences in the ``used`` rows (bool [rows]), a sorted polars series."""
        pl = need("polars", "prep")
        pending, size, merged = [], 0, 0
        merge = lambda frames: pl.concat(frames).group_by("value").agg(pl.col("count").sum())  # noqa: E731
        for start, stop, dictionary in self.parts(name):
            codes = self.at(name, slice(start, stop))
            counts = np.bincount(codes[used[start:stop]], minlength=len(dictionary))
            frame = pl.DataFrame({"value": dictionary, "count": counts}).filter(pl.col("count") > 0)
            pending.append(frame)
            size += len(frame)
            if size > max(1 << 20, 2 * merged):         # merge when the parts outgrow what is merged
                pending = [merge(pending)]
                size = merged = len(pending[0])
        return merge(pending).filter(pl.col("count") >= min_count)["value"].sort()

    def ids(self, name: str, vocabulary, reserved: bool):
        """Per chunk: the ids int32 [n] of its rows; -1 for what is neither known nor reserved."""
        for start, stop, dictionary in self.parts(name):
            place = np.minimum(vocabulary.search_sorted(dictionary).to_numpy(), max(len(vocabulary) - 1, 0))
            known = (vocabulary.gather(place) == dictionary).to_numpy() if len(vocabulary) else place < 0
            ids = np.where(known, place + reserved, 0 if reserved else -1).astype(np.int32)
            yield ids[self.at(name, slice(start, stop))]

    def encode(self, name: str, vocabulary, reserved: bool) -> None:
        """Replace a field's codes by ids."""
        path = self.folder / f"codes-{self.recipe.fields.index(name)}"
        with open(path.with_suffix(".new"), "wb") as file:      # written, not mapped: a full disk must not be a signal
            for ids in self.ids(name, vocabulary, reserved):
                file.write(_bytes(ids))
        path.with_suffix(".new").replace(path)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shown(value) -> str:
    text = repr(value) if value is not None else "missing"
    return text if len(text) <= 40 else text[:37] + "..."


def _number(pl, frame, name: str, booleans=False):
    """A column as Float64; null where it is missing or no number."""
    column, dtype = pl.col(name), frame.schema[name]
    if dtype == pl.String and booleans:
        lower = column.str.to_lowercase()
        column = pl.when(lower == "true").then(pl.lit("1")).when(lower == "false").then(pl.lit("0")).otherwise(column)
    if dtype.is_nested() or dtype.is_temporal():
        return pl.lit(None, pl.Float64)
    return column.cast(pl.Float64, strict=False)


def _date(pl, frame, name: str):
    """A column of ISO dates as microseconds, Int64; null where it is no date."""
    column, dtype = pl.col(name), frame.schema[name]
    if dtype == pl.String:
        text = column.str.replace("T", " ", literal=True).str.strip_suffix("Z")
        column = pl.coalesce(text.str.to_datetime(form, time_unit="us", strict=False)
                             for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d"))
    elif not dtype.is_temporal():
        return pl.lit(None, pl.Int64)
    return column.cast(pl.Datetime("us"), strict=False).cast(pl.Int64)


def _log(numbers: np.ndarray) -> np.ndarray:
    """x > 0 -> ln(x + 1), else (also missing) 0."""
    positive = numbers > 0
    return np.log1p(numbers, where=positive, out=np.zeros_like(numbers))


def first_rows(stage: Stage, names) -> np.ndarray:
    """The first row of each combination of values, int64, ascending."""
    pl = need("polars", "prep")
    everything, columns = np.ones(stage.rows, bool), {}
    for name in names:
        parts = stage.ids(name, stage.vocabulary(name, everything, 1), reserved=False)
        columns[name] = np.concatenate(list(parts))
    return np.flatnonzero(pl.DataFrame(columns).select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy())


def transform(stage: Stage, rows, splits):
    """The function that turns staged numbers [n, K] into features; statistics come from training rows only."""
    if stage.recipe.transform != "standard" or not stage.recipe.numeric:
        return np.nan_to_num                            # "log" was applied while reading
    count, total, square = 0, 0.0, 0.0
    train = np.flatnonzero(splits == TRAIN) if rows is None else np.sort(rows[splits == TRAIN])
    blocks = [train[i:i + WRITE_ROWS] for i in range(0, len(train), WRITE_ROWS)]
    for block in blocks:
        numbers = stage.at("#numeric", block)
        count = count + (~np.isnan(numbers)).sum(axis=0)
        total = total + np.nansum(numbers, axis=0)
    mean = total / np.maximum(count, 1)
    for block in blocks:                                # a second pass: no cancellation with large means
        square = square + np.nansum((stage.at("#numeric", block) - mean) ** 2, axis=0)
    deviation = np.sqrt(square / np.maximum(count, 1))
    deviation[deviation == 0] = 1.0
    return lambda block: np.nan_to_num((block - mean) / deviation)
