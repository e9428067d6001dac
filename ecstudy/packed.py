"""Rows of small codes stored at their true width: ``parts`` codes of ``b`` bits take ``ceil(parts * b / 8)`` bytes.

Rows stand in order and may be of two widths, the marked ones wide; :class:`Marks` says which, and how many stand
before a row, so its first byte is known. Eight codes of ``b`` bits fill exactly ``b`` bytes: a row of either width is
read as one unaligned 8-byte word per eight codes and taken apart by shifts.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .sparse import popcount
from .tables import take

WORD = 8                               # bytes read at once, and codes found in them
RECORD = 5                             # int64 per 256 ids: four words of marks, and a running count for each of them


class Marks(nn.Module):
    """One bit per id and how many are set before it, in records of 320 bits per 256 ids: 1.25 bits per id.

    A record ends with a header: marks before the record from bit 24 up, below it three bytes with the marks within
    the record before its second, third and fourth word. What an id needs lies in at most two cache lines.
    """

    def __init__(self, n: int, device=None):
        super().__init__()
        self.register_buffer("records", torch.zeros(-(-n // 256) * RECORD, dtype=torch.int64, device=device))

    def fill(self, ids: Tensor) -> None:
        """Mark the sorted distinct ``ids [k]``."""
        record = self.records.view(-1, RECORD)
        # distinct bits of one word add up without carry, so addition is an or (bit 63 wraps to the sign)
        self.records.index_add_(0, (ids >> 8) * RECORD + (ids >> 6 & 3), torch.ones_like(ids) << (ids & 63))
        within = popcount(record[:, :4]).cumsum(1)
        before = within[:, 3].cumsum(0) - within[:, 3]
        record[:, 4] = before << 24 | (within[:, :3] << 8 * torch.arange(3, device=ids.device)).sum(1)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many marked ids stand before each of ``ids``, and whether it is marked itself (0 or 1)."""
        first, word = (ids >> 8) * RECORD, ids >> 6 & 3
        own, header = take(self.records, first + word), take(self.records, first + 4)
        shifted = own >> (ids & 63)
        own &= (torch.ones_like(ids) << (ids & 63)) - 1
        return (header >> 24) + (header << 8 >> 8 * word & 255) + popcount(own), shifted & 1


