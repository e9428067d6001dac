r"""Ids that matter now own rows, found by a small sketch of gradient norms; the others share rows by their remainder.

**Idea** (CAFE; Zhang et al., SIGMOD 2024, arXiv 2312.03256). Which ids matter is learned while training and may drift,
so no counts are read. A sketch of $K$ buckets with four slots holds ids and their scores: an id in its bucket adds the
norm of its gradient, and a newcomer takes a free slot, or the lowest one that is not hot with its score, as in
SpaceSaving. With $q(i)$ the row of a hot id in the sketch,
$$e(i) = P[q(i)] \;\text{ if } i \text{ is hot}, \qquad e(i) = Q_f[i \bmod m_f] \;\text{ otherwise.}$$
An id met again whose score reaches a threshold $T$ becomes hot while one of the $K$ rows is free, and begins with a
copy of its shared row; below the threshold it goes back to the shared row and its own is free again. Scores fade: they
are multiplied by 0.99 whenever another $10 K T$ was added to them.

With ``levels=2`` ids of middle score are told from the cold ones, the paper's multi-level form: an id in the sketch
that owns no row and has at least $0.2\,T$ is the sum of two shared rows, $Q_f[i \bmod m_f] + R_f[h(i)]$. Of the shared
rows 0.7 are in $Q$ and 0.3 in $R$, as published.

**Stored** $K$ rows for hot ids, $m_f = \lceil m n_f / n \rceil$ shared rows of every field, and the sketch: id, score
and row of four slots for each hot row, 48 bytes. They count towards the budget as they do in the paper, so what ships
can go on learning. ``online=False`` ships the rows and the lighter map of $K$ ids instead (sorted ids, or a bit per
id); then the sketch exists in training only, and on Criteo a budget holds a quarter to a half more rows. **Size** by
``rows`` $= K + m$. The share of $m$ in them (``shared``) follows the published settings: 0.7 at half the rows of full,
0.2 less with every power of ten, at least 0.1.

**Training** one stage: three times the rows, the sketch and a list of free rows. After every step the sketch sees the
ids of the batch and the norms of the gradients of their vectors, divided by their mean in each field
(``by="frequency"``: one for each occurrence). A user's own loop calls :meth:`promote` after each update. All of it
works on the touched buckets, except that fading scores multiplies all of them.

**Deviations** The published thresholds, from 10 at half the rows to 500 at 0.2 %, were tuned for each budget and log;
``threshold=`` sets one. Otherwise it finds itself, as in the authors' later code, which puts it at the $K$-th best
score at times; here it begins at 1, rises by a tenth after a step in which an id asked for a row in vain, and falls by
a hundredth while more than a twentieth of the rows is free. An id near it keeps its row down to half of it. Of several
newcomers to a full bucket in one batch the strongest enters, with the scores of all. A row is taken back when its
bucket is next met, not in a pass over all. The published code copies a row by the id's place in its field and reads it
by its place among all ids; here both are the place in the field. The moments of the shared row (with two levels, of
the one in $Q$) are copied with it. The rows that nobody owns when ``online=False`` is deployed go to the best of the
others. With two levels the published code adds both rows for cold ids too, the lines that would tell them apart being
switched off; here a cold id has one, as in the paper. $h$ is a seeded hash, not a multiple of the id.
"""
from __future__ import annotations

import math

import torch
from torch import nn

from ..fields import derived
from ..maps import marked_ids
from ..method import Method, alone, owned
from ..tables import FloatTable, take
from ._hashing import Hashes, below

SLOTS = 4                                    # of a bucket
MASS, FADE = 10, 0.99                        # thresholds for each bucket after which scores fade, and by how much
MIDDLE, SECOND = 0.2, 0.3                    # two levels: the share of the threshold, and of the shared rows
UP, DOWN, FREE, SLACK = 1.1, 0.99, 0.05, 0.5


