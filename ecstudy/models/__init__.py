"""Prediction heads: embeddings and dense values in, one logit out. One file per head, named as the head.

``make("dlrm", fields=26, dim=16, dense=13, seed=0)`` builds the head of ``dlrm.py``; adding a file that defines one
subclass of :class:`~ecstudy.models.layers.Head` adds a head.
"""
from __future__ import annotations

import importlib
import inspect
import pkgutil

import torch

from .layers import Head

__all__ = ["Head", "make", "names"]


def names() -> list[str]:
    """Names of the heads that can be made, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name != "layers" and not name.startswith("_"))


def head(name: str) -> type[Head]:
    """The class of a head. Raises ValueError for an unknown name, listing those known."""
    if name not in names():
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Head)]
    own = [c for c in classes if c.__module__ == module.__name__]
    if len(own) != 1:
        raise ValueError(f"ecstudy/models/{name}.py defines {len(own)} subclasses of Head, expected exactly one")
    return own[0]


def make(name: str, *, fields: int, dim: int, dense: int, seed: int | None = None, **options) -> Head:
    """Build a head for ``fields`` embeddings of ``dim`` values and ``dense`` numeric values, on the CPU.

    With a ``seed`` the weights depend on nothing else, and the global random state is left as it was.
    Raises ValueError for an unknown name or option, or sizes the head cannot work with.
    """
    kind = head(name)
    known = [o for o in inspect.signature(kind).parameters if o not in ("fields", "dim", "dense")]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {unknown[0]!r}, expected one of: {', '.join(known) or 'none'}")
    with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)      # torch.manual_seed would seed the accelerators too
        return kind(fields, dim, dense, **options)
