"""What pruning while training costs: steps and memory against the full table's, at Criteo's true size.

    python benchmarks/in_training.py [--method fiited ...] [--budget 0.1] [--batch 2048] [--scale 1.0] [--out FILE.csv]

One process, one CPU thread (or ``--device cuda``), the synthetic Criteo-like log at full cardinality (skewed ids). Two
measurements: steps of the method and of ``full``, each with a DLRM of its own, in turn on the same batches, so that
their ratio does not depend on what else the machine does; and, before the full table is there, how far the process
grew while the method was built, trained and held rounds. ``round_ms`` is one round (every 1,000 steps), which
``ratio_rounds`` spreads over its steps. ``peak_pct`` and ``training_pct`` (bytes of all state with both moments) refer
to the full table's weights alone.
"""
from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from rows import publish
from step import wait

import ecstudy as ec
from ecstudy import models
from ecstudy.budget import full_bytes
from ecstudy.data.synthetic import Synthetic
from ecstudy.measure.peak import peak
from ecstudy.methods._slots import INTERVAL
from ecstudy.training import Optimizers


class Trainee:
    """An embedding with a head, stepped on batches."""

    def __init__(self, method: str, budget: float | None, log: Synthetic, device: str):
        self.emb = ec.make(method, log.cardinalities, 16, budget, device=device).train()
        self.head = models.make("dlrm", fields=len(log.cardinalities), dim=16, dense=len(log.dense), seed=0).to(device)
        self.optimizers, self.device = Optimizers(self.emb, self.head), device

    def step(self, ids, dense, label) -> float:
        """Milliseconds of one update."""
        wait(self.device)
        start = time.perf_counter()
        self.optimizers.zero_grad()
        F.binary_cross_entropy_with_logits(self.head(self.emb(ids), dense, ids), label).backward()
        self.optimizers.step()
        wait(self.device)
        return 1000 * (time.perf_counter() - start)

    def round(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        self.emb.round(self.optimizers)
        wait(self.device)
        return 1000 * (time.perf_counter() - start)


def measure(method: str, budget: float, batch: int, scale: float, device: str, steps: int, warmup: int) -> dict:
    log = Synthetic("criteo", scale=scale, rows=max(10_000_000, batch * (3 * steps + warmup)))
    count = 0

    def batches(number: int):
        nonlocal count
        for count in range(count + 1, count + 1 + number):
            ids, dense, label, _ = log.rows((count - 1) * batch, count * batch)
            yield tuple(torch.from_numpy(np.asarray(part)).to(device) for part in
                        (ids.astype(np.int64), dense, np.asarray(label, np.float32)))

    idle = Trainee("hash_trick", 0.001, log, device)          # what any training loads is not the method's
    for data in batches(2):
        idle.step(*data)
    with peak(device) as grown:
        ours = Trainee(method, budget, log, device)
        for number, data in enumerate(batches(steps), 1):
            ours.step(*data)
            if number % 10 == 0:
                ours.round()
    theirs = Trainee("full", None, log, device)
    times: dict[str, list[float]] = {"full": [], "step": [], "round": []}
    for number, data in enumerate(batches(warmup + steps)):
        for name, trainee in ("full", theirs), ("step", ours):
            if (took := trainee.step(*data)) and number >= warmup:
                times[name].append(took)
    for data in batches(5):
        ours.step(*data)
        times["round"].append(ours.round())
    full, step, round_ = (float(np.median(times[name])) for name in ("full", "step", "round"))
    weights = full_bytes(log.cardinalities, 16)
    return dict(benchmark="in_training", method=method, budget=budget, rows=sum(log.cardinalities), batch=batch,
                device=device, threads=torch.get_num_threads(), step_ms=step, full_ms=full, ratio_full=step / full,
                round_ms=round_, ratio_rounds=(step + round_ / INTERVAL) / full, peak_pct=100 * grown.bytes / weights,
                peak_exact=grown.exact, training_pct=100 * ours.emb.training_bytes() / weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="spec, repeatable (default: fiited and ada_embed)")
    parser.add_argument("--budget", action="append", type=float, help="repeatable (default: 0.1)")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="append the rows to this CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for method in args.method or ["fiited", "ada_embed"]:
        for budget in args.budget or [0.1]:
            rows.append(measure(method, budget, args.batch, args.scale, args.device, args.steps, args.warmup))
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    publish(rows, args.out)


if __name__ == "__main__":
    main()
