"""ecstudy: a reproducible study and toolkit of embedding-table compression.

::

    import ecstudy as ec
    emb = ec.make("compo", num_embeddings=[1461, 558, 10_131_227], dim=16, budget=0.10, seed=0)
    x = emb(ids)                                          # ids [B, 3] -> [B, 3, 16]
    emb = ec.make("robe|int8", 10_000_000, 16, budget=0.05)     # an int: drop-in for nn.Embedding
    small = ec.compress(model.emb, "int_quant", budget=0.25)    # trained vectors, no training
    ec.memory(small); ec.save(small, path); ec.load(path)
    row = ec.run(method="autosrh", dataset="criteo_137k", model="dlrm", dim=16, budget=0.01, seed=0)
    ec.results(section="dlrm"); ec.methods()
"""
from __future__ import annotations

# functions that share their name with a module of the package: bound here, where nothing can cover them later
from . import methods as _package  # noqa: F401
from .memory import memory  # noqa: F401
from .registry import table as methods  # noqa: F401

__version__ = "0.2.0"

_PUBLIC = {
    "make": "api", "compress": "api", "save": "api", "load": "api", "breakdown": "memory",
    "weigh": "budget", "Unreachable": "budget", "SpecError": "spec", "optimizers": "training.optimizer",
    "run": "study", "sweep": "study", "results": "study",
}
__all__ = ["__version__", "memory", "methods", *_PUBLIC]


def __getattr__(name):
    # loaded on first use, so that `import ecstudy` costs nothing and needs no optional library
    if name in _PUBLIC:
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
