"""A sparse table for serving: ``kept`` values of a ``rows x width`` table and an index that finds them.

The index is whichever of three forms weighs least for the given shape (weighed on ``meta`` builds, no formula):

- :class:`Csr`: row pointers and one small column number per value (the paper's CSR with 8-bit columns where they fit);
- :class:`Coo`: the sorted flat position of each value, found by binary search (the paper's COO scans all positions
  for every id, 1.33 s per batch in its Table 6; this reads log2(kept) of them);
- :class:`Bitmask`: one bit per element and a running count every 256 bits.

No lookup touches more than the rows asked for.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .memory import memory
from .select import largest
from .tables import FloatArray, Holder, take


def smallest_int(top: int) -> torch.dtype:
    """The smallest integer type that holds 0 .. top."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if top <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def popcount(x: Tensor) -> Tensor:
    """Number of set bits of each int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


class Bits(nn.Module):
    """``n`` bits with constant-time rank: words of 64 bits and a running count every 4 words."""

    PER_COUNT = 4                        # words per running count: 256 bits, hence the shifts by 8 below

    def __init__(self, n: int, device=None):
        super().__init__()
        words = -(-max(n, 1) // (64 * self.PER_COUNT)) * self.PER_COUNT
        self.register_buffer("words", torch.zeros(words, dtype=torch.int64, device=device))
        self.register_buffer("before", torch.zeros(words // self.PER_COUNT, dtype=smallest_int(n), device=device))

    def fill(self, positions: Tensor) -> None:
        """Set the bits at sorted distinct ``positions [k]``."""
        # distinct bits of one word add up without carry, so addition is a bitwise or (bit 63 wraps to the sign)
        self.words.index_add_(0, positions >> 6, torch.ones_like(positions) << (positions & 63))
        counts = popcount(self.words.view(-1, self.PER_COUNT)).sum(1)
        self.before.copy_(counts.cumsum(0) - counts)

    def get(self, position: Tensor) -> Tensor:
        return (take(self.words, position >> 6) >> (position & 63)) & 1

    def rank(self, position: Tensor) -> Tensor:
        """How many bits are set before ``position``."""
        group, within = position >> 8, position & 255
        words = take(self.words.view(-1, self.PER_COUNT), group)
        # whole words before the position's own, then the lower bits of that one
        full = (torch.arange(self.PER_COUNT, device=position.device) < (within >> 6)[..., None])
        own = take(self.words, position >> 6) & ((torch.ones_like(position) << (position & 63)) - 1)
        return take(self.before, group).long() + (popcount(words) * full).sum(-1) + popcount(own)


class Bitmask(nn.Module):
    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.width = width
        self.bits = Bits(rows * width, device)

    def fill(self, keys: Tensor) -> None:
        self.bits.fill(keys)

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        start = row * self.width
        column = torch.arange(self.width, device=row.device)
        if 64 % self.width == 0:                     # a row lies within one word: one gather instead of one per bit
            present = (take(self.bits.words, start >> 6) >> (start & 63))[..., None] >> column & 1
        else:
            present = self.bits.get(start[..., None] + column)
        position = self.bits.rank(start)[..., None] + present.cumsum(-1) - present
        # places before a row's first value or past the last of all are read and multiplied by zero
        return values.gather(position.clamp_(max=values.shape[0] - 1)) * present


def scatter_rows(values: FloatArray, start: Tensor, inside, column, width: int) -> Tensor:
    """Rows ``[..., width]`` whose values stand one after the other from ``start [...]``.

    ``column(place)`` gives the columns of stored values, ``inside(position, column)`` whether they belong to the row.
    """
    position = start[..., None] + torch.arange(width, device=start.device)
    place = position.clamp(max=values.shape[0] - 1)
    found = column(place)
    kept = inside(position, found)
    out = torch.zeros(start.shape + (width + 1,), device=start.device)
    # what is not of the row goes to a column that is cut off
    return out.scatter_(-1, torch.where(kept, found, width), values.gather(place))[..., :width]


class Csr(nn.Module):
    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.rows, self.width = rows, width
        self.register_buffer("pointer", torch.zeros(rows + 1, dtype=smallest_int(kept), device=device))
        self.register_buffer("column", torch.zeros(kept, dtype=smallest_int(width - 1), device=device))

    def fill(self, keys: Tensor, block: int = 1 << 22) -> None:
        for start in range(0, self.rows + 1, block):
            row = torch.arange(start, min(start + block, self.rows + 1), device=keys.device)
            self.pointer[start:start + block] = torch.searchsorted(keys, row * self.width)
        self.column.copy_(keys % self.width)

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        end = take(self.pointer, row + 1).long()[..., None]
        return scatter_rows(values, take(self.pointer, row).long(), lambda position, column: position < end,
                            lambda place: take(self.column, place).long(), self.width)


class Coo(nn.Module):
    def __init__(self, rows: int, width: int, kept: int, device=None):
        super().__init__()
        self.width = width
        self.register_buffer("key", torch.zeros(kept, dtype=smallest_int(rows * width - 1), device=device))

    def fill(self, keys: Tensor) -> None:
        self.key.copy_(keys)

    def gather(self, row: Tensor, values: FloatArray) -> Tensor:
        first = row * self.width                     # one search per row, for its first value; its others follow
        start = torch.searchsorted(self.key, first.to(self.key.dtype))

        def inside(position, column):
            return (column >= 0) & (column < self.width) & (position < len(self.key))

        return scatter_rows(values, start, inside, lambda place: take(self.key, place) - first[..., None], self.width)


FORMATS = {"csr": Csr, "coo": Coo, "bitmask": Bitmask}


class SparseTable(Holder):
    """``kept`` values of a ``rows x width`` table. ``form`` names the index, the lightest one unless given."""

    def __init__(self, rows: int, width: int, kept: int, form: str | None = None, device=None):
        super().__init__()
        if not 0 <= kept <= rows * width:
            raise ValueError(f"kept={kept}: expected 0 <= kept <= {rows * width} values")
        self.shape, self.kept = (rows, width), kept
        if form is None:
            form = min(FORMATS, key=lambda f: memory(FORMATS[f](rows, width, kept, "meta")))
        self.form = form
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

    def gather(self, index):
        if not self.kept:
            return torch.zeros(index.shape + (self.shape[1],), device=index.device)
        return self.index.gather(index, self.values)

    def quantised(self, bits):
        table = SparseTable(*self.shape, self.kept, self.form, "meta")
        table.index, table.values = self.index, self.values.quantised(bits)
        return table
