r"""Blocks of consecutive rows of a trained table that are nearly equal are stored once and then tuned.

**Idea** (Zhou et al., PVLDB 2022, arXiv 2201.10442; benchmarked in arXiv 2311.15578). The table of all fields is cut
into $N = \lceil n / b \rceil$ blocks $x_i$ of $b$ rows. Two blocks are duplicates where at least a share $s$ of their
elements differ by no more than $\epsilon$. Candidates come from hashing:
$h_j(x) = \lceil (a_j \cdot x + t_j) / r \rceil$ with normal $a_j$ and $t_j$ uniform in $[0, r]$ is likely to be equal
for blocks whose distance is small against $r$. Blocks are visited by ascending 75th percentile of their elements, and
a later one gives way to the most similar earlier one. Rows that were never trained differ by less than trained ones,
so the rare ids of a log go first.

**Stored** ``kept`` blocks of $b \times D$, and the block that stands for each of the $N$, in the smallest integers
that can hold it. Row $i$ is found at $b \cdot map[i\,/\!/\,b] + i \bmod b$. **Size** by ``kept``; budgets below one
block and the map are unreachable.

**Training** two stages: the full table until validation stops improving, so 300 % whatever the budget; then, with the
blocks shared, everything once more, by a fresh optimiser. The search for duplicates takes about twenty seconds of one
core at Criteo's 33.8 million rows.

**Deviations** The study's blocks have 10,000 rows (``block=10000``), which leaves 3 blocks at 0.1 % of Criteo; here
there are 65,536 blocks at most, so $b$ is 516 on Criteo. Its thresholds are fixed ($\epsilon = 0.01$, $s = 0.7$,
$r = 0.09$), fit its initial values and block size, and were tuned by hand for every budget, which is missed where too
few duplicates are found. Here $\epsilon$ begins at a thirty-second of the root mean square of the table and grows by
half from round to round, with $r = \epsilon \sqrt{b D}$, until exactly ``kept`` blocks remain; in the last round the
most similar pairs go first. Compressing a given matrix reads blocks from it as they are needed. Small blocks can
afford less difference than large ones: with $s = 0.7$ a frequent id among five rows is lost, so ``similarity`` is 0.9
(on the sample of Criteo, by validation rows). The 90 projections are joined to 30 keys of three, because single ones
put most blocks of a large table into the same buckets; of a bucket a block meets the first one and the one before it,
the nearest by the projections is compared element by element, and so is the end of a chain of replacements. The dense
optimiser begins afresh in the second stage.
"""
from __future__ import annotations

import torch
from torch import nn

from ..method import Method
from ..sparse import smallest_int
from ..tables import FloatTable, take
from ._duplicates import Blocks, distinct
from ._posttrain import blocks as matrix_blocks

MOST = 65_536                                        # blocks of a table, unless told


class Dedup(Method):
    knob = "kept"
    family = "inter-feature"
    paper = "arXiv 2201.10442"
    group = "deduplication"
    space = r"k b d + \lceil n / b \rceil"
    time = r"O(d)"

    fits_deployed = True

    def __init__(self, fields, dim, kept=None, block=None, similarity=0.9):
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

    @torch.no_grad()
    def fit(self, rows):
        for _ in matrix_blocks(rows):                                 # a row that is not finite is named
            pass
        if self.map is None:
            self._shapes(self.table.weight.device)
        self.take(Blocks(rows, self.block))

    def collapse(self) -> None:
        """Replace the table by its distinct blocks and the map to them."""
        if self.map is not None:
            return
        weight = self.table.weight.detach()
        self._shapes(weight.device)
        if not weight.is_meta:
            self.take(Blocks(weight, self.block))

    def take(self, blocks: Blocks) -> None:
        """Keep the distinct ones of ``blocks``."""
        chosen, place = distinct(blocks, self.kept, self.similarity)
        self.map.copy_(place)
        rows = self.table.weight.detach().view(self.kept, -1)
        for part, numbers in zip(blocks.parts(torch.arange(self.kept, device=blocks.device)), blocks.parts(chosen)):
            rows[part.to(rows.device)] = blocks.take(numbers).to(rows.device)

    def _shapes(self, device) -> None:
        with torch.device("meta"):
            self.table = FloatTable(self.kept * self.block, self.dim, 0.0)
        self.table.weight = nn.Parameter(torch.empty(self.table.shape, device=device))
        self.map = torch.zeros(self.blocks, dtype=smallest_int(self.kept - 1), device=device)

    @staticmethod
    def _expect(module, state, prefix, *_) -> None:
        # what was saved after the collapse and before deployment
        if f"{prefix}map" in state and module.map is None:
            module._shapes(module.table.weight.device)

    def deploy(self):
        self.collapse()
        return super().deploy()
