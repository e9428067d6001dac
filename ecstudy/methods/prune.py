r"""The values of largest magnitude are kept, and all others are zero.

**Idea** (magnitude pruning, Han et al., NeurIPS 2015, arXiv 1506.02626; Pruning in arXiv 2311.15578, section 5.5).
A global threshold $t$ is set such that exactly ``kept`` values of the matrix have $|x| \ge t$.

**Stored** ``kept`` values in float32 and an index that finds them, in whichever form is about the lightest: at
dimension 768 one bit per element from a quarter of the table up, at a tenth a row pointer with a 16-bit column per
value, below it positions within groups. **Size** by ``kept``.

**Training** none: trained vectors are compressed, in three passes over the rows: two for the threshold, one to keep.

**Deviations** The threshold is an exact k-th value from two histograms over the bits of the numbers, instead of a
bisection between 0 and 100. The paper takes CSR down to three values per row and COO below, which looks for an id among
all positions (1.33 s for a batch at 0.1 %); here every form touches only the rows asked for. ``form`` names one of
``bitmask``, ``packed_csr``, ``csr``, ``grouped8``, ``grouped16`` and ``coo``. The matrix is not changed; the published
code overwrites it.
"""
from __future__ import annotations

import torch

from ..select import among, kth_of
from ..sparse import SparseTable
from ._posttrain import PostTraining, blocks


class Prune(PostTraining):
    knob = "kept"
    aware = "importance"
    paper = "arXiv 1506.02626"
    group = "pruning"
    space = r"k + \min(5 n d / 128,\ n + k / 2,\ k / 2 + n d / 2^{16})"
    time = r"O(d + \log k)"

    def __init__(self, fields, dim, kept=None, form=None):
        super().__init__(fields, dim)
        cells = fields.n * dim
        self.kept = cells // 10 if kept is None else kept
        if not 0 <= self.kept <= cells:
            raise ValueError(f"kept={self.kept}: expected 0 <= kept <= {cells} values")
        self.table = SparseTable(fields.n, dim, self.kept, form)
        self.table.values.requires_grad_(False)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(0, fields.n * dim + 1)

    def learn(self, rows):
        threshold, ties = float("inf"), 0
        if self.kept:
            threshold, ties = kth_of(lambda: (block.cpu().reshape(-1) for _, block in blocks(rows)), self.kept)
        # of values equal to the threshold the first ones win; place: values stored so far
        self.state = {"threshold": torch.tensor(threshold), "ties": torch.tensor(ties), "place": torch.tensor(0)}

    def put(self, start, block):
        ties, place = int(self.state["ties"]), int(self.state["place"])
        flat = block.to(self.table.values.weight.device).reshape(-1)
        keep, left = among(flat.abs(), self.state["threshold"].item(), ties)
        keys = keep.nonzero().view(-1)
        self.table.put(start, len(block), keys + start * self.dim, flat[keys], place)
        self.state |= {"ties": torch.tensor(left), "place": torch.tensor(place + len(keys))}

    def lookup(self, codes):
        return self.table.gather(codes)

    def allocation(self):
        return self.table.per_row()
