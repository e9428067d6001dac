r"""Two methods for one table: frequent ids are kept by one, all others by another.

**Idea** (a combination; ``adapt_emb`` and ``mgqe`` are two of its cases). What helps a frequent id, numbers of its own,
is wasted on a rare one, and what a rare id can afford, sharing, hurts a frequent one. So the $k_f = \min(n_f, h)$ most
frequent ids of every field, the head, are embedded by the method ``head``, those left over, the tail, by ``tail``:
$$e(i) = \begin{cases} e_{head}(\mathrm{rank}(i)) & i \in H_f \\ e_{tail}(\mathrm{rank}(i)) & \text{else,}\end{cases}$$
where the rank counts the ids of its kind that stand before it in the field. Both see fields like any other, of $k_f$
and $n_f - k_f$ ids; a field of at most $h$ ids is whole in the head. Both are specifications, such as ``'full|int8'``
or ``'compo(combine="sum")'``.

**Stored** what both store, and the map that singles out the head: the lighter of a bit per id with running counts
and the sorted ids. **Size** by ``size``, the most bytes all this may take. The head and the map take at most the share
``part`` of them, with $h$ as large as that allows; the tail is then as large as the rest allows. The head's size per
id is what its specification says (its default, unless given). If the tail's is given as well (``tail='full|int4'``),
``part`` does not matter: $h$ is as large as fits.

**Training** one stage in which both learn together, so both must be methods of one stage that trains in place.
``by="norm"`` is for trained vectors (``ecstudy.compress``): the head are the ids of the largest norm in every field,
and both parts are fitted to their rows, so compressors may be parts too.

**Deviations** There is no paper. ``adapt_emb`` gives the head a share of the ids of every field instead of a number,
and ``mgqe`` divides codes of two widths over common centroids. A look-up asks both parts for every field; where
the id is not theirs they are asked for another one of the batch that is, and get no gradient for it. Taking $h$ ids of
every field keeps small fields whole, and makes shapes a function of ``size`` alone, which the most frequent ids of
all fields together would not.
"""
from __future__ import annotations

import functools

import torch

from ..fields import Fields, derived
from ..maps import marked_ids, most_of_fields
from ..memory import memory
from ..method import Method, require_counts
from ..registry import get
from ..spec import Part, Spec, parse
from ._posttrain import weights_of


class Rows:
    """Some rows of a matrix (tensor, array or memory map), read when they are asked for."""

    def __init__(self, matrix, index):
        self.matrix, self.index = matrix, index.cpu()
        self.shape = (len(index), matrix.shape[1])

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        index = self.index[key]
        return self.matrix[index.to(self.matrix.device) if isinstance(self.matrix, torch.Tensor) else index.numpy()]


def divided(sizes, h) -> tuple[list[int], list[int]]:
    """Ids of every field that belong to the head, and those left over."""
    return [min(n, h) for n in sizes], [n - min(n, h) for n in sizes]


@functools.lru_cache(maxsize=4096)
def weight(spec: str, sizes: tuple, dim: int, smallest: bool) -> int:
    """Bytes of a part for fields of ``sizes`` (those without ids aside), at its smallest or at its given size."""
    from ..budget import build                                       # it reads methods

    fields, parsed = Fields([n for n in sizes if n] or [1]), parse(spec)
    cls, knob = get(parsed.name), None
    if smallest and cls.knob and cls.knob not in parsed.options:
        knob = cls.sizes(fields, dim, **parsed.options)[0]
    return memory(build(parsed, fields, dim, knob=knob, device="meta").deploy()) if sum(sizes) else 0


@functools.lru_cache(maxsize=256)
def plan(sizes: tuple, dim: int, size: int, head: str, tail: str, part: float) -> tuple[int, int | None]:
    """``h`` and the tail's knob for ``size`` bytes.

    Raises
    ------
    ValueError
        If that is too little.
    """
    from ..budget import solve

    parsed = parse(tail)
    cls = get(parsed.name)
    free = cls.knob is not None and cls.knob not in parsed.options

    def needs(h):
        own, rest = divided(sizes, h)
        with torch.device("meta"):
            head_bytes = weight(head, tuple(own), dim, False) + memory(marked_ids(sum(sizes), sum(own)))
        return head_bytes, weight(tail, tuple(rest), dim, True)

    def fits(h):
        head_bytes, least = needs(h)
        return head_bytes + least <= size and (h == 1 or not free or head_bytes <= part * size)

    if not fits(1):
        raise ValueError(f"size={size}: expected at least {sum(needs(1))} bytes, one id of every field by {head} and "
                         f"the smallest {tail} for the others")
    low, high = 1, max(sizes) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    rest = [n for n in divided(sizes, low)[1] if n]
    return low, solve(parsed, rest, dim, size - needs(low)[0]).knob if free and rest else None


