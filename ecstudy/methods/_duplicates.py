"""Near-duplicate blocks of a table: which blocks of consecutive rows may be stored once, found by L2 hashing.

Blocks are visited in a fixed order; a later block may be replaced by an earlier one. A round hashes every block that
is left by random projections, takes for each the nearest of those it met in a bucket, and compares the two element by
element. Rounds follow with wider thresholds until exactly the wanted number of blocks is left.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tables import take

ELEMENTS = 1 << 21                        # numbers of blocks worked on at a time
PER_LEVEL = 4                             # rounds with the same thresholds, at most


class Blocks:
    """A table ``[n, D]`` as blocks of ``rows`` rows, the last one filled up with zeros; nothing is copied."""

    def __init__(self, table: Tensor, rows: int):
        whole = len(table) // rows
        self.whole = table[:whole * rows].view(whole, -1)
        self.width, self.count = self.whole.shape[1], -(-len(table) // rows)
        if self.count > whole:
            self.last = table.new_zeros(self.width)
            self.last[:table[whole * rows:].numel()] = table[whole * rows:].reshape(-1)

    def take(self, number: Tensor) -> Tensor:
        """Blocks ``number [k]`` -> ``[k, width]``."""
        out = self.whole.index_select(0, number.clamp(max=len(self.whole) - 1))
        if self.count > len(self.whole):
            out[number == len(self.whole)] = self.last
        return out

    def parts(self, number: Tensor) -> tuple[Tensor, ...]:
        """``number`` cut so that the blocks of a part fit into a cache."""
        return number.split(max(1, ELEMENTS // self.width))


def distinct(blocks: Blocks, kept: int, similarity: float, bands: int = 90, join: int = 3) -> tuple[Tensor, Tensor]:
    """The blocks that are kept, sorted ``[kept]``, and for every block the place of its representative among them.

    Parameters
    ----------
    similarity:
        Share of the elements of two blocks that must be nearly equal.
    bands, join:
        Random projections, and how many of them make one key.
    """
    device, every = blocks.whole.device, torch.arange(blocks.count, device=blocks.whole.device)
    generator = torch.Generator().manual_seed(0)          # of its own: the same table always gives the same blocks
    direction = torch.randn(blocks.width, bands, generator=generator).to(device)
    mix = (torch.randint(1 << 62, (bands,), generator=generator) | 1).to(device)
    level, sketch, square = [], [], 0.0
    quartile = max(1, math.ceil(0.75 * blocks.width))
    for part in blocks.parts(every):
        part = blocks.take(part)
        level.append(part.kthvalue(quartile, 1).values)
        sketch.append(part @ direction)
        square += float(part.square().sum(dtype=torch.float64))
    if not math.isfinite(square):
        raise ValueError("the table holds NaN or infinity: expected finite vectors; lower the learning rate")
    order = torch.sort(torch.cat(level), stable=True).indices          # from here on a block is its place in this order
    sketch = torch.cat(sketch)[order]
    near = max(math.sqrt(square / blocks.count / blocks.width), 1e-12) / 64
    target, alive = every.clone(), every
    while len(alive) > kept:
        for _ in range(PER_LEVEL):
            late, early, share, distance = _pairs(blocks, order, sketch, alive, mix, near, similarity, join, generator)
            best = torch.sort(distance, stable=True).indices           # most similar first, then the nearest
            best = best[torch.sort(share[best], descending=True, stable=True).indices][:len(alive) - kept]
            target[late[best]] = early[best]
            before, alive = len(alive), alive[target[alive] == alive]
            if len(alive) <= kept or before - len(alive) < before / 50:
                break
        near *= 1.5
    target = _roots(target)
    chosen = order[alive].sort().values
    place = torch.empty_like(every)
    place[order] = torch.searchsorted(chosen, order[target])
    return chosen, place


def _roots(target: Tensor) -> Tensor:
    """Follow every chain of replacements to its end."""
    while True:
        further = target[target]
        if torch.equal(further, target):
            return target
        target = further


def _pairs(blocks, order, sketch, alive, mix, near, similarity, join, generator):
    """Replacements of this round: later blocks, earlier ones that stay, their similarity and estimated distance."""
    reach = near * math.sqrt(blocks.width)                # two blocks that differ by `near` everywhere are so far apart
    own = take(sketch, alive)
    estimate = own[:, ::3].contiguous()                   # enough to tell the nearest
    shift = torch.rand(own.shape[1], generator=generator).to(own.device)
    code = torch.ceil(own / reach + shift).clamp_(-2 ** 31, 2 ** 31).long() * mix
    closest = torch.full((len(alive),), math.inf, device=own.device)
    found = torch.zeros_like(alive)
    for key in code.unflatten(1, (-1, join)).sum(2).T:
        key, member = torch.sort(key, stable=True)        # stable: in a bucket, blocks stand in the order of visits
        opens = torch.ones_like(key, dtype=torch.bool)
        opens[1:] = key[1:] != key[:-1]
        place = torch.arange(len(key), device=key.device)
        first = torch.cummax(torch.where(opens, place, 0), 0).values
        # the earliest of the bucket, and the one just before where that is another
        for rival, meets in ((first, ~opens), (place - 1, first < place - 1)):
            late, early = member[meets], member[rival[meets]]
            distance = (take(estimate, late) - take(estimate, early)).square_().mean(1)
            better = distance < take(closest, late)
            late = late[better]
            closest.index_copy_(0, late, distance[better])
            found.index_copy_(0, late, early[better])
    late = torch.isfinite(closest).nonzero().view(-1)
    early = found[late]
    share = _share(blocks, order, alive[late], alive[early], near)
    same = share >= similarity
    root = torch.arange(len(alive), device=own.device)
    root[late[same]] = early[same]
    root = _roots(root)[late]                             # the end of a chain must itself be similar
    moved = same & (root != early)
    share[moved] = _share(blocks, order, alive[late[moved]], alive[root[moved]], near)
    same &= share >= similarity
    return alive[late[same]], alive[root[same]], share[same], closest[late[same]]


def _share(blocks: Blocks, order: Tensor, first: Tensor, second: Tensor, near: float) -> Tensor:
    """Share of the elements of two blocks that differ by at most ``near``, for pairs ``[k]``."""
    pairs = zip(blocks.parts(order[first]), blocks.parts(order[second]))
    shares = [((blocks.take(a) - blocks.take(b)).abs_() <= near).float().mean(1) for a, b in pairs]
    return torch.cat(shares) if len(first) else first.float()
