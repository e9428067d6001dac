r"""How many numbers an id uses of its row is learned from its frequency, by twin networks for frequent and rare ids.

**Idea** (adaptively-masked twins layer, AMTL; Yan et al., CIKM 2021, arXiv 2108.11513). An id has a row $v$ of $D$
numbers and uses the first $k$ of them, $e = m \odot v$ with $m$ the sum of the unit vectors up to $k$. From attributes
$s$ of the id's frequency two networks, $h$ for frequent and $l$ for rare ids, give scores of the lengths, joined by a
weight that is itself a function of the frequency:
$$z = a\, h(s) + (1 - a)\, l(s), \quad a = \mathrm{sigmoid}(\bar f), \quad t = \mathrm{softmax}(z / \tau), \quad
m = t\, \mathbf{L},$$
$\mathbf{L}$ lower-triangular ones. Forward, $t$ is the one-hot vector of its largest element; backward, the softmax
(straight-through), so the network learns what one more number would be worth.

**Stored** the first $k$ numbers of each id, end to end, and which ids have which length: maps of the ids that use more
than the smallest length, among these of those that use more than the next, and so on (a bit with running counts or a
sorted list, whichever is lighter). The twins are not shipped, as lengths are fixed once frequencies are. **Size** by
``cells``, the most numbers of all rows. Ids of length 0 look up zeros.

**Training** 300 %, one byte per id and the twins, in two stages: everything together; then the lengths stay and the
rows are trained on.

**Deviations** The paper has no budget: nothing holds lengths back but that the twins may find short rows as good. So
``cells=None`` keeps every length its twins prefer. Ours are the limit, the length 0, and the second stage. The limit
acts twice. In training a penalty ``push`` $\cdot \max(0, \mathrm{E}[\text{numbers}] / cells - 1)$, exact from the
number of ids in each group, weighs ids where the loss weighs occurrences; what is judged and shipped has its scores
shifted by $-b k$, with the smallest $b \ge 0$ at which the lengths fit. Ids of a field are grouped by frequency, two
groups to every doubling, so that the twins are computed once per group, not per occurrence. The paper's widths are
not known to us: each twin of each field has one hidden layer of ``hidden`` tanh units over two attributes, the
logarithm of the frequency (normalised over the ids of the field, $\bar f$) and the rank. At first the full length is
preferred, so training begins as that of a full table. The temperature falls from 1 to 0.1 within ``anneal`` epochs.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method import Method, require_counts
from ..tables import FloatTable, take
from ._levels import OCTAVES, LevelRows, per_group, popularity

COLDEST = 0.1                            # the last temperature
PER_OCTAVE = 2


class Twins(nn.Module):
    """Scores of the lengths 0 .. D for every field and group, from frequency attributes by two networks per field."""

    def __init__(self, fields: int, groups: int, dim: int, hidden: int):
        super().__init__()
        self.register_buffer("attributes", torch.zeros(fields, groups, 2))
        self.register_buffer("ids", torch.zeros(fields, groups, dtype=torch.int64))
        self.first = nn.Parameter(torch.empty(2, fields, 2, hidden))             # of the frequent twin and the rare one
        self.shift = nn.Parameter(torch.zeros(2, fields, 1, hidden))
        self.last = nn.Parameter(torch.empty(2, fields, hidden, dim + 1))
        self.bias = nn.Parameter(torch.zeros(2, fields, 1, dim + 1))
        if not self.first.is_meta:
            nn.init.normal_(self.first)
            nn.init.normal_(self.shift)
            nn.init.normal_(self.last, std=0.1 * hidden ** -0.5)
            self.bias.detach()[..., -1] = 2                  # the full length, clearly

    def fill(self, ids: Tensor) -> None:
        """Take the number of ids of each group [F, Q], rarest group first."""
        self.ids.copy_(ids)
        level = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).double()
        share = ids / ids.sum(1, keepdim=True)
        mean = (share * level).sum(1, keepdim=True)
        deviation = (share * (level - mean).square()).sum(1, keepdim=True).sqrt().clamp(min=1e-6)
        rank = 2 * share.cumsum(1) - share - 1               # from -1, the rarest, to 1
        self.attributes.copy_(torch.stack([((level - mean) / deviation).clamp(-4, 4), rank], 2))

    def forward(self) -> Tensor:
        """Scores [F, Q, D + 1]."""
        h, l = ((self.attributes @ self.first[i] + self.shift[i]).tanh() @ self.last[i] + self.bias[i] for i in (0, 1))
        return torch.lerp(l, h, self.attributes[..., :1].sigmoid())


class Amtl(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "frequency and importance"
    paper = "arXiv 2108.11513"
    group = "dimension allocation"
    space = r"\sum_i k_i + n / 32 + \ldots, \; k_i \le d"
    time = r"O(d)"
    learns_size = True
    budgeted = False
    needs_counts = True

    def __init__(self, fields, dim, cells=None, counts=None, hidden=16, push=1.0, anneal=1.0, rows=None):
        super().__init__(fields, dim)
        if hidden < 1 or push < 0 or anneal <= 0:
            raise ValueError(f"hidden={hidden}, push={push}, anneal={anneal}: expected at least 1 unit, a push of at "
                             "least 0 and a positive number of epochs")
        self.cells = fields.n * dim if cells is None else cells
        if not 0 <= self.cells <= fields.n * dim:
            raise ValueError(f"cells={cells}: expected 0 to {fields.n * dim} numbers")
        if rows is not None and (len(rows) != dim + 1 or sum(rows) != fields.n):
            raise ValueError(f"rows={rows}: expected {dim + 1} numbers of ids, by length, {fields.n} in all")
        self.push, self.anneal, self.rows, self.searching, self.tau = push, anneal, rows, True, 1.0
        self.table, groups = FloatTable(fields.n, dim, fields.bound()), OCTAVES * PER_OCTAVE
        self.aux = nn.Module()
        self.aux.register_buffer("bucket", torch.zeros(fields.n, dtype=torch.uint8))
        self.aux.register_buffer("length", torch.full((len(fields), groups), dim))
        self.aux.twins = Twins(len(fields), groups, dim, hidden)
        if (counts := require_counts(counts, fields, self.table.weight.device)) is not None:
            self.aux.bucket.copy_(popularity(counts, PER_OCTAVE))
            self.aux.twins.fill(per_group(fields, self.aux.bucket, groups))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, fields.n * dim + 1)

    def dense_parameters(self):
        return super().dense_parameters() + (list(self.aux.twins.parameters()) if self.twinned() else [])

    def twinned(self) -> bool:
        return "aux" in self._modules and self.searching

    def lookup(self, codes):
        if self.deployed:
            return self.kept.lookup(codes)[0]
        groups = self.aux.length.shape[1]
        group = take(self.aux.bucket, codes).int() + groups * torch.arange(len(self.fields), device=codes.device)
        return self.table.gather(codes) * take(self.masks().flatten(0, 1), group)

    def masks(self) -> Tensor:
        """Which numbers each field and group uses [F, Q, D]; in training with a gradient for the twins."""
        if not (self.training and self.searching):
            return (torch.arange(self.dim, device=self.aux.length.device) < self.aux.length[..., None]).float()
        soft = (self.aux.twins() / self.tau).softmax(-1)
        self.expected = soft @ torch.arange(self.dim + 1.0, device=soft.device)              # numbers of one id
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1)
        longer = (hard + (soft - soft.detach())).flip(-1).cumsum(-1).flip(-1)                # of at least that length
        return longer[..., 1:]

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.searching:
            for t, step in enumerate(run.fit("train")):
                self.tau = max(COLDEST, 1 - t / (self.anneal * run.steps_per_epoch))
                step.penalty = self.penalty
                yield step
            self.settle()
        yield from run.fit("fine-tune")

    def penalty(self):
        return self.push * (torch.tensordot(self.expected, self.aux.twins.ids.float()) / max(self.cells, 1) - 1).relu()

    def before_evaluation(self):
        if self.twinned() and not self.table.weight.is_meta:
            self.aux.length.copy_(self.decide())

    @torch.no_grad()
    def decide(self) -> Tensor:
        """Lengths [F, Q] of the highest scores, shifted as little as makes them fit."""
        scores, ids = self.aux.twins().double(), self.aux.twins.ids
        number = torch.arange(self.dim + 1, device=scores.device)

        def shifted(b):
            return (scores - b * number).argmax(-1)

        low, high = 0.0, float(scores.amax() - scores.amin()) + 1            # at the latter every length is 0
        if int((shifted(low) * ids).sum()) <= self.cells:
            return shifted(low)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if int((shifted(middle) * ids).sum()) <= self.cells else (middle, high)
        return shifted(high)

    # --- what it leads to ---------------------------------------------------------------------------------------

    def settle(self):
        self.before_evaluation()
        self.searching = False
        self.rows = [int(x) for x in torch.bincount(self.aux.length.view(-1), self.aux.twins.ids.view(-1).double(),
                                                    minlength=self.dim + 1)]
        self.fitted = {"rows": self.rows}

    def allocation(self):
        return self.kept.per_id()

    def deploy(self):
        if not self.deployed:
            weight = self.table.weight.detach()
            if not weight.is_meta and self.searching:
                self.settle()
            self.kept = LevelRows(self.fields.n, self.dim, range(self.dim + 1), self.rows, weight.device, self.cells)
            if not weight.is_meta:
                group = torch.repeat_interleave(self.fields.size.to(weight.device)) * self.aux.length.shape[1]
                length = take(self.aux.length.view(-1), group.add_(self.aux.bucket))
                self.kept.fill(length, lambda ids, w: weight.index_select(0, ids)[:, :w])
            del self.table
        return super().deploy()
