"""What methods share that give an id a width by its popularity: buckets, the controller, rows of few widths by id."""
from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import Fields, derived
from ..maps import marked_ids
from ..tables import FloatArray, FloatTable, take

BLOCK = 1 << 18
EPS, MOMENTUM = 1e-5, 0.1                # of the normalisation
OCTAVES = 32                             # counts are below 2^31


def popularity(count: Tensor, per_octave: int = 1) -> Tensor:
    """Bucket of each occurrence count, ``per_octave`` to every doubling; uint8, below ``OCTAVES * per_octave``."""
    bucket = torch.floor(per_octave * torch.log2(count.double() + 1))
    return bucket.clamp_(max=OCTAVES * per_octave - 1).to(torch.uint8)


def per_group(fields: Fields, bucket: Tensor, buckets: int, weight: Tensor | None = None) -> Tensor:
    """Ids of each field and bucket, int64 [F, Q], or the sum of their ``weight [n]``, as float64."""
    weights = [None] * len(fields) if weight is None else weight.double().split(fields.sizes)
    return torch.stack([torch.bincount(part.int(), w, minlength=buckets)
                        for part, w in zip(bucket.split(fields.sizes), weights)])


class Controller(nn.Module):
    """The controller of AutoEmb and ESAPN, for all fields and buckets of popularity at once.

    An embedding of the popularity, normalised, and the present size as a one-hot vector go through a layer of
    ``hidden`` units, normalised and through tanh, to one score for each of ``outputs``. Normalisations are over the
    groups, so scores are a function of the weights alone. Nothing is preferred at first: the last layer begins at zero.
    """

    def __init__(self, fields: int, buckets: int, states: int, outputs: int, hidden: int = 512, width: int = 32):
        super().__init__()
        self.shape = (fields, buckets, states, outputs)
        self.embedding = nn.Parameter(torch.empty(fields * buckets, width), requires_grad=False)
        self.first = nn.Parameter(torch.empty(width, hidden), requires_grad=False)
        # where there is one state only, the normalisation would cancel it
        self.state = nn.Parameter(torch.empty(states, hidden), requires_grad=False) if states > 1 else None
        self.last = nn.Parameter(torch.zeros(hidden, outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)
        if not self.embedding.is_meta:
            nn.init.normal_(self.embedding)
            for part in (self.first, self.state) if states > 1 else (self.first,):
                nn.init.normal_(part, std=width ** -0.5)

    def forward(self) -> Tensor:
        """Scores [F, Q, states, outputs]."""
        x = _normalised(self.embedding) @ self.first
        x = _normalised(x if self.state is None else (x[:, None] + self.state).flatten(0, 1)).tanh()
        return (x @ self.last + self.bias).view(self.shape)


def _normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True, eps=EPS)


