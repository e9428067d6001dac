r"""Widths per field from one look at the gradients of a trained model: columns that hardly matter to a field go.

**Idea** (SSEDS; Qu et al., SIGIR 2022, arXiv 2204.03281). A full table is trained. Then every number that a field
gives the network is multiplied by a mask $\alpha_{fj} = 1$, and a column's saliency is how fast the loss would move
with it, averaged over batches $b$: $s_{fj} = \frac{1}{B} \sum_b |\partial L_b / \partial \alpha_{fj}|$. The columns
of the highest saliency stay, as many as the budget has room for. What is left gets a matrix per field that lifts it to
$D$, and is trained again.

**Stored** the rows of all fields end to end, and a matrix per field narrower than $D$. **Size** by ``cells``, the
most numbers all this may take. Columns are taken by saliency (``per="dimension"``, as published) or by saliency per
number that they cost (``per="parameter"``); one that no longer fits is passed over. A field may lose all its columns,
its ids then look up zeros: without that one number per row, 6.25 % at dimension 16, would be the floor
(``least=1`` keeps it so).

**Training** three stages: the full table (300 %; all methods that begin with it and all budgets share it), ``batches``
batches of validation rows that move nothing, and the chosen widths, with new rows under the head of the first stage
and a fresh optimiser. ``widths=[...]`` skips the first two.

**Deviations** The published budget is a share of the columns, whatever they weigh; here it is numbers stored, and as
fields of many ids are a few columns of great weight, the greedy choice passes over what does not fit. Saliency is
taken on validation rows: at the end of training the gradient over training rows is about zero, as it is where training
stops. How many batches is ours (100). Saliency is not normalised to a sum of 1, which changes no order. The paper says
to retrain and not from what; new rows are the default here as for ``auto_dim``, and ``reset=False`` goes on from the
kept columns, with matrices that put each back into its place, so that the pruned model is where training begins. A
field whose columns and matrix would not be smaller than its rows keeps all of it.
"""
from __future__ import annotations

import torch
from torch import nn

from ._columns import Columns


class Sseds(Columns):
    paper = "arXiv 2204.03281"

    def __init__(self, fields, dim, cells=None, per="dimension", least=0, batches=100, reset=True, widths=None):
        super().__init__(fields, dim, cells, per, least, reset, widths)
        if batches < 1:
            raise ValueError(f"batches={batches}: expected at least one batch of validation rows")
        self.batches = batches
        if self.mixed is None:
            self.aux.mask = nn.Parameter(torch.ones(len(fields), dim), requires_grad=False)
            self.aux.register_buffer("saliency", torch.zeros(len(fields), dim))

    def lookup(self, codes):
        if self.mixed is not None:
            return self.mixed.lookup(codes)
        rows = self.table.gather(codes)
        return rows * self.aux.mask if self.aux.mask.requires_grad else rows         # ones, until they are asked about

    def scores(self):
        return self.aux.saliency

    def look(self, gradients):
        self.aux.saliency.add_(gradients[0].abs(), alpha=1 / self.batches)

    def schedule(self, run):
        if self.mixed is None:
            yield from run.fit("warm-up", shared="full")
            self.aux.mask.requires_grad_(True)
            looks = iter(range(self.batches - 1, -1, -1))
            for step in run.fit("saliency", fresh=False, until=lambda: next(looks) == 0):
                step.split, step.update, step.wrt = "valid", self.look, [self.aux.mask]
                yield step
            self.choose(self.reset)
        yield from run.fit("retrain")
