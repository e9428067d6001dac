"""Seeded batches of a prepared data set, from memory maps or from memory."""
from __future__ import annotations

from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from ..data.layout import Dataset

IN_MEMORY = 1 << 31                      # bytes of a split that are held as tensors on the device


class Batches:
    """Batches (ids int64 [B, F], dense float32 [B, K], label float32 [B]) of one split.

    Training order is a fresh permutation every epoch, seeded and the same on every device; as in the paper's code an
    incomplete last batch is left out (unless it is the only one). Evaluation runs in file order over all rows.
    A ``group`` of processes (:mod:`.distributed`) draws the same batches, and each process takes its slice of them.
    """

    def __init__(self, dataset: Dataset, split: str, batch: int, device="cpu", seed: int = 0, group=None):
        self.split = dataset.split(split)
        self.rows = len(self.split)
        if not self.rows:
            raise ValueError(f"{dataset.name}: the {split} split has no rows; prepare the data with other fractions")
        self.batch, self.device, self.seed = min(batch, self.rows), device, seed
        self.part = group.part if group is not None else lambda index: index
        self.share = group.share(self.batch) if group is not None else 1.0        # of a batch's rows, taken here
        arrays = (self.split.ids, self.split.dense, self.split.label)
        self.tensors = None
        if sum(array.nbytes for array in arrays) <= IN_MEMORY:
            self.tensors = [torch.from_numpy(np.array(array)).to(device) for array in arrays]

    def __len__(self) -> int:
        return self.rows // self.batch

    def _load(self, index) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by a slice or a permutation part."""
        if self.tensors is not None:
            index = index.to(self.device) if isinstance(index, Tensor) else index
            ids, dense, label = (tensor[index] for tensor in self.tensors)
        else:
            index = index.numpy() if isinstance(index, Tensor) else index
            ids, dense, label = (torch.from_numpy(np.array(array[index])).to(self.device)
                                 for array in (self.split.ids, self.split.dense, self.split.label))
        return ids.long(), dense, label.float()

    def epochs(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless training batches, epoch after epoch, without the first ``skip`` batches."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(self.rows, generator=generator)
            for number in range(len(self)):
                if skip:
                    skip -= 1
                    continue
                start = number * self.batch
                yield self._load(self.part(order[start:start + self.batch]))

    def once(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows once, in file order; or of their batches every ``every``-th one from ``first`` on."""
        for start in range(first * self.batch, self.rows, every * self.batch):
            yield self._load(slice(start, start + self.batch))
