"""The parts of a differentiable search for widths: a mixture of candidates, its second order, and the final choice."""
from __future__ import annotations

from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fields import Fields
from ..tables import FloatTable
from ._mixed import BLOCK, Mixed, cells, useful

EPS = 1e-5                               # of the normalisation


class Candidates(nn.Module):
    """Rows of every candidate width, lifted to ``dim`` per field, normalised and mixed by scores with Gumbel noise.

    Attributes
    ----------
    alpha: Parameter
        Scores [F, C]; not trained until somebody asks.
    tau: float
        Temperature of the mixture.
    same_noise, running: bool
        Take the noise of the pass before once more; normalise by the running statistics although training.
    """

    def __init__(self, fields: Fields, dim: int, widths: Sequence[int]):
        super().__init__()
        self.dim, self.widths, self.sizes = dim, widths, fields.sizes
        self.tau, self.noise, self.same_noise, self.running = 1.0, None, False, False
        self.tables = nn.ModuleList(FloatTable(fields.n, w, fields.bound()) for w in widths)
        self.matrices = nn.ParameterList(torch.empty(len(fields), w, dim) for w in widths)
        for w, matrix in zip(widths, self.matrices):
            if not matrix.is_meta:
                nn.init.normal_(matrix, std=w ** -0.5)
        self.alpha = nn.Parameter(torch.zeros(len(fields), len(widths)), requires_grad=False)
        self.register_buffer("mean", torch.zeros(len(widths) * dim))
        self.register_buffer("var", torch.ones(len(widths) * dim))

    def shares(self) -> Tensor:
        """Weight of each candidate in each field [F, C]; random while training."""
        score = self.alpha.log_softmax(1)
        if self.training:
            if not self.same_noise:
                self.noise = -torch.empty_like(score).exponential_().log()
            score = score + self.noise
        return (score / self.tau).softmax(1)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of the full table [B, F] -> [B, F, D]."""
        return torch.einsum("fbcd,fc->bfd", self.lifted(rows), self.shares())

    def lifted(self, rows: Tensor) -> Tensor:
        """Rows of the full table [B, F] -> normalised candidates [F, B, C, D]."""
        x = torch.cat([torch.bmm(table.gather(rows).transpose(0, 1), matrix)                         # [F, B, D] each
                       for table, matrix in zip(self.tables, self.matrices)], 2)
        batch = self.training and not self.running and x.shape[0] * x.shape[1] > 1
        # statistics over batch and fields for each candidate and dimension, no affine part
        x = F.batch_norm(x.flatten(0, 1), self.mean, self.var, training=batch, momentum=0.1, eps=EPS)
        return x.view(*rows.T.shape, len(self.tables), self.dim)

    def lift(self, field: int, number: int) -> tuple[Tensor, Tensor]:
        """Matrix and bias of a candidate with its normalisation folded in: x P -> (x P - mean) / deviation."""
        mean, var = (part.view(-1, self.dim)[number] for part in (self.mean, self.var))
        return self.matrices[number].detach()[field] / (var + EPS).sqrt(), -mean / (var + EPS).sqrt()


    def choose(self, limit: int) -> tuple[list[int], list[int]]:
        """Candidate and width of each field: the highest total log-score of what takes at most ``limit`` numbers."""
        wide = [useful([n] * len(self.widths), self.widths, self.dim, bias=True) for n in self.sizes]
        costs = [[cells(n, w, self.dim, bias=True) for w in row] for n, row in zip(self.sizes, wide)]
        scores = self.alpha.detach().log_softmax(1).cpu()

        def fits(choice):                            # the array ends with padding for its last window
            padding = self.dim - max(row[k] for row, k in zip(wide, choice))
            return sum(row[k] for row, k in zip(costs, choice)) + padding <= limit

        found = [allocate(costs, scores, limit - padding) for padding in (0, self.dim - min(map(min, wide)))]
        choice = max((c for c in found if c and fits(c)), key=lambda c: sum(float(s[k]) for s, k in zip(scores, c)))
        return choice, [row[k] for row, k in zip(wide, choice)]

    def hand_over(self, mixed: Mixed, choice: Sequence[int]) -> None:
        """Give ``mixed`` the rows of the chosen candidates, and their matrices with the normalisation folded in."""
        first = 0
        for field, (number, size) in enumerate(zip(choice, self.sizes)):
            own, (matrix, bias) = mixed.rows(field), self.lift(field, number)
            narrow = mixed.widths[field] < self.dim
            if narrow:
                mixed.lift(field).copy_(torch.cat([matrix, bias[None]]))
            for start in range(0, size, BLOCK):
                part = self.tables[number].weight.detach()[first + start:first + min(start + BLOCK, size)]
                own[start:start + len(part)] = part if narrow else part @ matrix + bias
            first += size


def candidates(dim: int, first: int) -> list[int]:
    """Widths doubling from ``first``, the last one ``dim``."""
    return [first << k for k in range(dim) if first << k < dim] + [dim]


def smallest(fields: Fields, dim: int, first: int) -> int:
    """Numbers of the narrowest choice, the array's padding included."""
    widths = useful(fields.sizes, [candidates(dim, first)[0]] * len(fields), dim, bias=True)
    return sum(cells(n, w, dim, bias=True) for n, w in zip(fields.sizes, widths)) + dim - max(widths)


