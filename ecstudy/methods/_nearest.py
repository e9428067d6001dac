"""Which centroid answers loudest: batched products over tiles of ids, and k-means on top of them.

Ids are cut into tiles of one field each and every tile is one product of fixed shape with its field's centroids, so
that an id gets the same code bit for bit in whatever company it is coded, and fields of few ids cost little padding.
"""
from __future__ import annotations

import torch
from torch import Tensor

TILE = 32                              # ids per product
CHUNK = 1 << 17                        # responses held at once: they stay in cache between product and arg-max


def scoring(key: Tensor, dot: bool = False, mean: Tensor | None = None, cov: Tensor | None = None) -> Tensor:
    """What :func:`augmented` sub-vectors are multiplied with: ``key [G, K, w]`` -> ``[G, w + 2, K]``.

    The response is minus the squared distance, or the product with ``dot``. Given ``mean [G, w + 1]`` and
    ``cov [G, w + 1, w + 1]`` of the sub-vectors and their squared length, every centroid's response is normalised to
    mean 0 and variance 1: a response is linear in those numbers, so its statistics follow from theirs.
    """
    square = torch.zeros_like(key[..., :1])
    if dot:
        linear, constant = torch.cat([key, square], -1), square
    else:
        # without normalisation the sub-vector's own length is the same for all centroids: left out, nothing cancels
        linear = torch.cat([2 * key, square if mean is None else square - 1], -1)
        constant = -key.square().sum(-1, keepdim=True)
    if mean is not None:
        variance = torch.einsum("gki,gij,gkj->gk", linear, cov, linear).clamp(min=0)
        # relative to the field's own scale, which is far below any fixed epsilon in the beginning
        variance = variance + 1e-5 * variance.mean(1, keepdim=True) + 1e-30
        linear = linear * variance.rsqrt()[..., None]
        constant = -(linear @ mean[..., None])
    return torch.cat([linear, constant], -1).transpose(1, 2).contiguous()


def augmented(x: Tensor) -> Tensor:
    """Sub-vectors ``[..., w]`` followed by their squared length and a one."""
    return torch.cat([x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)


class Tiles:
    """Ids with their field ``[m]`` (ascending) laid out in tiles of one field each."""

    def __init__(self, field: Tensor, fields: int):
        count = torch.bincount(field, minlength=fields)
        tiles = (count + TILE - 1) // TILE
        first = (tiles.cumsum(0) - tiles) * TILE - (count.cumsum(0) - count)
        self.place = torch.arange(len(field), device=field.device) + first.index_select(0, field)
        self.field = torch.repeat_interleave(torch.arange(fields, device=field.device), tiles)

    def pad(self, x: Tensor) -> Tensor:
        """``[m, parts, ...]`` -> ``[tiles * parts, TILE, ...]``."""
        out = x.new_zeros((len(self.field) * TILE,) + x.shape[1:]).index_copy(0, self.place, x)
        return out.view((-1, TILE) + x.shape[1:]).transpose(1, 2).flatten(0, 1)

    def unpad(self, x: Tensor, parts: int) -> Tensor:
        """``[tiles * parts, TILE, ...]`` -> ``[m, parts, ...]``."""
        return x.unflatten(0, (-1, parts)).transpose(1, 2).flatten(0, 1).index_select(0, self.place)

    def pairs(self, parts: int) -> Tensor:
        """Which (field, part) each of the ``tiles * parts`` products belongs to."""
        return (self.field[:, None] * parts + torch.arange(parts, device=self.field.device)).view(-1)


def loudest(x: Tensor, field: Tensor, weights: Tensor) -> Tensor:
    """Arg-max of the responses: ``x [m, parts, w + 2]``, ``weights [F * parts, w + 2, K]`` -> codes ``[m, parts]``."""
    parts = x.shape[1]
    if not len(x):
        return torch.zeros(0, parts, dtype=torch.int64, device=x.device)
    tiles = Tiles(field, len(weights) // parts)
    x, pair = tiles.pad(x), tiles.pairs(parts)
    codes = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    step = max(1, CHUNK // (TILE * weights.shape[2]))
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        codes[part] = torch.bmm(x[part], weights.index_select(0, pair[part])).argmax(-1)
    return tiles.unpad(codes, parts)


def codes_of(x: Tensor, field: Tensor, rare: Tensor | None, weights: Tensor, low: int) -> Tensor:
    """Codes ``[m, parts]`` of ``x [m, parts, w]``; ids marked ``rare [m]`` may use the first ``low`` centroids only."""
    x = augmented(x)
    if rare is None:
        return loudest(x, field, weights)
    out = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    for mine, allowed in ((~rare, weights), (rare, weights[..., :low].contiguous())):
        index = mine.nonzero().view(-1)
        found = loudest(x.index_select(0, index), field.index_select(0, index), allowed)
        out.index_copy_(0, index, found)
    return out


def lloyd(x: Tensor, rare: Tensor | None, weight: Tensor, high: int, low: int, *, iterations: int = 20,
          seed: int = 0) -> Tensor:
    """k-means of ``x [m, parts, w]`` in every part: centroids ``[parts, high, w]``; ``weight [m]`` per sub-vector."""
    m, parts, width = x.shape
    generator = torch.Generator(x.device).manual_seed(seed)
    part = torch.arange(parts, device=x.device)
    common = torch.arange(m, device=x.device)
    able = common if rare is None else (~rare).nonzero().view(-1)        # who may use the upper centroids
    able = able if len(able) else common

    def any_of(pool, count):
        order = torch.randperm(len(pool), generator=generator, device=x.device)
        return pool[order.repeat(-(-count // len(pool)))[:count]]        # distinct as far as there are enough

    centroid = x[torch.cat([any_of(common, low), any_of(able, high - low)])].transpose(0, 1).contiguous()
    field = torch.zeros(m, dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        place = (codes_of(x, field, rare, scoring(centroid), low) + part * high).view(-1)
        mass = x.new_zeros(parts * high).index_add_(0, place, weight.repeat_interleave(parts))
        total = x.new_zeros(parts * high, width).index_add_(0, place, (x * weight[:, None, None]).view(-1, width))
        fresh = torch.cat([any_of(common, low), any_of(able, high - low)])           # for centroids nobody uses
        fresh = x[fresh].transpose(0, 1).reshape(-1, width)
        centroid = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-30)[:, None], fresh)
        centroid = centroid.view(parts, high, width)
    return centroid
