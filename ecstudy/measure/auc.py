"""Exact area under the ROC curve, its interval, and the paired comparison of two models on the same rows.

One sort, no bins: rows of equal score form a group, and a tie between a positive and a negative counts one half.
Variances follow DeLong, DeLong and Clarke-Pearson (Biometrics 1988), computed from ranks in O(n log n) as in
Sun and Xu (IEEE Signal Processing Letters 2014). Inputs are arrays or tensors on any device, one entry per row.
"""
from __future__ import annotations

import math
import time
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch


class Diverged(ValueError):
    """Predictions that are not numbers. The paper's code counts them as 0; here the run is marked as diverged."""


class Paired(NamedTuple):
    """``auc(a) - auc(b)``, its standard error, and the two-sided p of no difference."""

    difference: float
    se: float
    p: float


def checked(label, score) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool [N] and scores as float32 or float64 [N] on the host.

    Raises ValueError for empty input, differing lengths or labels other than 0 and 1, and Diverged for scores that
    are NaN or infinite.
    """
    label, score = _host(label).ravel(), _host(score).ravel()
    if len(label) != len(score) or not len(label):
        raise ValueError(f"{len(label)} labels for {len(score)} predictions, expected one of each per row")
    if label.dtype != bool:
        if (bad := (label != 0) & (label != 1)).any():
            raise ValueError(f"label {label[bad][0]} in row {np.flatnonzero(bad)[0]}, expected 0 or 1")
        label = label == 1
    if score.dtype not in (np.float32, np.float64):
        score = score.astype(np.float32 if score.dtype == np.float16 else np.float64)
    if bad := len(score) - np.isfinite(score).sum():
        raise Diverged(f"{bad} of {len(score)} predictions are NaN or infinite: the model diverged, "
                       "lower the learning rate")
    return label, score


def _host(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu")
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _classes(label: np.ndarray, least: int = 1) -> tuple[int, int]:
    """Numbers of positives and negatives; ValueError if either is below ``least``."""
    positives = int(np.count_nonzero(label))
    negatives = len(label) - positives
    if min(positives, negatives) < least:
        raise ValueError(f"{positives} positive and {negatives} negative labels, expected at least {least} of each")
    return positives, negatives


def _groups(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives at each distinct score, int64 [G] each, by ascending score."""
    if score.dtype == np.float32:                          # score and label in one integer: a plain sort, no indices
        key = (score + np.float32(0)).view(np.int32).astype(np.int64)      # + 0 turns -0.0 into 0.0
        key ^= (key >> 31) & 0x7FFFFFFF                    # integers in the order of the floats
        key <<= 1
        key |= label
        key.sort()
        label = key & 1
        key >>= 1
    else:
        order = np.argsort(score)
        key, label = score[order], label[order]
    last = np.flatnonzero(np.append(key[1:] != key[:-1], True))            # last row of each group
    positives = np.diff(np.cumsum(label, dtype=np.int64)[last], prepend=0)
    return positives, np.diff(last, prepend=-1) - positives


def auc(label, score) -> float:
    """Area under the ROC curve: label [N] in {0, 1}, score [N], larger means more likely 1.

    Raises Diverged if scores are NaN or infinite, ValueError if a class is missing or shapes differ.
    """
    label, score = checked(label, score)
    total = _classes(label)
    positives, negatives = _groups(label, score)
    twice = int(np.dot(positives, 2 * np.cumsum(negatives) - negatives))   # exact: integers below 2^63
    return twice / (2 * total[0] * total[1])


def auc_interval(label, score, level: float = 0.95) -> tuple[float, float, float]:
    """AUC with its DeLong interval at ``level``, clipped to [0, 1]: (auc, low, high).

    The interval covers the sampling of the test rows, not the seed of the training. It has width 0 when all
    scores are equal or separate the classes. Needs two rows of each class; raises as :func:`auc`.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}, expected between 0 and 1, for example 0.95")
    label, score = checked(label, score)
    p, n = _classes(label, least=2)
    positives, negatives = _groups(label, score)
    below = (np.cumsum(negatives) - negatives / 2) / n                     # share of negatives a positive beats
    above = (p - np.cumsum(positives) + positives / 2) / p                 # share of positives that beat a negative
    area = float(np.dot(positives, below) / p)
    variance = (np.dot(positives, (below - area) ** 2) / (p - 1) / p
                + np.dot(negatives, (above - area) ** 2) / (n - 1) / n)
    reach = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(variance)
    return area, max(0.0, area - reach), min(1.0, area + reach)


def _placements(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Share of the other class that each row beats (positives) or is beaten by (negatives), float64 [N]."""
    order = np.argsort(score)
    ranked, hit = score[order], label[order]
    first = np.append(True, ranked[1:] != ranked[:-1])
    group = np.cumsum(first) - 1
    positives = np.bincount(group, weights=hit)
    negatives = np.bincount(group) - positives
    below = (np.cumsum(negatives) - negatives / 2) / negatives.sum()
    above = 1 - (np.cumsum(positives) - positives / 2) / positives.sum()
    values = np.empty(len(score))
    values[order] = np.where(hit, below[group], above[group])
    return values


def delong_paired(label, score_a, score_b) -> Paired:
    """Compare two models on the same rows: label, score_a, score_b, each [N]. Needs two rows of each class.

    When the standard error is 0 (equal rankings) p is 1 for no difference and 0 otherwise. Raises as :func:`auc`.
    """
    label, score_a = checked(label, score_a)
    _, score_b = checked(label, score_b)
    p, n = _classes(label, least=2)
    gap = _placements(label, score_a) - _placements(label, score_b)        # linear: no covariance needed
    difference = float(gap[label].mean())
    se = math.sqrt(gap[label].var(ddof=1) / p + gap[~label].var(ddof=1) / n)
    if se < 1e-15:
        return Paired(difference, 0.0, float(abs(difference) < 1e-12))
    return Paired(difference, se, math.erfc(abs(difference) / se / math.sqrt(2)))


def benchmark(rows: int = 4_000_000, repeats: int = 3) -> dict[str, float]:
    """Best milliseconds of each function and of scikit-learn on ``rows`` random float32 predictions.

    ``python -c "from ecstudy.measure.auc import benchmark; print(benchmark())"``
    """
    from ..extras import need

    random = np.random.default_rng(0)
    score = random.normal(size=rows).astype(np.float32)
    label = random.random(rows) < 1 / (1 + np.exp(1 - score))
    calls = {"auc": auc, "auc_interval": auc_interval, "delong_paired": lambda y, s: delong_paired(y, s, s[::-1]),
             "scikit-learn": need("sklearn.metrics", "book").roc_auc_score}
    best = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):                               # in turn, so that the ratios are fair
        for name, call in calls.items():
            start = time.perf_counter()
            call(label, score)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best
