"""Click logs with a known answer: a seeded, streaming generator of Criteo-like and Avazu-like data.

A row is a function of (settings, row index) alone: chunks of any size, slices and machines give the same rows, and
nothing of table size is held. Random numbers are splitmix64 hashes of a counter; ids and popularity use integer
arithmetic and IEEE basic operations only, so they do not depend on a mathematics library or a device.

Ids
    Rank k of a field has probability ``((k+1)^e - k^e) / ((n+1)^e - 1)``, k = 1..n, ``e = 1 - exponent``: Zipf's law in
    closed form, sampled through 8,192 knots of its inverse. Small fields have the exponent measured on real rows. In
    the large ones a fifth of the draws are uniform (accidental ids), and their common exponent is solved from
    (cardinalities, rows), so that 83 % of all ids occur fewer than 5 times in the training split of a log with
    ``scale`` times the true number of rows; the top 10 % of ids then hold about 94.5 % of occurrences (Criteo; the
    exponent comes out near the 0.95-1.0 measured on real rows) or 97.7 % (Avazu, where 20 of 22 fields lie in 0.4 %
    of the ids). A Feistel network over the two digits of a rank maps ranks to ids one to one, so the order of ids
    says nothing about their frequency.
Labels
    A planted teacher: logit = effects of ids + products of latent vectors between a few fields + smooth functions of
    the numeric features. Each id belongs to one of 64 clusters of its field by hash; its effect is the cluster's plus
    its own residual, so similar ids exist for methods that share or cluster vectors. Scale and intercept are solved
    for the target AUC and base rate. As the true probabilities are known, so is the ceiling: the AUC of the teacher.

Sources: cardinalities and rows from the paper (:mod:`ecstudy.data.cardinalities`); base rates 0.256 and 0.170 are those
of the two public logs; missing shares, quantiles and exponents of Criteo are aggregates measured on a uniform 0.3 %
sample (137,139 rows) of the Criteo Kaggle log. Avazu's exponents and the teacher are chosen, not measured.
"""
from __future__ import annotations

import hashlib
import math
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import paths
from .cardinalities import FIELDS, ROWS
from .layout import DataError, Dataset, DatasetWriter
from .prepare_read import Progress

VERSION = 1             # of the rows: raise it when the same settings would give other rows
BLOCK = 8_192           # rows worked on at once: every array of a block stays in the L2 cache
FLOOR = 32              # a scaled field keeps min(true cardinality, FLOOR) ids
CLUSTERS = 64           # clusters of ids per field
UNDER_5 = 0.83          # share of all ids with fewer than 5 training occurrences, solved for
TAIL = 0.2              # share of draws of a large field that are uniform over its ids
_KNOTS = 4_096
_DRIFT = "_drift"
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Shape:
    """What a generated log imitates. ``exponents``: one per field, None = solved (the large fields)."""

    fields: tuple[str, ...]
    cardinalities: tuple[int, ...]
    rows: int
    base_rate: float
    auc: float                                      # the teacher's AUC, the ceiling
    exponents: tuple[float | None, ...]
    missing: dict[tuple[str, ...], float]           # columns that are missing together -> share of rows
    dense: dict[str, tuple[int, ...]]               # numeric column -> its values at QUANTILES, missing left out
    pairs: int                                      # fields that interact, each with each
    shares: tuple[float, float, float] = (0.65, 0.25, 0.10)     # of the logit's variance: ids, products, numeric
    clock: str | None = None                        # a field that counts time, as Avazu's hour


QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)   # the last holds the 99.9 % quantile

