"""Where rows live: one JSON file per run in the cache, and CSV files for what is published.

* ``runs/rows/<run_id>.json`` is written whole or not at all (temporary name, then rename).
* ``runs/logits/<run_id>.npy`` holds the run's test logits, so that comparisons over test rows can be made later.
* ``runs/traces/<run_id>.csv`` tells what happened on the way, of runs that keep it (:mod:`.stream`).
* ``runs/rag/<run_id>.npz`` holds what a run of retrieval found for each question (:func:`ecstudy.rag.run.found`).
* ``results/*.csv`` are the committed rows.

A run that is in both is read from the cache, because it was measured here; but a failed row never hides a good one.
One run may serve several sections: its ``section`` then reads ``dlrm+model_impact``.
"""
from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import socket
from pathlib import Path

import numpy as np
import pandas as pd

from .. import paths
from . import row as rows_of

SORT = ["task", "section", "dataset", "model", "dim", "method", "spec", "budget", "seed", "lr", "batch", "run_id"]


def _folder() -> Path:
    return paths.runs() / "rows"


@contextlib.contextmanager
def _whole(path: Path, binary: bool = False):
    """A file that appears under its name only when complete; of text unless ``binary``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") if binary else open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- rows, one by one -----------------------------------------------------------------------------------------------

def write(row: dict, **more) -> dict:
    """Put a whole row (``row.complete``) into the cache; it keeps the sections it already served.

    ``more`` (a traceback, say) goes into the file beside the row and into no table.
    """
    if before := cached(row["run_id"]):
        row = row | {"section": _join(before["section"], row["section"])}
    with _whole(_folder() / f"{row['run_id']}.json") as file:
        json.dump(row | more, file, indent=1, allow_nan=False)
    return row


def cached(run_id: str) -> dict | None:
    """The row of a run in the cache, or None."""
    try:
        text = (_folder() / f"{run_id}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return json.loads(text)


def adopt(row: dict, **more) -> bool:
    """Put a row that was measured elsewhere into the cache, unless what is here is as new or better; whether it was.

    A newer row replaces an older one, a measured one a failed one, and a failed one never a measured one. Whichever
    stays serves the sections of both.
    """
    here = cached(row["run_id"])
    if here is not None:
        rank = [(r["status"] != "failed", r["created"]) for r in (here, row)]
        if rank[1] <= rank[0]:
            if (section := _join(here["section"], row["section"])) != here["section"]:
                write(here | {"section": section})
            return False
    write(row, **more)
    return True


# what a run may leave beside its row in ``runs``: test logits, its trace, what was found for each question
_BESIDE = ("logits/{}.npy", "traces/{}.csv", "rag/{}.npz")


def merge(folder: str | Path) -> dict[str, int]:
    """Adopt the rows of another machine and what lies beside them; how many are ``new``, ``better`` and ``kept``.

    ``folder`` is the other machine's ``ECSTUDY_HOME`` (its checkout), the ``runs`` in it, or the ``rows`` in that.
    Merging again does nothing. All files are read before the first is written.

    Raises
    ------
    CellError
        If there are no rows, or for a file that is none, naming it.
    """
    folder = Path(folder).expanduser()
    found = next((f for f in (folder / "runs" / "rows", folder / "rows", folder) if any(f.glob("*.json"))), None)
    if found is None:
        raise rows_of.CellError(f"{folder}: no rows there; expected a folder with runs/rows/*.json, the ECSTUDY_HOME "
                                "of another machine")
    others = []
    for path in sorted(found.glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if row["run_id"] != path.stem or row["status"] not in rows_of.STATUSES or not row["created"]:
                raise ValueError("its run_id is not its name, or it has no status or time")
            more = {k: row[k] for k in ("traceback",) if k in row}
            others.append((rows_of.plain(row), more))
        except (ValueError, KeyError, TypeError) as error:
            raise rows_of.CellError(f"{path}: not a row: {type(error).__name__}: {error}") from None
    count = dict(new=0, better=0, kept=0)
    for row, more in others:
        before = cached(row["run_id"])
        taken = adopt(row, **more)
        count["kept" if not taken else "better" if before else "new"] += 1
        # a row that came back from a worker's machine before is the same one, and left its logits there
        same = before is not None and before["created"] == row["created"]
        for name in (form.format(row["run_id"]) for form in _BESIDE):
            here, theirs = paths.runs() / name, found.parent / name
            if (taken or same and not here.exists()) and theirs.is_file():
                with _whole(here, binary=True) as file:
                    file.write(theirs.read_bytes())
    return count


def add_section(row: dict, section: str) -> dict:
    """Note that a row that is there already serves one more section."""
    return row if section in row["section"].split("+") else write(row | {"section": _join(row["section"], section)})


def _join(*sections: str) -> str:
    return "+".join(dict.fromkeys(s for text in sections for s in text.split("+") if s))


def read_csv(path: str | Path) -> list[dict]:
    """Rows of a published CSV. Raises CellError naming the file for other columns, no ids or unreadable values."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        wrong = [name for name in reader.fieldnames or () if name not in rows_of.COLUMNS]
        if wrong or "run_id" not in (reader.fieldnames or ()):
            raise rows_of.CellError(f"{path}: not a file of published rows: "
                                    + (f"unknown column {wrong[0]!r}" if wrong else "no column run_id"))
        try:
            return [rows_of.plain(row) for row in reader]
        except ValueError as error:
            raise rows_of.CellError(f"{path}, line {reader.line_num}: {error}") from None


