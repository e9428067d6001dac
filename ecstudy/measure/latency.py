"""Time several callables in turn in one process, so that their ratio does not depend on what else the machine does."""
from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


LEAST = 11                                                 # rounds that a quantile needs


class Latency(NamedTuple):
    """Milliseconds per call, and ``median`` over that of the first callable."""

    median: float
    p10: float
    p90: float
    ratio: float


def measure_latency(calls: dict[str, Callable], *, batches: Sequence[Any], repeats: int = 100, warmup: int = 10,
                    device: str | torch.device = "cpu", limit: float | None = None) -> dict[str, Latency]:
    """Wall time of one call, for each of ``calls``, under ``torch.inference_mode``.

    Each round times every callable once, in a new random order, on one of the ``batches`` (a tuple is spread into
    arguments); callables get different batches in a round and all of them over the rounds. Give enough batches that
    the rows they touch do not stay in cache, already on ``device``, and modules in ``eval`` mode. On CUDA the device
    is synchronised before and after each call, so the time of launching kernels counts. ``warmup`` rounds go first.
    With ``limit``, in seconds, slow callables get fewer rounds: a fifth of it for warming up, and once it is over no
    more than ``LEAST`` rounds.

    Raises ValueError if there is nothing to time or no batch.
    """
    if not calls or not len(batches) or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(calls)} callables, {len(batches)} batches, repeats={repeats}, warmup={warmup}; "
                         "expected at least one callable, batch and repeat")
    device = torch.device(device)
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    order, shuffle = list(enumerate(calls.items())), random.Random(0).shuffle
    times: dict[str, list[int]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()                                           # a collection inside one call would be charged to it
    try:
        with torch.inference_mode():
            begin = time.perf_counter_ns()
            for turn in range(-warmup, repeats):
                spent = (time.perf_counter_ns() - begin) / 1e9
                if limit is not None and (spent > limit / 5 if -warmup < turn < 0 else turn >= LEAST and spent > limit):
                    if turn < 0:
                        continue
                    break
                shuffle(order)
                for place, (name, call) in order:
                    batch = batches[(turn + place * len(batches) // len(calls)) % len(batches)]
                    batch = batch if isinstance(batch, tuple) else (batch,)
                    wait()
                    start = time.perf_counter_ns()
                    call(*batch)
                    wait()
                    if turn >= 0:
                        times[name].append(time.perf_counter_ns() - start)
    finally:
        if collecting:
            gc.enable()
    quantiles = {name: np.quantile(t, (0.5, 0.1, 0.9)) / 1e6 for name, t in times.items()}
    first = next(iter(quantiles.values()))[0]
    return {name: Latency(*map(float, q), float(q[0] / first)) for name, q in quantiles.items()}
