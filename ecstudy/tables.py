"""The only holders of vectors. Every holder looks up rows, trains touched rows, and knows how to be quantised.

Training contract: :meth:`Holder.touched` gives the distinct rows of the last backward pass with their gradients,
:meth:`Holder.read` and :meth:`Holder.write` move those rows, and nothing else of the table is visited. Row-sparse
Adam is written once against these three, so integer tables train like float ones.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# bf16 scales are rounded up by this factor before rounding to 8 bits of mantissa, so that no code overflows
_ROUND_UP = 1 + 2 ** -8


def coalesce(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the ``values [k, ...]`` of equal ``index [k]``: distinct rows sorted, one value each."""
    unique, inverse = torch.unique(index, return_inverse=True)
    out = values.new_zeros(unique.shape + values.shape[1:])
    return unique, out.index_add_(0, inverse, values)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` for a table of rows and an index of any shape (index_select beats fancy indexing)."""
    flat = rows.view(-1) if rows.shape[1:] == (1,) else rows             # single numbers are read twice as fast
    return flat.index_select(0, index.reshape(-1)).reshape(index.shape + rows.shape[1:])


def as_rows(matrix, start: int, block: int) -> Tensor:
    """Rows [start, start + block) of a tensor, array or memory map as float32; ValueError if one is not finite."""
    part = matrix[start:start + block]
    part = (part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).float()
    if not bool(torch.isfinite(part).all()):
        row = start + int((~torch.isfinite(part)).any(1).nonzero()[0])
        raise ValueError(f"row {row} holds NaN or infinity: expected finite vectors; drop or repair such rows first")
    return part


def stochastic_round(x: Tensor) -> Tensor:
    """Round each element up with probability equal to its fractional part, independently: E[result] = x."""
    return torch.floor(x + torch.rand_like(x))


def round_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each element to one of its two neighbours in float16 or bfloat16, independently and at random: E[result] = x.

    The bits that are dropped get a random addend, so a carry has the probability of their share. What is beyond the
    largest number is cut to it; NaN and infinity stay, so that a diverged training is seen.
    """
    drop = 13 if dtype == torch.float16 else 16
    top = torch.finfo(dtype).max
    inside, noise = x.clamp(-top, top), torch.randint(0, 1 << drop, x.shape, dtype=torch.int32, device=x.device)
    out = ((inside.view(torch.int32) + noise) & -(1 << drop)).view(torch.float32)
    if dtype == torch.float16:                       # below 2^-14 its numbers stand 2^-24 apart
        steps = torch.floor(inside * 2 ** 24 + noise * 2 ** -13) * 2 ** -24
        out = torch.where(inside.abs() < 2 ** -14, steps, out)
    return torch.where(x.isfinite(), out, x).to(dtype)


class Fused(dict):
    """What ``torch.compile`` made of a module's functions, by name. It is bound to that module: copies start empty."""

    def __deepcopy__(self, memo):
        return Fused()

    def __reduce__(self):
        return Fused, ()


class Holder(nn.Module):
    """Vectors stored in some form. ``shape`` is (rows, width), or (length,) for an array;
    ``sparse`` asks for gradients of touched rows only."""

    sparse = False

    def gather(self, index: Tensor) -> Tensor:
        """Rows ``index [...]`` as float32 ``[..., width]``, differentiable while training."""
        raise NotImplementedError

    def touched(self) -> tuple[Tensor, Tensor] | None:
        """Distinct rows [k] and gradients [k, width] since :meth:`forget`; None if there are none."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """Tensors that collect this holder's gradient, to restrict a backward pass to them."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop collected gradients."""
        raise NotImplementedError

    def read(self, index: Tensor) -> Tensor:
        raise NotImplementedError

    def write(self, index: Tensor, rows: Tensor) -> None:
        raise NotImplementedError

    def quantised(self, to: int | torch.dtype) -> Holder:
        """The same vectors in integers of ``to`` bits, or in a shorter float type; a holder that cannot says so."""
        raise TypeError(f"{type(self).__name__} is already quantised")


class Decoded(Holder):
    """A table kept in another form than float32: a step decodes the distinct rows of the batch into leaves, the
    optimiser moves these, and :meth:`write` rounds them back. There is no float copy of the table."""

    def __init__(self):
        super().__init__()
        self._leaves: list[tuple[Tensor, Tensor]] = []

    def gather(self, index):
        if not (self.training and torch.is_grad_enabled()):
            return self.read(index)
        unique, inverse = torch.unique(index, return_inverse=True)
        rows = self.read(unique).requires_grad_()
        self._leaves.append((unique, rows))
        return F.embedding(inverse, rows)

    def touched(self):
        parts = [(index, rows.grad) for index, rows in self._leaves if rows.grad is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        return coalesce(torch.cat([index for index, _ in parts]), torch.cat([grad for _, grad in parts]))

    def leaves(self):
        return [rows for _, rows in self._leaves]

    def forget(self):
        self._leaves.clear()

    def fill(self, bound: float, block: int = 1 << 16) -> None:
        """Initial values from U(-bound, bound), rounded as a step rounds them."""
        for start in range(0, self.shape[0], block):
            index = torch.arange(start, min(start + block, self.shape[0]))
            self.write(index, torch.empty(len(index), self.shape[1]).uniform_(-bound, bound))

    def encode(self, rows, block: int = 1 << 16) -> None:
        """Round a matrix [rows, width] to the nearest values, block by block (post-training)."""
        for start in range(0, len(rows), block):
            self.put(start, as_rows(rows, start, block))

    def put(self, start: int, rows: Tensor) -> None:
        """Round rows [start, start + len(rows)) to the nearest values."""
        raise NotImplementedError


class FloatTable(Holder):
    """``rows x width`` float32, a plain parameter.

    ``sparse=False`` gives dense gradients, so any torch optimiser works; the study's loop sets it to True.
    ``keep_zeros=True`` gives elements that are exactly zero no gradient: what was pruned stays pruned.
    """

    keep_zeros = False

    def __init__(self, rows: int, width: int, bound: float):
        super().__init__()
        self.shape = (rows, width)
        self.weight = nn.Parameter(torch.empty(rows, width))
        if not self.weight.is_meta:
            nn.init.uniform_(self.weight, -bound, bound)

    def gather(self, index):
        return F.embedding(index, self.weight, sparse=self.sparse)

    def touched(self):
        grad = self.weight.grad
        if grad is None:
            return None
        if not grad.is_sparse:
            raise RuntimeError("dense gradient in a table: set holder.sparse = True before the forward pass")
        index, grad = coalesce(grad._indices()[0], grad._values())
        return index, grad.mul_(self.read(index) != 0) if self.keep_zeros else grad

    def leaves(self):
        return [self.weight]

    def forget(self):
        self.weight.grad = None

    def read(self, index):
        return self.weight.detach().index_select(0, index)

    def write(self, index, rows):
        self.weight.detach().index_copy_(0, index, rows)

    def load(self, rows, block: int = 1 << 18) -> None:
        """Copy a matrix [rows, width] (tensor, array or memory map) block by block."""
        for start in range(0, len(rows), block):
            self.weight.detach()[start:start + block] = as_rows(rows, start, block).to(self.weight.device)

    def quantised(self, to):
        device = self.weight.device
        if isinstance(to, torch.dtype):
            table = HalfTable(*self.shape, dtype=to, device=device)
        elif to in IntTable.DTYPES:
            table = IntTable(*self.shape, bits=to, scale="row", device=device)
        else:
            from .rowwise import RowTable                            # it packs codes, which reads this file
            table = RowTable(*self.shape, to, device=device)
        if not self.weight.is_meta:
            table.encode(self.weight.detach())
        return table


class _Blocks(torch.autograd.Function):
    """Contiguous blocks of a 1-D array, whose gradient is sparse and already summed over overlaps."""

    @staticmethod
    def forward(ctx, weight, start, length):
        ctx.save_for_backward(start)
        ctx.length, ctx.size = length, weight.numel()
        windows = weight.as_strided((weight.numel() - length + 1, length), (1, 1))
        return windows.index_select(0, start)

    @staticmethod
    def backward(ctx, grad):
        start, length = ctx.saved_tensors[0], ctx.length
        start, grad = coalesce(start, grad)
        # Sorted blocks overlap only with their neighbours: block i begins new[i] elements after block i-1 in the
        # union of all blocks, so element j of block i has rank first[i] + j there. Linear, no sort of elements.
        new = torch.minimum(start.diff(), torch.tensor(length, device=start.device))
        first = torch.cat([new.new_zeros(1), new.cumsum(0)])
        within = torch.arange(length, device=start.device)
        rank = first[:, None] + within
        total = int(first[-1]) + length
        element = start.new_empty(total).scatter_(0, rank.view(-1), (start[:, None] + within).view(-1))
        value = grad.new_zeros(total).index_add_(0, rank.view(-1), grad.reshape(-1))
        grad = torch.sparse_coo_tensor(element[None], value, (ctx.size,), is_coalesced=True, check_invariants=False)
        return grad, None, None


class FloatArray(Holder):
    """A 1-D array of ``length`` floats, read as blocks that may overlap (ROBE) or value by value (sparse tables)."""

    def __init__(self, length: int, bound: float = 0.0):
        super().__init__()
        self.shape = (length,)
        self.weight = nn.Parameter(torch.empty(length))
        if not self.weight.is_meta:
            nn.init.uniform_(self.weight, -bound, bound)

    def gather(self, index):
        return take(self.weight, index)

    def blocks(self, start: Tensor, length: int) -> Tensor:
        """Blocks beginning at ``start [...]`` -> ``[..., length]``."""
        if self.sparse and torch.is_grad_enabled():
            return _Blocks.apply(self.weight, start.reshape(-1), length).reshape(start.shape + (length,))
        windows = self.weight.as_strided((self.weight.numel() - length + 1, length), (1, 1))
        return take(windows, start)

    def touched(self):
        grad = self.weight.grad
        if grad is not None and grad.is_sparse and bool((grad._indices()[0].diff() > 0).all()):
            return grad._indices()[0], grad._values()       # already summed; autograd dropped the mark that says so
        return FloatTable.touched(self)

    leaves, forget = FloatTable.leaves, FloatTable.forget
    read, write = FloatTable.read, FloatTable.write

    def quantised(self, to):
        device = self.weight.device
        if isinstance(to, torch.dtype):
            array = HalfArray(*self.shape, dtype=to, device=device)
        elif to in IntTable.DTYPES:
            array = IntArray(*self.shape, bits=to, device=device)
        else:
            from .rowwise import PackedArray
            array = PackedArray(*self.shape, to, device=device)
        if not self.weight.is_meta:
            array.encode(self.weight.detach())
        return array


class HalfTable(Decoded):
    """``rows x width`` numbers of 16 bits, ``dtype`` float16 or bfloat16.

    Parameters
    ----------
    stochastic:
        Round what a step writes at random (:func:`round_half`); otherwise to the nearest number.
    bound:
        Initial values are drawn from U(-bound, bound); 0 leaves the table empty.
    """

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype = torch.float16, stochastic: bool = True,
                 bound: float = 0.0, device=None):
        super().__init__()
        self.shape, self.stochastic = (rows, width), stochastic
        self.register_buffer("weight", torch.empty(rows, width, dtype=dtype, device=device))
        if self.weight.is_meta:
            return
        self.fill(bound) if bound else self.weight.zero_()

    def read(self, index):
        return take(self.weight, index).float()

    def write(self, index, rows):
        dtype = self.weight.dtype
        self.weight.index_copy_(0, index, round_half(rows, dtype) if self.stochastic else rows.to(dtype))

    def put(self, start, rows):
        top = torch.finfo(self.weight.dtype).max
        self.weight[start:start + len(rows)] = rows.clamp(-top, top)

    quantised = FloatTable.quantised


class HalfArray(Holder):
    """A :class:`FloatArray` in ``dtype`` float16 or bfloat16, for serving."""

    def __init__(self, length: int, *, dtype: torch.dtype = torch.float16, device=None):
        super().__init__()
        self.shape = (length,)
        self.register_buffer("weight", torch.zeros(length, dtype=dtype, device=device))

    def encode(self, weight: Tensor) -> None:
        top = torch.finfo(self.weight.dtype).max
        self.weight.copy_(weight.clamp(-top, top))

    def gather(self, index):
        return take(self.weight, index).float()

    def blocks(self, start, length):
        windows = self.weight.as_strided((self.weight.numel() - length + 1, length), (1, 1))
        return take(windows, start).float()

    quantised = FloatArray.quantised


class IntTable(Decoded):
    """``rows x width`` signed integers of 8 or 16 bits; value = code * scale.

    Parameters
    ----------
    scale:
        A float is one constant for the whole table (the paper's form; part of the specification, not stored).
        ``"row"`` stores one bfloat16 scale per row, fitted to the row's largest magnitude whenever it is written.
        ``"dim"`` stores one float32 scale per column, ``first`` until :meth:`fit_columns` sets it.
    bound:
        Initial values are drawn from U(-bound, bound) and rounded stochastically; 0 leaves the table empty.

    Trains in integers: :meth:`write` rounds back, each element with its own random number.
    """

    DTYPES = {8: torch.int8, 16: torch.int16}

    def __init__(self, rows: int, width: int, *, bits: int = 8, scale: float | str = "row", bound: float = 0.0,
                 first: float = 1.0, device=None):
        super().__init__()
        if bits not in self.DTYPES:
            raise ValueError(f"bits={bits}: expected 8 or 16")
        if not (scale in ("row", "dim") or isinstance(scale, float) and scale > 0):
            raise ValueError(f"scale={scale!r}: expected a positive float, 'row' or 'dim'")
        self.shape, self.bits, self.top = (rows, width), bits, 2 ** (bits - 1) - 1
        self.constant = scale if scale not in ("row", "dim") else None
        self.by_row = scale == "row"
        self.register_buffer("codes", torch.zeros(rows, width, dtype=self.DTYPES[bits], device=device))
        if scale == "row":
            self.register_buffer("scale", torch.zeros(rows, 1, dtype=torch.bfloat16, device=device))
        elif scale == "dim":
            self.register_buffer("scale", torch.full((width,), first, device=device))
        if bound and not self.codes.is_meta:
            self.fill(bound)

    def read(self, index):
        codes = take(self.codes, index).float()
        if self.by_row:
            return codes.mul_(take(self.scale, index).float())
        return codes.mul_(self.scale if self.constant is None else self.constant)

    def write(self, index, rows):
        self._store(index, rows, stochastic_round)

    def put(self, start: int, rows: Tensor) -> None:
        """Round rows [start, start + len(rows)) to the nearest codes."""
        rows = rows.to(self.codes.device)
        self._store(torch.arange(start, start + len(rows), device=rows.device), rows, torch.round)

    def fit_columns(self, top: Tensor) -> None:
        """Scales from the largest magnitude of each column [width]."""
        self.scale.copy_(top.clamp(min=1e-30) / self.top)

    def _store(self, index, rows, rounding):
        if not self.by_row:
            scale = self.constant if self.constant is not None else self.scale
        else:
            scale = (rows.abs().amax(-1, keepdim=True) * (_ROUND_UP / self.top)).clamp(min=1e-30).bfloat16()
            self.scale.index_copy_(0, index, scale)
            scale = scale.float()
        codes = rounding(rows / scale).clamp_(-self.top - 1, self.top)
        self.codes.index_copy_(0, index, codes.to(self.codes.dtype))


class IntArray(Holder):
    """A quantised :class:`FloatArray` for serving: one scale for all, because a scale per value would save nothing."""

    def __init__(self, length: int, *, bits: int, device=None):
        super().__init__()
        self.shape, self.top = (length,), 2 ** (bits - 1) - 1
        self.register_buffer("codes", torch.zeros(length, dtype=IntTable.DTYPES[bits], device=device))
        self.register_buffer("scale", torch.zeros((), device=device))

    def encode(self, weight: Tensor, block: int = 1 << 22) -> None:
        self.scale.copy_((weight.abs().amax() if weight.numel() else weight.new_zeros(())).clamp(min=1e-30) / self.top)
        for start in range(0, len(weight), block):
            self.codes[start:start + block] = torch.round(weight[start:start + block] / self.scale)

    def gather(self, index):
        return take(self.codes, index) * self.scale

    def blocks(self, start, length):
        windows = self.codes.as_strided((self.codes.numel() - length + 1, length), (1, 1))
        return take(windows, start) * self.scale
