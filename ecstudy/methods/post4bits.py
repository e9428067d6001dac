r"""Row-wise int4 (and int2, int8): a table trained in full, then rounded, every row in a range searched greedily.

**Idea** (post-training quantisation of Guan et al., arXiv 1911.02079). A number of row $i$ becomes one of $2^b$ equal
steps, $\hat x = l_i + s_i k$. With a range from the least to the largest value, a few extremes make the steps of all
others wide. The search begins there and cuts one of 200 parts off the low or the high end, wherever the row then errs
less in squares, again and again until 16 % are gone. Of the ranges that either cut would make worse the best is taken.

**Stored** $n \times d$ integers of $b$ bits, packed, and $l$ and $s$ of every row in float16: the row-wise int4, int2
and int8 of FBGEMM and PyTorch, $d b / 8 + 4$ bytes per row. **Size** by ``bits``, 2, 4 or 8: at dimension 16 that is
12.5, 18.75 or 31.25 % of the full table and nothing between.

**Training** one stage, the plain training of the full table that other methods begin with; 300 %. The network never
sees rounded vectors. The search takes some minutes of one core for Criteo's 33.8 million rows. ``search="minmax"``
takes the range from the least to the largest value, which is what the libraries do unless told.

**Deviations** The authors' codebooks of 16 values found by $k$-means, for each row or for clusters of rows, are left
out: at dimension 16 the codebook of a row is as large as the row in float16.
Two and 8 bits are ours. Validation chooses the best state of the full table, before it is rounded. ``int4`` compresses
passages by a coarser search, with ranges of columns where these are alike.
"""
from __future__ import annotations

from ..method import Method
from ..rowwise import SEARCHES, RowTable
from ..tables import FloatTable
from ._posttrain import Streaming


class Post4Bits(Streaming, Method):
    knob = "bits"
    family = "intra-feature"
    paper = "arXiv 1911.02079"
    group = "quantisation"
    space = r"n (b d / 32 + 1)"
    time = r"O(d)"

    def __init__(self, fields, dim, bits=4, search="greedy"):
        super().__init__(fields, dim)
        if bits not in (2, 4, 8):
            raise ValueError(f"bits={bits}: expected 2, 4 or 8")
        if search not in SEARCHES:
            raise ValueError(f"search={search!r}: expected 'greedy' or 'minmax'")
        self.bits, self.search = bits, search
        self.table = FloatTable(fields.n, dim, fields.bound())

    @classmethod
    def sizes(cls, fields, dim, **options):
        return (2, 4, 8)

    def schedule(self, run):
        yield from run.fit("train", shared="full")

    def put(self, start, block):
        if self.deployed:
            self.table.put(start, block)
        else:
            self.table.weight.detach()[start:start + len(block)] = block

    def lookup(self, codes):
        return self.table.gather(codes)

    def deploy(self):
        if not self.deployed:
            weight = self.table.weight.detach()
            self.table = RowTable(self.fields.n, self.dim, self.bits, search=self.search, device=weight.device)
            if not weight.is_meta:
                self.table.encode(weight)
        return super().deploy()
