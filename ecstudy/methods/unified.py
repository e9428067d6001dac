r"""One hashed table for all fields: every field finds its vectors with seeds of its own, in several pieces.

**Idea** (Unified Embedding, or Feature Multiplexing; Coleman et al., NeurIPS 2023, arXiv 2305.12102). Instead of a
small table for each field all fields share a large one, so no field's share of the budget need be chosen. Ids of one
field that collide cannot be told apart, but collisions between fields do little harm: the network reads each field
with weights of its own, and these come to point in different directions. Field $f$ looks up $t$ pieces,
$$e_f(i) = \big[\, T[h_{f1}(i)],\ \ldots,\ T[h_{ft}(i)] \,\big],$$
concatenated (``combine="sum"``: summed), so two ids are alike only where all $t$ hashes agree.

**Stored** the table $[M, d / t]$ (summed: $[M, d]$) and a seed for each look-up of each field. **Size** by ``rows``
$= M$: any budget is met to within one row.

**Training** one stage, in place: three times the table.

**Deviations** Two look-ups (one at an odd dimension) are our default; ``lookups=1`` is the plain multiplexed table. In
the paper the number of look-ups is tuned for every field, and so is the width that a field gets; here the models take
all fields at one dimension. Summed rows begin smaller by $\sqrt t$, so vectors begin like those of the full table.
``fit``, concatenated, takes the mean of all pieces that share a row.
"""
from __future__ import annotations

import math

from ..method import Method, fit_means
from ..tables import FloatTable, take
from ._hashing import Hashes


class Unified(Method):
    knob = "rows"
    family = "inter-feature"
    paper = "arXiv 2305.12102"
    group = "hashing"
    space = r"M d / t"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None, lookups=None, combine="concat"):
        super().__init__(fields, dim)
        self.lookups = (1 if dim % 2 else 2) if lookups is None else lookups
        if combine not in ("concat", "sum"):
            raise ValueError(f"combine={combine!r}: expected 'concat' or 'sum'")
        if self.lookups < 1 or combine == "concat" and dim % self.lookups:
            raise ValueError(f"lookups={lookups}: expected a divisor of the embedding dimension {dim}, or "
                             "combine='sum' with at least one")
        self.combine, self.width = combine, dim // self.lookups if combine == "concat" else dim
        self.rows = fields.n * dim // self.width if rows is None else rows
        if not 1 <= self.rows <= 2 ** 31:
            raise ValueError(f"rows={self.rows}: expected 1 to 2^31 rows of {self.width} numbers")
        bound = fields.bound() if combine == "concat" else fields.bound() / math.sqrt(self.lookups)
        self.table = FloatTable(self.rows, self.width, bound)
        self.hash = Hashes(len(fields), self.lookups)

    @classmethod
    def sizes(cls, fields, dim, lookups=None, combine="concat", **options):
        pieces = (1 if dim % 2 else 2) if lookups is None else lookups
        return range(1, min(fields.n * (pieces if combine == "concat" else 1), 2 ** 31) + 1)

    def encode(self, ids):
        return self.hash(ids, self.rows)

    def lookup(self, codes):
        pieces = self.table.gather(codes)
        return pieces.flatten(-2) if self.combine == "concat" else sum(pieces.unbind(-2))

    def fit(self, rows):
        if self.combine == "sum" and self.lookups > 1:
            raise TypeError("unified(combine='sum') learns by training, not from a matrix; leave combine out")
        fit_means(self.table.weight.detach(), rows, self.fields, lambda flat, field: self.hash(
            flat - take(self.fields.offset, field), self.rows, take(self.hash.seed, field)))
