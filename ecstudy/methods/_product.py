"""What product quantisers of trained vectors share: codebooks that faiss trains, codes that torch decodes.

Columns are cut into any number of parts: where it does not divide them, the first parts are one column wider, so that
codebooks weigh the same for every number of parts. faiss is needed to learn and to encode, never to look up.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import need
from ..packed import Codes, pack, unpack
from ..tables import take
from ._posttrain import PostTraining, sampled

POINTS = 256                            # rows per centroid that k-means learns from, faiss's own most
ROUNDS = 25                             # of k-means, faiss's own
HALF = 65_504                           # largest number of float16


def faiss():
    return need("faiss", "rag")


def checked_bits(bits, most: int = 16) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= most:
        raise ValueError(f"bits={bits!r}: expected an integer, 1 to {most} bits of a code")
    return bits


def fetched(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [...]`` of a small table, flattened along the last two axes, float32.

    numpy copies short rows up to three times as fast as torch does, which matters for thousands of them.
    """
    shape = index.shape[:-1] + (index.shape[-1] * table.shape[1],)
    if by_numpy(table):
        rows = torch.from_numpy(np.take(table.numpy(), index.numpy().astype(np.int64, copy=False), axis=0, mode="clip"))
    else:
        rows = take(table, index)
    return rows.reshape(shape).float()


def by_numpy(table: Tensor) -> bool:
    return table.device.type == "cpu" and not torch.compiler.is_compiling()


def common_norm(*samples: Tensor) -> float:
    """The norm that all rows of the ``samples [m, D]`` have, to a thousandth; 0 if they differ."""
    norms = torch.cat([x.norm(dim=1) for x in samples])
    return float(norms.mean()) if float(norms.max() - norms.min()) <= 1e-3 * float(norms.max()) else 0.0


def of_norm(out: Tensor, norm: Tensor | None, square: Tensor | None = None) -> Tensor:
    """``out [..., D]`` scaled to ``norm``, where it is not 0; ``square [...]`` is what to take for its squared norm."""
    if norm is None:
        return out
    square = out.square().sum(-1) if square is None else square
    return out.mul_(torch.where(norm > 0, norm * square.clamp(min=1e-30).rsqrt(), 1.0)[..., None])


