"""A sparse table for serving: ``kept`` values of a ``rows x width`` table and an index that finds them.

There are six forms of index, weighed on ``meta`` builds (no formula). From many values per row to few:

- :class:`Bitmask`: one bit per element, and the number of values before every 64 of them;
- :class:`PackedCsr`: of every 8 rows one int64 that holds the number of values before them and in each of them, and
  half a byte per value for its column (at width 16);
- :class:`Csr`: row pointers and a column per value, as in the paper, with 8-bit columns where they fit;
- :class:`Grouped8`, :class:`Grouped16`: the flat position of each value as one byte within 256 elements, or as two
  bytes within 65,536, and how many values stand before such a group. A bounded binary search inside the group finds
  a row, wherever the row stands in the table;
- :class:`Coo`: the sorted flat position of each value, by binary search over all of them (the paper's COO scans all
  positions for every id, 1.33 s per batch in its Table 6).

The first of these within 5 % of the lightest is taken: they stand in the order of their speed, and as bytes per value
fall and bytes per row rise in this order, a table with more values never weighs less. No lookup touches more than the
rows asked for.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .memory import memory
from .select import largest
from .tables import FloatArray, Holder, take

NEARLY = 1.05                            # forms within this factor of the lightest count as equally light
ELEMENTS = 1 << 24                       # elements of a table indexed at once
MANY = 3                                 # values of each 16 elements of a batch from which whole windows are read


def smallest_int(top: int) -> torch.dtype:
    """The smallest integer type that holds 0 .. top."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if top <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def popcount(x: Tensor) -> Tensor:
    """Number of set bits of each int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = ((x >> 2) & 0x3333333333333333).add_(x.bitwise_and_(0x3333333333333333))
    x = (x >> 4).add_(x).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return x.mul_(0x0101010101010101).bitwise_right_shift_(56)


def windows(array: Tensor, start: Tensor, length: int) -> Tensor:
    """``array [n]`` from each of ``start [k]`` on -> ``[k, length]``, one contiguous read each."""
    return array.as_strided((len(array) - length + 1, length), (1, 1)).index_select(0, start)


@functools.lru_cache(maxsize=8)
def _byte_tables(device) -> tuple[Tensor, Tensor, Tensor]:
    """For every byte, as the 8 bytes of an int64: the bits set before each bit, and 255 where a bit is set; and the
    number of bits set."""
    with torch.inference_mode(False):
        bit = torch.arange(256)[:, None] >> torch.arange(8) & 1
        rank, present = (x.to(torch.uint8).view(torch.int64).view(-1) for x in (bit.cumsum(1) - bit, bit * 255))
        return rank.to(device), present.to(device), bit.sum(1).to(device)


@functools.lru_cache(maxsize=8)
def _inside(width: int, device) -> Tensor:
    """1 for the places ``a .. a + c - 1`` of ``width``, else 0, in row ``a (width + 1) + c``."""
    with torch.inference_mode(False):
        ahead = torch.arange(width + 1)[:, None, None]
        count, slot = torch.arange(width + 1)[:, None], torch.arange(width)
        return ((slot >= ahead) & (slot < ahead + count)).float().flatten(0, 1).to(device)


class RunningCounts(nn.Module):
    """How many values stand before each of ``n`` marks: int16 within runs of ``run`` marks, ``cells`` at most.

    Between two marks there are at most ``65,536 / run`` values.
    """

    def __init__(self, n: int, run: int, cells: int, device=None):
        super().__init__()
        self.shift = run.bit_length() - 1
        self.register_buffer("top", torch.zeros(-(-n // run), dtype=smallest_int(cells + (1 << 15)), device=device))
        self.register_buffer("low", torch.zeros(n, dtype=torch.int16, device=device))

    def put(self, first: int, before: Tensor) -> None:
        """The counts of marks ``first, first + 1, ..``; those of earlier marks are there already."""
        opens = -first % (1 << self.shift)
        top = before[opens::1 << self.shift] + (1 << 15)         # so that what is left fits a signed number
        run = (first + opens) >> self.shift
        self.top[run:run + len(top)] = top
        mark = torch.arange(first, first + len(before), device=before.device)
        self.low[first:first + len(before)] = before - take(self.top, mark >> self.shift)

    def at(self, mark: Tensor) -> Tensor:
        return take(self.top, mark >> self.shift) + take(self.low, mark)


class Bits(nn.Module):
    """``n`` bits with constant-time rank: words of 64 bits, and the number of bits set before each."""

    def __init__(self, n: int, device=None):
        super().__init__()
        words = -(-max(n, 1) // 64)
        self.register_buffer("words", torch.zeros(words, dtype=torch.int64, device=device))
        self.before = RunningCounts(words, 1024, n, device)

    def fill(self, positions: Tensor) -> None:
        """Set the bits at sorted distinct ``positions [k]``."""
        self.put(0, len(self.words), positions, 0)

    def put(self, word: int, count: int, positions: Tensor, before: int) -> None:
        """Set the bits of ``count`` words from ``word`` on; ``before`` are set in earlier words."""
        own = self.words[word:word + count].zero_()
        # distinct bits of one word add up without carry, so addition is a bitwise or (bit 63 wraps to the sign)
        own.index_add_(0, (positions >> 6) - word, torch.ones_like(positions) << (positions & 63))
        counts = popcount(own)
        self.before.put(word, counts.cumsum(0).sub_(counts).add_(before))

    def locate(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """How many bits are set before ``position``, and whether it is set itself."""
        word = position >> 6
        # shifted so that the position's own bit is the sign and only lower ones are left beside it
        own = take(self.words, word) << ((position & 63) ^ 63)
        return popcount(own << 1).add_(self.before.at(word)), own < 0

    def rank(self, position: Tensor) -> Tensor:
        return self.locate(position)[0]

    def get(self, position: Tensor) -> Tensor:
        return (take(self.words, position >> 6) >> (position & 63)) & 1


class Form(nn.Module):
    """An index of ``kept`` values in a table of ``rows x width``, filled from its first row to its last."""

    rows: int
    width: int

    @staticmethod
    def fits(width: int) -> bool:
        return True

    def put(self, first: int, count: int, keys: Tensor, place: int) -> None:
        """The values of ``count`` rows from ``first`` on, ``keys`` their sorted flat positions and ``place`` how many
        stand before them. ``first`` is a multiple of 64, and so is ``count`` except at the end."""
        raise NotImplementedError

    def fill(self, keys: Tensor) -> None:
        """All values, given their sorted flat positions."""
        step, place = max(64, ELEMENTS // self.width // 64 * 64), 0
        for first in range(0, self.rows, step):
            count = min(step, self.rows - first)
            end = int(torch.searchsorted(keys, (first + count) * self.width))
            self.put(first, count, keys[place:end], place)
            place = end

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        """Rows ``[k]`` as ``[k, width]``."""
        raise NotImplementedError


class Bitmask(Form):
    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.rows, self.width, self.kept = rows, width, kept
        self.bits = Bits(rows * width, device)

    def put(self, first, count, keys, place):
        self.bits.put(first * self.width >> 6, -(-count * self.width // 64), keys, place)

    def span(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Index.span`."""
        start, (before, last) = self.bits.rank(row * self.width), self.bits.locate((row + 1) * self.width - 1)
        return start, before + last - start

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        first, width = row * self.width, min(self.width, 64)
        if self.width not in (8, 16, 32) and self.width % 64 or self.kept < width:
            return self._gather_bits(first, values)
        if self.width > 64:                                          # a row is whole words
            first = (first[:, None] + torch.arange(0, self.width, 64, device=row.device)).view(-1)
        # a row, or part of one, lies within one word: shifted to its lower end, its bytes are spread by small tables
        word, shift = first >> 6, first & 63
        word, before = take(self.bits.words, word), self.bits.before.at(word)
        start = popcount((word << (shift ^ 63)) << 1).add_(before)
        byte = (word >> shift).view(torch.uint8).view(-1, 8)[:, :width // 8].int()
        rank, present, count = (take(table, byte) for table in _byte_tables(row.device))
        place = start.clamp(max=self.kept - width)              # near the end a window must begin earlier
        ahead = count.cumsum(1).sub_(count).add_((start - place)[:, None])
        rank.add_(ahead.mul_(0x0101010101010101)).bitwise_and_(present)
        out = values.blocks(place, width).gather(1, rank.view(torch.uint8).long())
        return out.mul_(present.bitwise_and_(0x0101010101010101).view(torch.uint8).float()).view(len(row), self.width)

    def _gather_bits(self, first, values):
        present = self.bits.get(first[:, None] + torch.arange(self.width, device=first.device))
        position = self.bits.rank(first)[:, None] + present.cumsum(-1) - present
        # places before a row's first value or past the last of all are read and multiplied by zero
        return values.gather(position.clamp_(max=self.kept - 1)) * present


class Index(Form):
    """Values of a row stand one after the other: ``span`` says where, ``columns`` says in which columns."""

    def span(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Place of the first value of each row [k], and the number of its values."""
        raise NotImplementedError

    def columns(self, place: Tensor, row: Tensor, owner: Tensor) -> Tensor:
        """Column of the value at each ``place [t]``, which belongs to ``row[owner [t]]``."""
        raise NotImplementedError

    def window(self, place: Tensor, row: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``value [k, width]``, stored from each of ``place [k]`` on, in parts with their columns; any column for what
        is not of ``row``."""
        raise NotImplementedError

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        width = self.width
        if not len(row):
            return torch.zeros(0, width, device=row.device)
        start, count = self.span(row)
        end = count.cumsum(0)
        total = int(end[-1])
        if total <= MANY * max(1, width / 16) * len(row) or self.kept < width:           # value by value
            owner = torch.repeat_interleave(count, output_size=total)
            place = (start + count).sub_(end).index_select(0, owner).add_(torch.arange(total, device=row.device))
            target = self.columns(place, row, owner) + owner.mul_(width)
            out = torch.zeros(len(row) * width, device=row.device)
            return out.scatter_(0, target, values.gather(place)).view(-1, width)
        place = start.clamp(max=self.kept - width)                   # near the end a window must begin earlier
        ahead = (start - place).mul_(width + 1).add_(count)
        inside = _inside(width, row.device).index_select(0, ahead)
        value = values.blocks(place, width).mul_(inside)
        out = torch.zeros(len(row), width, device=row.device)
        for column, part in self.window(place, row, value):          # what is not of the row is added as zero
            out.scatter_add_(1, column.long(), part)
        return out


class PackedCsr(Index):
    """One int64 per 8 rows: their numbers of values, and above these the number of values before them, relative to
    that of a larger block of rows."""

    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.rows, self.width, self.kept = rows, width, kept
        self.bits = max(3, width.bit_length())                       # of one row's number of values
        self.half = 1 << (63 - 8 * self.bits)                        # relative counts are -half .. half - 1
        self.shift = min(20, (2 * self.half // width).bit_length() - 1)
        self.register_buffer("word", torch.zeros(-(-rows // 8), dtype=torch.int64, device=device))
        self.register_buffer("base", torch.zeros(((rows - 1) >> self.shift) + 1, device=device,
                                                 dtype=smallest_int(rows * width + self.half)))
        self.packed = width <= 16
        self.register_buffer("column", torch.zeros(-(-kept // 2) + 8 if self.packed else kept, dtype=torch.uint8,
                                                   device=device))

    @staticmethod
    def fits(width: int) -> bool:
        return width < 64

    def put(self, first, count, keys, place):
        row = torch.arange(first, first + (count + 7) // 8 * 8 + 1, device=keys.device)
        start = torch.searchsorted(keys, row * self.width) + place   # rows past the end have no values
        opens = -first % (1 << self.shift)                           # of a larger block of rows
        base = start[:-1][opens::1 << self.shift] + self.half
        self.base[(first + opens) >> self.shift:][:len(base)] = base
        word = (start[:-1:8] - take(self.base, row[:-1:8] >> self.shift)) << (8 * self.bits)
        for i, held in enumerate(start.diff().view(-1, 8).unbind(1)):
            word += held << (i * self.bits)
        self.word[first >> 3:][:len(word)] = word
        column = (keys % self.width).to(torch.uint8)
        if not self.packed:
            self.column[place:place + len(keys)] = column
            return
        if place & 1 and len(column):                                # the other half of the last byte
            self.column[place >> 1] = self.column[place >> 1] & 15 | column[0] << 4
            column, place = column[1:], place + 1
        self.column[place >> 1:][:-(-len(column) // 2)] = column[::2]
        self.column[place >> 1:][:len(column) // 2] += column[1::2] << 4

    def span(self, row):
        bits = self.bits
        word, at = take(self.word, row >> 3), (row & 7).mul_(bits)
        count = (word >> at).bitwise_and_((1 << bits) - 1)
        # the counts below the row's own: neighbours are added into fields of twice the bits, then a product adds all
        below = word & (1 << at).sub_(1)
        fields = sum((1 << bits) - 1 << 2 * bits * i for i in range(4))
        below = (below >> bits).bitwise_and_(fields).add_(below.bitwise_and_(fields))
        below.mul_(sum(1 << 2 * bits * i for i in range(4))).bitwise_right_shift_(6 * bits)
        below.bitwise_and_((1 << 2 * bits) - 1)
        return below.add_(word.bitwise_right_shift_(8 * bits)).add_(take(self.base, row >> self.shift)), count

    def columns(self, place, row, owner):
        if not self.packed:
            return take(self.column, place)
        return (take(self.column, place >> 1) >> ((place & 1) << 2)) & 15

    def window(self, place, row, value):
        if not self.packed:
            return [(windows(self.column, place, self.width), value)]
        at, odd = place >> 1, place & 1
        half, last = windows(self.column, at, 8).view(torch.int64).view(-1), take(self.column, at + 8).long()
        # from an odd place on: half a byte further, with the lower half of the ninth byte on top
        half = torch.where(odd.bool(), ((half >> 4) & ((1 << 60) - 1)) | (last << 60), half)
        even, odd = ((half >> i & 0x0F0F0F0F0F0F0F0F).view(torch.uint8).view(-1, 8) for i in (0, 4))
        return [(even[:, :(self.width + 1) // 2], value[:, ::2]), (odd[:, :self.width // 2], value[:, 1::2])]


class Csr(Index):
    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.rows, self.width, self.kept = rows, width, kept
        self.register_buffer("pointer", torch.zeros(rows + 1, dtype=smallest_int(rows * width), device=device))
        self.register_buffer("column", torch.zeros(kept, dtype=smallest_int(width - 1), device=device))

    def put(self, first, count, keys, place):
        row = torch.arange(first, first + count + 1, device=keys.device)
        self.pointer[first:first + count + 1] = torch.searchsorted(keys, row * self.width) + place
        self.column[place:place + len(keys)] = keys % self.width

    def span(self, row):
        start = take(self.pointer, row).long()
        return start, take(self.pointer, row + 1) - start

    def columns(self, place, row, owner):
        return take(self.column, place)

    def window(self, place, row, value):
        return [(windows(self.column, place, self.width), value)]


class Coo(Index):
    """The flat position of each value."""

    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.rows, self.width, self.kept = rows, width, kept
        self.register_buffer("key", torch.zeros(kept, dtype=smallest_int(rows * width - 1), device=device))

    def put(self, first, count, keys, place):
        self.key[place:place + len(keys)] = keys

    def rank(self, element: Tensor) -> Tensor:
        """How many values stand before each flat position [k]."""
        if self.key.dtype in (torch.int32, torch.int64):
            return torch.searchsorted(self.key, element.to(self.key.dtype))     # one past the last fits: rows x width
        return torch.searchsorted(self.key.int(), element.int())                # at most 32,767 elements

    def span(self, row):
        first = row * self.width
        start, count = self.rank(first), torch.zeros_like(row)
        # most rows of a very sparse table have no value: their end is not looked for
        column = self._column(take(self.key, start.clamp(max=self.kept - 1)), first)
        some = ((column >= 0) & (column < self.width)).nonzero().view(-1)
        count[some] = (self.rank(take(first, some) + self.width) - take(start, some)).long()
        return start.long(), count

    def _column(self, key, first):
        return key - first

    def columns(self, place, row, owner):
        return self._column(take(self.key, place), (row * self.width).index_select(0, owner))

    def window(self, place, row, value):
        column = self._column(windows(self.key, place, self.width), (row * self.width)[:, None])
        return [(column.clamp_(0, self.width - 1), value)]


class Grouped8(Coo):
    """The position of each value within its group of ``2 ** BITS`` elements, and the number of values before each
    group."""

    BITS, DTYPE, BIAS = 8, torch.uint8, 0

    def __init__(self, rows: int, width: int, kept: int, device=None):
        Index.__init__(self)
        self.rows, self.width, self.kept, self.groups = rows, width, kept, ((rows * width) >> self.BITS) + 2
        self.mask = (1 << self.BITS) - 1
        self.register_buffer("key", torch.zeros(kept, dtype=self.DTYPE, device=device))
        self.before = RunningCounts(self.groups, 1 << (16 - self.BITS), rows * width, device)

    @classmethod
    def fits(cls, width: int) -> bool:
        return width <= 1 << cls.BITS

    def put(self, first, count, keys, place):
        opens, ends = (-(-row * self.width >> self.BITS) for row in (first, first + count))
        if first + count == self.rows:
            ends = self.groups
        group = torch.arange(opens, ends, device=keys.device)        # those that begin in these rows
        self.before.put(opens, torch.searchsorted(keys, group << self.BITS) + place)
        self.key[place:place + len(keys)] = (keys & self.mask) - self.BIAS

    def rank(self, element):
        group = element >> self.BITS
        place, end = self.before.at(group), self.before.at(group + 1)
        low = (element & self.mask).sub_(self.BIAS).to(self.DTYPE)
        step = 1 << int((end - place).max() if len(place) else 0).bit_length() >> 1
        while step:                                                  # those below stand at the front of the group
            probe = place + (step - 1)
            smaller = take(self.key, probe.clamp(max=self.kept - 1)) < low
            place += (smaller & (probe < end)) * step
            step >>= 1
        return place

    def _column(self, key, first):
        return (key + self.BIAS - first) & self.mask


class Grouped16(Grouped8):
    BITS, DTYPE, BIAS = 16, torch.int16, 1 << 15


# from the fastest to the slowest
FORMATS = {"bitmask": Bitmask, "packed_csr": PackedCsr, "csr": Csr, "grouped8": Grouped8, "grouped16": Grouped16,
           "coo": Coo}


class SparseTable(Holder):
    """``kept`` values of a ``rows x width`` table. ``form`` names the index (unless given: see above)."""

    def __init__(self, rows: int, width: int, kept: int, form: str | None = None, device=None):
        super().__init__()
        if not 0 <= kept <= rows * width:
            raise ValueError(f"kept={kept}: expected 0 <= kept <= {rows * width} values")
        if form is None:
            # values included: 4 bytes each
            weights = {name: memory(index(rows, width, kept, "meta")) + 4 * kept
                       for name, index in FORMATS.items() if index.fits(width)}
            form = next(name for name, weight in weights.items() if weight <= NEARLY * min(weights.values()))
        elif form not in FORMATS or not FORMATS[form].fits(width):
            able = ", ".join(name for name, index in FORMATS.items() if index.fits(width))
            raise ValueError(f"form={form!r}: expected one of {able} at width {width}")
        self.shape, self.kept, self.form = (rows, width), kept, form
        self.index = FORMATS[form](rows, width, kept, device)
        with torch.device(device or torch.get_default_device()):
            self.values = FloatArray(kept)

    @classmethod
    def of(cls, weight: Tensor, kept: int, form: str | None = None) -> SparseTable:
        """The ``kept`` largest magnitudes of ``weight [rows, width]`` (an empty shell for a ``meta`` tensor)."""
        table = cls(*weight.shape, kept, form, weight.device)
        if not weight.is_meta:
            keys = largest(weight, kept)
            table.index.fill(keys)
            table.values.weight.data = take(weight.detach().reshape(-1), keys)
        table.values.requires_grad_(False)
        return table

    def put(self, first: int, count: int, keys: Tensor, values: Tensor, place: int) -> None:
        """Store the values of ``count`` rows from ``first`` on: see :meth:`Form.put`."""
        self.index.put(first, count, keys, place)
        self.values.weight.detach()[place:place + len(values)] = values

    def gather(self, index):
        if not self.kept:
            return torch.zeros(index.shape + (self.shape[1],), device=index.device)
        return self.index.gather(index.reshape(-1), self.values).view(index.shape + (self.shape[1],))

    def per_row(self, block: int = 1 << 20) -> Tensor:
        """How many values each row holds, int32 [rows], read off the index block by block."""
        device = next(self.index.buffers()).device
        held = torch.zeros(self.shape[0], dtype=torch.int32, device=device)
        for start in range(0, self.shape[0] if self.kept else 0, block):
            row = torch.arange(start, min(start + block, self.shape[0]), device=device)
            held[start:start + len(row)] = self.index.span(row)[1]
        return held

    def quantised(self, to):
        table = SparseTable(*self.shape, self.kept, self.form, "meta")
        table.index, table.values = self.index, self.values.quantised(to)
        return table
