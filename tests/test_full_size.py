"""Training steps at Criteo's true field sizes: nothing made in a step grows with the 33,762,577 rows.

Tables are left uninitialised: pages take memory only once touched, so every method fits a small machine.
"""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ecstudy as ec
from ecstudy import models
from ecstudy.budget import full_bytes
from ecstudy.data.synthetic import Synthetic
from ecstudy.memory import stored
from ecstudy.method import Step
from ecstudy.methods._pruned import Pruned
from ecstudy.registry import get, names
from ecstudy.tables import Decoded
from ecstudy.training import Optimizers, Run, Settings
from test_contract import Largest
from traits import trait

BATCH, ROWS = 2048, 33_762_577


class Log:
    """Four batches of the Criteo-like log at full cardinality, the same for every split."""

    fingerprint = name = "full"

    def __init__(self):
        log = Synthetic("criteo", scale=1.0, rows=10_000_000)
        self.cardinalities = [int(n) for n in log.cardinalities]
        ids, dense, label, _ = log.rows(0, 4 * BATCH)
        self.rows = SimpleNamespace(ids=ids, dense=dense, label=np.asarray(label), __len__=lambda: len(ids))
        self.counts = np.zeros(sum(self.cardinalities), np.int64)
        offset = np.cumsum([0, *self.cardinalities[:-1]])
        np.add.at(self.counts, (ids + offset).ravel(), 1)

    def split(self, name):
        return _Rows(self.rows)


class _Rows(SimpleNamespace):
    def __init__(self, rows):
        super().__init__(ids=rows.ids, dense=rows.dense, label=rows.label)

    def __len__(self):
        return len(self.ids)


class Few(Run):
    """Three steps per stage, no evaluation; stages that begin by working on the whole table are not entered."""

    LATER = ("fine-tune", "retrain", "prune", "evolution")
    ENDS = ("search", "supernet")                    # what follows them builds a new table, or judges it many times

    def fit(self, stage, *, fresh=True, **_):
        if stage in self.LATER:
            raise StopIteration
        if fresh:
            self.optimizers = Optimizers(self.emb, self.head, self.settings.lr)
        self.emb.train(), self.head.train()
        for _ in range(3):
            yield Step(stage=stage)
        if stage in self.ENDS:
            raise StopIteration


@pytest.fixture(scope="module")
def log():
    return Log()


@pytest.fixture()
def untouched(monkeypatch):
    """Large parameters are not filled, so that only touched rows take memory and time."""
    for name in ("uniform_", "normal_"):
        inner = getattr(torch.nn.init, name)
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, inner=inner, **kwargs: (
            tensor if tensor.numel() > 10_000_000 else inner(tensor, *args, **kwargs)))
    monkeypatch.setattr(Pruned, "cut", lambda self: None)        # it visits the whole table, between stages
    monkeypatch.setattr(Decoded, "fill", lambda self, bound: None)


@pytest.mark.parametrize("method", names(trains=True))
def test_a_step_at_criteo_size_makes_nothing_that_grows_with_the_table(method, log, untouched):
    sizes = log.cardinalities
    assert sum(sizes) == ROWS
    cls = get(method)
    budget = trait(method, "full_size_budget")
    if not ec.weigh(method, sizes, 16, budget)["reachable"]:
        budget = None
    emb = ec.make(method, sizes, 16, budget, counts=log.counts if cls.needs_counts else None)
    head = models.make("dlrm", fields=26, dim=16, dense=13, seed=0)
    run = Few(emb, head, log, Settings(batch=BATCH))
    largest, schedule = 0, emb.schedule(run)
    while True:
        try:
            step = next(schedule)
        except (StopIteration, RuntimeError):        # the end, or a stage that is not entered
            break
        known = {t.untyped_storage().data_ptr() for t in stored(emb).values()}
        known |= {t.untyped_storage().data_ptr() for pair in run.optimizers.rows.moments if pair for t in pair}
        first = any(pair is None for pair in run.optimizers.rows.moments)     # it allocates moments, once a stage
        with Largest(known) as seen:
            run.execute(step)
        largest = largest if first else max(largest, seen.largest)
    assert run.steps >= 3
    assert largest <= trait(method, "step_mib") * 2 ** 20
    assert largest < 0.1 * full_bytes(sizes, 16)


def test_the_measure_sees_a_table(log):
    """The same measure on an optimiser that visits every row."""
    emb = ec.make("hash_trick", [20_000, 3000], 16)
    optimizer = torch.optim.Adam(emb.parameters())
    known = {t.untyped_storage().data_ptr() for t in stored(emb).values()}
    with Largest(known) as seen:
        emb(torch.zeros(4, 2, dtype=torch.int64)).sum().backward()
        optimizer.step()
    assert seen.largest >= 23_000 * 16 * 4
