"""DLRM (Naumov et al., arXiv 1906.00091), with the widths of arXiv 2311.15578.

With dense values: a bottom perceptron K-512-256-64-D with ReLU after every layer, the last included; dot products of
all pairs among [its output; the F embeddings]; these and the bottom's output enter the top 512-256-1.
Without dense values: no bottom; only the pairwise dots of the embeddings enter the top.
Input of the top: (F+1)F/2 + D (Criteo, F=26, D=16: 367) or F(F-1)/2 (Avazu, F=22: 231).
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Head, mlp


class DLRM(Head):
    def __init__(self, fields: int, dim: int, dense: int):
        super().__init__(fields, dim, dense)
        vectors = fields + (dense > 0)
        if vectors < 2:
            raise ValueError("dlrm multiplies pairs of vectors and one field without dense values has none; "
                             "use wdl or dcn")
        self.bottom = mlp(dense, 512, 256, 64, dim, end=nn.ReLU) if dense else None
        row, column = torch.tril_indices(vectors, vectors, -1)
        self.register_buffer("pairs", row * vectors + column, persistent=False)
        self.top = mlp(len(self.pairs) + (dim if dense else 0), 512, 256, 1)

    def interact(self, x: Tensor) -> Tensor:
        """Dot products of all pairs of vectors: [B, V, D] -> [B, V(V-1)/2], strictly lower triangle by rows."""
        return torch.bmm(x, x.mT).flatten(1).index_select(1, self.pairs)

    def logits(self, x: Tensor, z: Tensor, ids: Tensor | None) -> Tensor:
        if self.bottom is None:
            return self.top(self.interact(x)).squeeze(1)
        z = self.bottom(z)
        dots = self.interact(torch.cat([z.unsqueeze(1), x], 1))
        return self.top(torch.cat([z, dots], 1)).squeeze(1)
