r"""Ids of a field share the vectors of clusters; clusters split, and ids move between them, as gradients say.

**Idea** (Clustered Embedding Learning, CEL; Chen et al., WWW 2023, arXiv 2302.01478). Id $i$ has the vector of its
cluster, $e_{c(i)}$. Training of the vectors is interrupted at intervals to improve the clusters, in two ways by turns.

*Split.* The gradients $G_i$ of a cluster's ids with respect to the vector that they share are projected on their first
principal component, and the cluster parts where the projection changes its sign: those ids pull in opposite directions.
Both halves begin with the same vector. A cluster must have had more than $2b$ interactions.

*Reassignment.* An id moves to the cluster with which the loss of its own interactions is least. That loss is taken to
second order around the id's present cluster,
$$\Delta_i(c) = G_i^\top \delta + \tfrac12 (N_i + \nu)\, \delta^\top F \delta, \qquad \delta = e_c - e_{c(i)},$$
with the $N_i$ interactions of the interval and the Fisher matrix $F$ of the field, the mean of $g g^\top$ over its
interactions, which for a log loss is the mean curvature. Over $c$ it is a nearest-neighbour problem.

**Stored** up to $M$ vectors for every field, and for every id the number of its cluster in $\lceil \log_2 M \rceil$
bits. A field where 64 clusters would save nothing is a plain table. **Size** by ``clusters`` = $M$, the same for all
fields, but no more than half as many as a field has ids. The paper sets no size: it splits as long as clusters have
interactions enough. Clusters that no split needed, or that lost all their ids, ship unused.

**Training** one stage, interrupted every ``every`` epochs, ``rounds`` times. Ids begin in $M / 2^s$ clusters
(``splits`` = $s$, at least one cluster) by their remainder, so that $s$ splits of all clusters make $M$. Training
holds besides the vectors and their moments the gradient and the interactions of every id and its cluster: 112.5 % of
the full table at dimension 16. The gradients are the batches' own, summed as they come. ``fit`` clusters a given
matrix by $k$-means.

**Deviations** The paper starts at one cluster; here so do sizes up to $2^s$ only, because tens of thousands of clusters
are sixteen doublings away from one. It computes losses and gradients in passes of their own over an id's history; here
the interval between two interruptions is the history, and the loss the second-order one. $\nu$ interactions (``prior``)
speak for where an id is: otherwise ids seen once move after one label. When fewer clusters are free than might split,
those split first that gain most, by the same quadratic model and less what noise gains on average, $1/\pi$ for every
id. Where a field has more than ``candidates`` clusters, so many drawn at random are compared. Half a cluster begins
with its parent's moments. $b$ (``least``), intervals and $\nu$ are our choice. The paper has users and items, here any
field is clustered. CEL-Lite, which serves online updates, is left out.
"""
from __future__ import annotations

import math

import torch
from torch import nn

from ..fields import derived
from ..packed import Bitstream
from ..tables import FloatTable, take
from ._nearest import lloyd
from ._pointed import FEW, Pointed, answers, best, drawn, lazy_zeros, nearest, picked

BLOCK = 1 << 16                          # ids looked at together
POWER = 8                                # iterations that find a principal component
POINTS = 256                             # ids per cluster that k-means of a matrix learns from


class _Watched(torch.autograd.Function):
    """Gives ``out [B, Fc, D]`` as it is, and shows its gradient to the method."""

    @staticmethod
    def forward(ctx, out, method, number):
        ctx.method, ctx.number = method, number
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        ctx.method.watch(ctx.number, grad)
        return grad, None, None


