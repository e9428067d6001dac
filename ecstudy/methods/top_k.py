"""Own rows for the most frequent ids, one shared row per field for all the rest.

**Idea** The trivial frequency-aware baseline that the paper lacks: spend the budget on the ids that occur most in the
training rows, whatever their field, and give up on the others.

**Stored** ``top`` exclusive rows, ``F`` shared rows, and the map from id to row, which is the lighter of two forms
for the given size: the sorted ids (one int32 per exclusive row, found by binary search) or one bit per id with
running counts. **Size** by ``top``.

**Training** one stage, in place; shared rows train on everything that falls on them. Ties in frequency go to the
lower id, so the choice is deterministic.
"""
from __future__ import annotations

import torch

from ..fields import derived
from ..maps import marked_ids
from ..method import Method, alone, fit_means, require_counts
from ..tables import FloatTable


class TopK(Method):
    knob = "top"
    family = "baseline"
    aware = "frequency"
    paper = "baseline of this study"
    group = "frequency split"
    space = r"(k + F)\,d + \min(k,\ 1.125\,n / 32)"
    time = r"O(d + \log k)"
    needs_counts = True

    def __init__(self, fields, dim, top=None, counts=None):
        super().__init__(fields, dim)
        self.top = fields.n // 10 if top is None else top
        if not 0 <= self.top <= fields.n:
            raise ValueError(f"top={self.top}: expected 0 <= top <= {fields.n} ids")
        self.map = marked_ids(fields.n, self.top)
        self.table = FloatTable(self.top + len(fields), dim, fields.bound())
        counts = require_counts(counts, fields, self.table.weight.device)
        if counts is not None:
            order = torch.sort(counts, descending=True, stable=True).indices
            self.map.fill(order[:self.top].sort().values)
        derived(self, "number", range(len(fields)))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(0, fields.n + 1)

    def encode(self, ids):
        place = self.map.find(self.fields.flat(ids))
        return torch.where(place < 0, self.top + self.number, place)     # shared rows stand at the end

    def _row(self, flat, field):
        place = self.map.find(flat)
        return torch.where(place < 0, self.top + field, place)

    def fit(self, rows):
        fit_means(self.table.weight.detach(), rows, self.fields, self._row)      # exclusive rows are copied

    def allocation(self):
        return self.dim * alone(self.fields, self.table.shape[0], self._row, self.number.device).int()

    def lookup(self, codes):
        return self.table.gather(codes)
