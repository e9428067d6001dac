r"""A table is never stored: an id's embedding is the product of three small tensors chosen by the digits of the id.

**Idea** (tensor train, TT-Rec; Yin et al., MLSys 2021, arXiv 2101.11714). A field of $n \le abc$ ids is a grid, and an
id has three digits, $i_0 = i \bmod c$, $i_1 = \lfloor i / c \rfloor \bmod b$ and $i_2 = \lfloor i / bc \rfloor$. The
dimension is split likewise, $D = d_0 d_1 d_2$. The element $(j_0, j_1, j_2)$ of the embedding is
$$e_{j_0 j_1 j_2} = G_0[i_0, j_0]\; G_1[i_1, j_1]\; G_2[i_2, j_2],$$
a row of $R$ numbers times an $R \times R$ matrix times a column of $R$ numbers.

**Stored** three cores, with the rows of all compressed fields end to end: $\sum c_f$ rows of $d_0 R$ numbers,
$\sum b_f$ rows of $R d_1 R$ and $\sum a_f$ rows of $d_2 R$; and the plain rows of all other fields. **Size** by
``rank``, one $R$ for all fields: a field is compressed only where that is smaller than its rows, so fields leave
compression as the rank grows.

**Training** one stage, in place: three times what ships. A step computes each distinct id of a batch once. Ids with
the same row of the middle core, by far the widest, share one product, and rows of that core are read in blocks that
stay in the cache.

**Deviations** Factors are the study's: $a = \lceil n^{1/3} \rceil$, $b = \lceil \sqrt{n / a} \rceil$,
$c = \lceil n / ab \rceil$, but $a$ is then cut to the rows in use. Each core starts uniform with standard deviation
$(\sigma / R)^{1/3}$: the product, a sum over $R^2$ paths, then has that of the full table, $\sigma$, at every rank. In
the published code draws within two standard deviations are rejected and the scale follows the number of rows
alone (``init="paper"``), so embeddings start larger the larger the rank, at Criteo's sizes about 15,000 times as large
as the full table's at the 50 % budget. Dimensions that are no power of two are split as evenly as they allow
(768 is $8 \cdot 8 \cdot 12$). The authors' cache of frequent rows is left out, as in the study. ``fit`` is the TT-SVD
of each field: two truncated singular value decompositions, one after the other, from sums over parts of the matrix.
``columns`` gives other factors of the dimension; where their product is larger, as in the paper's $9 \cdot 9 \cdot 10$
for 768, what is beyond is cut off. Digits of ids that stand together agree, so the order of the rows matters where
neighbours are alike; ``order="scattered"`` takes the digits of $g\,i \bmod n$ instead, $g$ being coprime to $n$ and
near its golden section, which puts neighbours far apart and stores nothing.
"""
from __future__ import annotations

import math
from bisect import bisect_left
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..fields import derived
from ..method import Method
from ..tables import FloatTable, take
from ._posttrain import blocks

BLOCK = 1 << 19                      # numbers worked on at once, 2 MiB: they stay in the cache
FIT = 1 << 25                        # numbers of a given matrix taken at once


