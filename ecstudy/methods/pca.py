r"""Vectors are rotated to their principal axes and cut to the first ones, around their mean.

**Idea** (Hotelling, 1933; for retrieval Zouhar et al., SpaNLP 2022, arXiv 2204.02906). With the mean $\mu$ of the rows
and the $r$ leading eigenvectors $V$ of their covariance, a row is $\mu + V V^T (x - \mu)$. Vectors of an encoder
have a mean far from zero, on which a decomposition without it spends its first axis. For ranking by inner product
the mean adds the same to the score of every passage, so the axes are left to what tells passages apart.

**Stored** $n \times r$ coefficients in float32, the axes $r \times d$, and the mean. **Size** by ``rank``.

**Training** none: trained vectors are compressed, in three passes over the rows (mean, covariance, projection).

**Deviations** ``center=False`` leaves out the mean, which is then the truncated decomposition of ``svd``. ``unit=True``
scales every vector that is looked up to norm one, as the authors do after compressing; for vectors of norm one only.
"""
from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ._posttrain import blocks, gram, leading
from .svd import Svd


class Pca(Svd):
    paper = "arXiv 2204.02906"
    space = r"n r + (r + 1) d"

    def __init__(self, fields, dim, rank=None, center=True, unit=False):
        super().__init__(fields, dim, rank)
        self.unit = unit
        self.register_buffer("mean", torch.zeros(dim) if center else None)

    def learn(self, rows):
        mean = None
        if self.mean is not None:
            mean = sum(block.double().sum(0).cpu() for _, block in blocks(rows)) / len(rows)
            self.mean.copy_(mean)
            mean = self.mean.cpu()                                    # as stored: what is left out is put back
        self.basis.copy_(leading(gram(rows, mean), self.rank))

    def put(self, start, block):
        block = block.to(self.basis.device)
        super().put(start, block if self.mean is None else block - self.mean)

    def lookup(self, codes):
        out = super().lookup(codes)
        if self.mean is not None:
            out += self.mean
        return normalize(out, dim=-1) if self.unit else out
