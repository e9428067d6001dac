"""Wide & Deep (Cheng et al., arXiv 1606.07792): a linear part plus a perceptron.

Both read u = [F*D embeddings; K dense values] (Criteo 429, Avazu 352). Deep: u-256-256-1. The logits are summed.

``wide="embeddings"`` (default): linear u -> 1 without bias, as in the code of arXiv 2311.15578; it sees no ids.
``wide="ids"``: the linear part of the original paper: one weight per id, hashed into ``wide_size`` weights shared by
all fields, and one per dense value. These weights are beside the embedding table and are not compressed.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .layers import HashedLinear, Head, linear, mlp


class WDL(Head):
    def __init__(self, fields: int, dim: int, dense: int, *, wide: str = "embeddings", wide_size: int = 2**18):
        super().__init__(fields, dim, dense)
        if wide not in ("embeddings", "ids"):
            raise ValueError(f"wide={wide!r}, expected 'embeddings' or 'ids'")
        self.needs_ids = wide == "ids"
        inputs = fields * dim + dense
        self.deep = mlp(inputs, 256, 256, 1)
        self.wide = linear(dense if self.needs_ids else inputs, 1, bias=False) if dense or not self.needs_ids else None
        self.wide_ids = HashedLinear(fields, wide_size) if self.needs_ids else None

    def logits(self, x: Tensor, z: Tensor, ids: Tensor | None) -> Tensor:
        u = torch.cat([x.flatten(1), z], 1)
        logit = self.deep(u).squeeze(1)
        if self.wide is not None:
            logit = logit + self.wide(z if self.needs_ids else u).squeeze(1)
        return logit + self.wide_ids(ids) if self.needs_ids else logit
