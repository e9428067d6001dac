r"""Ids point into two small tables per chunk; the first pointers are learned by clustering what the two add up to.

**Idea** (Clustered Compositional Embeddings, CCE; Tsang and Ahle, NeurIPS 2023, arXiv 2210.05974). A vector is cut
into $C$ chunks, and chunk $j$ is the sum of one row of each of two tables of $r$ rows,
$$e^{(j)} = T^{(j)}_0[h_j(i)] + T^{(j)}_1[g_j(i)] .$$
Both pointers begin as hashes. At the end of an epoch $k$-means with $r$ centroids runs over the vectors that ids have
at present; then $T_0$ holds the centroids, $h_j(i)$ is the centroid nearest to the id, $g_j$ is a fresh hash, and $T_1$
holds in each row the mean of what the centroids left over. Training goes on from there: ids that the first hash threw
together part ways, and the second pointer goes on to tell apart what a centroid holds.

**Stored** for every field two tables of $r \times D$ numbers, the seeds of $g$, and for every id the learned pointers,
$C$ of $\lceil \log_2 r \rceil$ bits, end to end. A field where 64 rows would save nothing is a plain table.
The published counts leave pointers out; here they are most of what ships: at dimension 16 four chunks take 0.78 % of
the full table for every bit of a pointer. **Size** by ``rows`` = $r$, which is the same for all fields, but no more
than a quarter of a field's ids: both tables together stay below half of it. ``chunks=1`` has one pointer instead of
four: its smallest sizes are a quarter, and it can tell fewer vectors apart.

**Training** one stage, in place; memory is three times the tables, and the pointers. Every ``every`` epochs, ``rounds``
times at most, one clustering, field by field and block by block: $k$-means learns from ``points`` ids per centroid,
then every id of the field is compared with all $r$ centroids, so that time grows with $n r$. Moments of both tables
begin anew after it. Validation counts from the first clustering on; until then no pointer is stored, the first hash is
computed. What ships always stores them. ``fit`` clusters the vectors of a given matrix instead of the present ones.

**Deviations** $r$ follows the published limit of parameters, the same for every field, and is 65,536 at most.
The published code draws the second hash anew for every block of ids, so that all but the last block's leftovers go to
rows that nobody asks, and divides by zero where no id points; here one hash serves the whole clustering, and such rows
are zero. Its $k$-means takes up to 100 iterations of faiss, here 20 of ours; as there, ids are drawn without regard to
frequency. Clustering at the end of each of the first six epochs is our choice (its example does so seven times in ten
epochs); where one epoch is nearly all of training, ``every`` wants a fraction. Both tables begin in a range in which
their *sum* has the standard deviation of the full table's rows. Clearing moments is our choice too.
"""
from __future__ import annotations

import math

import torch
from torch import nn

from ..fields import derived
from ..packed import Bitstream
from ..tables import FloatTable, take
from ._nearest import lloyd
from ._pointed import BLOCK, FEW, Pointed, drawn, nearest, picked
from .robe import PRIME

MOST = 1 << 16                           # rows of a table


