"""A schedule listed without training: a test of the contract, and the timeline on the method's page."""
from __future__ import annotations

from itertools import groupby
from typing import Iterator

import numpy as np

from ..budget import Unreachable, build, full_bytes, solve
from ..method import Method, Step
from .run import Settings

SIZES = (50, 20, 8)


class FakeRun:
    """Answers :meth:`fit` with a few steps per stage and remembers what was asked. Nothing is trained or updated."""

    optimizers = None

    def __init__(self, steps_per_epoch: int = 8, steps: int = 4, most: int = 1000):
        self.steps_per_epoch, self.steps, self.most = steps_per_epoch, steps, most
        self.settings = Settings()
        self.stages: list[dict] = []

    def fit(self, stage: str, *, ready=None, fresh=True, carry=False, shared=None, until=None) -> Iterator[Step]:
        self.stages.append(dict(stage=stage, gated=ready is not None, fresh=fresh, shared=shared))
        for step in range(self.most):
            yield Step(stage=stage)
            if step + 1 >= self.steps and (ready is None or ready()):
                return
        raise RuntimeError(f"stage {stage!r} was not ready after {self.most} steps")

    def score(self) -> float:
        """Stands for a validation AUC."""
        return 0.5


def example(spec: str, dim: int = 16, budget: float = 0.5) -> Method:
    """A small module of a method, for timelines and tests."""
    counts = np.arange(sum(SIZES))[::-1] // 3
    try:
        knob = solve(spec, list(SIZES), dim, int(full_bytes(list(SIZES), dim) * budget)).knob
    except Unreachable:
        knob = None
    return build(spec, list(SIZES), dim, knob=knob, counts=counts)


def timeline(method: str) -> list[tuple[str, int, str]]:
    """Stages of a method in order as (stage, steps, update), from its schedule on a fake run.

    ``update`` says what a step moves: ``all``, ``emb`` (head frozen) or ``aux`` (auxiliary state, on validation rows).
    Alternating steps of one stage are summed per kind.
    """
    run = FakeRun()
    emb = example(method)
    seen: list[tuple[str, str]] = []
    for step in emb.schedule(run):
        stage = step.stage or run.stages[-1]["stage"]
        seen.append((stage, step.update if isinstance(step.update, str) else "aux"))
    out = []
    for stage, steps in groupby(seen, key=lambda item: item[0]):
        updates = [update for _, update in steps]
        out += [(stage, updates.count(update), update) for update in dict.fromkeys(updates)]
    return out