class HotSketch(nn.Module):
    """Ids, scores and rows (-1: none) in ``buckets`` of four slots, int and float32 ``[buckets, 4]``."""

    def __init__(self, n: int, buckets: int):
        super().__init__()
        shape, whole = (buckets, SLOTS), torch.int32 if n < 2 ** 31 else torch.int64
        self.hash = Hashes(1)
        self.register_buffer("key", torch.full(shape, -1, dtype=whole))
        self.register_buffer("score", torch.zeros(shape))
        self.register_buffer("row", torch.full(shape, -1, dtype=whole))

    def bucket(self, ids):
        return self.hash(ids, len(self.key))[..., 0]

    def find(self, ids):
        """Row of each id, -1 for the others."""
        return self.look(ids)[0]

    def look(self, ids, level=None):
        """Row of each id, -1 for the others; and, given ``level``, which of the others have at least that score."""
        bucket = self.bucket(ids)
        match = take(self.key, bucket) == ids[..., None]
        row = torch.where(match, take(self.row, bucket), -1).amax(-1).long()
        return row, None if level is None else (row < 0) & (match & (take(self.score, bucket) >= level)).any(-1)

    def see(self, ids, worth):
        """Add ``worth [k]`` to the scores of distinct ``ids [k]``; slots of those that were here before."""
        bucket = self.bucket(ids)
        match = take(self.key, bucket) == ids[:, None]
        known = match.any(1)
        slot = (bucket * SLOTS + match.int().argmax(1))[known]
        self.score.view(-1).index_add_(0, slot, worth[known])
        self._enter(ids[~known], bucket[~known], worth[~known])
        return slot

    def _enter(self, ids, bucket, worth):
        # newcomers of a bucket one after the other, the strongest first
        order = torch.sort(worth, descending=True, stable=True).indices
        order = order[torch.sort(bucket[order], stable=True).indices]
        ids, bucket, worth = ids[order], bucket[order], worth[order]
        first = torch.searchsorted(bucket, bucket)
        turn = torch.arange(len(ids), device=ids.device) - first
        empty = take(self.key, bucket) < 0
        level = take(self.score, bucket).masked_fill_(empty, -1).masked_fill_(take(self.row, bucket) >= 0, math.inf)
        level, column = level.sort(dim=1, stable=True)
        free = empty.sum(1)
        full = free == 0
        together = torch.zeros_like(worth).index_add_(0, first, worth)
        score = torch.where(full, level[:, 0] + take(together, first), worth)
        enters = torch.where(full, (turn == 0) & (level[:, 0] < math.inf), turn < free)
        slot = (bucket * SLOTS + column.gather(1, turn.clamp(max=SLOTS - 1)[:, None])[:, 0])[enters]
        self.key.view(-1).index_copy_(0, slot, ids[enters].to(self.key.dtype))
        self.score.view(-1).index_copy_(0, slot, score[enters])


