"""Data on which a method's idea must pay, and the comparison with ``hash_trick`` at equal bytes."""
from __future__ import annotations

import numpy as np
import torch

import ecstudy as ec
from ecstudy import models
from ecstudy.data import DatasetWriter
from ecstudy.data.layout import Dataset
from ecstudy.measure.auc import auc
from ecstudy.training import Run, Settings
from ecstudy.training.batches import Batches


def write(folder, sizes, ids, logit, seed: int = 0) -> Dataset:
    """A log of ``ids [N, F]`` whose labels are drawn from ``logit [N]``: 80 % train, 10 % validation, 10 % test."""
    label = np.random.default_rng(seed).random(len(ids)) < 1 / (1 + np.exp(-logit))
    ends = np.cumsum([int(0.8 * len(ids)), len(ids) // 10, len(ids) - int(0.8 * len(ids)) - len(ids) // 10])
    with DatasetWriter(folder, name="planted", fields=[f"f{i}" for i in range(len(sizes))],
                       cardinalities=sizes) as writer:
        for split, first, last in zip(("train", "valid", "test"), [0, *ends], ends):
            writer.append(split, ids[first:last], None, label[first:last])
    return Dataset.open(folder)


def zipf_ids(rng, size: int, rows: int, exponent: float = 1.0) -> np.ndarray:
    """``rows`` ids below ``size`` with power-law frequencies; which ids are frequent is shuffled."""
    p = 1 / np.arange(1, size + 1) ** exponent
    return rng.permutation(size)[rng.choice(size, rows, p=p / p.sum())]


def trained(spec: str, dataset: Dataset, budget, dim: int = 8, seed: int = 0, model: str = "wdl", **settings):
    """Train, deploy and open the test rows: (test AUC, deployed bytes)."""
    torch.set_num_threads(1)
    settings = Settings(**(dict(lr=0.01, batch=256, max_epochs=5, evals_per_epoch=2, patience=4, seed=seed) | settings))
    emb = ec.make(spec, dataset.cardinalities, dim, budget, seed=seed, counts=dataset.counts)
    head = models.make(model, fields=len(dataset.cardinalities), dim=dim, dense=0, seed=seed)
    run = Run(emb, head, dataset, settings)
    run.go()
    with torch.no_grad():
        emb.before_evaluation()
        emb.deploy()
    return auc(*run.logits(Batches(dataset, "test", 8192))), ec.memory(emb)


def margin(spec: str, dataset: Dataset, budget, dim: int = 8, **settings) -> float:
    """Test AUC of ``spec`` minus that of ``hash_trick`` given the same number of bytes."""
    ours, size = trained(spec, dataset, budget, dim, **settings)
    theirs, _ = trained("hash_trick", dataset, int(size), dim, **settings)
    return ours - theirs
