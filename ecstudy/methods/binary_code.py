r"""The bits of an id are cut into blocks; each block looks up a row of its own small table, and the rows are summed.

**Idea** (binary code based hash embedding; Yan et al., CIKM 2021, arXiv 2109.02471). An id of a field with $n_f$ ids
is a string of $S_f = \lceil \log_2 n_f \rceil$ bits. Cut into blocks $b_1, \ldots, b_B$ of at most $t$ bits, each
read as a number, it gives $e(i) = \sum_j T_j[b_j(i)]$: no two ids have all blocks in common, and two blocks of
$S_f / 2$ bits need about $2 \sqrt{n_f}$ rows. There are two forms: ``form="skip"`` deals the bits out in turns, so a
block has bits of every weight; ``form="succession"`` cuts runs of neighbouring bits, which is ``compo`` with powers of
two and a sum.

**Stored** the tables of all blocks and fields end to end: $2^t$ rows for a block of $t$ bits, fewer where no id has
its largest numbers; a field of at most $t$ bits keeps a row for every id. **Size** by ``bits`` $= t$, one block length
for all fields, so sizes are *discrete*: a step of $t$ about doubles them (23 sizes on Criteo, whose largest field has
24 bits). A budget is met by the next smaller one, at worst with half of it unused; the row says what was reached. The
paper has no control of size.

**Training** one stage, in place: three times what ships.

**Deviations** The paper's blocks have equal lengths and index one table. Then the ids $(a, b)$ and $(b, a)$ of two
blocks have one vector, so every block has rows of its own here (``shared=True`` is the paper's form). The remaining
$S_f \bmod t$ bits are a shorter block of the lowest bits, or of the first ones dealt; with $t$ above $S_f / 2$ this
gives the sizes between two equal blocks and the full table. Rows begin smaller by $\sqrt B$, so sums begin like rows
of the full table. Dealing out bits takes an operation on the batch for every bit.
"""
from __future__ import annotations

import math

import torch

from ..fields import derived
from ..method import Method
from ..tables import FloatTable


def length(n: int) -> int:
    """Bits of the ids below ``n``, at least 1."""
    return max(1, (n - 1).bit_length())


def place(bit, size, bits: int, form: str):
    """Where ``bit`` (int tensor) of an id of ``size`` bits stands in its code: the short block, then those of ``bits``.
    """
    blocks = -(-size // bits)
    short = size - (blocks - 1) * bits
    if form == "succession":
        return bit
    late = bit - short * blocks                              # once the short block is full, the others go on in turns
    block = torch.where(late < 0, bit % blocks, 1 + late % (blocks - 1).clamp(min=1))
    within = torch.where(late < 0, bit // blocks, short + late // (blocks - 1).clamp(min=1))
    return within + torch.where(block > 0, short + (block - 1) * bits, 0)


def block_rows(n: int, bits: int, form: str) -> list[int]:
    """Rows of each block of a field of ``n`` ids: as many as its numbers take values."""
    size = length(n)
    blocks = -(-size // bits)
    if blocks == 1:
        return [n]
    to = place(torch.arange(size, device="cpu"), torch.tensor(size, device="cpu"), bits, form).tolist()
    last, top = size - bits, 0
    for bit in reversed([b for b in range(size) if to[b] >= last]):      # the largest id with bits in the last block
        top |= (top | 1 << bit < n) << bit
    value = sum(1 << to[b] - last for b in range(size) if top >> b & 1)
    return [2 ** (last - (blocks - 2) * bits)] + [2 ** bits] * (blocks - 2) + [value + 1]


class BinaryCode(Method):
    knob = "bits"
    family = "inter-feature"
    paper = "arXiv 2109.02471"
    group = "hashing"
    space = r"\sum_f \lceil S_f / t \rceil\, 2^{t} d"
    time = r"O(d\, S / t)"

    def __init__(self, fields, dim, bits=None, form="skip", shared=False):
        super().__init__(fields, dim)
        if form not in ("skip", "succession"):
            raise ValueError(f"form={form!r}: expected 'skip' or 'succession'")
        self.bits, self.form, self.shared = -(-length(fields.largest) // 2) if bits is None else bits, form, shared
        if not 1 <= self.bits <= length(fields.largest):
            raise ValueError(f"bits={bits}: expected 1 to {length(fields.largest)}, the bits of the largest field")
        rows = [block_rows(size, self.bits, form) for size in fields.sizes]
        total = [max(r) if shared else sum(r) for r in rows]
        derived(self, "length", [length(size) for size in fields.sizes])
        derived(self, "blocks", [len(r) for r in rows])
        derived(self, "start", [sum(total[:f]) for f in range(len(total))])
        self.lookups = sum(map(len, rows))
        self.table = FloatTable(sum(total), dim, fields.bound())
        if not self.table.weight.is_meta:
            for part, r in zip(self.table.weight.detach().split(total), rows):
                if len(r) > 1:
                    part *= 1 / math.sqrt(len(r))

    @classmethod
    def sizes(cls, fields, dim, form="skip", shared=False, **options):
        found, most = [], 0
        for bits in range(1, length(fields.largest) + 1):
            rows = [block_rows(size, bits, form) for size in fields.sizes]
            if (total := sum(max(r) if shared else sum(r) for r in rows)) >= most:
                found, most = found + [bits], total
        return found

    def pairs(self):
        """Field and block of each look-up [P], the blocks of a field one after the other."""
        field = torch.repeat_interleave(self.blocks, output_size=self.lookups)
        return field, torch.arange(len(field), device=field.device) - (self.blocks.cumsum(0) - self.blocks)[field]

    def encode(self, ids):
        """Rows of all blocks of all fields [B, P]."""
        if self.form == "skip" and self.lookups > len(self.fields):
            code = torch.zeros_like(ids)
            for bit in range(length(self.fields.largest)):
                code |= (ids >> bit & 1) << place(self.length.new_tensor(bit), self.length, self.bits, self.form)
        else:
            code = ids
        field, block = self.pairs()
        short = (self.length - (self.blocks - 1) * self.bits)[field]
        before = torch.where(block > 0, short + (block - 1) * self.bits, 0)
        value = code[:, field] >> before & (1 << torch.where(block > 0, self.bits, short)) - 1
        if not self.shared:
            value = value + torch.where(block > 0, (1 << short) + (block - 1 << self.bits), 0)
        return value + self.start[field]

    def lookup(self, codes):
        rows = self.table.gather(codes)
        if rows.shape[1] == len(self.fields):
            return rows
        return rows.new_zeros(len(rows), len(self.fields), self.dim).index_add(1, self.pairs()[0], rows)
