"""Soft gates per frequency group and dimension, learned on validation rows, decide which values survive pruning.

**Idea** (AutoSrh; Kong et al., IEEE Transactions on Knowledge and Data Engineering, 2023). Ids are grouped by
training frequency; each group has one gate per dimension, ``e = v * gate[group]``. Gates are learned on validation
rows with an L1 penalty; multiplied into the table, they make global magnitude pruning aware of how much each
dimension matters to each group.

**Stored** ``kept`` values and an index that finds them, in whichever form is about the lightest. **Size** by ``kept``.

**Training** four stages, each with a fresh optimiser. The full table until validation stops improving (gates at 1);
an alternating search, one step of the embeddings on training rows with the head frozen, one step of the gates on
validation rows; then gates are multiplied in and all but the ``kept`` largest values are set to zero; what is left is
fine-tuned with the head, and zeros stay zero. All budgets share the first two. The group of every id (one byte) and
the gates exist in training only: 301.6 %.

**Deviations** The paper's text trains after pruning, and so does this; its published code retrains the whole table
first, with frozen gates, and prunes at the very end (``order="published"``), which below 1 % loses what the network
relied on. A stage may end with the state it began with, if training further only lowers validation AUC. The gates
move by ``gate <- clip(gate - 0.001 g / mean|g|, 0, 1)``, the published first-order rule. Groups hold about equal
numbers of ids, equal counts stay together, and a count shared by more than its part of the ids is a group of its own.
The group map is one byte per id, not an int32 (306.3 % in the paper). The threshold is an exact k-th value.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method import Step, require_counts
from ..tables import take
from ._pruned import Pruned


def frequency_groups(counts: Tensor, groups: int) -> Tensor:
    """Group of each id, uint8 [n]: frequent first, about equal sizes, equal counts together."""
    count, inverse, size = torch.unique(-counts, return_inverse=True, return_counts=True)      # most frequent first
    alone = torch.zeros_like(size, dtype=torch.bool)
    while int((~alone).sum()) and groups - int(alone.sum()) > 1:
        share = size[~alone].sum() / (groups - alone.sum())
        huge = ~alone & (size > share)
        if not bool(huge.any()):
            break
        alone[int((size * huge).argmax())] = True
    rest = torch.where(alone, 0, size)
    free = groups - int(alone.sum())
    part = ((rest.cumsum(0) - rest) * free // rest.sum().clamp(min=1)).clamp(max=free - 1)     # of what is not alone
    label = torch.where(alone, groups + torch.arange(len(size)), part)
    return torch.unique(label, return_inverse=True)[1][inverse].to(torch.uint8)


class AutoSrh(Pruned):
    aware = "frequency and importance"
    paper = "IEEE TKDE 2023"
    needs_counts = True

    def __init__(self, fields, dim, kept=None, counts=None, groups=6, gate_lr=0.001, l1=1e-5, order="paper"):
        super().__init__(fields, dim, kept)
        if order not in ("paper", "published"):
            raise ValueError(f"order={order!r}: expected 'paper' (prune, then fine-tune) or 'published' (prune last)")
        if not 1 <= groups <= 255:
            raise ValueError(f"groups={groups}: expected 1 to 255 groups of ids")
        self.gate_lr, self.l1, self.order = gate_lr, l1, order
        self.aux = nn.Module()
        self.aux.gate = nn.Parameter(torch.ones(groups, dim), requires_grad=False)
        self.aux.register_buffer("group", torch.zeros(fields.n, dtype=torch.uint8))
        counts = require_counts(counts, fields, self.table.weight.device)
        if counts is not None:
            self.aux.group.copy_(frequency_groups(counts, groups))

    def lookup(self, codes):
        rows = self.table.gather(codes)
        return rows if self.deployed else rows * take(self.aux.gate, take(self.aux.group, codes).long())

    def penalty(self):
        return self.l1 * self.aux.gate.abs().sum()

    def move_gates(self, gradients):
        gradient = gradients[0]
        gradient = gradient / (gradient.abs().mean(1, keepdim=True) + 1e-8)
        with torch.no_grad():
            self.aux.gate.sub_(self.gate_lr * gradient).clamp_(0, 1)

    def schedule(self, run):
        yield from run.fit("warm-up", shared="full")
        self.aux.gate.requires_grad_(True)
        # gates and weights do not depend on the budget: all budgets share every stage
        label = f"autosrh(gate_lr={self.gate_lr}, groups={len(self.aux.gate)}, l1={self.l1})"
        for step in run.fit("search", shared=f"{label} search"):
            step.update = "emb"
            yield step
            yield Step("valid", update=self.move_gates, wrt=[self.aux.gate], penalty=self.penalty)
        self.aux.gate.requires_grad_(False)
        if self.order == "published":
            yield from run.fit("retrain", shared=f"{label} retrain")
            return
        self.multiply_gates()
        self.cut()
        yield from run.fit("fine-tune")

    @torch.no_grad()
    def multiply_gates(self):
        """Put the gates into the table and begin again with gates of 1, block by block."""
        weight = self.table.weight
        for start in range(0, len(weight), 1 << 18):
            group = self.aux.group[start:start + (1 << 18)]
            weight[start:start + (1 << 18)] *= take(self.aux.gate, group.long())
        self.aux.gate.fill_(1)

    def deploy(self):
        if not self.deployed and not self.table.weight.is_meta:
            self.multiply_gates()
        return super().deploy()
