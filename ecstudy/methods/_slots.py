"""What in-training pruning shares: vectors cut into chunks that are virtually hashed and physically indexed.

:class:`Slots` trains: a physical table at the size of the budget, an address map from every chunk to its slot, and the
utilities that decide who owns one. :class:`ChunkTable` ships: the surviving chunks and an index that finds them.
:class:`InTraining` is the method around both.
"""
from __future__ import annotations

import functools
import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory import memory
from ..method import Method
from ..select import largest
from ..sparse import Bits, popcount, smallest_int, windows
from ..tables import FloatTable, Holder, as_rows, coalesce, take
from ._ids import IdMap

BLOCK = 1 << 18                          # rows that a round looks at together
INTERVAL = 1000                          # steps between rounds (ITEP: 1,001)
WARMUP = ((10, 3), (100, 30), (1000, 300))      # until step 10 a round every 3 steps, and so on (ITEP)
DOUBLINGS = 40                           # utilities are brought back to their own unit before it grew 2 ** 40 times
MOST = 1 << 31                           # slots that a budget is looked for among


def dithered(x: Tensor, step: Tensor) -> Tensor:
    """``x >= 0`` in bfloat16, up or down in proportion to the distance, so that small gains add up on average.

    The dither is a sequence over places and steps: no random numbers are drawn, so no other stream is disturbed.
    """
    place = torch.arange(x.numel(), device=x.device).view(x.shape)
    noise = (place * 40503 + step * 25173) & 0xFFFF
    return ((x.view(torch.int32) + noise.int()) & ~0xFFFF).view(torch.float32).bfloat16()


