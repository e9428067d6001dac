"""A full table of 8- or 16-bit integers, trained in integers with stochastic rounding.

**Idea** (the study's INT8/INT16; stochastic rounding after Gupta et al., ICML 2015, arXiv 1502.02551). A number is
``code * scale``. A step decodes the rows of the batch, updates them in float32 and rounds them back at random, up
with probability equal to the fraction, so that small updates survive on average. There is no float copy of the table.

**Stored** ``n x D`` integers. **Size** by ``bits``, 8 or 16: 25 % or 50 % of the full table and nothing between. With
``scale="row"`` each row adds one bfloat16 scale (3.1 % at dimension 16), fitted whenever the row is written; with
``scale="dim"`` each column has one float32 scale, which compressing trained vectors fits to the column.

**Training** one stage. Moments are float32, so memory while training is 225 % or 250 %.

**Deviations** Each element draws its own random number; the published kernel re-uses one number for all elements of a
row (its generator is seeded with the row inside the loop), so its errors are fully correlated. The paper's one global
scale is 0.01 for both widths; it is kept for 8 bits (range -1.28 .. 1.27) and divided by 256 for 16 bits, where 0.01
would waste the width. A global scale is a constant of the specification, not a stored number; compressing trained
vectors fits it to their largest magnitude, where the study keeps 0.01 and rounds at random. Here the codes of trained
vectors are the nearest.
"""
from __future__ import annotations

import torch

from ..method import Method
from ..tables import IntTable
from ._posttrain import Streaming, blocks


class IntQuant(Streaming, Method):
    knob = "bits"
    family = "intra-feature"
    paper = "arXiv 1502.02551"
    group = "quantisation"
    space = r"b\,n d / 32"
    time = r"O(d)"

    def __init__(self, fields, dim, bits=8, scale=None):
        super().__init__(fields, dim)
        self.given, default = scale is not None, 0.01 * 2.0 ** (8 - bits)
        if scale is None:
            scale = default
        elif scale not in ("row", "dim"):
            scale = float(scale)
        self.bits = bits
        self.table = IntTable(fields.n, dim, bits=bits, scale=scale, bound=fields.bound(), first=default)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(8, 17, 8)

    def learn(self, rows):
        if self.table.by_row or self.given and self.table.constant is not None:
            return                                   # a row's scale is found when it is put
        # trained vectors have their own range: the largest value fits
        top = torch.zeros(self.dim)
        for _, block in blocks(rows):
            top = torch.maximum(top, block.cpu().abs().amax(0))
        if self.given:
            self.table.fit_columns(top)
        else:
            self.table.constant = max(float(top.max()), 1e-30) / self.table.top
            self.fitted = {"scale": self.table.constant}

    def put(self, start, block):
        self.table.put(start, block)

    def lookup(self, codes):
        return self.table.gather(codes)
