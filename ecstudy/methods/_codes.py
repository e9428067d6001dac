"""What product quantisation in training shares: queries that are trained, centroids that answer for them, codes."""
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..memory import memory
from ..packed import Marks, PackedCodes
from ..ragged import PerField
from ..tables import FloatTable, as_rows, take
from ._nearest import Tiles, augmented, codes_of, lloyd, scoring
from ._pointed import Pointed, picked

SAMPLE = 128                           # rows per centroid that k-means learns from
MOMENTUM = 0.1                         # of the running statistics, as usual in batch normalisation


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


class _StraightThrough(torch.autograd.Function):
    """Gives ``value``. Backward, the query takes its gradient, and both losses of vector quantisation pull."""

    @staticmethod
    def forward(ctx, query, centroid, value, query_pull, centroid_pull):
        ctx.save_for_backward(query_pull, centroid_pull)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        query_pull, centroid_pull = ctx.saved_tensors
        return grad + query_pull, centroid_pull, None, None, None


class Coded(Pointed):
    """Fields that gain by it hold codes into ``high`` centroids per part, the others a plain table.

    All but the share ``top`` of a field's ids, the most frequent, may use the first ``low`` centroids only.
    """

    knob = "parts"
    group = "product quantisation"

    def __init__(self, fields, dim, parts, high, low, *, top=0.0, counts=None, dot=False, beta=0.0, normalise=False,
                 revive=100):
        super().__init__(fields, dim)
        sizes = divisors(dim)
        self.parts = sizes[-2 if dim > 1 else 0] if parts is None else parts
        if self.parts not in sizes:
            raise ValueError(f"parts={parts}: expected a divisor of the embedding dimension {dim}, one of {sizes}")
        self.width = dim // self.parts                                   # of a centroid
        for name, value in (("beta", beta), ("revive", revive)):
            if value < 0:
                raise ValueError(f"{name}={value}: expected 0 or more")
        # a field is coded or whole whatever the knob says, so that bytes never fall along it
        usual = sizes[-2 if dim > 1 else 0]
        size = np.array(fields.sizes, dtype=np.int64)
        often = (top * size).astype(np.int64)
        high = high if often.any() else low
        self.k, self.low, self.dot, self.beta = high, low, dot, float(beta)
        self.normalise, self.revive = normalise, int(revive)

        def coded_bytes(n, often):
            stored = memory(self._packed(n, often, usual, "meta")) + (memory(Marks(n, "meta")) if often else 0)
            return stored + 4 * high * dim

        gains = np.array([coded_bytes(n, m) < 4 * n * dim for n, m in zip(size.tolist(), often.tolist())])
        self._lay_out(gains)
        coded, self.rows, self.often = self.coded.tolist(), self.numbers, int(often[gains].sum())
        bound = fields.bound()
        self.marks = Marks(self.rows) if self.often else None            # the frequent ids
        self.table = self._plain()
        self.centroids = self.codes = None
        if len(coded):
            self.centroids = FloatTable(len(coded) * self.parts * high, self.width, bound)
            self._auxiliary(bound)
        if self.marks is not None and counts is not None:
            chosen = []
            for f, start in zip(coded, self.start.tolist()):             # exactly so many, ties to the lower id
                mine = counts[fields.offset[f]:fields.offset[f] + fields.sizes[f]]
                order = torch.sort(mine, descending=True, stable=True).indices[:often[f]]
                chosen.append(order.sort().values + start)
            self.marks.fill(torch.cat(chosen))

    def _auxiliary(self, bound):
        """State of training: the queries, keys apart from the values in dot-product mode, statistics."""
        self.aux = nn.Module()
        self.aux.query = FloatTable(self.rows, self.dim, bound)
        groups, width = len(self.coded) * self.parts, self.width
        if self.dot:
            self.aux.key = FloatTable(*self.centroids.shape, bound)
        if self.normalise:
            self.aux.register_buffer("mean", torch.zeros(groups, width + 1))
            self.aux.register_buffer("cov", torch.eye(width + 1).repeat(groups, 1, 1))
            self.aux.register_buffer("seen", torch.zeros(()))
        self.aux.register_buffer("used", torch.zeros(self.centroids.shape[0]))
        self.last = None

    def _packed(self, rows, often, parts, device=None):
        bits, wide_bits = self.low.bit_length() - 1, self.k.bit_length() - 1
        return PackedCodes(rows, parts, bits, often, wide_bits, device)

    @classmethod
    def sizes(cls, fields, dim, **options):
        return divisors(dim)

    # --- encoding -----------------------------------------------------------------------------------------------

    def encode(self, ids):
        """Rows (after deployment centroids) of the coded fields, and rows of the fields left whole."""
        row, whole = self._numbered(ids)
        return (self._centroid(row) if self.deployed and row is not None else row), whole

    def _centroid(self, row):
        """Centroids ``[B, Fc, parts]`` that the stored codes of ``row [B, Fc]`` name."""
        codes = self.codes.read(row, *(self.marks.locate(row) if self.marks is not None else ()))
        group = torch.arange(row.shape[1] * self.parts, device=row.device)
        return codes + self.k * group.view(-1, self.parts)

    def _rare(self, row):
        return None if self.marks is None else self.marks.locate(row)[1] == 0

    def _keys(self):
        holder = self.aux.key if self.dot and "aux" in self._modules else self.centroids
        return holder.weight.detach().view(-1, self.k, self.width)

    def _statistics(self, x, per):
        """Mean and covariance of the batch's augmented sub-vectors in every (field, part), over occurrences."""
        x = augmented(x)[..., :-1]
        total = per.inverse.shape[0]                                     # every field occurs once in a row
        share = per.count[:, None, None] / total

        def mean_of(values):
            out = values.new_zeros((per.fields,) + values.shape[1:])
            return out.index_add(0, per.field, values * share.view((-1,) + (1,) * (values.dim() - 1)))

        mean = mean_of(x)
        centred = x - mean.index_select(0, per.field)
        cov = mean_of(centred[..., :, None] * centred[..., None, :])
        return mean.flatten(0, 1), cov.flatten(0, 1)

    def _weights(self, key, statistics=None):
        if self.normalise and statistics is None and "aux" in self._modules:
            statistics = self.aux.mean, self.aux.cov
        return scoring(key, self.dot, *(statistics or ()))

    # --- looking up ---------------------------------------------------------------------------------------------

    def lookup(self, codes):
        code, whole = codes
        whole = self.table.gather(whole) if whole is not None else None
        if code is None:
            return self._joined(None, whole)
        if self.deployed:
            out = self.centroids.gather(code).flatten(-2)
        else:
            per = PerField(code, self.start)
            out = take(self._value(per), per.inverse)
        return self._joined(out, whole)

    def _value(self, per):
        """What the distinct ids of a batch stand for at present ``[U, D]``."""
        training = self.training and torch.is_grad_enabled() and len(per.unique) > 0
        query = self.aux.query.gather(per.unique)
        x, rare = query.view(-1, self.parts, self.width), self._rare(per.unique)
        statistics = None
        if training and self.normalise:
            statistics = self._statistics(x if self.dot else x.detach(), per)
            with torch.no_grad():
                self.aux.seen += 1
                weight = (1 / self.aux.seen).clamp(min=MOMENTUM)         # a plain mean until there are enough
                self.aux.mean.lerp_(statistics[0], weight)
                self.aux.cov.lerp_(statistics[1], weight)
        with torch.no_grad():
            weights = self._weights(self._keys(), tuple(s.detach() for s in statistics) if statistics else None)
            code = codes_of(x.detach(), per.field, rare, weights, self.low)
            place = code + self.k * (per.field[:, None] * self.parts + torch.arange(self.parts, device=code.device))
        if not training:
            return self.centroids.gather(place).flatten(1)
        share = per.count.repeat_interleave(self.parts).float()
        used = torch.bincount(place.view(-1), share, self.centroids.shape[0])
        self.aux.used.add_(used)
        self.last = per.unique, per.field, rare
        if self.dot:
            return self._soft(x, per, place, statistics)
        return self._pulled(query, per, place, used)

    def _pulled(self, query, per, place, used):
        """Vector quantisation: straight to the query, and the codebook and commitment losses as gradients.

        The losses are mean squared differences over the batch's occurrences in a field, summed over fields.
        """
        row = used.nonzero().view(-1)
        centroid = self.centroids.gather(row)
        with torch.no_grad():
            value = self.centroids.read(place.view(-1)).view_as(query)
            each = query * per.count[:, None]
            total = torch.zeros(self.centroids.shape, device=query.device)
            total.index_add_(0, place.view(-1), each.view(-1, centroid.shape[1]))
            scale = 2 / (per.inverse.shape[0] * self.dim)
            centroid_pull = scale * (used.index_select(0, row)[:, None] * centroid - total.index_select(0, row))
            query_pull = self.beta * scale * (each - value * per.count[:, None])
        return _StraightThrough.apply(query, centroid, value, query_pull, centroid_pull)

    def _soft(self, x, per, place, statistics):
        """Soft-max of the responses: the value of the loudest centroid, the gradient of all of them."""
        shape = (-1, self.k, self.width)
        key = self.aux.key.gather(torch.arange(self.aux.key.shape[0], device=x.device)).view(shape)
        tiles = Tiles(per.field, per.fields)
        pair = tiles.pairs(self.parts)
        share = torch.bmm(tiles.pad(augmented(x)), take(self._weights(key, statistics), pair)).softmax(-1)
        soft = torch.bmm(share, take(self.centroids.weight.detach().view(shape), pair))
        soft = tiles.unpad(soft, self.parts)
        return (self.centroids.gather(place) + soft - soft.detach()).flatten(1)

    # --- training -----------------------------------------------------------------------------------------------

    def schedule(self, run):
        for number, step in enumerate(run.fit("train"), 1):
            yield step
            if self.revive and number % self.revive == 0 and run.optimizers is not None and self.centroids is not None:
                self.reseed(run.optimizers.rows)

    @torch.no_grad()
    def reseed(self, optimizer) -> int:
        """Put every centroid that no id chose lately on a random query of the last batch; how many were moved."""
        unique, field, rare = self.last
        dead = (self.aux.used == 0).nonzero().view(-1)
        self.aux.used.zero_()
        group, k = dead // self.k, dead % self.k
        source = torch.full_like(dead, -1)
        pools = [(torch.ones_like(dead, dtype=torch.bool), torch.arange(len(unique), device=dead.device))]
        if rare is not None:                                             # upper centroids serve frequent ids only
            pools = [(k < self.low, pools[0][1]), (k >= self.low, (~rare).nonzero().view(-1))]
        for mine, pool in pools:
            count = torch.bincount(field[pool], minlength=len(self.coded))
            first = count.cumsum(0) - count
            of = group[mine] // self.parts
            place = first[of] + (torch.rand(len(of), device=of.device) * count[of]).long().clamp(max=count[of] - 1)
            found = torch.full_like(of, -1)
            found[count[of] > 0] = unique[pool[place[count[of] > 0]]]
            source[mine] = found
        dead, group, source = (x[source >= 0] for x in (dead, group, source))
        query = self.aux.query.read(source).view(-1, self.parts, self.width)
        value = query[torch.arange(len(source), device=dead.device), group % self.parts]
        value = value + 0.01 * value.abs().mean() * torch.randn_like(value) if len(value) else value
        holder = self.aux.key if self.dot else self.centroids            # what answers moves; a value apart stays
        holder.write(dead, value)
        moments = optimizer.moments[[h is holder for h in optimizer.holders].index(True)]
        for moment in moments or ():
            moment.index_fill_(0, dead, 0)
        return len(dead)

    # --- what ships ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _code_rows(self, source, first) -> None:
        """Code all rows of the coded fields; field ``f`` of them begins at row ``first[f]`` of ``source``."""
        weights, block = self._weights(self._keys()), max(1024, (1 << 21) // self.dim)
        ends = [*self.start.tolist()[1:], self.rows]
        for f, (begin, end) in enumerate(zip(self.start.tolist(), ends)):
            for at in range(begin, end, block):
                x = as_rows(source, first[f] + at - begin, min(block, end - at)).to(weights.device)
                row = torch.arange(at, at + len(x), device=x.device)
                before, often = self.marks.locate(row) if self.marks is not None else (0 * row, 0 * row)
                codes = codes_of(x.view(-1, self.parts, self.width), torch.full_like(row, f),
                                 None if self.marks is None else often == 0, weights, self.low)
                for wide in (False, True):
                    mine = (often == wide).nonzero().view(-1)
                    self.codes.write(row[mine], codes[mine], before[mine], wide)

    def deploy(self):
        if not self.deployed and self.centroids is not None:
            self.codes = self._packed(self.rows, self.often, self.parts, self.centroids.weight.device)
            if not self.centroids.weight.is_meta:
                self._code_rows(self.aux.query.weight, self.start.tolist())
            self.last = None
        return super().deploy()

    def fit(self, rows):
        """k-means per field and part, then the nearest centroid (also on a deployed module, which holds no queries)."""
        if self.dot:
            super().fit(rows)
        self.normalise = False
        offset, size = self.fields.offset.tolist(), self.fields.sizes
        self._fill_plain(rows)
        for f, (field, first) in enumerate(zip(self.coded.tolist(), self.start.tolist())):
            row, weight = self._sample(first, size[field], field)
            x = picked(rows, row - first + offset[field])
            centroid = lloyd(x.view(-1, self.parts, self.width), self._rare(row), weight, self.k, self.low)
            place = f * self.parts * self.k
            self.centroids.weight.detach()[place:place + self.parts * self.k] = centroid.flatten(0, 1)
            if not self.deployed:
                for at in range(0, size[field], 1 << 14):
                    part = as_rows(rows, offset[field] + at, min(1 << 14, size[field] - at))
                    self.aux.query.weight.detach()[first + at:first + at + len(part)] = part
        if self.deployed and self.centroids is not None:
            self._code_rows(rows, [offset[field] for field in self.coded.tolist()])

    def _sample(self, first, size, seed):
        """Rows of one coded field for k-means, frequent and rare ones apart, and how many each stands for."""
        row = torch.arange(first, first + size, device=self.start.device)
        rare, rows, weights = self._rare(row), [], []
        generator = torch.Generator(row.device).manual_seed(seed)
        for pool in ([row] if rare is None else [row[~rare], row[rare]]):
            pick = torch.randperm(len(pool), generator=generator, device=row.device)[:SAMPLE * self.k].sort().values
            rows.append(pool[pick])
            weights.append(torch.full((len(pick),), len(pool) / max(len(pick), 1), device=row.device))
        return torch.cat(rows), torch.cat(weights)
