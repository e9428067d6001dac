"""Many small networks of one shape, computed as batched products: linear layers, each but the last normalised.

In training the statistics of a batch normalisation are those over all occurrences of an id, although each distinct id
is computed once: it is weighted by how often it occurs. For serving the normalisations are folded into the matrices.
"""
from __future__ import annotations

import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tables import FloatTable, Holder

MOMENTUM, EPS = 0.1, 1e-5
MISH_SQUARED = 0.4523                # mean square of mish(z) for a standard normal z


def runs(count: Sequence[int], slack: int) -> list[tuple[int, int, int]]:
    """Neighbouring groups of alike sizes as (first, last, largest): padding all to the largest adds at most ``slack``.

    Groups of ``slack`` more would cost less than computing them apart.
    """
    out, total = [], 0
    for place, size in enumerate(count):
        if out:
            first, _, largest = out[-1]
            wider = max(largest, size)
            if wider * (place + 1 - first) - total - size <= slack:
                out[-1], total = (first, place + 1, wider), total + size
                continue
        out.append((place, place + 1, size))
        total = size
    return out


def mish_(z: Tensor) -> Tensor:
    """Mish in place: ``z tanh(log(1 + e^z)) = z n / (n + 1)`` with ``n = e^z + e^2z / 2``, thrice as fast on a CPU."""
    if z.is_cuda:
        return F.mish(z, inplace=True)
    n = z.clamp(max=20).exp_()                       # beyond 20 the fraction is 1 in float32
    n.addcmul_(n, n, value=0.5)
    return z.mul_(n.div_(n + 1))


class Networks(nn.Module):
    """``number`` networks through layers of ``widths`` (input, hidden ..., output).

    Parameters
    ----------
    bound:
        Outputs start with the standard deviation of U(-bound, bound).
    plain:
        Draw all matrices from U(-bound, bound) instead.
    """

    def __init__(self, number: int, widths: Sequence[int], bound: float, plain: bool = False):
        super().__init__()
        self.number, self.widths = number, tuple(widths)
        hidden = (len(widths) - 2, number, 1, widths[1])             # of all hidden layers at once
        self.weights = nn.ParameterList(torch.empty(number, out, put) for put, out in zip(widths, widths[1:]))
        self.scale, self.shift = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(number, 1, widths[-1]))
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("var", torch.ones(hidden))
        self.tables: nn.ModuleList | None = None                     # the matrices once folded
        for place, weight in enumerate(self.weights):
            last = place == len(self.weights) - 1
            # standard deviation 1 / sqrt(in): inputs of the last matrix have mean square MISH_SQUARED
            limit = (bound / math.sqrt(MISH_SQUARED) if last else math.sqrt(3)) / math.sqrt(weight.shape[2])
            if not weight.is_meta:
                nn.init.uniform_(weight, -(bound if plain else limit), bound if plain else limit)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Matrices [number, out, in] and biases [number, 1, out] that serve, normalisations folded in."""
        if self.tables is not None:
            matrices = [_matrix(table).view(self.number, -1, put) for table, put in zip(self.tables, self.widths)]
            return list(zip(matrices, [*self.shift, self.bias]))
        scale = self.scale * torch.rsqrt(self.var + EPS)
        matrices = [weight * s.transpose(1, 2) for weight, s in zip(self.weights, scale)]
        return list(zip([*matrices, self.weights[-1]], [*(self.shift - self.mean * scale), self.bias]))

    def fold(self) -> None:
        """Keep what serves only: matrices in tables, which can be quantised row by row, and biases."""
        layers = self.layers()
        self.tables = nn.ModuleList(_table(matrix.detach().flatten(0, 1)) for matrix, _ in layers)
        self.shift = nn.Parameter(torch.stack([bias.detach() for _, bias in layers[:-1]]), requires_grad=False)
        self.bias.requires_grad_(False)
        del self.weights, self.scale, self.mean, self.var

    def learn(self, x: Tensor, share: Tensor, rows: int, place: slice, matrices: Sequence[Tensor]) -> Tensor:
        """Outputs of the networks ``place`` [m, w, out], normalised over the batch; running statistics are updated.

        ``x [m, w, in]``; ``share [m, 1, w]`` of each input among the ``rows`` of the batch, 0 for padding.
        """
        means, variances = [], []
        for layer, matrix in enumerate(matrices[:-1]):
            z = torch.bmm(x, matrix.transpose(1, 2))
            mean = torch.bmm(share, z)
            z = z - mean
            var = torch.bmm(share, z.square())
            x = F.mish(torch.addcmul(self.shift[layer, place], z, self.scale[layer, place] * torch.rsqrt(var + EPS)))
            means.append(mean.detach())
            variances.append(var.detach())
        self.mean[:, place].lerp_(torch.stack(means), MOMENTUM)
        self.var[:, place].lerp_(torch.stack(variances) * (rows / max(rows - 1, 1)), MOMENTUM)
        return torch.baddbmm(self.bias[place], x, matrices[-1].transpose(1, 2))


def infer(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs [m, w, out] of networks with folded ``layers`` for ``x [m, w, in]``."""
    for matrix, bias in layers[:-1]:
        x = torch.baddbmm(bias, x, matrix.transpose(1, 2))
        x = F.mish(x) if x.requires_grad else mish_(x)
    return torch.baddbmm(layers[-1][1], x, layers[-1][0].transpose(1, 2))


def _matrix(table: Holder) -> Tensor:
    """All rows of a table: as they are, or decoded."""
    return table.weight if isinstance(table, FloatTable) else table.read(torch.arange(len(table.codes),
                                                                                     device=table.codes.device))


def _table(rows: Tensor) -> FloatTable:
    with torch.device("meta"):
        table = FloatTable(*rows.shape, 0.0)
    table.weight = nn.Parameter(rows.contiguous(), requires_grad=False)
    return table
