"""Rows per second and peak memory of the generator, alone and written to disk.

``OMP_NUM_THREADS=1 python benchmarks/synthetic.py --preset criteo --scale 1 --rows 2000000``
"""
from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time

from ecstudy.data.synthetic import Synthetic, generate


def peak_bytes() -> int:
    """Largest resident memory of this process so far, bytes (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="criteo")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--chunk-rows", type=int, default=262_144)
    parser.add_argument("--drift", type=float, default=0.0)
    parser.add_argument("--folder", help="where the written data set lies for a moment (default: the temporary folder)")
    args = parser.parse_args()
    settings = dict(rows=args.rows, scale=args.scale, drift=args.drift)
    imported = peak_bytes()
    start = time.perf_counter()
    log = Synthetic(args.preset, **settings)
    setup = time.perf_counter() - start
    start = time.perf_counter()
    for low in range(0, args.rows, args.chunk_rows):
        log.rows(low, min(low + args.chunk_rows, args.rows))
    alone, peak_alone = time.perf_counter() - start, peak_bytes()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        generate(args.preset, f"{folder}/log", chunk_rows=args.chunk_rows, progress=False, **settings)
        written = time.perf_counter() - start
    print(json.dumps(dict(
        preset=args.preset, rows=args.rows, ids=sum(log.cardinalities), chunk_rows=args.chunk_rows, drift=args.drift,
        setup_seconds=round(setup, 3), rows_per_second=round(args.rows / alone),
        rows_per_second_written=round(args.rows / written), mib_imported=imported >> 20, mib_peak_rows=peak_alone >> 20,
        mib_peak_written=peak_bytes() >> 20)))


if __name__ == "__main__":
    main()
