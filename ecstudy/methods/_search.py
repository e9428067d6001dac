"""What searches share: choosing one of several sizes per field under a limit, and moving weights aside and back."""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor


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
