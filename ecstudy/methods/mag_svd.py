r"""Rows are split by their norm, and each group is compressed by a decomposition of its own rank.

**Idea** (MagSVD of arXiv 2311.15578, section 5.5). Rows are sorted by their norm and cut into $g$ groups of equal total
norm, so that the group of the longest rows is the smallest. Each group is compressed like ``svd``, with a basis of
its own and a rank $r_i \propto n_i^{-0.3}$: fewer rows get more dimensions.

**Stored** $n_i \times r_i$ coefficients and an $r_i \times d$ basis of each group, end to end in one array of ``cells``
numbers; the ranks; and one bit per row, with a running count, for every group but the last. **Size** by ``cells``.

**Training** none: trained vectors are compressed, in three passes over the rows: norms, Gram matrices, projections.

**Deviations** The study keeps a 32-bit place for every row, more than a quarter of the budget at 1 % of 384
dimensions. Ranks are rounded down and what is left goes to the groups in turn, so the array is filled up as far as
whole ranks go. ``weights=`` of ``ecstudy.compress`` takes other numbers than norms: those of vectors that were
normalised, or how often a passage is retrieved; without them rows of equal norm are split as they stand.
"""
from __future__ import annotations

import torch
from torch import nn

from ..maps import MarkedIds
from ._posttrain import PostTraining, blocks, equal_groups, leading, weights_of

POWER = -0.3                            # of a group's rank in its number of rows


class MagSvd(PostTraining):
    knob = "cells"
    aware = "importance"
    paper = "arXiv 2311.15578"
    group = "dimension reduction"
    space = r"\sum_{i=1}^g (n_i + d) r_i + 5 (g - 1) n / 128"
    time = r"O(r_i d)"

    def __init__(self, fields, dim, cells=None, groups=2):
        super().__init__(fields, dim)
        least = fields.n + groups * dim
        if not 1 <= groups <= fields.n:
            raise ValueError(f"groups={groups}: expected 1 to {fields.n}, the number of rows")
        self.groups, self.cells = groups, max(least, fields.n * dim // 2) if cells is None else cells
        if self.cells < least:
            raise ValueError(f"cells={cells}: expected at least {least} numbers, one rank for each group")
        self.register_buffer("values", torch.zeros(self.cells))
        self.register_buffer("shape", torch.zeros(groups, 2, dtype=torch.int64))       # rows and rank of each group
        self.maps = nn.ModuleList(MarkedIds(fields.n, 0) for _ in range(groups - 1))

    @classmethod
    def sizes(cls, fields, dim, groups=2, **options):
        return range(fields.n + groups * dim, fields.n * dim + groups * dim * dim + 1)

    def ranks(self, rows: list[int]) -> list[int]:
        """Rank of each group of ``rows``: as large as the cells allow, in the study's proportions."""
        def cut(scale):
            return [min(self.dim, max(1, int(scale * n ** POWER))) for n in rows]

        def cells(ranks):
            return sum(r * (n + self.dim) for r, n in zip(ranks, rows))

        low, high = 0.0, self.dim * max(rows) ** -POWER
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cells(cut(middle)) <= self.cells else (low, middle)
        ranks, left = cut(low), self.cells - cells(cut(low))
        for i, n in enumerate(rows):                                  # one more rank, where it still fits
            if ranks[i] < self.dim and n + self.dim <= left:
                ranks[i], left = ranks[i] + 1, left - n - self.dim
        return ranks

    def parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Coefficients ``[n_i, r_i]`` and basis ``[r_i, D]`` of each group, as they lie in the array."""
        found, start = [], 0
        for n, rank in self.shape.tolist():
            middle, end = start + n * rank, start + (n + self.dim) * rank
            found.append((self.values[start:middle].view(n, rank), self.values[middle:end].view(rank, self.dim)))
            start = end
        if not start:
            raise ValueError("mag_svd holds no vectors yet: fit(rows) first")
        return found

    def learn(self, rows):
        number = equal_groups(weights_of(rows, self.weights), self.groups)
        grams = torch.zeros(self.groups, self.dim, self.dim, dtype=torch.float64)
        for start, block in blocks(rows):
            block, own = block.cpu().double(), number[start:start + len(block)]
            for i in range(self.groups):
                part = block[own == i]
                grams[i].addmm_(part.T, part)
        sizes = torch.bincount(number, minlength=self.groups).tolist()
        self.shape.copy_(torch.tensor(list(zip(sizes, self.ranks(sizes)))))
        for i, map_ in enumerate(self.maps):
            map_.fill((number == i).nonzero().view(-1).to(self.values.device))
        for gram, (_, basis) in zip(grams, self.parts()):
            basis.copy_(leading(gram, len(basis)))

    def find(self, ids):
        """Group of each id ``[k]``, and its place among the rows of that group."""
        group, place = torch.full_like(ids, self.groups - 1), ids.clone()
        for i, map_ in enumerate(self.maps):
            before, marked = map_.locate(ids)
            place -= torch.where(group == self.groups - 1, before, 0)          # what is left for the last group
            place = torch.where(marked, before, place)
            group = torch.where(marked, i, group)
        return group, place

    def put(self, start, block):
        block = block.to(self.values.device)
        group, place = self.find(torch.arange(start, start + len(block), device=block.device))
        for i, (table, basis) in enumerate(self.parts()):
            own = (group == i).nonzero().view(-1)
            table[place[own]] = block[own] @ basis.T

    def lookup(self, codes):
        group, place = self.find(codes.reshape(-1))
        out = torch.zeros(len(group), self.dim, device=codes.device)
        for i, (table, basis) in enumerate(self.parts()):
            own = (group == i).nonzero().view(-1)
            out[own] = table[place[own]] @ basis
        return out.view(codes.shape + (self.dim,))
