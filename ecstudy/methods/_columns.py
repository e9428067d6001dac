"""What the methods that prune columns field by field share: which of a full table's columns each field keeps."""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..fields import Fields
from ..method import Method
from ..tables import FloatArray, FloatTable
from ._mixed import BLOCK, Mixed, cells, useful

PER = ("dimension", "parameter")


def numbers(sizes: Sequence[int], widths: Sequence[int], dim: int) -> int:
    """Numbers of all rows and matrices, the padding of the array's last window included."""
    widths = useful(sizes, widths, dim)
    return sum(cells(n, w, dim) for n, w in zip(sizes, widths)) + dim - max(widths)


def keep_columns(scores: Tensor, sizes: Sequence[int], dim: int, limit: int, least: int, per: str) -> Tensor:
    """Columns each field keeps, bool [F, D]: the highest ``scores [F, D]`` first, while they fit ``limit`` numbers.

    A column that does not fit is passed over, and later ones may. Every field begins with its ``least`` best columns.
    ``per="parameter"`` orders by score per number stored, ``"dimension"`` by score alone. Among equals columns are
    taken from all fields in turn. A field whose kept columns and matrix would not be smaller than its rows is whole.
    """
    scores = scores.detach().cpu().double()
    best = torch.argsort(scores, dim=1, descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best[:, :least], True)
    value = scores / torch.tensor(sizes)[:, None] if per == "parameter" else scores
    order = torch.argsort(value.T.reshape(-1), descending=True, stable=True).tolist()      # [D, F]: fields in turn
    widths = [least] * len(sizes)
    whole = [cells(n, dim, dim) for n in sizes]
    cost = [min(cells(n, least, dim), most) for n, most in zip(sizes, whole)]
    total, widest = sum(cost), max(useful(sizes, widths, dim))
    for place in order:
        column, field = divmod(place, len(sizes))
        if keep[field, column]:
            continue
        wider = min(cells(sizes[field], widths[field] + 1, dim), whole[field])
        reach = max(widest, dim if wider == whole[field] else widths[field] + 1)
        if total - cost[field] + wider + dim - reach <= limit:
            total, widest = total - cost[field] + wider, reach
            cost[field], widths[field] = wider, widths[field] + 1
            keep[field, column] = True
    for field, width in enumerate(useful(sizes, keep.sum(1).tolist(), dim)):
        if width == dim:
            keep[field] = True
    return keep


class Columns(Method):
    """A full table until :meth:`choose`; then rows of the chosen widths (:class:`._mixed.Mixed`), which are trained.

    A subclass gives ``scores() [F, D]`` of the columns, from its state under ``self.aux``.
    """

    knob = "cells"
    family = "intra-feature"
    aware = "importance"
    group = "dimension allocation"
    space = r"\sum_f d_f (n_f + d)"
    time = r"O(d_f d)"
    learns_size = True

    def __init__(self, fields: Fields, dim: int, cells=None, per="dimension", least=0, reset=True, widths=None):
        super().__init__(fields, dim)
        if per not in PER:
            raise ValueError(f"per={per!r}: expected 'dimension' (by score) or 'parameter' (by score per number)")
        if not 0 <= least <= dim:
            raise ValueError(f"least={least}: expected 0 <= least <= {dim}, the narrowest a field may become")
        self.cells, self.per, self.least, self.reset = fields.n * dim if cells is None else cells, per, least, reset
        if self.cells < (fewest := self.sizes(fields, dim, least)[0]):
            raise ValueError(f"cells={cells}: expected at least {fewest}, every field at its narrowest")
        self.mixed = None
        if widths is not None:
            if len(widths) != len(fields) or not all(0 <= w <= dim for w in widths):
                raise ValueError(f"widths={widths}: expected {len(fields)} widths from 0 to {dim}, one per field")
            self.settle(useful(fields.sizes, widths, dim))
            return
        self.table = FloatTable(fields.n, dim, fields.bound())
        self.aux = nn.Module()

    @classmethod
    def sizes(cls, fields, dim, least=0, **options):
        return range(numbers(fields.sizes, [least] * len(fields), dim), fields.n * dim + 1)

    def scores(self) -> Tensor:
        raise NotImplementedError

    def encode(self, ids):
        return self.fields.flat(ids) if self.mixed is None else self.mixed.encode(ids)

    def choose(self, reset: bool) -> None:
        """From the full table to the chosen columns: new rows, or those columns as they are."""
        keep = keep_columns(self.scores(), self.fields.sizes, self.dim, self.cells, self.least, self.per)
        table = self.table.weight.detach()
        del self.aux, self.table
        self.settle(keep.sum(1).tolist())
        self.mixed.to(table.device)
        if not reset:
            self.hand_over(table, keep)

    def hand_over(self, table: Tensor, keep: Tensor) -> None:
        """Take the kept columns of ``table [n, D]``, with matrices that put each into its place."""
        for field, first in enumerate(self.fields.offset.tolist()):
            own, last = self.mixed.rows(field), first + self.fields.sizes[field]
            columns = keep[field].nonzero().view(-1).to(table.device)
            if 0 < len(columns) < self.dim:
                self.mixed.lift(field).copy_(torch.eye(self.dim, device=table.device)[columns])
            for start in range(first, last, BLOCK):
                part = table[start:min(start + BLOCK, last)].index_select(1, columns)
                own[start - first:start - first + len(part)] = part

    def settle(self, widths: Sequence[int]) -> None:
        self.mixed = Mixed(self.fields.sizes, self.dim, widths, bound=self.fields.bound())
        self.fitted = {"widths": list(self.mixed.widths)}

    def allocation(self):
        return self.mixed.per_id()

    def deploy(self):
        if not self.deployed:
            if self.mixed is None and self.table.weight.is_meta:     # not known yet: the most that may come of it
                del self.aux, self.table
                with torch.device("meta"):
                    self.array, self.matrix_array = FloatArray(self.cells), FloatArray(0)
                return super().deploy()
            if self.mixed is None:                   # trained by somebody's own loop: keep what it learned
                self.choose(reset=False)
            self.mixed.pack()
        return super().deploy()
