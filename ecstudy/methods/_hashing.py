"""Seeded hash functions of integers, and tables found by them."""
from __future__ import annotations

import torch
from torch import Tensor, nn

FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)       # as signed numbers


def mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014): every bit of int64 ``x`` moves every other."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST              # products wrap; shifts are made unsigned by their masks
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


class Hashes(nn.Module):
    """Independent hash functions, one for each of ``shape``; a function is its stored seed of 8 bytes.

    Not affine, as a universal hash is: there all pairs of ids at the same distance collide together.
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("seed", torch.randint(-2 ** 63, 2 ** 63 - 1, shape))

    def bits(self, key: Tensor, seed: Tensor | None = None) -> Tensor:
        """32 hashed bits of ``key [...]`` by each function, or by those of ``seed``, as int64.

        The last dimension of the seeds counts the functions of one key; those before it go with the key's last ones.
        """
        return mix(key.long()[..., None] ^ (self.seed if seed is None else seed)) >> 32 & (1 << 32) - 1

    def forward(self, key: Tensor, rows: int, seed: Tensor | None = None) -> Tensor:
        """Numbers below ``rows`` (at most 2^31) for ``key [...]``, one by each function: see :meth:`bits`."""
        return below(self.bits(key, seed), rows)


def below(bits: Tensor, rows: int) -> Tensor:
    """32 ``bits`` as numbers below ``rows``, as evenly as a remainder and without a division."""
    return bits * rows >> 32