class Split(Method):
    knob = "size"
    family = "baseline"
    aware = "frequency"
    paper = "combination of this study"
    group = "frequency split"
    space = r"S_{head}(k) + S_{tail}(n - k) + \min(k,\ 1.125\,n / 32)"
    time = r"O(d + \log k)"
    needs_counts = True

    def __init__(self, fields, dim, size=None, counts=None, head="full", tail="hash_trick", by="count", part=0.5):
        from ..budget import build

        super().__init__(fields, dim)
        if by not in ("count", "norm"):
            raise ValueError(f"by={by!r}: expected 'count' (to train) or 'norm' (of trained vectors)")
        if not 0 < part < 1:
            raise ValueError(f"part={part}: expected the head's share of the bytes, between 0 and 1")
        self.by, self.specs = by, (parse(head).canonical, parse(tail).canonical)
        self.size = max(2 * fields.n * dim, self.sizes(fields, dim, head, tail)[0]) if size is None else size
        h, tail_knob = plan(fields.sizes, dim, self.size, *self.specs, part)
        self.own, rest = divided(fields.sizes, h)
        device = torch.empty(0).device                                   # meta while sizes are weighed
        self.map = marked_ids(fields.n, sum(self.own))
        marked, here = None, [None, None]
        if device.type != "meta":
            score = -torch.arange(fields.n)                              # until there are norms, the first ids
            score = require_counts(counts, fields, device) if by == "count" else score
            self.map.fill(most_of_fields(score, fields.sizes, self.own).to(device))
            marked = self.map.marked(fields.n).cpu()
            here = [score[marked], score[~marked]] if by == "count" else here
        left = [f for f, n in enumerate(rest) if n]
        self.head = build(head, Fields(self.own, fields.bound()), dim, counts=here[0], device=device)
        self.tail = build(tail, Fields([rest[f] for f in left], fields.bound()), dim, knob=tail_knob, counts=here[1],
                          device=device) if left else None
        derived(self, "own_start", [sum(self.own[:f]) for f in range(len(fields))])
        derived(self, "rest_start", [sum(rest[:f]) for f in range(len(fields))])
        derived(self, "left", left)                                      # fields with a tail
        derived(self, "column", [left.index(f) if f in left else 0 for f in range(len(fields))])

    @classmethod
    def sizes(cls, fields, dim, head="full", tail="hash_trick", **options):
        own, rest = divided(fields.sizes, 1)
        with torch.device("meta"):
            least = memory(marked_ids(fields.n, sum(own)))
        least += weight(parse(head).canonical, tuple(own), dim, False)
        least += weight(parse(tail).canonical, tuple(rest), dim, True)
        # a row per field further, whatever is left over is less than that, so bytes never fall
        return range(least, max(least, 4 * fields.n * dim) + 1, 4 * len(fields) * dim)

    @property
    def parts(self) -> list[Method]:
        return [self.head] if self.tail is None else [self.head, self.tail]

    # --- look-up --------------------------------------------------------------------------------------------------

    def encode(self, ids):
        flat = self.fields.flat(ids)
        place, marked = self.map.locate(flat)
        own = self.head.encode(asked(place - self.own_start, marked))
        if self.tail is None:
            return marked, own, None
        rest = asked(flat - place - self.rest_start, ~marked)
        return marked, own, self.tail.encode(rest.index_select(1, self.left))

    def lookup(self, codes):
        marked, own, rest = codes
        out = self.head.lookup(own)
        if rest is None:
            return out
        return torch.where(marked[..., None], out, self.tail.lookup(rest).index_select(1, self.column))

    # --- training and fitting -------------------------------------------------------------------------------------

    def schedule(self, run):
        for part, spec in zip(self.parts, self.specs):
            inner = getattr(part, "inner", part)
            while hasattr(inner, "inner"):
                inner = inner.inner
            if self.by == "norm" or type(inner).schedule is not Method.schedule or not inner.trains:
                raise TypeError("split(by='norm') takes trained vectors: use ecstudy.compress" if self.by == "norm" else
                                f"split trains both parts at once, and {spec} does not train in one plain stage; take "
                                "one that does (full, hash_trick, compo, robe, fp16, ...), or its vectors in integers "
                                "by a wrapper (full|int4)")
        yield from run.fit("train")

    def before_evaluation(self):
        for part in self.parts:
            part.before_evaluation()

    def dense_parameters(self):
        return [p for part in self.parts for p in part.dense_parameters()]

    def fit(self, rows):
        if self.by == "norm":
            chosen = most_of_fields(weights_of(rows), self.fields.sizes, self.own)
            self.map.fill(chosen.to(self.own_start.device))
        marked = self.map.marked(self.fields.n)
        for part, mine in zip(self.parts, (marked, ~marked)):
            part.fit(Rows(rows, mine.nonzero().view(-1)))

    @property
    def fitted(self):
        found = {}
        for name, part, text in zip(("head", "tail"), self.parts, self.specs):
            if part.fitted:
                spec = parse(text)
                found[name] = Spec(Part(spec.name, spec.options | part.fitted), spec.wrappers).canonical
        return found

    def deploy(self):
        for part in self.parts:
            part.deploy()
        return super().deploy()


def asked(ids, mine):
    """``ids [B, F]`` where they are ``mine``, else the field's first one in the batch that is (0 if there is none)."""
    if not len(ids):
        return ids
    other = torch.where(mine, ids, 0).gather(0, mine.to(torch.uint8).argmax(0, keepdim=True))
    return torch.where(mine, ids, other)
