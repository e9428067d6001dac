"""Preparing a Criteo-like log: seconds, rows per second, peak memory.

``python benchmarks/prep.py --rows 5000000 --csv prep.csv`` writes a seeded raw file (one label, 13 numbers, 26
categorical columns with the challenge's cardinalities, skewed values and missing shares; 0.24 KB a row), prepares it in
a process of its own, prints the figures and removes both. ``--raw FILE`` times a file of your own instead.
"""
from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLUMNS = ["rows", "raw_bytes", "vocab", "threads", "seconds", "rows_per_second", "peak_mb", "ids"]
CHILD = """
import sys
from ecstudy.data.prepare import prepare_criteo
prepare_criteo(sys.argv[1], sys.argv[2], vocab=sys.argv[3], max_bad=0.0)
"""


def generate(path: Path, rows: int, seed: int = 0, chunk: int = 50_000) -> None:
    """Write ``rows`` Criteo-like rows; bounded memory, the same bytes for the same seed.

    Value k of a field with n values is drawn with probability proportional to 1 / k (log-uniform), and printed as eight
    hexadecimal digits of a hash; a fifth of the numbers and, in 12 fields, 2 to 45 % of the values are missing.
    """
    import numpy as np

    from ecstudy.data.cardinalities import FIELDS

    sizes = FIELDS["criteo"][1]
    random = np.random.default_rng(seed)
    lost = np.where(np.arange(26) % 2, 0.0, np.linspace(0.02, 0.45, 26))
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    with open(path, "wb") as file:
        for start in range(0, rows, chunk):
            n = min(chunk, rows - start)
            text = np.full((n, 1 + 13 * 6 + 26 * 9 + 1), ord("\t"), np.uint8)   # fixed width, then unused bytes go
            shown = np.ones(text.shape, bool)
            text[:, 0] = ord("0") + (random.random(n) < 0.256)
            text[:, -1] = ord("\n")
            for i in range(13):
                value = np.minimum(random.lognormal(2, 2, n), 99_999).astype(np.int64)
                present = random.random(n) > 0.2
                for digit in range(5):
                    at, power = 1 + 6 * i + 1 + digit, 10 ** (4 - digit)
                    text[:, at] = ord("0") + value // power % 10
                    shown[:, at] = present & ((value >= power) | (power == 1))
            for i, size in enumerate(sizes):
                rank = np.exp(random.random(n) * np.log(size + 1)).astype(np.uint64)
                mixed = ((rank + np.uint64(i << 32)) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
                at = 1 + 13 * 6 + 9 * i + 1
                for digit in range(8):
                    text[:, at + digit] = digits[(mixed >> np.uint64(28 - 4 * digit)) & np.uint64(15)]
                shown[:, at:at + 8] = (random.random(n) >= lost[i])[:, None]
            file.write(text[shown].tobytes())


def measure(raw: Path, folder: Path, vocab: str, threads: int) -> dict:
    """Prepare ``raw`` in a process of its own; wall seconds and that process's peak resident memory."""
    environment = os.environ | dict(POLARS_MAX_THREADS=str(threads), OMP_NUM_THREADS="1")
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(raw), str(folder / "out"), vocab], env=environment)
    _, status, usage = os.wait4(child.pid, 0)                   # this child alone, not the one that generated
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"preparing {raw} failed")
    from ecstudy.data.layout import Dataset

    dataset = Dataset.open(folder / "out")
    rows = sum(dataset.rows.values())
    return dict(zip(COLUMNS, [rows, raw.stat().st_size, vocab, threads, round(seconds, 2), round(rows / seconds),
                              round(usage.ru_maxrss / 1024), sum(dataset.cardinalities)]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--raw", type=Path, help="time this file instead of a generated one")
    options.add_argument("--vocab", default="all", choices=("all", "train"))
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--folder", type=Path, help="folder for temporary files (default: the system's)")
    options.add_argument("--csv", type=Path, help="append the figures to this file")
    options.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.generate:
        return generate(chosen.generate, chosen.rows, chosen.seed)
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="prep-") as folder:
        raw = chosen.raw or Path(folder) / "train.txt"
        if not chosen.raw:                                      # apart, so that this process stays small
            subprocess.run([sys.executable, __file__, "--generate", str(raw), "--rows", str(chosen.rows),
                            "--seed", str(chosen.seed)], check=True)
        row = measure(raw, Path(folder), chosen.vocab, chosen.threads)
    print("  ".join(f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name} {value}"
                    for name, value in row.items()))
    if chosen.csv:
        new = not chosen.csv.exists()
        with open(chosen.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
