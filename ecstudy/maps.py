"""Maps that single out some of ``n`` ids: the place of a marked id among the marked ones, in id order.

Two forms, and :func:`marked_ids` takes the lighter one for the given numbers (weighed on ``meta`` builds).
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from .memory import memory
from .sparse import Bits, smallest_int
from .tables import take


class Marked(nn.Module):
    def locate(self, ids) -> tuple:
        """How many marked ids stand before each of ``ids``, and whether it is marked itself."""
        raise NotImplementedError

    def find(self, ids):
        """Place of each id among the marked ones, -1 for the others."""
        place, marked = self.locate(ids)
        return torch.where(marked, place, -1)

    def marked(self, n: int, block: int = 1 << 20):
        """Which of the ids 0 .. n - 1 are marked, bool [n]."""
        device = next(self.buffers()).device
        parts = (torch.arange(start, min(start + block, n), device=device) for start in range(0, n, block))
        return torch.cat([self.locate(ids)[1] for ids in parts])


class SortedIds(Marked):
    """``top`` sorted ids, found by binary search."""

    def __init__(self, n: int, top: int, device=None):
        super().__init__()
        self.register_buffer("ids", torch.zeros(top, dtype=smallest_int(n - 1), device=device))

    def fill(self, ids):
        self.ids.copy_(ids)

    def locate(self, ids):
        if not len(self.ids):
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        place = torch.searchsorted(self.ids, ids.to(self.ids.dtype))
        return place, take(self.ids, place.clamp(max=len(self.ids) - 1)) == ids


class MarkedIds(Marked):
    """One bit per id, and the number of marked ids before every 64 of them."""

    def __init__(self, n: int, top: int, device=None):
        super().__init__()
        self.bits = Bits(n, device)

    def fill(self, ids):
        self.bits.fill(ids)

    def locate(self, ids):
        place, marked = self.bits.locate(ids.reshape(-1))
        return place.view(ids.shape), marked.view(ids.shape)


def marked_ids(n: int, top: int) -> nn.Module:
    """The lighter map for ``top`` marked ids of ``n``; ``fill(sorted ids)``, then ``find(ids)`` -> place or -1."""
    form = min((SortedIds, MarkedIds), key=lambda f: memory(f(n, top, "meta")))
    return form(n, top)


def most_of_fields(counts: Tensor, sizes: Sequence[int], own: Sequence[int]) -> Tensor:
    """Sorted ids of the ``own[f]`` largest ``counts [n]`` in every field of ``sizes[f]`` ids; ties to the lower id."""
    parts, first = [], 0
    for part, number, size in zip(counts.split(list(sizes)), own, sizes):
        if number < size:
            least = part.kthvalue(size - number + 1).values if number else part.max() + 1
            over = (part > least).nonzero().view(-1)
            ties = (part == least).nonzero().view(-1)[:number - len(over)]
            chosen = torch.cat([over, ties]).sort().values
        else:
            chosen = torch.arange(size, device=counts.device)
        parts.append(chosen + first)
        first += size
    return torch.cat(parts)
