"""From a budget to a module: one solver for every method, on ``meta`` builds that allocate nothing (Rule 2)."""
from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Sequence

import torch

from .fields import Fields
from .memory import memory
from .method import Method
from .registry import get
from .spec import Spec, SpecError, parse
from .wrappers import wrap


class Unreachable(ValueError):
    """No size of the method fits the budget: the paper's "/" cell.

    Attributes
    ----------
    reason: str
    closest: int
        Bytes of the smallest deployed module.
    """

    def __init__(self, reason: str, closest: int):
        super().__init__(reason)
        self.reason, self.closest = reason, closest


@dataclass(frozen=True)
class Solution:
    """A size that fits: the knob's value (None if the method has no knob) and the deployed and training bytes."""

    knob: int | None
    inference: int
    training: int


def full_bytes(num_embeddings: int | Sequence[int], dim: int) -> int:
    """Bytes of the float32 full table, the 100 % of every ratio."""
    n = num_embeddings if isinstance(num_embeddings, int) else sum(num_embeddings)
    return n * dim * 4


def budget_bytes(budget: float | int, num_embeddings, dim: int) -> int:
    """A budget in bytes: a float is a fraction of the full table at ``dim``, an int is bytes already.

    Raises
    ------
    ValueError
        If it is not a fraction in (0, 1] or a positive number of bytes.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget={budget!r}: expected a float fraction in (0, 1] or an int number of bytes")
    if isinstance(budget, int):
        if budget < 1:
            raise ValueError(f"budget={budget}: expected a positive number of bytes, or a float fraction in (0, 1]")
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget}: expected a float fraction in (0, 1], or an int number of bytes")
    return int(full_bytes(num_embeddings, dim) * budget + 1e-6)


def build(spec: str | Spec, fields: Fields | int | Sequence[int], dim: int, *, knob=None, counts=None,
          device: str | torch.device = "cpu", **options) -> Method:
    """One module of a spec, not deployed. ``options`` join those in the spec; ``knob`` sets the size argument.

    Raises
    ------
    SpecError
        For an unknown method, wrapper or option.
    """
    spec = parse(spec)
    cls = get(spec.name)
    known = list(inspect.signature(cls.__init__).parameters)[3:]
    options = {**spec.options, **options}
    if unknown := [name for name in options if name not in known or name == "counts"]:
        allowed = ", ".join(name for name in known if name != "counts") or "none"
        raise SpecError(f"{spec.name} has no option {unknown[0]!r}; its options: {allowed}")
    if knob is not None:
        options[cls.knob] = knob
    if cls.needs_counts:
        options["counts"] = counts
    with torch.device(device):
        method = cls(fields if isinstance(fields, Fields) else Fields(fields), dim, **options)
    for part in spec.wrappers:
        method = wrap(method, part)
    return method


def solve(spec: str | Spec, num_embeddings: int | Sequence[int], dim: int, budget: int | None, **options) -> Solution:
    """The largest size of a method whose deployed bytes fit ``budget`` bytes (None: no limit, the method's default).

    Bisects over the method's own sizes; each probe is a build on ``meta``, so nothing is allocated.

    Raises
    ------
    Unreachable
        If even the smallest size is over the budget.
    SpecError
        If a wrapper of the spec saves no bytes.
    """
    spec = parse(spec)
    cls, fields = get(spec.name), Fields(num_embeddings)
    given = {**spec.options, **options}

    def weigh(value, spec=spec) -> tuple[int, int]:
        method = build(spec, fields, dim, knob=value, device="meta", **options)
        training = method.training_bytes()
        return memory(method.deploy()), training

    def solution(value, inference, training) -> Solution:
        if spec.wrappers:
            inner = Spec(spec.method, spec.wrappers[:-1])
            if (before := weigh(value, inner)[0]) <= inference:
                raise SpecError(f"|{spec.wrappers[-1]} saves nothing on {inner}: {before:,} bytes before, "
                                f"{inference:,} after; drop it")
        return Solution(value, inference, training)

    if cls.knob is None or cls.knob in given or budget is None:      # one size: given, or the method's own
        inference, training = weigh(None)
        if budget is not None and inference > budget:
            fixed = f"{cls.knob}={given[cls.knob]!r} is given" if cls.knob in given else f"{spec} has one size"
            raise Unreachable(f"{fixed}: {inference:,} bytes, over the budget of {budget:,}", inference)
        return solution(None, inference, training)

    build(spec, fields, dim, device="meta", **options)               # bad options are reported before bisecting
    sizes = cls.sizes(fields, dim, **{k: v for k, v in given.items() if k != cls.knob})
    if not len(sizes):
        raise Unreachable(f"{spec} has no size at dimension {dim}", full_bytes(num_embeddings, dim))
    smallest = weigh(sizes[0])
    if smallest[0] > budget:
        share = smallest[0] / full_bytes(num_embeddings, dim)
        raise Unreachable(f"the smallest {spec} ({cls.knob}={sizes[0]}) takes {smallest[0]:,} bytes "
                          f"({share:.3%} of full), over the budget of {budget:,}", smallest[0])
    low, high, best = 0, len(sizes), smallest                        # sizes[low] fits, sizes[high] does not (or ends)
    while high - low > 1:
        middle = (low + high) // 2
        weighed = weigh(sizes[middle])
        if weighed[0] <= budget:
            low, best = middle, weighed
        else:
            high = middle
    return solution(sizes[low], *best)


def weigh(spec: str | Spec, num_embeddings: int | Sequence[int], dim: int = 16, budget: float | int | None = None,
          base_dim: int | None = None) -> dict:
    """What a method would weigh, without training or allocating: one row of ``ecstudy weigh``.

    Its ``reason`` says why a budget cannot be reached, or that it is only a limit to what training will choose.

    ``base_dim`` is the dimension whose full table a fractional budget refers to (default: ``dim``).
    """
    full = full_bytes(num_embeddings, base_dim or dim)
    limit = None if budget is None else budget_bytes(budget, num_embeddings, base_dim or dim)
    row = dict(method=parse(spec).canonical, budget=budget, reachable=True, reason="", knob=None, bytes_full=full)
    try:
        found = solve(spec, num_embeddings, dim, limit)
        inference, training = found.inference, found.training
        row["knob"], cls = found.knob, get(parse(spec).name)
        says = [] if cls.budgeted else ["its source has no budget, the limit is ours"]
        row["reason"] = "; ".join(says + ["what ships is learned, at most this"] * cls.learns_size)
    except Unreachable as error:
        inference, training = error.closest, None
        row |= dict(reachable=False, reason=error.reason)
    return row | dict(bytes_inference=inference, bytes_training=training, inference_pct=100 * inference / full,
                      training_pct=None if training is None else 100 * training / full)
