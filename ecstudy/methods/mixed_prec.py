r"""A table of small integers, and a cache in which the rows in use are kept in full precision.

**Idea** (mixed-precision embedding using a cache; Yang et al., arXiv 2010.11305). All rows are integers of ``bits``
bits with a range per row. The few rows that most look-ups ask for also lie in a cache in float32: there they are read
and updated, without rounding. A row that leaves the cache is rounded at random into the table, and so is what a step
writes of rows that are not in it. Which rows these are is found while training. The cache is cut into sets of 32 slots;
an id belongs to one set. With ``policy="lfu"`` an id that was updated more often than the least used row of its set
takes that slot; with ``policy="lru"`` the row of the set that was updated longest ago gives way.

**Stored** $n \times d$ packed integers with low end and step per row in float16; ``cached`` rows in float32; and the
lighter of two maps that single out their ids. **Size** by ``cached``. At dimension 16 and 8 bits 31.25 % are the floor
and 5 % of the rows in the cache make 36.4 % (the authors' three times smaller); ``bits=4`` with 1 % makes 19.9 %.

**Training** one stage, in place. Moments of all rows are float32, and per id there are a place and a number of uses, 8
bytes, in training only: 249 % at 8 bits and 5 %.

**Deviations** A row enters when it is updated, not when it is read, and uses are counted by steps, not by occurrences:
so processes that train together agree, and the first update of a row that enters is not rounded. Uses of ids outside
the cache are counted too, as in FBGEMM's LFU cache. The authors train with row-wise Adagrad, one moment per row; here
it is Adam as everywhere. At deployment the cached rows stay in float32, in the order of their ids, and slots that were
never taken hold the first other ids. ``policy="static"`` (ours) caches the most frequent ids from the start.
"""
from __future__ import annotations

import torch
from torch import nn

from ..maps import marked_ids
from ..method import Method, require_counts
from ..rowwise import RowTable
from ..tables import take

WAYS = 32                               # slots of a set


class CachedTable(RowTable):
    """A :class:`RowTable` of which ``cached`` rows are held in float32 besides.

    While training, ``directory`` says which: place of each id (-1: not cached), owner of each slot, uses of each id.
    """

    def __init__(self, rows, width, bits, cached, policy, directory, bound):
        super().__init__(rows, width, bits)
        self.cached, self.policy, self.sets = 0, policy, max(1, -(-cached // WAYS))
        self.register_buffer("hot", torch.zeros(cached, width))
        if not self.hot.is_meta:
            self.fill(bound)
        self.cached = cached
        self.directory, self.map = (directory,), None            # in a tuple: it belongs to the method's aux

    def place(self, index):
        return self.map.find(index) if self.map is not None else take(self.directory[0].place, index).long()

    def read(self, index):
        rows = super().read(index)
        if not self.cached:
            return rows
        place = self.place(index)[..., None]
        return torch.where(place < 0, rows, take(self.hot, place[..., 0].clamp(min=0)))

    def write(self, index, rows):
        if self.cached and self.policy != "static":
            self.admit(index)
        place = self.place(index) if self.cached else torch.full_like(index, -1)
        hit = place >= 0
        self.hot.index_copy_(0, place[hit], rows[hit])
        super().write(index[~hit], rows[~hit])

    def admit(self, index):
        """Count a use of the distinct ``index [k]`` and let those that are not cached ask for slots."""
        directory = self.directory[0]
        directory.clock += 1
        uses = take(directory.uses, index) + 1 if self.policy == "lfu" else directory.clock.expand(len(index)).int()
        directory.uses.index_copy_(0, index, uses)
        miss = take(directory.place, index) < 0
        index, uses = index[miss], uses[miss]
        if not len(index):
            return
        # the k-th most used id that asks a set meets the set's k-th least used slot
        order = torch.sort(uses, descending=True, stable=True).indices
        order = order[torch.sort(index[order] % self.sets, stable=True).indices]
        index, uses = index[order], uses[order]
        number, own, asking = torch.unique_consecutive(index % self.sets, return_inverse=True, return_counts=True)
        turn = torch.arange(len(index), device=index.device) - take(asking.cumsum(0) - asking, own)
        slots = number[:, None] + self.sets * torch.arange(WAYS, device=index.device)
        owner = take(directory.owner, slots.clamp(max=self.cached - 1))
        rival = torch.where(owner < 0, -1, take(directory.uses, owner.clamp(min=0)))
        rival, least = torch.where(slots < self.cached, rival, 2 ** 31 - 1).sort(dim=1, stable=True)
        at = own * WAYS + turn.clamp(max=WAYS - 1)
        wins = (turn < WAYS) & (uses > take(rival.view(-1), at))
        slot = take(slots.gather(1, least).view(-1), at)[wins]
        index, loser = index[wins], take(directory.owner, slot)
        out = loser >= 0
        if bool(out.any()):
            super().write(loser[out], take(self.hot, slot[out]))
            directory.place.index_fill_(0, loser[out], -1)
        directory.place.index_copy_(0, index, slot.int())
        directory.owner.index_copy_(0, slot, index)

    def settle(self):
        """The cached rows in the order of their ids, and a map instead of the directory."""
        directory, device = self.directory[0], self.hot.device
        with torch.device(device):
            found = marked_ids(self.shape[0], self.cached)
        if not self.hot.is_meta:
            missing = int((directory.owner < 0).sum())           # slots that were never taken
            more = (directory.place < 0).nonzero().view(-1)[:missing]
            ids = torch.cat([directory.owner[directory.owner >= 0], more]).sort().values
            self.hot = self.read(ids)
            found.fill(ids)
        self.map, self.directory = found, ()


class MixedPrec(Method):
    knob = "cached"
    family = "intra-feature"
    aware = "frequency"
    group = "quantisation"
    paper = "arXiv 2010.11305"
    space = r"n (b d / 32 + 1) + k d + \min(k,\ 1.125\,n / 32)"
    time = r"O(d)"
    needs_counts = True

    def __init__(self, fields, dim, cached=None, counts=None, bits=8, policy="lfu"):
        super().__init__(fields, dim)
        self.cached = -(-fields.n // 20) if cached is None else cached
        if not 0 <= self.cached <= fields.n:
            raise ValueError(f"cached={cached}: expected 0 <= cached <= {fields.n} rows")
        if bits not in (2, 4, 8):
            raise ValueError(f"bits={bits}: expected 2, 4 or 8")
        if policy not in ("lfu", "lru", "static"):
            raise ValueError(f"policy={policy!r}: expected 'lfu', 'lru' or 'static'")
        self.aux = nn.Module()
        self.aux.register_buffer("place", torch.full((fields.n,), -1, dtype=torch.int32))
        self.aux.register_buffer("owner", torch.full((self.cached,), -1, dtype=torch.int64))
        self.aux.register_buffer("uses", torch.zeros(fields.n, dtype=torch.int32))
        self.aux.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.table = CachedTable(fields.n, dim, bits, self.cached, policy, self.aux, fields.bound())
        if policy == "static" and (counts := require_counts(counts, fields, self.table.hot.device)) is not None:
            ids = torch.sort(counts, descending=True, stable=True).indices[:self.cached].sort().values
            self.table.hot.copy_(self.table.read(ids))
            self.aux.owner.copy_(ids)
            self.aux.place[ids] = torch.arange(self.cached, dtype=torch.int32)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(0, fields.n + 1)

    def lookup(self, codes):
        return self.table.gather(codes)

    def deploy(self):
        if not self.deployed:
            self.table.settle()
        return super().deploy()
