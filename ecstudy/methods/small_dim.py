"""A full table of smaller dimension and a projection to the model's dimension.

**Idea** The trivial baseline against which every clever allocation of dimensions must be measured, absent from the
paper: every id keeps a row of its own, ``width`` numbers wide, and a matrix per field lifts it to ``D``.

**Stored** a table ``n x width`` and ``F`` matrices ``width x D``. **Size** by ``width``, 1 to D-1, so steps of one
number per row; below one number (6.25 % at dimension 16) the budget is unreachable.

**Training** one stage, in place. ``shared=True`` uses one matrix for all fields.
"""
from __future__ import annotations

import torch
from torch import nn

from ..method import Method
from ..tables import FloatTable, as_rows

BLOCK = 1 << 18


class SmallDim(Method):
    knob = "width"
    family = "baseline"
    paper = "baseline of this study"
    group = "dimension allocation"
    space = r"n w + F w d"
    time = r"O(w d)"

    def __init__(self, fields, dim, width=None, shared=False):
        super().__init__(fields, dim)
        self.width = max(dim // 2, 1) if width is None else width
        if not 1 <= self.width <= dim:
            raise ValueError(f"width={self.width}: expected 1 <= width <= {dim}")
        self.table = FloatTable(fields.n, self.width, fields.bound())
        # Xavier-normal like the heads: the projection is a dense layer
        self.projection = nn.Parameter(torch.empty(1 if shared else len(fields), self.width, dim))
        if not self.projection.is_meta:
            nn.init.normal_(self.projection, std=(2 / (self.width + dim)) ** 0.5)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, max(dim, 2))

    def fit(self, rows):
        # truncated SVD through the D x D Gram matrix of each field: one pass to learn it, one to project
        bounds = [*self.fields.offset.tolist(), self.fields.n]
        if len(self.projection) == 1:
            bounds = [0, self.fields.n]
        for field, (first, last) in enumerate(zip(bounds, bounds[1:])):
            gram = torch.zeros(self.dim, self.dim, dtype=torch.float64)
            for start in range(first, last, BLOCK):
                part = as_rows(rows, start, min(BLOCK, last - start)).double()
                gram += part.T @ part
            basis = torch.linalg.eigh(gram).eigenvectors[:, -self.width:].float()
            self.projection.detach()[field] = basis.T
            for start in range(first, last, BLOCK):
                part = as_rows(rows, start, min(BLOCK, last - start))
                self.table.weight.detach()[start:start + len(part)] = part @ basis

    def lookup(self, codes):
        return torch.einsum("bfw,fwd->bfd", self.table.gather(codes),
                            self.projection.expand(len(self.fields), -1, -1))
