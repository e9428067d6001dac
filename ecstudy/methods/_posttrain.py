"""What compressors of trained vectors share: rows are read in blocks, learned from, and put into what ships.

::

    class Mine(PostTraining):
        def learn(self, rows)           what all rows have in common: bases, codebooks, thresholds
        def put(self, start, block)     rows [start, start + len(block)) of the matrix, one call after the other

A module has the shapes of what ships from the start, zeros until it is fitted, and ``learn`` and ``put`` write in
place: the tensors may lie in a file that is larger than memory (:func:`ecstudy.rag.store.compress_file`).
"""
from __future__ import annotations

from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from ..memory import memory
from ..method import Method
from ..tables import as_rows

ELEMENTS = 1 << 22                      # numbers of a block, 16 MiB
ALIGN = 64                              # blocks begin at multiples of so many rows


def block_rows(dim: int) -> int:
    """Rows of a block of ``dim`` columns; the same everywhere, so that the same rows always give the same codes."""
    return max(ALIGN, ELEMENTS // dim // ALIGN * ALIGN)


def blocks(rows, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """A matrix [n, D] (tensor, array, memory map) in blocks of float32 rows, each with its first row.

    Raises
    ------
    ValueError
        At a row that holds NaN or infinity; the message says which.
    """
    last, step = len(rows) if last is None else last, block_rows(rows.shape[1])
    for start in range(first, last, step):
        yield start, as_rows(rows, start, min(step, last - start))


def sampled(rows, count: int | None, seed: int = 0) -> Tensor:
    """``count`` rows of a matrix in their order, float32, drawn without replacement; all of them for None."""
    n = len(rows)
    if count is None or count >= n:
        return torch.cat([block for _, block in blocks(rows)])
    picked = np.sort(np.random.default_rng(seed).choice(n, count, replace=False))
    step, parts = block_rows(rows.shape[1]), []
    for part in np.split(picked, range(step, count, step)):      # a part at a time: a map is read in its order
        own = rows[torch.from_numpy(part).to(rows.device)] if isinstance(rows, Tensor) else rows[part]
        try:
            parts.append(as_rows(own, 0, len(own)))
        except ValueError:
            own = own.float().cpu().numpy() if isinstance(own, Tensor) else own
            row = part[~np.isfinite(own).all(1)][0]
            raise ValueError(f"row {row} holds NaN or infinity: expected finite vectors; drop or repair such rows "
                             "first") from None
    return torch.cat(parts)


def gram(rows, mean: Tensor | None = None) -> Tensor:
    """Gram matrix [D, D] of the rows less ``mean [D]``, float64, in one pass over them."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for _, block in blocks(rows):
        block = block.cpu().double()
        if mean is not None:
            block -= mean.double()
        total.addmm_(block.T, block)
    return total


def leading(gram: Tensor, count: int) -> Tensor:
    """The ``count`` leading eigenvectors of a Gram matrix, the largest first: [count, D] float32, orthonormal.

    The sign of each is such that its largest element is positive, so that they do not depend on the solver.
    """
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count].T
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return (basis * largest.sign()).float().contiguous()


def weights_of(rows, given=None) -> Tensor:
    """What groups of rows are balanced by, float64 [n]: ``given`` numbers, or the norms of the rows in one pass.

    Raises
    ------
    ValueError
        If ``given`` has another length, or a value that is negative or not finite.
    """
    if given is None:
        return torch.cat([block.double().norm(dim=1).cpu() for _, block in blocks(rows)])
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    given = torch.from_numpy(np.array(given, np.float64))
    if given.shape != (len(rows),):
        raise ValueError(f"weights of shape {tuple(given.shape)}: expected [{len(rows)}], one number per row")
    if not bool((torch.isfinite(given) & (given >= 0)).all()):
        row = int((~(torch.isfinite(given) & (given >= 0))).nonzero()[0])
        raise ValueError(f"weight {float(given[row])} of row {row}: expected a finite number of at least 0")
    return given


def equal_groups(weights: Tensor, groups: int) -> Tensor:
    """Group of each row, uint8 [n]: by falling weight, each group of about the same total weight (the paper's groups).

    The heaviest rows are group 0, which therefore has the fewest. Of equal weights the first rows come first; no group
    is empty.
    """
    n = len(weights)
    if not 1 <= groups <= min(n, 256):
        raise ValueError(f"groups={groups}: expected 1 to {min(n, 256)}")
    order = torch.sort(weights, descending=True, stable=True).indices
    sums = weights[order].cumsum(0)
    even = sums[-1] * torch.arange(1, groups, dtype=torch.float64) / groups
    ends = torch.searchsorted(sums, even).add_(1).tolist()
    for g in range(len(ends)):                           # at least one row each, whatever the weights
        ends[g] = min(max(ends[g], (ends[g - 1] if g else 0) + 1), n - (groups - 1 - g))
    number = torch.zeros(n, dtype=torch.uint8)
    for g, (first, last) in enumerate(zip(ends, [*ends[1:], n]), 1):
        number[order[first:last]] = g
    return number


class Streaming:
    """A method whose :meth:`fit` reads the matrix in blocks and writes in place into what ships."""

    fits_deployed = True
    sample: int | None = None           # rows to learn from, where a method draws some; None: its own number
    weights = None                      # of the rows, for methods that group them; None: their norms

    def learn(self, rows) -> None:
        """Find what all ``rows [n, D]`` have in common. Deterministic, given :attr:`seed`."""

    def put(self, start: int, block: Tensor) -> None:
        """Take rows ``[start, start + len(block))``. Blocks come in order; one may come again after an interruption,
        with :attr:`state` as it was before."""
        raise NotImplementedError

    @property
    def state(self) -> dict[str, Tensor]:
        """What :meth:`put` needs besides the stored tensors; kept while a file is being written."""
        return getattr(self, "_state", {})

    @state.setter
    def state(self, tensors: dict[str, Tensor]) -> None:
        self._state = tensors

    @torch.no_grad()
    def fit(self, rows):
        self.learn(rows)
        for start, block in blocks(rows):
            self.put(start, block)
        self.state = {}


class PostTraining(Streaming, Method):
    """Base of the methods that only take trained vectors."""

    trains = False
    family = "post-training"

    def training_bytes(self):
        return memory(self)                 # nothing trains: what ships is filled block by block
