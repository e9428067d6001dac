r"""Rows of their own for the most frequent ids of every field, a few shared rows for the others.

**Idea** (the adaptive embedding of DeepRec, as benchmarked in arXiv 2311.15578). A frequent id has data enough to
learn a row; a rare one has not, and loses little by sharing. With the exclusive ids $E_f$ of field $f$ and its $s_f$
shared rows, $e(i) = P_f[\mathrm{rank}(i)]$ for $i \in E_f$ and $e(i) = Q_f[\mathrm{rank}(i) \bmod s_f]$ for all
others, where the rank of an id counts the ids of its kind that stand before it in the field.

**Stored** one table with the exclusive rows in the order of their ids, then the shared ones; and the map that singles
out the exclusive ids, the lighter of two forms: a bit per id with running counts, or their sorted list. **Size** by
``rows``, the rows of the largest field. Every field keeps $m_f = \lceil n_f \cdot rows / n_{max} \rceil$ of its rows,
of which $\min(top \cdot n_f, m_f / 2)$ are exclusive; a field with $m_f = n_f$ is whole. With ``top=0.1`` the
exclusive share of all ids is that of the paper: 10, 5, 0.5 and 0.05 % at the budgets of 50, 10, 1 and 0.1 %.

**Training** one stage, in place: three times the table, and the map. At those budgets the paper, with 32 bits for
every id, has 154.4, 35.3, 9.2 and 6.5 % of full; a bit per id is a thirty-second of that map.

``dynamic=True`` is the form that the paper's text describes, and needs no counts in advance. All ids begin on shared
rows and are counted while training. An id seen ``threshold`` times asks, whenever it occurs, for the exclusive row
under its field's hand, which then moves on (as in the CLOCK rule of caches): a free row is given, and one whose owner
was seen less than half as often changes hands. The new owner begins with a copy of its shared row and fresh moments;
the loser goes back to its shared row. Counts and places, 8 bytes an id, exist in training only, and what ships has
the same shapes.

**Deviations** The published code has the static form alone, and every id over a field's count threshold is exclusive,
so ties enlarge the set and can make a budget fail; here their number is exact, ties going to the lower id, and the
map counts towards the budget. It adds two look-ups, of which one gives zero; here one gather serves both kinds of
rows and all fields. In the dynamic form an id shares row $i \bmod s_f$, because ranks would change while training,
and exclusive rows that nobody asked for go to the most frequent of the others when deployed. A ``threshold`` of 10 is
our choice. Seen from another side this is ``split(head='full', tail='hash_trick')`` with another division of the bytes.
"""
from __future__ import annotations

import torch
from torch import nn

from ..fields import derived
from ..maps import marked_ids, most_of_fields
from ..method import Method, alone, fit_means, require_counts
from ..tables import FloatTable, take


def starts(lengths) -> list[int]:
    return [sum(lengths[:f]) for f in range(len(lengths))]


