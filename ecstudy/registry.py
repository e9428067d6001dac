"""Which methods there are: one per file of ``ecstudy/methods``, named as the file. Adding a file adds the method."""
from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil

import pandas as pd

from .method import Method
from .paths import PACKAGE
from .spec import SpecError


def names(trains: bool | None = None) -> list[str]:
    """Names of all methods, sorted; ``trains`` picks those that train, or those that only take trained vectors."""
    found = pkgutil.iter_modules([str(PACKAGE / "methods")])
    every = sorted(module.name for module in found if not module.name.startswith("_"))
    return every if trains is None else [name for name in every if get(name).trains is trains]


def get(name: str) -> type[Method]:
    """The method's class.

    Raises
    ------
    SpecError
        If there is no such method; the message lists those that exist.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SpecError(f"no method {name!r}{hint} Known methods: {', '.join(names())}")
    module = importlib.import_module(f"ecstudy.methods.{name}")
    found = [c for c in vars(module).values()
             if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Method, found {len(found)}")
    return found[0]


def docstring(name: str) -> str:
    """The text at the top of the method's file, which opens its page in the book."""
    get(name)
    return inspect.cleandoc(importlib.import_module(f"ecstudy.methods.{name}").__doc__ or "")


def table() -> pd.DataFrame:
    """All methods, indexed by name.

    Columns: family, group, paper, aware, knob ("": fixed size), space and time (LaTeX), learns_size, needs_counts,
    trains, options, summary.
    """
    rows = []
    for name in names():
        cls = get(name)
        arguments = list(inspect.signature(cls.__init__).parameters.values())[3:]
        options = {p.name: p.default for p in arguments if p.name not in (cls.knob, "counts")}
        rows.append(dict(method=name, family=cls.family, group=cls.group, paper=cls.paper, aware=cls.aware,
                         knob=cls.knob or "", space=cls.space, time=cls.time, learns_size=cls.learns_size,
                         needs_counts=cls.needs_counts, trains=cls.trains, options=options,
                         summary=docstring(name).splitlines()[0]))
    return pd.DataFrame(rows).set_index("method")
