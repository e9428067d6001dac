"""A bounded map for ids that are not known beforehand: whoever arrives gets a row, of the least useful if need be."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor, nn

from ..tables import take

WAYS = 16                                # entries of a bucket
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)    # the golden ratio in 64 bits, as a signed number


class IdMap(nn.Module):
    """Ids (int64, from 0) to rows ``0 .. rows - 1``; ``rows`` stands for an id that is not in the map.

    The hash of an id names a bucket of 16 entries. A newcomer takes an empty entry of its bucket, else the one of
    lowest utility there: as in a set-associative cache, the least useful of all ids is met only approximately, and a
    look-up reads one bucket. Capacities are rounded up to whole buckets.
    """

    def __init__(self, capacity: int):
        super().__init__()
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: expected room for at least one id")
        self.buckets = -(-capacity // WAYS)
        self.rows = self.buckets * WAYS
        self.register_buffer("key", torch.full((self.rows,), -1, dtype=torch.int64))

    def entries(self, ids: Tensor) -> Tensor:
        """Rows ``[..., 16]`` where each of ``ids [...]`` may stand."""
        bucket = (ids * _ODD >> 32 & 0x7FFFFFFF) % self.buckets
        return bucket[..., None] * WAYS + torch.arange(WAYS, device=ids.device)

    def find(self, ids: Tensor) -> Tensor:
        """Row of each of ``ids [...]``."""
        entries = self.entries(ids)
        same = take(self.key, entries) == ids[..., None]
        place = entries.gather(-1, same.byte().argmax(-1, keepdim=True)).squeeze(-1)
        return torch.where(same.any(-1), place, self.rows)

    def admit(self, ids: Tensor, utility: Callable[[Tensor], Tensor], busy: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of distinct ``ids [m]``, those of newcomers among them, and the rows that newcomers took.

        ``utility`` gives that of rows ``[..., 16]``. No row of ``busy [...]`` or of ``ids`` is taken; an id whose
        bucket has no other row is not admitted and gets ``rows``.
        """
        place = self.find(ids)
        new = (place == self.rows).nonzero().view(-1)
        if not len(new):
            return place, new
        entries = self.entries(ids[new])
        bucket, order = entries[:, 0].sort(stable=True)
        # the r-th newcomer of a bucket takes its r-th entry: empty ones first, then by utility, never a busy one
        rank = torch.arange(len(new), device=ids.device) - torch.searchsorted(bucket, bucket)
        fits = rank < WAYS
        new, entries, rank = new[order][fits], entries[order][fits], rank[fits]
        score = utility(entries).float().masked_fill(take(self.key, entries) < 0, -1)
        score = score.masked_fill(torch.isin(entries, torch.cat([place, busy])), torch.inf)
        score, by = score.sort(dim=1, stable=True)
        free = score.gather(1, rank[:, None]).view(-1) < torch.inf
        taken = entries.gather(1, by.gather(1, rank[:, None])).view(-1)[free]
        self.key[taken] = ids[new[free]]
        place[new[free]] = taken
        return place, taken