_CRITEO = Shape(
    *FIELDS["criteo"], ROWS["criteo"], base_rate=0.256, auc=0.80, pairs=6,
    # fitted to the share of the ten most frequent ids (of the first, below 110 ids), missing left out
    exponents=(2.0, 1.03, None, None, 2.6, 1.76, 0.75, 2.3, 4.17, 1.07, 0.8, None, 0.8, 1.46, 0.77, None, 1.65, 0.92,
               1.52, 0.04, None, 2.15, 1.66, 1.11, 1.31, 1.06),
    missing={("I1", "I10"): 0.4509, ("I3",): 0.2134, ("I4", "I13"): 0.2145, ("I5",): 0.0263, ("I6",): 0.2227,
             ("I7", "I9", "I11"): 0.0428, ("I8",): 0.0005, ("I12",): 0.7652,
             ("C3", "C4", "C12", "C16", "C21", "C24"): 0.0345, ("C19", "C20", "C25", "C26"): 0.4418,
             ("C6",): 0.1218, ("C22",): 0.7613},
    dense={
        "I1": (0, 0, 0, 0, 0, 1, 1, 3, 4, 9, 39, 108),
        "I2": (0, 0, 0, 1, 1, 3, 9, 22, 56, 183, 2234, 3589),
        "I3": (0, 1, 2, 3, 4, 6, 9, 14, 23, 44, 216, 1165),
        "I4": (0, 1, 1, 2, 3, 4, 6, 8, 12, 18, 41, 62),
        "I5": (0, 11, 125, 835, 1460, 2796, 4487, 7644, 14093, 33560, 345908, 910477),
        "I6": (0, 1, 5, 11, 20, 32, 51, 79, 135, 278, 1323, 3700),
        "I7": (0, 0, 0, 1, 2, 3, 5, 9, 16, 34, 219, 780),
        "I8": (0, 0, 2, 3, 5, 7, 11, 16, 23, 34, 48, 49),
        "I9": (0, 2, 7, 14, 24, 39, 58, 88, 142, 265, 1003, 2568),
        "I10": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 3, 4),
        "I11": (0, 0, 0, 1, 1, 1, 2, 2, 3, 6, 26, 58),
        "I12": (0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 19, 64),
        "I13": (0, 1, 1, 2, 3, 4, 6, 8, 13, 20, 49, 119),
    },
)
_AVAZU = Shape(
    *FIELDS["avazu"], ROWS["avazu"], base_rate=0.170, auc=0.76, pairs=6, missing={}, dense={}, clock="hour",
    exponents=tuple(None if n > 100_000 else 1.0 for n in FIELDS["avazu"][1]), shares=(0.72, 0.28, 0.0),
)
_EASY = Shape(
    tuple(f"F{i}" for i in range(1, 9)), (20, 30, 50, 80, 150, 300, 700, 2_000), 200_000, base_rate=0.3, auc=0.85,
    exponents=(1.6,) * 8, missing={}, dense={}, pairs=3, shares=(0.97, 0.03, 0.0),
)
SHAPES = {"criteo": _CRITEO, "avazu": _AVAZU, "easy": _EASY}

#: data set -> (shape, rows). Cardinalities shrink with the rows, so the density of the true log is kept.
PRESETS = {
    "synthetic_easy": ("easy", 200_000),
    "synthetic_criteo_xs": ("criteo", 60_000), "synthetic_criteo_s": ("criteo", 150_000),
    "synthetic_criteo_m": ("criteo", 400_000), "synthetic_criteo_l": ("criteo", ROWS["criteo"]),
    "synthetic_avazu_xs": ("avazu", 60_000), "synthetic_avazu_s": ("avazu", 150_000),
    "synthetic_avazu_m": ("avazu", 400_000), "synthetic_avazu_l": ("avazu", ROWS["avazu"]),
}


# ---------------------------------------------------------------- numbers that are the same on every machine

def _key(*parts) -> int:
    """64 bits that name a random stream."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def _hash(key: int, counter: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014) at positions ``counter`` uint64 of the stream ``key``."""
    x = counter * _GOLDEN
    x += key
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


def _uniform(bits: np.ndarray) -> np.ndarray:
    return (bits >> 11) * 2.0**-53


