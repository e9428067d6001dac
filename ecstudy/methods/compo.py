"""Two small tables whose rows are multiplied: every id has its own pair of remainder and quotient rows.

**Idea** (compositional or quotient-remainder embedding; Shi et al., KDD 2020, arXiv 1909.02107). Id ``i`` of a field
takes row ``i mod m`` of one table and row ``i // m`` of the other; the element-wise product is the embedding. No two
ids of a field share both rows.

**Stored** ``m_f = ceil(n_f / c)`` remainder rows and ``ceil(n_f / m_f)`` quotient rows for each field. As in the
study one ``c``, ids per remainder row, serves all fields, and a field is left whole where two tables would not be
smaller. **Size** by ``rows``, the remainder rows of the largest field, so ``c = n_max / rows`` is nearly continuous.
The smallest size is where all fields together have the fewest rows; below it the budget is unreachable.

**Training** one stage, in place.

**Deviations** The study's code divides by an integer ``c`` (its large table is the quotient's), which at 50 % ends
above the budget (50.0005 %) and has nothing between 50 % and 33 %; dividing by ``m``, as the original does, meets a
budget closely and never exceeds it. The initial range of both tables is widened so that the *product* has the
standard deviation of the full table's rows; the published code gives both tables that range itself, so products start
near 1e-7 (``init="paper"``). ``combine="sum"`` adds instead of multiplying.
"""
from __future__ import annotations

import math

import numpy as np
import torch

from ..fields import derived
from ..method import Method
from ..tables import FloatTable


def split(sizes, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Remainder rows [F] and quotient rows [F] (0 where the field stays whole) at ``c`` ids per remainder row."""
    sizes = np.asarray(sizes)
    remainder = np.ceil(sizes / c).astype(np.int64)
    quotient = -(-sizes // remainder)
    whole = quotient + remainder >= sizes
    return np.where(whole, sizes, remainder), np.where(whole, 0, quotient)


class Compo(Method):
    knob = "rows"
    family = "inter-feature"
    paper = "arXiv 1909.02107"
    group = "hashing"
    space = r"\sum_f \left(m_f + \lceil n_f / m_f \rceil\right) d"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None, combine="product", init="matched"):
        super().__init__(fields, dim)
        if combine not in ("product", "sum"):
            raise ValueError(f"combine={combine!r}: expected 'product' or 'sum'")
        if init not in ("matched", "paper"):
            raise ValueError(f"init={init!r}: expected 'matched' or 'paper'")
        self.rows, self.combine = fields.largest if rows is None else rows, combine
        remainder, quotient = split(fields.sizes, fields.largest / self.rows)
        derived(self, "divisor", remainder)
        derived(self, "remainder_start", np.cumsum(remainder) - remainder)
        derived(self, "quotient_start", np.where(quotient, np.cumsum(quotient) - quotient, 0))
        derived(self, "whole", quotient == 0, dtype=torch.bool)
        plain = bound = fields.bound()
        if init == "matched":
            # product of two U(-s, s) has standard deviation s^2 / 3, sum of two s sqrt(2/3); wanted is plain / sqrt(3)
            bound = math.sqrt(math.sqrt(3) * plain) if combine == "product" else plain / math.sqrt(2)
        self.remainder = FloatTable(int(remainder.sum()), dim, bound)
        self.quotient = FloatTable(max(int(quotient.sum()), 1), dim, bound)
        if bound != plain and not self.remainder.weight.is_meta:
            for rows, end, whole in zip(remainder, np.cumsum(remainder), quotient == 0):
                if whole:                            # a field left whole is a plain table with the plain range
                    self.remainder.weight.detach()[end - rows:end] *= plain / bound

    @classmethod
    def sizes(cls, fields, dim, **options):
        # beyond this c the quotient rows cost more than the remainder rows save
        least = min(range(1, math.isqrt(fields.largest) + 2), key=lambda c: sum(map(np.sum, split(fields.sizes, c))))
        return range(-(-fields.largest // least), fields.largest + 1)

    def encode(self, ids):
        quotient = ids // self.divisor
        return ids - quotient * self.divisor + self.remainder_start, quotient + self.quotient_start

    def lookup(self, codes):
        remainder, quotient = self.remainder.gather(codes[0]), self.quotient.gather(codes[1])
        if self.combine == "sum":
            return remainder + quotient.masked_fill(self.whole[:, None], 0)
        return remainder * quotient.masked_fill(self.whole[:, None], 1)
