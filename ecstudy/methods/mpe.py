r"""Groups of ids of about equal frequency learn how many bits their numbers deserve, from none to six.

**Idea** (mixed-precision embeddings, MPE; Li et al., arXiv 2409.20305). Ids sorted by frequency are cut into ``groups``
of equal size. A number has a form of every width $b$ (LSQ+, arXiv 2004.09576), with $q_0 = 0$,
$$q_b(w) = \beta + \alpha_b \lfloor \mathrm{clip}((w - \beta) / \alpha_b,\ -2^{b-1},\ 2^{b-1} - 1) \rceil,$$
one learned step $\alpha_b$ per width and one offset $\beta$ per dimension; rounding passes gradients on. A group
takes the mixture $\sum_b p_{gb}\, q_b(w)$, $p_g = \mathrm{softmax}(\gamma_g / \tau)$, and the loss gets
$\lambda \sum_g \frac{1}{c_g} \sum_b b\, p_{gb}$ with the occurrences $c_g$ of a group over those of the rarest one.
Then each group keeps the largest width that has at least half of an equal share, $p \ge 1 / 14$, and is trained in that
width alone.

**Stored** for the ids of each width their codes, packed; which ids these are, by one map after the other, each the
lighter of a bit per id with running counts and sorted ids; the steps and the offset. Ids of no bits look up zeros and
are nowhere but in the maps. **Size** by ``limit``, the most bytes of all this. The paper's method has no budget: it
ends where ``penalty`` ($\lambda$) leads, and so does ``limit=None``.

**Training** two stages, both 300 % (and a byte per id). Everything is searched in one, on training rows; all budgets
share it. Then rows begin again with their first values, all else as the search left it, under a fresh optimiser.

**Deviations** Under a limit, ours, groups are lowered one by one, always where the least of $\log p$ is lost per byte
of codes, until all fits; nothing is raised. The published code counts bits per number; here the maps, without which
no id finds its codes unless ids are sorted by frequency, are charged. The published scale of the gradients of steps is
left out: Adam undoes it. A group that never occurs counts as one that does once. ``penalty`` is the published 3e-4 of
Criteo (Avazu 2e-6) and wants tuning: where all ids are about as frequent it takes all bits away. With $\tau$ = 0.003
and Adam, scores decide within some hundred steps whatever the learning rate.
"""
from __future__ import annotations

import torch
from torch import nn

from ..maps import marked_ids
from ..memory import memory
from ..method import Method, require_counts
from ..packed import Codes, code_bytes, pack
from ..tables import FloatTable, take

BLOCK = 1 << 16
LEAST = 1e-10                            # added to a step


class Levels(nn.Module):
    """Codes of ``numbers[b]`` ids of ``b`` bits each, and which ids these are."""

    def __init__(self, numbers, dim, device=None):
        super().__init__()
        # the most frequent width first: each map marks the ids left over, and those that follow are for these
        self.order = sorted((b for b, number in enumerate(numbers) if number), key=lambda b: -numbers[b])
        left, maps = sum(numbers), []
        with torch.device(device or torch.get_default_device()):
            for b in self.order[:-1]:
                maps.append(marked_ids(left, left - numbers[b]))
                left -= numbers[b]
        self.maps = nn.ModuleList(maps)
        self.codes = nn.ModuleDict({str(b): Codes(numbers[b], dim, b, device) for b in self.order if b})

    def fill(self, width):
        """``width [n]``: bits of each id."""
        for map_, b in zip(self.maps, self.order):
            map_.fill((width != b).nonzero().view(-1))
            width = width[width != b]

    def locate(self, ids):
        """Width of each of ``ids [k]``, and its place among the ids of that width."""
        width, place = torch.full_like(ids, self.order[-1]), ids
        left = torch.ones_like(ids, dtype=torch.bool)
        for map_, b in zip(self.maps, self.order):
            before, marked = map_.locate(torch.where(left, place, 0))
            width = torch.where(left & ~marked, b, width)
            place = torch.where(left, torch.where(marked, before, place - before), place)
            left = left & marked
        return width, place


