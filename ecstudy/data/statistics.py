"""What a data set looks like to an embedding table: how skewed its ids are, how many are rare, how many unseen.

``python -m ecstudy.data.statistics NAME... --out results/data_statistics.csv`` writes one row per data set: aggregates
only, no rows of the data.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .layout import SPLITS, DataError, Dataset

CHUNK = 1 << 20
_CAP = 1 << 16                  # counts below are tallied in bins, the few above are kept one by one


def _counts(dataset: Dataset, split: str) -> np.ndarray:
    """Occurrences of each id in a split, int64 [n], fields one after the other."""
    if split == "train":
        return dataset.counts
    rows = dataset.split(split)                     # checks the name
    offsets = np.concatenate([[0], np.cumsum(dataset.cardinalities)])
    counts = np.zeros(offsets[-1], np.int64)
    for start in range(0, len(rows), CHUNK):
        ids = rows.ids[start:start + CHUNK]
        for field in range(ids.shape[1]):
            part = np.bincount(ids[:, field])
            counts[offsets[field]:offsets[field] + len(part)] += part
    return counts


def _tally(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct counts in falling order and how many ids have each: ([M], [M]), read ``CHUNK`` ids at a time."""
    bins, large = np.zeros(_CAP, np.int64), []
    for start in range(0, len(counts), CHUNK):
        part = np.asarray(counts[start:start + CHUNK])
        bins += np.bincount(part[part < _CAP], minlength=_CAP)
        large.append(part[part >= _CAP])
    value, many = np.unique(np.concatenate(large), return_counts=True) if large else (np.zeros(0, np.int64),) * 2
    small = np.flatnonzero(bins)
    return np.concatenate([value[::-1], small[::-1]]), np.concatenate([many[::-1], bins[small][::-1]])


def _held(value: np.ndarray, many: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Share of occurrences held by the ``ids`` most frequent ids (fractions of an id count pro rata)."""
    mass = np.concatenate([[0], np.cumsum(value * many)])
    return np.interp(ids, np.concatenate([[0], np.cumsum(many)]), mass) / max(mass[-1], 1)


def statistics(dataset: Dataset, split: str = "train") -> dict:
    """Aggregates of a split, read in chunks.

    ======================  ==========================================================================================
    rows, base_rate         of the split
    fields, ids, numeric    columns and the whole vocabulary (sum of cardinalities)
    seen_ids                distinct ids that occur in the split
    top10_share             share of occurrences held by the most frequent 10 % of the whole vocabulary
    under5_share            share of the vocabulary with fewer than 5 occurrences (0 included)
    once_share              share of the vocabulary that occurs exactly once
    unseen_test_share       share of test occurrences whose id never occurs in the training split
    zero_share              mean share of zeros of the numeric features: zero and missing, the layout stores both as 0
    ceiling_auc             AUC of the true probabilities on the test labels (generated data only)
    ======================  ==========================================================================================

    Shares are fractions of 1, None where nothing can be counted. Raises DataError for an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
    ids, rows = sum(dataset.cardinalities), dataset.split(split)
    value, many = _tally(_counts(dataset, split))
    zeros = np.zeros(len(dataset.dense), np.int64)
    for start in range(0, len(rows), CHUNK):
        zeros += (rows.dense[start:start + CHUNK] == 0).sum(0)
    return dict(
        dataset=dataset.name, split=split, rows=len(rows), fields=len(dataset.fields), ids=ids,
        numeric=len(dataset.dense), base_rate=dataset.meta["base_rate"][split], seen_ids=int(many[value > 0].sum()),
        top10_share=float(_held(value, many, np.array(ids / 10))), under5_share=float(many[value < 5].sum() / ids),
        once_share=float(many[value == 1].sum() / ids), unseen_test_share=_unseen(dataset),
        zero_share=float(zeros.mean() / len(rows)) if len(zeros) and len(rows) else None,
        ceiling_auc=(dataset.meta.get("ceiling") or {}).get("auc_test"),
    )


def _unseen(dataset: Dataset) -> float | None:
    test, counts = dataset.split("test"), dataset.counts
    offsets, unseen = np.concatenate([[0], np.cumsum(dataset.cardinalities)[:-1]]), 0
    for start in range(0, len(test), CHUNK):
        ids = test.ids[start:start + CHUNK]
        for field in range(ids.shape[1]):
            unseen += int((counts[ids[:, field] + offsets[field]] == 0).sum())
    return unseen / test.ids.size if test.ids.size else None


def frequency_curve(dataset: Dataset, split: str = "train", points: int = 200) -> pd.DataFrame:
    """Skew as a curve: at most ``points`` rows, log-spaced over the ranks of the whole vocabulary.

    Columns: ``ids`` (the most frequent so many), ``id_share`` (of the vocabulary), ``occurrence_share`` (held by them),
    ``count`` (occurrences of the last of them).
    """
    n = sum(dataset.cardinalities)
    value, many = _tally(_counts(dataset, split))
    rank = np.unique(np.rint(np.geomspace(1, n, points)).astype(np.int64))
    count = value[np.searchsorted(np.cumsum(many), rank)]
    return pd.DataFrame(dict(ids=rank, id_share=rank / n, occurrence_share=_held(value, many, rank), count=count))


def main(argv=None) -> None:
    from . import open_dataset

    parser = argparse.ArgumentParser(description="Statistics of data sets, one row each, as CSV.")
    parser.add_argument("name", nargs="+", help="names or folders of data sets")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--out", type=Path, help="CSV file to write (default: print)")
    args = parser.parse_args(argv)
    try:
        table = pd.DataFrame([statistics(open_dataset(name), args.split) for name in args.name])
    except DataError as error:
        parser.error(str(error))
    if args.out is None:
        return print(table.to_csv(index=False, float_format="%.6g"), end="")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    table.to_csv(part, index=False, float_format="%.6g")
    part.replace(args.out)
    print(f"wrote {args.out}: {len(table)} data sets", file=sys.stderr)


if __name__ == "__main__":
    main()
