r"""Each id is hashed into 1,024 numbers, and a network per field computes its embedding from them: no rows are stored.

**Idea** (deep hash embedding; Kang et al., KDD 2021, arXiv 2010.10784). The code of id $x$ has the numbers
$u_j = 2 h_j(x) / (m - 1) - 1$ with $h_j(x) = ((a_j x + b_j) \bmod p_j) \bmod m$, $m = 10^6$ and $j = 1 \dots k$.
No two ids share a code. Five hidden layers $y \leftarrow \mathrm{mish}(\mathrm{norm}(W y))$ of width $h$ and one
linear layer to dimension $D$ turn the code into the embedding, $\mathrm{norm}$ being a batch normalisation.

**Stored** the constants $a, b, p$ of the hash functions, int32 $3 \times k$; per compressed field six matrices and
biases, $(k + 1) h + 4 h (h + 1) + (h + 1) D$ numbers; the plain rows of all other fields. **Size** by ``width``, one
$h$ for all fields: a field has a network only where that is smaller than its rows. The first layer alone has $k h$
numbers, so fields of few ids cannot be compressed with $k = 1024$ (``hashes``).

**Training** one stage, in place: three times what ships, and the normalisations. A step computes each distinct id of
a batch once, and weights it by its occurrences in the statistics of the normalisations, which are those over all
rows of the batch. Normalisations are folded into the matrices when deployed.

**Deviations** One set of hash functions serves all fields, which see the id's row in the full table; the study draws
independent functions per field, and does not count their constants. The published GPU code overflows beyond id 2,147;
here codes are the exact integers for rows below $2^{31}$, on every device. Primes are the smallest above $m$, so at
most 1.4 % of the values of $h_j$ occur twice as often as others. Biases before a normalisation change nothing and are
left out, and the folded normalisation costs $h$ numbers a layer where the study counts $3 h$, so widths at Criteo's
sizes become slightly larger than the study's. Matrices start with standard deviation $1 / \sqrt{in}$, the last one
such that embeddings start like those of the full table; the published code draws all of them from $U(-b, b)$ with $b$
about 0.0003, and the signal vanishes below the normalisation's 1e-5 (``init="paper"``). ``transform="normal"`` maps
pairs of codes to normal numbers (Box and Muller).
"""
from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from ..fields import derived
from ..method import Method
from ..ragged import PerField
from ..tables import FloatTable, take
from ._networks import Networks, infer, runs

BUCKETS = 10 ** 6


def cells(width: int, hashes: int, dim: int) -> int:
    """Numbers in the deployed network of one field."""
    return (hashes + 1) * width + 4 * width * (width + 1) + (width + 1) * dim


@lru_cache
def primes() -> np.ndarray:
    """The primes from 10^6 to 2^20, for which :meth:`Dhe.hashed` is exact."""
    sieve = np.ones(1 << 20, bool)
    for number in range(2, 1 << 10):
        if sieve[number]:
            sieve[number * number::number] = False
    return np.flatnonzero(sieve[BUCKETS:]) + BUCKETS


