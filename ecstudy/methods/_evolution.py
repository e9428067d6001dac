"""Evolution of one width per field under a limit: candidates are tuples, so that none changes after it was judged."""
from __future__ import annotations

from typing import Callable, Sequence

import torch


class Evolution:
    """Candidates for fields of ``rows[f]`` rows, from 1 to ``dim`` numbers wide, of at most ``limit`` numbers in all.

    Everything random comes from one stream of its own: the same seed gives the same candidates.
    """

    def __init__(self, rows: Sequence[int], dim: int, limit: int, seed: int = 0):
        self.rows, self.dim, self.limit = torch.tensor(rows, dtype=torch.double), dim, limit
        self.generator = torch.Generator().manual_seed(seed)

    def _int(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def narrowed(self, widths: tuple) -> tuple:
        """``widths`` made to fit: while they do not, a field loses one number per row.

        It is drawn in proportion to the numbers it could still give up.
        """
        width = torch.tensor(widths)
        while int((self.rows * width).sum()) > self.limit:
            width[int(torch.multinomial(self.rows * (width - 1), 1, generator=self.generator))] -= 1
        return tuple(width.tolist())

    def mutated(self, widths: tuple, share: float = 0.1) -> tuple:
        """Each field gets a new width with probability ``share``."""
        fresh = torch.randint(1, self.dim + 1, (len(widths),), generator=self.generator)
        change = torch.rand(len(widths), generator=self.generator) < share
        return tuple(torch.where(change, fresh, torch.tensor(widths)).tolist())

    def crossed(self, first: tuple, second: tuple) -> tuple:
        """The fields before a cut of one, from the cut on of the other."""
        cut = self._int(1, max(len(first), 2))
        return first[:cut] + second[cut:]

    def best(self, score: Callable[[tuple], float], generations: int, population: int) -> tuple:
        """The candidate of the highest score ever met. None is judged twice."""
        scores: dict[tuple, float] = {}

        def value(widths):
            if widths not in scores:
                scores[widths] = score(widths)
            return scores[widths]

        several = [self.mutated((1,) * len(self.rows), share=1.0) for _ in range(population)]
        for generation in range(generations):
            several = sorted(map(self.narrowed, several), key=value, reverse=True)
            parents = several[:max(population // 2, 1)]
            if generation + 1 < generations:
                drawn = [parents[self._int(0, len(parents))] for _ in range(2 * population)]
                several = [self.mutated(first) if number < population // 2 else self.crossed(first, second)
                           for number, (first, second) in enumerate(zip(drawn[::2], drawn[1::2]))]
        return max(scores, key=scores.get)
