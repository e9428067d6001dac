r"""Widths per field by hard masks over columns, learned while the table trains, after a start that sets columns apart.

**Idea** (HAM; Xiao et al., DL4SR 2022, arXiv 2208.08004). First a full table is trained whose columns are pushed to be
orthogonal within each field, so that none says again what another says and a column can go alone: with columns
$v_i, v_j$ of the rows of a batch, the penalty is $\lambda\, \mathrm{mean}_{f,\,i \ne j} \cos^2(v_i, v_j)$. Then every
column has a score $\alpha_{fj}$, and $e_{fj} = v_{fj} \, [\alpha_{fj} \text{ is among the kept}]$. The mask is hard in
the forward pass; backward it passes its gradient straight on to the score, so columns that are switched off can come
back. Weights move on training rows and scores on validation rows, in turn. At last each field is given the columns
that are on.

**Stored** the rows of all fields end to end, and a matrix per field narrower than $D$. **Size** by ``cells``, the
most numbers all this may take: at any time the columns of the highest scores are on that fit, found as for ``sseds``.
A field may lose all its columns (``least=1`` leaves it one).

**Training** three stages of 300 % and less: the table with the penalty (all budgets share it), the search, in which
the numbers allowed fall from all to ``cells`` within ``ramp`` epochs, by the same factor in each step, and which
early stopping may end only then, and the chosen widths, with new rows under the head of the search and a fresh
optimiser. ``widths=[...]`` skips the first two; ``orth=0`` begins with the plain table that other methods share.

**Deviations** No code was published, and form and strength of the penalty, learning rates and the rule for the
threshold could not be recovered: they are ours. Cosines leave lengths alone, where $\lVert V^\top V - I \rVert$ would
force tables that begin at 1e-4 to columns of length 1; they are taken over the distinct rows of a batch, and in fields
of at least $D$ ids, as columns of fewer rows cannot be orthogonal. Scores begin equal and move by plain gradient
descent, so a score is what a column has gained in all; its rate changes no order. Adam, whose steps are of one size
whatever the gradient, ranked columns of fields that do not matter above those of fields that do on planted logs. The
mask follows the scores every ``every`` steps. A budget in one step would switch most columns off before anything is
known of them, hence the ramp. New rows for the last stage are the default as for ``sseds``; ``reset=False`` goes on
from the columns that are on.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..method import Step
from ..ragged import PerField
from ._columns import Columns, keep_columns


class Ham(Columns):
    paper = "arXiv 2208.08004"

    def __init__(self, fields, dim, cells=None, least=0, orth=0.1, ramp=1.0, every=10, reset=True,
                 widths=None):
        super().__init__(fields, dim, cells, "dimension", least, reset, widths)
        if orth < 0 or ramp <= 0 or every < 1:
            raise ValueError(f"orth={orth}, ramp={ramp}, every={every}: expected orth of at least 0, a ramp of more "
                             "than 0 epochs, and every of at least 1 step")
        self.orth, self.ramp, self.every = orth, ramp, every
        if self.mixed is None:
            self.aux.alpha = nn.Parameter(torch.ones(len(fields), dim), requires_grad=False)
            self.aux.register_buffer("mask", torch.ones(len(fields), dim))

    def lookup(self, codes):
        if self.mixed is not None:
            return self.mixed.lookup(codes)
        if self.training and self.orth:
            self._seen = codes
        rows, alpha = self.table.gather(codes), self.aux.alpha
        # adds nothing, and hands the mask's gradient to the scores as it is
        return rows * (self.aux.mask + (alpha - alpha.detach()) if alpha.requires_grad else self.aux.mask)

    def scores(self):
        return self.aux.alpha

    def penalty(self):
        """Mean squared cosine between columns of a field, over the distinct rows of the last batch."""
        large = self.fields.size >= self.dim
        rows = PerField(self._seen, self.fields.offset)
        x = F.normalize(rows.pad(self.table.gather(rows.unique)), dim=1, eps=1e-20)                  # [F, U, D]
        cosine = torch.bmm(x.transpose(1, 2), x).square()
        own = cosine.diagonal(dim1=1, dim2=2).sum(1)
        mean = (cosine.sum((1, 2)) - own) / max(self.dim * (self.dim - 1), 1)
        return self.orth * (mean * large).sum() / large.sum().clamp(min=1)

    @torch.no_grad()
    def move(self, gradients):
        self.aux.alpha.sub_(gradients[0])            # only their order counts: no rate

    def allowed(self, t: int, ramp: int) -> int:
        """Numbers that may be on after ``t`` of ``ramp`` steps: from all to ``cells``, by the same factor each step."""
        whole = self.fields.n * self.dim
        return self.cells if t >= ramp else int(whole * (self.cells / whole) ** (t / ramp))

    def switch(self, limit: int):
        """Switch on the columns of the highest scores that fit."""
        keep = keep_columns(self.aux.alpha, self.fields.sizes, self.dim, limit, self.least, self.per)
        self.aux.mask.copy_(keep)

    def schedule(self, run):
        if self.mixed is None:
            for step in run.fit("pretrain", shared=f"ham(orth={self.orth}) pretrain" if self.orth else "full"):
                step.penalty = self.penalty if self.orth else None
                yield step
            yield from self.search(run)
            self.choose(self.reset)
        yield from run.fit("retrain")

    def search(self, run):
        self.aux.alpha.requires_grad_(True)
        ramp = max(1, round(self.ramp * run.steps_per_epoch))
        limit = self.fields.n * self.dim
        for t, step in enumerate(run.fit("search", ready=lambda: limit == self.cells), 1):
            yield step
            yield Step("valid", update=self.move, wrt=[self.aux.alpha])
            if t % self.every == 0 or t == ramp:
                limit = self.allowed(t, ramp)
                self.switch(limit)
        self.aux.alpha.requires_grad_(False)
