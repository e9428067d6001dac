r"""A controller learns by rewards how many of the most frequent ids of a field each group of columns holds.

**Idea** (neural input search, NIS; Joglekar et al., KDD 2020, arXiv 1907.04471). The ids of a field stand in the order
of their frequency and the table is cut into blocks, ``groups`` of columns times the ranks between the ``cuts``. For
every field $f$ and column group $t$ a controller chooses how many of the first ids have it, one of the shares of
``cuts`` or none: a multi-size embedding, where an id has the columns of those groups whose choice reaches it,
$$e(i) = b_f + \sum_{t:\ rank(i) < r_{f,t}} v_t(i)\, P_{f,t},$$
with blocks projected to $D$ and summed, and $b_f$ what rare ids share. The controller has a softmax per decision,
$\pi$, and learns by policy gradients with a critic, as in A3C, from
$$R = -\text{loss} - \lambda \max\Big(0, \frac{\mathrm{E}_\pi[\text{numbers}]}{cells} - 1\Big).$$

**Stored** the numbers of each id, end to end; which ids have how many: maps of the ids that have any, among these of
those that have more, and so on (a bit with running counts or a sorted list, whichever is lighter); and $D + 1$ rows
of $P_f, b_f$ per field. **Size** by ``cells``, the most numbers of all ids, which is the paper's own budget. With none
at all an id still looks up $b_f$, so small budgets are reachable.

**Training** three stages and 300 %. Warm-up, everything present: common to all budgets. Search, for ``epochs`` epochs:
by turns the weights on training rows, with choices drawn from $\pi$, and the controller on validation rows. Then the
choice of the highest probability that fits (dynamic programming over the decisions), and new rows for it, trained
under the head of the search with a fresh optimiser.

**Deviations** There is no official code. Every row of a batch draws its own choices and is rewarded by its own loss,
where the paper's workers draw one network each for a batch: thousands of rewards per step instead of one. Reward is
the loss, which a single row has, not AUC or recall. The cost is that of the expected numbers, exact and with an exact
gradient. There is one state, so the critic is one number. A final choice that is over the limit is the likeliest that
is not, as a penalty alone keeps no limit. Cut-offs, the number of groups, $\lambda$, ``policy_lr`` and an ``entropy``
bonus are ours; the paper's were not recovered. Single-size embedding is ``groups=1``. For what ships, column groups
are put in the order of their choices, so that an id's numbers are the first of a row; the projection makes columns
interchangeable.
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..method import Method, Step, require_counts
from ..tables import FloatTable, take
from ._levels import LevelRows
from ._search import allocate


class Nis(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "frequency and importance"
    paper = "arXiv 1907.04471"
    group = "dimension allocation"
    space = r"\sum_f \sum_t r_{f,t}\, d / T + F d^2"
    time = r"O(d^2)"
    learns_size = True
    needs_counts = True

    def __init__(self, fields, dim, cells=None, counts=None, groups=None, cuts=(0.001, 0.01, 0.1, 0.3, 1.0), cost=1.0,
                 policy_lr=0.03, entropy=0.001, epochs=1.0, choice=None):
        super().__init__(fields, dim)
        groups = next(t for t in (4, 3, 2, 1) if dim % t == 0) if groups is None else groups
        if not 1 <= groups <= dim or dim % groups:
            raise ValueError(f"groups={groups}: expected a divisor of the embedding dimension {dim}")
        if not (0 < len(cuts) < 255 and sorted(set(cuts)) == list(cuts) and 0 < cuts[0] and cuts[-1] <= 1):
            raise ValueError(f"cuts={cuts}: expected rising shares of the ids of a field, above 0 and at most 1")
        if cost < 0 or policy_lr <= 0 or entropy < 0 or epochs <= 0:
            raise ValueError(f"cost={cost}, policy_lr={policy_lr}, entropy={entropy}, epochs={epochs}: expected "
                             "positive numbers (cost and entropy: or 0)")
        self.cells = fields.n * dim if cells is None else cells
        if not 0 <= self.cells <= fields.n * dim:
            raise ValueError(f"cells={cells}: expected 0 to {fields.n * dim} numbers")
        self.groups, self.each, self.cuts = groups, dim // groups, [float(c) for c in cuts]
        self.cost, self.policy_lr, self.entropy, self.epochs = cost, policy_lr, entropy, epochs
        # ids within reach of each choice, 0 for none
        self.reach = [[0, *(max(1, round(c * n)) for c in self.cuts)] for n in fields.sizes]
        self.table, self.drawing, self.searched = FloatTable(fields.n, dim, fields.bound()), False, choice is not None
        self.projection = nn.Parameter(torch.zeros(len(fields), dim + 1, dim))
        if not self.projection.is_meta:
            nn.init.normal_(self.projection.detach()[:, :dim], std=dim ** -0.5)
        options = len(cuts) + 1
        self.aux = nn.Module()
        self.aux.register_buffer("band", torch.zeros(fields.n, dtype=torch.uint8))
        self.aux.register_buffer("choice", torch.full((len(fields), groups), options - 1))
        self.aux.policy = nn.Parameter(torch.zeros(len(fields), groups, options), requires_grad=False)
        if not self.aux.policy.is_meta:
            self.aux.policy.copy_(torch.linspace(0, 2, options).expand_as(self.aux.policy))      # rather more than less
        self.aux.critic = nn.Parameter(torch.zeros(()), requires_grad=False)
        if choice is not None:
            if len(choice) != len(fields) or not all(len(c) == groups and 0 <= min(c) <= max(c) < options
                                                     for c in choice):
                raise ValueError(f"choice={choice}: expected for each of {len(fields)} fields {groups} places in the "
                                 f"cuts, from 0 (none) to {options - 1}")
            self.settle(choice)
        if (counts := require_counts(counts, fields, self.table.weight.device)) is not None:
            self.aux.band.copy_(torch.cat([bands(part, reach)
                                           for part, reach in zip(counts.split(fields.sizes), self.reach)]))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(0, fields.n * dim + 1)

    def lookup(self, codes):
        rows = self.kept.lookup(codes)[0] if self.deployed else self.table.gather(codes) * self.mask(codes)
        lift = self.projection
        return torch.baddbmm(lift[:, -1:], rows.transpose(0, 1), lift[:, :-1]).transpose(0, 1)

    def mask(self, rows: Tensor) -> Tensor:
        """1 for the numbers that each of ``rows [B, F]`` has, else 0: [B, F, D]."""
        choice = self.draw(len(rows)) if self.drawing and self.training else self.aux.choice
        return (take(self.aux.band, rows)[..., None] < choice).float().repeat_interleave(self.each, -1)

    def draw(self, batch: int) -> Tensor:
        """Choices from the policy for each row of a batch, [B, F, T]."""
        shape = self.aux.policy.shape
        share = self.aux.policy.detach().softmax(-1).flatten(0, 1)
        self.drawn = torch.multinomial(share, batch, replacement=True).T.reshape(batch, *shape[:2])
        return self.drawn

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        if not self.searched:
            yield from run.fit("warm-up", shared=f"nis(cuts={self.cuts}, groups={self.groups}) warm-up")
            for part in (self.aux.policy, self.aux.critic):
                part.requires_grad_(True)
            self.mover = torch.optim.Adam([self.aux.policy, self.aux.critic], self.policy_lr)
            self.drawing, ends, taken = True, max(1, round(self.epochs * run.steps_per_epoch)), 0
            for taken, step in enumerate(run.fit("search", until=lambda: taken + 1 >= ends)):
                yield step
                yield Step("valid", update=self.move_policy, wrt=[self.aux.policy, self.aux.critic],
                           penalty=partial(self.objective, run))
            self.drawing = False
            self.settle(self.decide())
            self.renew()
        yield from run.fit("retrain")

    def objective(self, run) -> Tensor:
        """Its gradient in policy and critic is that of the negative reward of the last batch."""
        reward, log = -run.losses(), self.aux.policy.log_softmax(-1)
        advantage = reward - self.aux.critic.detach()
        place = torch.arange(log[..., 0].numel(), device=log.device).view(log.shape[:2]) * log.shape[2]
        gained = torch.zeros_like(log).view(-1).index_add_(           # what each option was followed by
            0, (self.drawn + place).reshape(-1), advantage[:, None, None].expand_as(self.drawn).reshape(-1))
        entropy = -(log.exp() * log).sum(-1).mean()
        return (self.cost * self.excess(log.exp()) - (gained.detach() * log.view(-1)).sum() / len(reward)
                - self.entropy * entropy + (reward - self.aux.critic).square().mean())

    def excess(self, share: Tensor) -> Tensor:
        """Numbers expected at probabilities ``share [F, T, options]`` above the limit, relative to it."""
        reach = torch.tensor(self.reach, dtype=share.dtype, device=share.device) * self.each
        return ((share * reach[:, None]).sum() / max(self.cells, 1) - 1).relu()

    def move_policy(self, gradients):
        self.aux.policy.grad, self.aux.critic.grad = gradients
        self.mover.step()

    @torch.no_grad()
    def decide(self) -> list[list[int]]:
        """The likeliest choice [F, T] that fits."""
        costs = [[rows * self.each for rows in reach] for reach in self.reach for _ in range(self.groups)]
        flat = allocate(costs, self.aux.policy.detach().log_softmax(-1).flatten(0, 1), self.cells)
        return [flat[f * self.groups:(f + 1) * self.groups] for f in range(len(self.fields))]

    # --- what it leads to ---------------------------------------------------------------------------------------

    def settle(self, choice):
        """Keep a choice, the groups of each field with the most ids first."""
        choice = [sorted(map(int, row), reverse=True) for row in choice]
        self.aux.choice.copy_(torch.tensor(choice))
        self.searched, self.fitted = True, {"choice": choice}

    @torch.no_grad()
    def renew(self):
        """New rows and projections, as a fresh module would have them."""
        nn.init.uniform_(self.table.weight, -self.fields.bound(), self.fields.bound())
        nn.init.normal_(self.projection[:, :-1], std=self.dim ** -0.5)
        self.projection[:, -1] = 0

    def rows(self) -> list[int] | None:
        """How many ids have 0, 1, 2 .. groups of columns; None before the search."""
        if not self.searched:
            return None
        count = [0] * (self.groups + 1)
        for reach, choice, n in zip(self.reach, self.fitted["choice"], self.fields.sizes):
            ends = [n, *(reach[c] for c in choice), 0]       # ids with at least 0, 1, 2 .. groups
            for t in range(self.groups + 1):
                count[t] += ends[t] - ends[t + 1]
        return count

    def allocation(self):
        return self.kept.per_id()

    def deploy(self):
        if not self.deployed:
            weight = self.table.weight.detach()
            if not weight.is_meta and not self.searched:
                self.settle(self.decide())
            widths = range(0, self.dim + 1, self.each)
            self.kept = LevelRows(self.fields.n, self.dim, widths, self.rows(), weight.device, self.cells)
            if not weight.is_meta:
                bands = torch.arange(len(self.cuts) + 1, device=weight.device)
                width = self.each * (bands[:, None] < self.aux.choice[:, None]).sum(2)           # [F, bands]
                field = torch.repeat_interleave(self.fields.size.to(weight.device))
                width = take(width.view(-1), field.mul_(len(bands)).add_(self.aux.band))
                self.kept.fill(width, lambda ids, w: weight.index_select(0, ids)[:, :w])
            del self.table
        return super().deploy()


def bands(counts: Tensor, reach: list[int]) -> Tensor:
    """The least choice but one that reaches each id, uint8: ranks by count, ties to the lower id."""
    order = torch.sort(counts, descending=True, stable=True).indices
    rank = torch.arange(len(counts), device=counts.device)
    band = torch.bucketize(rank, torch.tensor(reach[1:], device=counts.device), right=True)
    return torch.empty_like(band).index_copy_(0, order, band).to(torch.uint8)
