"""What the heads share: the contract, the multi-layer perceptron, and a linear part with one weight per hashed id.

Weights are Xavier-normal, biases zero, and there is no batch normalisation, as in the code of arXiv 2311.15578.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Turns x [B, F, D] and z [B, K] into logits [B]; ``ids`` [B, F] matter only where ``needs_ids`` is true.

    A subclass defines ``logits(x, z, ids)``. ``z`` may be None when ``dense`` is 0.
    """

    needs_ids = False

    def __init__(self, fields: int, dim: int, dense: int):
        super().__init__()
        for name, value, least in (("fields", fields, 1), ("dim", dim, 1), ("dense", dense, 0)):
            if value < least:
                raise ValueError(f"{name}={value}, expected at least {least}")
        self.fields, self.dim, self.dense = fields, dim, dense

    def forward(self, x: Tensor, z: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[1:] != (self.fields, self.dim):
            raise ValueError(f"embeddings of shape {tuple(x.shape)}, expected [batch, {self.fields}, {self.dim}]")
        if z is None:
            z = x.new_empty(len(x), 0)
        if z.shape != (len(x), self.dense):
            raise ValueError(f"dense values of shape {tuple(z.shape)}, expected [{len(x)}, {self.dense}]")
        if self.needs_ids and (ids is None or ids.shape != x.shape[:2]):
            got = "none" if ids is None else f"shape {tuple(ids.shape)}"
            raise ValueError(f"this head reads ids: got {got}, expected [{len(x)}, {self.fields}] as head(x, z, ids)")
        return self.logits(x, z, ids)

    def logits(self, x: Tensor, z: Tensor, ids: Tensor | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no logits(x, z, ids)")


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-normal weights, std sqrt(2 / (inputs + outputs)), and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_normal_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(*widths: int, end: type[nn.Module] | None = None) -> nn.Sequential:
    """Linear layers through ``widths`` with ReLU between them, and ``end`` (nn.ReLU) after the last if given."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [linear(inputs, outputs), nn.ReLU()]
    layers.pop()
    return nn.Sequential(*layers, *([end()] if end else []))


class HashedLinear(nn.Module):
    """Sum over fields of one weight per (field, id), hashed into ``size`` weights: ids [B, F] -> [B].

    The hash is 2-universal: h(f, i) = ((a_f i + b_f mod 2^64) >> 32) size / 2^32 with random 64-bit a_f, b_f
    (Dietzfelbinger 1996, multiply-shift). The gradient of ``weight`` is sparse, so a step costs the same at any size;
    an optimiser for sparse gradients finds the parameter by its attribute ``sparse_grad``. Weights start at zero:
    the part is linear, there is no symmetry to break, and an id never trained says nothing.
    """

    def __init__(self, fields: int, size: int):
        super().__init__()
        if not 1 <= size < 2**31:
            raise ValueError(f"wide_size={size}, expected 1 <= wide_size < 2**31")
        self.size = size
        self.weight = nn.Parameter(torch.zeros(size, 1))
        self.weight.sparse_grad = True
        low = torch.iinfo(torch.int64).min
        self.register_buffer("a", torch.randint(low, -low - 1, (fields,)))
        self.register_buffer("b", torch.randint(low, -low - 1, (fields,)))

    def __setstate__(self, state):                     # copy.deepcopy drops attributes of parameters
        super().__setstate__(state)
        self.weight.sparse_grad = True

    def slots(self, ids: Tensor) -> Tensor:
        """Index of the weight of each id: ids [B, F] -> int64 [B, F], 0 <= slot < size."""
        high = (ids.long() * self.a + self.b) >> 32 & 0xFFFFFFFF       # int64 wraps modulo 2^64
        return high * self.size >> 32

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding_bag(self.slots(ids), self.weight, mode="sum", sparse=True).squeeze(1)