@functools.lru_cache(maxsize=32)
def _published(path: Path, changed: int, size: int) -> list[dict]:
    """Rows of one file of results, read again when it changes; none if it is a table of another shape."""
    with open(path, encoding="utf-8") as file:
        if "run_id" not in file.readline().strip().split(","):
            return []
    return read_csv(path)


def rows() -> dict[str, dict]:
    """All rows by run id, published and cached."""
    merged: dict[str, dict] = {}

    def add(row):
        before = merged.get(row["run_id"], row)
        older = published and row["created"] < before["created"]         # a run may stand in the files of two sections
        better = before if row["status"] == "failed" or older else row
        merged[row["run_id"]] = better | {"section": _join(before["section"], row["section"])}

    published = True
    for path in sorted(paths.results().glob("*.csv")):
        found = path.stat()
        for row in _published(path, found.st_mtime_ns, found.st_size):
            add(row)
    published = False
    for path in sorted(_folder().glob("*.json")):
        add(json.loads(path.read_text(encoding="utf-8")))
    return merged


# -- test logits: a cache that only widens what can be compared -----------------------------------------------------

def write_logits(run_id: str, logits) -> Path:
    """Keep the test logits [N] of a run, in the order of the test split, as float32.

    Float32 is what the model puts out, so AUC stays exact. Half precision would halve the 4 bytes a row, but ties
    logits that differ: AUC moves by 2e-6 (normal scores, 14 thousand rows), more than the sixth digit that rows keep.
    """
    path = _logits(run_id)
    with _whole(path, binary=True) as file:
        np.save(file, np.asarray(logits, dtype=np.float32).ravel(), allow_pickle=False)
    return path


def logits(run_id: str) -> np.ndarray | None:
    """Test logits float32 [N] of a run, or None if none were kept. A file that is no array counts as none."""
    try:
        found = np.load(_logits(run_id), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.ndarray) and found.ndim == 1 else None


def _logits(run_id: str) -> Path:
    return paths.runs() / "logits" / f"{run_id}.npy"


# -- rows as tables --------------------------------------------------------------------------------------------------

def results(section: str | None = None, **filters) -> pd.DataFrame:
    """One row per run, published and cached, failed ones included (``status="ok"`` leaves the measured).

    Parameters
    ----------
    section:
        Only rows that serve this section; the column ``section`` then holds this name alone.
    filters:
        Column = value, or a list of values; ``budget=None`` asks for rows without a budget.

    Raises
    ------
    CellError
        For a column that does not exist.
    """
    return select(rows_of.frame(rows().values()), section, **filters)