class Mpe(Method):
    knob = "limit"
    family = "intra-feature"
    aware = "frequency and importance"
    group = "quantisation"
    paper = "arXiv 2409.20305"
    space = r"\frac{1}{32} \sum_b n_b (b d + 1.125)"
    time = r"O(d)"
    learns_size = True
    needs_counts = True

    def __init__(self, fields, dim, limit=None, counts=None, groups=128, most=6, penalty=3e-4, tau=3e-3, bits=None):
        super().__init__(fields, dim)
        if not 1 <= groups <= 255 or not 1 <= most <= 8:
            raise ValueError(f"groups={groups}, most={most}: expected 1 to 255 groups of ids and 1 to 8 bits")
        if penalty < 0 or tau <= 0:
            raise ValueError(f"penalty={penalty}, tau={tau}: expected a weight of at least 0 and a temperature above 0")
        self.each, self.most = -(-fields.n // groups), most
        self.groups = -(-fields.n // self.each)
        if bits is not None and (len(bits) != self.groups or not all(0 <= b <= most for b in bits)):
            raise ValueError(f"bits={bits}: expected {self.groups} widths from 0 to {most}, the rarest group first")
        least, largest = self._ends(fields, dim, groups, most)
        self.limit = largest if limit is None else limit
        if self.limit < least:
            raise ValueError(f"limit={limit}: expected at least {least} bytes, one bit for the most frequent group")
        self.penalty, self.tau = penalty, tau
        self.table = FloatTable(fields.n, dim, 0.0)
        # twice the mean magnitude over the root of the number of positive steps, as published
        self.alpha = nn.Parameter(fields.bound() / 2 ** (torch.arange(most) / 2))
        self.beta = nn.Parameter(torch.zeros(dim))
        self.aux = nn.Module()
        self.aux.gamma = nn.Parameter(torch.zeros(self.groups, most + 1), requires_grad=False)
        self.aux.register_buffer("group", torch.zeros(fields.n, dtype=torch.uint8))
        self.aux.register_buffer("price", torch.ones(self.groups))
        self.aux.register_buffer("width", torch.full((self.groups,), -1, dtype=torch.int64))      # -1: searched
        self.aux.register_buffer("seed", torch.randint(2 ** 62, ()))
        self.levels = None
        if (counts := require_counts(counts, fields, self.table.weight.device)) is not None:
            order = torch.sort(counts, stable=True).indices                                       # the rarest first
            rank = torch.arange(fields.n) // self.each
            self.aux.group[order] = rank.to(torch.uint8)
            total = torch.zeros(self.groups, dtype=torch.int64).index_add_(0, rank, counts[order]).clamp(min=1)
            self.aux.price.copy_(total.min() / total)
            self.begin()
        if bits is not None:
            self.settle(bits)

    @staticmethod
    def _numbers(bits, each, n):
        """Ids of each width 0, 1, ..."""
        sizes = [min(each, n - g * each) for g in range(len(bits))]
        return [sum(s for s, b in zip(sizes, bits) if b == width) for width in range(max(bits) + 1)]

    @classmethod
    def _ends(cls, fields, dim, groups, most):
        """Bytes at one bit for the most frequent group, and at most bits for all."""
        each = -(-fields.n // groups)
        count = -(-fields.n // each)
        return [memory(Levels(cls._numbers(bits, each, fields.n), dim, "meta")) + 4 * (most + dim)
                for bits in ([0] * (count - 1) + [1], [most] * count)]

    @classmethod
    def sizes(cls, fields, dim, groups=128, most=6, **options):
        least, largest = cls._ends(fields, dim, groups, most)
        return range(least, largest + 1)

    @torch.no_grad()
    def begin(self):
        """First values of all rows, the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(int(self.aux.seed))
        weight, bound = self.table.weight.detach(), self.fields.bound()
        first = weight if weight.device.type == "cpu" else torch.empty(weight.shape)
        torch.nn.init.uniform_(first, -bound, bound, generator=generator)
        if first is not weight:
            weight.copy_(first)

    def dense_parameters(self):
        return super().dense_parameters() + ([self.aux.gamma] if not self.deployed and self.aux.gamma.requires_grad
                                             else [])

    # --- look-up --------------------------------------------------------------------------------------------------

    def rounded(self, rows, alpha, width):
        """Codes of ``rows [U, D]`` in ``width`` bits at steps ``alpha``, from ``-2^(width - 1)`` on, and values."""
        half = 2.0 ** (width - 1)
        inside = ((rows - self.beta) / alpha).clamp(-half, half - 1)
        code = inside + (inside.round() - inside).detach()                   # rounding passes gradients on
        return code, code * alpha + self.beta

    def searched(self, rows, group):
        """The mixture of all widths."""
        share = take((self.aux.gamma / self.tau).softmax(1), group)
        return sum(share[:, b:b + 1] * self.rounded(rows, self.alpha[b - 1].abs() + LEAST, b)[1]
                   for b in range(1, self.most + 1))

    def settled(self, rows, width):
        """Codes from 0 on and values of ``rows [U, D]`` in the width of their group, ``width [U]``."""
        width = width[:, None]
        code, value = self.rounded(rows, take(self.alpha.abs() + LEAST, (width - 1).clamp(min=0)), width.clamp(min=1))
        return code + 2.0 ** (width - 1), value * (width > 0)

    def lookup(self, codes):
        flat, inverse = torch.unique(codes, return_inverse=True)
        if self.deployed:
            rows = self.stored(flat)
        else:
            group = take(self.aux.group, flat).long()
            rows, width = self.table.gather(flat), take(self.aux.width, group)
            rows = self.searched(rows, group) if self.aux.width[0] < 0 else self.settled(rows, width)[1]
        return torch.nn.functional.embedding(inverse, rows)

    def stored(self, flat):
        width, place = self.levels.locate(flat)
        out = torch.zeros(len(flat), self.dim, device=flat.device)
        for b, codes in self.levels.codes.items():
            own = (width == int(b)).nonzero().view(-1)
            code = codes.read(take(place, own)).float() - 2.0 ** (int(b) - 1)
            out[own] = code * (self.alpha[int(b) - 1].abs() + LEAST) + self.beta
        return out

    # --- the schedule ---------------------------------------------------------------------------------------------

    def schedule(self, run):
        if self.aux.width[0] < 0:
            label = f"mpe(groups={self.groups} most={self.most} penalty={self.penalty} tau={self.tau}) search"
            self.aux.gamma.requires_grad_(True)
            for step in run.fit("search", shared=label):
                step.penalty = self.weighed
                yield step
            self.aux.gamma.requires_grad_(False)
            self.settle(self.choose())
            self.begin()
        yield from run.fit("retrain")

    def weighed(self):
        share = (self.aux.gamma / self.tau).softmax(1)
        bits = torch.arange(self.most + 1, device=share.device)
        return self.penalty * (share @ bits.float() * self.aux.price).sum()

    def choose(self) -> list[int]:
        """Widths of the groups, the rarest first: those learned, lowered until they fit the limit."""
        score = (self.aux.gamma.detach() / self.tau).log_softmax(1).cpu().double()
        enough = score.exp() >= 1 / (2 * (self.most + 1)) - 1e-9
        bits = [int(row.nonzero()[-1]) for row in enough]
        bits[-1] = max(bits[-1], 1)
        fixed = 4 * (self.most + self.dim)

        def loss(g, b):                              # of log p, per byte of codes
            saved = code_bytes(self.dim, bits[g]) - (code_bytes(self.dim, b) if b else 0)
            return float(score[g, bits[g]] - score[g, b]) / saved

        while memory(Levels(self._numbers(bits, self.each, self.fields.n), self.dim, "meta")) + fixed > self.limit:
            g, b = min(((g, b) for g in range(self.groups) for b in range(g == self.groups - 1, bits[g])),
                       key=lambda step: loss(*step))
            bits[g] = b
        return bits

    def settle(self, bits):
        self.aux.width.copy_(torch.tensor(bits))
        self.fitted = {"bits": [int(b) for b in bits]}

    def deploy(self):
        if not self.deployed:
            weight, bits = self.table.weight.detach(), self.fitted.get("bits")
            if bits is None and not weight.is_meta:
                self.settle(bits := self.choose())               # by what somebody's own loop has learned
            if bits is None:                                     # not known yet: the most that may come of it
                self.levels = nn.Module()
                rest = self.limit - 4 * (self.most + self.dim)
                self.levels.register_buffer("content", torch.zeros(rest, dtype=torch.uint8, device="meta"))
            else:
                self.levels = Levels(self._numbers(bits, self.each, self.fields.n), self.dim, weight.device)
                if not weight.is_meta:
                    self.pack_rows(weight)
            del self.table
        return super().deploy()

    @torch.no_grad()
    def pack_rows(self, weight):
        self.levels.fill(take(self.aux.width.to(torch.uint8), self.aux.group.long()))
        for start in range(0, len(weight), BLOCK):
            rows = weight[start:start + BLOCK]
            ids = torch.arange(start, start + len(rows), device=rows.device)
            width, place = self.levels.locate(ids)
            code = self.settled(rows, width)[0]
            for b, codes in self.levels.codes.items():
                own = (width == int(b)).nonzero().view(-1)
                if len(own):                                     # places of a width rise with the ids
                    codes.write(int(place[own[0]]), pack(code[own], int(b)))
