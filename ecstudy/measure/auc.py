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


def components(label, score) -> np.ndarray:
    """DeLong's structural components: the share of the other class that each row beats (positives) or is beaten by
    (negatives), ties one half, float64 [N]. Their mean over either class is the AUC. Raises as :func:`auc`.

    AUC is linear in them: those of a difference of models, or of a mean over seeds, are the difference or the mean.
    """
    label, score = checked(label, score)
    _classes(label)
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


def delong_covariance(label, scores) -> tuple[np.ndarray, np.ndarray]:
    """AUCs [M] of M models on the same rows and DeLong's covariance of them [M, M]: label [N], scores [M, N].

    Needs two rows of each class; raises as :func:`auc`.
    """
    parts = np.stack([components(label, score) for score in _models(scores)])
    label, _ = checked(label, parts[0])
    p, n = _classes(label, least=2)
    of_positives, of_negatives = parts[:, label], parts[:, ~label]
    covariance = np.atleast_2d(np.cov(of_positives)) / p + np.atleast_2d(np.cov(of_negatives)) / n
    return of_positives.mean(axis=1), covariance


def delong_paired(label, score_a, score_b) -> Paired:
    """Compare two models on the same rows: label [N], score_a and score_b [N], or [S, N] for S seeds of each.

    With seeds, components are averaged over them: the difference is that of the mean AUCs, and its standard error is
    what another sample of test rows would change with these very S trainings of each; the seeds' own scatter is not in
    it. Needs two rows of each class. When the standard error is 0 (equal rankings) p is 1 for no difference and 0
    otherwise. Raises as :func:`auc`.
    """
    score_a, score_b = _models(score_a), _models(score_b)
    if len(score_a) != len(score_b):
        raise ValueError(f"scores of {len(score_a)} and {len(score_b)} seeds, expected as many of each")
    return paired(label, sum(components(label, a) - components(label, b)           # linear: no covariance needed
                             for a, b in zip(score_a, score_b)) / len(score_a))


def paired(label, gap) -> Paired:
    """As :func:`delong_paired`, from differences of :func:`components` ``gap`` [N] (of two models, or a mean of them).
    """
    label, gap = checked(label, gap)
    p, n = _classes(label, least=2)
    difference = float(gap[label].mean())
    se = math.sqrt(gap[label].var(ddof=1) / p + gap[~label].var(ddof=1) / n)
    if se < 1e-15:
        return Paired(difference, 0.0, float(abs(difference) < 1e-12))
    return Paired(difference, se, math.erfc(abs(difference) / se / math.sqrt(2)))


def _models(scores) -> list:
    """One entry per model from [N] or [M, N]."""
    scores = list(scores) if np.ndim(scores[0]) else [scores]
    if not len(scores):
        raise ValueError("no scores, expected those of at least one model")
    return scores


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
