"""Lookup latency relative to the method's own matrix products alone, for methods that compute embeddings.

    python benchmarks/products.py [--method tt_rec ...] [--budget 0.1 ...] [--batch 128 ...] [--out FILE.csv]

Deployed modules at Criteo's true field sizes, ids from the synthetic Criteo-like log, lookup and products timed in
turn in one process on one CPU thread (or ``--device cuda``). A method takes part by defining ``products(ids)``, which
prepares the operands of each batch and returns a function that only multiplies them: the distinct ids of the batch,
without padding.
"""
from __future__ import annotations

import argparse

import pandas as pd
import torch
from rows import publish

import ecstudy as ec
from ecstudy.data.synthetic import Synthetic
from ecstudy.measure import measure_latency
from ecstudy.registry import get, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="spec, repeatable (default: all methods with products)")
    parser.add_argument("--batch", action="append", type=int, help="repeatable (default: 128 and 2048)")
    parser.add_argument("--budget", action="append", type=float, help="repeatable (default: 0.1 and 0.01)")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=4, help="batches in turn: their operands are held in memory")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="append the rows to this CSV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log = Synthetic("criteo", scale=args.scale, rows=10_000_000)
    sizes, rows = log.cardinalities, []
    for method in args.method or [name for name in names() if hasattr(get(name), "products")]:
        for budget in args.budget or [0.1, 0.01]:
            if not ec.weigh(method, sizes, 16, budget)["reachable"]:
                continue
            emb = ec.make(method, sizes, 16, budget, device=args.device)
            with torch.no_grad():
                emb.deploy()
            for batch in args.batch or [128, 2048]:
                ids = torch.from_numpy(log.rows(0, args.batches * batch)[0]).long().to(args.device).split(batch)
                work = [(part, emb.products(part)) for part in ids]
                found = measure_latency({"lookup": lambda part, _: emb(part), "products": lambda _, run: run()},
                                        batches=work, device=args.device, repeats=args.repeats, warmup=args.batches)
                lookup, products = found["lookup"].median, found["products"].median
                rows.append(dict(benchmark="products", method=method, budget=budget, batch=batch, rows=sum(sizes),
                                 device=args.device, threads=torch.get_num_threads(), ms=lookup, products_ms=products,
                                 ratio_products=lookup / products))
                print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    publish(rows, args.out)


if __name__ == "__main__":
    main()
