"""Raw click logs, read once: checked records as frames, a bounded number of bytes at a time.

Text is cut into blocks at record ends; separators are counted per record before a CSV parser sees the block, so
a malformed line is reported with its line number and cannot shift or swallow its neighbours.
"""
from __future__ import annotations

import csv
import gzip
import hashlib
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..extras import need
from .layout import DataError

ROW_BYTES = 256                 # a click log's row, roughly (Criteo: 243): turns rows per chunk into bytes per block
LONGEST_RECORD = 1 << 26        # 64 MiB without a record end: binary data, or a quote that is never closed
DAMAGED = "the gzip file is damaged or incomplete ({}); fetch it again"
REPORTED = 10                   # rejected rows listed in meta.json


class Progress:
    """One line on stderr, rewritten: shown on a terminal (``None``), always (``True``) or never (``False``).

    A callable ``progress(stage, fraction)`` receives the same reports instead.
    """

    def __init__(self, progress=None):
        self.report = progress if callable(progress) else None
        self.show = self.report is None and (sys.stderr.isatty() if progress is None else bool(progress))
        self.start, self.last, self.stage = time.monotonic(), 0.0, None

    def __call__(self, stage: str, fraction: float) -> None:
        if self.report:
            self.report(stage, min(fraction, 1.0))
        elif self.show and (time.monotonic() - self.last > 0.2 or fraction >= 1 or stage != self.stage):
            self.last = time.monotonic()
            ended = "\n" if self.stage not in (None, stage) else ""
            bar = "#" * int(30 * min(fraction, 1.0))
            print(f"{ended}\r{stage:8} [{bar:30}] {min(fraction, 1.0):4.0%} {self.last - self.start:6.0f} s",
                  end="", file=sys.stderr, flush=True)
            self.stage = stage

    def close(self) -> None:
        if self.show and self.stage:
            print(file=sys.stderr)


@dataclass
class Rejects:
    """Counts rows read and rejected; keeps the first few of the rejected with line number and reason."""

    unit: str = "line"
    read: int = 0
    count: int = 0
    first: list[dict] = field(default_factory=list)

    def add(self, lines: np.ndarray, reasons) -> None:
        """Reject rows at these line numbers; ``reasons[i]`` says why row i (read only for the first few)."""
        self.count += len(lines)
        for line, reason in zip(lines[:REPORTED].tolist(), reasons):
            self.first.append(dict(line=line, reason=reason))
        self.first = sorted(self.first, key=lambda entry: entry["line"])[:REPORTED]

    def summary(self) -> str:
        lines = "; ".join(f"{self.unit} {entry['line']:,}: {entry['reason']}" for entry in self.first[:5])
        return f"{self.count:,} of {self.read:,} rows ({self.count / max(self.read, 1):.2%}) are malformed: {lines}"


class HashingFile:
    """A file opened for reading whose bytes are hashed as they pass (no second pass for the checksum)."""

    def __init__(self, path: Path):
        self.file, self.sha256, self.bytes, self.size = open(path, "rb"), hashlib.sha256(), 0, path.stat().st_size

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.bytes += len(data)
        return data

    def close(self) -> None:
        self.file.close()