class PackedCodes(nn.Module):
    """``rows`` rows of ``parts`` codes of ``bits`` bits, ``wide`` of them of ``wide_bits`` bits (1 to 8 each).

    Where two widths are used, ``before [...]`` and ``marked [...]`` (0 or 1) of :meth:`Marks.locate` go with the rows.
    """

    def __init__(self, rows: int, parts: int, bits: int, wide: int = 0, wide_bits: int = 8, device=None):
        super().__init__()
        if not 1 <= bits <= wide_bits <= 8 or parts < 1:
            raise ValueError(f"bits={bits}, wide_bits={wide_bits}, parts={parts}: expected 1 to 8 bits, the wide rows "
                             "not narrower, and at least one part")
        self.parts, self.bits, self.more = parts, bits, wide_bits - bits
        self.width = -(-parts * bits // 8)                               # bytes of a row
        self.extra = -(-parts * wide_bits // 8) - self.width             # and of a wide row besides
        # the last word may reach past the last row
        size = rows * self.width + wide * self.extra + WORD - 1
        self.register_buffer("bytes", torch.zeros(size, dtype=torch.uint8, device=device))

    def write(self, row: Tensor, codes: Tensor, before: Tensor | int = 0, wide: bool = False) -> None:
        """Store ``codes [m, parts]`` in distinct rows ``row [m]``, all of them wide or none."""
        bits, width = self.bits + wide * self.more, self.width + wide * self.extra
        groups = -(-self.parts // WORD)
        padded = codes.new_zeros(len(codes), groups * WORD, dtype=torch.int64)
        padded[:, :self.parts] = codes
        shift = bits * torch.arange(WORD, device=codes.device)
        word = (padded.view(-1, groups, WORD) << shift).sum(-1, keepdim=True)        # disjoint bits: a sum is an or
        content = word.view(torch.uint8)[..., :bits].reshape(len(codes), groups * bits)[:, :width]
        start = row * self.width + before * self.extra
        self.bytes[start[:, None] + torch.arange(width, device=row.device)] = content

    def read(self, row: Tensor, before: Tensor | None = None, marked: Tensor | None = None) -> Tensor:
        """Codes ``[..., parts]`` of rows ``row [...]``."""
        start, bits = row * self.width, row.new_full((1,), self.bits)
        if marked is not None:
            start, bits = start.add_(before, alpha=self.extra), (self.bits + marked * self.more)[..., None]
        if self.parts > WORD:                                            # one word for every eight codes
            start = start[..., None] + bits * torch.arange(-(-self.parts // WORD), device=row.device)
            bits = bits[..., None]
        windows = self.bytes.as_strided((len(self.bytes) - WORD + 1, WORD), (1, 1))
        word = take(windows, start).view(torch.int64)
        codes = word >> bits * torch.arange(min(self.parts, WORD), device=row.device)
        codes &= (torch.ones_like(bits) << bits) - 1
        return codes if self.parts <= WORD else codes.flatten(-2)[..., :self.parts]


def code_bytes(parts: int, bits: int) -> int:
    """Bytes of a row of ``parts`` codes of ``bits`` bits each."""
    return -(-parts * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes [m, parts]`` of 1 to 16 bits -> their bytes, uint8 [m, ceil(parts * bits / 8)]: lowest bits first, as
    faiss packs codes."""
    m, parts = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    single = (codes.to(torch.int32)[..., None] >> torch.arange(bits, device=codes.device) & 1).to(torch.uint8)
    width = code_bytes(parts, bits)
    single = torch.nn.functional.pad(single.view(m, -1), (0, 8 * width - parts * bits))
    return (single.view(m, width, 8) << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def unpack(content: Tensor, start: Tensor, parts: int, bits: int) -> Tensor:
    """Codes ``[..., parts]`` of the rows that begin at the bytes ``start [...]`` of ``content [l]``.

    They are uint8 for 1, 2, 4 and 8 bits, else int64. ``content`` ends at least 7 bytes behind the last row.
    """
    if bits in (1, 2, 4, 8):
        width = code_bytes(parts, bits)
        return apart(take(content.as_strided((len(content) - width + 1, width), (1, 1)), start), parts, bits)
    each = WORD if bits < 8 else WORD // 2                               # codes in one unaligned word of 64 bits
    at = bits * torch.arange(0, parts, each, device=start.device)
    windows = content.as_strided((len(content) - WORD + 1, WORD), (1, 1))
    word = take(windows, start[..., None] + (at >> 3)).view(torch.int64)
    codes = word >> (at & 7)[:, None] + bits * torch.arange(each, device=start.device)
    return codes.bitwise_and_((1 << bits) - 1).flatten(-2)[..., :parts]


def apart(rows: Tensor, parts: int, bits: int) -> Tensor:
    """Codes uint8 ``[..., parts]`` of packed ``rows [..., width]`` of 1, 2, 4 or 8 bits: no code crosses a byte."""
    if bits == 8:
        return rows
    byte = torch.arange(256, device=rows.device)[:, None]                # what each byte holds, as a table
    lines = (byte >> bits * torch.arange(8 // bits, device=rows.device) & (1 << bits) - 1).to(torch.uint8)
    return take(lines, rows.to(torch.int32)).flatten(-2)[..., :parts]


class Codes(nn.Module):
    """``rows`` rows of ``parts`` codes of ``bits`` bits (1 to 16), all of one width and in order."""

    def __init__(self, rows: int, parts: int, bits: int, device=None):
        super().__init__()
        if not 1 <= bits <= 16 or parts < 1:
            raise ValueError(f"bits={bits}, parts={parts}: expected 1 to 16 bits and at least one part")
        self.rows, self.parts, self.bits, self.width = rows, parts, bits, code_bytes(parts, bits)
        self.register_buffer("bytes", torch.zeros(rows * self.width + WORD - 1, dtype=torch.uint8, device=device))

    def write(self, start: int, content: Tensor) -> None:
        """Store packed rows ``content [m, width]`` (:func:`pack`) from row ``start`` on."""
        self.bytes[start * self.width:(start + len(content)) * self.width] = content.reshape(-1)

    def write_rows(self, row: Tensor, content: Tensor) -> None:
        """Store packed rows ``content [m, width]`` at distinct rows ``row [m]``."""
        self.bytes[:self.rows * self.width].view(self.rows, self.width).index_copy_(0, row, content)

    def read(self, row: Tensor) -> Tensor:
        """Codes ``[..., parts]`` of ``row [...]``, of the types of :func:`unpack`."""
        if self.bits in (1, 2, 4, 8):                                    # whole rows, which are gathered faster
            rows = self.bytes[:self.rows * self.width].view(self.rows, self.width)
            return apart(take(rows, row), self.parts, self.bits)
        return unpack(self.bytes, row * self.width, self.parts, self.bits)


class Bitstream(nn.Module):
    """``rows`` rows of ``parts`` codes of ``bits`` bits (1 to 32) end to end: a row may begin within a byte.

    ``rows`` is a multiple of 8, so that what is written begins and ends with a byte.
    """

    def __init__(self, rows: int, parts: int, bits: int, device=None):
        super().__init__()
        if not 1 <= bits <= 32 or parts < 1 or rows % 8:
            raise ValueError(f"rows={rows}, parts={parts}, bits={bits}: expected a multiple of 8 rows, 1 to 32 bits "
                             "and at least one part")
        self.rows, self.parts, self.bits = rows, parts, bits
        self.register_buffer("bytes", torch.zeros(rows * parts * bits // 8 + WORD - 1, dtype=torch.uint8,
                                                  device=device))

    def write(self, start: int, codes: Tensor) -> None:
        """Store ``codes [m, parts]`` from row ``start`` on, a multiple of 8; up to the next one the rest is zero."""
        eight = codes.new_zeros(-(-len(codes) // 8) * 8, self.parts, dtype=torch.int64)
        eight[:len(codes)] = codes
        at = self.bits * torch.arange(8 * self.parts, device=codes.device)               # of a code in its eight rows
        content = torch.zeros(len(eight) // 8, self.parts * self.bits + WORD, dtype=torch.uint8, device=codes.device)
        for byte in range(5):                                            # codes meet in bytes, with disjoint bits
            part = (eight.view(-1, 8 * self.parts) << (at & 7)) >> 8 * byte & 255
            content.index_add_(1, (at >> 3) + byte, part.to(torch.uint8))
        first = start * self.parts * self.bits // 8
        content = content[:, :self.parts * self.bits].reshape(-1)
        self.bytes[first:first + len(content)] = content

    def read(self, row: Tensor) -> Tensor:
        """Codes int64 ``[..., parts]`` of ``row [...]``."""
        at = (row * self.parts)[..., None]
        at = (at + torch.arange(self.parts, device=row.device)) * self.bits
        word = take(self.bytes.as_strided((len(self.bytes) - WORD + 1, WORD), (1, 1)), at >> 3).view(torch.int64)
        return (word[..., 0] >> (at & 7)) & (1 << self.bits) - 1
