"""Ids share rows by their remainder: ``row = id mod m``, per field.

**Idea** (Weinberger et al., ICML 2009, arXiv 0902.2206). Every field keeps ``m_f = ceil(n_f * rows / n_max)`` rows
and an id takes the row of its remainder. Ids that collide cannot be told apart.

**Stored** one table of ``sum(m_f) x D``. **Size** by ``rows``, the rows of the largest field; the other fields shrink
in proportion. **Training** one stage, in place: memory while training is three times the table.

**Deviations** None from the paper's code, which offers it as an extra beside Table 5. Because ids are in the sorted
order of their strings, remainders are as good as random with respect to frequency.
"""
from __future__ import annotations

from ..fields import derived
from ..method import Method, fit_means
from ..tables import FloatTable, take


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
        fit_means(self.table.weight.detach(), rows, self.fields, lambda flat, field: (
            flat - take(self.fields.offset, field)) % take(self.modulus, field) + take(self.start, field))

    def lookup(self, codes):
        return self.table.gather(codes)
