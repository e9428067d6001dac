r"""The first principal axes of vectors, product-quantised.

**Idea** (Ma et al., EMNLP 2021, "Simple and effective unsupervised redundancy elimination to compress dense vectors";
also the eigenvalue allocation of OPQ). Directions in which passages hardly differ are dropped, and all codes go to the
rest:
$$\hat x = \mu + V\, [\,c^{(1)}_{k_1}, \dots, c^{(M)}_{k_M}],$$
with the mean $\mu$ and the $w$ leading axes $V$ of the covariance, dealt to the $M$ parts such that the product of
variances is the same in each.

**Stored** codes of $M$ parts, $2^b \times w$ numbers of centroids and $d \times w$ of the axes, both in float16, and
the mean. **Size** by ``parts``, any number from 1 to ``width``, which is half of $d$ unless given.

**Training** none: trained vectors are compressed, 256 rows per centroid are learned from. Search turns queries once
instead of all rows (``scores``).

**Deviations** The authors quantise the axes in their order, so that the first part holds most of the variance; here
they are dealt out evenly. Axes and centroids are rounded to float16 before rows are coded. Rows of one norm keep it
(``unit``, told at ``opq``).
"""
from __future__ import annotations

from ._product import TurnedProduct


class PcaPq(TurnedProduct):
    paper = "EMNLP 2021"
    space = r"\frac{1}{32} n M b + \frac12 (2^b + d) w + d"
    time = r"O(d w)"

    def __init__(self, fields, dim, parts=None, width=None, bits=8, half=True, unit=True):
        super().__init__(fields, dim)
        width = self._width(dim, width)
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= dim:
            raise ValueError(f"width={width!r}: expected an integer, 1 to {dim} axes")
        self._product(width, parts, bits, half, center=True, unit=unit)

    @staticmethod
    def _width(dim, width):
        return max(1, dim // 2) if width is None else width

    @classmethod
    def sizes(cls, fields, dim, width=None, **options):
        return range(1, cls._width(dim, width) + 1)
