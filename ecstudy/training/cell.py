"""One cell of the study: train, deploy, weigh, open the test rows once, time, and return what was measured."""
from __future__ import annotations

import torch
from torch import nn

from .. import models, paths
from ..api import make
from ..budget import Unreachable, budget_bytes, full_bytes
from ..data import open_dataset
from ..measure import Diverged, allocation, auc_interval, logloss, measure_latency, normalised_entropy
from ..measure.auc import auc
from ..measure.peak import peak
from ..memory import breakdown, memory
from ..method import Method
from ..registry import get
from . import distributed
from .batches import Batches
from .run import EVALUATION_BATCH, Run, Settings

LATENCY_BATCHES = 50
LATENCY_SECONDS = 0.5                    # 100 rounds of most


def run_cell(cell, *, progress=None) -> dict:
    """The measured columns of a row for a :class:`ecstudy.study.row.Cell`.

    An unreachable budget costs no training and gives status ``unreachable`` with the reason; numbers that are not
    finite give status ``diverged``. Test rows are read once, after the method is deployed.

    Parameters
    ----------
    progress:
        Called as ``progress(stage=, step=, total=, valid_auc=)`` after every evaluation.
    """
    group = distributed.current()
    if group is not None:
        group.begin()
    dataset = open_dataset(cell.dataset)
    row, emb, head = begin(cell, dataset)
    if group is not None:
        row["device"] = f"{cell.device} x{group.count}"
    if emb is None:
        return row
    settings = Settings(lr=cell.lr, batch=cell.batch, seed=cell.seed, evals_per_epoch=cell.evals_per_epoch,
                        patience=cell.patience, max_epochs=cell.max_epochs, schedule=cell.schedule, select=cell.select)
    shared = dict(model=cell.model, options=cell.model_options, dim=cell.dim, device=torch.device(cell.device).type)
    if group is not None:                            # the seconds of a shared stage are those of so many processes
        shared["processes"] = group.count
    run = Run(emb, head, dataset, settings, device=cell.device, progress=progress, cache=paths.runs() / "warmups",
              shared_key=shared, group=group)
    try:
        with peak(cell.device) as measured:
            run.go()
            if group is not None:
                group.agree(emb, head)
            with torch.no_grad():
                emb.before_evaluation()
                emb.deploy()
        row |= _quality(run, cell)
    except Diverged as error:
        return diverged(row, run, error)
    if group is not None and group.rank:             # the rest is the first process's
        return row
    return weighed(cell, row, run) | dict(
        peak_bytes=measured.bytes, epochs=run.steps / run.steps_per_epoch, allocation=allocation(emb, dataset.counts),
        **_latency(cell, run))


def begin(cell, dataset) -> tuple[dict, Method | None, nn.Module | None]:
    """The row so far, the embedding and the head of a cell; of an unreachable budget the whole row, and no modules."""
    sizes, cls = dataset.cardinalities, get(cell.spec.name)
    row = dict(family=cls.family, bytes_full=full_bytes(sizes, cell.dim))
    if cell.budget is not None:
        row["budget_bytes"] = budget_bytes(cell.budget, sizes, cell.dim)
    try:
        emb = make(cell.spec, sizes, cell.dim, cell.budget, seed=cell.seed,
                   counts=dataset.counts if cls.needs_counts else None)
    except Unreachable as error:
        return row | dict(status="unreachable", reason=error.reason, bytes_inference=error.closest,
                          reached=error.closest / row["bytes_full"]), None, None
    head = models.make(cell.model, fields=len(sizes), dim=cell.dim, dense=len(dataset.dense), seed=cell.seed,
                       **cell.model_options)
    return row, emb, head


def weighed(cell, row: dict, run: Run) -> dict:
    """``row`` with the bytes, seconds and steps of a run whose embedding is deployed.

    Raises RuntimeError if that is over the budget.
    """
    size = memory(run.emb)
    if "budget_bytes" in row and size > row["budget_bytes"]:
        raise RuntimeError(f"{cell.spec} deployed {size} bytes, over the budget of {row['budget_bytes']}")
    return row | dict(
        status="ok", reason="", reached=size / row["bytes_full"], bytes_inference=size,
        bytes_training=run.training_bytes, bytes_breakdown=breakdown(run.emb), steps=run.steps,
        seconds=sum(run.stage_seconds.values()), stage_seconds={k: round(v, 3) for k, v in run.stage_seconds.items()})


def diverged(row: dict, run: Run, error: Diverged) -> dict:
    """``row`` of a run whose numbers were not finite."""
    return row | dict(status="diverged", reason=str(error), stage_seconds=run.stage_seconds,
                      seconds=sum(run.stage_seconds.values()), steps=run.steps)


def _quality(run: Run, cell) -> dict:
    from ..study import store

    valid_label, valid_logit = run.logits(run.valid)
    label, logit = run.logits(Batches(run.dataset, "test", EVALUATION_BATCH, run.device))
    if run.group is None or run.group.rank == 0:
        store.write_logits(cell.run_id, logit)
    value, low, high = auc_interval(label, logit)
    return dict(auc=value, auc_low=low, auc_high=high, logloss=logloss(label, logit),
                ne=normalised_entropy(label, logit), valid_auc=auc(valid_label, valid_logit),
                valid_logloss=logloss(valid_label, valid_logit))


def _latency(cell, run: Run) -> dict:
    """Milliseconds per batch of the training batch size, with Full timed in turn in the same process."""
    full = make("full", run.dataset.cardinalities, cell.dim, seed=cell.seed, device=cell.device).eval()
    test = Batches(run.dataset, "test", cell.batch, cell.device)
    batches = [(ids, dense) for (ids, dense, _), _ in zip(test.once(), range(LATENCY_BATCHES), strict=False)
               if len(ids) == test.batch]
    emb, head = run.emb.eval(), run.head.eval()
    found = measure_latency({"full": lambda ids, dense: full(ids), "emb": lambda ids, dense: emb(ids),
                             "forward_full": lambda ids, dense: head(full(ids), dense, ids),
                             "forward": lambda ids, dense: head(emb(ids), dense, ids)},
                            batches=batches, device=cell.device, limit=LATENCY_SECONDS)
    return dict(latency_ms=found["emb"].median, latency_p10_ms=found["emb"].p10, latency_p90_ms=found["emb"].p90,
                latency_full_ms=found["full"].median, forward_ms=found["forward"].median,
                forward_full_ms=found["forward_full"].median)
