"""One row of its own for every id: the uncompressed table that every ratio refers to.

**Stored** ``n x D`` float32. **Size** has no argument: 100 %.

**Training** one stage. Memory while training is 300 %: the table and both Adam moments.
"""
from __future__ import annotations

import torch

from ..method import Method
from ..tables import FloatTable
from ._posttrain import Streaming


class Full(Streaming, Method):
    family = "baseline"
    paper = "uncompressed"
    group = "uncompressed"
    space = r"n d"
    time = r"O(d)"

    def __init__(self, fields, dim):
        super().__init__(fields, dim)
        self.table = FloatTable(fields.n, dim, fields.bound())

    def put(self, start, block):
        self.table.weight.detach()[start:start + len(block)] = block

    def allocation(self):
        return torch.full((self.fields.n,), self.dim, dtype=torch.int32)

    def lookup(self, codes):
        return self.table.gather(codes)
