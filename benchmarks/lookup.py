"""Lookup latency of every method relative to Full, and seconds and peak memory of solving one budget.

    python benchmarks/lookup.py [--batch 128] [--scale 1.0] [--budget 0.1] [--method compo ...] [--out FILE.csv]

Deployed modules at Criteo's true field sizes, ids from the synthetic Criteo-like log, all timed in turn in one
process on one CPU thread (or ``--device cuda``).
Ratios are given against Full and against ``F.embedding`` on the same table.
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
from ecstudy.budget import full_bytes, solve
from ecstudy.data.synthetic import Synthetic
from ecstudy.measure import measure_latency, peak
from ecstudy.registry import get
from ecstudy.spec import parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="spec, repeatable (default: all methods)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="append the rows to this CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log = Synthetic("criteo", scale=args.scale, rows=10_000_000)
    sizes = log.cardinalities
    ids = torch.from_numpy(log.rows(0, 100 * args.batch)[0]).long().split(args.batch)
    batches = [(part.to(args.device),) for part in ids]
    full = ec.make("full", sizes, 16, device=args.device).eval()
    weight, offset = full.table.weight, full.fields.offset
    rows = []
    for method in args.method or [name for name in ec.methods().index if name != "full"]:
        budget = args.budget if solvable(method, sizes, args.budget) else smallest(method, sizes)
        start = time.perf_counter()
        with peak() as used:
            solve(method, sizes, 16, int(full_bytes(sizes, 16) * budget))
        seconds = time.perf_counter() - start
        counts = np.zeros(sum(sizes), np.int64) if get(parse(method).name).needs_counts else None
        emb = ec.make(method, sizes, 16, budget, counts=counts, device=args.device)
        with torch.no_grad():
            emb.deploy()
        found = measure_latency({"full": full, "F.embedding": lambda i: F.embedding(i + offset, weight), method: emb},
                                batches=batches, device=args.device, repeats=args.repeats, warmup=20)
        rows.append(dict(benchmark="lookup", method=method, budget=budget, batch=args.batch, rows=sum(sizes),
                         device=args.device, threads=torch.get_num_threads(), ms=found[method].median,
                         full_ms=found["full"].median, ratio_full=found[method].ratio,
                         ratio_embedding=found[method].median / found["F.embedding"].median,
                         solve_seconds=seconds, solve_peak_mib=used.bytes / 2**20))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
        del emb
    publish(rows, args.out)


def solvable(method: str, sizes, budget: float) -> bool:
    return ec.weigh(method, sizes, 16, budget)["reachable"]


def smallest(method: str, sizes) -> float:
    """The method's smallest share of the full table, rounded up."""
    row = ec.weigh(method, sizes, 16, 1e-6)
    return min(1.0, row["inference_pct"] / 100 + 1e-6)


if __name__ == "__main__":
    main()
