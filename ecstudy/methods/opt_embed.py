r"""Rows below a learned threshold are dropped, and widths per field evolve on one network trained for all of them.

**Idea** (OptEmbed; Lyu et al., CIKM 2022, arXiv 2208.04482). A full table is trained so that any part of it works:
$e = s(\lVert v \rVert_1 - t_f)\; m_w \odot v$, with a step $s$ that drops rows of norm below the threshold
$t_f$ of their field, and a mask $m_w$ that keeps the first $w$ numbers, $w$ drawn anew for every id of a batch.
Thresholds learn through a surrogate gradient of the step ($2 - 4|x|$ to $|x| = 0.4$, then 0.4 to $|x| = 1$,
then 0) and are pushed up by the penalty $\sum_f e^{-t_f}$. Then widths per field evolve: each candidate is judged by
validation AUC without training, half of every generation are mutations and half are crossings of the better half of
the one before.

**Stored** the kept rows end to end, each as wide as its field, and which ids are kept: one bit each with running
counts, or their sorted list, whichever is lighter; nothing if all are. Dropped ids look up zeros. No matrices: what
is cut off a row is zero. **Size** by ``cells``, the most numbers the rows may take. The paper's method has no budget
(50 % on Avazu, 46 % on Criteo, about what random widths take), and neither has ``cells=None``. Under a limit,
candidates that are too large are narrowed, a field drawn at a time in proportion to what it could still give up; if
even one number per row is too much, the rows of smallest norm are dropped.

**Training** three stages: the supernet (300 %, thresholds negligible, one mark per id for what follows; all budgets
share it), the evolution, ``generations * population`` passes over the validation rows less those of candidates met
before, and the chosen part trained on from the supernet's weights with a fresh optimiser.

**Deviations** Candidates are values: the published code mutates lists in place, so its best candidate may change
after it was judged. A crossing cuts the list of fields at any of them; the published one draws a number below D, so
later fields always come from one parent. The map of kept ids is weighed; the paper's figures leave its remap, one
int32 per id, out. Thresholds move as published (``t_lr`` 1e-4, ``push`` 1e-5), which on a log of some thousand steps
is too little to drop a row; on the study's real sample a rate of 1 dropped 0.006 % of them and did not help. There
the evolution matters little too: 24 candidates lead to the validation AUC of 600 within 0.001. Rows that no training
id touched keep their initial values and their place.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import nn

from ..fields import derived
from ..maps import MarkedIds
from ..method import Method
from ..sparse import Bits
from ..tables import FloatArray, FloatTable
from ._evolution import Evolution
from ._mixed import KeptRows, above


class Passed(torch.autograd.Function):
    """1 where x > 0, else 0; with the published surrogate gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        size = ctx.saved_tensors[0].abs()
        return gradient * torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))


