"""Deep & Cross (Wang et al., arXiv 1708.05123), with the widths of arXiv 2311.15578.

Both parts read u = [F*D embeddings; K dense values] (Criteo 429, Avazu 352). Cross, three layers of vector form:
x_(l+1) = x_0 (x_l . w_l) + x_l + b_l. Deep: u-256-256-256, the third layer linear. [cross; deep] -> 1.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Head, linear, mlp


class DCN(Head):
    def __init__(self, fields: int, dim: int, dense: int, *, cross_layers: int = 3):
        super().__init__(fields, dim, dense)
        inputs = fields * dim + dense
        self.cross = nn.ModuleList(linear(inputs, 1, bias=False) for _ in range(cross_layers))
        self.cross_bias = nn.ParameterList(torch.zeros(inputs) for _ in range(cross_layers))
        self.deep = mlp(inputs, 256, 256, 256)
        self.out = linear(inputs + 256, 1)

    def logits(self, x: Tensor, z: Tensor, ids: Tensor | None) -> Tensor:
        u = torch.cat([x.flatten(1), z], 1)
        v = u
        for weight, bias in zip(self.cross, self.cross_bias):
            v = torch.addcmul(v + bias, u, weight(v))
        return self.out(torch.cat([v, self.deep(u)], 1)).squeeze(1)
