"""One on-disk layout for every click log: memory-mapped ``.npy`` per split and one ``meta.json``.

::

    <folder>/
        meta.json                 fields, cardinalities, rows, provenance, fingerprint
        counts.npy    int64 [n]   training occurrences of each id, fields one after the other
        train/  valid/  test/
            ids.npy   int32 [N, F]    ids local to each field, 0 <= id < cardinality of the field
            dense.npy float32 [N, K]  numeric features, already transformed (K may be 0)
            label.npy uint8 [N]       0 or 1

A folder is written under a temporary name and renamed when complete, so a folder that exists is whole.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")
FORMAT = 1
_KINDS = {"ids": np.int32, "dense": np.float32, "label": np.uint8}


class DataError(ValueError):
    """A data set or a raw log that cannot be used; the message names the value and the remedy."""


class NpyStream:
    """Appends arrays to one ``.npy`` file whose number of rows is known only at the end.

    The header of an ``.npy`` file is written with room for any row count and filled in by :meth:`close`.
    """

    def __init__(self, path: str | Path, dtype, width: int | None):
        self.path, self.dtype, self.width, self.rows = Path(path), np.dtype(dtype), width, 0
        self._file = open(self.path, "wb")
        self._file.write(self._header(0))

    def _header(self, rows: int) -> bytes:
        shape = f"({rows},)" if self.width is None else f"({rows}, {self.width})"
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"

    def append(self, array) -> None:
        array = np.ascontiguousarray(array, dtype=self.dtype)
        expected = () if self.width is None else (self.width,)
        if array.shape[1:] != expected:
            raise DataError(f"{self.path.name}: got rows of shape {array.shape[1:]}, expected {expected}")
        self._file.write(array.data if array.size else b"")
        self.rows += len(array)

    def close(self) -> None:
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(self._header(self.rows))
            self._file.close()


class DatasetWriter:
    """Writes one data set; use as a context manager, then nothing half-written stays behind.

    Parameters
    ----------
    folder:
        The folder to create. It must not exist unless ``overwrite`` is set.
    name, fields, cardinalities, dense:
        Name of the data set, names and sizes of the categorical fields [F], names of the numeric features [K].
    source:
        JSON-able provenance (files, checksums, generator settings, rows read and rejected).
    extra:
        Further entries of ``meta.json``, for example ``{"ceiling": {"auc_test": 0.80}}``.

    Raises
    ------
    DataError
        If the folder exists, or ids, shapes or labels do not fit.
    """

    def __init__(self, folder, *, name, fields, cardinalities, dense=(), source=None, extra=None, overwrite=False):
        self.folder = Path(folder)
        if self.folder.exists() and not overwrite:
            raise DataError(f"{self.folder} exists; choose another folder or pass overwrite=True (--overwrite)")
        if len(fields) != len(cardinalities):
            raise DataError(f"{len(fields)} field names for {len(cardinalities)} cardinalities")
        self.meta = dict(
            format=FORMAT, name=name, fields=list(fields), cardinalities=[int(c) for c in cardinalities],
            dense=list(dense), source=source or {}, **(extra or {}),
        )
        self._sizes = np.asarray(self.meta["cardinalities"], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        self._counts = np.zeros(self._offsets[-1], dtype=np.int64)
        # one hash per file, so that the fingerprint does not depend on how rows are cut into appends
        self._hashes = {(split, kind): hashlib.sha256() for split in SPLITS for kind in _KINDS}
        self._temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        self._positives = dict.fromkeys(SPLITS, 0)
        self._streams: dict[tuple[str, str], NpyStream] = {}

    def __enter__(self):
        shutil.rmtree(self._temporary, ignore_errors=True)
        widths = {"ids": len(self.meta["fields"]), "dense": len(self.meta["dense"]), "label": None}
        try:
            for split in SPLITS:
                (self._temporary / split).mkdir(parents=True)
                for kind, dtype in _KINDS.items():
                    self._streams[split, kind] = NpyStream(self._temporary / split / f"{kind}.npy", dtype, widths[kind])
        except BaseException:                        # a full disk: __exit__ is not called for what fails here
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        return self

    def append(self, split: str, ids, dense, label) -> None:
        """Append rows to a split: ids [N, F], dense [N, K] (or None), label [N]."""
        ids, label = np.asarray(ids), np.asarray(label)
        dense = np.zeros((len(ids), 0), np.float32) if dense is None else np.asarray(dense)
        if not len(ids) == len(dense) == len(label):
            raise DataError(f"{split}: {len(ids)} rows of ids, {len(dense)} of dense values, {len(label)} labels")
        bad = (ids < 0) | (ids >= self._sizes)
        if bad.any():
            row, field = np.argwhere(bad)[0]
            raise DataError(f"{split}: id {ids[row, field]} in field {self.meta['fields'][field]!r}, expected "
                            f"0 <= id < {self._sizes[field]}")
        if ((label != 0) & (label != 1)).any():
            raise DataError(f"{split}: label {label[(label != 0) & (label != 1)][0]!r}, expected 0 or 1")
        if split == "train":
            for field, column in enumerate(ids.T):
                start = self._offsets[field]
                if self._sizes[field] > 4 * len(ids):        # sorting a few ids beats an array of the field's size
                    unique, occurrences = np.unique(column, return_counts=True)
                    self._counts[start + unique] += occurrences
                else:
                    part = np.bincount(column)
                    self._counts[start:start + len(part)] += part
        for kind, array in (("ids", ids), ("dense", dense), ("label", label)):
            array = np.ascontiguousarray(array, dtype=_KINDS[kind])
            self._streams[split, kind].append(array)
            self._hashes[split, kind].update(array.data if array.size else b"")
        self._positives[split] += int(label.sum())

    def __exit__(self, kind, error, trace):
        try:
            for stream in self._streams.values():
                stream.close()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)      # gone already where all went well

    def _finish(self) -> None:
        from .. import __version__

        rows = {split: self._streams[split, "label"].rows for split in SPLITS}
        np.save(self._temporary / "counts.npy", self._counts)
        self.meta |= dict(
            rows=rows,
            base_rate={s: self._positives[s] / rows[s] if rows[s] else None for s in SPLITS},
            fingerprint=self._fingerprint(), version=__version__,
        )
        (self._temporary / "meta.json").write_text(json.dumps(self.meta, indent=1) + "\n")
        if self.folder.exists():                     # overwrite=True: the old folder goes only now
            old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
            self.folder.rename(old)
            self._temporary.rename(self.folder)
            shutil.rmtree(old)
        else:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.rename(self.folder)


    def _fingerprint(self) -> str:
        """16 hexadecimal digits that follow from field sizes and all rows."""
        files = [[split, kind, digest.hexdigest()] for (split, kind), digest in self._hashes.items()]
        whole = json.dumps([self.meta["fields"], self.meta["cardinalities"], self.meta["dense"], files])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Rows of one split as memory maps: ids int32 [N, F], dense float32 [N, K], label uint8 [N]."""

    ids: np.ndarray
    dense: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


