r"""A full table of 16-bit floats, trained in 16 bits with stochastic rounding.

**Idea** (Zhang, Yang & Yuen, Systems for ML workshop at NeurIPS 2018). A step reads the rows of the batch into float32,
updates them, and writes them back in half precision. Rounded to nearest, an update of less than half the distance
$\delta$ of neighbouring numbers is lost, always, and training stalls where $|\eta g| < 2^{-12} |w|$. Rounded up with
probability $(x - \lfloor x \rfloor_\delta) / \delta$, else down, it survives on average: $E[\hat x] = x$.

**Stored** ``n x D`` numbers of 16 bits: ``dtype="fp16"`` (10 bits of mantissa, up to 65,504) or ``"bf16"`` (7 bits,
the range of float32). **Size** has no argument: 50 %.

**Training** one stage. Moments are float32, so memory while training is 250 %. ``rounding="nearest"`` is what the idea
is held against. Trained vectors that are compressed are rounded to nearest.

**Deviations** Moments in float16 as well, or one per row, would bring training to 150 % and less; here they are as for
every other method. bfloat16 is our addition. A random number below $2^{13}$ (bfloat16: $2^{16}$) is added to the bits
of a float32, and as many bits are dropped; below $2^{-14}$, where float16 has fewer digits and rare ids of large logs
stay, steps of $2^{-24}$ are taken instead. Values beyond the range are cut to it.
"""
from __future__ import annotations

import torch

from ..method import Method
from ..tables import HalfTable
from ._posttrain import Streaming

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Fp16(Streaming, Method):
    family = "intra-feature"
    paper = "NeurIPS 2018 workshop"
    group = "quantisation"
    space = r"n d / 2"
    time = r"O(d)"

    def __init__(self, fields, dim, dtype="fp16", rounding="stochastic"):
        super().__init__(fields, dim)
        if dtype not in TYPES:
            raise ValueError(f"dtype={dtype!r}: expected 'fp16' or 'bf16'")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding={rounding!r}: expected 'stochastic' or 'nearest'")
        self.table = HalfTable(fields.n, dim, dtype=TYPES[dtype], stochastic=rounding == "stochastic",
                               bound=fields.bound())

    def put(self, start, block):
        self.table.put(start, block)

    def lookup(self, codes):
        return self.table.gather(codes)
