r"""Rows of their own for the most frequent ids; every other id is the sum of two hashed rows of one table.

**Idea** (Zhang et al., RecSys 2020, arXiv 2007.14523). Frequent ids are worth a row, rare ones are not, but rare ids
that share a row with a frequent one disturb it. So the $K$ most frequent ids $H$ leave the hashed table, and two
hashes tell the others apart: by one an id agrees with about $n / m$ others, by both with $n / m^2$.
$$e(i) = P[\mathrm{rank}(i)] \;\text{ for } i \in H, \qquad e(i) = Q[h_1(i)] + Q[h_2(i)] \;\text{ otherwise.}$$
``combine="concat"`` puts two half rows one after the other instead; then their order counts.

**Stored** the $K$ rows and the $m$ shared ones, the map from a frequent id to its row (the lighter of sorted ids and a
bit per id), and the seeds of both hashes. **Size** by ``rows`` $= K + m$, of which the share ``hot`` are for the
frequent ids of all fields.

**Training** one stage, in place: three times the table, and the map.

**Deviations** The paper has no code and leaves silent how much goes to frequent ids: half is our choice. One table
serves all fields, and the two rows of an id always differ. Rows of the shared part begin smaller by $\sqrt 2$, so
their sums begin like rows of the full table. An id's row is read twice and halved where it has one of its own: one
gather serves both kinds.

Admission by frequency, which feature stores of today offer (an id gets a row once it was seen often enough, all others
share one), is ``top_k``; with the others hashed once per field it is ``adapt_emb``.
"""
from __future__ import annotations

import math

import torch

from ..maps import marked_ids
from ..method import Method, owned, require_counts
from ..tables import FloatTable
from ._hashing import Hashes, below


class DoubleHash(Method):
    knob = "rows"
    family = "inter-feature"
    aware = "frequency"
    paper = "arXiv 2007.14523"
    group = "hashing"
    space = r"(K + m)\,d + \min(K,\ 1.125\,n / 32)"
    time = r"O(d + \log K)"
    needs_counts = True

    def __init__(self, fields, dim, rows=None, hot=0.5, combine="sum", counts=None):
        super().__init__(fields, dim)
        self.rows = max(1, fields.n // 10) if rows is None else rows
        if not 1 <= self.rows <= fields.n:
            raise ValueError(f"rows={rows}: expected 1 to {fields.n}, rows of frequent ids and shared rows together")
        if not 0 <= hot <= 1:
            raise ValueError(f"hot={hot}: expected the share of the rows that frequent ids own, from 0 to 1")
        if combine not in ("sum", "concat"):
            raise ValueError(f"combine={combine!r}: expected 'sum' or 'concat'")
        if combine == "concat" and dim % 2:
            raise ValueError(f"combine='concat' at dimension {dim}: expected an even one, or use combine='sum'")
        self.parts = 2 if combine == "concat" else 1                  # table rows to a vector
        self.hot = min(round(hot * self.rows), self.rows - 1)
        self.shared = (self.rows - self.hot) * self.parts
        self.map = marked_ids(fields.n, self.hot)
        self.hash = Hashes(2)
        self.table = FloatTable(self.rows * self.parts, dim // self.parts, fields.bound())
        weight = self.table.weight.detach()
        if self.parts == 1 and not weight.is_meta:
            weight[self.hot:] *= math.sqrt(0.5)
        if (counts := require_counts(counts, fields, weight.device)) is not None:
            order = torch.sort(counts, descending=True, stable=True).indices
            self.map.fill(order[:self.hot].sort().values)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, fields.n + 1)

    def encode(self, ids):
        """Both rows of each id [B, F, 2]: the same row twice, or two halves, for an id with a row of its own."""
        return self._rows(self.fields.flat(ids))

    def _rows(self, flat):
        own = self.map.find(flat) * self.parts
        first, second = self.hash.bits(flat).unbind(-1)
        first = below(first, self.shared)
        second = below(second, self.shared - 1) + first + 1 if self.shared > 1 else first     # any of the others
        second = torch.where(second >= self.shared, second - self.shared, second)
        rare, base = own < 0, self.hot * self.parts
        return torch.stack([torch.where(rare, first + base, own),
                            torch.where(rare, second + base, own + (self.parts - 1))], -1)

    def lookup(self, codes):
        rows = self.table.gather(codes)
        if self.parts == 2:
            return rows.flatten(-2)
        first, second = rows.unbind(-2)                       # faster than a sum over them
        return (first + second) * torch.where(codes[..., :1] < self.hot, 0.5, 1.0)

    def allocation(self):
        """A frequent id owns its row; of the others' rows those that no second id falls on."""
        own = owned(self.fields, self.rows * self.parts, lambda flat, field: self._rows(flat), self.hash.seed.device)
        return (own * (self.dim // self.parts)).clamp(max=self.dim)
