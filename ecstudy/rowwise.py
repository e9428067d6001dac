"""Rows of integers of a few bits, every row with a range of its own: row-wise int8, int4 and int2 as practitioners
store them (FBGEMM, PyTorch). A row of ``width`` codes of ``b`` bits takes ``ceil(width b / 8)`` bytes, and 4 more for
its low end and its step in float16.

The greedy search for ranges is that of Guan et al. (arXiv 1911.02079), with the constants of PyTorch's operator.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .packed import Codes, pack
from .tables import Decoded, Holder, stochastic_round, take

BINS, RATIO = 200, 0.16                 # steps the whole range is cut into, and the share of them that may be given up
CELLS = 1 << 16                         # numbers that are searched together: they stay in cache
GROUP = 64                              # values of an array with a range in common
_MOST = 65504.0                         # largest float16


def stored(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Low end and step of the range from ``low`` to ``high`` with codes 0 .. ``top``, rounded to float16."""
    low = low.clamp(-_MOST, _MOST).half().float()
    return low, ((high - low) / top).clamp(0, _MOST).half().float()


def _codes(x: Tensor, low: Tensor, step: Tensor, top: int, rounding=torch.Tensor.round_) -> Tensor:
    return rounding((x - low).div_(step.clamp(min=2 ** -30))).clamp_(0, top)      # a step of zero: all are the low end


def least_to_largest(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Low end and step ``[m, 1]`` of the ranges from the least to the largest value of each row of ``x [m, width]``."""
    return stored(x.amin(1, keepdim=True), x.amax(1, keepdim=True), top)


def greedy(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Low end and step ``[m, 1]`` of the range found for each row of ``x [m, width]``.

    The range begins as the whole one and loses a step at one end after the other, always at the end where that errs
    less, until a share of ``RATIO`` is given up. Of the local minima on the way the best is taken.
    """
    parts = [_greedy(part.T.contiguous(), top) for part in x.split(max(1, CELLS // x.shape[1]))]
    return tuple(torch.cat(end, 1).T for end in zip(*parts))


def _greedy(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The search for the columns of ``x [width, m]``: rows lie side by side, so that all are worked on at once."""
    def error(low, high):
        bottom, step = stored(low, high, top)
        return _codes(x, bottom, step, top).mul_(step).add_(bottom).sub_(x).square_().sum(0, keepdim=True)

    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    best_low, best_high, best = low, high, error(low, high)
    step, now, least = (high - low) / BINS, best, int(BINS * (1 - RATIO))
    while bool((wide := low + least * step < high).any()):
        raised, lowered = error(low + step, high), error(low, high - step)
        found = wide & (now < raised) & (now < lowered) & (now < best)
        best_low, best_high = torch.where(found, low, best_low), torch.where(found, high, best_high)
        best, left = torch.where(found, now, best), raised < lowered
        low, high = torch.where(wide & left, low + step, low), torch.where(wide & ~left, high - step, high)
        now = torch.where(left, raised, lowered)
    return stored(best_low, best_high, top)


SEARCHES = {"greedy": greedy, "minmax": least_to_largest}


class RowTable(Decoded):
    """``rows x width`` codes of ``bits`` bits, packed, and low end and step of every row in float16.

    Vectors that are put are rounded to the nearest codes of the range that ``search`` finds. What a step writes is
    rounded at random, within a range that holds all of the row, so that the mean of what is stored is what was meant.
    """

    def __init__(self, rows: int, width: int, bits: int, *, search: str = "greedy", bound: float = 0.0, device=None):
        super().__init__()
        if search not in SEARCHES:
            raise ValueError(f"search={search!r}: expected {' or '.join(map(repr, SEARCHES))}")
        self.shape, self.bits, self.top, self.search = (rows, width), bits, 2 ** bits - 1, search
        self.codes = Codes(rows, width, bits, device)
        self.register_buffer("range", torch.zeros(rows, 2, dtype=torch.float16, device=device))
        if bound and not self.range.is_meta:
            self.fill(bound)

    def read(self, index):
        low, step = take(self.range, index).float().unbind(-1)
        return self.codes.read(index).float().mul_(step[..., None]).add_(low[..., None])

    def write(self, index, rows):
        if not len(index):
            return
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        # widened by what rounding to float16 may take away
        low = (low - low.abs() * 2 ** -10 - 2 ** -24).clamp(-_MOST, _MOST).half().float()
        step = ((high - low) / self.top * (1 + 2 ** -10) + 2 ** -24).clamp(0, _MOST).half().float()
        self.range.index_copy_(0, index, torch.cat([low, step], 1).half())
        self.codes.write_rows(index, pack(_codes(rows, low, step, self.top, stochastic_round), self.bits))

    def put(self, start, rows):
        rows = rows.to(self.range.device)
        low, step = SEARCHES[self.search](rows, self.top)
        self.range[start:start + len(rows)] = torch.cat([low, step], 1).half()
        self.codes.write(start, pack(_codes(rows, low, step, self.top), self.bits))


class PackedArray(Holder):
    """A quantised :class:`FloatArray` for serving: codes of ``bits`` bits (a divisor of 8), and a range for every 64
    values that follow one another."""

    def __init__(self, length: int, bits: int, *, device=None):
        super().__init__()
        self.shape, self.bits = (length,), bits
        self.groups = RowTable(-(-length // GROUP), GROUP, bits, device=device)

    def encode(self, weight: Tensor, block: int = 1 << 12) -> None:
        rows = self.groups.shape[0]
        for start in range(0, rows, block):
            part = weight[start * GROUP:(start + block) * GROUP]
            missing = -len(part) % GROUP
            if missing:                              # the end of the last group, which should not widen its range
                part = torch.cat([part, part[-1:].expand(missing)])
            self.groups.put(start, part.view(-1, GROUP))

    def gather(self, index):
        bit = index * self.bits
        code = take(self.groups.codes.bytes, bit >> 3) >> (bit & 7).to(torch.uint8) & self.groups.top
        low, step = take(self.groups.range, index // GROUP).float().unbind(-1)
        return code.float().mul_(step).add_(low)

    def blocks(self, start, length):
        return self.gather(start[..., None] + torch.arange(length, device=start.device))