class Codebooks(nn.Module):
    """``2 ** bits`` centroids for each of ``parts`` parts of ``width`` columns, in float32 or float16 (``half``)."""

    def __init__(self, width: int, parts: int, bits: int, half: bool = False):
        super().__init__()
        if isinstance(parts, bool) or not isinstance(parts, int) or not 1 <= parts <= width:
            raise ValueError(f"parts={parts!r}: expected an integer, 1 to {width}, the number of columns")
        self.parts, self.bits, self.k = parts, checked_bits(bits), 1 << bits
        each, self.more = divmod(width, parts)                           # so many parts have one column more
        dtype = torch.float16 if half else torch.float32
        self.split = self.more * (each + 1)
        self.register_buffer("wide", torch.zeros(self.more * self.k, each + 1, dtype=dtype) if self.more else None)
        self.register_buffer("even", torch.zeros((parts - self.more) * self.k, each, dtype=dtype))

    def decode(self, codes: Tensor) -> Tensor:
        """``codes [..., parts]`` -> float32 ``[..., width]``."""
        if by_numpy(self.even):                                          # widened and added in one pass
            place = torch.from_numpy(np.add(codes.numpy(), self.k * np.arange(self.parts)))
        else:
            place = codes.to(torch.int32) + self.k * torch.arange(self.parts, dtype=torch.int32, device=codes.device)
        if self.wide is None:
            return fetched(self.even, place)
        place, rest = place[..., :self.more], place[..., self.more:] - self.more * self.k
        return torch.cat([fetched(self.wide, place), fetched(self.even, rest)], -1)

    def halves(self):
        """Each table with its number of parts and its columns."""
        if self.wide is not None:
            yield self.wide, self.more, slice(0, self.split)
        yield self.even, self.parts - self.more, slice(self.split, None)

    def learn(self, x: Tensor, seed: int = 0, rounds: int = ROUNDS, warm: bool = False) -> None:
        """k-means in every part of ``x [m, width]``; ``warm`` begins at the present centroids."""
        for table, parts, columns in self.halves():
            mine = np.ascontiguousarray(x[:, columns].cpu().float().numpy())
            if table.dtype == torch.float16 and len(mine) and abs(mine).max() > HALF:
                raise ValueError(f"values up to {abs(mine).max():g} do not fit float16 codebooks: pass half=False")
            if len(mine) < self.k:                                       # a centroid for every row, and some to spare
                own = torch.zeros(parts, self.k, table.shape[1])
                own[:, :len(mine)] = torch.from_numpy(mine).view(len(mine), parts, -1).transpose(0, 1)
                table.copy_(own.view(table.shape))
                continue
            quantiser = faiss().ProductQuantizer(mine.shape[1], parts, self.bits)
            settings = quantiser.cp
            settings.niter, settings.seed = rounds, 1234 + seed          # faiss's own seed for 0
            settings.min_points_per_centroid, settings.max_points_per_centroid = 1, max(1, -(-len(mine) // self.k))
            if warm:
                self._give(quantiser, table)
                quantiser.train_type = quantiser.Train_hot_start
            quantiser.train(mine)
            table.copy_(torch.from_numpy(faiss().vector_to_array(quantiser.centroids)).view(table.shape))

    @staticmethod
    def _give(quantiser, table):
        faiss().copy_array_to_vector(table.detach().cpu().float().numpy().ravel(), quantiser.centroids)

    def quantiser(self, table: Tensor, parts: int):
        """faiss's quantiser with the centroids of one of the tables, as they are stored."""
        quantiser = faiss().ProductQuantizer(parts * table.shape[1], parts, self.bits)
        self._give(quantiser, table)
        return quantiser

    def encode(self, x: Tensor) -> Tensor:
        """Nearest centroids of ``x [m, width]``, packed: uint8 [m, ceil(parts * bits / 8)] on the CPU."""
        content = []
        for table, parts, columns in self.halves():
            mine = np.ascontiguousarray(x[:, columns].cpu().float().numpy())
            content.append(torch.from_numpy(self.quantiser(table, parts).compute_codes(mine)))
        if self.wide is None or self.more * self.bits % 8 == 0:
            return torch.cat(content, 1)
        counts = (self.more, self.parts - self.more)
        return pack(torch.cat([unpacked(c, n, self.bits) for c, n in zip(content, counts)], 1), self.bits)


def unpacked(content: Tensor, parts: int, bits: int) -> Tensor:
    """Packed rows ``[m, width]`` -> codes int64 ``[m, parts]``."""
    start = torch.arange(len(content), device=content.device) * content.shape[1]
    flat = torch.cat([content.reshape(-1), content.new_zeros(7)])
    return unpack(flat, start, parts, bits).long()


class Turned(PostTraining):
    """Rows are ``held(id) @ turn.T + mean``: a code of ``width`` columns, turned back to ``dim``.

    ``turn [dim, width]`` is orthonormal, and float16 because it is shared by all rows and read once per look-up. Inner
    products with queries need not turn anything back: :meth:`scores` turns the queries instead.
    """

    def _turning(self, width: int, center: bool, unit: bool = False) -> None:
        self.width = width
        self.register_buffer("turn", torch.zeros(self.dim, width, dtype=torch.float16))
        self.register_buffer("mean", torch.zeros(self.dim) if center else None)
        self.register_buffer("norm", torch.zeros(()) if unit else None)

    def held(self, row: Tensor) -> Tensor:
        """What is stored of rows ``row [...]``, decoded but not turned back: float32 ``[..., width]``."""
        raise NotImplementedError

    def turned(self, block: Tensor) -> Tensor:
        block = block.to(self.turn.device)
        return (block if self.mean is None else block - self.mean) @ self.turn.float()

    def _square(self, held: Tensor) -> Tensor | None:
        """Squared norm ``[...]`` of what ``held [..., width]`` is turned to; of no use without a common norm."""
        if self.norm is None:
            return None
        square = held.square().sum(-1)
        if self.mean is not None:
            square = square + held @ (2 * self.mean @ self.turn.float()) + self.mean.square().sum()
        return square

    def lookup(self, codes):
        held = self.held(codes)
        out = held @ self.turn.float().T
        return of_norm(out if self.mean is None else out.add_(self.mean), self.norm, self._square(held))

    def scores(self, queries: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Inner products of ``queries [Q, D]`` with what rows [start, stop) decode to: float32 [Q, stop - start]."""
        row = torch.arange(start, self.fields.n if stop is None else stop, device=self.turn.device)
        held = self.held(row)
        out = held @ (queries @ self.turn.float()).T                     # rows first, as they are scaled
        out = out if self.mean is None else out.add_(queries @ self.mean)
        return of_norm(out, self.norm, self._square(held)).T


def balanced(values: Tensor, parts: int) -> Tensor:
    """Order of axes with variances ``values [width]``, falling, that gives every part the same product of them.

    The eigenvalue allocation of Ge et al. (CVPR 2013): the next axis goes to the part whose product is least
    among those with room.
    """
    each, more = divmod(len(values), parts)
    room = [each + (p < more) for p in range(parts)]
    logs = values.double().clamp(min=values.max().double() * 1e-12).log()
    logs = (logs - logs.min()).tolist()
    own, total = [[] for _ in range(parts)], [0.0] * parts
    for axis, value in enumerate(logs):
        part = min((p for p in range(parts) if len(own[p]) < room[p]), key=lambda p: (total[p], len(own[p]), p))
        own[part].append(axis)
        total[part] += value
    return torch.tensor([axis for part in own for axis in part])


class TurnedProduct(Turned):
    """Codes of turned rows, balanced over the parts by their variances; :attr:`rounds` of refinement of the turn."""

    knob = "parts"
    group = "product quantisation"
    rounds = 0

    def _product(self, width: int, parts, bits: int, half: bool, center: bool, unit: bool) -> None:
        self.parts = max(1, width // 8) if parts is None else parts
        self.books = Codebooks(width, self.parts, bits, half)
        self._turning(width, center, unit)
        self.codes = Codes(self.fields.n, self.parts, bits)

    def learn(self, rows):
        x = sampled(rows, POINTS * self.books.k if self.sample is None else self.sample, self.seed)
        x = x.to(self.turn.device)
        if self.norm is not None:
            self.norm.fill_(common_norm(x))
        mean = x.mean(0)
        if self.mean is not None:
            self.mean.copy_(mean)
            x = x - self.mean
            mean = torch.zeros_like(mean)
        centred = (x - mean).double()
        values, axes = torch.linalg.eigh((centred.T @ centred / len(x)).cpu())
        values, axes = values.flip(0)[:self.width], axes.flip(1)[:, :self.width]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()      # no sign is the solver's choice
        self.turn.copy_(axes[:, balanced(values, self.parts)])
        self._refine(x)
        self.books.learn(x @ self.turn.float(), self.seed)

    def _refine(self, x):
        """Alternate between codes of the turned sample and the turn that is nearest to them (Procrustes)."""
        part = x[::max(1, len(x) // max(64 * self.books.k, 4 * self.dim))]
        for number in range(self.rounds):
            y = part @ self.turn.float()
            self.books.learn(y, self.seed, rounds=4, warm=number > 0)
            codes = unpacked(self.books.encode(y), self.parts, self.books.bits).to(y.device)
            u, _, v = torch.linalg.svd(part.T.double() @ self.books.decode(codes).double(), full_matrices=False)
            self.turn.copy_(u @ v)

    def put(self, start, block):
        self.codes.write(start, self.books.encode(self.turned(block)).to(self.codes.bytes.device))

    def held(self, row):
        return self.books.decode(self.codes.read(row))


def index_of(books: Codebooks, codes: Codes, turn: Tensor | None, norm: Tensor | None, dim: int):
    """A faiss index over the codes, which searches by tables of inner products: ``search(queries, k)``.

    Parts of one column less are filled up with a column of zeros, and queries turned before, by faiss too.
    """
    if norm is not None and float(norm) > 0:
        raise ValueError(f"rows are scaled to norm {float(norm):g} as they are looked up, which faiss's search does "
                         "not do: compress with unit=False, or search by decoding")
    f = faiss()
    each = books.even.shape[1] + (books.wide is not None)
    place = torch.cat([torch.arange(table.shape[1]).repeat(parts) + each
                       * (torch.arange(parts).repeat_interleave(table.shape[1]) + (0 if columns.start == 0 else
                                                                                   books.more))
                       for table, parts, columns in books.halves()])
    centroids = torch.zeros(books.parts, books.k, each)
    for table, parts, columns in books.halves():
        first = 0 if columns.start == 0 else books.more
        centroids[first:first + parts, :, :table.shape[1]] = table.cpu().float().view(parts, books.k, -1)
    matrix = torch.zeros(books.parts * each, dim)
    matrix[place] = torch.eye(dim) if turn is None else turn.cpu().float().T
    index = f.IndexPQ(books.parts * each, books.parts, books.bits, f.METRIC_INNER_PRODUCT)
    f.copy_array_to_vector(centroids.numpy().ravel(), index.pq.centroids)
    content = codes.bytes[:codes.rows * codes.width].cpu().numpy()
    f.copy_array_to_vector(content, index.codes)
    index.ntotal, index.is_trained = codes.rows, True
    linear = f.LinearTransform(dim, books.parts * each, False)
    f.copy_array_to_vector(matrix.numpy().ravel(), linear.A)
    linear.is_trained = True
    return f.IndexPreTransform(linear, index)