class Cce(Pointed):
    knob = "rows"
    paper = "arXiv 2210.05974"
    group = "clustering"
    space = r"\frac{1}{32} n C \log_2 r + 2 r F d"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None, chunks=None, every=1.0, rounds=6, points=256, iterations=20):
        super().__init__(fields, dim)
        self.rows = max(2, min(4096, fields.largest // 4)) if rows is None else rows
        self.chunks = math.gcd(4, dim) if chunks is None else chunks
        for name, value, least, most in (("rows", self.rows, 2, MOST), ("chunks", self.chunks, 1, dim),
                                         ("rounds", rounds, 0, 1 << 16), ("points", points, 1, 1 << 16),
                                         ("iterations", iterations, 1, 1 << 16)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}={value!r}: expected an integer from {least} to {most}")
        if dim % self.chunks:
            raise ValueError(f"chunks={chunks}: expected a divisor of the embedding dimension {dim}")
        if not every > 0:
            raise ValueError(f"every={every}: expected a positive number of epochs between clusterings")
        self.every, self.rounds, self.points, self.iterations = every, rounds, points, iterations
        # a field is coded or whole whatever the knob says, so that bytes never fall along it
        gains = [size * self.chunks // 2 + 2 * FEW * dim * 4 < size * dim * 4 for size in fields.sizes]
        self._lay_out(gains, align=8)
        each = [min(self.rows, size // 4) for size, coded in zip(fields.sizes, gains) if coded]
        derived(self, "each", each)
        derived(self, "begin", [self.chunks * sum(each[:f]) for f in range(len(each))])
        self.table = self._plain()
        self.tables = None
        if self.numbers:
            self.half = self.chunks * sum(each)                              # rows of either table
            self.tables = FloatTable(2 * self.half, dim // self.chunks, fields.bound() / math.sqrt(2))
            self.pointers = Bitstream(self.numbers, self.chunks, (max(each) - 1).bit_length())
            self.register_buffer("second", torch.randint(1, PRIME, (2, self.chunks)))
            self.aux = nn.Module()
            self.aux.register_buffer("first", torch.randint(1, PRIME, (2, self.chunks)))
            self.aux.register_buffer("learned", torch.zeros((), dtype=torch.int64))      # how many times

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(2, max(2, min(MOST, fields.largest // 4)) + 1)

    # --- pointers ---------------------------------------------------------------------------------------------------

    def hashed(self, number, field, seeds):
        """Universal hash of ids ``number [...]`` of coded fields ``field [...]`` for every chunk: rows ``[..., C]``."""
        factor, shift = seeds
        return (number[..., None] * factor + shift) % PRIME % take(self.each, field)[..., None]

    def _first(self, number, field):
        """First pointers ``[..., C]``: what is stored, before the first clustering a hash."""
        stored = self.pointers.read(number)
        if self.deployed:
            return stored
        return torch.where(self.aux.learned > 0, stored, self.hashed(number, field, self.aux.first))

    def _places(self, number, field):
        """Rows ``[..., C, 2]`` of the tables that ids ``number [...]`` of coded fields ``field [...]`` add up."""
        chunk = torch.arange(self.chunks, device=number.device)
        begin = take(self.begin, field)[..., None] + take(self.each, field)[..., None] * chunk
        second = self.hashed(number, field, self.second)
        return torch.stack([begin + self._first(number, field), begin + second + self.half], -1)

    def encode(self, ids):
        number, whole = self._numbered(ids)
        if number is None:
            return None, whole
        return self._places(number, torch.arange(number.shape[1], device=ids.device)), whole

    def lookup(self, codes):
        places, whole = codes
        out = self.tables.gather(places).sum(-2).flatten(-2) if places is not None else None
        return self._joined(out, self.table.gather(whole) if whole is not None else None)

    # --- clustering -------------------------------------------------------------------------------------------------

    def schedule(self, run):
        every = max(1, round(self.every * run.steps_per_epoch))
        waits = self.tables is not None and self.rounds > 0
        stage = run.fit("train", ready=(lambda: bool(self.aux.learned)) if waits else None)
        for number, step in enumerate(stage, 1):
            yield step
            if waits and number % every == 0 and number // every <= self.rounds:
                self.cluster(run.optimizers.rows if run.optimizers is not None else None)

    def fit(self, rows):
        self._fill_plain(rows)
        self.cluster(rows=rows)

    @torch.no_grad()
    def cluster(self, optimizer=None, rows=None) -> None:
        """Learn the first pointers of all coded fields from the vectors of now, or from a matrix ``rows`` [n, D].

        ``optimizer`` (a ``RowAdam``) forgets the moments of both tables.
        """
        if self.tables is None:
            return
        # on a stream of its own: the same on every device, and whoever compresses a matrix keeps the global one
        generator = torch.Generator().manual_seed((self.seed << 8) + (0 if self.deployed else int(self.aux.learned)))
        fresh = torch.randint(1, PRIME, self.second.shape, generator=generator).to(self.second.device)
        for f, (size, first, row) in enumerate(self.coded_fields()):
            some = drawn(size, self.points * int(self.each[f]), generator).to(fresh.device)
            if rows is None:
                self._cluster(f, size, first, fresh, some, lambda index: self._now(f, first + index))
            else:
                self._cluster(f, size, first, fresh, some, lambda index: picked(rows, row + index).view(
                    len(index), self.chunks, -1))
        self.second.copy_(fresh)
        if not self.deployed:
            self.aux.learned.add_(1)
        for holder, moments in zip(optimizer.holders, optimizer.moments) if optimizer is not None else ():
            for moment in moments if holder is self.tables and moments else ():
                moment.zero_()

    def _now(self, f, number):
        """Present vectors ``[m, C, w]`` of ids ``number [m]`` of the ``f``-th coded field."""
        places = self._places(number, torch.full_like(number, f))
        return self.tables.read(places.view(-1)).view(places.shape + (-1,)).sum(-2)

    def _cluster(self, f, size, first, fresh, some, vectors):
        r, begin = int(self.each[f]), int(self.begin[f])
        chunk = torch.arange(self.chunks, device=fresh.device)
        x = vectors(some)
        centroid = lloyd(x, None, x.new_ones(len(x)), r, r, iterations=self.iterations, seed=self.seed + f)
        width = centroid.shape[2]
        left, count = centroid.new_zeros(self.chunks * r, width), centroid.new_zeros(self.chunks * r)
        for index, x, code in nearest(vectors, size, centroid):
            place = (self.hashed(first + index, torch.full_like(index, f), fresh) + chunk * r).view(-1)
            left.index_add_(0, place, (x - centroid[chunk, code]).view(-1, width))
            count.index_add_(0, place, x.new_ones(len(place)))
            self.pointers.write(first + int(index[0]), code)
        weight = self.tables.weight.detach()
        weight[begin:begin + len(left)] = centroid.flatten(0, 1)
        weight[self.half + begin:self.half + begin + len(left)] = left / count.clamp(min=1)[:, None]

    def deploy(self):
        if not self.deployed and self.tables is not None and not self.tables.weight.is_meta and not self.aux.learned:
            for f, (size, first, _) in enumerate(self.coded_fields()):
                for start in range(first, first + size, BLOCK):
                    number = torch.arange(start, min(start + BLOCK, first + size), device=self.second.device)
                    self.pointers.write(start, self.hashed(number, torch.full_like(number, f), self.aux.first))
        return super().deploy()
