r"""A vector is a sum of centroids: each level quantises what the levels before it left over.

**Idea** (residual quantisation; Chen, Guan and Wang, Sensors 2010; with several candidates kept, Babenko and Lempitsky,
CVPR 2014). Level $m$ adds one of $2^b$ centroids that span all columns,
$$\hat x = \sum_m c^{(m)}_{k_m}.$$
Unlike the parts of ``pq``, levels may use what columns have in common. The best sum is not found level by level; the
``beam`` best ones are carried along. With ``splits`` the columns are cut first, and each split is a sum of its own.

**Stored** per row one code of $b$ bits for each level of each split, packed, and for every level $2^b \times d$ numbers
of centroids, in float16. **Size** by ``levels``. Codebooks weigh $M$ times those of ``pq``, which pays on large
corpora; more splits of fewer levels have smaller ones.

**Training** none: trained vectors are compressed. faiss learns the levels one after the other, from 128 rows per
centroid, and codes all rows.

**Deviations** Two splits unless told, where $d$ is even, because on a corpus of some 100,000 rows codebooks would weigh
more than codes. k-means of a level works in all dimensions at once: in growing ones, faiss's default, it takes ten
times as long. faiss's own search for this kind of code keeps a norm per row and is not used: search decodes.
Centroids are rounded to float16 before rows are coded; ``half=False`` keeps float32. Rows of one norm keep
it (``unit``, told at ``opq``).
"""
from __future__ import annotations

import numpy as np
import torch

from ..packed import Codes, pack
from ..tables import take
from ._posttrain import PostTraining, sampled
from ._product import HALF, checked_bits, common_norm, faiss, of_norm, unpacked

LEVELS = 64                             # at most
POINTS = 128                            # rows per centroid that are learned from


class Rq(PostTraining):
    knob = "levels"
    paper = "Sensors 2010"
    group = "product quantisation"
    space = r"\frac{1}{32} n M b + \frac12 2^b M d"
    time = r"O(M d)"

    def __init__(self, fields, dim, levels=4, splits=None, bits=8, beam=4, half=True, unit=True):
        super().__init__(fields, dim)
        self.splits = 2 - dim % 2 if splits is None else splits
        for name, value, most in (("levels", levels, LEVELS), ("splits", self.splits, dim), ("beam", beam, 1024)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r}: expected an integer, 1 to {most}")
        if dim % self.splits:
            raise ValueError(f"splits={splits}: expected a divisor of the embedding dimension {dim}")
        self.levels, self.bits, self.beam, self.k = levels, checked_bits(bits), beam, 1 << bits
        dtype = torch.float16 if half else torch.float32
        self.register_buffer("books", torch.zeros(self.splits, levels * self.k, dim // self.splits, dtype=dtype))
        self.codes = Codes(fields.n, self.splits * levels, bits)
        self.register_buffer("norm", torch.zeros(()) if unit else None)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, LEVELS + 1)

    def _quantiser(self, book=None):
        quantiser = faiss().ResidualQuantizer(self.books.shape[2], self.levels, self.bits)
        quantiser.max_beam_size = self.beam
        if book is not None:
            faiss().copy_array_to_vector(book.cpu().float().numpy().ravel(), quantiser.codebooks)
            quantiser.is_trained = True
        return quantiser

    def _columns(self, x):
        parts = x.cpu().float().view(len(x), self.splits, -1).transpose(0, 1)
        return [np.ascontiguousarray(part.numpy()) for part in parts]

    def learn(self, rows):
        x = sampled(rows, POINTS * self.k if self.sample is None else self.sample, self.seed)
        if self.norm is not None:
            self.norm.fill_(common_norm(x))
        x = x.repeat(-(-self.k // len(x)), 1)                            # faiss wants a row for every centroid
        if self.books.dtype == torch.float16 and float(x.abs().max()) > HALF:
            raise ValueError(f"values up to {float(x.abs().max()):g} do not fit float16 codebooks: pass half=False")
        for book, part in zip(self.books, self._columns(x)):
            quantiser = self._quantiser()
            quantiser.train_type, quantiser.cp.seed = quantiser.Train_default, 1234 + self.seed
            quantiser.cp.min_points_per_centroid = 1
            quantiser.train(part)
            book.copy_(torch.from_numpy(faiss().vector_to_array(quantiser.codebooks)).view(book.shape))

    def put(self, start, block):
        content = [torch.from_numpy(self._quantiser(book).compute_codes(part))
                   for book, part in zip(self.books, self._columns(block))]
        if len(content) > 1 and self.levels * self.bits % 8:
            content = [pack(torch.cat([unpacked(c, self.levels, self.bits) for c in content], 1), self.bits)]
        self.codes.write(start, torch.cat(content, 1).to(self.codes.bytes.device))

    def lookup(self, codes):
        codes = self.codes.read(codes).to(torch.int32)
        first = self.k * torch.arange(self.splits * self.levels, dtype=torch.int32, device=codes.device)
        rows = take(self.books.flatten(0, 1), codes + first)             # one book after the other
        return of_norm(rows.float().unflatten(-2, (self.splits, self.levels)).sum(-2).flatten(-2), self.norm)
