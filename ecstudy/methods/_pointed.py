"""What methods share that store ids of large fields as pointers or codes and leave small fields plain tables."""
from __future__ import annotations

from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..fields import derived
from ..method import Method
from ..tables import FloatTable, as_rows
from ._nearest import augmented, codes_of, loudest, scoring

FEW = 64                                 # shared rows that must save something, or a field stays whole
BLOCK = 1 << 15                          # ids coded at once, a multiple of 8


class Pointed(Method):
    """Fields that gain by it (``coded``) are stored in a way of their own, the others whole, as plain tables."""

    family = "inter-feature"

    def _lay_out(self, gains, align: int = 1) -> None:
        """``gains [F]``: which fields are coded. Their ids are numbered from ``start``, a multiple of ``align``."""
        size = np.array(self.fields.sizes, dtype=np.int64)
        coded, whole = np.flatnonzero(gains), np.flatnonzero(~np.asarray(gains))
        held = -(-size[coded] // align) * align
        self.numbers, self.left = int(held.sum()), int(size[whole].sum())        # ids coded, rows of the plain table
        derived(self, "coded", coded)
        derived(self, "whole", whole)
        derived(self, "order", np.argsort(np.concatenate([coded, whole])))
        derived(self, "start", np.cumsum(held) - held)
        derived(self, "whole_start", np.cumsum(size[whole]) - size[whole])

    def _plain(self) -> FloatTable | None:
        return FloatTable(self.left, self.dim, self.fields.bound()) if self.left else None

    def _numbered(self, ids) -> tuple[Tensor | None, Tensor | None]:
        """Numbers of the coded fields' ids [B, Fc], and rows of the table of the others [B, F - Fc]; None for none."""
        return (ids.index_select(1, self.coded) + self.start if len(self.coded) else None,
                ids.index_select(1, self.whole) + self.whole_start if len(self.whole) else None)

    def _joined(self, out: Tensor | None, whole: Tensor | None) -> Tensor:
        """Vectors of coded and of whole fields in the order of the fields."""
        if out is None or whole is None:
            return whole if out is None else out
        return torch.cat([out, whole], 1).index_select(1, self.order)

    def coded_fields(self) -> list[tuple[int, int, int]]:
        """Of every coded field its number of ids, the first of their numbers, and their first row in the full table."""
        field = self.coded.tolist()
        return [(self.fields.sizes[f], first, int(self.fields.offset[f]))
                for f, first in zip(field, self.start.tolist())]

    def _fill_plain(self, rows) -> None:
        """Copy the vectors of the fields left whole from a matrix of all fields."""
        for f, first in zip(self.whole.tolist(), self.whole_start.tolist()):
            size = self.fields.sizes[f]
            part = as_rows(rows, int(self.fields.offset[f]), size)
            self.table.weight.detach()[first:first + size] = part.to(self.table.weight.device)


def picked(rows, index: Tensor) -> Tensor:
    """Rows ``index [m]`` of a matrix (tensor, array, memory map) as float32, on the device of the index."""
    part = rows[index.to(rows.device)] if isinstance(rows, Tensor) else rows[index.cpu().numpy()]
    return as_rows(part, 0, len(part)).to(index.device)


def drawn(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, sorted; all of them if there are no more."""
    return torch.randperm(size, generator=generator)[:count].sort().values if count < size else torch.arange(size)


def lazy_zeros(*shape: int, dtype=np.float32) -> Tensor:
    """Zeros that on the CPU take memory only where they are written: torch.zeros writes every page at once."""
    device = torch.empty(0).device
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype)


def answers(linear: Tensor, less: Tensor) -> Tensor:
    """Weights of :func:`._nearest.loudest` for the responses ``x . linear [G, K, w] - less [G, K]``."""
    return torch.cat([linear, torch.zeros_like(less)[..., None], -less[..., None]], -1).transpose(1, 2).contiguous()


def best(x: Tensor, weights: Tensor) -> Tensor:
    """Which of one field's responses to ``x [m, w]`` is the loudest [m]: ``weights [1, w + 2, K]``."""
    field = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return loudest(augmented(x)[:, None], field, weights)[:, 0]


def nearest(vectors: Callable[[Tensor], Tensor], size: int, centroid: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A field's ids in blocks: ``(index [m], vectors(index) [m, C, w], nearest of centroid [C, K, w] as [m, C])``."""
    weights = scoring(centroid)
    for start in range(0, size, BLOCK):
        index = torch.arange(start, min(start + BLOCK, size), device=centroid.device)
        x = vectors(index)
        yield index, x, codes_of(x, torch.zeros_like(index), None, weights, centroid.shape[1])