class OptEmbed(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "importance"
    paper = "arXiv 2208.04482"
    group = "dimension allocation"
    space = r"\sum_f r_f d_f, \; r_f \le n_f"
    time = r"O(d)"
    learns_size = True
    budgeted = False

    def __init__(self, fields, dim, cells=None, push=1e-5, t_lr=1e-4, generations=30, population=20, widths=None,
                 rows=None):
        super().__init__(fields, dim)
        self.cells = (fields.n + 1) * dim if cells is None else cells
        if self.cells < dim:
            raise ValueError(f"cells={cells}: expected at least {dim}")
        if push < 0 or t_lr < 0:
            raise ValueError(f"push={push}, t_lr={t_lr}: expected numbers of at least 0")
        if generations < 1 or population < 2:
            raise ValueError(f"generations={generations}, population={population}: expected at least 1 and 2")
        for name, given, top in (("widths", widths, [dim] * len(fields)), ("rows", rows, fields.sizes)):
            if given is not None and (len(given) != len(fields) or not all(0 <= g <= t for g, t in zip(given, top))):
                raise ValueError(f"{name}={given}: expected {len(fields)} numbers, one per field, of at most {top}")
        self.push, self.t_lr, self.generations, self.population = push, t_lr, generations, population
        self.table = FloatTable(fields.n, dim, fields.bound())
        self.aux = nn.Module()
        self.aux.threshold = nn.Parameter(torch.zeros(len(fields)), requires_grad=False)
        self.aux.kept = Bits(fields.n)
        self.supernet = widths is None
        derived(self, "width", [dim] * len(fields) if widths is None else widths)
        self.rows = list(fields.sizes if rows is None else rows)              # kept rows of each field
        if widths is not None:
            self.settle(widths)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(dim, (fields.n + 1) * dim + 1)

    def encode(self, ids):
        return self.kept.encode(ids, self.fields) if self.deployed else self.fields.flat(ids)

    def lookup(self, codes):
        if self.deployed:
            return self.kept.lookup(codes)
        number, rows = torch.arange(self.dim, device=codes.device), self.table.gather(codes)
        if not self.supernet:
            rows = rows * (number < self.width[:, None])
            return rows if sum(self.rows) == self.fields.n else rows * self.aux.kept.get(codes)[..., None]
        rows = rows * Passed.apply(rows.abs().sum(-1) - self.aux.threshold)[..., None]
        if self.training:
            width = torch.randint(1, self.dim + 1, codes.shape, device=codes.device)
            return rows * (number < width[..., None])
        return rows

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.supernet:
            self.aux.threshold.requires_grad_(True)
            for step in run.fit("supernet", shared=f"opt_embed(push={self.push} t_lr={self.t_lr}) supernet"):
                step.penalty = self.penalty
                yield step
                self.move_threshold()
            self.aux.threshold.requires_grad_(False)
            self.select()
            self.settle(self.evolution(run.settings.seed).best(self.judge(run), self.generations, self.population))
        yield from run.fit("retrain")

    def evolution(self, seed=0):
        return Evolution(self.rows, self.dim, self.cells - self.dim, seed)

    def judge(self, run):
        """Validation AUC of candidate widths, on the weights of the supernet."""
        def score(widths):
            self.width.copy_(torch.tensor(widths))
            return run.score()
        return score

    def penalty(self):
        return self.push * torch.exp(-self.aux.threshold).sum()

    @torch.no_grad()
    def move_threshold(self):
        if self.aux.threshold.grad is not None:
            self.aux.threshold -= self.t_lr * self.aux.threshold.grad
        self.aux.threshold.grad = None

    def select(self):
        """Mark the rows above their threshold; the largest of them if the limit has no room for one number each."""
        kept, self.rows = above(self.fields, self.table.weight.detach(), self.aux.threshold.tolist(),
                                self.cells - self.dim)
        self.aux.kept.fill(kept)
        self.supernet = False

    def settle(self, widths: Sequence[int]):
        self.width = torch.tensor(widths, dtype=torch.int64, device=self.width.device)
        self.fitted = {"widths": [int(w) for w in widths], "rows": self.rows}
        self.supernet = False

    def allocation(self):
        return self.kept.per_id(self.fields)

    def deploy(self):
        if not self.deployed:
            if not self.supernet or not self.table.weight.is_meta:
                if self.supernet:
                    self.select()
                    self.settle(self.evolution().narrowed((self.dim,) * len(self.rows)))
                self.kept = KeptRows(self.fields, self.dim, self.rows, self.width.tolist(), self.table.weight.device)
                if not self.table.weight.is_meta:
                    self.kept.to(self.table.weight.device)
                    self.kept.fill(self.fields, self.table.weight.detach(), self.aux.kept)
            else:                                    # not known yet: the most that may come of it
                self.kept = nn.Module()
                with torch.device("meta"):
                    self.kept.array, self.kept.map = FloatArray(self.cells), MarkedIds(self.fields.n, self.fields.n)
            del self.table
        return super().deploy()
