r"""Numbers of a few bits, 4 unless told, with a range for each column or for each row.

**Idea** (uniform quantisation; post-training 4 bits of Guan et al., arXiv 1911.02079). A number is one of $2^b$ equal
steps, $\hat x = l + s\,k$. Few outliers should not widen the steps of all others, so ranges are narrower than from the
least to the largest value: the width that loses least is searched.

**Stored** $n \times d$ integers of $b$ bits, packed, in whole bytes per row. With ``scale="column"`` $l$ and $s$ of the
$d$ columns in float32, with ``scale="row"`` of every row in float16, 4 bytes per row. **Size** by ``bits``, 1 to 8.

**Training** none: trained vectors are compressed. Columns learn their ranges from 8,192 rows, by squared error over 40
widths; rows find theirs as they are coded, over 12.

**Deviations** The authors quantise rows and search both ends of the range greedily; here it shrinks around the mean.
Columns are the default because encoders' columns differ by constants, which then cost nothing per row.
"""
from __future__ import annotations

import torch

from ..packed import Codes, pack
from ._posttrain import PostTraining, sampled
from ._product import checked_bits

POINTS = 8192                           # rows that columns learn from
WIDTHS = [0.92 ** k for k in range(40)] # shares of the whole range that are tried


class Int4(PostTraining):
    knob = "bits"
    paper = "arXiv 1911.02079"
    group = "quantisation"
    space = r"\frac{1}{32} n d b + 2 d"
    time = r"O(d)"

    def __init__(self, fields, dim, bits=4, scale="column"):
        super().__init__(fields, dim)
        if scale not in ("column", "row"):
            raise ValueError(f"scale={scale!r}: expected 'column' or 'row'")
        self.bits, self.scale, self.top = checked_bits(bits, 8), scale, 2 ** bits - 1
        self.codes = Codes(fields.n, dim, bits)
        rows = scale == "row"
        self.register_buffer("range", torch.zeros((fields.n, 2) if rows else (2, dim),
                                                  dtype=torch.float16 if rows else torch.float32))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, 9)

    def _search(self, x, axis, shares):
        """Low end and step along ``axis`` of the range of least squared error, rounded as stored."""
        low, high, mean = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True), x.mean(axis, keepdim=True)
        reach, least, best = torch.maximum(high - mean, mean - low), None, None
        for share in shares:
            bottom, top = torch.maximum(low, mean - share * reach), torch.minimum(high, mean + share * reach)
            found = [t.to(self.range.dtype).float() for t in (bottom, (top - bottom) / self.top)]
            error = (self._steps(x, *found) * found[1] + found[0] - x).square_().sum(axis, keepdim=True)
            if best is None:
                least, best = error, found
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = [torch.where(better, new, old) for new, old in zip(found, best)]
        return best

    def _steps(self, x, low, step):
        return torch.where(step > 0, (x - low) / step, 0).round_().clamp_(0, self.top)

    def learn(self, rows):
        if self.scale == "column":
            x = sampled(rows, POINTS if self.sample is None else self.sample, self.seed).to(self.range.device)
            self.range.copy_(torch.cat(self._search(x, 0, WIDTHS[:40])))

    def put(self, start, block):
        block = block.to(self.range.device)
        if self.scale == "row":
            found = self._search(block, 1, WIDTHS[:12])
            self.range[start:start + len(block)] = torch.cat(found, 1).to(self.range.dtype)
        else:
            found = self.range[:1], self.range[1:]
        self.codes.write(start, pack(self._steps(block, *found), self.bits))

    def lookup(self, codes):
        out = self.codes.read(codes).float()
        if self.scale == "column":
            return out.mul_(self.range[1]).add_(self.range[0])
        low, step = self.range.index_select(0, codes.reshape(-1)).float().view(*codes.shape, 2).unbind(-1)
        return out.mul_(step[..., None]).add_(low[..., None])
