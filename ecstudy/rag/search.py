"""Exact inner-product search over compressed vectors: decoded block by block, never more than a block in memory.

Three ways, by what a module offers (``how`` names them):

``decode``
    ``emb(ids)`` of each block is scored against all queries. Every method can do so, and it is the default for all that
    have no scorer of their own.
``scores``
    A method whose codes are scored by an estimator and not by their decoded vectors (RaBitQ) has
    ``scores(queries [Q, D], start, stop) -> [Q, stop - start]``.
``own``
    A method that searches in stages (rescoring) has ``search(queries [Q, D], k) -> (scores [Q, k], ids [Q, k])``.
``faiss``
    A method that keeps faiss's codes has ``index()``, a faiss index over them: table look-ups in place of decoding.

Of equal scores the smaller id comes first, so results do not depend on blocks. Queries are independent of one another.
"""
from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tables import as_rows

BLOCK = 16_384                        # rows decoded at once: 24 MiB at dimension 384
QUERIES = 2_048                       # queries scored at once: with a block of scores 128 MiB
HOW = ("decode", "scores", "own", "faiss")


class Hits(NamedTuple):
    """The best ``k`` rows of each query, best first: ids int64 [Q, k], scores float32 [Q, k]."""

    ids: np.ndarray
    scores: np.ndarray


def way(emb) -> str:
    """How :func:`search` searches a method, a tensor or an array unless told: own, scores or decode."""
    return next((name for name, hook in (("own", "search"), ("scores", "scores"))
                 if callable(getattr(emb, hook, None)) and not isinstance(emb, (Tensor, np.ndarray))), "decode")


def search(emb, queries, k: int = 100, *, how: str | None = None, block: int = BLOCK, device=None,
           progress: Callable[[int, int], None] | None = None) -> Hits:
    """The ``k`` rows of largest inner product with each query, exactly.

    Parameters
    ----------
    emb:
        A deployed method of one field (``ecstudy.compress``), or vectors themselves: tensor, array or memory map
        [n, D].
    queries:
        float32 [Q, D], tensor or array.
    k:
        At most the number of rows.
    how:
        One of ``HOW``; None takes :func:`way`.
    block:
        Rows decoded at once; sets the memory, ``block * D * 4`` bytes and ``QUERIES * block * 4`` of scores.
    device:
        Where blocks are scored (default: where the method is; ``cpu`` for vectors).
    progress:
        Called as ``progress(rows done, rows)`` while blocks are decoded.

    Raises
    ------
    ValueError
        For dimensions that differ, a ``k`` out of range, queries that are not finite or a way the method does not have.
    """
    rows, dim = _shape(emb)
    queries = torch.as_tensor(np.array(queries) if isinstance(queries, np.ndarray) else queries).detach().float()
    how = way(emb) if how is None else how
    hook = dict(decode="__call__", scores="scores", own="search", faiss="index")
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    if how != "decode" and not callable(getattr(emb, hook[how], None)):
        raise ValueError(f"how={how!r}: {type(emb).__name__} has no {hook[how]}(); use how='decode'")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries of shape {tuple(queries.shape)}: expected [Q, {dim}], the dimension of the rows")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= rows:
        raise ValueError(f"k={k!r}: expected 1 to {rows}, the number of rows")
    if block < 1:
        raise ValueError(f"block={block}: expected at least one row")
    if not bool(torch.isfinite(queries).all()):
        bad = int((~torch.isfinite(queries)).any(1).nonzero()[0])
        raise ValueError(f"query {bad} holds NaN or infinity: expected finite vectors")
    with torch.inference_mode():
        if how == "faiss":
            scores, ids = emb.index().search(queries.numpy(), int(k))
            return Hits(ids.astype(np.int64), scores)
        device = torch.device(device or _device(emb))
        if how == "own":
            scores, ids = emb.search(queries.to(device), int(k))
            return Hits(ids.cpu().numpy().astype(np.int64), scores.cpu().float().numpy())
        return _blocks(emb, queries.to(device), int(k), rows, block, how, device, progress)


def _shape(emb) -> tuple[int, int]:
    if isinstance(emb, (Tensor, np.ndarray)):
        if emb.ndim != 2 or not len(emb):
            raise ValueError(f"vectors of shape {tuple(emb.shape)}: expected a matrix [n, D] with n >= 1")
        return tuple(emb.shape)
    if not emb.fields.single:
        raise ValueError(f"{type(emb).__name__} has {len(emb.fields)} fields: expected one, the rows of a matrix")
    return emb.fields.n, emb.dim


def _device(emb):
    if isinstance(emb, np.ndarray):
        return "cpu"
    if isinstance(emb, Tensor):
        return emb.device
    return next((t.device for t in [*emb.parameters(), *emb.buffers()]), "cpu")


def _blocks(emb, queries, k, rows, block, how, device, progress) -> Hits:
    best = [(queries.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64, device=device))
            for part in queries.split(QUERIES)]
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        if how == "decode":
            vectors = _decode(emb, start, stop, device)
        for i, part in enumerate(queries.split(QUERIES)):
            scores = part @ vectors.T if how == "decode" else emb.scores(part, start, stop).float()
            top = _top(scores, k)
            if not bool(torch.isfinite(top[0][:, 0]).all()):             # NaN and infinity sort before all numbers
                bad = int((~torch.isfinite(scores)).any(0).nonzero()[0])
                raise ValueError(f"row {start + bad} is scored NaN or infinity: the compressed vectors are damaged")
            best[i] = _merge(best[i], *top, start, k)
        if progress:
            progress(stop, rows)
    values, ids = (torch.cat(parts).cpu().numpy() for parts in zip(*best))
    return Hits(ids, values)


def _decode(emb, start: int, stop: int, device) -> Tensor:
    if isinstance(emb, (Tensor, np.ndarray)):
        return as_rows(emb, start, stop - start).to(device)
    return emb(torch.arange(start, stop, device=_device(emb))).to(device)


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in order, of equals the first; topk alone takes any of equals."""
    if k >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    values, index = scores.topk(k + 1, dim=1)
    tied = values[:, k - 1] == values[:, k]                              # which of the equals belongs is open
    index = index[:, :k].sort(dim=1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    if bool(tied.any()):
        whole = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = whole.values[:, :k], whole.indices[:, :k]
    return values, index


def _merge(best, values: Tensor, index: Tensor, start: int, k: int):
    values = torch.cat([best[0], values], 1)                             # earlier blocks first: their ids are smaller
    ids = torch.cat([best[1], index + start], 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), ids.gather(1, order[:, :k])
