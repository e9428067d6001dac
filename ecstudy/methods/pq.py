r"""A vector is cut into parts, and each part is the number of the nearest of $2^b$ centroids.

**Idea** (product quantisation; Jégou, Douze and Schmid, TPAMI 2011; the PQ of arXiv 2311.15578, section 5.5). The $M$
parts of a row are quantised one by one,
$$k_m = \arg\min_k \lVert x^{(m)} - c^{(m)}_k\rVert, \qquad \hat x = [\,c^{(1)}_{k_1}, \dots, c^{(M)}_{k_M}],$$
so that $M b$ bits choose among $2^{M b}$ vectors, of which only $M 2^b$ parts are stored. Centroids come from k-means
in every part.

**Stored** $M$ codes of $b$ bits in $\lceil M b / 8\rceil$ bytes per row, and $2^b \times d$ numbers of centroids.
**Size** by ``parts``, any number from 1 to $d$; ``bits`` is 8 unless given. The paper's two sizes on 21,015,324
passages, 3.14 % and 1.58 %, are 64 and 32 parts of 12 bits, whose codebooks are worth it there and not on a small
corpus.

**Training** none: trained vectors are compressed. faiss runs k-means on 256 rows per centroid, and codes all rows
block by block; torch decodes, to the same numbers as faiss, without it being installed.

**Deviations** Where $M$ does not divide $d$ the first parts are one column wider than the others, so a budget is used
to within a byte per row; faiss's own forms want a divisor, and its default also sorts centroids for a search by
Hamming distance, which takes longer than all of the training and is left out. ``half=True`` keeps centroids in
float16: codes are taken with the rounded ones. ``unit=True`` is told at ``opq``; the published PQ does not do so.
"""
from __future__ import annotations

import torch

from ..packed import Codes
from ._posttrain import PostTraining, sampled
from ._product import POINTS, Codebooks, common_norm, index_of, of_norm


class Pq(PostTraining):
    knob = "parts"
    paper = "arXiv 2311.15578"
    group = "product quantisation"
    space = r"\frac{1}{32} n M b + 2^b d"
    time = r"O(d)"

    def __init__(self, fields, dim, parts=None, bits=8, half=False, unit=False):
        super().__init__(fields, dim)
        self.parts = max(1, dim // 8) if parts is None else parts
        self.books = Codebooks(dim, self.parts, bits, half)
        self.codes = Codes(fields.n, self.parts, bits)
        self.register_buffer("norm", torch.zeros(()) if unit else None)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    def learn(self, rows):
        points = POINTS * self.books.k if self.sample is None else self.sample
        x = sampled(rows, points, self.seed)
        if self.norm is not None:
            self.norm.fill_(common_norm(x))
        self.books.learn(x, self.seed)

    def put(self, start, block):
        self.codes.write(start, self.books.encode(block).to(self.codes.bytes.device))

    def lookup(self, codes):
        return of_norm(self.books.decode(self.codes.read(codes)), self.norm)

    def index(self):
        """A faiss index over the same codes, which searches by look-up tables: ``index().search(queries, k)``."""
        return index_of(self.books, self.codes, None, self.norm, self.dim)
