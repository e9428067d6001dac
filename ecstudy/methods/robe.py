"""All vectors are blocks of one shared array, each block at a hashed place.

**Idea** (random offset block embedding; Desai et al., MLSys 2022, arXiv 2108.02191). The vector of an id is cut into
blocks of ``Z`` numbers; block ``c`` of id ``i`` begins at ``h(i, c) = ((A i + C c + D) mod P) mod (M - Z + 1)`` in an
array of ``M`` floats. Blocks may overlap anywhere, so any budget is met to within one number.

**Stored** the array ``[M]`` and the coefficients of the hash. **Size** by ``length`` = M. **Training** one stage; the
gradient is sparse in the touched numbers.

``block`` is Z as in the original (default: the embedding dimension, one contiguous run per id; it must divide the
dimension). ``sign=True`` multiplies each number by a hashed +1 or -1, as the original offers.

**Deviations** The paper's text calls Z the block length, its code uses Z as the *number* of pieces; here it is the
length. Ids are hashed by their row in the full table, so equal ids of different fields differ (the default of the
paper's code). A block never wraps around the end of the array.
"""
from __future__ import annotations

import torch

from ..method import Method
from ..tables import FloatArray

PRIME = 2038074743                       # the prime of the original's universal hash


class Robe(Method):
    knob = "length"
    family = "inter-feature"
    paper = "arXiv 2108.02191"
    group = "hashing"
    space = r"M"
    time = r"O(d)"

    def __init__(self, fields, dim, length=None, block=None, sign=False):
        super().__init__(fields, dim)
        self.block = dim if block is None else block
        if self.block < 1 or dim % self.block:
            raise ValueError(f"block={self.block}: expected a divisor of the embedding dimension {dim}")
        self.length, self.sign = fields.n * dim if length is None else length, sign
        if self.length < self.block:
            raise ValueError(f"length={self.length}: expected at least one block of {self.block}")
        self.array = FloatArray(self.length, fields.bound())
        # rows: place of a block, sign of a number; columns: factor of the id, of the position, offset
        self.register_buffer("hash", torch.randint(1, PRIME, (1 + sign, 3), dtype=torch.int64))

    @classmethod
    def sizes(cls, fields, dim, block=None, **options):
        return range(dim if block is None else block, fields.n * dim + 1)

    def place(self, row, which: int, position):
        """Universal hash of (row, position), below PRIME; all products stay below 2^63 for ids under 2^31."""
        factor, step, offset = self.hash[which].unbind()
        return (row[..., None] * factor % PRIME + (position * step + offset) % PRIME) % PRIME

    def encode(self, ids):
        row = self.fields.flat(ids)
        chunk = torch.arange(self.dim // self.block, device=ids.device)
        return row, self.place(row, 0, chunk) % (self.length - self.block + 1)

    def lookup(self, codes):
        row, start = codes
        x = self.array.blocks(start, self.block).flatten(-2)
        if self.sign:
            x = x * (self.place(row, 1, torch.arange(self.dim, device=row.device)) % 2 * 2 - 1)
        return x
