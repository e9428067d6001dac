r"""Ids share a row by their remainder, and each multiplies it by a number of its own.

**Idea** (MEmCom; Pansare et al., MLSys 2022, arXiv 2203.10135). Ids that share a row need not share a vector: one
number per id tells them apart, a second one, if wanted, moves all dimensions alike.
$$e(i) = U_f[i \bmod m_f] \cdot V[i] \;(+\; W[i])$$

**Stored** $m_f = \lceil n_f \cdot rows / n_{max} \rceil$ shared rows of every field as ``hash_trick`` has them, a
multiplier for every id, and with ``bias=True`` a bias for every id. **Size** by ``rows``, the shared rows of the
largest field. The numbers per id are a floor: 6.25 % at dimension 16, 12.5 % with biases; below it the budget is
unreachable.

**Training** one stage, in place: three times what ships.

**Deviations** Multipliers begin at 1 and biases at 0, from where they may go anywhere, below zero too; the first
values were not recovered from the source. The paper's ids are sorted by frequency, so the most frequent ones never
share a row; ids of this study are in the order of their strings, and a map to another order would take 32 bits an id.
``|int8`` takes one scale for all multipliers, a byte each, so the floor falls to a quarter (``|fp16``: a half).
``fit`` gives a trained matrix's vectors that share a row their best common direction (20 power iterations), and with
biases takes each vector's mean first.
"""
from __future__ import annotations

import torch

from ..method import BLOCK, alone
from ..tables import FloatArray, as_rows, take
from .hash_trick import HashTrick

ROUNDS = 20


class Memcom(HashTrick):
    paper = "arXiv 2203.10135"
    space = r"\sum_f m_f d + n"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None, bias=False):
        if rows is not None and not 1 <= rows <= fields.largest:
            raise ValueError(f"rows={rows}: expected 1 to {fields.largest}, the shared rows of the largest field")
        super().__init__(fields, dim, rows)
        self.scale = FloatArray(fields.n)
        self.bias = FloatArray(fields.n) if bias else None
        if not self.scale.weight.is_meta:
            self.scale.weight.detach().fill_(1)

    def encode(self, ids):
        return super().encode(ids), self.fields.flat(ids)

    def lookup(self, codes):
        x = self.table.gather(codes[0]) * self.scale.blocks(codes[1], 1)
        return x if self.bias is None else x + self.bias.blocks(codes[1], 1)

    def _row(self, flat, field):
        return (flat - take(self.fields.offset, field)) % take(self.modulus, field) + take(self.start, field)

    @torch.no_grad()
    def fit(self, rows):
        # the best rank-one form of the vectors that share a row: all else is orthogonal to their common direction
        weight, scale = self.table.weight.detach(), self.scale.weight.detach()
        common = torch.randn(1, self.dim, generator=torch.Generator().manual_seed(self.seed))
        common = common.to(weight.device).expand(weight.shape)
        for last in [False] * ROUNDS + [True]:
            total, square = torch.zeros_like(weight), weight.new_zeros(len(weight), 1)
            for start in range(0, self.fields.n, BLOCK):
                part = as_rows(rows, start, BLOCK).to(weight.device)
                flat = torch.arange(start, start + len(part), device=weight.device)
                row = self._row(flat, self.fields.of(flat))
                if self.bias is not None:
                    self.bias.weight.detach()[start:start + len(part)] = part.mean(1)
                    part = part - part.mean(1, keepdim=True)
                factor = (part * take(common, row)).sum(1, keepdim=True)
                if last:                                              # common is a unit vector now
                    scale[start:start + len(part)] = factor[:, 0]
                    square.index_add_(0, row, factor.square())
                else:
                    total.index_add_(0, row, factor * part)
            if not last:
                common = torch.nn.functional.normalize(total, dim=1)
        # multipliers of root mean square 1 within each row, as training begins with
        users = torch.zeros_like(square)
        for start in range(0, self.fields.n, BLOCK):
            flat = torch.arange(start, min(start + BLOCK, self.fields.n), device=weight.device)
            row = self._row(flat, self.fields.of(flat))
            users.index_add_(0, row, users.new_ones(len(flat), 1))
        size = (square / users.clamp(min=1)).sqrt()
        weight.copy_(common * size)
        for start in range(0, self.fields.n, BLOCK):
            flat = torch.arange(start, min(start + BLOCK, self.fields.n), device=weight.device)
            row = self._row(flat, self.fields.of(flat))
            scale[start:start + len(flat)] /= take(size, row)[:, 0].clamp(min=1e-30)

    def allocation(self):
        own = self.dim * alone(self.fields, self.table.shape[0], self._row, self.modulus.device).int()
        return own + 1 + (self.bias is not None)
