r"""Fields of many ids get narrow rows by a fixed power law, and a matrix per field lifts them to one dimension.

**Idea** (mixed dimension embedding, MDE; Ginart et al., ISIT 2021, arXiv 1909.11810). An id of a field with many ids
occurs seldom, so it is given fewer numbers: field $f$ with $n_f$ ids gets the width
$d_f = \lambda\, n_f^{-\alpha}$ with $\lambda = d_{top}\, (\min_g n_g)^{\alpha}$, so the smallest field has
width $d_{top}$ and the temperature $\alpha$ says how fast widths fall. An embedding is $e = v P_f$ with a row $v$
of width $d_f$ and a matrix $P_f$ of $d_f \times D$.

**Stored** the rows of all fields end to end, $\sum_f n_f d_f$ numbers, and a matrix per field that is narrower than
$D$. **Size** by ``alpha``: 0 leaves every field at ``top`` (default D), 1 is the narrowest. Widths are at least 1, so
one number per row (6.25 % at dimension 16) is the floor, and as they are powers of two few sizes exist between: at
Criteo's field sizes a budget of 10 % is met with 9.29 %, and one of 50 % with 42.5 %, as width 8 throughout takes
50.0008 % with its matrices. ``round="integer"`` allows every width.

**Training** one stage, in place: three times what ships.

**Deviations** As in the study's code the number of ids stands for popularity; no counts are read. A field whose rows
and matrix together would not be smaller keeps full width. Matrices start with standard deviation $1/\sqrt{d_f}$ and
rows in the study's common range, so embeddings start like those of the full table; the published code draws both from
$U(-b, b)$, so products start near 1e-7 (``init="paper"``). Of the temperatures that give the same widths the solver
takes one in the middle, so a budget is met as closely as widths allow, where bisection stops 0.001 short. ``fit``
takes the truncated singular value decomposition of each field.
"""
from __future__ import annotations

import math

import numpy as np
import torch

from ..method import Method
from ..tables import as_rows
from ._mixed import BLOCK, Mixed, useful


def power_law(sizes, alpha: float, top: int, rounding: str) -> list[int]:
    """Widths [F] at temperature ``alpha``, at least 1."""
    width = np.maximum(np.round(top * (min(sizes) / np.asarray(sizes, float)) ** alpha), 1)
    return [int(w) for w in (2 ** np.round(np.log2(width)) if rounding == "power" else width).clip(max=top)]


def temperatures(sizes, top: int, rounding: str) -> list[float]:
    """Temperatures in [0, 1], falling, one for each allocation of widths there is."""
    # the rounded law changes where top * (n_min / n)^alpha crosses k + 1/2 for some k
    ratio = np.array(sorted(set(sizes)), float)[1:] / min(sizes)
    breaks = [math.log(top / (k + 0.5)) / math.log(r) for r in ratio for k in range(1, top)]
    edges = sorted({0.0, 1.0, *(b for b in breaks if b < 1)}, reverse=True)
    found: dict[tuple, float] = {}
    for alpha in [1.0, *((a + b) / 2 for a, b in zip(edges, edges[1:])), 0.0]:
        widths = power_law(sizes, alpha, top, rounding)
        if tuple(widths) not in found:               # with as few digits as say the same
            short = (round(alpha, digits) for digits in range(2, 17))
            found[tuple(widths)] = next((a for a in short if power_law(sizes, a, top, rounding) == widths), alpha)
    return list(found.values())


class Mde(Method):
    knob = "alpha"
    family = "intra-feature"
    aware = "none"
    paper = "arXiv 1909.11810"
    group = "dimension allocation"
    space = r"\sum_f d_f (n_f + d), \; d_f = \lambda n_f^{-\alpha}"
    time = r"O(d_f d)"

    def __init__(self, fields, dim, alpha=None, top=None, round="power", init="matched"):
        super().__init__(fields, dim)
        self.alpha, self.top = 0.3 if alpha is None else alpha, dim if top is None else top    # 0.3: the authors'
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={alpha}: expected a temperature from 0 (all fields alike) to 1")
        if not 1 <= self.top <= dim:
            raise ValueError(f"top={top}: expected 1 <= top <= {dim}, the width of the smallest field")
        if round not in ("power", "integer"):
            raise ValueError(f"round={round!r}: expected 'power' (of two, as published) or 'integer'")
        if init not in ("matched", "paper"):
            raise ValueError(f"init={init!r}: expected 'matched' or 'paper'")
        widths = useful(fields.sizes, power_law(fields.sizes, self.alpha, self.top, round), dim)
        bound = fields.bound()
        self.rows = Mixed(fields.sizes, dim, widths, bound=bound)
        if init == "paper" and self.rows.narrow and not self.rows.projection.is_meta:
            torch.nn.init.uniform_(self.rows.projection, -bound, bound)

    @classmethod
    def sizes(cls, fields, dim, top=None, round="power", **options):
        return temperatures(fields.sizes, dim if top is None else top, round)

    def encode(self, ids):
        return self.rows.encode(ids)

    def lookup(self, codes):
        return self.rows.lookup(codes)

    def allocation(self):
        return self.rows.per_id()

    def fit(self, rows):
        for field, first in enumerate(self.fields.offset.tolist()):
            own, last = self.rows.rows(field), first + self.fields.sizes[field]
            parts = [(start, min(BLOCK, last - start)) for start in range(first, last, BLOCK)]
            basis = torch.eye(self.dim)
            if own.shape[1] < self.dim:                  # the leading directions of the field, by its Gram matrix
                gram = torch.zeros(self.dim, self.dim, dtype=torch.float64)
                for start, count in parts:
                    part = as_rows(rows, start, count).double()
                    gram += part.T @ part
                basis = torch.linalg.eigh(gram).eigenvectors[:, -own.shape[1]:].float()
                self.rows.lift(field).copy_(basis.T)
            for start, count in parts:
                own[start - first:start - first + count] = as_rows(rows, start, count) @ basis

    def deploy(self):
        if not self.deployed:
            self.rows.pack()
        return super().deploy()
