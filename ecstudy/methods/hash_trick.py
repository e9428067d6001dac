"""Ids share rows by their remainder: ``row = id mod m``, per field.

**Idea** (Weinberger et al., ICML 2009, arXiv 0902.2206). Every field keeps ``m_f = ceil(n_f * rows / n_max)`` rows
and an id takes the row of its remainder. Ids that collide cannot be told apart.

**Stored** one table of ``sum(m_f) x D``. **Size** by ``rows``, the rows of the largest field; the other fields shrink
in proportion. **Training** one stage, in place: memory while training is three times the table.

**Deviations** None from the paper's code, which offers it as an extra beside Table 5. Because ids are in the sorted
order of their strings, remainders are as good as random with respect to frequency.
"""
from __future__ import annotations

import torch

from ..fields import derived
from ..method import Method
from ..tables import FloatTable, as_rows

BLOCK = 1 << 18


class HashTrick(Method):
    knob = "rows"
    family = "inter-feature"
    paper = "arXiv 0902.2206"
    group = "hashing"
    space = r"\sum_f m_f d"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None):
        super().__init__(fields, dim)
        self.rows = fields.largest if rows is None else rows
        moduli = [-(-size * self.rows // fields.largest) for size in fields.sizes]
        derived(self, "modulus", moduli)
        derived(self, "start", [sum(moduli[:f]) for f in range(len(moduli))])
        self.table = FloatTable(sum(moduli), dim, fields.bound())

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, fields.largest + 1)

    def encode(self, ids):
        return ids % self.modulus + self.start

    def fit(self, rows):
        # the mean of the vectors that share a row is their least-squares representative
        total, count = self.table.weight.detach().zero_(), torch.zeros(len(self.table.weight), 1)
        for start in range(0, self.fields.n, BLOCK):
            part = as_rows(rows, start, BLOCK)
            row = torch.arange(start, start + len(part))
            field = self.fields.of(row)
            row = (row - self.fields.offset[field]) % self.modulus[field] + self.start[field]
            total.index_add_(0, row, part)
            count.index_add_(0, row, torch.ones(len(part), 1))
        total /= count.clamp(min=1)

    def lookup(self, codes):
        return self.table.gather(codes)
