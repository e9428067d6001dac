"""The contract of a method: a map from ids to vectors, with the paper's four modules (arXiv 2311.15578, section 4).

::

    class Method(nn.Module):
        knob = None                                     the one argument that sets the size
        def encode(self, ids)                           1  encoding function : ids [B, F] -> codes
        def lookup(self, codes)                         2  embedding layer   : codes -> [B, F, D]
        def schedule(self, run)                         3  scheduler         : a generator of steps
            self.aux = nn.Module()                      4  auxiliary module  : exists in training only
        def deploy(self)                                what ships; its bytes are the budget
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .fields import Fields
from .memory import memory
from .sparse import SparseTable
from .tables import Fused, Holder, as_rows, take

BLOCK = 1 << 20                         # ids that are looked at together


@dataclass
class Step:
    """One update, as a schedule asks for it.

    Attributes
    ----------
    split:
        Which rows feed it, ``"train"`` or ``"valid"`` (architecture searches use validation rows).
    again:
        Use the batch of the step before once more instead of a new one (two-pass methods, second-order searches).
    update:
        ``"all"`` (embedding and head), ``"emb"`` (embedding only, the head is frozen), or a callable that receives the
        gradients of ``wrt`` and changes those tensors itself (nothing else moves then).
    wrt:
        The tensors a callable ``update`` moves, or a function that gives them after the forward pass.
    penalty:
        A function giving a scalar that is added to the loss, called after the forward pass.
    """

    split: str = "train"
    again: bool = False
    update: str | Callable[[Sequence[Tensor]], None] = "all"
    wrt: Sequence[Tensor] | Callable[[], Sequence[Tensor]] = ()
    penalty: Callable[[], Tensor] | None = None
    stage: str = ""


class Method(nn.Module):
    """Base of all methods. A subclass reads ``(fields, dim, [knob,] [counts,] **options)``.

    Parameters
    ----------
    fields: Fields
        Field sizes; ids are local to their field.
    dim: int
        Embedding dimension D of the output.
    """

    knob: str | None = None             # name of the argument that sets the size
    family: str = ""                    # "inter-feature", "intra-feature" or "baseline" (paper, section 3)
    aware: str = "none"                 # what allocation depends on: "none", "frequency", "importance"
    paper: str = ""                     # where the idea comes from
    group: str = ""                     # the paper's kind of method within its family
    space: str = ""                     # numbers stored, in LaTeX: n ids, d dimensions, and the method's own symbols
    time: str = ""                      # work of looking up one id, in LaTeX
    needs_counts = False                # wants counts=: training occurrences of each id [n]
    learns_size = False                 # what ships is decided by training: a build weighs the most it can become
    budgeted = True                     # False: the method has no budget in its source, its limit is this study's
    trains = True                       # False: only :meth:`fit` fills it, so it is no part of training studies
    seed = 0                            # of what :meth:`fit` draws; ``ecstudy.make`` sets it
    fits_deployed = False               # :meth:`fit` fills what ships, so nothing larger is ever allocated
    deployed = False
    fitted: dict = {}                   # options that :meth:`fit` found; saving writes them into the specification

    def __init__(self, fields: Fields, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: expected an embedding dimension of at least 1")
        self.fields, self.dim = fields, dim
        self.fused = Fused()

    @classmethod
    def sizes(cls, fields: Fields, dim: int, **options) -> range | Sequence:
        """Values of the knob from the smallest to the largest size; bytes never fall along it."""
        return ()

    def encode(self, ids: Tensor) -> Tensor:
        return self.fields.flat(ids)

    def lookup(self, codes) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, F] -> [B, F, D]; with a single int cardinality ids [...] -> [..., D]."""
        if not self.fields.single:
            return self._look(ids)
        return self._look(ids.reshape(-1, 1)).reshape(ids.shape + (self.dim,))

    def _look(self, ids):
        self.fields.check(ids)
        if "look" in self.fused:
            return self.fused["look"](ids.clone())           # where a batch begins in memory would be compiled in
        return self.lookup(self.encode(ids))

    def compile(self, **options) -> Method:
        """Fuse the look-up of a deployed module with ``torch.compile``, which gets the ``options``. Returns itself.

        On a CPU that needs a C++ compiler, on a GPU Triton. The first call compiles, for seconds; results and bytes
        stay as they are. Unlike ``nn.Module.compile`` it leaves the check of ids outside, which synchronises.
        Copies and saved modules are not compiled. A pruned table stays as it is: how many values are read depends
        on the ids, so there is no one graph, and compiled in pieces it is not faster.

        Raises
        ------
        ValueError
            Before :meth:`deploy`: a look-up that trains records what it touched, which cannot be fused.
        """
        if not self.deployed:
            raise ValueError(f"{type(self).__name__} is still training: compile() fuses what ships, so deploy() first")
        if not any(isinstance(holder, SparseTable) for holder in self.holders()):
            self.fused["look"] = torch.compile(lambda ids: self.lookup(self.encode(ids)), **{"dynamic": True} | options)
        return self

    def schedule(self, run) -> Iterator[Step]:
        """How the method trains: a generator of steps (ordinary control flow around ``run.fit``).

        Raises
        ------
        TypeError
            At the first step, if the method does not train (:attr:`trains`).
        """
        if not self.trains:
            raise TypeError(f"{type(self).__module__.rsplit('.', 1)[-1]} compresses vectors that are trained already "
                            "and does not train itself: use ecstudy.compress(vectors, method, budget)")
        yield from run.fit("train")

    def before_evaluation(self) -> None:
        """Called right before validation is measured, so that what is measured is what would ship."""

    def fit(self, rows) -> None:
        """Take the vectors of a trained matrix [n, D] (tensor, array, memory map) instead of training.

        Raises
        ------
        TypeError
            If the method has no best approximation of a given matrix and must be trained.
        """
        from .registry import get, names

        able = [name for name in names() if get(name).fit is not Method.fit]
        raise TypeError(f"{type(self).__module__.rsplit('.', 1)[-1]} learns by training, not from a matrix; "
                        f"methods that do: full|int8, {', '.join(able)}")

    def deploy(self) -> Method:
        """Turn the module, in place, into what ships. Shapes depend on the knob alone (Rule 2).

        A method that ``learns_size`` ships at most what a ``meta`` build of the same knob ships.
        """
        if "aux" in self._modules:
            del self.aux
        self.deployed = True
        return self.eval()

    def allocation(self) -> Tensor | None:
        """Numbers that the deployed module holds for each id alone, int32 [n], the fields one after the other.

        Counted are the values of the id's own row, whether floats or integers. What ids have in common counts for none
        of them: shared rows, matrices, dictionaries. Nor do maps, indices and scales, which say where or how large
        values are. None for a method of which that would say nothing: there ids share all they have, or differ in
        other things than their number of values.
        """
        return None

    def holders(self) -> list[Holder]:
        return [module for module in self.modules() if isinstance(module, Holder)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """Trained parameters that are not in a holder and not auxiliary (projections and the like)."""
        skip = {id(p) for holder in self.holders() for p in holder.parameters()}
        skip |= {id(p) for p in self.aux.parameters()} if "aux" in self._modules else set()
        return [p for p in self.parameters() if id(p) not in skip and p.requires_grad]

    def training_bytes(self) -> int:
        """Bytes held while training: the module with its auxiliary state, and both Adam moments in float32."""
        # float32 moments whatever the holder stores; aux parameters are moved without moments
        cells = sum(int(np.prod(h.shape)) for h in self.holders()) + sum(p.numel() for p in self.dense_parameters())
        return memory(self) + 2 * 4 * cells

    def extra_repr(self) -> str:
        knob = f", {self.knob}={getattr(self, self.knob, None)}" if self.knob else ""
        return f"{self.fields.n} rows in {len(self.fields)} fields, dim={self.dim}{knob}"


def alone(fields: Fields, rows: int, row_of: Callable[[Tensor, Tensor], Tensor], device=None) -> Tensor:
    """Which ids have a row of a table to themselves, bool [n].

    ``row_of(flat, field)`` gives the rows of a block of ids: ``flat [k]`` of the full table, in fields ``field [k]``.
    """
    row = torch.empty(fields.n, dtype=torch.int32 if rows < 2 ** 31 else torch.int64, device=device)
    for start in range(0, fields.n, BLOCK):
        flat = torch.arange(start, min(start + BLOCK, fields.n), device=device)
        row[start:start + len(flat)] = row_of(flat, fields.of(flat))
    return take(torch.bincount(row, minlength=rows) == 1, row)


def owned(fields: Fields, rows: int, rows_of: Callable[[Tensor, Tensor], Tensor], device=None) -> Tensor:
    """How many rows of a table each id has to itself, int32 [n], where a vector is made of several.

    ``rows_of(flat, field)`` gives ``[k, parts]`` for a block of ids, as for :func:`alone`; a row that an id reads
    twice has one user. Rows are found twice, so that no more than the answer is of the size of the ids.
    """
    def blocks():
        for start in range(0, fields.n, BLOCK):
            flat = torch.arange(start, min(start + BLOCK, fields.n), device=device)
            row = rows_of(flat, fields.of(flat)).sort(-1).values
            first = torch.ones_like(row, dtype=torch.bool)
            first[:, 1:] = row[:, 1:] != row[:, :-1]
            yield row, first

    users = torch.zeros(rows, dtype=torch.int32, device=device)
    for row, first in blocks():
        users += torch.bincount(row[first], minlength=rows).int()
    return torch.cat([((take(users, row) == 1) & first).sum(-1).int() for row, first in blocks()])


@torch.no_grad()
def fit_means(table: Tensor, rows, fields: Fields, row_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Each row of ``table`` becomes the mean of the vectors that share it, their least-squares representative.

    ``rows``: the vectors ``[n, D]``, a tensor, array or memory map, read block by block. ``row_of`` as that of
    :func:`alone`, or ``[k, parts]`` where a vector is cut into as many. Rows that nobody has become zero.
    """
    table.zero_()
    count = table.new_zeros(len(table), 1)
    for start in range(0, fields.n, BLOCK // 4):
        part = as_rows(rows, start, BLOCK // 4).to(table.device)
        flat = torch.arange(start, start + len(part), device=table.device)
        row = row_of(flat, fields.of(flat)).reshape(-1)
        table.index_add_(0, row, part.view(len(row), -1))
        count.index_add_(0, row, count.new_ones(len(row), 1))
    table /= count.clamp(min=1)


def require_counts(counts, fields: Fields, device) -> Tensor | None:
    """Counts as int64 [n] on the CPU; None on a ``meta`` build; one clear error if they are missing or do not fit."""
    if device.type == "meta":
        return None
    if counts is None:
        raise ValueError("counts is missing: this method needs the training occurrences of each id, int [n] with the "
                         "fields one after the other; pass counts= (Dataset.counts, or numpy.bincount of your ids)")
    if isinstance(counts, Tensor):
        counts = counts.detach().to("cpu", torch.int64, copy=True)
    else:
        counts = torch.from_numpy(np.array(counts, dtype=np.int64))
    if counts.shape != (fields.n,):
        raise ValueError(f"counts of shape {tuple(counts.shape)}: expected [{fields.n}], one count per id")
    return counts
