"""The trained table keeps its values of largest magnitude, all others become zero, and what is left is trained on.

**Idea** (one-shot magnitude pruning, Han et al., NeurIPS 2015, arXiv 1506.02626; MagPrune in the benchmark of
arXiv 2406.17335, where it is close to methods that cost far more). A full table is trained; a global threshold is set
such that exactly ``kept`` values have at least its magnitude, and the others are zero from then on.

**Stored** ``kept`` values and an index that finds them, in whichever form is about the lightest. **Size** by ``kept``.

**Training** two stages: the full table until validation stops improving (all methods that begin with it and all
budgets share it), then pruning at once and fine-tuning of table and head with a fresh optimiser, in which zeros stay
zero. 300 % in both. ``tune=False`` leaves out the second: the compressor ``prune`` on the trained table.

**Deviations** The threshold is an exact k-th value. The benchmark prunes without fine-tuning and searches how many
values every row keeps at least; here rows have no such floor, and those of rare ids, which training hardly moved, are
the first to go. Han et al. prune and tune in several rounds; that with a smooth ramp is ``deeplight``. A stage may end
with the state it began with, if training further only lowers validation AUC.
"""
from __future__ import annotations

from ._pruned import Pruned


class MagPrune(Pruned):
    paper = "arXiv 1506.02626"

    def __init__(self, fields, dim, kept=None, tune=True):
        super().__init__(fields, dim, kept)
        self.tune = tune

    def schedule(self, run):
        yield from run.fit("warm-up", shared="full")
        self.cut()
        if self.tune:
            yield from run.fit("fine-tune")
