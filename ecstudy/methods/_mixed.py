"""What methods that give each field its own width share: rows of mixed width, lifted to the model's dimension.

Training keeps one table per distinct width, with the fields of that width one after the other, because row-sparse
Adam moves whole rows. What ships is one array with all rows end to end: a row begins at ``base_f + id * width_f``, a
window of D numbers is read there whatever the width, and what the window reads beyond the row meets zeros in the
field's matrix. So a lookup is one gather and one batched product, instead of a table and a product per field.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from ..fields import Fields, derived
from ..maps import marked_ids
from ..select import largest
from ..sparse import Bits
from ..tables import FloatArray, FloatTable, take

BLOCK = 1 << 18


def cells(rows: int, width: int, dim: int, bias: bool = False) -> int:
    """Numbers of a field: its rows, and its matrix (and bias) where it is narrower than ``dim``."""
    return rows * dim if width == dim else rows * width + (width + bias) * dim


def useful(sizes: Sequence[int], widths: Sequence[int], dim: int, bias: bool = False) -> list[int]:
    """``widths`` with full width where a narrower row and its matrix would not be smaller."""
    return [int(w) if cells(n, w, dim, bias) < n * dim else dim for n, w in zip(sizes, widths)]


def layout(rows: Sequence[int], widths: Sequence[int]) -> tuple[list[int], int]:
    """First number of each field's rows [F] in one array, narrow fields first, and the numbers of all rows."""
    base, end = [0] * len(rows), 0
    for field in sorted(range(len(rows)), key=widths.__getitem__):
        base[field], end = end, end + rows[field] * widths[field]
    return base, end


