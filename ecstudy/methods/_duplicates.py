"""Near-duplicate blocks of a table: which blocks of consecutive rows may be stored once, found by L2 hashing.

Blocks are visited in a fixed order; a later block may be replaced by an earlier one. A round hashes every block that
is left by random projections, takes for each the nearest of those it met in a bucket, and compares the two element by
element. Rounds follow with wider thresholds until exactly the wanted number of blocks is left.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..tables import as_rows, take

BANDS, JOIN = 90, 3                       # random projections, and how many of them make a key
SAMPLE = 512                              # elements of a block that are looked at before all are
ELEMENTS = 1 << 21                        # numbers of blocks worked on at a time
PER_LEVEL = 4                             # rounds with the same thresholds, at most


class Blocks:
    """A table ``[n, D]`` as blocks of ``rows`` rows, the last one filled up with zeros; nothing is copied.

    The table is a tensor, an array or a memory map, of which only blocks that are asked for are read.
    """

    def __init__(self, table, rows: int):
        whole, self.device = len(table) // rows, table.device if isinstance(table, Tensor) else torch.device("cpu")
        self.whole = table[:whole * rows].reshape(whole, -1)
        self.width, self.count = self.whole.shape[1], -(-len(table) // rows)
        if self.count > whole:
            rest = as_rows(table, whole * rows, rows).reshape(-1)
            self.last = rest.new_zeros(self.width)
            self.last[:len(rest)] = rest

    def take(self, number: Tensor) -> Tensor:
        """Blocks ``number [k]`` -> ``[k, width]``."""
        place = number.clamp(max=len(self.whole) - 1)
        if isinstance(self.whole, Tensor):
            out = self.whole.index_select(0, place).float()
        else:
            out = torch.from_numpy(np.asarray(self.whole[place.numpy()], np.float32))
        if self.count > len(self.whole):
            out[number == len(self.whole)] = self.last
        return out

    def parts(self, number: Tensor) -> tuple[Tensor, ...]:
        """``number`` cut so that the blocks of a part fit into a cache."""
        return number.split(max(1, ELEMENTS // self.width))


class Visits:
    """What is known of every block, in the order in which blocks are visited: by ascending 75th percentile.

    Attributes
    ----------
    order: Tensor
        Number of each block [N].
    sketch, sample: Tensor
        Its random projections ``[N, bands]``, and some of its elements.
    rms: float
        Root mean square of all elements.
    """

    def __init__(self, blocks: Blocks):
        device = blocks.device
        self.blocks, every = blocks, torch.arange(blocks.count, device=device)
        # a generator of its own: the same table always gives the same blocks
        self.generator = torch.Generator().manual_seed(0)
        direction = torch.randn(blocks.width, BANDS, generator=self.generator).to(device)
        self.mix = (torch.randint(1 << 62, (BANDS,), generator=self.generator) | 1).to(device)
        column = torch.randperm(blocks.width, generator=self.generator)[:SAMPLE].sort().values.to(device)
        sketch = torch.empty(blocks.count, BANDS, device=device)
        sample, square = torch.empty(blocks.count, len(column), device=device), 0.0
        for part in blocks.parts(every):
            block = blocks.take(part)
            sketch[part], sample[part] = block @ direction, block.index_select(1, column)
            square += float(block.square().sum(dtype=torch.float64))
        if not math.isfinite(square):
            raise ValueError("the table holds NaN or infinity: expected finite vectors; lower the learning rate")
        self.rms = math.sqrt(square / blocks.count / blocks.width)
        quartile = sample.kthvalue(math.ceil(0.75 * len(column)), 1).values
        self.order = torch.sort(quartile, stable=True).indices
        self.sketch, self.sample = sketch[self.order], sample[self.order]

    def likely(self, alive: Tensor, near: float) -> tuple[Tensor, Tensor, Tensor]:
        """For each of ``alive`` that meets earlier ones in a bucket, the nearest: (later, earlier, distance)."""
        own, device = take(self.sketch, alive), alive.device
        estimate = own[:, ::JOIN].contiguous()            # enough to tell the nearest
        reach = near * math.sqrt(self.blocks.width)       # blocks that differ by `near` everywhere are so far apart
        shift = torch.rand(BANDS, generator=self.generator).to(device)
        code = torch.ceil(own / reach + shift).clamp_(-2 ** 31, 2 ** 31).long() * self.mix
        closest, found = torch.full((len(alive),), math.inf, device=device), torch.zeros_like(alive)
        place = torch.arange(len(alive), device=device)
        for key in code.unflatten(1, (-1, JOIN)).sum(2).T:
            key, member = torch.sort(key, stable=True)    # stable: in a bucket, blocks stand in the order of visits
            opens = torch.ones_like(key, dtype=torch.bool)
            opens[1:] = key[1:] != key[:-1]
            first = torch.cummax(torch.where(opens, place, 0), 0).values
            # the earliest of the bucket, and the one just before where that is another
            for rival, meets in ((first, ~opens), (place - 1, first < place - 1)):
                late, early = member[meets], member[rival[meets]]
                distance = (take(estimate, late) - take(estimate, early)).square_().mean(1)
                better = distance < take(closest, late)
                closest.index_copy_(0, late[better], distance[better])
                found.index_copy_(0, late[better], early[better])
        late = torch.isfinite(closest).nonzero().view(-1)
        return late, found[late], closest[late]

    def share(self, late: Tensor, early: Tensor, near: float, least: float) -> Tensor:
        """Share of elements of two blocks that differ by at most ``near``; 0 where it is clearly below ``least``."""
        share, pair = torch.zeros(len(late), device=late.device), torch.arange(len(late), device=late.device)
        for part in pair.split(ELEMENTS // SAMPLE):
            share[part] = _equal(take(self.sample, late[part]), take(self.sample, early[part]), near)
        if self.blocks.width > SAMPLE:                    # what the sample cannot exclude is compared in full
            pair = (share >= least - 2 / math.sqrt(SAMPLE)).nonzero().view(-1)
            share.zero_()
            for part in self.blocks.parts(pair):
                a, b = (self.blocks.take(self.order[block[part]]) for block in (late, early))
                share[part] = _equal(a, b, near)
        return share

    def similar(self, alive: Tensor, near: float, least: float) -> tuple[Tensor, Tensor]:
        """Blocks that may be replaced in this round and the earlier ones that stay, most similar first."""
        late, early, distance = self.likely(alive, near)
        share = self.share(alive[late], alive[early], near, least)
        same = share >= least
        root = torch.arange(len(alive), device=alive.device)
        root[late[same]] = early[same]
        root = _ends(root)[late]                          # the end of a chain must itself be similar
        moved = same & (root != early)
        share[moved] = self.share(alive[late[moved]], alive[root[moved]], near, least)
        same &= share >= least
        best = torch.sort(distance[same], stable=True).indices             # of equal shares the nearest first
        best = best[torch.sort(share[same][best], descending=True, stable=True).indices]
        return alive[late[same]][best], alive[root[same]][best]


def distinct(blocks: Blocks, kept: int, similarity: float) -> tuple[Tensor, Tensor]:
    """The blocks that are kept, sorted ``[kept]``, and for every block the place of its representative among them.

    ``similarity`` is the share of the elements of two blocks that must be nearly equal.
    """
    visits = Visits(blocks)
    alive = torch.arange(blocks.count, device=blocks.device)
    target, near = alive.clone(), max(visits.rms, 1e-12) / 32
    while len(alive) > kept:
        begun = len(alive)
        for _ in range(PER_LEVEL):
            late, early = visits.similar(alive, near, similarity)
            wanted = len(alive) - kept
            target[late[:wanted]] = early[:wanted]
            before, alive = len(alive), alive[target[alive] == alive]
            if len(alive) == kept or before - len(alive) < before / 50:
                break
        near *= 1.5 if len(alive) < begun else 2.0
    chosen = visits.order[alive].sort().values
    place = torch.empty_like(target)
    place[visits.order] = torch.searchsorted(chosen, visits.order[_ends(target)])
    return chosen, place


def _equal(a: Tensor, b: Tensor, near: float) -> Tensor:
    return (a.sub_(b).abs_() <= near).float().mean(1)


def _ends(target: Tensor) -> Tensor:
    """Follow every chain of replacements to its end."""
    while True:
        further = target[target]
        if torch.equal(further, target):
            return target
        target = further
