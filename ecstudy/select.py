"""Exact selection by magnitude over a table too large to sort: a radix select on float bits, block by block.

The bits of a non-negative float32 are ordered like its value, so two histograms (upper 16 bits, then the lower 16
within one bin) give the k-th largest magnitude exactly, in two passes with a fixed block as working memory.
The paper's code bisects on [0, 100] instead, up to 100 passes with a tolerance (Prune.py).
"""
from __future__ import annotations

from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 18                        # a megabyte of floats: stays in cache between the operations on it


def _blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = weight.detach().view(-1)
    for start in range(0, flat.numel(), BLOCK):
        yield start, flat[start:start + BLOCK]


def _bits(block: Tensor) -> Tensor:
    return block.abs().view(torch.int32)                     # abs clears the sign bit: bits >= 0, ordered like |w|


def _pick(histogram: Tensor, k: int) -> tuple[int, int]:
    """Bin that holds the k-th largest, and its rank within that bin (1-based from the top)."""
    above = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(above, torch.tensor(k, device=above.device)))
    return len(histogram) - 1 - index, k - (int(above[index - 1]) if index else 0)


def kth_magnitude(weight: Tensor, k: int) -> float:
    """The k-th largest ``|w|`` of a float32 tensor, exactly (1 <= k <= numel)."""
    if weight.dtype != torch.float32:
        raise TypeError(f"weight of type {weight.dtype}: expected float32")
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k={k}: expected 1 <= k <= {weight.numel()} values")
    return kth_of(lambda: (block for _, block in _blocks(weight)), k, weight.device)[0]


def kth_of(blocks: Callable[[], Iterable[Tensor]], k: int, device="cpu") -> tuple[float, int]:
    """The k-th largest ``|w|`` of flat float32 blocks, which ``blocks()`` gives twice, and its rank among equals.

    Of values equal to it, as many as the rank (1 or more) are among the k largest.
    """
    upper = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for block in blocks():
        upper += torch.bincount(_bits(block) >> 16, minlength=1 << 16)
    bin_, k = _pick(upper, k)
    lower = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for block in blocks():
        bits = _bits(block)
        inside = bits[bits >> 16 == bin_] & 0xFFFF
        if len(inside):
            lower += torch.bincount(inside, minlength=1 << 16)
    value, rank = _pick(lower, k)
    return torch.tensor((bin_ << 16) | value, dtype=torch.int32).view(torch.float32).item(), rank


def among(size: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """Which of a block of magnitudes ``size [k]`` are among the largest, given what :func:`kth_of` found, bool [k].

    Blocks come in order, and of values equal to the threshold the first win: also the ``ties`` left for later blocks.
    """
    keep = size > threshold
    equal = (size == threshold).nonzero().view(-1)[:ties]
    keep[equal] = True
    return keep, ties - len(equal)


def largest(weight: Tensor, k: int) -> Tensor:
    """Sorted flat positions [k] of exactly the k largest magnitudes; among equals the first ones win."""
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=weight.device)
    threshold = kth_magnitude(weight, k)
    over, ties = [], []
    for start, block in _blocks(weight):
        size = block.abs()
        over.append((size > threshold).nonzero().view(-1) + start)
        ties.append((size == threshold).nonzero().view(-1) + start)
        if len(ties) > 1 and sum(map(len, ties)) >= k:       # enough equals: an all-zero table stays bounded
            ties = [torch.cat(ties)[:k]]
    over = torch.cat(over)
    return torch.cat([over, torch.cat(ties)[:k - len(over)]]).sort().values


def prune_(weight: Tensor, k: int) -> float:
    """Zero in place all but the k largest magnitudes, of equals the last ones first; returns the threshold."""
    if k == 0:
        weight.detach().zero_()
        return float("inf")
    if k >= weight.numel():
        return 0.0
    threshold, more = kth_magnitude(weight, k), -k
    for _, block in _blocks(weight):
        block.masked_fill_(block.abs() < threshold, 0)
        more += int(block.count_nonzero())
    for _, block in reversed(list(_blocks(weight))):
        if more <= 0:
            break
        equal = (block.abs() == threshold).nonzero().view(-1)[-more:]
        block[equal] = 0
        more -= len(equal)
    return threshold
