"""Categorical fields laid end to end, so that one gather serves all of them (no loop over fields)."""
from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor, nn


class Fields(nn.Module):
    """Sizes and offsets of ``F`` fields whose ids arrive as ``[B, F]``, local to each field.

    The tensors follow from the cardinalities alone, so they are derived state: on the CPU even while a method is
    built on the ``meta`` device, moved with the module, never saved and never weighed.

    Parameters
    ----------
    num_embeddings:
        Cardinality of each field, or one int for a single anonymous field with ids of any shape.
    bound:
        Initial range, where these are parts of larger fields (default: :meth:`bound` of the cardinalities).

    Raises
    ------
    ValueError
        If there is no field or a cardinality is not a positive int.
    """

    def __init__(self, num_embeddings: int | Sequence[int], bound: float | None = None):
        super().__init__()
        self.single = isinstance(num_embeddings, int)
        sizes = (num_embeddings,) if self.single else tuple(int(n) for n in num_embeddings)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"num_embeddings={num_embeddings!r}: expected a positive cardinality, or a list of them")
        self.sizes = sizes
        self.n = sum(sizes)                          # rows of the full table
        self.largest = max(sizes)
        self.range = bound or math.sqrt(1 / self.largest)
        derived(self, "size", sizes)
        derived(self, "offset", [sum(sizes[:f]) for f in range(len(sizes))])

    def __len__(self) -> int:
        return len(self.sizes)

    def bound(self) -> float:
        """The study's common initial range U(-b, b), b = sqrt(1 / largest cardinality) (paper's code, base.py)."""
        return self.range

    def check(self, ids: Tensor) -> None:
        """Raise IndexError for ids outside their field. On a GPU the gather itself checks: no synchronisation."""
        if ids.dim() != 2 or ids.shape[1] != len(self.sizes):
            raise ValueError(f"ids of shape {tuple(ids.shape)}: expected [B, {len(self.sizes)}], one id per field")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids of type {ids.dtype}: expected integers")
        if ids.device.type != "cpu" or not ids.numel():
            return
        low, high = ids.amin(0), ids.amax(0)
        if bool(((low < 0) | (high >= self.size)).any()):
            field = int(((low < 0) | (high >= self.size)).nonzero()[0])
            value = int(low[field] if low[field] < 0 else high[field])
            raise IndexError(f"id {value} in field {field}: expected 0 <= id < {self.sizes[field]}; "
                             "unknown ids belong on a reserved row, which `ecstudy prep` assigns")

    def flat(self, ids: Tensor) -> Tensor:
        """Local ids [B, F] -> rows of the table that holds all fields one after the other [B, F]."""
        return ids + self.offset

    def of(self, row: Tensor) -> Tensor:
        """Field of each row [...] of the table that holds all fields one after the other, int64 [...]."""
        return torch.bucketize(row, self.offset.to(row.device), right=True) - 1


def derived(module: nn.Module, name: str, values, dtype=torch.int64) -> None:
    """Register a small tensor that follows from the arguments: real even on ``meta`` builds, not saved."""
    module.register_buffer(name, torch.tensor(values, dtype=dtype, device="cpu"), persistent=False)
