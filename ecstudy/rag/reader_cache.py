"""What a reader said about (question, passage) pairs, kept on disk.

A pair's answer does not depend on how the passages were compressed: a further method only reads pairs that no search
found before. One file per reader (an SQLite database: writes are whole or not there, several processes may share it).
"""
from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Sequence

import numpy as np

LIMIT = 5_000_000                     # pairs kept, about 350 MB; the paper's grid on 8,000 questions reads well below
ASKED = 900                           # keys per query, below the least limit of variables SQLite is built with


def pair_keys(questions: Sequence[str], passages: Sequence[str]) -> list[bytes]:
    """16 bytes for each pair of texts; equal texts have equal keys, in any corpus."""
    known: dict[str, bytes] = {}

    def digest(text: str) -> bytes:
        if text not in known:
            known[text] = hashlib.blake2b(text.encode(), digest_size=32).digest()
        return known[text]

    return [hashlib.blake2b(digest(q) + digest(p), digest_size=16).digest() for q, p in zip(questions, passages)]


class SpanCache:
    """Spans by key: character offsets and a score.

    Parameters
    ----------
    path:
        The file, made if absent; ``":memory:"`` keeps nothing.
    limit:
        Pairs kept at most; the oldest are dropped first.

    Raises
    ------
    ValueError
        If the file is something else, or ``limit`` is below 1.
    """

    def __init__(self, path: str | Path, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit={limit}: expected room for at least one pair")
        self.path, self.limit = str(path), limit
        if self.path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=60)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")              # readers do not wait for a writer
            self._db.execute("CREATE TABLE IF NOT EXISTS spans (age INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, "
                             "first INTEGER NOT NULL, last INTEGER NOT NULL, score REAL NOT NULL)")
            self._db.execute("SELECT key, first, last, score FROM spans LIMIT 1")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"{path}: expected a reader's cache ({error}); remove the file") from None

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM spans").fetchone()[0]

    def get(self, keys: Sequence[bytes]) -> dict[bytes, tuple[int, int, float]]:
        """What is known of ``keys``: key -> (first character, one past the last, score)."""
        found = {}
        for start in range(0, len(keys), ASKED):
            part = keys[start:start + ASKED]
            marks = ",".join("?" * len(part))
            for key, *span in self._db.execute(f"SELECT key, first, last, score FROM spans WHERE key IN ({marks})",
                                               part):
                found[key] = tuple(span)
        return found

    def put(self, keys: Sequence[bytes], first: np.ndarray, last: np.ndarray, score: np.ndarray) -> None:
        """Keep spans of pairs, all or none of them; what is there already stays."""
        rows = zip(keys, first.tolist(), last.tolist(), score.tolist())
        with self._db:
            self._db.executemany("INSERT OR IGNORE INTO spans (key, first, last, score) VALUES (?, ?, ?, ?)", rows)
            if (over := len(self) - self.limit) > 0:
                self._db.execute("DELETE FROM spans WHERE age IN (SELECT age FROM spans ORDER BY age LIMIT ?)", (over,))

    def close(self) -> None:
        self._db.close()