class SecondOrder:
    """Gradient of the validation loss in the scores ``alpha``, through a trial step of the weights ``w``.

    With ``w' = w - lr dL_train/dw`` and ``v = dL_valid/dw'`` it is ``dL_valid/da - lr (p - m) / (2 size)``, ``p`` and
    ``m`` the gradients dL_train/da at ``w + size v`` and ``w - size v``, ``size = 0.01 / |v|``. Four passes, each given
    the gradients it asks for; after the last one the weights are what they were and ``result`` gets the gradient.
    """

    def __init__(self, run, alpha: Tensor, result: Callable[[list[Tensor]], None]):
        self.run, self.alpha, self.result = run, alpha, result

    def weights(self) -> list[Tensor]:
        head = [p for p in self.run.head.parameters() if p.requires_grad]
        return self.run.optimizers.embedding_leaves() + head

    def trial(self, gradients):
        self.before = move(self.weights(), gradients, -self.run.settings.lr)

    def judge(self, gradients):
        put_back(self.weights(), self.before)
        self.first, self.v = gradients[0], gradients[1:]
        self.size = 0.01 / max(norm(self.v), 1e-12)
        self.before = move(self.weights(), self.v, self.size)

    def plus(self, gradients):
        put_back(self.weights(), self.before)
        self.above = gradients[0]
        self.before = move(self.weights(), self.v, -self.size)

    def minus(self, gradients):
        put_back(self.weights(), self.before)
        self.result([self.first - self.run.settings.lr * (self.above - gradients[0]) / (2 * self.size)])


def allocate(costs: Sequence[Sequence[int]], scores: Tensor, limit: int, most: int = 4096) -> list[int] | None:
    """One option per field, ``scores [F, C]`` summing highest while ``costs`` stay within ``limit``; None: none fits.

    Goes over the fields once and keeps the sums that no cheaper one beats: exact while there are at most ``most`` of
    them, thinned evenly beyond. Among equals the cheaper option wins.
    """
    scores = scores.double().cpu()
    rest = sum(min(cost) for cost in costs)                          # what the fields still to come need at least
    spent, value, chosen = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.double), []
    for cost, score in zip(costs, scores):
        rest -= min(cost)
        spent = (spent[:, None] + torch.tensor(cost)).view(-1)
        value = (value[:, None] + score).view(-1)
        allowed = (spent <= limit - rest).nonzero()[:, 0]
        if not len(allowed):
            return None
        allowed = allowed[torch.argsort(value[allowed], descending=True, stable=True)]
        order = allowed[torch.argsort(spent[allowed], stable=True)]
        best = value[order].cummax(0).values
        order = order[torch.cat([torch.ones(1, dtype=torch.bool), best[1:] > best[:-1]])]
        if len(order) > most:                                        # the cheapest and the best always stay
            order = order[torch.linspace(0, len(order) - 1, most).round().long()]
        spent, value = spent[order], value[order]
        chosen.append((order // len(cost), order % len(cost)))
    picks, place = [], int(value.argmax())
    for before, option in reversed(chosen):
        picks.append(int(option[place]))
        place = int(before[place])
    return picks[::-1]


@torch.no_grad()
def move(tensors: Sequence[Tensor], by: Sequence[Tensor], size: float) -> list:
    """``tensor += size * by`` in place (dense or sparse); what :func:`put_back` needs. No tensor of table size."""
    before = []
    for tensor, gradient in zip(tensors, by):
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            row = gradient.indices()[0]
            before.append((row, tensor.index_select(0, row)))
            tensor.index_add_(0, row, gradient.values(), alpha=size)
        else:
            before.append((None, tensor.clone()))
            tensor.add_(gradient, alpha=size)
    return before


@torch.no_grad()
def put_back(tensors: Sequence[Tensor], before: list) -> None:
    """Undo a :func:`move` exactly."""
    for tensor, (row, values) in zip(tensors, before):
        if row is None:
            tensor.copy_(values)
        else:
            tensor.index_copy_(0, row, values)


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean length of tensors taken together; sparse ones count equal rows as summed."""
    return sum(float((t.coalesce().values() if t.is_sparse else t).square().sum()) for t in tensors) ** 0.5
