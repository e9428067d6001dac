"""Distinct ids of a batch, laid out per field, so that work done per field becomes one batched product.

The ids of a batch repeat (a third of them are distinct at 2,048 rows): what is expensive per id is done once.
"""
from __future__ import annotations

import torch
from torch import Tensor


class PerField:
    """Distinct rows of ``row [...]`` (rows of the full table), grouped by the field they belong to.

    Attributes
    ----------
    unique: Tensor
        Distinct rows [U], sorted.
    inverse: Tensor
        Place of each of ``row [...]`` in ``unique``.
    count: Tensor
        Occurrences of each distinct row [U].
    field: Tensor
        Which of the fields (a place in ``start``) each distinct row belongs to [U].
    slot: Tensor
        Its place within its field [U]; ``width`` is the largest number of distinct rows in a field.
    """

    def __init__(self, row: Tensor, start: Tensor):
        """``start [F]``: first row of each field, ascending."""
        self.unique, self.inverse, self.count = torch.unique(row, return_inverse=True, return_counts=True)
        self.fields = len(start)
        self.field = torch.bucketize(self.unique, start, right=True) - 1
        first = torch.searchsorted(self.unique, start)
        self.slot = torch.arange(len(self.unique), device=row.device) - first.index_select(0, self.field)
        self.width = int(self.slot.max()) + 1 if len(self.unique) else 0

    def pad(self, x: Tensor) -> Tensor:
        """``x [U, ...]`` -> ``[F, width, ...]``, zeros where a field has fewer distinct rows."""
        out = x.new_zeros((self.fields * self.width,) + x.shape[1:])
        out = out.index_copy(0, self.field * self.width + self.slot, x)
        return out.view((self.fields, self.width) + x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """``x [F, width, ...]`` -> ``[U, ...]``."""
        return x.flatten(0, 1).index_select(0, self.field * self.width + self.slot)