class Sized(nn.Module):
    """A row of every width for each id, of which one is in use, lifted to ``dim`` per field, normalised, through tanh.

    Parameters
    ----------
    widths:
        Ascending, the last one ``dim``.
    cascade:
        Matrices lead from one width to the next (ESAPN) instead of straight to ``dim``.

    Attributes
    ----------
    running: bool
        Normalise by the running statistics although training.
    """

    def __init__(self, fields: Fields, dim: int, widths: Sequence[int], cascade: bool):
        super().__init__()
        self.dim, self.widths, self.cascade, self.running = dim, list(widths), cascade, False
        self.starts = [sum(widths[:k]) for k in range(len(widths))]
        self.table, self.kept = FloatTable(fields.n, sum(widths), fields.bound()), None
        ends = self.widths[1:] if cascade else [dim] * (len(widths) - 1)
        self.matrices = nn.ParameterList(torch.empty(len(fields), w, end) for w, end in zip(widths, ends))
        for matrix in self.matrices:
            if not matrix.is_meta:
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
        self.register_buffer("mean", torch.zeros(len(fields) * dim))
        self.register_buffer("var", torch.ones(len(fields) * dim))

    def lifts(self) -> Tensor:
        """Matrices from every width to ``dim``, one below the other [F, sum of widths, D]."""
        parts = [torch.eye(self.dim, device=self.mean.device).expand(len(self.mean) // self.dim, -1, -1)]
        for matrix in reversed(self.matrices):
            parts.append(matrix @ parts[-1] if self.cascade else matrix)
        return torch.cat(parts[::-1], 1)

    def inside(self, level: Tensor) -> Tensor:
        """Which of the numbers of a row belong to its level [..., sum of widths]."""
        number = torch.arange(sum(self.widths), device=level.device)
        start, width = (torch.tensor(x, device=level.device) for x in (self.starts, self.widths))
        start, width = take(start, level)[..., None], take(width, level)[..., None]
        return (number >= start) & (number < start + width)

    def forward(self, rows: Tensor, level: Tensor | None = None) -> Tensor:
        """``rows [B, F]`` of the full table, each of ``level [B, F]`` (once packed that is known) -> [B, F, D]."""
        if self.kept is None:
            return self.lifted(self.table.gather(rows) * self.inside(level))
        x, width = self.kept.lookup(rows)
        start = take(torch.tensor(self.starts, device=rows.device),
                     torch.bucketize(width, torch.tensor(self.widths, device=rows.device)))
        wide = x.new_zeros(rows.shape + (sum(self.widths) + self.dim,))
        place = start[..., None] + torch.arange(self.dim, device=rows.device)
        return self.lifted(wide.scatter_(-1, place, x)[..., :-self.dim])     # what is behind a row is zero

    def pack(self, level: Tensor | None, rows: Sequence[int] | None, cells: int) -> None:
        """Keep the row in use of each id alone, given its ``level [n]``: what ships. See :class:`LevelRows`."""
        weight, device = self.table.weight.detach(), self.mean.device
        self.kept = LevelRows(len(weight), self.dim, self.widths, rows, device, cells)
        if level is not None:
            def numbers(ids, width):
                start = self.starts[self.widths.index(width)]
                return weight.index_select(0, ids)[:, start:start + width]

            self.kept.fill(take(torch.tensor(self.widths, device=device), level), numbers)
        self.table = None

    def lifted(self, x: Tensor) -> Tensor:
        """Rows [B, F, sum of widths], zero outside of their level -> [B, F, D]."""
        x = torch.bmm(x.transpose(0, 1), self.lifts()).transpose(0, 1)
        batch = self.training and not self.running and len(x) > 1
        return F.batch_norm(x.flatten(1), self.mean, self.var, training=batch, momentum=MOMENTUM, eps=EPS).view(
            x.shape).tanh()


class LevelRows(nn.Module):
    """Rows of few widths, an id's width given by its level, end to end in one array; to be looked up only.

    Which level an id has is found by maps within maps: of the ids of at least one level, those of a higher one.

    Parameters
    ----------
    widths:
        Ascending; 0 stands for ids that look up zeros.
    rows:
        How many ids have each width. None: not known, but they take at most ``cells`` numbers; then all shapes are
        those of the heaviest such choice, and nothing can be looked up.
    """

    def __init__(self, n: int, dim: int, widths: Sequence[int], rows: Sequence[int] | None, device, cells: int = 0):
        super().__init__()
        self.n, self.dim = n, dim
        if rows is None:
            above = [min(n, cells // w) if w else n for w in widths]
        else:
            present = [(w, r) for w, r in zip(widths, rows) if r]
            widths, rows = [w for w, _ in present], [r for _, r in present]
            above = [sum(rows[k:]) for k in range(len(rows))]
            derived(self, "base", [sum(w * r for w, r in present[:k]) for k in range(len(rows))])
            cells = sum(w * r for w, r in present)
        derived(self, "width", list(widths))
        with torch.device(device):
            self.maps = nn.ModuleList(marked_ids(*pair) for pair in zip(above, above[1:]))
            # zeros stand at the end, where the last window ends
            self.array = FloatArray(cells + dim).requires_grad_(False)
        if not self.array.weight.is_meta:            # what is derived stays real on a meta build
            self.to(device)

    def fill(self, width: Tensor, rows) -> None:
        """Take ``width [n]`` of each id, and its numbers from ``rows(ids, width) -> [k, width]``, block by block."""
        flat, place, ids = self.array.weight.detach(), 0, None
        for number, w in enumerate(self.width.tolist()):
            own = width == w if ids is None else take(width, ids) == w
            if number < len(self.maps):
                self.maps[number].fill((~own).nonzero().view(-1))
            here = own.nonzero().view(-1) if ids is None else ids[own]
            ids = (~own).nonzero().view(-1) if ids is None else ids[~own]
            for start in range(0, len(here) if w else 0, BLOCK):
                part = rows(here[start:start + BLOCK], w).reshape(-1)
                flat[place:place + len(part)] = part
                place += len(part)
        flat[place:] = 0

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the full table -> place of the id among those of its width, and which of the widths it has."""
        place, level, going = ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        for inner in self.maps:
            before, higher = inner.locate(torch.where(going, place, 0))
            place = torch.where(going, torch.where(higher, before, place - before), place)
            going = going & higher
            level = level + going
        return place, level

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the full table [...] -> their numbers [..., D], zeros behind them, and their widths [...]."""
        place, level = self.locate(ids)
        width = take(self.width, level)
        rows = self.array.blocks(take(self.base, level) + place * width, self.dim)
        return rows * (torch.arange(self.dim, device=ids.device) < width[..., None]), width

    def per_id(self) -> Tensor:
        """Numbers of each id's row, int32 [n]."""
        blocks = (torch.arange(start, min(start + BLOCK, self.n), device=self.width.device)
                  for start in range(0, self.n, BLOCK))
        return torch.cat([take(self.width, self.locate(ids)[1]).int() for ids in blocks])


