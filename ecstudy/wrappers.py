"""What may follow a method in a spec: ``"compo|int8"`` quantises whatever the method deploys.

The method trains as it is; when it is deployed every holder of vectors is replaced by its quantised form, rounded to
nearest (:meth:`ecstudy.tables.Holder.quantised`). Tables take one bfloat16 scale per row, arrays one scale.
A wrapper that saves no bytes is a mistake and refused when the size is solved (:mod:`ecstudy.budget`).
"""
from __future__ import annotations

from torch import nn

from .method import Method
from .spec import Part, SpecError
from .tables import Holder

BITS = {"int8": 8, "int16": 16}


class Quantised(Method):
    """``inner`` with its deployed vectors in integers of ``bits`` bits."""

    def __init__(self, inner: Method, bits: int):
        super().__init__(inner.fields, inner.dim)
        self.inner, self.bits = inner, bits
        for name in ("knob", "family", "aware", "paper", "needs_counts"):
            setattr(self, name, getattr(inner, name))
        if self.knob:
            setattr(self, self.knob, getattr(inner, self.knob))

    def encode(self, ids):
        return self.inner.encode(ids)

    def lookup(self, codes):
        return self.inner.lookup(codes)

    def schedule(self, run):
        return self.inner.schedule(run)

    def before_evaluation(self):
        self.inner.before_evaluation()

    def fit(self, rows):
        self.inner.fit(rows)

    @property
    def fitted(self):
        return self.inner.fitted

    def allocation(self):
        return self.inner.allocation()

    def dense_parameters(self):
        return self.inner.dense_parameters()

    def deploy(self):
        if not self.deployed:
            quantise(self.inner.deploy(), self.bits)
        return super().deploy()


def quantise(module: nn.Module, bits: int) -> None:
    """Replace the outermost holders under ``module`` by their quantised form."""
    for name, child in module.named_children():
        if isinstance(child, Holder):
            try:
                setattr(module, name, child.quantised(bits))
            except TypeError as error:
                raise SpecError(f"|int{bits}: {error}") from None
        else:
            quantise(child, bits)


def wrap(method: Method, part: Part) -> Method:
    """Apply one wrapper of a spec."""
    if part.name not in BITS or part.options:
        raise SpecError(f"no wrapper {part}; known wrappers: {', '.join(BITS)}")
    return Quantised(method, BITS[part.name])
