r"""A controller mixes rows of several widths by the popularity of the id; what ships is its favourite for each group.

**Idea** (AutoEmb; Zhao et al., ICDM 2021, arXiv 2002.11252). Each id has a row of every candidate width
$c \in \{2, 4, 8, \dots, D\}$, lifted to $D$ by a matrix per field and candidate, normalised over the batch and passed
through tanh. A controller reads how often the id occurs and weighs the candidates,
$$e(i) = \sum_c p_c(\mathrm{popularity}(i))\, \tanh(\mathrm{norm}(v_c P_{f,c})), \quad p = \mathrm{softmax}(\dots):$$
wide rows for ids with data enough to learn them. Rows learn on training rows, the controller on validation rows, by
turns.

**Stored** As published nothing is saved: the mixture is soft at serving too and needs all rows of an id, 187.5 % at
dimension 16. So this is the hard variant: ids of a field are grouped by popularity, one group to every doubling of the
count, and each group keeps the one width that the controller favours. Stored are the rows, each as wide as its id's
group says, end to end; which ids have which width: maps of the ids that have more than the narrowest, among these of
those with more than the next, and so on; a matrix per field and width below $D$, and the statistics of the
normalisation. **Size** by ``cells``, the most numbers of all rows. The paper's method has no budget. ``cells=None``
takes each group's favourite, under a limit the widths of the highest total log-weight over all occurrences that fit are
taken, by dynamic programming over the groups. The floor is the narrowest width everywhere, 2/16 at dimension 16, with
the maps 12.9 % (``first=1``: 6.7 %).

**Training** two stages. The search holds a row of every candidate and both moments: 562.5 % at dimension 16, and one
byte per id; all budgets share it. Then new rows of the chosen widths are trained under the head of the search, with a
fresh optimiser.

**Deviations** Everything after the search is ours. Popularity is the number of training occurrences, where the paper
streams its log and counts what came so far; its controller may also read the last weights and the last loss, which an
id would have to store at serving. The controller is one network for all fields with an embedding for each group, 512
units as published, computed once per group instead of once per occurrence; its normalisations are over the groups, so
its answer does not depend on the batch. Validation rows replace the previous batch of the stream. ``lr`` of the
controller is 0.001; published is 0.0001, for 30,000 steps. What ships is normalised by field over all its ids, not per
width.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method import Method, Step, require_counts
from ..tables import take
from ._levels import OCTAVES, Controller, Sized, per_group, popularity
from ._search import Candidates, allocate, candidates


class Mixture(Candidates):
    """Candidates weighed for each id by its group."""

    def __init__(self, fields, dim, widths):
        super().__init__(fields, dim, widths)
        del self.alpha                               # the controller takes its place
        self.controller = Controller(len(fields), OCTAVES, 1, len(widths))

    def shares(self) -> Tensor:
        """Weight of each candidate for each field and group [F, Q, C]."""
        return self.controller().softmax(-1)[:, :, 0]

    def mixed(self, rows: Tensor, group: Tensor) -> Tensor:
        """Rows of the full table [B, F] and their groups, counted through all fields -> [B, F, D]."""
        return torch.einsum("fbcd,bfc->bfd", self.lifted(rows).tanh(), take(self.shares().flatten(0, 1), group))


class AutoEmb(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "frequency and importance"
    paper = "arXiv 2002.11252"
    group = "dimension allocation"
    space = r"\sum_i d_i + n / 32 + \ldots + F d^2"
    time = r"O(d_i d)"
    learns_size = True
    budgeted = False
    needs_counts = True

    def __init__(self, fields, dim, cells=None, counts=None, first=2, lr=0.001, rows=None):
        super().__init__(fields, dim)
        if first < 1 or lr <= 0:
            raise ValueError(f"first={first}, lr={lr}: expected a smallest width of at least 1 and a positive rate")
        self.widths = candidates(dim, first)
        self.cells, least = fields.n * dim if cells is None else cells, fields.n * self.widths[0]
        if not least <= self.cells <= fields.n * dim:
            raise ValueError(f"cells={cells}: expected {least} to {fields.n * dim} numbers, the narrowest and the "
                             "widest rows")
        if rows is not None and (len(rows) != len(self.widths) or sum(rows) != fields.n):
            raise ValueError(f"rows={rows}: expected numbers of ids of the widths {self.widths}, {fields.n} in all")
        self.first, self.lr, self.rows, self.sized = first, lr, None, None
        self.aux = nn.Module()
        self.aux.register_buffer("group", torch.zeros(fields.n, dtype=torch.uint8))
        self.aux.register_buffer("level", torch.zeros(len(fields), OCTAVES, dtype=torch.int64))
        self.aux.register_buffer("ids", torch.zeros(len(fields), OCTAVES, dtype=torch.int64))
        self.aux.register_buffer("seen", torch.zeros(len(fields), OCTAVES, dtype=torch.float64))
        if rows is not None:
            self.settle(rows)
        else:
            self.aux.search = Mixture(fields, dim, self.widths)
        if (counts := require_counts(counts, fields, torch.empty(0).device)) is not None:
            self.aux.group.copy_(popularity(counts))
            self.aux.ids.copy_(per_group(fields, self.aux.group, OCTAVES))
            self.aux.seen.copy_(per_group(fields, self.aux.group, OCTAVES, counts + 1))

    @classmethod
    def sizes(cls, fields, dim, first=2, **options):
        return range(fields.n * min(first, dim), fields.n * dim + 1)

    def dense_parameters(self):
        return super().dense_parameters() + (list(self.aux.search.matrices) if self.searches() else [])

    def searches(self) -> bool:
        return "aux" in self._modules and "search" in self.aux._modules

    def lookup(self, codes):
        if self.deployed:
            return self.sized(codes)
        group = take(self.aux.group, codes) + OCTAVES * torch.arange(len(self.fields), device=codes.device)
        if self.searches():
            return self.aux.search.mixed(codes, group)
        return self.sized(codes, take(self.aux.level.view(-1), group))

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.searches():
            search = self.aux.search
            search.controller.requires_grad_(True)
            moved = list(search.controller.parameters())
            self.mover = torch.optim.Adam(moved, self.lr)
            # nothing of the search depends on the limit: all budgets share it
            for step in run.fit("search", shared=f"auto_emb(first={self.first}, lr={self.lr}) search"):
                yield step
                search.running = True
                yield Step("valid", update=self.move_controller, wrt=moved)
                search.running = False
            self.choose()
        yield from run.fit("retrain")

    def move_controller(self, gradients):
        for parameter, gradient in zip(self.aux.search.controller.parameters(), gradients):
            parameter.grad = gradient
        self.mover.step()

    # --- what it leads to ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def choose(self):
        """From the search to new rows of one width per group."""
        some, device = self.aux.ids.view(-1).nonzero()[:, 0], self.aux.group.device
        ids, seen = take(self.aux.ids.view(-1), some), take(self.aux.seen.view(-1), some)
        scores = take(self.aux.search.shares().double().log().flatten(0, 1), some) * seen[:, None]
        costs = (ids[:, None] * torch.tensor(self.widths, device=device)).tolist()
        level = torch.tensor(allocate(costs, scores, self.cells), device=device)
        self.aux.level.view(-1)[some] = level
        del self.aux.search
        self.settle(torch.bincount(level, ids.double(), minlength=len(self.widths)).tolist())
        self.sized.to(device)

    def settle(self, rows):
        self.rows = [int(r) for r in rows]
        self.fitted = {"rows": self.rows}
        self.sized = Sized(self.fields, self.dim, self.widths, cascade=False)

    def allocation(self):
        return self.sized.kept.per_id()

    def deploy(self):
        if not self.deployed:
            group, level = self.aux.group, None
            if self.searches() and not group.is_meta:
                self.choose()
            if self.sized is None:                   # not known yet: the most that may come of it
                with torch.device("meta"):
                    self.sized = Sized(self.fields, self.dim, self.widths, cascade=False)
            if not group.is_meta:
                first = torch.repeat_interleave(self.fields.size.to(group.device)) * OCTAVES
                level = take(self.aux.level.view(-1), first.add_(group))
            self.sized.pack(level, self.rows, self.cells)
        return super().deploy()