def grid(n: int) -> tuple[int, int, int]:
    """Row factors (c, b, a) of a field of ``n`` ids: a * b * c >= n."""
    a = max(1, round(n ** (1 / 3)) - 1)
    while a ** 3 < n:
        a += 1
    b = math.isqrt(-(-n // a) - 1) + 1
    c = -(-n // (a * b))
    return c, b, -(-n // (b * c))


def columns(dim: int) -> tuple[int, int, int]:
    """The most even factors (d0 <= d1 <= d2) of the dimension."""
    divisors = [d for d in range(1, dim + 1) if dim % d == 0]
    triples = ((x, y, dim // (x * y)) for x in divisors for y in divisors if x <= y and dim // x % y == 0)
    return min((t for t in triples if t[1] <= t[2]), key=sum)


def cells(n: int, factors: tuple[int, int, int], rank: int) -> int:
    """Numbers in the cores of one field."""
    (c, b, a), (d0, d1, d2) = grid(n), factors
    return (c * d0 + b * d1 * rank + a * d2) * rank


def scatter(n: int) -> tuple[int, int]:
    """A step coprime to ``n`` near its golden section, and its inverse: ``i * step % n`` is a permutation."""
    step = round(n * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, n) > 1:
        step += 1
    return step, pow(step, -1, n)


def split(dim: int, given=None) -> tuple[int, int, int]:
    """Factors of the dimension: the most even ones, or ``given`` ones, whose product may be larger."""
    if given is None:
        return columns(dim)
    if not (isinstance(given, (tuple, list)) and len(given) == 3 and all(isinstance(d, int) and d > 0 for d in given)
            and math.prod(given) >= dim):
        raise ValueError(f"columns={given!r}: expected three factors whose product is at least {dim}")
    return tuple(given)


class TtRec(Method):
    knob = "rank"
    family = "inter-feature"
    paper = "arXiv 2101.11714"
    group = "tensor decomposition"
    space = r"\sum_f (c_f d_0 + b_f d_1 R + a_f d_2) R, \; a_f b_f c_f \ge n_f, \; d_0 d_1 d_2 = d"
    time = r"O(d_0 d_1 R^2 + d R)"

    fits_deployed = True

    def __init__(self, fields, dim, rank=None, init="matched", columns=None, order="given"):
        super().__init__(fields, dim)
        self.rank = 32 if rank is None else rank
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={rank!r}: expected an integer of at least 1")
        if init not in ("matched", "paper"):
            raise ValueError(f"init={init!r}: expected 'matched' or 'paper'")
        if order not in ("given", "scattered"):
            raise ValueError(f"order={order!r}: expected 'given' or 'scattered'")
        self.columns = split(dim, columns)
        deep = [f for f, n in enumerate(fields.sizes) if cells(n, self.columns, self.rank) < n * dim]
        plain = [f for f in range(len(fields)) if f not in deep]
        rows = np.array([fields.sizes[f] for f in plain], np.int64)
        derived(self, "deep", deep)
        derived(self, "plain", plain)
        derived(self, "place", np.argsort(deep + plain))
        derived(self, "first", np.cumsum(rows) - rows)
        self.table = FloatTable(int(rows.sum()), dim, fields.bound()) if plain else None
        self.cores = None
        if deep:
            factors = np.array([grid(fields.sizes[f]) for f in deep])
            for i, (factor, start) in enumerate(zip(factors.T, (np.cumsum(factors, 0) - factors).T)):
                derived(self, f"factor{i}", factor)
                derived(self, f"start{i}", start)
            self.scattered = [scatter(fields.sizes[f]) for f in deep] if order == "scattered" else None
            if self.scattered:
                derived(self, "step", [step for step, _ in self.scattered])
                derived(self, "modulus", [fields.sizes[f] for f in deep])
            d0, d1, d2 = self.columns
            self.bits = [int(number).bit_length() for number in factors.sum(0)]       # of a row's number in each core
            # of three U(-s, s) summed over R^2 paths: R (s / sqrt 3)^3 = bound / sqrt 3
            bound = math.sqrt(3) * (fields.bound() / math.sqrt(3) / self.rank) ** (1 / 3)
            self.widths = d0 * self.rank, self.rank * d1 * self.rank, d2 * self.rank
            self.cores = torch.nn.ModuleList(FloatTable(int(number), width, bound)
                                             for number, width in zip(factors.sum(0), self.widths))
            if init == "paper":
                self.published(factors)

    @classmethod
    def sizes(cls, fields, dim, columns=None, **options):
        # up to the rank at which no field is compressed
        factors = split(dim, columns)
        return range(1, 1 + max(bisect_left(range(math.isqrt(n * dim) + 1), n * dim, 1,
                                            key=lambda r: cells(n, factors, r)) for n in fields.sizes))

    def published(self, factors: np.ndarray) -> None:
        """Normal numbers beyond two standard deviations, scaled by the row factors of each field."""
        beyond = 0.5 * math.erfc(math.sqrt(2))                        # one tail of the normal distribution
        for core, counts in zip(self.cores, factors.T):
            if core.weight.is_meta:
                continue
            for part, product in zip(core.weight.detach().split(counts.tolist()), factors.prod(1).tolist()):
                u = torch.rand(part.shape, dtype=torch.float64) * (2 * beyond) - beyond
                z = torch.special.ndtri(u.abs()).abs() * u.sign()
                part.copy_(z * math.sqrt(product / 3) ** (-1 / 3))

    def encode(self, ids):
        """Rows in the plain table [B, plain fields]; distinct ids, as one number each, and where they stand."""
        row = ids.index_select(1, self.plain) + self.first
        if self.cores is None:
            return row, None, None
        ids = ids.index_select(1, self.deep)
        if self.scattered:
            ids = ids * self.step % self.modulus
        rest = ids // self.factor0
        high = rest // self.factor1
        row0, row1 = ids - rest * self.factor0 + self.start0, rest - high * self.factor1 + self.start1
        key = (((row1 << self.bits[0]) + row0) << self.bits[2]) + high + self.start2
        return row, *torch.unique(key, return_inverse=True)

    def lookup(self, codes):
        row, distinct, inverse = codes
        vectors, places = [torch.empty(0, self.dim, device=row.device)], []
        if self.cores:
            blocks, index, slot = self.layout(distinct)
            vectors += map(self.multiply, *self.operands(blocks, index))
            places.append(take(slot, inverse))
        if self.table:
            first = len(index[0]) if self.cores else 0
            vectors.append(self.table.gather(row.reshape(-1)))
            places.append(torch.arange(first, first + row.numel(), device=row.device).view(row.shape))
        vectors = torch.cat(vectors)                                  # parts are freed before the result is made
        return take(vectors, torch.cat(places, 1).index_select(1, self.place))

    def layout(self, distinct: Tensor, padded: bool = True):
        """Distinct ids in groups that share a row of the middle core, the largest groups first.

        Returns blocks of equal groups as (groups, ids of each), the rows of the cores, and the slot of each distinct
        id. Groups are padded to the next larger size where that costs less than a block of their own.
        """
        device, low = distinct.device, self.bits[0] + self.bits[2]
        row1, count = torch.unique_consecutive(distinct >> low, return_counts=True)
        size, order = count.sort(descending=True, stable=True)
        classes: list[list[int]] = []
        slack = BLOCK // (self.columns[0] * self.widths[1]) if padded else 0
        for ids, groups in zip(*(x.tolist() for x in torch.unique_consecutive(size, return_counts=True))):
            if classes and (classes[-1][1] - ids) * groups <= slack:
                classes[-1][0] += groups
            else:
                classes.append([groups, ids])
        if classes:
            size = torch.repeat_interleave(*torch.tensor(classes, device=device).T.flip(0), output_size=len(size))
        shift = torch.empty_like(size).scatter_(0, order, size.cumsum(0) - size) - (count.cumsum(0) - count)
        slot = torch.arange(len(distinct), device=device)
        source = slot.new_zeros(sum(groups * ids for groups, ids in classes))         # free slots repeat an id
        slot = slot + torch.repeat_interleave(shift, count, output_size=len(slot))
        source.scatter_(0, slot, torch.arange(len(slot), device=device))
        key = take(distinct, source) & ((1 << low) - 1)
        index = key >> self.bits[2], take(row1, order), key & ((1 << self.bits[2]) - 1)
        blocks, most = [], BLOCK if device.type == "cpu" else 64 * BLOCK
        each = self.widths[0] * (1 + self.columns[1]) + self.widths[2] + self.dim          # numbers of an id
        for groups, ids in classes:
            step = max(1, most // (self.widths[1] + ids * each))
            blocks += [(min(step, groups - first), ids) for first in range(0, groups, step)]
        return blocks, index, slot

    def operands(self, blocks, index) -> list[Iterable[Tensor]]:
        """Rows of the three cores for each block; gathered at once where gradients flow back."""
        ids, groups = [groups * ids for groups, ids in blocks], [groups for groups, _ in blocks]
        return [core.gather(rows).split(parts) if torch.is_grad_enabled() else map(core.gather, rows.split(parts))
                for core, rows, parts in zip(self.cores, index, (ids, groups, ids))]

    def multiply(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """Rows of the cores, x [ids, d0 R], w [groups, R d1 R], v [ids, d2 R] -> [ids, D]."""
        y = torch.bmm(x.view(len(w), -1, self.rank), w.view(len(w), self.rank, -1))
        return torch.bmm(y.view(len(x), -1, self.rank), v.view(len(x), -1, self.rank).mT).view(len(x), -1)[:, :self.dim]

    def products(self, ids: Tensor) -> Callable[[], None]:
        """Only the matrix products that looking up ``ids [B, F]`` takes, without padding, to be timed."""
        with torch.no_grad():
            blocks, index, _ = self.layout(self.encode(ids)[1], padded=False)
            work = list(zip(*self.operands(blocks, index)))

        def run():
            for block in work:
                self.multiply(*block)
        return run

    @torch.no_grad()
    def fit(self, rows):
        for start, block in blocks(rows):                             # plain rows are copied, and all rows are finite
            self.copy(start, block)
        for f, (first, n) in enumerate(zip(self.fields.offset.tolist(), self.fields.sizes)):
            if f not in self.deep.tolist():
                continue
            (c, _, a), (d0, d1, d2), place = grid(n), self.columns, self.deep.tolist().index(f)
            device, inverse = self.cores[0].weight.device, self.scattered[place][1] if self.scattered else 1
            gram = torch.zeros(c * d0, c * d0, dtype=torch.float64, device=device)
            for _, part in self.unfolded(rows, first, n, inverse):
                gram += part @ part.T
            left = self.leading(gram)
            gram = torch.zeros(a * d2, a * d2, dtype=torch.float64, device=device)
            for _, part in self.unfolded(rows, first, n, inverse):
                part = (left.T @ part).view(-1, a * d2)
                gram += part.T @ part
            right = self.leading(gram)
            first0, first1, first2 = (int(s[place]) for s in (self.start0, self.start1, self.start2))
            self.cores[0].weight[first0:first0 + c] = left.view(c, -1)
            self.cores[2].weight[first2:first2 + a] = right.view(a, -1)
            for middle, part in self.unfolded(rows, first, n, inverse):
                part = ((left.T @ part).view(-1, a * d2) @ right).view(self.rank, -1, d1 * self.rank)
                self.cores[1].weight[first1 + middle:first1 + middle + part.shape[1]] = part.transpose(0, 1).flatten(1)

    def copy(self, start: int, block: Tensor) -> None:
        """Rows ``[start, start + len(block))`` of the matrix, as far as they are of plain fields."""
        for place, f in enumerate(self.plain.tolist()):
            first, n = int(self.fields.offset[f]), self.fields.sizes[f]
            low, high = max(first, start), min(first + n, start + len(block))
            if low < high:
                own = int(self.first[place]) - first
                self.table.weight[low + own:high + own] = block[low - start:high - start].to(self.table.weight.device)

    def unfolded(self, rows, first: int, n: int, inverse: int = 1) -> Iterator[tuple[int, Tensor]]:
        """A field of ``n`` rows as a matrix ``[c d0, m d1 a d2]`` of its first digits, for ``m`` values of the middle
        digit at a time, with the first of them. Ids that do not exist, and columns beyond D, are zeros. Digits are
        those of ``p`` for the id ``p * inverse % n``."""
        (c, b, a), (d0, d1, d2) = grid(n), self.columns
        step = max(1, FIT // (a * c * d0 * d1 * d2))
        for middle in range(0, b, step):
            m = min(step, b - middle)
            ids = torch.arange(a)[:, None] * (b * c) + torch.arange(middle * c, (middle + m) * c)
            known = ids < n
            index = first + ids[known] * inverse % n
            own = rows[index.to(rows.device)] if isinstance(rows, Tensor) else torch.from_numpy(
                np.asarray(rows[index.numpy()], np.float32))
            own = pad(own.detach().float().cpu(), (0, d0 * d1 * d2 - self.dim))
            part = own.new_zeros(a * m * c, own.shape[1])
            part[known.view(-1)] = own
            part = part.view(a, m, c, d0, d1, d2).permute(2, 3, 1, 4, 0, 5).reshape(c * d0, -1)
            yield middle, part.to(self.cores[0].weight.device)

    def leading(self, gram: Tensor) -> Tensor:
        """Leading eigenvectors of a Gram matrix [m, m], as many as the rank (zeros if it has fewer): [m, R]."""
        vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)[:, :self.rank].float()
        return pad(vectors, (0, self.rank - vectors.shape[1])).contiguous()
