"""Lookup latency of every method relative to Full, and seconds and peak memory of solving one budget.

    python benchmarks/lookup.py [--batch 128 ...] [--scale 1.0] [--budget 0.1 ...] [--method compo ...] [--compiled]
                                [--out FILE.csv]

Deployed modules at Criteo's true field sizes, ids from the synthetic Criteo-like log, all timed in turn in one
process on one CPU thread (or ``--device cuda``).
With ``--compiled`` each module is timed a second time after ``compile()``.
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
    parser.add_argument("--batch", action="append", type=int, help="repeatable (default: 128 and 2048)")
    parser.add_argument("--budget", action="append", type=float, help="repeatable (default: 0.1)")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="append the rows to this CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log = Synthetic("criteo", scale=args.scale, rows=10_000_000)
    sizes = log.cardinalities
    batches = {}
    for batch in args.batch or [128, 2048]:
        ids = torch.from_numpy(log.rows(0, 100 * batch)[0]).long().split(batch)
        batches[batch] = [(part.to(args.device),) for part in ids]
    full = ec.make("full", sizes, 16, device=args.device).eval()
    weight, offset = full.table.weight, full.fields.offset
    rows = []
    for method, budget in planned(args, sizes):
        start = time.perf_counter()
        with peak() as used:
            solve(method, sizes, 16, int(full_bytes(sizes, 16) * budget))
        seconds = time.perf_counter() - start
        counts = np.zeros(sum(sizes), np.int64) if get(parse(method).name).needs_counts else None
        emb = ec.make(method, sizes, 16, budget, counts=counts, device=args.device)
        with torch.no_grad():
            emb.deploy()
            if method.startswith("dedup"):           # untrained blocks fall on few; those of a trained table do not
                emb.map.copy_(torch.randint(emb.kept, emb.map.shape))
        for batch, ids, compiled in ((b, i, c) for c in (False, True)[:1 + args.compiled] for b, i in batches.items()):
            if compiled:
                emb.compile()
                if not emb.fused:
                    continue
            with torch.no_grad():
                emb(*ids[0])                                             # makes tables, compiles
                start = time.perf_counter()
                emb(*ids[1])
            slow = time.perf_counter() - start > 0.1                     # bound by arithmetic: fewer repeats will do
            found = measure_latency({"full": full, "F.embedding": lambda i: F.embedding(i + offset, weight),
                                     method: emb}, batches=ids, device=args.device,
                                    repeats=min(args.repeats, 11) if slow else args.repeats, warmup=2 if slow else 20)
            rows.append(dict(benchmark="lookup", method=method, budget=budget, batch=batch, rows=sum(sizes),
                             compiled=compiled,
                             device=args.device, threads=torch.get_num_threads(), ms=found[method].median,
                             full_ms=found["full"].median, ratio_full=found[method].ratio,
                             ratio_embedding=found[method].median / found["F.embedding"].median,
                             solve_seconds=seconds, solve_peak_mib=used.bytes / 2**20))
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
        del emb
    publish(rows, args.out)


def planned(args, sizes):
    """Every method at every budget it reaches; one that reaches none at its smallest size."""
    for method in args.method or [name for name in ec.methods().query("trains").index if name != "full"]:
        budgets = [b for b in args.budget or [0.1] if ec.weigh(method, sizes, 16, b)["reachable"]]
        smallest = ec.weigh(method, sizes, 16, 1e-6)["inference_pct"] / 100 + 1e-6
        for budget in budgets or [min(1.0, smallest)]:
            yield method, budget


if __name__ == "__main__":
    main()
