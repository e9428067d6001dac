"""Cost of a training step at Criteo's true size, as a multiple of the same head without any embedding work.

    python benchmarks/step.py [--method full] [--budget 1.0] [--batch 2048] [--scale 1.0] [--out FILE.csv]

One process, one CPU thread (or ``--device cuda``). Head-only steps and full steps alternate, so the ratio does not
depend on what else the machine does. Ids are drawn from the synthetic Criteo-like log at full cardinality (skewed).
"""
from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from rows import publish

import ecstudy as ec
from ecstudy import models
from ecstudy.data.synthetic import Synthetic
from ecstudy.registry import get
from ecstudy.spec import parse
from ecstudy.training import Optimizers


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(method: str, budget: float | None, batch: int, scale: float, device: str, steps: int, warmup: int) -> dict:
    log = Synthetic("criteo", scale=scale, rows=max(10_000_000, 2 * batch * (steps + warmup)))
    sizes = log.cardinalities
    counts = np.zeros(sum(sizes), np.int64) if get(parse(method).name).needs_counts else None
    emb = ec.make(method, sizes, 16, budget, counts=counts, device=device)
    head = models.make("dlrm", fields=len(sizes), dim=16, dense=len(log.dense), seed=0).to(device)
    alone = models.make("dlrm", fields=len(sizes), dim=16, dense=len(log.dense), seed=0).to(device)
    both, dense_only = Optimizers(emb, head), torch.optim.Adam(alone.parameters(), 0.001, fused=True)
    x = torch.randn(batch, len(sizes), 16, device=device)
    times: dict[str, list[float]] = {"head": [], "step": []}
    for number in range(warmup + steps):
        ids, dense, label, _ = log.rows(number * batch, (number + 1) * batch)
        ids = torch.from_numpy(ids).long().to(device)
        dense, label = torch.from_numpy(dense).to(device), torch.from_numpy(np.asarray(label)).float().to(device)
        wait(device)
        start = time.perf_counter()
        dense_only.zero_grad()
        F.binary_cross_entropy_with_logits(alone(x, dense, ids), label).backward()
        dense_only.step()
        wait(device)
        middle = time.perf_counter()
        both.zero_grad()
        F.binary_cross_entropy_with_logits(head(emb(ids), dense, ids), label).backward()
        both.step()
        wait(device)
        if number >= warmup:
            times["head"].append(middle - start)
            times["step"].append(time.perf_counter() - middle)
    head_ms, step_ms = (1000 * float(np.median(times[name])) for name in ("head", "step"))
    return dict(benchmark="step", method=method, budget=budget, rows=sum(sizes), batch=batch, device=device,
                threads=torch.get_num_threads(), head_ms=head_ms, step_ms=step_ms, ratio=step_ms / head_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="spec, repeatable (default: full)")
    parser.add_argument("--budget", type=float, default=None)
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
    for method in args.method or ["full"]:
        rows.append(measure(method, args.budget, args.batch, args.scale, args.device, args.steps, args.warmup))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    publish(rows, args.out)


if __name__ == "__main__":
    main()
