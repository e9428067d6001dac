r"""Product quantisation with more centroids for rows of larger norm.

**Idea** (the MagPQ of arXiv 2311.15578, section 5.5, after MGQE). Rows are grouped by falling norm such that each group
has the same total norm, and quantised group by group with codebooks of their own, $2^{b + g - 1 - j}$ centroids per
part in group $j$ of $g$: of two groups the first has $2^{b+1}$.

**Stored** packed codes of $M$ parts per row, $M (b + g - 1 - j) / 8$ bytes rounded up; $g$ codebooks of
$2^{b + g - 1 - j} \times d$ numbers; and $g - 1$ times 1.25 bits per row that say in which group it is and where
(:class:`ecstudy.packed.Marks`). **Size** by ``parts``, any number from 1 to $d$.

**Training** none: trained vectors are compressed. One pass for the norms, unless ``weights`` are given to
``ecstudy.compress``: vectors that were normalised all have norm one, so their norms before that are needed (or other
numbers, as how often a passage is retrieved). k-means learns from 256 rows per centroid of each group.

**Deviations** The published code keeps an int32 per row where marks do. What a budget buys must not depend on the
vectors, so code space is laid out for groups of equal numbers of rows, the most that the heavier groups can have; a
heavy group that is smaller leaves a part of it unused. ``unit=True`` is told at ``opq``.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..packed import WORD, Marks, code_bytes, unpack
from ..tables import take
from ._posttrain import PostTraining, equal_groups, weights_of
from ._product import POINTS, Codebooks, checked_bits, common_norm, of_norm


class MagPq(PostTraining):
    knob = "parts"
    aware = "importance"
    paper = "arXiv 2311.15578"
    group = "product quantisation"
    space = r"\frac{1}{32} n M (b + \frac{g - 1}{2}) + 2^b (2^g - 1) d"
    time = r"O(d)"
    weights = None

    def __init__(self, fields, dim, parts=None, groups=2, bits=8, half=False, unit=False):
        super().__init__(fields, dim)
        if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= min(8, fields.n):
            raise ValueError(f"groups={groups!r}: expected an integer, 1 to {min(8, fields.n)}")
        checked_bits(bits, 17 - groups)
        self.parts = max(1, dim // 8) if parts is None else parts
        self.groups, self.bits = groups, [bits + groups - 1 - g for g in range(groups)]
        self.books = nn.ModuleList(Codebooks(dim, self.parts, b, half) for b in self.bits)
        self.marks = nn.ModuleList(Marks(fields.n) for _ in range(groups - 1))        # rows of the groups 0 .. j
        self.width = [code_bytes(self.parts, b) for b in self.bits]
        most = [min(fields.n, -(-fields.n * g // groups) + (g > 0)) for g in range(groups + 1)]   # rows before group g
        size = sum(w * (b - a) for w, a, b in zip(self.width, most, most[1:]))
        self.register_buffer("bytes", torch.zeros(size + WORD - 1, dtype=torch.uint8))
        self.register_buffer("norm", torch.zeros(()) if unit else None)
        self.register_buffer("first", torch.zeros(groups, dtype=torch.int64))         # byte where a group begins

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    def learn(self, rows):
        group = equal_groups(weights_of(rows, self.weights), self.groups)
        ends = torch.tensor(self.width) * torch.bincount(group, minlength=self.groups)
        self.first.copy_(ends.cumsum(0) - ends)
        for number, marks in enumerate(self.marks):
            marks.records.zero_()
            marks.fill((group <= number).nonzero().view(-1).to(self.first.device))
        generator, samples = torch.Generator().manual_seed(self.seed), []
        for number, books in enumerate(self.books):
            row = (group == number).nonzero().view(-1)
            points = POINTS * books.k if self.sample is None else self.sample
            if len(row) > points:
                row = row[torch.randperm(len(row), generator=generator)[:points]].sort().values
            samples.append(self._picked(rows, row))
            books.learn(samples[-1], self.seed)
        if self.norm is not None:
            self.norm.fill_(common_norm(*samples))

    @staticmethod
    def _picked(rows, row):
        own = rows[row.to(rows.device)] if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows[row.numpy()]))
        own = own.detach().float().cpu()
        if not bool((finite := torch.isfinite(own).all(1)).all()):
            raise ValueError(f"row {int(row[~finite][0])} holds NaN or infinity: expected finite vectors; drop or "
                             "repair such rows first")
        return own

    def place(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Group of each of the rows ``[...]`` and the byte where its codes begin."""
        counts, group = [torch.zeros_like(row)], torch.zeros_like(row)
        for marks in self.marks:
            found, inside = marks.locate(row)
            counts.append(found)
            group += 1 - inside
        rank = torch.stack([*counts, row]).diff(dim=0).gather(0, group[None])[0]      # rows of its group before it
        return group, take(self.first, group) + rank * torch.tensor(self.width, device=row.device)[group]

    def put(self, start, block):
        group, at = self.place(torch.arange(start, start + len(block), device=self.bytes.device))
        for number, books in enumerate(self.books):
            mine = (group == number).nonzero().view(-1)
            content = books.encode(block[mine.to(block.device)]).to(self.bytes.device)
            self.bytes[at[mine][:, None] + torch.arange(content.shape[1], device=at.device)] = content

    def lookup(self, codes):
        flat = codes.reshape(-1)
        group, at = self.place(flat)
        out = torch.empty(len(flat), self.dim, device=flat.device)
        for number, books in enumerate(self.books):
            mine = (group == number).nonzero().view(-1)
            out[mine] = books.decode(unpack(self.bytes, at[mine], self.parts, books.bits))
        return of_norm(out, self.norm).view(codes.shape + (self.dim,))