class Cel(Pointed):
    knob = "clusters"
    paper = "arXiv 2302.01478"
    group = "clustering"
    space = r"\frac{1}{32} n \log_2 M + M F d"
    time = r"O(d)"

    def __init__(self, fields, dim, clusters=None, splits=4, every=0.25, rounds=20, least=10, prior=10.0,
                 candidates=4096):
        super().__init__(fields, dim)
        most = max(1, fields.largest // 2)
        self.clusters = min(4096, most) if clusters is None else clusters
        for name, value, low, high in (("clusters", self.clusters, 1, most), ("splits", splits, 0, 30),
                                       ("rounds", rounds, 0, 1 << 16), ("candidates", candidates, 1, 1 << 20)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: expected an integer from {low} to {high}")
        for name, value, low in (("every", every, 1e-9), ("least", least, 0), ("prior", prior, 0)):
            if not value >= low:
                raise ValueError(f"{name}={value}: expected a number {'above 0' if low else 'of at least 0'}")
        self.every, self.rounds, self.least, self.prior, self.candidates = every, rounds, least, prior, candidates
        # a field is coded or whole whatever the knob says, so that bytes never fall along it
        gains = [size + FEW * dim * 4 < size * dim * 4 for size in fields.sizes]
        self._lay_out(gains, align=8)
        each = [min(self.clusters, size // 2) for size, coded in zip(fields.sizes, gains) if coded]
        derived(self, "each", each)
        derived(self, "begin", [sum(each[:f]) for f in range(len(each))])
        self.bits = max(1, (max(each, default=1) - 1).bit_length())
        self.table = self._plain()
        self.vectors = self.index = None
        if self.numbers:
            self.vectors = FloatTable(sum(each), dim, fields.bound())
            self.aux = nn.Module()
            self.aux.register_buffer("cluster", torch.zeros(self.numbers, dtype=torch.int32))
            self.aux.register_buffer("gradient", lazy_zeros(self.numbers, dim))
            self.aux.register_buffer("seen", lazy_zeros(self.numbers))
            self.aux.register_buffer("fisher", torch.zeros(len(each), dim, dim))
            self.aux.register_buffer("round", torch.zeros((), dtype=torch.int64))
            for (size, first, _), k in zip(self.coded_fields(), each):
                if not self.vectors.weight.is_meta:
                    some = torch.arange(size, dtype=torch.int32) % max(1, k >> splits)
                    self.aux.cluster[first:first + size] = some

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, max(1, fields.largest // 2) + 1)

    def encode(self, ids):
        number, whole = self._numbered(ids)
        if number is None:
            return None, whole
        cluster = self.index.read(number)[..., 0] if self.deployed else take(self.aux.cluster, number)
        return (cluster + self.begin, number), whole

    def lookup(self, codes):
        code, whole = codes
        out = None
        if code is not None:
            out = self.vectors.gather(code[0])
            if self.training and torch.is_grad_enabled() and not self.deployed:
                out = _Watched.apply(out, self, code[1])
        return self._joined(out, self.table.gather(whole) if whole is not None else None)

    # --- what the interval shows --------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(self, number, grad):
        """Add the gradient ``[B, Fc, D]`` of a mean over the batch to what is known of ids ``number [B, Fc]``."""
        grad, aux = grad * len(grad), self.aux                           # of the interactions themselves
        aux.gradient.index_add_(0, number.reshape(-1), grad.reshape(-1, self.dim))
        aux.seen.index_add_(0, number.reshape(-1), aux.seen.new_ones(number.numel()))
        aux.fisher.add_(torch.einsum("bfd,bfe->fde", grad, grad))

    def _seen(self, first, size):
        """Blocks of the ids with interactions: numbers [m], gradients [m, D], interactions [m], clusters [m]."""
        aux = self.aux
        for start in range(first, first + size, BLOCK):
            number = aux.seen[start:min(start + BLOCK, first + size)].nonzero().view(-1) + start
            if len(number):
                yield number, take(aux.gradient, number), take(aux.seen, number), take(aux.cluster, number).long()

    def schedule(self, run):
        every = max(1, round(self.every * run.steps_per_epoch))
        for number, step in enumerate(run.fit("train"), 1):
            yield step
            if number % every == 0 and number // every <= self.rounds:
                self.regroup(run.optimizers.rows if run.optimizers is not None else None)

    @torch.no_grad()
    def regroup(self, optimizer=None) -> int:
        """Split clusters, or every second time reassign ids; how many ids moved. Then a new interval begins.

        ``optimizer`` (a ``RowAdam``) gives half a cluster the moments of its parent.
        """
        if self.vectors is None:
            return 0
        moments = [m for h, pair in zip(optimizer.holders, optimizer.moments) if h is self.vectors
                   for m in pair or ()] if optimizer is not None else []
        generator = torch.Generator().manual_seed((self.seed << 16) + int(self.aux.round))
        moved = 0
        for f, (size, first, _) in enumerate(self.coded_fields()):
            total = float(self.aux.seen[first:first + size].sum())
            if total:
                fisher, blocks = self.aux.fisher[f] / total, lambda: self._seen(first, size)
                held = torch.bincount(self.aux.cluster[first:first + size], minlength=int(self.each[f]))
                if self.aux.round % 2:
                    moved += self._reassign(f, held, fisher, blocks, generator)
                else:
                    moved += self._split(f, held, fisher, blocks, generator, moments)
            for number, *_ in self._seen(first, size):
                self.aux.gradient[number], self.aux.seen[number] = 0.0, 0.0
        self.aux.fisher.zero_()
        self.aux.round.add_(1)
        return moved

    def _split(self, f, held, fisher, blocks, generator, moments):
        k, begin, free = len(held), int(self.begin[f]), (held == 0).nonzero().view(-1)
        if not len(free):
            return 0
        mass, pull, ids = (fisher.new_zeros(shape) for shape in (k, (k, self.dim), k))
        for _, gradient, seen, cluster in blocks():
            mass.index_add_(0, cluster, seen)
            pull.index_add_(0, cluster, gradient)
            ids.index_add_(0, cluster, torch.ones_like(seen))
        mean = pull / mass.clamp(min=1)[:, None]                         # what all of them want is no reason to part

        def apart(gradient, seen, cluster):
            return gradient - seen[:, None] * take(mean, cluster)

        axis = torch.randn(k, self.dim, generator=generator).to(fisher.device)
        for _ in range(POWER):
            turned = torch.zeros_like(axis)
            for _, gradient, seen, cluster in blocks():
                x = apart(gradient, seen, cluster)
                turned.index_add_(0, cluster, x * (x * take(axis, cluster)).sum(1, keepdim=True))
            axis = turned / turned.norm(dim=1, keepdim=True).clamp(min=1e-30)
        upper, force = torch.zeros_like(mass), torch.zeros_like(mass)
        for _, gradient, seen, cluster in blocks():
            side = (apart(gradient, seen, cluster) * take(axis, cluster)).sum(1)
            upper.index_add_(0, cluster, seen * (side > 0))
            force.index_add_(0, cluster, side.clamp(min=0))              # the lower half pulls as much the other way
        lower = mass - upper
        axis[upper > lower] *= -1                                        # who was not seen stays with the larger half
        curve = ((axis @ fisher) * axis).sum(1).clamp(min=1e-30)
        gain = force.square() / 2 * (1 / upper + 1 / lower) / curve - ids / math.pi
        able = ((mass > 2 * self.least) & (upper > 0) & (lower > 0) & (gain > 0)).nonzero().view(-1)
        parent = able[torch.sort(gain[able], descending=True, stable=True).indices][:len(free)]
        free = free[:len(parent)]
        child = torch.full_like(held, -1)
        child[parent] = free
        moved = 0
        for number, gradient, seen, cluster in blocks():
            side, to = (apart(gradient, seen, cluster) * take(axis, cluster)).sum(1), take(child, cluster)
            leaves = (side > 0) & (to >= 0)
            self.aux.cluster[number[leaves]] = to[leaves].int()
            moved += int(leaves.sum())
        for rows in (self.vectors.weight.detach(), *moments):
            rows[begin + free] = rows[begin + parent]
        return moved

    def _reassign(self, f, held, fisher, blocks, generator):
        begin, live = int(self.begin[f]), held.nonzero().view(-1)
        live = live[drawn(len(live), self.candidates, generator).to(live.device)]
        vector, moved = self.vectors.read(begin + live), 0
        # the loss is least where the product with e F - G / (N + prior), less half of e_c F e_c, is largest
        weights = answers(2 * vector[None], ((vector @ fisher) * vector).sum(1)[None])
        for number, gradient, seen, cluster in blocks():
            own, seen = self.vectors.read(begin + cluster), (seen + self.prior)[:, None]
            to = best(own @ fisher - gradient / seen, weights)
            step = take(vector, to) - own
            change = ((gradient + seen / 2 * (step @ fisher)) * step).sum(1)
            leaves = change < 0
            self.aux.cluster[number[leaves]] = live[to[leaves]].int()
            moved += int(leaves.sum())
        return moved

    # --- what ships ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, rows):
        self._fill_plain(rows)
        generator = torch.Generator().manual_seed(self.seed)
        for f, (size, first, row) in enumerate(self.coded_fields()):
            k, begin, device = int(self.each[f]), int(self.begin[f]), self.vectors.weight.device
            x = picked(rows, row + drawn(size, POINTS * k, generator).to(device))
            centroid = lloyd(x[:, None], None, x.new_ones(len(x)), k, k, seed=self.seed + f)
            self.vectors.weight[begin:begin + k] = centroid[0]
            for index, _, code in nearest(lambda index: picked(rows, row + index)[:, None], size, centroid):
                if self.deployed:
                    self.index.write(first + int(index[0]), code)
                else:
                    self.aux.cluster[first + index] = code[:, 0].int()

    def deploy(self):
        if not self.deployed and self.vectors is not None:
            self.index = Bitstream(self.numbers, 1, self.bits, self.vectors.weight.device)
            for start in range(0, self.numbers if not self.vectors.weight.is_meta else 0, BLOCK):
                self.index.write(start, self.aux.cluster[start:start + BLOCK, None])
        return super().deploy()
