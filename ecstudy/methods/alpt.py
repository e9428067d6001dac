r"""A full table of integers whose rows each learn their own scale.

**Idea** (adaptive low-precision training, ALPT; Li et al., AAAI 2023, arXiv 2212.05735). A row is $s_i q_i$ with
integers $q_i$ and a scale $s_i$ of its own. Training looks twice at each batch. The first pass updates the network,
and takes the rows to $w$ in float32. The second looks up $s \lfloor \mathrm{clip}(w / s) \rceil$, with the network
as just updated, and moves only the scales, along

$$\frac{\partial \hat w}{\partial s} = \lfloor v \rceil - v \ \text{ inside the range,}\quad
q_{\min} \text{ or } q_{\max} \ \text{ outside,}\qquad v = w / s,$$

summed over the row and multiplied by $1 / \sqrt{B D q_{\max}}$ for a batch of $B$ rows (LSQ, arXiv 1902.08153). Then
the rows are rounded at random to multiples of the new scale, so that small updates survive on average.

**Stored** ``n x D`` integers and one float32 scale per row. **Size** by ``bits``, 8 or 16: at dimension 16 that is
31.25 % or 56.25 % of the full table and nothing between.

**Training** one stage in which every step is done twice. Both moments of rows and scales are float32, so memory while
training is 243.75 % or 268.75 %. In a loop of your own with ``ecstudy.training.optimizers`` there is no second
pass: rows are rounded as they are written, and the scales stay as they are.

**Deviations** The scales have an Adam count of their own; the published code shares one bias correction between both
passes and so advances it twice per batch. A scale stays above ``1e-8``; the published one may turn negative. Each
element draws its own random number; the published kernel re-uses one for a whole row. The first scale, 0.01, and the
learning rate of the scales, 2e-5, are the published ones for 8 bits. For 16 bits both are divided by 256: a scale of
0.01 would leave the upper byte unused, and 2e-5 would take a scale of 0.00004 to zero in two updates. Compressing
trained vectors fits each scale to its row's largest magnitude.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method import Method, Step
from ..tables import IntTable, as_rows, stochastic_round, take

SMALLEST = 1e-8                          # a scale stays above this


class RoundToScale(torch.autograd.Function):
    """``w [k, D]`` rounded to the nearest multiple of ``s [k, 1]`` within the range; the gradient is that of ``s``."""

    @staticmethod
    def forward(ctx, w, s, low, high):
        v = w / s
        q = v.round().clamp_(low, high)
        # inside the range round(v) - v; outside q is the end of the range itself
        ctx.save_for_backward(torch.where((v > low) & (v < high), q - v, q))
        return q * s

    @staticmethod
    def backward(ctx, grad):
        return None, (grad * ctx.saved_tensors[0]).sum(-1, keepdim=True), None, None


class ScaledTable(IntTable):
    """An :class:`IntTable` with one learned float32 scale per row, which writing rows leaves as it is.

    While ``holding``, written rows wait in ``held``, not yet rounded, and are looked up through :class:`RoundToScale`.
    """

    holding, held, leaf = False, None, None

    def __init__(self, rows, width, *, bits, scale, bound):
        super().__init__(rows, width, bits=bits, scale=scale, bound=bound)
        self.constant, self.by_row = None, True
        self.register_buffer("scale", torch.full((rows, 1), scale))

    def gather(self, index):
        if self.held is None or not (self.training and torch.is_grad_enabled()):
            return super().gather(index)
        rows, w = self.held
        self.leaf = take(self.scale, rows).requires_grad_()
        return F.embedding(torch.searchsorted(rows, index), RoundToScale.apply(w, self.leaf, -self.top - 1, self.top))

    def write(self, index, rows):
        if self.holding:
            self.held = index, rows
        else:
            super().write(index, rows)

    def encode(self, rows, block=1 << 16):
        for start in range(0, len(rows), block):
            part = as_rows(rows, start, block).to(self.scale.device)
            self.scale[start:start + block] = (part.abs().amax(1, keepdim=True) / self.top).clamp_(min=SMALLEST)
        super().encode(rows, block)

    def _store(self, index, rows, rounding):
        scale = self.constant if self.constant is not None else take(self.scale, index)      # constant: first values
        codes = rounding(rows / scale).clamp_(-self.top - 1, self.top)
        self.codes.index_copy_(0, index, codes.to(self.codes.dtype))


class Alpt(Method):
    knob = "bits"
    family = "intra-feature"
    group = "quantisation"
    paper = "arXiv 2212.05735"
    space = r"n (d b / 32 + 1)"
    time = r"O(d)"

    def __init__(self, fields, dim, bits=8, scale=None, scale_lr=None):
        super().__init__(fields, dim)
        if bits not in IntTable.DTYPES:
            raise ValueError(f"bits={bits}: expected 8 or 16")
        self.scale = 0.01 * 2.0 ** (8 - bits) if scale is None else float(scale)
        self.scale_lr = 2e-5 * 2.0 ** (8 - bits) if scale_lr is None else float(scale_lr)
        for name in ("scale", "scale_lr"):
            if not SMALLEST < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above {SMALLEST}, for 8 bits "
                                 "0.01 as the first scale and 2e-5 as the learning rate of scales")
        self.bits, self.updates = bits, 0
        self.table = ScaledTable(fields.n, dim, bits=bits, scale=self.scale, bound=fields.bound())
        self.aux = nn.Module()
        self.aux.register_buffer("first", torch.zeros(fields.n, 1))
        self.aux.register_buffer("second", torch.zeros(fields.n, 1))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(8, 17, 8)

    def encode(self, ids):
        self.batch = len(ids)
        return super().encode(ids)

    def lookup(self, codes):
        return self.table.gather(codes)

    def fit(self, rows):
        self.table.encode(rows)

    @torch.no_grad()
    def move_scales(self, gradients: list[Tensor]) -> None:
        """Adam on the scales of the held rows, which are then rounded at random to multiples of them."""
        rows, w = self.table.held
        grad = gradients[0] / math.sqrt(self.batch * self.dim * self.table.top)
        self.updates += 1
        first, second = take(self.aux.first, rows).lerp_(grad, 0.1), take(self.aux.second, rows).lerp_(grad ** 2, 0.001)
        self.aux.first.index_copy_(0, rows, first)
        self.aux.second.index_copy_(0, rows, second)
        size = self.scale_lr * math.sqrt(1 - 0.999 ** self.updates) / (1 - 0.9 ** self.updates)
        scale = take(self.table.scale, rows).addcdiv_(first, second.sqrt_().add_(1e-8), value=-size)
        self.table.scale.index_copy_(0, rows, scale.clamp_(min=SMALLEST))
        self.table.held = self.table.leaf = None
        self.table._store(rows, w, stochastic_round)

    def schedule(self, run):
        self.table.holding = True
        for step in run.fit("train"):
            yield step                               # writes float32 rows, held
            yield Step(again=True, update=self.move_scales, wrt=lambda: [self.table.leaf], stage=step.stage)
        self.table.holding = False
