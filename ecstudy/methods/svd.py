r"""A matrix of vectors as the product of two narrow ones: its truncated singular value decomposition.

**Idea** (Eckart & Young, 1936; the SVD of arXiv 2311.15578, section 5.5). Of all matrices of rank $r$ the one nearest
to $X$ is $X V V^T$, with the $r$ leading right singular vectors in $V$. They are the leading eigenvectors of the
$d \times d$ Gram matrix $X^T X$.

**Stored** the coefficients $X V$, $n \times r$ float32, and the basis $V^T$, $r \times d$. **Size** by ``rank``.

**Training** none: trained vectors are compressed. One pass over the rows sums the Gram matrix, a second one projects.

**Deviations** The published code takes a randomised decomposition of the whole matrix in memory; the paper found that
too slow at 50 %. The Gram matrix is as exact as its double precision, and the matrix may be a file larger than memory.
Rank for budget is the paper's, $\lfloor b\,n d / (n + d) \rfloor$. All fields are one matrix with one basis, unlike
``small_dim``, which trains and has one per field.
"""
from __future__ import annotations

import torch

from ..tables import FloatTable
from ._posttrain import PostTraining, gram, leading


class Svd(PostTraining):
    knob = "rank"
    paper = "arXiv 2311.15578"
    group = "dimension reduction"
    space = r"n r + r d"
    time = r"O(r d)"

    def __init__(self, fields, dim, rank=None):
        super().__init__(fields, dim)
        self.rank = max(1, dim // 2) if rank is None else rank
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= dim:
            raise ValueError(f"rank={rank!r}: expected an integer, 1 <= rank <= {dim}")
        self.table = FloatTable(fields.n, self.rank, 0.0).requires_grad_(False)
        self.register_buffer("basis", torch.zeros(self.rank, dim))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    def learn(self, rows):
        self.basis.copy_(leading(gram(rows), self.rank))

    def put(self, start, block):
        self.table.weight.detach()[start:start + len(block)] = block.to(self.basis.device) @ self.basis.T

    def lookup(self, codes):
        return self.table.gather(codes) @ self.basis