class AdaptEmb(Method):
    knob = "rows"
    family = "inter-feature"
    aware = "frequency"
    paper = "DeepRec; arXiv 2311.15578"
    group = "frequency split"
    space = r"\sum_f m_f d + n/32"
    time = r"O(d)"
    needs_counts = True

    def __init__(self, fields, dim, rows=None, counts=None, top=0.1, dynamic=False, threshold=10):
        super().__init__(fields, dim)
        self.rows = fields.largest if rows is None else rows
        if not 1 <= self.rows <= fields.largest:
            raise ValueError(f"rows={rows}: expected 1 to {fields.largest}, the rows of the largest field")
        if not 0 <= top <= 1:
            raise ValueError(f"top={top}: expected the exclusive share of the ids, from 0 to 1")
        if threshold < 1:
            raise ValueError(f"threshold={threshold}: expected at least 1 occurrence before an id gets its own row")
        self.dynamic, self.threshold = bool(dynamic), threshold
        kept = [-(-size * self.rows // fields.largest) for size in fields.sizes]
        self.own = [0 if m == n else min(round(top * n), m // 2) for m, n in zip(kept, fields.sizes)]
        shared = [m - e for m, e in zip(kept, self.own)]
        self.exclusive = sum(self.own)
        derived(self, "modulus", shared)
        derived(self, "before", starts(self.own))
        derived(self, "shared_start", [self.exclusive + s for s in starts(shared)])
        self.table = FloatTable(sum(kept), dim, fields.bound())
        if self.dynamic:
            self.map, self.batch = None, None
            self.aux = nn.Module()
            self.aux.register_buffer("count", torch.zeros(fields.n, dtype=torch.int32))
            self.aux.register_buffer("place", torch.full((fields.n,), -1, dtype=torch.int32))
            self.aux.register_buffer("owner", torch.full((self.exclusive,), -1, dtype=torch.int64))
            self.aux.register_buffer("hand", torch.zeros(len(fields), dtype=torch.int64))
            derived(self, "slots", self.own)
            return
        self.map = marked_ids(fields.n, self.exclusive)
        if (counts := require_counts(counts, fields, self.table.weight.device)) is not None:
            self.map.fill(self.most_frequent(counts))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, fields.largest + 1)

    def most_frequent(self, counts) -> torch.Tensor:
        """The exclusive ids, sorted: the most frequent ones of every field, ties to the lower id."""
        return most_of_fields(counts, self.fields.sizes, self.own)

    def encode(self, ids):
        flat = self.fields.flat(ids)
        if self.map is None:
            if self.training and torch.is_grad_enabled():
                self.batch = flat                    # what :meth:`promote` counts after the step
            place = take(self.aux.place, flat).long()
            return torch.where(place < 0, ids % self.modulus + self.shared_start, place)
        place, marked = self.map.locate(flat)
        rare = ids if self.dynamic else ids - (place - self.before)          # rank among the field's rare ids
        return torch.where(marked, place, rare % self.modulus + self.shared_start)

    def lookup(self, codes):
        return self.table.gather(codes)

    def schedule(self, run):
        for step in run.fit("train"):
            yield step
            if self.dynamic:
                self.promote(run.optimizers)

    @torch.no_grad()
    def promote(self, optimizers=None) -> None:
        """Count the ids of the last batch and let the frequent ones ask for rows; call it after each update."""
        if self.batch is None:                       # rehearsed schedules make no batch
            return
        aux, (ids, seen) = self.aux, torch.unique(self.batch, return_counts=True)
        self.batch = None
        count = take(aux.count, ids) + seen.int()
        aux.count.index_copy_(0, ids, count)
        field = self.fields.of(ids)
        asks = (count >= self.threshold) & (take(aux.place, ids) < 0) & (take(self.slots, field) > 0)
        ids, count, field = ids[asks], count[asks], field[asks]
        if not len(ids):
            return
        # the k-th asking id of a field, by frequency, asks for the k-th row after the hand; no row is asked for twice
        order = torch.sort(count, descending=True, stable=True).indices
        order = order[torch.sort(field[order], stable=True).indices]
        ids, count, field = ids[order], count[order], field[order]
        asking = torch.bincount(field, minlength=len(self.own))
        turn = torch.arange(len(ids), device=ids.device) - take(asking.cumsum(0) - asking, field)
        row = take(self.before, field) + (take(aux.hand, field) + turn) % take(self.slots, field)
        aux.hand.copy_((aux.hand + torch.minimum(asking, self.slots)) % self.slots.clamp(min=1))
        owner = take(aux.owner, row)
        rival = torch.where(owner < 0, 0, take(aux.count, owner.clamp(min=0)))
        wins = (turn < take(self.slots, field)) & (count > 2 * rival)
        ids, field, row, owner = ids[wins], field[wins], row[wins], owner[wins]
        local = ids - take(self.fields.offset, field)
        self.table.write(row, self.table.read(local % take(self.modulus, field) + take(self.shared_start, field)))
        aux.place[owner[owner >= 0]] = -1
        aux.place.index_copy_(0, ids, row.int())
        aux.owner.index_copy_(0, row, ids)
        for moments in optimizers.rows.moments if optimizers else ():
            for moment in moments or ():
                moment.index_fill_(0, row, 0)

    def fit(self, rows):
        if self.dynamic:
            raise TypeError("adapt_emb(dynamic=True) learns by training, not from a matrix; leave dynamic out")
        fit_means(self.table.weight.detach(), rows, self.fields, self._row)      # exclusive rows are copied

    def _row(self, flat, field):
        """Rows of ids ``flat [k]`` (of the full table) of ``field [k]``, once the map is there."""
        place, marked = self.map.locate(flat)
        rare = flat - take(self.fields.offset, field) - (0 if self.dynamic else place - take(self.before, field))
        return torch.where(marked, place, rare % take(self.modulus, field) + take(self.shared_start, field))

    def allocation(self):
        return self.dim * alone(self.fields, self.table.shape[0], self._row, self.modulus.device).int()

    def deploy(self):
        if self.map is None:
            with self.table.weight.device:
                self.map = marked_ids(self.fields.n, self.exclusive)
            if not self.table.weight.is_meta:
                self._settle()
        return super().deploy()

    def _settle(self) -> None:
        """Exclusive rows in the order of their ids; rows without an owner go to the most frequent others."""
        aux, weight = self.aux, self.table.weight.detach()
        # owners come before all others, and among each the more frequent first
        ids = self.most_frequent(aux.count.long() + (aux.place >= 0) * (1 << 40))
        field = self.fields.of(ids)
        shared = (ids - take(self.fields.offset, field)) % take(self.modulus, field) + take(self.shared_start, field)
        place = take(aux.place, ids).long()
        weight[:self.exclusive] = take(weight, torch.where(place < 0, shared, place))
        self.map.fill(ids)
