"""What methods weigh at the true field sizes of the paper's logs: the numbers behind its tables, nothing allocated."""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..budget import build, full_bytes, solve, weigh
from ..data.cardinalities import FIELDS
from ..fields import Fields
from ..memory import memory, stored
from ..registry import get
from ..spec import parse

DIM = 16
PASSAGES = "passages"                    # vectors of DPR's passages of Wikipedia (paper, section 5.5)
PASSAGE_ROWS, PASSAGE_DIM = 21_015_324, 768
BUDGETS = (0.5, 0.1, 0.01, 0.001)        # the paper's
FEW = 100                                 # a method of so many sizes has them listed one by one


def sizes_of(data: str) -> list[int]:
    """Cardinalities of ``criteo``, ``avazu`` or ``company``, or the number of ``passages``."""
    return [PASSAGE_ROWS] if data == PASSAGES else list(FIELDS[data][1])


def dim_of(data: str) -> int:
    return PASSAGE_DIM if data == PASSAGES else DIM


def home(method: str) -> str:
    """The data at whose sizes a method is shown."""
    return "criteo" if get(parse(method).name).trains else PASSAGES


@lru_cache(maxsize=None, typed=True)                                           # 1 is a byte, 1.0 the whole table
def weighed(spec: str, data: str, budget: float | int | None) -> dict:
    """:func:`ecstudy.weigh` at a log's field sizes and dimension; remembered, not to be changed."""
    return weigh(spec, sizes_of(data), dim_of(data), budget)


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Shipped(NamedTuple):
    """A deployed module: its stored tensors, largest first, the budget asked for (None: its smallest) and its bytes."""

    tensors: list[Tensor]
    budget: float | None
    bytes: int
    full: int
    data: str = "criteo"


@lru_cache(maxsize=None)
def shipped(method: str, data: str | None = None, budget: float = 0.1) -> Shipped:
    """What ``method`` ships at ``budget``, or at its smallest size if that is larger, read off a ``meta`` build."""
    data = data or home(method)
    sizes, dim = sizes_of(data), dim_of(data)
    full, found = full_bytes(sizes, dim), weighed(method, data, budget)
    limit = int(full * budget) if found["reachable"] else found["bytes_inference"]
    emb = build(method, Fields(sizes), dim, knob=solve(method, sizes, dim, limit).knob, device="meta").deploy()
    tensors = [Tensor(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel() * t.element_size())
               for name, t in stored(emb).items()]
    tensors.sort(key=lambda t: -t.bytes)
    return Shipped(tensors, budget if found["reachable"] else None, memory(emb), full, data)


class Reach(NamedTuple):
    """Shares of the full table, in per cent: smallest and largest size, and all of them if they are few."""

    smallest: float
    largest: float
    number: int
    each: tuple[float, ...]


@lru_cache(maxsize=None)
def reach(method: str, data: str | None = None) -> Reach:
    """How small and how large a method can be made within the size of the full table."""
    data = data or home(method)
    dim = dim_of(data)
    cls, spec = get(parse(method).name), parse(method)
    least = weighed(method, data, 1)["inference_pct"]                          # a budget of one byte
    if cls.knob is None:
        return Reach(least, least, 1, (least,))
    sizes = cls.sizes(Fields(sizes_of(data)), dim, **{k: v for k, v in spec.options.items() if k != cls.knob})
    most = weighed(method, data, 1.0)
    each = ()
    if len(sizes) <= FEW and not cls.learns_size:
        shares = [100 * memory(build(method, Fields(sizes_of(data)), dim, knob=k, device="meta").deploy())
                  / full_bytes(sizes_of(data), dim) for k in sizes]
        each = tuple(dict.fromkeys(s for s in shares if s <= 100))
    return Reach(least, most["inference_pct"] if most["reachable"] else least, len(each) or len(sizes), each)


def bytes_text(n: float) -> str:
    """Bytes as a reader says them: ``48 B``, ``206 MiB``, ``2.01 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.3g} {unit}"
        n /= 1024
    raise AssertionError


