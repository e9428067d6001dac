r"""Widths per field found by a differentiable search: every field tries several and learns how much each matters.

**Idea** (AutoDim; Zhao et al., WWW 2021, arXiv 2006.14827). Each id has a row of every candidate width
$c \in \{2, 4, 8, \dots, D\}$, lifted to $D$ by a matrix per field and candidate and normalised over the batch.
A field takes their mixture with weights
$p_f = \mathrm{softmax}\big((\log \mathrm{softmax}(a_f) + g) / \tau\big)$, $g$ Gumbel noise, so that for small
$\tau$ one candidate is drawn per batch. Weights learn on training rows, the scores $a_f$ on validation rows. Then
each field keeps the candidate of the highest score.

**Stored** the rows of all fields end to end, and a matrix and a bias per field narrower than $D$. **Size** by
``cells``, the most numbers all this may take. The paper's method cannot be given a budget: it ends where the largest
scores lead (46 % on Criteo), and so does ``cells=None``. Under a limit the widths of the highest total log-score that
fit are taken, by dynamic programming over the fields. The floor is the smallest candidate everywhere, 2/16 = 12.5 %
at dimension 16 (``first=1`` halves it).

**Training** two stages. The search holds one table per candidate and both moments: 562.5 % at dimension 16; all
budgets share it. Then the chosen widths are trained, from new rows under the head of the search, with a fresh
optimiser. ``widths=[...]`` skips the search.

**Deviations** Published is to go on from the search's rows and matrices (``reset=False``). Normalisation is left out
then, so they are off by the scale they were trained with; here it is folded into matrix and bias first. Even so new
rows are better on a small log (validation AUC 0.749 against 0.740 on the study's real sample), as those of the search
overfit at once. Noise is drawn in training only; the published code draws it at validation too, so the same state has
a different score each time. The temperature falls from 1 to 0.01 within ``anneal`` epochs (1, about the published
309,375 steps on Criteo) instead of a number of steps that a small log never takes. Scores begin at 0 and move by Adam
with ``alpha_lr``: by plain SGD at the published 0.001 they hardly move (their gradients are of the order of 0.001),
so candidates stay level. A field at full width keeps plain rows, without matrix and bias, and so does a field whose
rows and matrix would not be smaller than that. In the search there are no biases: normalisation cancels them.
Gradients of the scores are first-order, the published default, and taken with running statistics;
``second_order=True`` adds the published finite-difference term (r = 0.01), with one noise for both differences.
"""
from __future__ import annotations

import torch

from ..method import Method, Step
from ..tables import FloatArray
from ._mixed import Mixed, useful
from ._search import Candidates, SecondOrder, candidates, smallest

COLDEST = 0.01                           # the last temperature


class AutoDim(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "importance"
    paper = "arXiv 2006.14827"
    group = "dimension allocation"
    space = r"\sum_f d_f (n_f + d)"
    time = r"O(d_f d)"
    learns_size = True
    budgeted = False

    def __init__(self, fields, dim, cells=None, first=2, alpha_lr=0.01, anneal=1.0, second_order=False, reset=True,
                 widths=None):
        super().__init__(fields, dim)
        if first < 1:
            raise ValueError(f"first={first}: expected a smallest candidate width of at least 1")
        if alpha_lr <= 0 or anneal <= 0:
            raise ValueError(f"alpha_lr={alpha_lr}, anneal={anneal}: expected positive numbers")
        self.first, self.alpha_lr, self.anneal, self.second_order = first, alpha_lr, anneal, second_order
        self.reset, self.cells = reset, fields.n * dim if cells is None else cells
        self.mixed = None
        if widths is not None:
            if len(widths) != len(fields) or not all(1 <= w <= dim for w in widths):
                raise ValueError(f"widths={widths}: expected {len(fields)} widths from 1 to {dim}, one per field")
            self.settle(useful(fields.sizes, widths, dim, bias=True))
            return
        if self.cells < (least := smallest(fields, dim, first)):
            raise ValueError(f"cells={cells}: expected at least {least}, every field at its narrowest")
        self.aux = Candidates(fields, dim, candidates(dim, first))

    @classmethod
    def sizes(cls, fields, dim, first=2, **options):
        return range(smallest(fields, dim, first), fields.n * dim + 1)

    def dense_parameters(self):
        return super().dense_parameters() + (list(self.aux.matrices) if "aux" in self._modules else [])

    def encode(self, ids):
        return self.fields.flat(ids) if self.mixed is None else self.mixed.encode(ids)

    def lookup(self, codes):
        return self.aux(codes) if self.mixed is None else self.mixed.lookup(codes)

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.mixed is None:
            # nothing of the search depends on the limit: all budgets share it
            label = " ".join(f"{k}={getattr(self, k)}" for k in ("first", "alpha_lr", "anneal", "second_order"))
            self.aux.alpha.requires_grad_(True)
            self.mover = torch.optim.Adam([self.aux.alpha], self.alpha_lr)
            for t, step in enumerate(run.fit("search", shared=f"auto_dim({label}) search")):
                self.aux.tau = max(COLDEST, 1 - t / (self.anneal * run.steps_per_epoch))
                yield from self.beyond(run, step, t) if self.second_order else self.alternate(step)
            self.choose(self.reset)
        yield from run.fit("retrain")

    def move_alpha(self, gradients):
        self.aux.alpha.grad = gradients[0]
        self.mover.step()

    def alternate(self, step):
        """Weights on a training batch, scores on a validation batch (normalised by the running statistics)."""
        yield step
        self.aux.running = True
        yield Step("valid", update=self.move_alpha, wrt=[self.aux.alpha])
        self.aux.running = False

    def beyond(self, run, step, t):
        """The same with scores judged after a trial step of the weights, differentiated through."""
        second = SecondOrder(run, self.aux.alpha, self.move_alpha)
        step.again = t > 0                           # the batch that the differences were taken on
        yield step
        yield Step(again=True, update=second.trial, wrt=second.weights)
        self.aux.running = True
        yield Step("valid", update=second.judge, wrt=lambda: [self.aux.alpha, *second.weights()])
        self.aux.running = False
        yield Step(update=second.plus, wrt=[self.aux.alpha])
        self.aux.same_noise = True
        yield Step(again=True, update=second.minus, wrt=[self.aux.alpha])
        self.aux.same_noise = False

    # --- what it leads to ---------------------------------------------------------------------------------------

    def choose(self, reset: bool):
        """From the search to the chosen widths, with the weights of the chosen candidates unless ``reset``."""
        search = self.aux
        del self.aux
        choice, widths = search.choose(self.cells)
        self.settle(widths)
        self.mixed.to(search.alpha.device)
        if not reset:
            search.hand_over(self.mixed, choice)

    def settle(self, widths):
        self.mixed = Mixed(self.fields.sizes, self.dim, widths, bias=True, bound=self.fields.bound())
        self.fitted = {"widths": list(self.mixed.widths)}

    def allocation(self):
        return self.mixed.per_id()

    def deploy(self):
        if not self.deployed:
            if self.mixed is None and self.aux.alpha.is_meta:        # not known yet: the most that may come of it
                del self.aux
                with torch.device("meta"):
                    self.array, self.matrix_array = FloatArray(self.cells), FloatArray(0)
                return super().deploy()
            if self.mixed is None:                   # trained as a mixture by somebody's own loop: keep what it learned
                self.choose(reset=False)
            self.mixed.pack()
        return super().deploy()
