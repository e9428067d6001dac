r"""Vectors turned at random, of whose numbers one bit each is kept, scored by an unbiased estimator.

**Idea** (RaBitQ; Gao and Long, SIGMOD 2024, arXiv 2405.12497; more bits: arXiv 2409.09913). A row less the mean $\mu$
is turned by a random rotation $R$, after which no direction is special, and each number keeps its sign:
$$y = R^T (x - \mu), \qquad g = \mathrm{sign}(y), \qquad
\langle x, q\rangle \approx \langle \mu, q\rangle + f\, \langle g, R^T q\rangle, \qquad
f = \frac{\lVert y\rVert^2}{\langle g, y\rangle}.$$
Over random rotations the estimate is right on average, and its error falls with $1/\sqrt d$. With $b > 1$ bits $g$ is
the grid point, of $\pm 1, \pm 3, \dots$, of the least angle to $y$ among 16 widths of the grid.

**Stored** per row ``width`` numbers of $b$ bits, packed, and $f$ in float16; the mean, and $d \times w$ numbers of the
rotation in float16. **Size** by ``width``, 1 to $d$: below $d$ it is the $w$ leading principal axes that are turned
(principal axes and one bit: arXiv 2204.02906). One bit of all 384 columns and $f$ are 3.3 %.

**Training** none: trained vectors are compressed. Mean and axes are learned from 65,536 rows.

**Deviations** ``scores(queries)`` is the estimator, and search uses it. What is looked up, $\mu + f R g$, has exactly
these inner products but is no reconstruction: its $f$ is the one without bias, longer by $1/\cos^2$ of the angle
between $g$ and $y$ than the nearest multiple of $g$. Queries stay in float32; the authors round them too. The grid is
searched over widths, not exactly.
"""
from __future__ import annotations

import torch

from ..packed import Codes, pack
from ._posttrain import sampled
from ._product import Turned, checked_bits

POINTS = 65_536
GRID = {1: 1.0, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}    # Max (1960), normal


class Rabitq(Turned):
    knob = "width"
    paper = "arXiv 2405.12497"
    group = "quantisation"
    space = r"\frac{1}{32} n (w b + 16) + \frac12 w d + d"
    time = r"O(w d)"

    def __init__(self, fields, dim, width=None, bits=1):
        super().__init__(fields, dim)
        width = dim if width is None else width
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= dim:
            raise ValueError(f"width={width!r}: expected an integer, 1 to {dim} numbers of each row")
        self.bits = checked_bits(bits, 8)
        self._turning(width, center=True)
        self.codes = Codes(fields.n, width, bits)
        self.register_buffer("factor", torch.zeros(fields.n, dtype=torch.float16))
        self.register_buffer("unit", torch.zeros(()))                    # of the factors, so that float16 holds them

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    def learn(self, rows):
        x = sampled(rows, POINTS if self.sample is None else self.sample, self.seed).to(self.mean.device)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        generator = torch.Generator().manual_seed(self.seed)
        turn, triangle = torch.linalg.qr(torch.randn(self.width, self.width, generator=generator, dtype=torch.float64))
        turn = turn * triangle.diagonal().sign()                         # uniform over rotations
        if self.width < self.dim:
            x = x.double()
            turn = torch.linalg.eigh((x.T @ x).cpu()).eigenvectors[:, -self.width:] @ turn
        self.turn.copy_(turn)
        self.unit.copy_(x.square().sum(1).mean().sqrt().clamp(min=1e-30))

    def _grid(self, y):
        """Codes of ``y [m, width]``: of all grid widths the one whose point is nearest in angle."""
        if self.bits == 1:
            return (y > 0).float()
        top, size = 2 ** self.bits - 1, y.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        best = codes = None
        for share in torch.linspace(0.7, 1.45, 16).tolist():
            found = (y / (share * GRID[self.bits] * size)).floor_().add_((top + 1) / 2).clamp_(0, top)
            point = 2 * found - top
            cosine = (point * y).sum(1, keepdim=True) / point.norm(dim=1, keepdim=True)
            better = cosine > best if best is not None else torch.ones_like(cosine, dtype=torch.bool)
            best = torch.where(better, cosine, best) if best is not None else cosine
            codes = torch.where(better, found, codes) if codes is not None else found
        return codes

    def put(self, start, block):
        y = self.turned(block)
        codes = self._grid(y)
        along = ((2 * codes - (2 ** self.bits - 1)) * y).sum(1)
        factor = torch.where(along > 0, y.square().sum(1) / along, 0) / self.unit
        self.factor[start:start + len(block)] = factor.clamp_(max=65_504).to(torch.float16)
        self.codes.write(start, pack(codes, self.bits))

    def held(self, row):
        out = self.codes.read(row).float().mul_(2).sub_(2 ** self.bits - 1)
        factor = self.factor.index_select(0, row.reshape(-1)).float().view(row.shape).mul_(self.unit)
        return out.mul_(factor[..., None])
