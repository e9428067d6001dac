"""Which rows train, validate and test: the paper's rules and the usual ones. Splits are numbered as in the layout."""
from __future__ import annotations

import math

import numpy as np

from .layout import SPLITS

TRAIN, VALID, TEST = range(len(SPLITS))


def criteo_split(rows: int, times=None) -> np.ndarray:
    """Split of each row, uint8 [rows] (0 train, 1 valid, 2 test): the last floor(rows / 7) rows, cut in two.

    With the challenge's 45,840,617 rows this gives the paper's 39,291,958 / 3,274,330 (test) / 3,274,329 (valid).
    """
    return _last_rows(rows, np.arange(rows - rows // 7, rows))


def avazu_split(rows: int, hours: np.ndarray) -> np.ndarray:
    """Split of each row, uint8 [rows]: the rows whose ``hours`` (YYMMDDHH) lie in the last day, cut in two."""
    days = np.asarray(hours, np.int64) // 100
    return _last_rows(rows, np.flatnonzero(days == days.max()))


def _last_rows(rows: int, last: np.ndarray) -> np.ndarray:
    """The first half (rounded up) of the ``last`` rows tests, the second half validates, the others train."""
    splits = np.full(rows, TRAIN, np.uint8)
    half = math.ceil(len(last) / 2)
    splits[last[:half]], splits[last[half:]] = TEST, VALID
    return splits


def fraction_split(rows: int, fractions, seed: int | None = None) -> np.ndarray:
    """Split of each row, uint8 [rows]: train, valid, test in this order, or shuffled with a ``seed``."""
    cuts = np.round(np.cumsum(fractions) * rows).astype(np.int64)[:2]
    splits = np.full(rows, TEST, np.uint8)
    splits[:cuts[1]] = VALID
    splits[:cuts[0]] = TRAIN
    if seed is not None:
        np.random.default_rng(seed).shuffle(splits)
    return splits
