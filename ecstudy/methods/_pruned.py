"""What the pruning methods share: a full table while training, its largest values in a sparse table when deployed."""
from __future__ import annotations

from ..method import Method
from ..select import prune_
from ..sparse import SparseTable
from ..tables import FloatTable


class Pruned(Method):
    """``kept`` values of a full table survive; the sparse form is as good as the lightest for that many."""

    knob = "kept"
    family = "intra-feature"
    aware = "importance"
    group = "pruning"
    space = r"k + \min(5 n d / 128,\ n / 4 + k / 8,\ n d / 508 + k / 4,\ k / 2)"
    time = r"O(d + \log k)"

    def __init__(self, fields, dim, kept=None):
        super().__init__(fields, dim)
        cells = fields.n * dim
        self.kept = cells if kept is None else kept
        if not 0 <= self.kept <= cells:
            raise ValueError(f"kept={self.kept}: expected 0 <= kept <= {cells} values")
        self.table = FloatTable(fields.n, dim, fields.bound())

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(0, fields.n * dim + 1)

    def lookup(self, codes):
        return self.table.gather(codes)

    def fit(self, rows):
        self.table.load(rows)

    def cut(self):
        """Set all but the ``kept`` largest values to zero, where training leaves them."""
        prune_(self.table.weight, self.kept)
        self.table.keep_zeros = True

    def allocation(self):
        return self.table.per_row()

    def deploy(self):
        if not self.deployed:
            self.table = SparseTable.of(self.table.weight, self.kept)
        return super().deploy()
