r"""Rows grow while training: a policy decides for each id, from its popularity and size, to keep or to enlarge it.

**Idea** (ESAPN; Liu et al., SIGIR 2020). All ids begin with the narrowest row. A policy network reads how often an id
has occurred so far and the size of its row and chooses to keep or to enlarge, which leads from one candidate width to
the next, $2 \to 4 \to 8 \to \dots \to D$, and never back. The new row is the image of the old one under the matrix that
also lifts it, so an embedding is the same before and after and has more room from then on:
$$v' = v M_{f,c}, \qquad e = \tanh(\mathrm{norm}_f(v\, M_{f,c} M_{f,c+1} \cdots)).$$
The policy learns by REINFORCE. An action is rewarded by how much lower the id's loss is than the mean of its last
``last`` ones.

**Stored** the row in use of each id, end to end; which ids have which width: maps of the ids that grew at all, among
these of those that grew twice, and so on (a bit with running counts or a sorted list, whichever is lighter); the
matrices of the cascade, $\sum_c d_c d_{c+1}$ numbers per field, and the statistics of the normalisation. **Size** by
``cells``, the most numbers of all rows. The paper has no budget, sizes come out as they do, and so it is with
``cells=None``. The cap is ours: once the rows hold ``cells`` numbers none is enlarged any more; of the ids that ask at
once the more popular are served first. The floor is the narrowest width everywhere, 2/16 at dimension 16, with
the maps 12.9 % (``first=1``: 6.7 %).

**Training** one stage, in place. It holds a row of every width and both moments, 562.5 % at dimension 16, and 11 bytes
per id: its count, size, mean loss and last action. After each step on training rows the ids in it are counted and
grow; then the policy is rewarded on validation rows.

**Deviations** The published code judges sampled actions by a pass over the batch before, in which an enlarged row gives
the vector of the old one (but for statistics of the normalisation, there one set per size), so its reward says next to
nothing about the action. Here an action is really taken and rewarded when its id next occurs in a validation batch,
after it could be trained. To this end a share ``explore`` of the ids of a batch acts by chance, as the policy's
probabilities say; the others take the likelier action, as published. Rewards of a batch are taken relative to their
mean, since all losses fall while a model learns. The mean of the last losses is a running one, of weight 1 / ``last``.
Popularity enters by one bucket to every doubling instead of the exact count. One network of the published size serves
all fields, with an embedding for every field and bucket, and is computed once per bucket; its last layer begins at
zero, so no action is preferred before anything is known. Normalisation is over all ids of a field, not per size, and
matrices have no biases, most of which it would cancel. The log is gone through several times, the paper's once, as a
stream is (then the policy is rewarded on the batch that comes next, before it is trained on). ``policy_lr`` is 0.001,
published 0.0001 for 30,000 steps.
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..method import Method, Step
from ..ragged import PerField
from ..tables import take
from ._levels import OCTAVES, Controller, Sized, popularity
from ._search import candidates


class Esapn(Method):
    knob = "cells"
    family = "intra-feature"
    aware = "frequency and importance"
    paper = "SIGIR 2020"
    group = "dimension allocation"
    space = r"\sum_i d_i + n / 32 + \ldots + F d^2"
    time = r"O(d_i d + d^3)"
    learns_size = True
    budgeted = False

    def __init__(self, fields, dim, cells=None, first=2, explore=0.05, last=5, policy_lr=0.001, rows=None):
        super().__init__(fields, dim)
        if first < 1 or not 0 < explore <= 1 or last < 1 or policy_lr <= 0:
            raise ValueError(f"first={first}, explore={explore}, last={last}, policy_lr={policy_lr}: expected a "
                             "smallest width and a number of losses of at least 1, a share above 0 and a positive rate")
        widths = candidates(dim, first)
        self.cells, least = fields.n * dim if cells is None else cells, fields.n * widths[0]
        if not least <= self.cells <= fields.n * dim:
            raise ValueError(f"cells={cells}: expected {least} to {fields.n * dim} numbers, the narrowest and the "
                             "widest rows")
        if rows is not None and (len(rows) != len(widths) or sum(rows) != fields.n):
            raise ValueError(f"rows={rows}: expected numbers of ids of the widths {widths}, {fields.n} in all")
        self.explore, self.last, self.policy_lr, self.rows, self.batch = explore, last, policy_lr, rows, None
        self.sized = Sized(fields, dim, widths, cascade=True)
        self.aux = nn.Module()
        self.aux.register_buffer("level", torch.zeros(fields.n, dtype=torch.uint8))
        self.aux.register_buffer("count", torch.zeros(fields.n, dtype=torch.int32))
        self.aux.register_buffer("loss", torch.zeros(fields.n))                  # mean of the last ones, 0 for none yet
        self.aux.register_buffer("action", torch.zeros(fields.n, dtype=torch.int16))     # 0, or 1 + what was done where
        self.aux.register_buffer("used", torch.tensor(least))
        self.aux.policy = Controller(len(fields), OCTAVES, len(widths), 2)
        self.grows = None                            # probability of enlarging [F, Q, C]

    @classmethod
    def sizes(cls, fields, dim, first=2, **options):
        return range(fields.n * min(first, dim), fields.n * dim + 1)

    def encode(self, ids):
        flat = self.fields.flat(ids)
        if self.training and torch.is_grad_enabled():
            self.batch = flat                        # what :meth:`grow` and :meth:`objective` look at after the pass
        return flat

    def lookup(self, codes):
        return self.sized(codes) if self.deployed else self.sized(codes, take(self.aux.level, codes).int())

    # --- the schedule -------------------------------------------------------------------------------------------

    def schedule(self, run):
        self.aux.policy.requires_grad_(True)
        moved = list(self.aux.policy.parameters())
        self.mover = torch.optim.Adam(moved, self.policy_lr)
        for step in run.fit("train"):
            yield step
            self.grow()
            self.sized.running = True
            yield Step("valid", update=self.move_policy, wrt=moved, penalty=partial(self.objective, run))
            self.sized.running = False

    def objective(self, run) -> Tensor:
        """REINFORCE for the actions whose ids are in the last batch; takes note of their losses."""
        seen = PerField(self.batch, self.fields.offset)
        loss = run.losses()[:, None].expand_as(self.batch).reshape(-1)
        loss = torch.zeros(len(seen.unique), device=loss.device).index_add_(0, seen.inverse.view(-1), loss) / seen.count
        mean, action = take(self.aux.loss, seen.unique), take(self.aux.action, seen.unique).int()
        known = mean > 0
        self.aux.loss.index_copy_(0, seen.unique, torch.where(known, torch.lerp(mean, loss, 1 / self.last), loss))
        self.aux.action.index_fill_(0, seen.unique, 0)
        reward = mean - loss
        reward = torch.where(known & (action > 0), reward - (reward * known).sum() / known.sum().clamp(min=1), 0)
        did, where = (action - 1).clamp(min=0) % 2, (action - 1).clamp(min=0) // 2        # bucket and size
        log = self.aux.policy().log_softmax(-1).flatten(1, 2)
        return -(log[seen.field, where, did] * reward).sum() / (action > 0).sum().clamp(min=1)

    def move_policy(self, gradients):
        for parameter, gradient in zip(self.aux.policy.parameters(), gradients):
            parameter.grad = gradient
        self.mover.step()
        self.grows = None

    @torch.no_grad()
    def grow(self) -> None:
        """Count the ids of the last batch and take the policy's actions; call it after each update."""
        if self.batch is None:                       # rehearsed schedules make no batch
            return
        aux, seen = self.aux, PerField(self.batch, self.fields.offset)
        if self.grows is None:
            self.grows = aux.policy().softmax(-1)[..., 1]
        ids, self.batch = seen.unique, None
        count, level = take(aux.count, ids) + seen.count.int(), take(aux.level, ids).int()
        aux.count.index_copy_(0, ids, count)
        bucket, free = popularity(count).int(), level < len(self.sized.widths) - 1
        p = self.grows[seen.field, bucket, level]
        chance = (torch.rand_like(p) < self.explore) & free
        asks = free & torch.where(chance, torch.rand_like(p) < p, p > 0.5)
        grows = self.affordable(asks, level, count)
        done = 1 + 2 * (bucket * len(self.sized.widths) + level) + grows
        chance &= grows | ~asks                      # who asked in vain did not act
        aux.action.index_copy_(0, ids, torch.where(chance, done, take(aux.action, ids)).to(torch.int16))
        self.enlarge(seen, grows, level)

    def affordable(self, asks: Tensor, level: Tensor, count: Tensor) -> Tensor:
        """Which of those who ask can grow under the limit, the more popular first; takes note of what is used."""
        widths = torch.tensor(self.sized.widths + [0], device=level.device)
        more = (take(widths, level + 1) - take(widths, level)) * asks
        order = torch.sort(count * asks, descending=True, stable=True).indices
        fits = torch.empty_like(asks).index_copy_(0, order, self.aux.used + more[order].cumsum(0) <= self.cells)
        grows = asks & fits
        self.aux.used += (more * grows).sum()
        return grows

    def enlarge(self, seen: PerField, grows: Tensor, level: Tensor) -> None:
        """Give those who grow the next size, beginning with the image of the row they have."""
        rows, ends = self.sized.table.read(seen.unique), self.sized.starts + [sum(self.sized.widths)]
        for number, matrix in enumerate(self.sized.matrices):                    # as many as there are sizes
            first, middle, last = ends[number:number + 3]
            image = seen.unpad(torch.bmm(seen.pad(rows[:, first:middle]), matrix))
            now = (grows & (level == number))[:, None]
            rows[:, middle:last] = torch.where(now, image, rows[:, middle:last])
        self.sized.table.write(seen.unique, rows)
        self.aux.level.index_copy_(0, seen.unique, (level + grows).to(torch.uint8))

    # --- what it leads to ---------------------------------------------------------------------------------------

    def allocation(self):
        return self.sized.kept.per_id()

    def deploy(self):
        if not self.deployed:
            level = None if self.aux.level.is_meta else self.aux.level.int()
            if level is not None:
                self.rows = torch.bincount(level, minlength=len(self.sized.widths)).tolist()
                self.fitted = {"rows": self.rows}
            self.sized.pack(level, self.rows, self.cells)
        return super().deploy()
