r"""A vector is a sum of codewords, chosen one after the other by what the chosen ones leave over.

**Idea** (LightRec; Lian et al., WWW 2020). Level $b$ of $B$ compares what is left of an
id's full vector with the $W$ codewords of its codebook, takes the most similar one, and passes on the rest,
$$w_b = \arg\max_w\, s_b(x_b, c^{(b)}_w), \qquad x_{b+1} = x_b - c^{(b)}_{w_b}, \qquad e = \sum_b c^{(b)}_{w_b} .$$
The similarity is bilinear with a learned matrix for every level, $x^\top M_b\, c$. In training the choice is a
straight-through soft-max: forward the codeword chosen, backward the gradient of $\mathrm{softmax}(s_b / T)$, which
reaches all codewords, the matrices, the levels before and the full vector. A distillation loss keeps the sum close to
the vector that it stands for.

**Stored** for every id $B$ codes of $\log_2 W$ bits in $\lceil B \log_2 W / 8 \rceil$ bytes, and for every field
$B W \times D$ numbers of codewords; full vectors and matrices are gone. A field of so few ids that this would not be
smaller at eight levels is a plain table. **Size** by ``books`` = $B$, at most the embedding dimension. Beside ``dpq``
with as many codes of as many bits, which cuts a vector into parts, codebooks weigh $B$ times as much and use what
columns have in common. At dimension 16 each level of 256 codewords takes 1.56 % of full, so 1 % is out of reach.

**Training** two stages: the full table, as other methods have it; then every codebook begins as the centroids of
$k$-means of what the earlier ones leave over, and codewords, matrices and the network are trained while full vectors
stay as they are. With ``tune=True`` they go on training too, as they do in a loop of your own. Validation codes ids
afresh, and deployment codes all rows, block by block. In memory: the full table and its moments, 300 %, and codebooks
on top. ``fit`` is the $k$-means of the second stage's beginning.

**Deviations** The published code has $s_b = x^\top M_b\, c$ with random $M_b$, so that long codewords are chosen for
their length; here the similarity is $2\, x^\top M_b\, c - \lVert c\rVert^2$ with $M_b = 1$ at first, the nearest
codeword; ``similarity="bilinear"`` leaves the length out. $T$ (0.9, as published) is relative to the mean squared
length of a level's codewords: vectors of a click model are far shorter than one. The paper distils the scores and the
order of items for a user; a click model has neither, and what is distilled is the vector itself, as in a later code
of the first author: the mean square of $e - \mathrm{sg}(x)$ over a batch, summed over fields, times ``distil``. It
acts as a gradient in the backward pass, so the module trains in any loop. How the paper keeps codebooks diverse was not
recovered; $k$-means of what is left over is our choice (it stands in the published code as a comment). Full vectors
are fixed in the published code; the paper speaks of training end to end.
"""
from __future__ import annotations

import torch
from torch import nn

from ..packed import PackedCodes
from ..ragged import PerField
from ..tables import FloatTable, take
from ._nearest import Tiles, augmented, lloyd, loudest
from ._pointed import BLOCK, Pointed, answers, drawn, picked

USUAL = 8                                # levels at which a field must be smaller than a plain table
POINTS, ROUNDS = 128, 10                 # ids per codeword that k-means learns from, and its iterations


class _Drawn(torch.autograd.Function):
    """Gives ``value``; its gradient is drawn by ``pull`` besides."""

    @staticmethod
    def forward(ctx, value, pull):
        ctx.save_for_backward(pull)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.saved_tensors[0], None


