"""Magnitude pruning of the whole table while training goes on, to a sparsity that rises smoothly.

**Idea** (DeepLight; Deng et al., WSDM 2021, arXiv 2002.06987). After a warm-up of the full table, every ``every``
steps all values below a global threshold are set to zero. The share of zeros follows ``s (1 - 0.99^(t/100))`` towards
the final ``s``. There is no mask: pruned values may grow back between prunings.

**Stored** ``kept`` values and an index that finds them, in whichever form is about the lightest: at
dimension 16 a bitmask at 50 %, a packed CSR at 10 %, positions within groups at 1 % and below. **Size** by ``kept``.

**Training** two stages: the full table until validation stops improving, then pruning with the optimiser's state
carried over. Early stopping and snapshots count only once the final sparsity is reached. Memory while training is 300
%.

**Deviations** The table is pruned again right before every evaluation and when deployed, so what is measured is what
ships and its non-zeros never exceed the budget; the published code converts without pruning, after steps in which
every touched row became dense again. The threshold is an exact k-th value, two passes over the table in small blocks,
instead of a bisection with a tolerance. From ``t = ramp`` on the target is exactly ``s``; 0.001 short of it, the
paper's stopping point, would be several times the budget at 0.1 %. ``ramp`` is the paper's 68,732 steps, but at most
half an epoch, because on a small log the paper's number would be dozens of epochs. The paper's training buffer of one
float per row is not needed. ``final=False`` leaves out the pruning before evaluations and at the end, as published:
what is measured then holds more values than ``kept``, and ``kept`` must be given, because no budget is met.
"""
from __future__ import annotations

from ..select import prune_
from ._pruned import Pruned

PAPER_RAMP = 68_732                      # steps until 0.99^(t/100) falls to 0.001


class DeepLight(Pruned):
    paper = "arXiv 2002.06987"

    def __init__(self, fields, dim, kept=None, every=10, ramp=None, final=True):
        super().__init__(fields, dim, kept)
        self.every, self.ramp, self.final = every, ramp, final
        self.target = None                           # values to keep now; None before pruning starts

    def allowed(self, t: int, ramp: int) -> int:
        """Values kept after ``t`` of ``ramp`` pruning steps: falls from all to ``kept``, reached at ``ramp``."""
        cells = self.fields.n * self.dim
        if t >= ramp:
            return self.kept
        return cells - int((cells - self.kept) * (1 - 0.001 ** (t / ramp)))

    def prune(self):
        if self.target is not None and not self.deployed:
            prune_(self.table.weight, self.target)

    def before_evaluation(self):
        if self.final:
            self.prune()

    def schedule(self, run):
        yield from run.fit("warm-up", shared="full", carry=True)
        ramp = self.ramp or max(1, min(PAPER_RAMP, run.steps_per_epoch // 2))
        reached = lambda: self.target == self.kept                          # noqa: E731
        self.target = self.fields.n * self.dim
        for t, step in enumerate(run.fit("prune", ready=reached, fresh=False), 1):
            yield step
            self.target = self.allowed(t, ramp)
            if t % self.every == 0:
                self.prune()
        self.before_evaluation()

    def deploy(self):
        if not self.final and not self.deployed and not self.table.weight.is_meta:
            self.kept = int(self.table.weight.count_nonzero())           # all that is there, whatever was asked for
            self.fitted = {"kept": self.kept}
        return super().deploy()