def _normal(key: int, *shape: int) -> np.ndarray:
    """Nearly normal numbers, mean 0 and variance 1: sums of four 16-bit uniforms (Irwin-Hall)."""
    h = _hash(key, np.arange(math.prod(shape), dtype=np.uint64))
    total = sum((h >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    return ((total - 131_070.0) * (math.sqrt(3) / 65_536)).reshape(shape)


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm from + - * / alone (atanh series), so every machine gives the same bits."""
    m, k = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, k = np.where(low, 2 * m, m), k - low
    z = (m - 1) / (m + 1)
    square, power, total = z * z, z, np.zeros_like(z)
    for odd in range(1, 25, 2):
        total, power = total + power / odd, power * square
    return 2 * total + k * 0.6931471805599453


def _exp(x: np.ndarray) -> np.ndarray:
    """Exponential from + - * alone (Taylor series after halving the range)."""
    k = np.rint(x * 1.4426950408889634)
    r, total = x - k * 0.6931471805599453, np.ones_like(x)
    for n in range(15, 0, -1):
        total = 1 + total * r / n
    return np.ldexp(total, k.astype(np.int64))


class _Law:
    """Zipf's law over ranks 0..n-1: closed form, sampled by integer interpolation between knots of its inverse."""

    def __init__(self, n: int, exponent: float, tail: float = 0.0):
        self.n, self.tail = n, round(tail * 4_096)
        e = 1 - exponent
        e = e if abs(e) > 1e-3 else 1e-3            # the formula has a removable gap at exponent 1
        # even cells of probability, the last one divided again so that the rare ranks keep their shape
        u = np.arange(_KNOTS) / _KNOTS
        u = np.concatenate([u, u[-1] + (np.arange(_KNOTS) + 1) / _KNOTS**2])
        end = _exp(_log(np.array([n + 1.0])) * e) - 1
        x = _exp(_log(1 + u * end) / e) - 1
        knots = np.minimum(np.floor(x * 65_536), n * 65_536 - 1).astype(np.uint64)
        knots[0], knots[-1] = 0, n * 65_536 - 1     # 16 fractional bits
        self.knots = np.maximum.accumulate(knots)
        self.widths = np.diff(self.knots)

    def __call__(self, bits: np.ndarray) -> np.ndarray:
        """Random bits uint64 -> ranks uint64."""
        cell = (bits >> 52).view(np.int64)
        part = (bits >> 32) & 0xFFFFF
        last = np.flatnonzero(cell == _KNOTS - 1)
        if len(last):
            cell[last] += ((bits[last] >> 40) & 0xFFF).view(np.int64)
            part[last] = (bits[last] >> 20) & 0xFFFFF
        part *= self.widths[cell]
        part >>= 20
        part += self.knots[cell]
        part >>= 16
        if self.tail:                               # the low 12 bits decide; no other use reads them
            part = np.where((bits & 0xFFF) < self.tail, (bits >> 32) * self.n >> 32, part)
        return part


class Permutation:
    """A seeded bijection of 0..n-1 without a table of n: a Feistel network on x = high * a + low, a about sqrt(n).

    The grid a * b is slightly larger than n; a value that lands outside walks on until it is inside
    (Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, n: int, key: int):
        self.n, self.a = n, math.isqrt(max(n - 1, 0)) + 1
        self.b = -(-n // self.a)
        counter = np.arange(max(self.a, self.b), dtype=np.uint64)
        self.rounds = [
            (_hash(_key(key, "low", i), counter[:self.b]) % self.a,
             _hash(_key(key, "high", i), counter[:self.a]) % self.b)
            for i in range(2)
        ]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """uint64 -> uint64, the same shape [N]."""
        high = x // self.a
        low = x - high * self.a
        for to_low, to_high in self.rounds:
            low += to_low[high.view(np.int64)]
            np.minimum(low, low - self.a, out=low)              # mod a: a negative difference wraps far above
            high += to_high[low.view(np.int64)]
            np.minimum(high, high - self.b, out=high)
        high *= self.a
        high += low
        outside = np.flatnonzero(high >= self.n)
        if len(outside):
            high[outside] = self(high[outside])
        return high


def expected_auc(probability: np.ndarray) -> float:
    """AUC of the true probabilities [N] over all labels they could have drawn: each row is both classes in part."""
    positive = np.sort(probability)
    below = np.cumsum(1 - positive)
    return float((positive * (below - 0.5 * (1 - positive))).sum() / (positive.sum() * below[-1]))


# ---------------------------------------------------------------- the law of the large fields

def _expected_under_5(sizes, laws, rows: float) -> float:
    """Expected share of ids with fewer than 5 occurrences in ``rows`` rows (Poisson, ranks grouped geometrically)."""
    rare = 0.0
    for n, (exponent, tail) in zip(sizes, laws):
        edges = np.unique(np.rint(np.geomspace(1, n + 1, 400)))
        e = 1 - exponent if abs(1 - exponent) > 1e-3 else 1e-3
        width = np.diff(edges)
        mean = rows * ((1 - tail) * np.diff(edges**e) / ((n + 1.0)**e - 1) / width + tail / n)
        rare += (width * np.exp(-mean) * (1 + mean * (1 + mean / 2 * (1 + mean / 3 * (1 + mean / 4))))).sum()
    return rare / sum(sizes)


def _solve(function, low: float, high: float, steps: int = 40) -> float:
    """Zero of an increasing function by bisection."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


# ---------------------------------------------------------------- the log

class _Field:
    """One categorical field: who appears (popularity, permutation) and what it does (effects of ids)."""

    def __init__(self, name, n, law, group, clock, latent, log: "Synthetic"):
        self.name, self.n, self.group, self.clock, self.latent = name, n, group, clock, latent
        self.log, self.half = log, (n - (group is not None)) // 2
        self.draw, self.churn = log.key(name, "draw"), log.key(name, "churn")
        self.law = None if clock else _Law(n - (group is not None), *law)
        self.permute = Permutation(n, log.key(name, "permutation"))
        # a larger field says more: the variance of its effects grows with the root of its bits
        self.weight = 0.0 if clock else math.log2(1 + n) ** 0.25
        shared, self.own = math.sqrt(log.clusters), math.sqrt(1 - log.clusters)
        self.sets = [                                   # the second set is what the effects drift towards
            (log.key(name, "id", i), shared * _normal(log.key(name, "effect", i), CLUSTERS),
             shared * _normal(log.key(name, "latent", i), log.rank, CLUSTERS))
            for i in range(2 if log.drift else 1)
        ]

    def ids(self, index, time, absent) -> np.ndarray:
        """Rows uint64 [B] -> ids uint64 [B]."""
        if self.clock:
            return index * self.n // self.log.n_rows
        rank = self.law(_hash(self.draw, index))
        if self.log.drift and self.half:                # pairs of ids swap their popularity, once, at a random time
            pair = np.minimum(rank, rank - self.half)
            swap = (_uniform(_hash(self.churn, pair)) < self.log.drift * time) & (pair < self.half)
            rank = np.where(swap, np.where(rank < self.half, rank + self.half, pair), rank)
        if self.group is not None:                      # rank 0 is the value "missing", absent together with others
            rank += 1
            rank[absent[self.group]] = 0
        return self.permute(rank)

    def effects(self, ids, time):
        """Ids [B] -> effect [B] (variance 1 over ids) and latent vectors [rank, B] or None."""
        parts = []
        for key, effect, latent in self.sets:
            h = _hash(key, ids)
            cluster = (h & 63).view(np.int64)
            own = ((h >> 16) & 0xFFFF) + ((h >> 32) & 0xFFFF)
            own += h >> 48
            e = own * (self.own / 32_768)
            e += effect[cluster] - 98_302.5 * (self.own / 32_768)
            v = None
            if self.latent:
                v = latent[:, cluster]
                for j in range(len(v)):
                    v[j] += ((h >> (6 + j)) & 1) * (2 * self.own) - self.own
            parts.append((e, v))
        if len(parts) == 1:
            return parts[0]
        (e0, v0), (e1, v1) = parts
        late = self.log.drift * time
        norm = np.sqrt((1 - late) ** 2 + late**2)       # keeps the variance while turning
        near, far = (1 - late) / norm, late / norm
        return near * e0 + far * e1, None if v0 is None else near * v0 + far * v1


class Synthetic:
    """A generated click log; rows exist only when asked for.

    Parameters
    ----------
    preset:
        ``"criteo"``, ``"avazu"``, ``"easy"``, or a name in :data:`PRESETS`.
    rows:
        Rows of the whole log, default the preset's. Row order is time.
    scale:
        Factor of the true cardinalities, default ``rows / true rows`` (the density of the true log). With ``scale=1``
        and few rows the log is a sparse sample of the full one.
    seed:
        Ids, effects, rows and labels all follow it.
    skew:
        Multiplies the exponents of popularity: 1 as solved, 0 uniform.
    rank:
        Dimension of the latent vectors that interact, 0..10 (0: no interactions).
    clusters:
        Share of an id's effect that it has in common with its cluster, 0..1.
    drift:
        0..1: how far effects turn to other ones, and the share of ids that swap popularity with a rare id, by the last
        row. 0 is none.

    Raises
    ------
    DataError
        For a value out of its range.
    """

    def __init__(self, preset="criteo", *, rows=None, scale=None, seed=0, skew=1.0, rank=4, clusters=0.8, drift=0.0):
        shape_name, default_rows = PRESETS.get(preset, (preset, None))
        if shape_name not in SHAPES:
            raise DataError(f"preset {preset!r}, expected one of {', '.join([*SHAPES, *PRESETS])}")
        shape = SHAPES[shape_name]
        rows = default_rows or shape.rows if rows is None else rows
        scale = min(1.0, rows / shape.rows) if scale is None else scale
        for name, value, low, high in (("rows", rows, 28, 2**40), ("scale", scale, 0, 1), ("skew", skew, 0, 4),
                                       ("rank", rank, 0, 10), ("clusters", clusters, 0, 1), ("drift", drift, 0, 1)):
            if not low <= value <= high or (name == "scale" and not value):
                least = "0 <" if name == "scale" else f"{low} <="
                raise DataError(f"{name} {value!r}, expected {least} {name} <= {high}")
        for name, value in (("rows", rows), ("rank", rank), ("seed", seed)):
            if value != int(value):
                raise DataError(f"{name} {value!r}, expected a whole number")
        self.n_rows, self.seed, self.rank, self.clusters, self.drift = int(rows), int(seed), int(rank), clusters, drift
        self.fields, self.dense = list(shape.fields), list(shape.dense)
        self.cardinalities = [n if shape_name == "easy" else max(min(n, FLOOR), round(n * scale))
                              for n in shape.cardinalities]
        log_rows = shape.rows * scale * 6 / 7                   # training rows of the log this one is drawn from
        self.exponent = None
        if None in shape.exponents:
            laws = lambda s: [(s, TAIL) if e is None else (e, 0.0) for e in shape.exponents]
            self.exponent = round(_solve(
                lambda s: _expected_under_5(self.cardinalities, laws(s), log_rows) - UNDER_5, 0.3, 2.0, 16), 3)
        self.settings = dict(preset=shape_name, rows=self.n_rows, scale=scale, seed=self.seed, skew=skew,
                             rank=self.rank, clusters=clusters, drift=drift)
        # missing together: columns of one group share one draw per row
        self._groups = [(self.key("missing", *names), int(share * 2**64)) for names, share in shape.missing.items()]
        member = {name: g for g, names in enumerate(shape.missing) for name in names}
        order = [f for f in np.argsort(self.cardinalities, kind="stable") if self.fields[f] != shape.clock]
        latent = {int(order[i]) for i in np.linspace(0, len(order) - 1, shape.pairs + 2).round().astype(int)[1:-1]}
        self._fields = [
            _Field(name, n, ((self.exponent if e is None else e) * skew, TAIL if e is None else 0.0), member.get(name),
                   name == shape.clock, f in latent and rank > 0, self)
            for f, (name, n, e) in enumerate(zip(self.fields, self.cardinalities, shape.exponents))
        ]
        self._columns = [self._column(name, member.get(name), shape.dense[name]) for name in self.dense]
        self._label = self.key("label")
        self._calibrate(shape)

    def key(self, *parts) -> int:
        return _key("ecstudy", VERSION, self.seed, *parts)

    def _column(self, name, group, knots):
        """A numeric column as two tables of 1,024 even quantiles and "missing": its values and its effects."""
        x = np.interp((np.arange(1_024) + 0.5) / 1_024, QUANTILES, _log(1.0 + np.array(knots)))
        x = _log(np.rint(_exp(x)))                              # log(1 + count)
        z = (x - x.mean()) / x.std()
        linear, bent, absent = _normal(self.key(name, "numeric"), 3)
        effect = linear * z + 0.5 * bent * np.minimum(z * z - 1, 3)
        return self.key(name, "draw"), group, np.append(x, 0.0).astype(np.float32), np.append(effect, absent)

    def _parts(self, index):
        """Rows uint64 [B] -> ids [F] x uint64 [B], dense [K] x float32 [B], the three parts of the logit [3, B]."""
        time = index / self.n_rows
        absent = [_hash(key, index) < share for key, share in self._groups]
        parts = np.zeros((3, len(index)))
        total, square = np.zeros((2, self.rank, len(index)))
        ids = []
        for field in self._fields:
            ids.append(field.ids(index, time, absent))
            if field.weight:
                effect, vector = field.effects(ids[-1], time)
                effect *= field.weight
                parts[0] += effect
                if vector is not None:
                    total += vector
                    vector *= vector
                    square += vector
        total *= total
        total -= square
        for j in range(self.rank):                              # products of all pairs of interacting fields
            parts[1] += total[j]
        dense = []
        for key, group, values, effects in self._columns:
            cell = (_hash(key, index) >> 54).view(np.int64)
            if group is not None:
                cell[absent[group]] = 1_024
            dense.append(values[cell])
            parts[2] += effects[cell]
        return ids, dense, parts

    def _calibrate(self, shape):
        """Weights of the three parts and the intercept, from up to 32,768 rows spread over the log."""
        count = min(self.n_rows, 32_768)
        index = np.arange(count, dtype=np.uint64) * self.n_rows // count
        parts = np.concatenate([self._parts(index[i:i + BLOCK])[2] for i in range(0, count, BLOCK)], axis=1)
        spread = parts.std(axis=1)
        weights = np.where(spread > 0, np.sqrt(shape.shares) / np.maximum(spread, 1e-12), 0.0)
        logit = np.sort(weights @ parts)
        logit -= logit.mean()
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        intercept = lambda scale: _solve(lambda b: sigmoid(scale * logit + b).mean() - shape.base_rate, -12, 12, 30)
        scale = _solve(lambda s: expected_auc(sigmoid(s * logit + intercept(s))) - shape.auc, 0.05, 12, 20)
        # rounded, so that the last bits of a mathematics library cannot reach the rows
        self._weights = [float(f"{w:.5g}") for w in weights * scale]
        mean = sum(w * m for w, m in zip(self._weights, parts.mean(axis=1)))
        self._intercept = round(intercept(scale) - mean, 5)

    def rows(self, start: int, stop: int):
        """Rows start..stop-1: ids int32 [N, F], dense float32 [N, K], label uint8 [N], true probability float64 [N]."""
        if not 0 <= start <= stop <= self.n_rows:
            raise DataError(f"rows {start}..{stop}, expected 0 <= start <= stop <= {self.n_rows}")
        n = stop - start
        ids = np.empty((n, len(self.fields)), np.int32)
        dense = np.empty((n, len(self.dense)), np.float32)
        label, probability = np.empty(n, np.uint8), np.empty(n)
        for low in range(0, n, BLOCK):
            high = min(low + BLOCK, n)
            index = np.arange(start + low, start + high, dtype=np.uint64)
            columns, numbers, parts = self._parts(index)
            for f, column in enumerate(columns):
                ids[low:high, f] = column
            for k, column in enumerate(numbers):
                dense[low:high, k] = column
            logit = self._intercept + sum(w * part for w, part in zip(self._weights, parts))
            probability[low:high] = p = 1 / (1 + np.exp(-logit))
            label[low:high] = _uniform(_hash(self._label, index)) < p
        return ids, dense, label, probability


def split_bounds(rows: int) -> tuple[int, int]:
    """(end of train, end of test) of the paper's rule: 6/7 train, then half of the rest test, the other half valid."""
    train = -(-6 * rows // 7)
    return train, train + -(-(rows - train) // 2)


def generate(preset="criteo", out=None, *, rows=None, scale=None, seed=0, name=None, skew=1.0, rank=4, clusters=0.8,
             drift=0.0, chunk_rows=262_144, overwrite=False, progress=None) -> Dataset:
    """Write a generated log and open it; streams ``chunk_rows`` rows at a time, so any number of rows fits in memory.

    ``preset, rows, scale, seed, skew, rank, clusters, drift``: see :class:`Synthetic`. ``out``: the folder, default
    ``paths.data() / name``. ``name``: default the preset's own name, with a hash of the settings where they differ from
    it. ``progress``: True or False forces the bar on or off, by default it shows in a terminal; a callable gets
    ``(stage, fraction)``. ``meta.json`` gains ``ceiling``: AUC and log loss of the true probabilities on the test and
    valid labels, and the AUC expected over all labels.

    Raises
    ------
    DataError
        For settings out of range, a folder that exists (unless ``overwrite``), or too little room on the disk.
    """
    settings = dict(rows=rows, scale=scale, seed=seed, skew=skew, rank=rank, clusters=clusters, drift=drift)
    log = Synthetic(preset, **settings)
    name = name or _name(preset, log)
    out = Path(out) if out is not None else paths.data() / name
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; choose another folder or pass overwrite=True (--overwrite)")
    if chunk_rows < 1:
        raise DataError(f"chunk_rows {chunk_rows}, expected at least 1")
    out.parent.mkdir(parents=True, exist_ok=True)
    bytes_needed = log.n_rows * (4 * len(log.fields) + 4 * len(log.dense) + 1) + 8 * sum(log.cardinalities)
    if bytes_needed > (free := shutil.disk_usage(out.parent).free):
        raise DataError(f"{name} needs {bytes_needed / 1e9:.1f} GB, {out.parent} has {free / 1e9:.1f} GB free; "
                        "ask for fewer rows or choose another folder")
    train, test = split_bounds(log.n_rows)
    held: dict[str, list] = {"test": [], "valid": []}
    bar = Progress(progress)
    source = dict(generator="ecstudy.data.synthetic", version=VERSION, exponent=log.exponent, **log.settings)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")         # own name: two processes do not meet
    with DatasetWriter(part, name=name, fields=log.fields, cardinalities=log.cardinalities, dense=log.dense,
                       source=source) as writer:
        for split, low, high in (("train", 0, train), ("test", train, test), ("valid", test, log.n_rows)):
            for start in range(low, high, chunk_rows):
                stop = min(start + chunk_rows, high)
                ids, dense, label, probability = log.rows(start, stop)
                writer.append(split, ids, dense, label)
                if split != "train":
                    held[split].append((probability, label))
                bar("generate", stop / log.n_rows)
        writer.meta["ceiling"] = _ceiling({s: [np.concatenate(x) for x in zip(*held[s])] for s in held})
    bar.close()
    return _publish(part, out, overwrite)


def _ceiling(held) -> dict:
    """What no model can beat but by luck: the true probabilities measured as if they were predictions."""
    from ..measure import auc

    entry = {}
    for split, (p, label) in held.items():
        entry[f"auc_{split}"] = auc(label, p) if 0 < label.sum() < len(label) else None
        entry[f"logloss_{split}"] = float(-np.log(np.where(label == 1, p, 1 - p)).mean())
    p = np.concatenate([held["test"][0], held["valid"][0]])
    return entry | {"auc_expected": expected_auc(p)}


def _name(preset: str, log: Synthetic) -> str:
    base = preset if preset in PRESETS else f"synthetic_{preset}"
    plain = preset in PRESETS and log.settings == Synthetic(preset).settings
    return base if plain else f"{base}_{hashlib.sha256(repr(log.settings).encode()).hexdigest()[:8]}"


def _publish(part: Path, out: Path, overwrite: bool) -> Dataset:
    """Rename into place. If another process was first, its folder must hold the same rows, and is used."""
    old = out.with_name(part.name + ".old")
    if overwrite and out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except OSError:
        fingerprint = Dataset.open(part).fingerprint
        shutil.rmtree(part)
        if not (out / "meta.json").is_file():
            if old.exists():
                old.rename(out)
            raise
        if Dataset.open(out).fingerprint != fingerprint:
            raise DataError(f"{out} was written by another process with other rows; choose another folder") from None
    shutil.rmtree(old, ignore_errors=True)
    return Dataset.open(out)


def preset(name: str) -> tuple[str, float] | None:
    """A name in :data:`PRESETS` and its drift: ``synthetic_easy_drift0.5`` is ``synthetic_easy`` with ``drift=0.5``.

    None for a name of another kind. Raises DataError for a drift that is no number.
    """
    base, mark, drift = name.partition(_DRIFT)
    if base not in PRESETS:
        return None
    try:
        value = float(drift) if mark else 0.0
    except ValueError:
        raise DataError(f"data set {name!r}: expected a number from 0 to 1 after {_DRIFT!r}, as in "
                        f"{base}{_DRIFT}0.5") from None
    return base, value


def open_preset(name: str) -> Dataset:
    """The data set of a name that :func:`preset` knows, generated on first use, and again if the generator has changed.
    """
    folder, (base, drift) = paths.data() / name, preset(name)
    if (folder / "meta.json").is_file():
        dataset = Dataset.open(folder)
        if dataset.meta["source"].get("version") == VERSION:
            return dataset
    return generate(base, folder, name=name, drift=drift, overwrite=True)