class Cafe(Method):
    knob = "rows"
    family = "inter-feature"
    aware = "importance"
    paper = "arXiv 2312.03256"
    group = "frequency split"
    space = r"(K + m)\,d + 12 K"
    time = r"O(d)"

    def __init__(self, fields, dim, rows=None, shared=None, by="gradient", threshold=None, levels=1, online=True):
        super().__init__(fields, dim)
        if levels not in (1, 2):
            raise ValueError(f"levels={levels!r}: expected 1, or 2 to give ids of middle score rows of two tables")
        if levels == 2 and not online:
            raise ValueError("levels=2 with online=False: which ids are of middle score is known to the sketch alone; "
                             "leave one of the two out")
        self.rows = max(levels + 1, fields.n // 10) if rows is None else rows
        if not levels < self.rows <= max(levels + 1, fields.n):
            raise ValueError(f"rows={rows}: expected {levels + 1} to {fields.n}, rows of hot ids and shared rows "
                             "together")
        if shared is None:
            shared = min(max(0.7 + 0.2 * math.log10(2 * self.rows / fields.n), 0.1), 0.7)
        if not 0 < shared < 1:
            raise ValueError(f"shared={shared}: expected the share of the rows that ids share, between 0 and 1")
        if by not in ("gradient", "frequency"):
            raise ValueError(f"by={by!r}: expected 'gradient' or 'frequency'")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold={threshold}: expected a positive score from which an id is hot, or None")
        kept = min(max(round(shared * self.rows), levels), self.rows - 1)
        self.hot, self.by, self.threshold, self.online = self.rows - kept, by, threshold, online
        self.levels, second = levels, max(round(SECOND * kept), 1) if levels == 2 else 0
        rows = self._spread("modulus", "start", kept - second, self.hot)
        if levels == 2:
            rows = self._spread("modulus2", "start2", second, rows)
            self.hash = Hashes(1)
            self.register_buffer("level", torch.tensor(MIDDLE * (threshold or 1)))
        self.table = FloatTable(rows, dim, fields.bound())
        self.aux, self.map, self.batch, self.norm = nn.Module(), None, None, None
        (self if online else self.aux).sketch = HotSketch(fields.n, self.hot)
        self.aux.register_buffer("free", torch.arange(self.hot, dtype=torch.int32).flip(0))       # a stack of rows
        for name, value in (("left", self.hot), ("threshold", threshold or 1), ("added", 0)):
            self.aux.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def _spread(self, modulus, start, rows, first):
        """Share ``rows`` among the fields by their size, from the row ``first`` on; the row after the last."""
        moduli = [-(-size * rows // self.fields.n) for size in self.fields.sizes]
        derived(self, modulus, moduli)
        derived(self, start, [first + sum(moduli[:f]) for f in range(len(moduli))])
        return first + sum(moduli)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(options.get("levels", 1) + 1, fields.n + 1)

    def find(self, flat):
        if self.map is not None:
            return self.map.find(flat)
        return (self.sketch if self.online else self.aux.sketch).find(flat)

    def _shared(self, flat, field):
        return (flat - take(self.fields.offset, field)) % take(self.modulus, field) + take(self.start, field)

    def _row(self, flat, field):
        own = self.find(flat)
        return torch.where(own < 0, self._shared(flat, field), own)

    def encode(self, ids):
        """Rows [B, F]; with two levels [B, F, 2], the same row twice for an id that has but one."""
        flat = self.fields.flat(ids)
        self.batch = flat if self.training and torch.is_grad_enabled() else None
        own, middle = (self.find(flat), None) if self.levels == 1 else self.sketch.look(flat, self.level)
        first = torch.where(own < 0, ids % self.modulus + self.start, own)
        return first if middle is None else self._pair(first, middle, flat, self.modulus2, self.start2)

    def _pair(self, first, middle, flat, modulus, start):
        second = below(self.hash.bits(flat)[..., 0], modulus) + start
        return torch.stack([first, torch.where(middle, second, first)], -1)

    def _pairs(self, flat, field):
        """Both rows [k, 2] of ids of the full table."""
        own, middle = self.sketch.look(flat, self.level)
        first = torch.where(own < 0, self._shared(flat, field), own)
        return self._pair(first, middle, flat, take(self.modulus2, field), take(self.start2, field))

    def lookup(self, codes):
        x = self.table.gather(codes)
        if self.levels == 2:
            x = self._sum(x, codes)
        if self.batch is not None and x.requires_grad:
            x.register_hook(self._note)                       # of assembled vectors: ids that share a row are apart
        return x

    @staticmethod
    def _sum(rows, codes):
        first, second = rows.unbind(-2)                       # one row, read twice, or the sum of two
        return (first + second) * torch.where(codes[..., :1] == codes[..., 1:], 0.5, 1.0)

    def _note(self, grad):
        self.norm = grad.detach().norm(dim=-1)

    def schedule(self, run):
        for step in run.fit("train"):
            yield step
            self.promote(run.optimizers)

    @torch.no_grad()
    def promote(self, optimizers=None) -> None:
        """Score the ids of the last batch by their gradients, then take rows and give them; call it after each update.
        """
        if self.batch is None or self.norm is None:           # rehearsed schedules make no batch
            return
        sketch, aux = self.sketch if self.online else self.aux.sketch, self.aux
        ids, inverse, count = torch.unique(self.batch, return_inverse=True, return_counts=True)
        worth = count.float()
        if self.by == "gradient":                             # one on average in each field, so fields count alike
            norm = self.norm / self.norm.mean(0).clamp(min=1e-30)
            worth = torch.zeros_like(worth).index_add_(0, inverse.view(-1), norm.view(-1))
        added, left, threshold = float(aux.added) + self.batch.numel(), int(aux.left), float(aux.threshold)
        self.batch = self.norm = None
        slot = sketch.see(ids, worth)
        if added > MASS * self.hot * threshold:
            sketch.score.mul_(FADE)
            added = 0
        score, row, bucket = sketch.score.view(-1), sketch.row.view(-1), torch.unique(sketch.bucket(ids))
        lowest = threshold if self.threshold is not None else SLACK * threshold
        cool = ((take(sketch.row, bucket) >= 0) & (take(sketch.score, bucket) < lowest)).nonzero()
        cool = bucket[cool[:, 0]] * SLOTS + cool[:, 1]
        aux.free[left:left + len(cool)] = take(row, cool).int()
        row.index_fill_(0, cool, -1)
        left += len(cool)
        asks = slot[(take(row, slot) < 0) & (take(score, slot) >= threshold)]
        slot = asks[torch.sort(take(score, asks), descending=True, stable=True).indices][:left]
        left -= len(slot)
        flat = take(sketch.key.view(-1), slot).long()
        field = self.fields.of(flat)
        # what the id looks up while it has no row of its own
        codes = self._shared(flat, field) if self.levels == 1 else self._pairs(flat, field)
        before = self.table.read(codes.view(-1)).view(*codes.shape, self.dim)
        own = aux.free[left:left + len(slot)].flip(0).long()
        row.index_copy_(0, slot, own.to(row.dtype))
        if self.threshold is None:
            threshold = threshold * UP if len(slot) < len(asks) else max(threshold * DOWN, 1) if (
                left > FREE * self.hot) else threshold
        for name, value in (("left", left), ("threshold", threshold), ("added", added)):
            getattr(aux, name).fill_(value)
        if self.levels == 2:
            self.level.fill_(MIDDLE * threshold)
            before, codes = self._sum(before, codes), codes[:, 0]
        self.table.write(own, before)
        for moments in optimizers.rows.moments if optimizers else ():
            for moment in moments or ():
                moment.index_copy_(0, own, take(moment, codes))

    def allocation(self):
        if self.levels == 2:
            rows = owned(self.fields, self.table.shape[0], self._pairs, self.table.weight.device)
            return self.dim * rows.clamp(max=1)
        return self.dim * alone(self.fields, self.table.shape[0], self._row, self.table.weight.device).int()

    def deploy(self):
        if not self.online and self.map is None:
            with self.table.weight.device:
                places = marked_ids(self.fields.n, self.hot)
            if not self.table.weight.is_meta:
                places.fill(self._settle(self.aux.sketch))
            self.map = places
        self.batch = self.norm = None
        return super().deploy()

    def _settle(self, sketch) -> torch.Tensor:
        """Put the rows of hot ids in the order of their ids, which it returns; of too few the best others fill up."""
        key, score = sketch.key.view(-1), sketch.score.view(-1).masked_fill(sketch.row.view(-1) >= 0, math.inf)
        known = key[torch.sort(score.masked_fill(key < 0, -1), descending=True, stable=True).indices].long()
        known = known[:int((key >= 0).sum())]
        more = torch.arange(min(self.fields.n, len(known) + self.hot), device=key.device)
        ids = torch.cat([known, more[~torch.isin(more, known)]])[:self.hot].sort().values
        weight, field = self.table.weight.detach(), self.fields.of(ids)
        weight[:self.hot] = take(weight, self._row(ids, field))
        return ids