def read_meta(folder: Path, form, kind: str, command: str) -> dict:
    """``meta.json`` of a folder that ``ecstudy <command>`` made; DataError if there is none of this ``form``."""
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no prepared {kind} (no meta.json); prepare one with `ecstudy {command}`")
    meta = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("format") != form:
        raise DataError(f"{path}: format {meta.get('format')!r}, expected {form!r}; prepare the {kind} again")
    return meta


@dataclass(frozen=True)
class Dataset:
    """A prepared data set, opened without reading its rows. ``Dataset.open(folder)``."""

    folder: Path
    meta: dict

    @classmethod
    def open(cls, folder) -> "Dataset":
        folder = Path(folder)
        return cls(folder, read_meta(folder, FORMAT, "data set", "prep"))

    name = property(lambda self: self.meta["name"])
    fields = property(lambda self: self.meta["fields"])
    cardinalities = property(lambda self: self.meta["cardinalities"])
    dense = property(lambda self: self.meta["dense"])
    rows = property(lambda self: self.meta["rows"])
    fingerprint = property(lambda self: self.meta["fingerprint"])

    @cached_property
    def counts(self) -> np.ndarray:
        """Training occurrences of each id, int64 [n], fields one after the other."""
        return np.load(self.folder / "counts.npy", mmap_mode="r", allow_pickle=False)

    def split(self, name: str) -> Split:
        if name not in SPLITS:
            raise DataError(f"split {name!r}, expected one of {', '.join(SPLITS)}")
        folder = self.folder / name
        return Split(*(np.load(folder / f"{kind}.npy", mmap_mode="r", allow_pickle=False) for kind in _KINDS))
