"""Who gets the parameters: numbers stored per id against its training occurrences (paper, section 5.4, Figure 6)."""
from __future__ import annotations

import numpy as np

from ..method import BLOCK, Method

QUANTILES = (10, 50, 90)                 # per cent


def allocation(emb: Method, counts) -> dict | None:
    """How a deployed method spreads its numbers over ids; None for one that does not tell (``Method.allocation``).

    Parameters
    ----------
    emb: the deployed method.
    counts: training occurrences of each id, int [n], the fields one after the other.

    Returns
    -------
    ``bins``: ids by count, ``low .. high`` occurrences (0, 1, 2-3, 4-7 and so on; empty ones left out): ``ids`` in it,
    ``mean`` numbers per id and the quantiles ``q10 q50 q90`` (the smallest number that at least so many have no more
    than). ``fields``: ``cardinality`` and ``mean`` of each. ``spearman``: rank correlation of numbers with counts over
    all ids, ties at their mean rank; None where all ids have the same. ``ids`` and ``mean`` of all.

    Raises ValueError for a method that is not deployed yet or counts of another length.
    """
    if not emb.deployed:
        raise ValueError("a method that is not deployed: what ids are given shows in what ships; call deploy() first")
    held = emb.allocation()
    if held is None:
        return None
    held = held.cpu().numpy()
    if np.shape(counts) != held.shape:
        raise ValueError(f"counts of shape {np.shape(counts)}: expected [{len(held)}], one count per id")
    wide = int(held.max()) + 1
    values, number = np.unique(counts, return_counts=True)
    ranks = np.cumsum(number) - (number - 1) / 2                              # mean rank of each count, from 1
    edges = 2 ** np.arange(int(values[-1]).bit_length() + 1)                  # bin b holds counts below edges[b]
    # numbers per id are few, so one table of (bin, numbers) holds all that is asked for
    table = np.zeros((len(edges), wide), dtype=np.int64)
    by_rank = np.zeros(wide)                                                  # sum of centred count ranks
    for start in range(0, len(held), BLOCK):
        own, count = held[start:start + BLOCK], np.asarray(counts[start:start + BLOCK])
        bins = np.searchsorted(edges, count, side="right")
        table += np.bincount(bins * wide + own, minlength=table.size).reshape(table.shape)
        centred = ranks[np.searchsorted(values, count)] - (len(held) + 1) / 2
        by_rank += np.bincount(own, centred, wide)
    filled = table.any(1)
    table, low = table[filled], np.append(0, edges)[:-1][filled]
    ids, cumulated = table.sum(1), table.cumsum(1)
    quantiles = {f"q{q}": (cumulated < -(-q * ids // 100)[:, None]).sum(1).tolist() for q in QUANTILES}
    sizes, numbers = np.asarray(emb.fields.sizes), np.arange(wide)
    totals = np.add.reduceat(held, emb.fields.offset.cpu().numpy(), dtype=np.int64)
    return dict(
        ids=len(held), mean=float(held.mean(dtype=np.float64)),
        spearman=_correlation(table.sum(0), by_rank, ranks, number),
        bins=dict(low=low.tolist(), high=np.maximum(2 * low - 1, 0).tolist(), ids=ids.tolist(),
                  mean=(table @ numbers / ids).round(6).tolist(), **quantiles),
        fields=dict(cardinality=sizes.tolist(), mean=(totals / sizes).round(6).tolist()))


def _correlation(ids, by_rank, ranks, number) -> float | None:
    """Pearson's correlation of ranks, from ids per number, count ranks summed per number, and the counts' ranks."""
    middle = (ids.sum() + 1) / 2
    own = np.cumsum(ids) - (ids - 1) / 2 - middle
    spread = np.sqrt((ids * own ** 2).sum()) * np.sqrt((number * (ranks - middle) ** 2).sum())
    return float((own * by_rank).sum() / spread) if spread else None
