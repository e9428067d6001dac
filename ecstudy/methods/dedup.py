r"""Blocks of rows that are nearly equal are stored once."""
from __future__ import annotations

import torch
from torch import nn

from ..method import Method
from ..sparse import smallest_int
from ..tables import FloatTable, take
from ._duplicates import Blocks, distinct

MOST = 65_536                                        # blocks of a table, unless told


class Dedup(Method):
    knob = "kept"
    family = "inter-feature"
    paper = "arXiv 2201.10442"
    group = "deduplication"
    space = r"k b d + \lceil n / b \rceil"
    time = r"O(d)"

    def __init__(self, fields, dim, kept=None, block=None, similarity=0.7):
        super().__init__(fields, dim)
        self.block = -(-fields.n // MOST) if block is None else block
        if not 1 <= self.block <= fields.n:
            raise ValueError(f"block={block}: expected 1 to {fields.n} rows, the rows of the table")
        self.blocks = -(-fields.n // self.block)
        self.kept = self.blocks if kept is None else kept
        if not 1 <= self.kept <= self.blocks:
            raise ValueError(f"kept={kept}: expected 1 to {self.blocks} blocks of {self.block} rows")
        if not 0 < similarity <= 1:
            raise ValueError(f"similarity={similarity}: expected the share of nearly equal elements, in (0, 1]")
        self.similarity = similarity
        self.table = FloatTable(fields.n, dim, fields.bound())
        self.register_buffer("map", None)
        self.register_load_state_dict_pre_hook(self._expect)

    @classmethod
    def sizes(cls, fields, dim, block=None, **options):
        return range(1, -(-fields.n // (block or -(-fields.n // MOST))) + 1)

    def encode(self, ids):
        flat = self.fields.flat(ids)
        if self.map is None:
            return flat
        if self.block == 1:
            return take(self.map, flat).long()
        number = flat // self.block
        return flat + (take(self.map, number) - number) * self.block

    def lookup(self, codes):
        return self.table.gather(codes)

    def schedule(self, run):
        yield from run.fit("warm-up", shared="full")
        with torch.no_grad():
            self.collapse()
        yield from run.fit("fine-tune")

    def fit(self, rows):
        self.table.load(rows)

    def collapse(self) -> None:
        """Replace the table by its distinct blocks and the map to them."""
        if self.map is not None:
            return
        weight = self.table.weight.detach()
        self._shapes(weight.device)
        if weight.is_meta:
            return
        blocks = Blocks(weight, self.block)
        chosen, place = distinct(blocks, self.kept, self.similarity)
        self.map.copy_(place)
        rows = self.table.weight.detach().view(self.kept, -1)
        for part, numbers in zip(blocks.parts(torch.arange(self.kept, device=weight.device)), blocks.parts(chosen)):
            rows[part] = blocks.take(numbers)

    def _shapes(self, device) -> None:
        with torch.device("meta"):
            self.table = FloatTable(self.kept * self.block, self.dim, 0.0)
        self.table.weight = nn.Parameter(torch.empty(self.table.shape, device=device))
        self.map = torch.zeros(self.blocks, dtype=smallest_int(self.kept - 1), device=device)

    def _expect(self, module, state, prefix, *_) -> None:
        # what was saved after the collapse and before deployment
        if f"{prefix}map" in state and self.map is None:
            self._shapes(self.table.weight.device)

    def deploy(self):
        self.collapse()
        return super().deploy()