class Dhe(Method):
    knob = "width"
    family = "inter-feature"
    aware = "none"
    paper = "arXiv 2010.10784"
    group = "neural hashing"
    space = r"F_c (k h + 4 h^2 + h d), \; F_c \text{ networks of width } h, k \text{ hashes}"
    time = r"O(k h + h^2 + h d)"

    def __init__(self, fields, dim, width=None, hashes=1024, transform="uniform", init="matched"):
        super().__init__(fields, dim)
        self.width, self.hashes, self.transform = 32 if width is None else width, hashes, transform
        if self.width < 1:
            raise ValueError(f"width={width}: expected hidden layers at least 1 wide")
        if not 2 <= hashes <= len(primes()) or hashes % 2:
            raise ValueError(f"hashes={hashes}: expected an even number of hash functions, 2 to {len(primes())}")
        if transform not in ("uniform", "normal"):
            raise ValueError(f"transform={transform!r}: expected 'uniform' or 'normal'")
        if init not in ("matched", "paper"):
            raise ValueError(f"init={init!r}: expected 'matched' or 'paper'")
        self.cells = cells(self.width, hashes, dim)
        order = sorted(range(len(fields)), key=lambda f: -fields.sizes[f])     # neighbours have alike distinct ids
        number = sum(n * dim > self.cells for n in fields.sizes)
        sizes = np.array([fields.sizes[f] for f in order])
        start, first = (np.cumsum(part) - part for part in (sizes[:number], sizes[number:]))
        derived(self, "deep", order[:number])
        derived(self, "plain", order[number:])
        derived(self, "place", np.argsort(order))
        derived(self, "start", start)
        derived(self, "first", first)
        derived(self, "shift", [int(fields.offset[f]) - int(s) for f, s in zip(order, start)])
        bound, widths = fields.bound(), (hashes, *[self.width] * 5, dim)
        self.table = FloatTable(int(sizes[number:].sum()), dim, bound) if number < len(fields) else None
        self.networks = Networks(number, widths, bound, plain=init == "paper") if number else None
        if number:
            constants = torch.randint(1, BUCKETS, (3, hashes), dtype=torch.int32)
            if not constants.is_meta:
                constants[2] = torch.from_numpy(primes()[:hashes])
            self.register_buffer("hash", constants)

    @classmethod
    def sizes(cls, fields, dim, hashes=1024, **options):
        most = fields.largest * dim                      # beyond it even the largest field is left plain
        return range(1, 1 + bisect_left(range(1, most + 1), most, key=lambda width: cells(width, hashes, dim)))

    def encode(self, ids):
        """Rows in the plain table [B, plain fields], and the distinct ids of the fields that have a network."""
        return (ids.index_select(1, self.plain) + self.first,
                PerField(ids.index_select(1, self.deep) + self.start, self.start) if self.networks else None)

    def lookup(self, codes):
        row, distinct = codes
        parts = [take(self.compute(distinct), distinct.inverse)] if self.networks else []
        if self.table:
            parts.append(self.table.gather(row))
        return torch.cat(parts, 1).index_select(1, self.place)

    def hashed(self, row: Tensor) -> Tensor:
        """The integers ``h_j`` of rows [N] of the full table, as float32 [N, k]."""
        # (a x + b) mod p = floor(p frac((a x + b + 1/2) / p)). Below 2^31 float64 is off by less than 2^-21 there,
        # however a device rounds: too little to reach the next integer's, 1 / 2p away
        a, b, p = self.hash.double()
        slope, start = a / p, (b + 0.5) / p
        row, out = row.double()[:, None], torch.empty(len(row), self.hashes, device=row.device)
        block = 128 if row.device.type == "cpu" else 1 << 14          # what is worked on stays in the cache
        space = torch.empty(min(block, len(row)), self.hashes, dtype=p.dtype, device=row.device)
        over = torch.empty_like(out[:block])
        for part, x in zip(out.split(block), row.split(block)):
            part.copy_(torch.addcmul(start, x, slope, out=space[:len(x)]).frac_().mul_(p).floor_())
            part.sub_(torch.ge(part, BUCKETS, out=over[:len(x)]), alpha=BUCKETS)        # as p is below twice that
        return out

    def inputs(self, row: Tensor) -> Tensor:
        """What a network reads for rows [..., N] of the full table: [..., N, k]."""
        h = self.hashed(row.reshape(-1))
        if self.transform == "uniform":
            h.mul_(2 / (BUCKETS - 1)).sub_(1)
        else:
            radius, angle = h[:, ::2].add(1).div_(BUCKETS).log_().mul_(-2).sqrt_(), h[:, 1::2] * (2 * math.pi / BUCKETS)
            h = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return h.view(*row.shape, self.hashes)

    def compute(self, distinct: PerField) -> Tensor:
        """Embeddings of distinct ids [U, D]; fields with about as many of them share one batched product."""
        row, count = self.distinct_rows(distinct)
        rows = len(distinct.inverse)
        learning = self.training and not self.deployed and rows > 0
        groups = runs(count, (1 << 21 if row.device.type == "cpu" else 1 << 30) // self.cells)
        number = [last - first for first, last, _ in groups]
        if learning:
            layers = [weight.split(number) for weight in self.networks.weights]
        else:
            layers = [list(zip(w.split(number), b.split(number))) for w, b in self.networks.layers()]
        out, begin = [], 0
        for (first, last, width), mine in zip(groups, zip(*layers)):
            end = begin + sum(count[first:last])
            at = (distinct.field[begin:end] - first) * width + distinct.slot[begin:end]

            def pad(x):
                return x.new_zeros((last - first) * width).index_copy_(0, at, x[begin:end]).view(last - first, width)

            if learning:
                share = pad(distinct.count)[:, None] / rows
                y = self.networks.learn(self.inputs(pad(row)), share, rows, slice(first, last), mine)
            else:                                                     # in blocks that stay in the cache
                block = max(1, (1 << 21) // (max(self.hashes, self.width) * (last - first)))
                y = torch.cat([infer(self.inputs(part), mine) for part in pad(row).split(block, 1)], 1)
            out.append(take(y.flatten(0, 1), at))
            begin = end
        return torch.cat(out)

    def distinct_rows(self, distinct: PerField) -> tuple[Tensor, list[int]]:
        """Rows in the full table of distinct ids, and how many there are of each compressed field."""
        bounds = torch.arange(len(self.start) + 1, device=self.start.device)
        count = torch.searchsorted(distinct.field, bounds).diff().tolist()
        return distinct.unique + take(self.shift, distinct.field), count

    def products(self, ids: Tensor) -> Callable[[], None]:
        """Only the matrix products that looking up ``ids [B, F]`` takes, without padding, to be timed."""
        row, count = self.distinct_rows(self.encode(ids)[1])
        inputs = {width: [torch.randn(n, width, device=row.device) for n in count]
                  for width in (self.hashes, self.width)}
        work = [(x, matrix[field].T) for matrix, _ in self.networks.layers()
                for field, x in enumerate(inputs[matrix.shape[2]])]

        def run():
            for x, matrix in work:
                torch.mm(x, matrix)
        return run

    def deploy(self):
        if self.networks and not self.deployed:
            self.networks.fold()
        return super().deploy()
