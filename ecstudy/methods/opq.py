r"""Product quantisation of rotated vectors; the rotation is learned to lose least.

**Idea** (optimised product quantisation, OPQ; Ge, He, Ke and Sun, TPAMI 2014, CVPR 2013). Parts of equal size get equal
numbers of bits, which suits vectors whose parts vary alike and are independent. With a rotation $R$ rows are
$$\hat x = R\, [\,c^{(1)}_{k_1}, \dots, c^{(M)}_{k_M}].$$
$R$ begins with the principal axes, dealt to the parts such that the product of variances is the same in each, and is
then refined in turns: codes of the rotated rows, and the rotation nearest to those codes (a Procrustes problem).

**Stored** codes and centroids as for ``pq``, and $d^2$ numbers of the rotation, both in float16. **Size** by
``parts``, any number from 1 to $d$.

**Training** none: trained vectors are compressed, 256 rows per centroid are learned from. ``rounds`` of refinement, on
64 rows per centroid with four rounds of k-means each, precede the codebooks. Search turns queries once instead of all
rows (``scores``), or uses faiss's look-up tables (``index``).

**Deviations** faiss begins with a random rotation and refines 50 times; here it is 10 times from the principal axes
(``rounds``). Rotation and centroids are rounded to float16 before rows are coded, because on a small corpus they weigh
as much as the codes of a few parts; ``half=False`` keeps centroids in float32. Centroids are means and therefore too
short, the more so the worse a row is met. Encoders' vectors have norm one, so what is looked up is scaled back to the
norm that all rows learned from have, if they have one (``unit=True``, at the cost of one number); otherwise well coded
passages outrank badly coded ones.
"""
from __future__ import annotations

from ._product import TurnedProduct, index_of


class Opq(TurnedProduct):
    paper = "CVPR 2013"
    space = r"\frac{1}{32} n M b + \frac12 (2^b + d) d"
    time = r"O(d^2)"

    def __init__(self, fields, dim, parts=None, bits=8, rounds=10, half=True, unit=True):
        super().__init__(fields, dim)
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise ValueError(f"rounds={rounds!r}: expected an integer of at least 0")
        self.rounds = rounds
        self._product(dim, parts, bits, half, center=False, unit=unit)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    def index(self):
        """A faiss index over the same codes, which searches by look-up tables: ``index().search(queries, k)``."""
        return index_of(self.books, self.codes, self.turn, self.norm, self.dim)