class Mixed(nn.Module):
    """``sizes[f]`` rows of ``widths[f]`` numbers, and a matrix ``widths[f] x dim`` for each field narrower than dim.

    A field of width 0 stores nothing and gives zeros.

    Parameters
    ----------
    bias:
        Narrow fields add a vector after their matrix; it is stored as the last row of the matrix.
    bound:
        Initial range of the rows. Matrices start with standard deviation ``1 / sqrt(width)``, so that products have
        the standard deviation of the rows; biases at zero.
    """

    def __init__(self, sizes: Sequence[int], dim: int, widths: Sequence[int], bias: bool = False, bound: float = 0.0):
        super().__init__()
        self.sizes, self.dim, self.widths, self.bias = tuple(sizes), dim, tuple(int(w) for w in widths), int(bias)
        order = sorted(range(len(sizes)), key=self.widths.__getitem__)
        groups = {w: [f for f in order if self.widths[f] == w] for w in sorted(set(self.widths))}
        self.narrow = [(w, len(fields)) for w, fields in groups.items() if w < dim]
        first, matrix, end = [0] * len(sizes), [0] * len(sizes), 0
        for w, fields in groups.items():
            for number, f in enumerate(fields):
                first[f] = sum(sizes[g] for g in fields[:number])
                matrix[f], end = end, end + (w + self.bias if w < dim else 0)
        derived(self, "width", self.widths)
        derived(self, "place", [order.index(f) for f in range(len(sizes))])    # in the order of widths
        derived(self, "first", first)                                          # row in the table of its width
        derived(self, "base", layout(sizes, self.widths)[0])                   # number in the array
        derived(self, "matrix", matrix)                                        # row in the stored matrices
        for number, fields in enumerate(groups.values()):
            derived(self, f"members{number}", fields)
        self.tables = nn.ModuleList(FloatTable(sum(sizes[f] for f in fields), w, bound) for w, fields in groups.items())
        self.projection = nn.Parameter(torch.zeros(end, dim)) if end else None
        self.packed = False
        if end and not self.projection.is_meta:
            for part, (w, _) in zip(self.matrices(), self.narrow):
                nn.init.normal_(part.detach()[:, :w], std=max(w, 1) ** -0.5)

    def matrices(self) -> list[Tensor]:
        """The stored matrices by width, ``[fields of that width, width (+ 1), dim]``."""
        if self.projection is None:
            return []
        parts = self.projection.split([(w + self.bias) * count for w, count in self.narrow])
        return [part.view(count, w + self.bias, self.dim) for part, (w, count) in zip(parts, self.narrow)]

    def encode(self, ids: Tensor) -> Tensor:
        """ids [B, F] -> where their rows begin: rows of a table in training, numbers of the array once packed."""
        return ids * self.width + self.base if self.packed else ids + self.first

    def lookup(self, codes: Tensor) -> Tensor:
        return self._windows(codes) if self.packed else self._grouped(codes)

    def _grouped(self, codes):
        out, matrices = [], self.matrices()
        for number, table in enumerate(self.tables):
            members = getattr(self, f"members{number}")
            if not table.shape[1] and not self.bias:         # nothing is stored of these fields
                out.append(torch.zeros(len(codes), len(members), self.dim, device=codes.device))
                continue
            rows = table.gather(codes.index_select(1, members))                                      # [B, k, w]
            if number < len(matrices):
                w, matrix = self.narrow[number][0], matrices[number]
                rows = torch.bmm(rows.transpose(0, 1), matrix[:, :w])
                rows = (rows + matrix[:, w:] if self.bias else rows).transpose(0, 1)
            out.append(rows)
        return torch.cat(out, 1).index_select(1, self.place)

    def _windows(self, codes):
        if not self.narrow:
            return self.array.blocks(codes, self.dim)
        rows = self.array.blocks(codes.T, self.dim)                                                  # [F, B, D]
        lift, bias = self.lifts()
        if torch.is_grad_enabled():
            return torch.baddbmm(bias, rows, lift).transpose(0, 1)
        out = rows.new_empty(codes.shape + (self.dim,))                      # filled in place: no copy to [B, F, D]
        torch.baddbmm(bias, rows, lift, out=out.transpose(0, 1))
        return out

    def lifts(self) -> tuple[Tensor, Tensor]:
        """A matrix [D, D] per field, zero below its width, the identity for full width; and biases [F, 1, D]."""
        length = self.matrix_array.shape[0]
        stored = self.matrix_array.blocks(self.matrix.new_zeros(1), length).view(length // self.dim, self.dim)
        number = torch.arange(self.dim, device=stored.device)
        # behind the stored rows stand the identity, where the matrices of full width begin, and a bias of zero
        stored = torch.cat([stored, torch.eye(self.dim + 1, self.dim, device=stored.device)])
        lift = take(stored, self.matrix[:, None] + number) * (number < self.width[:, None])[..., None]
        none = torch.full_like(self.matrix, len(stored) - 1)
        return lift, take(stored, self.matrix + self.width if self.bias else none)[:, None]

    def rows(self, field: int) -> Tensor:
        """The rows of one field, a view ``[n_f, width]`` of its table."""
        table = self.tables[sorted(set(self.widths)).index(self.widths[field])]
        return table.weight.detach()[int(self.first[field]):][:self.sizes[field]]

    def lift(self, field: int) -> Tensor:
        """The stored matrix of one narrow field, a view ``[width (+ 1), dim]``."""
        return self.projection.detach()[int(self.matrix[field]):][:self.widths[field] + self.bias]

    def per_id(self) -> Tensor:
        """Numbers of each id's row, int32 [n], the fields one after the other."""
        return self.width.int().repeat_interleave(torch.tensor(self.sizes, device=self.width.device))

    def pack(self) -> None:
        """All rows end to end in one array, and all matrices in another: what ships.

        The rows are padded so that the last window ends in the array.
        """
        parts = [table.weight.detach().view(-1) for table in self.tables]
        self.array = _array(parts, self.dim - max(self.widths), parts[0].device)
        matrices = [] if self.projection is None else [self.projection.detach().view(-1)]
        self.matrix_array = _array(matrices, 0, parts[0].device)
        self.tables, self.projection, self.packed = nn.ModuleList(), None, True


def above(fields: Fields, table: Tensor, threshold: Sequence[float], most: int) -> tuple[Tensor, list[int]]:
    """Sorted rows of ``table [n, dim]`` whose sum of magnitudes is above the threshold of their field, the ``most``
    largest if there are more; and how many of each field."""
    norm, ends = torch.empty(fields.n, device=table.device), [*fields.offset.tolist(), fields.n]
    for limit, first, last in zip(threshold, ends, ends[1:]):
        for start in range(first, last, BLOCK):
            part = table[start:min(start + BLOCK, last)].abs().sum(1)
            norm[start:start + len(part)] = part.masked_fill_(part <= limit, 0)
    kept = largest(norm, min(int((norm > 0).sum()), most))
    return kept, torch.searchsorted(kept, torch.tensor(ends).to(kept)).diff().tolist()


class KeptRows(nn.Module):
    """Some rows of each field, cut to the field's width, to be looked up only. Other ids give zeros.

    Parameters
    ----------
    rows, widths:
        Kept rows of each field, and how many numbers of them.
    """

    def __init__(self, fields: Fields, dim: int, rows: Sequence[int], widths: Sequence[int], device):
        super().__init__()
        self.dim = dim
        base, self.end = layout(rows, widths)
        derived(self, "width", widths)
        derived(self, "base", base)
        derived(self, "before", [sum(rows[:f]) for f in range(len(rows))])
        with torch.device(device):
            # zeros stand at the end: what dropped ids read, and where the last window ends
            self.array = FloatArray(self.end + dim).requires_grad_(False)
            self.map = marked_ids(fields.n, sum(rows)) if sum(rows) < fields.n else None

    def fill(self, fields: Fields, table: Tensor, marks: Bits) -> None:
        """Take the marked rows of ``table [n, dim]``, block by block."""
        flat, ids = self.array.weight.detach(), []
        flat[self.end:] = 0
        for width, place, first, size in zip(self.width.tolist(), self.base.tolist(), fields.offset.tolist(),
                                             fields.sizes):
            for start in range(first, first + size, BLOCK):
                row = torch.arange(start, min(start + BLOCK, first + size), device=table.device)
                if self.map is not None:
                    row = row[marks.get(row).bool()]
                    ids.append(row)
                part = table.index_select(0, row)[:, :width].reshape(-1)
                flat[place:place + len(part)] = part
                place += len(part)
        if self.map is not None:
            self.map.fill(torch.cat(ids))

    def per_id(self, fields: Fields) -> Tensor:
        """Numbers of each id's row, 0 for dropped ones, int32 [n], the fields one after the other."""
        width = self.width.int().repeat_interleave(fields.size.to(self.width.device))
        return width if self.map is None else width * self.map.marked(fields.n)

    def encode(self, ids: Tensor, fields: Fields) -> Tensor:
        if self.map is None:
            return ids * self.width + self.base
        place = self.map.find(fields.flat(ids))
        return torch.where(place < 0, self.end, (place - self.before) * self.width + self.base)

    def lookup(self, codes: Tensor) -> Tensor:
        number = torch.arange(self.dim, device=codes.device)
        return self.array.blocks(codes, self.dim) * (number < self.width[:, None])


def _array(parts: Sequence[Tensor], padding: int, device) -> FloatArray:
    """The numbers of ``parts``, one part after the other, and zeros behind them."""
    with torch.device("meta"):
        array = FloatArray(sum(map(len, parts)) + padding)
    array = array.to_empty(device=device)
    flat, start = array.weight.detach(), 0
    for part in parts:
        flat[start:start + len(part)] = part
        start += len(part)
    flat[start:] = 0
    return array.requires_grad_(False)
