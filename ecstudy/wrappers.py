"""What may follow a method in a spec: ``"compo|int8"`` quantises whatever the method deploys.

The method trains as it is; when it is deployed every holder of vectors is replaced by its quantised form, rounded to
nearest (:meth:`ecstudy.tables.Holder.quantised`):

- ``|int8``, ``|int16``: tables take one bfloat16 scale per row, arrays one scale;
- ``|int4``, ``|int2``: packed codes. Rows of tables, and every 64 values of arrays, take a range found by greedy
  search, two float16 (:mod:`ecstudy.rowwise`), which costs a row 4 bytes: with few numbers per row nothing is saved;
- ``|fp16``, ``|bf16``: the same numbers in 16 bits.

A wrapper that saves no bytes is a mistake and refused when the size is solved (:mod:`ecstudy.budget`).
"""
from __future__ import annotations

import torch
from torch import nn

from .method import Method
from .spec import Part, SpecError
from .tables import Holder

FORMS = {"int8": 8, "int16": 16, "int4": 4, "int2": 2, "fp16": torch.float16, "bf16": torch.bfloat16}


class Quantised(Method):
    """``inner`` with its deployed vectors in one of the :data:`FORMS`."""

    def __init__(self, inner: Method, form: str):
        super().__init__(inner.fields, inner.dim)
        self.inner, self.form = inner, form
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
            quantise(self.inner.deploy(), self.form)
        return super().deploy()


def quantise(module: nn.Module, form: str) -> None:
    """Replace the outermost holders under ``module`` by their quantised form."""
    for name, child in module.named_children():
        if isinstance(child, Holder):
            try:
                setattr(module, name, child.quantised(FORMS[form]))
            except TypeError as error:
                raise SpecError(f"|{form}: {error}") from None
        else:
            quantise(child, form)


def wrap(method: Method, part: Part) -> Method:
    """Apply one wrapper of a spec."""
    if part.name not in FORMS or part.options:
        raise SpecError(f"no wrapper {part}; known wrappers: {', '.join(FORMS)}")
    return Quantised(method, part.name)