def check_file(path) -> Path:
    """The path of an existing file that is neither empty nor an archive, or a :class:`DataError`."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; pass the raw file in it")
    if not path.is_file():
        raise DataError(f"{path} does not exist; pass the path of the raw log")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        with _open(path) as file:
            head = file.read(262)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: {DAMAGED.format(error)}") from None
    if head[257:] == b"ustar" or head[:4] == b"PK\x03\x04":
        raise DataError(f"{path} is an archive; unpack it and pass the training file in it")
    return path


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path):
    """The text of a plain or gzip file (told by the first bytes, not the name), as a binary file."""
    return (gzip.open if _is_gzip(path) else open)(path, "rb")


def blocks(path: Path, block_bytes: int, quote: str | None, progress: Progress, checksum: dict) -> Iterator[bytes]:
    """Blocks of whole records, plain or gzip, each ending in a newline.

    ``checksum`` receives ``bytes`` and ``sha256`` of the file as it lies on disk. Quoted newlines are not cut.
    """
    raw = HashingFile(path)
    stream = gzip.GzipFile(fileobj=raw) if _is_gzip(path) else raw
    rest = b""
    try:
        while True:
            try:
                data = stream.read(block_bytes)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: {DAMAGED.format(error)}") from None
            progress("read", raw.bytes / raw.size)
            if not data:
                break
            rest += data
            cut = _last_record_end(rest, quote) + 1
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
            elif len(rest) > LONGEST_RECORD + block_bytes:
                raise DataError(f"{path}: no line end in {len(rest):,} bytes; the file is not text, or a quote is "
                                "never closed (pass quote=None / --no-quote if quotes are plain characters)")
        if rest:
            yield rest + b"\n"
        checksum.update(bytes=raw.bytes, sha256=raw.sha256.hexdigest())
    finally:
        raw.close()


def _last_record_end(block: bytes, quote: str | None) -> int:
    """Position of the last newline outside quotes, -1 if there is none; the block begins outside quotes."""
    if quote is None or quote.encode() not in block:
        return block.rfind(b"\n")
    array = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(array == 10)
    ends = ends[np.searchsorted(np.flatnonzero(array == ord(quote)), ends) % 2 == 0]
    return int(ends[-1]) if len(ends) else -1


class TextLog:
    """A delimited text file as frames of text columns.

    Parameters
    ----------
    path, separator:
        Plain or gzip text; one character.
    columns:
        Names of all columns; ``header=True`` says that the first line holds them and is skipped.
    keep:
        The columns to read.
    quote:
        The quoting character of RFC 4180, or None when quotes are ordinary characters.
    missing:
        Cell texts that mean "no value".
    """

    unit = "line"

    def __init__(self, path: Path, separator: str, columns, keep, *, header: bool, quote: str | None,
                 missing=("",), chunk_rows: int, progress: Progress):
        self.path, self.separator, self.columns, self.keep = path, separator, list(columns), list(keep)
        self.header, self.quote, self.missing = header, quote, list(missing)
        self.block_bytes, self.progress = chunk_rows * ROW_BYTES, progress
        self.checksum: dict = {}

    def frames(self, rejects: Rejects) -> Iterator[tuple]:
        """Yields (frame of text columns, line numbers int64 [n]) in file order; counts rows read and rejected."""
        line = 1
        for number, block in enumerate(blocks(self.path, self.block_bytes, self.quote, self.progress, self.checksum)):
            newlines = block.count(b"\n")
            if number == 0:
                block = block.removeprefix(b"\xef\xbb\xbf")
            text, lines = self._records(block, line, rejects, skip=int(self.header and number == 0))
            line += newlines
            if len(lines):
                yield self._parse(text, lines), lines

    def _records(self, block: bytes, line: int, rejects: Rejects, skip: int):
        """The block without malformed and empty records, and the line numbers of those that stay."""
        block = block.replace(b"\r\n", b"\n")
        array = np.frombuffer(block, np.uint8)
        newlines, separators = np.flatnonzero(array == 10), np.flatnonzero(array == ord(self.separator))
        ends = newlines
        if self.quote is not None and self.quote.encode() in block:
            quotes = np.flatnonzero(array == ord(self.quote))
            ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
            separators = separators[np.searchsorted(quotes, separators) % 2 == 0]
        unclosed = not len(ends) or ends[-1] != len(array) - 1   # only at the end of the file
        if unclosed:
            ends = np.append(ends, len(array) - 1)
        starts = np.concatenate([[0], ends[:-1] + 1])
        lines = line + np.searchsorted(newlines, starts)
        width = np.diff(np.searchsorted(separators, ends), prepend=0) + 1
        empty = ends == starts
        empty[:skip] = True                                     # the header
        wrong = (width != len(self.columns)) & ~empty
        reasons = np.full(len(ends), None, object)
        reasons[wrong] = [f"{w} columns, expected {len(self.columns)}" for w in width[wrong].tolist()]
        if unclosed:
            reasons[-1] = "a quote that is never closed"
        if b"\0" in block:
            self._mark(reasons, np.searchsorted(ends, np.flatnonzero(array == 0)), "a NUL byte")
        if not block.isascii():
            self._mark(reasons, _not_utf8(block, starts, ends), "bytes that are not UTF-8")
        bad = (reasons != None) & ~empty                        # noqa: E711 (elementwise)
        rows = len(ends) - int(empty.sum())
        if rejects.read == 0 and 2 * int(wrong.sum()) > rows:
            value, count = np.unique(width[wrong], return_counts=True)
            raise DataError(f"{self.path}: {wrong.sum():,} of the first {rows:,} rows have not "
                            f"{len(self.columns)} columns separated by {self.separator!r} but mostly "
                            f"{value[count.argmax()]}; is this the right file and format?")
        rejects.read += rows
        rejects.add(lines[bad], reasons[bad])
        keep = ~bad & ~empty
        if not keep.all():
            block = array[np.repeat(keep, ends - starts + 1)].tobytes()
        return block, lines[keep]

    @staticmethod
    def _mark(reasons, rows, reason: str) -> None:
        rows = np.unique(np.asarray(rows, np.int64))
        reasons[rows] = [reasons[row] or reason for row in rows]

    def _parse(self, block: bytes, lines: np.ndarray):
        pl = need("polars", "prep")
        try:
            frame = pl.read_csv(block, separator=self.separator, has_header=False, quote_char=self.quote,
                                infer_schema=False, new_columns=self.columns, null_values=self.missing)
        except pl.exceptions.PolarsError as error:
            frame, cause = None, str(error).splitlines()[0]
        else:
            cause = f"{len(frame):,} rows found instead of {len(lines):,}"
        if frame is None or len(frame) != len(lines):
            raise DataError(f"{self.path}, lines {lines[0]:,} to {lines[-1]:,}: quotes cannot be read ({cause}); pass "
                            "quote=None (--no-quote) if quotes are plain characters")
        return frame.select(self.keep)


def _not_utf8(block: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    """Records of a block that are not UTF-8."""
    try:
        block.decode()
        return []
    except UnicodeDecodeError:
        high = np.unique(np.searchsorted(ends, np.flatnonzero(np.frombuffer(block, np.uint8) > 127)))
        bad = []
        for row in high.tolist():                               # only records with a non-ASCII byte
            try:
                block[starts[row]:ends[row]].decode()
            except UnicodeDecodeError:
                bad.append(row)
        return bad


class ParquetLog:
    """A parquet file as frames; the same face as :class:`TextLog`, with row numbers from 1 for line numbers."""

    unit = "row"

    def __init__(self, path: Path, keep, *, missing=("",), chunk_rows: int, progress: Progress):
        self.path, self.keep, self.missing, self.chunk_rows = path, list(keep), list(missing), chunk_rows
        self.progress, self.checksum = progress, {}

    def frames(self, rejects: Rejects) -> Iterator[tuple]:
        pl = need("polars", "prep")
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.checksum.update(bytes=self.path.stat().st_size, sha256=digest)
        try:
            scan = pl.scan_parquet(self.path)
            total = scan.select(pl.len()).collect().item()
            text = [name for name, dtype in scan.collect_schema().items() if name in self.keep and dtype == pl.String]
            scan = scan.select(self.keep).with_columns(
                pl.when(pl.col(name).is_in(self.missing)).then(None).otherwise(pl.col(name)).alias(name)
                for name in text)
            for frame in scan.collect_batches(chunk_size=self.chunk_rows, maintain_order=True):
                lines = np.arange(rejects.read + 1, rejects.read + len(frame) + 1)
                rejects.read += len(frame)
                self.progress("read", rejects.read / total)
                if len(frame):
                    yield frame, lines
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{self.path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def read_header(path: Path, quote: str | None) -> dict[str, list[str]]:
    """The first line cut at each usual separator: {separator: names}."""
    with _open(path) as file:
        line = file.readline(1 << 20).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").rstrip("\r\n")
    rules = dict(quotechar=quote) if quote else dict(quoting=csv.QUOTE_NONE)
    return {separator: next(csv.reader([line], delimiter=separator, **rules), []) for separator in "\t,;|"}