class LightRec(Pointed):
    knob = "books"
    paper = "WWW 2020 (Lian et al.)"
    group = "additive codes"
    space = r"\frac{1}{32} n B \log_2 W + F B W d"
    time = r"O(B d)"

    def __init__(self, fields, dim, books=None, codewords=256, similarity="distance", temperature=0.9, distil=1.0,
                 tune=False):
        super().__init__(fields, dim)
        if codewords not in [2 ** b for b in range(1, 9)]:
            raise ValueError(f"codewords={codewords}: expected a power of two from 2 to 256")
        if similarity not in ("distance", "bilinear"):
            raise ValueError(f"similarity={similarity!r}: expected 'distance' or 'bilinear'")
        if not temperature > 0 or not distil >= 0:
            raise ValueError(f"temperature={temperature}, distil={distil}: expected a positive temperature and a "
                             "weight of at least 0")
        self.books = min(USUAL, dim) if books is None else books
        if isinstance(self.books, bool) or not isinstance(self.books, int) or not 1 <= self.books <= dim:
            raise ValueError(f"books={books!r}: expected an integer from 1 to the embedding dimension, {dim}")
        self.k, self.bits, self.distance = codewords, codewords.bit_length() - 1, similarity == "distance"
        self.temperature, self.distil, self.tune = temperature, distil, tune
        self.plain = self.fixed = False                                  # how a stage of the schedule looks up
        self._lay_out([-(-USUAL * self.bits // 8) * size + 4 * USUAL * codewords * dim < 4 * size * dim
                       for size in fields.sizes])
        self.table = FloatTable(fields.n, dim, fields.bound())           # of all fields, until it is deployed
        self.codeword = self.codes = None
        if self.numbers:
            self.aux = nn.Module()
            levels = len(self.coded) * self.books
            self.aux.codeword = FloatTable(levels * codewords, dim, fields.bound() / self.books ** 0.5)
            self.aux.matrix = FloatTable(levels * dim, dim, 0.0)
            if not self.aux.matrix.weight.is_meta:
                self.aux.matrix.weight.detach().copy_(torch.eye(dim).repeat(levels, 1))

    @classmethod
    def sizes(cls, fields, dim, **options):
        return range(1, dim + 1)

    # --- choosing codewords -------------------------------------------------------------------------------------------

    def _weights(self, codeword, matrix):
        """Weights ``[Fc, B, D + 2, W]`` of all similarities, from ``[Fc * B * W, D]`` and ``[Fc * B * D, D]``."""
        codeword, matrix = codeword.view(-1, self.k, self.dim), matrix.view(-1, self.dim, self.dim)
        length = codeword.square().sum(-1)
        linear = 2 * codeword @ matrix.transpose(1, 2)
        weights = answers(linear, length if self.distance else torch.zeros_like(length))
        # relative to the codewords' own length, which is no part of the choice
        scale = 1 / (self.temperature * length.detach().mean(1).clamp(min=1e-30))
        return (weights * scale[:, None, None]).view(-1, self.books, self.dim + 2, self.k)

    def _coded(self, x, field):
        """Rows ``[m, B]`` of the codewords of vectors ``x [m, D]`` of coded fields ``field [m]`` (ascending)."""
        weights, begin, place = self._weights(self.aux.codeword.weight, self.aux.matrix.weight), field * self.books, []
        for level in range(self.books):
            code = loudest(augmented(x)[:, None], field, weights[:, level].contiguous())[:, 0]
            place.append(code + self.k * (begin + level))
            x = x - self.aux.codeword.read(place[-1])
        return torch.stack(place, -1)

    def _soft(self, x, per):
        """Sums of the chosen codewords ``[U, D]``, with the gradient of the soft-max of the similarities."""
        every = torch.arange(len(self.coded) * self.books * self.k, device=x.device)
        codeword = self.aux.codeword.gather(every)
        matrix = self.aux.matrix.gather(every[:len(self.coded) * self.books * self.dim])
        weights, tiles = self._weights(codeword, matrix), Tiles(per.field, per.fields)
        fixed = codeword.detach().view(-1, self.books, self.k, self.dim)
        left, total = tiles.pad(x[:, None]), 0
        for level in range(self.books):
            share = torch.bmm(augmented(left), take(weights[:, level], tiles.field)).softmax(-1)
            place = share.argmax(-1) + self.k * (tiles.field * self.books + level)[:, None]
            # of the value only the chosen codeword; of the gradient what all shares of the soft-max make of it
            chosen = take(codeword, place) + torch.bmm(share - share.detach(), take(fixed[:, level], tiles.field))
            left, total = left - chosen, total + chosen
        return tiles.unpad(total, 1)[:, 0]

    # --- looking up ---------------------------------------------------------------------------------------------------

    def encode(self, ids):
        """Rows (after deployment codewords) of the coded fields, and rows of the fields left whole."""
        row, whole = self._numbered(ids)
        if self.deployed:
            if row is not None:
                level = torch.arange(row.shape[1] * self.books, device=row.device).view(-1, self.books)
                row = self.codes.read(row) + self.k * level
            return row, whole
        flat = self.fields.flat(ids)
        return (None if row is None else flat.index_select(1, self.coded),
                None if whole is None else flat.index_select(1, self.whole))

    def lookup(self, codes):
        row, whole = codes
        whole = self.table.gather(whole) if whole is not None else None
        if row is None:
            return self._joined(None, whole)
        if self.deployed:
            return self._joined(self.codeword.gather(row).sum(-2), whole)
        if self.plain:
            return self._joined(self.table.gather(row), whole)
        per = PerField(row, take(self.fields.offset, self.coded))
        training = self.training and torch.is_grad_enabled() and len(per.unique) > 0
        x = self.table.gather(per.unique) if training and not self.fixed else self.table.read(per.unique)
        if not training:
            return self._joined(take(self.aux.codeword.gather(self._coded(x, per.field)).sum(-2), per.inverse), whole)
        out = self._soft(x, per)
        share = 2 * self.distil / (per.inverse.shape[0] * self.dim)
        out = _Drawn.apply(out, share * per.count[:, None] * (out - x).detach())
        return self._joined(take(out, per.inverse), whole)

    # --- training -----------------------------------------------------------------------------------------------------

    def schedule(self, run):
        self.plain = True
        yield from run.fit("warm-up", shared="full")
        self.plain, self.fixed = False, not self.tune
        self.begin(self.table.weight)
        yield from run.fit("codes")

    @torch.no_grad()
    def begin(self, rows) -> None:
        """k-means of what the levels before leave over of a matrix of all fields, field by field and level by level."""
        generator, levels = torch.Generator().manual_seed(self.seed), self.books * self.k
        for f, (size, _, row) in enumerate(self.coded_fields()):
            x = picked(rows, row + drawn(size, POINTS * self.k, generator).to(self.table.weight.device))
            zero, one = torch.zeros(len(x), dtype=torch.int64, device=x.device), x.new_ones(len(x))
            for first in range(f * levels, (f + 1) * levels, self.k):
                book = lloyd(x[:, None], None, one, self.k, self.k, iterations=ROUNDS, seed=self.seed)
                self.aux.codeword.weight[first:first + self.k] = book[0]
                code = loudest(augmented(x)[:, None], zero, answers(2 * book, book.square().sum(-1)))[:, 0]
                x = x - book[0, code]

    def fit(self, rows):
        if not self.distance:
            super().fit(rows)
        self.table.load(rows)
        self.begin(rows)

    @torch.no_grad()
    def deploy(self):
        if self.deployed:
            return self
        full, device = self.table, self.table.weight.device
        with device:
            self.table = self._plain()
        if self.table is not None and not self.table.weight.is_meta:
            self._fill_plain(full.weight)
        if self.numbers:
            self.codes = PackedCodes(self.numbers, self.books, self.bits, device=device)
            for f, (size, first, row) in enumerate(self.coded_fields() if device.type != "meta" else ()):
                for at in range(0, size, BLOCK):
                    x = full.weight[row + at:row + min(at + BLOCK, size)].detach()
                    number = torch.arange(first + at, first + at + len(x), device=device)
                    place = self._coded(x, torch.full_like(number, f))
                    self.codes.write(number, place % self.k)
            self.codeword = self.aux.codeword
        return super().deploy()