class Slots(Holder):
    """``slots`` chunks of ``width`` numbers, owned by some of the ``k`` chunks of ``rows`` virtual rows.

    ``weight [slots + 1, width]``: slot 0 is what a pruned chunk reads, zeros that are never updated.
    ``address [rows, k]``: the slot of each chunk, 0 for none. ``free[:top]``: a stack of the slots nobody owns.
    ``utility [rows, k]``: of every chunk, pruned or not, in units of ``gamma ** -clock``: what was seen ``t`` steps
    ago counts ``gamma ** t`` without a visit, because what is seen later is added in larger numbers.

    Gradients are taken at the assembled vectors. :meth:`touched` hands them to :meth:`observe` once, and gives those
    of live chunks to the optimiser, by slot.
    """

    def __init__(self, rows: int, k: int, width: int, slots: int, bound: float, kind: str, gamma: float):
        super().__init__()
        self.rows, self.k, self.width, self.slots, self.kind, self.gamma = rows, k, width, slots, kind, gamma
        self.shape = (slots + 1, width)
        self.patience = math.inf if gamma == 1 else max(1, int(DOUBLINGS * math.log(2) / -math.log(gamma)))
        number = torch.int32 if slots < 2 ** 31 - 1 else torch.int64
        self.register_buffer("weight", torch.empty(slots + 1, width))
        self.register_buffer("address", torch.zeros(rows, k, dtype=number))
        self.register_buffer("utility", torch.zeros(rows, k, dtype=torch.bfloat16))
        self.register_buffer("free", torch.zeros(slots, dtype=number))
        self.register_buffer("top", torch.zeros((), dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.age = 0                                 # the clock without asking the device; 0 after loading is safe
        self._leaves: list[tuple[Tensor, Tensor, Tensor]] = []
        self._touched = None
        if not self.weight.is_meta:
            self.weight[0] = 0
            nn.init.uniform_(self.weight[1:], -bound, bound)

    # --- training -------------------------------------------------------------------------------------------------

    def gather(self, index):
        if not (self.training and torch.is_grad_enabled()):
            return self.assembled(index)
        rows, inverse, count = torch.unique(index, return_inverse=True, return_counts=True)
        vectors = self.assembled(rows).requires_grad_()
        self._leaves.append((rows, count, vectors))
        return F.embedding(inverse, vectors)

    def assembled(self, rows: Tensor) -> Tensor:
        """Vectors ``[..., k * width]`` of ``rows [...]``, with zeros for pruned chunks."""
        return take(self.weight, take(self.address, rows)).flatten(-2)

    def touched(self):
        if self._touched is None:
            parts = [(rows, count, vectors.grad) for rows, count, vectors in self._leaves if vectors.grad is not None]
            if not parts:
                return None
            rows, count, grad = parts[0]
            if len(parts) > 1:
                rows, count, grad = (torch.cat(same) for same in zip(*parts))
                (_, count), (rows, grad) = coalesce(rows, count), coalesce(rows, grad)
            self.observe(rows, count, grad)
            slot = take(self.address, rows).view(-1)
            live = slot.nonzero().view(-1)
            self._touched = slot[live].long(), grad.view(-1, self.width).index_select(0, live)
        return self._touched

    def leaves(self):
        return [vectors for _, _, vectors in self._leaves]

    def pending(self) -> Tensor:
        """Rows looked up since :meth:`forget`."""
        return torch.cat([self.top.new_zeros(0), *(rows for rows, _, _ in self._leaves)])

    def forget(self):
        self._leaves.clear()
        self._touched = None

    def read(self, index):
        return self.weight.index_select(0, index)

    def write(self, index, rows):
        self.weight.index_copy_(0, index, rows)

    # --- utilities ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, rows: Tensor, count: Tensor, grad: Tensor) -> None:
        """One step: distinct ``rows [u]`` were looked up ``count [u]`` times, and ``grad [u, k * width]`` is the
        gradient of their assembled vectors, live or not."""
        size = grad.view(len(rows), self.k, self.width).norm(dim=2)
        count = count[:, None].float()
        gain = size * count if self.kind == "product" else size if self.kind == "gradient" else count.expand_as(size)
        self.clock += 1
        self.age += 1
        total = take(self.utility, rows).float() + gain * (self.gamma ** -self.clock.double()).float()
        self.utility.index_copy_(0, rows, dithered(total, self.clock))
        if self.age >= self.patience:
            self.rebase()

    def rebase(self) -> None:
        """Utilities in their own unit again, block by block."""
        factor = self.gamma ** int(self.clock)
        for start in range(0, self.rows, BLOCK):
            self.utility[start:start + BLOCK] *= factor
        self.clock.zero_()
        self.age = 0

    # --- who owns a slot ------------------------------------------------------------------------------------------

    def spread(self, rows: int) -> None:
        """The first owners: all chunks of as many of ``rows`` rows as fit, evenly spaced. The rest stays free."""
        fit = self.slots // self.k
        row = torch.arange(fit, device=self.address.device) * rows // max(1, fit)
        slot = torch.arange(1, fit * self.k + 1, dtype=self.address.dtype, device=row.device)
        self.address.index_copy_(0, row, slot.view(-1, self.k))
        self.push(torch.arange(fit * self.k + 1, self.slots + 1, device=row.device))

    def own(self, chunks: Tensor) -> None:
        """Let exactly these flat chunks [m] own the slots 1 .. m."""
        self.address.zero_()
        slot = torch.arange(1, self.slots + 1, dtype=self.address.dtype, device=chunks.device)
        self.address.view(-1)[chunks] = slot[:len(chunks)]
        self.top.zero_()
        self.push(slot[len(chunks):])

    def push(self, slots: Tensor) -> None:
        top = int(self.top)
        self.free[top:top + len(slots)] = slots.to(self.free.dtype)
        self.top.fill_(top + len(slots))

    def pop(self, m: int) -> Tensor:
        top = int(self.top)
        if m > top:
            raise RuntimeError(f"{m} slots are wanted and {top} are free")
        self.top.fill_(top - m)
        return self.free[top - m:top].flip(0)

    def swap(self, out: Tensor, into: Tensor) -> Tensor:
        """Flat chunks ``out`` lose their slots and ``into`` get free ones, which begin at zero; returns these."""
        address = self.address.view(-1)
        self.push(address[out])
        address[out] = 0
        fresh = self.pop(len(into))
        address[into] = fresh
        self.weight.index_fill_(0, fresh.long(), 0)
        return fresh.long()

    def vacate(self, rows: Tensor) -> None:
        """Rows lose their slots and begin with a utility of zero."""
        slot = take(self.address, rows).view(-1)
        self.push(slot[slot > 0])
        self.address.index_fill_(0, rows, 0)
        self.utility.index_fill_(0, rows, 0)

    def live(self) -> Tensor:
        """Sorted flat chunks that own a slot."""
        step = BLOCK * self.k
        flat = self.address.view(-1).split(step)
        return torch.cat([part.nonzero().view(-1) + number * step for number, part in enumerate(flat)])


class Addresses(nn.Module):
    """One number per chunk: its place among the surviving ones, from 1."""

    def __init__(self, rows: int, k: int, kept: int, device=None):
        super().__init__()
        self.k = k
        self.register_buffer("address", torch.zeros(rows, k, dtype=smallest_int(kept), device=device))

    def fill(self, row, position):
        place = torch.arange(1, len(row) + 1, device=row.device).to(self.address.dtype)
        self.address.view(-1)[row * self.k + position] = place

    def span(self, row):
        address = take(self.address, row).long()
        held = address > 0
        return address.amax(1) - held.sum(1), (held.long() << torch.arange(self.k, device=row.device)).sum(1)


class ChunkBits(nn.Module):
    """One bit per chunk and how many are set before every 64 of them; the bits of a row stand in one word."""

    def __init__(self, rows: int, k: int, kept: int, device=None):
        super().__init__()
        self.shift, self.mask = (k - 1).bit_length(), (1 << k) - 1 if k < 64 else -1
        self.bits = Bits(rows << self.shift, device)

    def fill(self, row, position):
        self.bits.fill((row << self.shift) + position)

    def span(self, row):
        first = row << self.shift
        word, at = first >> 6, first & 63
        own = take(self.bits.words, word)
        below = own & (torch.ones_like(at) << at).sub_(1)
        return popcount(below).add_(self.bits.before.at(word)), own.bitwise_right_shift_(at).bitwise_and_(self.mask)


class CompactHash(nn.Module):
    """Surviving chunks only (quotient hashing, Cleary 1984): rows are shuffled one to one; the upper bits of a row's
    new number name a bucket and need not be stored, the lower ones stand sorted in it with the chunk's position, 1, 2,
    4 or 8 bytes together.

    A look-up halves one bucket, of some 16 chunks, a few times, and reads the chunks of its row side by side.
    """

    DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    ODD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93

    def __init__(self, rows: int, k: int, kept: int, device=None):
        super().__init__()
        self.k, self.shift = k, (k - 1).bit_length()
        self.bits = max(2, (rows - 1).bit_length())
        self.mask, self.half = (1 << self.bits) - 1, (self.bits + 1) // 2
        start = smallest_int(max(kept, 1 << 15))                  # of places; int32 at least
        usual, both = min(self.bits, max(1, kept // 16).bit_length() - 1), self.bits + self.shift

        def weight(size):
            return size * kept + start.itemsize * ((1 << max(both - 8 * size, usual)) + 1)

        size = min(self.DTYPES, key=weight)
        self.low = both - max(both - 8 * size, usual)             # bits that are stored
        self.bias = 1 << (8 * size - 1) if size in (2, 4) else 0
        # a row is read as k keys, wherever it would stand
        self.register_buffer("key", torch.zeros(kept + k, dtype=self.DTYPES[size], device=device))
        self.register_buffer("start", torch.zeros((1 << both - self.low) + 1, dtype=start, device=device))

    def mix(self, x: Tensor) -> Tensor:
        for odd in self.ODD:
            x = x * (odd & self.mask) & self.mask                 # the upper bits wrap away
            x = x ^ x >> self.half
        return x

    def chunks(self) -> Tensor:
        """Flat chunks that were filled in, sorted: the shuffle undone."""
        bucket = torch.arange(len(self.start) - 1, device=self.key.device)
        kept = self.key[:len(self.key) - self.k].long()
        x = bucket.repeat_interleave(self.start.long().diff()) << self.low | kept + self.bias
        x, position = x >> self.shift, x & (1 << self.shift) - 1
        for odd in reversed(self.ODD):
            x = x ^ x >> self.half
            x = x * pow(odd, -1, 1 << self.bits) & self.mask
        return (x * self.k + position).sort().values

    def fill(self, row, position):
        """Returns the order in which the chunks are stored."""
        mixed, order = (self.mix(row) << self.shift | position).sort()
        edges = torch.arange(len(self.start), device=row.device) << self.low
        self.start.copy_(torch.searchsorted(mixed, edges))
        self.key[:len(row)] = (mixed & (1 << self.low) - 1) - self.bias
        return order

    def span(self, row):
        mixed = self.mix(row) << self.shift
        bucket = mixed >> self.low
        place, end = take(self.start, bucket).long(), take(self.start, bucket + 1).long()
        low = (mixed & (1 << self.low) - 1) - self.bias
        step, sought = 1 << int((end - place).max() if len(place) else 0).bit_length() >> 1, low.to(self.key.dtype)
        while step:                                              # those below stand at the front of the bucket
            probe = place + (step - 1)
            place += ((take(self.key, probe.clamp(max=len(self.key) - 1)) < sought) & (probe < end)) * step
            step >>= 1
        number = torch.arange(self.k, device=row.device)
        position = windows(self.key, place, self.k).long().sub_(low[:, None])
        held = (position < self.k) & (number < (end - place)[:, None])       # none of the row's is below 0
        return place, torch.where(held, 1 << position.clamp_(0, self.k - 1), 0).sum(1)


#: How a row's surviving chunks are found. ``fill(row, position)`` takes them in order and returns the order in which
#: they are stored, if another; ``span(row [m])`` gives the place of a row's first and, as bits, which are there.
SERVING = {"address": Addresses, "bitmask": ChunkBits, "hash": CompactHash}


@functools.lru_cache(maxsize=16)
def _places(k: int, device) -> tuple[Tensor, Tensor]:
    """For each set of ``k`` bits the rank of each bit from 1, and whether it is set [2 ** k, k]."""
    with torch.inference_mode(False):
        bit = torch.arange(1 << k)[:, None] >> torch.arange(k) & 1
        return bit.cumsum(1).to(device), bit.to(device)


class ChunkTable(Holder):
    """``kept`` chunks of ``width`` numbers out of ``rows * k``, to be looked up only. Row 0 of ``values`` is what other
    chunks read: zeros.

    ``form`` names how they are found, one of ``address``, ``bitmask`` and ``hash`` (unless given: the lightest).
    """

    def __init__(self, rows: int, k: int, width: int, kept: int, form: str | None = None, device=None):
        super().__init__()
        self.shape, self.rows, self.k, self.width = (kept, width), rows, k, width
        self.form = form or min(SERVING, key=lambda name: memory(SERVING[name](rows, k, kept, "meta")))
        self.index = SERVING[self.form](rows, k, kept, device)
        with torch.device(device or torch.get_default_device()):
            self.values = FloatTable(kept + 1, width, 0.0).requires_grad_(False)

    def fill(self, chunks: Tensor, values: Tensor) -> None:
        """Take sorted distinct flat chunks [kept] and their values [kept, width]."""
        order = self.index.fill(chunks // self.k, chunks % self.k)
        self.values.weight[1:] = values if order is None else values.index_select(0, order)

    def locate(self, rows: Tensor) -> Tensor:
        """Row of ``values`` for each chunk of ``rows [...]``, ``[..., k]``; 0 for those that did not survive."""
        start, held = self.index.span(rows.reshape(-1))
        if self.k <= 8:
            rank, there = (take(table, held) for table in _places(self.k, rows.device))
        else:
            there = held[:, None] >> torch.arange(self.k, device=rows.device) & 1
            rank = there.cumsum(1)
        return rank.add_(start[:, None]).mul_(there).view(rows.shape + (self.k,))

    def gather(self, index):
        return self.values.gather(self.locate(index)).flatten(-2)

    def quantised(self, bits, **options):
        table = ChunkTable(self.rows, self.k, self.width, self.shape[0], self.form, "meta")
        table.index, table.values = self.index, self.values.quantised(bits, **options)
        return table


def kept_shares(weight: Sequence[float], mean: float) -> list[float]:
    """``weight [k]`` in proportion, with that mean and none above 1; where no weight is left, alike."""
    out, rest = [1.0] * len(weight), list(range(len(weight)))
    while rest:
        room, total = mean * len(weight) - (len(weight) - len(rest)), sum(weight[j] for j in rest)
        for j in rest:
            out[j] = room * weight[j] / total if total else room / len(rest)
        if not (over := [j for j in rest if out[j] > 1]):
            break
        for j in over:
            out[j] = 1.0
        rest = [j for j in rest if j not in over]
    return out


class InTraining(Method):
    """Chunks compete for ``slots`` while training goes on. Arguments: see :mod:`ecstudy.methods.fiited`."""

    knob = "slots"
    family = "intra-feature"
    aware = "importance"
    group = "in-training pruning"

    def __init__(self, fields, dim, slots, chunks, utility, ratios, gamma, interval, warmup, sample, normalise, spread,
                 online, capacity, serving, trigger):
        super().__init__(fields, dim)
        if chunks not in [k for k in range(1, min(dim, 64) + 1) if dim % k == 0]:
            raise ValueError(f"chunks={chunks}: expected a divisor of the embedding dimension {dim}, at most 64")
        if utility not in ("product", "count", "gradient"):
            raise ValueError(f"utility={utility!r}: expected 'product', 'count' or 'gradient'")
        if not (ratios in ("uniform", "dynamic") or isinstance(ratios, (tuple, list)) and len(ratios) == chunks
                and all(isinstance(r, (int, float)) and r > 0 for r in ratios)):
            raise ValueError(f"ratios={ratios!r}: expected 'uniform', 'dynamic', or {chunks} positive numbers, the "
                             "shares kept of each chunk position relative to one another")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma={gamma}: expected a factor per step in (0, 1]")
        if interval is not None and interval < 1 or sample < 1 or not 0 <= spread <= 1 or not 0 <= trigger <= 1:
            raise ValueError(f"interval={interval}, sample={sample}, spread={spread}, trigger={trigger}: expected at "
                             "least 1 step, at least 1 row, and shares between 0 and 1")
        if serving is not None and serving not in SERVING:
            raise ValueError(f"serving={serving!r}: expected one of {', '.join(SERVING)}")
        if online and serving not in (None, "hash") or not online and capacity is not None:
            raise ValueError("online=True finds ids by a hash, and only it has a capacity: leave out serving= with "
                             "it, and capacity= without it")
        cells = fields.n * chunks
        if cells > 1 << 60:
            raise ValueError(f"{cells} chunks: expected at most 2^60, ids times chunks")
        self.slots = min(max(1, cells // 10), MOST) if slots is None else slots
        if not 1 <= self.slots <= cells:
            raise ValueError(f"slots={self.slots}: expected 1 <= slots <= {cells} chunks")
        self.chunks, self.ratios, self.interval, self.warmup = chunks, ratios, interval, tuple(warmup)
        self.sample, self.normalise, self.spread = int(sample), bool(normalise), float(spread)
        self.online, self.serving, self.trigger = bool(online), "hash" if online else serving, float(trigger)
        self.steps, self.log = 0, []
        self.aux = nn.Module()
        rows = fields.n
        if online:
            self.aux.ids = IdMap(4 * self.slots // chunks if capacity is None else capacity)
            rows = self.aux.ids.rows + 1                          # ids that found no place share the last, never live
        self.aux.slots = Slots(rows, chunks, dim // chunks, self.slots, fields.bound(), utility, gamma)
        if not self.aux.slots.weight.is_meta:
            self.aux.slots.spread(rows) if not online else self.aux.slots.own(self.aux.slots.top.new_zeros(0))

    @classmethod
    def sizes(cls, fields, dim, chunks=1, **options):
        return range(1, min(fields.n * chunks, MOST) + 1)

    # --- looking up -----------------------------------------------------------------------------------------------

    def encode(self, ids):
        flat = self.fields.flat(ids)
        if self.deployed or not self.online:
            return flat
        if not (self.training and torch.is_grad_enabled()):
            return self.aux.ids.find(flat)
        with torch.no_grad():
            found, inverse = torch.unique(flat, return_inverse=True)
            slots = self.aux.slots
            place, taken = self.aux.ids.admit(found, lambda rows: take(slots.utility, rows).amax(-1), slots.pending())
            if len(taken):
                slots.vacate(taken)
        return take(place, inverse)

    def lookup(self, codes):
        return self.table.gather(codes) if self.deployed else self.aux.slots.gather(codes)

    # --- training -------------------------------------------------------------------------------------------------

    def schedule(self, run):
        every = self.interval or max(1, min(INTERVAL, run.steps_per_epoch // 10))
        for step in run.fit("train"):
            yield step
            self.after_step(run.optimizers, every)

    def after_step(self, optimizers=None, every: int | None = None) -> None:
        """To be called after each update in a loop of your own: holds a round where one is due.

        ``optimizers`` (:func:`ecstudy.training.optimizers`): re-grown chunks get fresh moments there.
        """
        self.steps += 1
        every = every or self.interval or INTERVAL
        gap = next((gap for until, gap in self.warmup if self.steps <= until), every)
        if self.steps % min(gap, every) == 0:
            self.round(optimizers)

    @torch.no_grad()
    def round(self, optimizers=None) -> dict:
        """Pruned chunks above the threshold of their position take the slots of live ones below theirs.

        Returns, and appends to ``log``: the step, how many were ``admitted`` and ``evicted``, and the ``shares`` of
        each position that the thresholds keep.
        """
        slots = self.aux.slots
        said = dict(step=self.steps, admitted=0, evicted=0, shares=[1.0] * self.chunks)
        if self.slots < self._rows() * self.chunks:
            threshold, said["shares"] = self._thresholds()
            if not self.trigger or self._asking(threshold) >= self.trigger:
                said |= self._move(threshold, optimizers)
        self.log.append(said)
        return said

    def _move(self, threshold: Tensor, optimizers) -> dict:
        slots = self.aux.slots
        into, out = self._candidates(threshold, int(slots.top))
        fresh = slots.swap(out, into)
        if optimizers is not None and len(fresh):
            moments = optimizers.rows.moments[[h is slots for h in optimizers.rows.holders].index(True)]
            for moment in moments or ():
                moment.index_fill_(0, fresh, 0)
        return dict(admitted=len(into), evicted=len(out))

    def _asking(self, threshold: Tensor) -> float:
        """Pruned chunks above the threshold over all slots, by the rows that the thresholds were found from."""
        rows = self._round_sample()
        asking = (self._scaled(rows) > threshold) & ~self._held(rows)
        return float(asking.sum()) * self._rows() / (len(rows) * self.slots)

    def _rows(self) -> int:
        return self.aux.ids.rows if self.online else self.fields.n

    def _field(self, rows: Tensor) -> Tensor:
        """Field of each row, for normalised utilities; an entry without an id counts for the first field."""
        flat = take(self.aux.ids.key, rows).clamp(min=0) if self.online else rows
        return self.fields.of(flat)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Utilities ``[m, k]`` as they are compared."""
        utility = take(self.aux.slots.utility, rows).float()
        return utility.div_(take(self.scale, self._field(rows))[:, None]) if self.normalise else utility

    def _sampled(self, most: int, start: int = 0) -> Tensor:
        """About every so many rows, ``most`` at most, other ones in each round."""
        rows = self._rows()
        stride = -(-rows // most)
        return torch.arange(start % stride, rows, stride, device=self.aux.slots.address.device)

    def _round_sample(self) -> Tensor:
        return self._sampled(self.sample, len(self.log) * 7919)

    def _thresholds(self) -> tuple[Tensor, list[float]]:
        """Utility [k] above which a chunk of each position is kept, and the shares that are."""
        if self.normalise:
            self.scale = self._field_scale()
        mean = self.slots / (self._rows() * self.chunks)
        utility = self._scaled(self._round_sample()).sort(0, descending=True).values
        weight = [1.0] * self.chunks
        if self.ratios == "dynamic":
            every = utility.flatten().sort(descending=True).values
            level = every[min(int(mean * len(every)), len(every) - 1)]
            share = utility.gt(level).float().mean(0).tolist()
            weight = [min(max(s, mean * (1 - self.spread)), mean * (1 + self.spread)) for s in share]
        elif self.ratios != "uniform":
            weight = self.ratios
        shares = kept_shares(weight, mean)
        above = [int(share * len(utility) + 1e-6) for share in shares]
        level = [utility[m, j] if m < len(utility) else utility.new_tensor(-1.0) for j, m in enumerate(above)]
        return torch.stack(level), shares

    def _field_scale(self) -> Tensor:
        """The 95th percentile of the utilities seen in each field [F] (1 where none was)."""
        per = 4096
        if self.online:
            rows = self._sampled(per * len(self.fields))
            field, utility = self._field(rows), take(self.aux.slots.utility, rows).float().amax(1)
            seen = utility.expand(len(self.fields), -1).where(field == torch.arange(
                len(self.fields), device=rows.device)[:, None], 0)
        else:
            at = torch.arange(per, device=self.fields.offset.device)
            rows = self.fields.offset[:, None] + at * self.fields.size[:, None] // per
            seen = take(self.aux.slots.utility, rows).float().flatten(1)
        scale = torch.nanquantile(seen.masked_fill(seen == 0, math.nan), 0.95, dim=1)
        return scale.nan_to_num(1.0).clamp(min=1e-30)

    def _candidates(self, threshold: Tensor, free: int) -> list[Tensor]:
        """Flat chunks that come in, pruned and above the threshold, and as many live ones below as must go for them.

        The rows are gone through twice, block by block: counted by utility (to the 16 upper bits, all that is stored),
        so that it is known how useful a chunk must be, and collected. Nothing larger than what moves is made.
        """
        count = torch.zeros(2, 1 << 15, dtype=torch.int64, device=threshold.device)
        for _, bins, moves in self._blocks(threshold):
            for which, into in zip(moves, count):
                into += torch.bincount(bins[which], minlength=1 << 15)
        able = count.sum(1).tolist()
        admitted = min(able[0], free + able[1])
        wanted = [admitted, max(0, admitted - free)]
        count[0] = count[0].flip(0)                              # the most useful come in, the least useful go
        edge = [int(torch.searchsorted(c.cumsum(0), w)) if w else -1 for c, w in zip(count, wanted)]
        # in the last bin there may be more than are wanted: the first of them move
        rest = [w - int(c[:e].sum()) if w else 0 for c, w, e in zip(count, wanted, edge)]
        found: list[list[Tensor]] = [[], []]
        for start, bins, moves in self._blocks(threshold) if admitted else ():
            for i, (which, at) in enumerate(zip(moves, ((1 << 15) - 1 - bins, bins))):
                equal = (which & (at == edge[i])).nonzero().view(-1)[:rest[i]]
                rest[i] -= len(equal)
                found[i].append(torch.cat([(which & (at < edge[i])).nonzero().view(-1), equal]) + start)
        none = count.new_zeros(0)
        return [torch.cat([none, *parts]).sort().values for parts in found]

    def _blocks(self, threshold: Tensor):
        """Of some rows at a time: the first chunk, the bins of all chunks by utility, and which may come in or go."""
        for start in range(0, self._rows(), BLOCK):
            rows = torch.arange(start, min(start + BLOCK, self._rows()), device=threshold.device)
            utility, live = self._scaled(rows), self.aux.slots.address[start:start + len(rows)] > 0
            above = utility > threshold
            moves = [(above & ~live).view(-1), (live & ~above).view(-1)]
            yield start * self.chunks, utility.view(torch.int32).view(-1) >> 16, moves

    # --- what is known of it --------------------------------------------------------------------------------------

    @property
    def value_bytes(self) -> int:
        """Bytes of the vectors' numbers alone: what published ratios count. ``ecstudy.memory`` counts the index too."""
        values = self.table.values if self.deployed else self.aux.slots.weight
        return memory(values) if isinstance(values, nn.Module) else values.nbytes

    def _held(self, rows: Tensor) -> Tensor:
        """Which chunks of virtual rows are live, bool [m, k]."""
        return (self.table.locate(rows) if self.deployed else take(self.aux.slots.address, rows)) > 0

    def kept(self) -> Tensor:
        """Live chunks of each field and chunk position, int64 [F, k]: to watch a training."""
        out = torch.zeros(len(self.fields), self.chunks, dtype=torch.int64)
        if self.online:
            chunk = self.table.index.chunks() if self.deployed else self.aux.slots.live()
            row, position = chunk // self.chunks, chunk % self.chunks
            flat = row if self.deployed else take(self.aux.ids.key, row)
            field = self.fields.of(flat)
            return torch.bincount(field * self.chunks + position, minlength=out.numel()).view(out.shape).cpu()
        for field, (first, size) in enumerate(zip(self.fields.offset.tolist(), self.fields.sizes)):
            for start in range(first, first + size, BLOCK):
                rows = torch.arange(start, min(start + BLOCK, first + size), device=self.fields.offset.device)
                out[field] += self._held(rows).sum(0).cpu()
        return out

    def allocation(self):
        if self.online:
            return None
        held = torch.empty(self.fields.n, dtype=torch.int32, device=self.fields.offset.device)
        for start in range(0, self.fields.n, BLOCK):
            rows = torch.arange(start, min(start + BLOCK, self.fields.n), device=held.device)
            held[start:start + len(rows)] = self._held(rows).sum(1) * (self.dim // self.chunks)
        return held

    # --- a given matrix, and what ships ---------------------------------------------------------------------------

    def fit(self, rows):
        if self.online:
            raise TypeError("online=True learns from ids as they arrive, not from a matrix; leave it out")
        # chunks do not share anything: those of largest norm are the best approximation
        slots, width = self.aux.slots, self.dim // self.chunks
        norm = torch.empty(self.fields.n * self.chunks)
        for start in range(0, self.fields.n, BLOCK):
            part = as_rows(rows, start, BLOCK).view(-1, width).norm(dim=1)
            norm[start * self.chunks:][:len(part)] = part
        chunk = largest(norm, self.slots)
        slots.own(chunk.to(slots.address.device))
        for start in range(0, self.fields.n, BLOCK):
            part = as_rows(rows, start, BLOCK).view(-1, width)
            first = start * self.chunks
            a, b = torch.searchsorted(chunk, torch.tensor([first, first + len(part)])).tolist()
            slots.weight[a + 1:b + 1] = part[chunk[a:b] - first].to(slots.weight.device)

    @torch.no_grad()
    def deploy(self):
        if not self.deployed:
            slots = self.aux.slots
            table = ChunkTable(self.fields.n, self.chunks, slots.width, self.slots, self.serving, slots.weight.device)
            if not slots.weight.is_meta:
                chunk = slots.live()
                values = slots.weight.index_select(0, slots.address.view(-1)[chunk].long())
                if self.online:
                    chunk = take(self.aux.ids.key, chunk // self.chunks) * self.chunks + chunk % self.chunks
                if (more := self.slots - len(chunk)) > 0:         # slots that are free ship as chunks of zeros
                    spare = torch.arange(self.slots, device=chunk.device)
                    chunk = torch.cat([chunk, spare[~torch.isin(spare, chunk)][:more]])
                    values = torch.cat([values, values.new_zeros(more, slots.width)])
                chunk, order = chunk.sort()
                table.fill(chunk, values.index_select(0, order))
            self.table = table
        return super().deploy()

