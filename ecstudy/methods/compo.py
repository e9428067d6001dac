"""Two small tables whose rows are multiplied: every id has its own pair of quotient and remainder rows.

**Idea** (compositional or quotient-remainder embedding; Shi et al., KDD 2020, arXiv 1909.02107). With ``c`` ids per
quotient, id ``i`` takes quotient row ``i // r`` and remainder row ``i mod r``, ``r`` about ``c``; their element-wise
product is the embedding. No two ids of a field share both rows.

**Stored** quotient rows ``ceil(n_f / c)`` and remainder rows ``r_f = ceil(n_f / ceil(n_f / c))`` for each field. As
in the paper one real ``c`` serves all fields, and a field is left whole where two tables would not be smaller.
**Size** by ``rows``, the quotient rows of the largest field, so ``c = n_max / rows``: nearly continuous.
The smallest size is where all fields together have the fewest rows; below it the budget is unreachable.

**Training** one stage, in place.

**Deviations** The paper's code bisects an integer ``c`` and may end above the budget (50.0005 % at 50 %); here ``c`` is
real and the budget is a limit. The initial range of both tables is widened so that the *product* has the standard
deviation of the full table's rows; the published code gives both tables that range themselves, so products start near
1e-7 (``init="paper"``). ``combine="sum"`` adds instead of multiplying.
"""
from __future__ import annotations

import math

import numpy as np
import torch

from ..fields import derived
from ..method import Method
from ..tables import FloatTable


def split(sizes, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Quotient rows [F] and remainder rows [F] (0 where the field stays whole) at ``c`` ids per quotient row."""
    sizes = np.asarray(sizes)
    quotient = np.ceil(sizes / c).astype(np.int64)
    remainder = -(-sizes // quotient)
    whole = quotient + remainder >= sizes
    return np.where(whole, sizes, quotient), np.where(whole, 0, remainder)


class Compo(Method):
    knob = "rows"
    family = "inter-feature"
    paper = "arXiv 1909.02107"

    def __init__(self, fields, dim, rows=None, combine="product", init="matched"):
        super().__init__(fields, dim)
        if combine not in ("product", "sum"):
            raise ValueError(f"combine={combine!r}: expected 'product' or 'sum'")
        if init not in ("matched", "paper"):
            raise ValueError(f"init={init!r}: expected 'matched' or 'paper'")
        self.rows, self.combine = fields.largest if rows is None else rows, combine
        quotient, remainder = split(fields.sizes, fields.largest / self.rows)
        derived(self, "divisor", np.maximum(remainder, 1))
        derived(self, "quotient_start", np.cumsum(quotient) - quotient)
        derived(self, "remainder_start", np.where(remainder, np.cumsum(remainder) - remainder, 0))
        derived(self, "whole", remainder == 0, dtype=torch.bool)
        bound = fields.bound()
        if init == "matched":
            # product of two U(-s, s) has standard deviation s^2 / 3, sum of two s sqrt(2/3); the target is bound / sqrt(3)
            bound = math.sqrt(math.sqrt(3) * bound) if combine == "product" else bound / math.sqrt(2)
        self.quotient = FloatTable(int(quotient.sum()), dim, bound)
        self.remainder = FloatTable(max(int(remainder.sum()), 1), dim, bound)
        if init == "matched" and combine == "product" and not self.quotient.weight.is_meta:
            with torch.no_grad():                    # fields left whole are plain tables with the plain range
                for size, start, whole in zip(quotient, np.cumsum(quotient) - quotient, remainder == 0):
                    if whole:
                        self.quotient.weight[start:start + size] *= fields.bound() / bound

    @classmethod
    def sizes(cls, fields, dim, **options):
        # beyond this c more ids per quotient row cost more remainder rows than they save
        least = min(range(1, math.isqrt(fields.largest) + 2), key=lambda c: sum(map(np.sum, split(fields.sizes, c))))
        return range(-(-fields.largest // least), fields.largest + 1)

    def encode(self, ids):
        quotient = ids // self.divisor
        return torch.stack([quotient + self.quotient_start, ids - quotient * self.divisor + self.remainder_start], -1)

    def lookup(self, codes):
        quotient, remainder = self.quotient.gather(codes[..., 0]), self.remainder.gather(codes[..., 1])
        if self.combine == "sum":
            return quotient + remainder.masked_fill(self.whole[:, None], 0)
        return quotient * remainder.masked_fill(self.whole[:, None], 1)
