r"""Widths per field found by a differentiable search: every field tries several and learns how much each matters.

**Idea** (AutoDim; Zhao et al., WWW 2021, arXiv 2006.14827). Each id has a row of every candidate width
$c \in \{2, 4, 8, \dots, D\}$, lifted to $D$ by a matrix per field and candidate and normalised over the batch. A field
takes their mixture with weights $p_f = \mathrm{softmax}\big((\log \mathrm{softmax}(a_f) + g) / \tau\big)$, $g$ Gumbel
noise, so that for small $\tau$ one candidate is drawn per batch. Weights learn on training rows, the scores $a_f$ on
validation rows. Then each field keeps the candidate of the highest score.

**Stored** the rows of all fields end to end, and a matrix and a bias per field narrower than $D$. **Size** by
``cells``, the most numbers all this may take. The paper's method cannot be given a budget: it ends where the largest
scores lead (46 % on Criteo), and so does ``cells=None``. Under a limit the widths of the highest total log-score that
fit are taken, by dynamic programming over the fields. The floor is the smallest candidate everywhere, 2/16 = 12.5 % at
dimension 16 (``first=1`` halves it).

**Training** two stages. The search holds one table per candidate and both moments: 562.5 % at dimension 16; all budgets
share it. Then the chosen widths are trained on, with a fresh optimiser, from the search's weights (``reset=True``: from
new ones). ``widths=[...]`` skips the search.

**Deviations** Noise is drawn in training only; the published code draws it at validation too, so its scores of equal
states differ. The temperature falls from 1 to 0.01 within ``anneal`` epochs (1, about the published 309,375 steps on
Criteo), not within a fixed number of steps, which a small log never takes. Scores move by Adam with ``alpha_lr``: plain
SGD at the published 0.001 moves them by less than 0.001 in a search, too little to tell candidates apart. Normalisation
is left out after the search, as published, but folded into matrix and bias first: without that the inherited
weights are off by the scale they were trained with. Biases begin there, because normalisation cancels them before. A
field at full width keeps plain rows, with matrix and bias multiplied in. A field whose rows and matrix would not be
smaller than full width gets full width. The search uses first-order gradients, the published default;
``second_order=True`` adds the finite-difference term (r = 0.01) with one noise for both differences.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..method import Method, Step
from ..tables import FloatArray, FloatTable
from ._mixed import BLOCK, Mixed, useful
from ._mixed import cells as cells_of
from ._search import allocate, move, norm, put_back

EPS, COLDEST = 1e-5, 0.01


class AutoDim(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "importance"
    paper = "arXiv 2006.14827"
    group = "dimension allocation"
    space = r"\sum_f d_f (n_f + d)"
    time = r"O(d_f d)"
    learns_size = True

    def __init__(self, fields, dim, cells=None, first=2, alpha_lr=0.01, anneal=1.0, second_order=False, reset=True,
                 widths=None):
        super().__init__(fields, dim)
        if first < 1:
            raise ValueError(f"first={first}: expected a smallest candidate width of at least 1")
        if alpha_lr <= 0 or anneal <= 0:
            raise ValueError(f"alpha_lr={alpha_lr}, anneal={anneal}: expected positive numbers")
        self.first, self.alpha_lr, self.anneal, self.second_order = first, alpha_lr, anneal, second_order
        self.reset, self.cells = reset, fields.n * dim if cells is None else cells
        self.candidates, self.mixed = candidates(dim, first), None
        if widths is not None:
            if len(widths) != len(fields) or not all(1 <= w <= dim for w in widths):
                raise ValueError(f"widths={widths}: expected {len(fields)} widths from 1 to {dim}, one per field")
            self.settle(useful(fields.sizes, widths, dim, bias=True))
            return
        if self.cells < (least := smallest(fields, dim, first)):
            raise ValueError(f"cells={cells}: expected at least {least}, every field at width {self.candidates[0]}")
        self.tau, self.noise, self.same_noise, self.running = 1.0, None, False, False
        self.aux = nn.Module()
        self.aux.tables = nn.ModuleList(FloatTable(fields.n, c, fields.bound()) for c in self.candidates)
        self.aux.matrices = nn.ParameterList(torch.empty(len(fields), c, dim) for c in self.candidates)
        for c, matrix in zip(self.candidates, self.aux.matrices):
            if not matrix.is_meta:
                nn.init.normal_(matrix, std=c ** -0.5)
        self.aux.alpha = nn.Parameter(torch.zeros(len(fields), len(self.candidates)), requires_grad=False)
        self.aux.register_buffer("mean", torch.zeros(len(self.candidates) * dim))
        self.aux.register_buffer("var", torch.ones(len(self.candidates) * dim))

    @classmethod
    def sizes(cls, fields, dim, first=2, **options):
        return range(smallest(fields, dim, first), fields.n * dim + 1)

    def dense_parameters(self):
        return super().dense_parameters() + (list(self.aux.matrices) if "aux" in self._modules else [])

    def encode(self, ids):
        return self.fields.flat(ids) if self.mixed is None else self.mixed.encode(ids)

    def lookup(self, codes):
        return self.mixture(codes) if self.mixed is None else self.mixed.lookup(codes)

    def mixture(self, codes):
        x = torch.cat([torch.bmm(table.gather(codes).transpose(0, 1), matrix)                        # [F, B, D] each
                       for table, matrix in zip(self.aux.tables, self.aux.matrices)], 2)
        batch = self.training and not self.running and x.shape[0] * x.shape[1] > 1
        # statistics over batch and fields for each candidate and dimension, no affine part
        x = F.batch_norm(x.flatten(0, 1), self.aux.mean, self.aux.var, training=batch, momentum=0.1, eps=EPS)
        return torch.einsum("fbcd,fc->bfd", x.view(*codes.T.shape, len(self.candidates), self.dim), self.shares())

    def shares(self):
        """Weight of each candidate in each field [F, C]; random while training."""
        score = self.aux.alpha.log_softmax(1)
        if self.training:
            if not self.same_noise:
                self.noise = -torch.empty_like(score).exponential_().log()                           # Gumbel
            score = score + self.noise
        return (score / self.tau).softmax(1)

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.mixed is None:
            # nothing of the search depends on the limit: all budgets share it
            label = " ".join(f"{k}={getattr(self, k)}" for k in ("first", "alpha_lr", "anneal", "second_order"))
            self.aux.alpha.requires_grad_(True)
            self.mover = torch.optim.Adam([self.aux.alpha], self.alpha_lr)
            for t, step in enumerate(run.fit("search", shared=f"auto_dim({label}) search")):
                self.tau = max(COLDEST, 1 - t / (self.anneal * run.steps_per_epoch))
                yield from self.beyond(run, step, t) if self.second_order else self.alternate(step)
            self.choose()
        yield from run.fit("retrain")

    def move_alpha(self, gradients):
        self.aux.alpha.grad = gradients[0]
        self.mover.step()

    def alternate(self, step):
        """Weights on a training batch, scores on a validation batch (normalised by the running statistics)."""
        yield step
        self.running = True
        yield Step("valid", update=self.move_alpha, wrt=[self.aux.alpha])
        self.running = False

    def beyond(self, run, step, t):
        """The same with scores judged after a trial step of the weights: w' = w - lr dL/dw, differentiated through.

        The second-order term is the difference of dL_train/da at w + size v and w - size v, v = dL_valid/dw'.
        """
        lr, state = run.settings.lr, {}

        def weights():
            return run.optimizers.embedding_leaves() + [p for p in run.head.parameters() if p.requires_grad]

        def trial(gradients):
            state["before"] = move(weights(), gradients, -lr)

        def judge(gradients):
            put_back(weights(), state["before"])
            state["first"], state["v"] = gradients[0], gradients[1:]
            state["size"] = 0.01 / max(norm(state["v"]), 1e-12)
            state["before"] = move(weights(), state["v"], state["size"])

        def plus(gradients):
            put_back(weights(), state["before"])
            state["plus"] = gradients[0]
            state["before"] = move(weights(), state["v"], -state["size"])

        def minus(gradients):
            put_back(weights(), state["before"])
            second = (state["plus"] - gradients[0]) / (2 * state["size"])
            self.move_alpha([state["first"] - lr * second])

        step.again = t > 0                           # the batch that the differences were taken on
        yield step
        yield Step(again=True, update=trial, wrt=weights)
        yield Step("valid", update=judge, wrt=lambda: [self.aux.alpha, *weights()])
        yield Step(update=plus, wrt=[self.aux.alpha])
        self.same_noise = True
        yield Step(again=True, update=minus, wrt=[self.aux.alpha])
        self.same_noise = False

    # --- what it leads to ---------------------------------------------------------------------------------------

    def choose(self):
        """From the search to the chosen widths, with the weights of the chosen candidates unless ``reset``."""
        sizes, dim = self.fields.sizes, self.dim
        wide = [useful([n] * len(self.candidates), self.candidates, dim, bias=True) for n in sizes]
        costs = [[cells_of(n, w, dim, bias=True) for w in row] for n, row in zip(sizes, wide)]
        scores = self.aux.alpha.detach().log_softmax(1)
        # the array ends with padding for the last window, none if a field is at full width
        found = [allocate(costs, scores, self.cells - reserve) for reserve in (0, dim - min(map(min, wide)))]
        fits = [c for c in found if c and sum(row[k] for row, k in zip(costs, c))
                + dim - max(row[k] for row, k in zip(wide, c)) <= self.cells]
        choice = max(fits, key=lambda c: sum(float(score[k]) for score, k in zip(scores, c)))
        aux = self.aux
        del self.aux
        with torch.device(scores.device):
            self.settle([row[k] for row, k in zip(wide, choice)])
        if not self.reset:
            self.inherit(aux, choice)

    def settle(self, widths):
        self.mixed = Mixed(self.fields.sizes, self.dim, widths, bias=True, bound=self.fields.bound())
        self.fitted = {"widths": list(self.mixed.widths)}

    def inherit(self, aux, choice):
        """Rows, and matrices with the normalisation folded in: x P -> (x P - mean) / deviation."""
        mean, deviation = (part.view(-1, self.dim) for part in (aux.mean, (aux.var + EPS).sqrt()))
        for f, k in enumerate(choice):
            matrix, shift = aux.matrices[k].detach()[f] / deviation[k], -mean[k] / deviation[k]
            own, narrow = self.mixed.rows(f), self.mixed.widths[f] < self.dim
            if narrow:
                self.mixed.lift(f).copy_(torch.cat([matrix, shift[None]]))
            first, last = int(self.fields.offset[f]), int(self.fields.offset[f]) + len(own)
            for start in range(first, last, BLOCK):
                part = aux.tables[k].weight.detach()[start:min(start + BLOCK, last)]
                own[start - first:start - first + len(part)] = part if narrow else part @ matrix + shift

    def deploy(self):
        if not self.deployed:
            if self.mixed is None and self.aux.alpha.is_meta:        # not known yet: the most that may come of it
                del self.aux
                with torch.device("meta"):
                    self.array, self.matrix_array = FloatArray(self.cells), FloatArray(0)
                return super().deploy()
            if self.mixed is None:
                self.choose()
            self.mixed.pack()
        return super().deploy()


def candidates(dim: int, first: int) -> list[int]:
    """Widths doubling from ``first``, the last one ``dim``."""
    return [first << k for k in range(dim) if first << k < dim] + [dim]


def smallest(fields, dim: int, first: int) -> int:
    """Numbers of the smallest allocation, the array's padding included."""
    widths = useful(fields.sizes, [candidates(dim, first)[0]] * len(fields), dim, bias=True)
    return sum(cells_of(n, w, dim, bias=True) for n, w in zip(fields.sizes, widths)) + dim - max(widths)
