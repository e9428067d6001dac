r"""Thresholds that are learned with the table prune it softly; what survives trains again from where it began.

**Idea** (PEP; Liu et al., ICLR 2021, arXiv 2101.07577). Values shrink towards zero by a learned amount and are zero
below it, $\hat v = \mathrm{sign}(v)\, \max(|v| - \sigma(s), 0)$, where $s$ is a number for the whole table, for each
dimension, field, id (``feature``), field and dimension, or for every value (``granularity="feature_dim"``, the
default as in the authors' runs). $s$ begins far below zero, where it takes nothing. Weight decay pulls it up towards
zero, the loss holds it down where a value is worth its size. When as many values are left as wanted, where they stand
is kept as a mask, and by the lottery ticket hypothesis it is the mask that matters: the masked values and the head
return to their initial numbers and are trained without thresholds.

**Stored** ``kept`` values and an index that finds them, in whichever form is about the lightest. **Size** by ``kept``.

**Training** two stages. The search, of at most ``epochs`` epochs: 600 % with a threshold per value, 318.75 % with one
per id at dimension 16, 300 % with fewer, and one bit per value for the mask; it depends on the budget only by where
it ends. Then the retraining.

**Deviations** Only rows that were looked up pass the threshold; the authors' code recomputes the whole table in every
step. There, as Adam divides a gradient by its size, decay alone moves every $s$ by one learning rate per step, however
small it is; here a clock that all $s$ share does so, $s = \text{clock} + \delta$, and the loss moves $\delta$: values
that no batch touches are pruned like others, and no step visits them. The authors begin at -150, about 140,000 steps
at 0.001 before anything happens; with ``s_init=None`` the clock begins so that it ends at 0 with the search, and
hurries where a learning rate per step would begin above a tenth of the initial range (``s_init`` gives a start, which
then moves a learning rate per step). Decay of $v$ (``decay``) enters the gradient of looked-up rows only, once per
row and step. The authors' budget is wherever a run happens to pass; here values are counted about a hundred times in
the search, at most every tenth step, and from the first time that at most ``kept`` are left, or at its end, the mask
is exactly the ``kept`` values of largest $|v| / \sigma(s)$, which are those the clock would prune last. Initial
numbers come from the state of the random generator, so no copy of the table is held. Initial range and optimiser are
the study's.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..select import among, kth_of
from ..sparse import Bits
from ..tables import FloatTable
from ._pruned import Pruned

BEGIN = -15.0                            # of the clock until a schedule sets it: thresholds of 3e-7
OFF = -1e4                               # thresholds of exactly 0
BLOCK = 1 << 14                          # rows, a multiple of 64 so that blocks of marks begin with a word
CHECKS = 100                             # how often values are counted in a long search
SMALL = 1e-30                            # instead of thresholds that round to zero
GRANULARITIES = ("global", "dimension", "feature", "field", "field_dim", "feature_dim")


class Pep(Pruned):
    paper = "arXiv 2101.07577"

    def __init__(self, fields, dim, kept=None, granularity="feature_dim", s_init=None, epochs=2.0, decay=1e-5):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(GRANULARITIES)}")
        if s_init is not None and s_init >= 0 or epochs <= 0 or decay < 0:
            raise ValueError(f"s_init={s_init}, epochs={epochs}, decay={decay}: expected s_init below 0 (or None), "
                             "positive epochs, and a decay of at least 0")
        generator = torch.get_rng_state()            # the table is drawn from here on
        super().__init__(fields, dim, kept)
        self.granularity, self.s_init, self.epochs, self.decay = granularity, s_init, epochs, decay
        device = self.table.weight.device
        self.aux = nn.Module()
        self.aux.register_buffer("generator", generator.to(device))
        self.aux.register_buffer("clock", torch.tensor(BEGIN))
        self.aux.mask = Bits(fields.n * dim)
        width = dim if granularity in ("dimension", "field_dim", "feature_dim") else 1
        if granularity.startswith("feature"):
            self.aux.threshold = FloatTable(fields.n, width, 0.0)
        else:
            rows = len(fields) if granularity.startswith("field") else 1
            self.aux.threshold = nn.Parameter(torch.zeros(rows, width))
        self.ticket = False                          # thresholds have done their work

    def dense_parameters(self):
        small = "aux" in self._modules and isinstance(self.aux.threshold, nn.Parameter)
        return super().dense_parameters() + ([self.aux.threshold] if small else [])

    def lookup(self, codes):
        rows = self.table.gather(codes)
        if self.deployed or self.ticket:
            return rows
        self._seen = codes
        delta = self.aux.threshold
        return self.soft(rows, delta.gather(codes) if isinstance(delta, FloatTable) else delta)

    def soft(self, rows: Tensor, delta: Tensor) -> Tensor:
        return rows.sign() * (rows.abs() - torch.sigmoid(self.aux.clock + delta)).relu()

    def penalty(self):
        """Decay of the rows looked up, each once."""
        return 0.5 * self.decay * self.table.gather(torch.unique(self._seen)).square().sum()

    # --- the whole table, block by block --------------------------------------------------------------------------

    def blocks(self):
        """First row, rows and their deltas."""
        delta, weight = self.aux.threshold, self.table.weight.detach()
        for start in range(0, len(weight), BLOCK):
            part = weight[start:start + BLOCK]
            if isinstance(delta, FloatTable):
                yield start, part, delta.weight.detach()[start:start + BLOCK]
            elif len(delta) == 1:
                yield start, part, delta.detach()
            else:
                row = torch.arange(start, start + len(part), device=part.device)
                yield start, part, delta.detach()[self.fields.of(row)]

    def left(self) -> int:
        """Values above their threshold."""
        return sum(int((part.abs() > torch.sigmoid(self.aux.clock + delta)).sum()) for _, part, delta in self.blocks())

    def ratios(self):
        """Size of each value over its threshold, flat."""
        for _, part, delta in self.blocks():
            yield (part.abs() / torch.sigmoid(self.aux.clock + delta).clamp(min=SMALL)).view(-1)

    def mark(self):
        """Keep the mask: the ``kept`` values that thresholds would prune last."""
        limit, ties = math.inf, 0
        if self.kept:
            limit, ties = kth_of(self.ratios, self.kept, self.table.weight.device)
        place, word = 0, 0
        for ratio in self.ratios():
            keep, ties = among(ratio, limit, ties)
            keys = keep.nonzero().view(-1)
            words = -(-len(ratio) // 64)
            self.aux.mask.put(word, words, keys + 64 * word, place)
            place, word = place + len(keys), word + words
        self.ticket = True

    def begin_again(self):
        """The initial numbers where the mask is set, zeros elsewhere, and no thresholds."""
        generator, weight = torch.Generator(), self.table.weight.detach()
        generator.set_state(self.aux.generator.cpu())
        bound = self.fields.bound()
        for start in range(0, len(weight), BLOCK):
            part = weight[start:start + BLOCK]
            part.copy_(torch.empty(part.shape).uniform_(-bound, bound, generator=generator))
            place = torch.arange(start * self.dim, start * self.dim + part.numel(), device=part.device)
            part.mul_(self.aux.mask.get(place).view(part.shape))
        self.aux.clock.fill_(OFF)
        self.table.keep_zeros = True

    # --- the schedule -----------------------------------------------------------------------------------------------

    def begin(self, steps: int, lr: float) -> float:
        """Set the clock for a search of ``steps`` steps; how far it moves in each."""
        lowest = math.log(self.fields.bound() / 10)
        pace = lr if self.s_init is not None else max(lr, -lowest / steps)
        self.aux.clock.fill_(-pace * steps if self.s_init is None else self.s_init)
        return pace

    def schedule(self, run):
        head = getattr(run, "head", None)            # a fake run has none
        first = {name: tensor.clone() for name, tensor in head.state_dict().items()} if head is not None else {}
        steps = max(1, round(run.steps_per_epoch * min(self.epochs, run.settings.max_epochs)))
        pace, every = self.begin(steps, run.settings.lr), max(10, steps // CHECKS)
        for t, step in enumerate(run.fit("search", until=lambda: self.ticket), 1):
            step.penalty = self.penalty if self.decay else None
            yield step
            self.aux.clock.add_(pace).clamp_(max=0)
            if not self.ticket and (t >= steps or t % every == 0 and self.left() <= self.kept):
                self.mark()
        if not self.ticket:
            self.mark()
        self.begin_again()
        if head is not None:
            head.load_state_dict(first)
        yield from run.fit("retrain")

    def fit(self, rows):
        super().fit(rows)
        self.aux.clock.fill_(OFF)

    def deploy(self):
        if not self.deployed and not self.table.weight.is_meta:
            for _, part, delta in self.blocks():
                part.copy_(self.soft(part, delta))
        return super().deploy()