def select(table: pd.DataFrame, section: str | None = None, **filters) -> pd.DataFrame:
    """The rows of a table that serve a section and match the filters, in the order of publication."""
    if section is not None:
        serves = np.array([section in text.split("+") for text in table["section"]], dtype=bool)
        table = table[serves].assign(section=section)
    for name, wanted in filters.items():
        rows_of.known("column", name, rows_of.COLUMNS)
        wanted = list(wanted) if isinstance(wanted, (list, tuple, set, pd.Series, np.ndarray)) else [wanted]
        if name in rows_of.TEXT:
            keep = table[name].isin(wanted)
        else:
            numbers = np.array([np.nan if w is None else float(w) for w in wanted])
            keep = np.isclose(table[name].to_numpy(float)[:, None], numbers, rtol=1e-9, atol=0, equal_nan=True).any(1)
        table = table[keep]
    # Budgets fall as in the paper's tables; rows without one (Full) come first.
    return table.sort_values(SORT, ascending=[c != "budget" for c in SORT], na_position="first", ignore_index=True)


def publish(section: str | None = None, path: str | Path | None = None, **filters) -> Path:
    """Write the selected cached rows into a CSV of results, beside the rows that are already there.

    A run in both is replaced by the cached row. Failed rows stay in the cache. Measures keep six digits; budgets,
    learning rates, bytes and steps are exact. Without a path the file is ``results/<section>.csv``.

    Raises
    ------
    CellError
        If neither section nor path is given, or there is nothing to publish.
    """
    if section is None and path is None:
        raise rows_of.CellError("nothing says where to publish: give a section or a path")
    path = Path(path) if path is not None else paths.results() / f"{section}.csv"
    here = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(_folder().glob("*.json"))]
    chosen = select(rows_of.frame(here), section, **filters)
    chosen = chosen[chosen["status"] != "failed"]
    if chosen.empty:
        raise rows_of.CellError("no cached row matches: nothing to publish")
    merged = {r["run_id"]: r for r in (read_csv(path) if path.is_file() else [])}
    merged |= {r["run_id"]: r for r in chosen.to_dict("records")}
    write_csv(select(rows_of.frame(merged.values())), path)
    return path


def write_csv(table: pd.DataFrame, file) -> None:
    """Write a table of rows as CSV to a path (whole or not at all) or an open file."""
    if isinstance(file, (str, Path)):
        with _whole(Path(file)) as opened:
            return write_csv(table, opened)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows_of.COLUMNS)
    for row in table.to_dict("records"):
        writer.writerow([_text(name, row[name]) for name in rows_of.COLUMNS])


def _text(name: str, value) -> str:
    if name in rows_of.TEXT or name in rows_of.WHOLE or name in rows_of.FLAGS:
        return str(value)
    if value is None or np.isnan(value):
        return ""
    return f"{value:.15g}" if name in rows_of.EXACT else f"{value:.6g}"


# -- claims ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def claim(run_id: str):
    """Hold a run so that no other process does it at the same time; yields whether it is ours.

    The claim is a lock of the operating system on ``runs/claims/<run_id>``: when its holder dies, however it dies, the
    system lets go of it, so a stale claim cannot exist, and taking one over cannot race.
    """
    path = paths.runs() / "claims" / run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path)
    if file is None:
        yield False
        return
    try:
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield True
    finally:
        _unlock(path, file)


def holder(run_id: str) -> str:
    """Who holds a claim, for messages: ``process 123 on host``."""
    try:
        pid, host = (paths.runs() / "claims" / run_id).read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def _lock(path: Path):
    while True:
        file = open(path, "a+", encoding="utf-8")
        if not _try_lock(file):
            file.close()
            return None
        try:                                     # the holder before us removed the file between our open and our lock?
            if os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        file.close()


def _unlock(path: Path, file) -> None:
    if os.name == "nt":                          # an open file cannot be removed there
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        path.unlink(missing_ok=True)
        file.close()


def _try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
