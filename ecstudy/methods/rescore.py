r"""Small codes to search by, and what they lose, in a few bits, for the best of what they find.

**Idea** (re-ranking with source coding; Jégou et al., ICASSP 2011; "rescoring" of today's vector databases). A coarse
code $c(x)$, by default of ``pq``, ranks all rows. For the ``keep`` best of a query the remainder $x - c(x)$ is read
as well, and they are ranked anew by
$$\langle q,\; c(x) + \hat r(x)\rangle, \qquad \hat r(x) \approx x - c(x).$$
The remainder is small, so a few bits describe it well, and it is read for ``keep`` rows of a query only.

**Stored** the coarse method as it is, and remainders of ``bits`` bits per number: up to 8 bits packed with a range per
row, as ``int4(scale="row")``; 16 and 32 bits as floating point, of which 32 is exact. All of it counts. **Size** by
``size``, which is that of the coarse method (``coarse``, any specification of a compressor); the remainder is given.

**Training** none: trained vectors are compressed, first by the coarse method, then what is left, block by block.

**Deviations** What is looked up is $c(x) + \hat r(x)$. Databases keep whole vectors beside the small codes; the
remainder says the same in fewer bits. A search in two stages is faster, not better: at best it finds what an
exhaustive search over all bits finds (``ecstudy.rag.search`` with ``how="decode"``), so compare at equal bytes.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..spec import SpecError, parse
from ..tables import take
from ._posttrain import PostTraining

BLOCK = 16_384                          # rows scored at once
PAIRS = 1 << 14                         # candidates looked up at once


class Rescore(PostTraining):
    knob = "size"
    paper = "ICASSP 2011"
    group = "two stages"
    space = r"S + \frac{1}{32} n (b d + 32)"
    time = r"O(d)"

    def __init__(self, fields, dim, size=None, coarse="pq", bits=4, keep=100):
        from ..budget import build                                       # it reads methods

        super().__init__(fields, dim)
        cls = self._coarse(coarse)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: expected an integer of at least 1")
        if bits not in (*range(1, 9), 16, 32):
            raise ValueError(f"bits={bits!r}: expected 1 to 8, 16 or 32 bits of a remainder")
        self.keep, self.bits = keep, bits
        device = torch.empty(0).device                                   # meta while sizes are weighed
        self.coarse = build(coarse, fields.n, dim, knob=size if cls.knob else None, device=device).deploy()
        self.size = getattr(self.coarse, cls.knob) if cls.knob else None
        self.fine = None
        if bits <= 8:
            self.fine = build(f"int4(bits={bits}, scale='row')", fields.n, dim, device=device).deploy()
        self.register_buffer("rest", None if bits <= 8 else
                             torch.zeros(fields.n, dim, dtype=torch.float16 if bits == 16 else torch.float32))

    @staticmethod
    def _coarse(coarse):
        from ..registry import get, names

        spec = parse(coarse)
        cls = get(spec.name)
        if cls.trains or cls is Rescore or spec.wrappers:
            others = ", ".join(name for name in names(trains=False) if name != "rescore")
            raise SpecError(f"coarse={coarse!r}: expected one of the compressors {others}, with options if wanted")
        return cls

    @classmethod
    def sizes(cls, fields, dim, coarse="pq", **options):
        given = parse(coarse).options
        inner = cls._coarse(coarse)
        return (given[inner.knob],) if inner.knob in given else inner.sizes(fields, dim, **given)

    @property
    def state(self):
        return self.coarse.state

    @state.setter
    def state(self, tensors):
        self.coarse.state = tensors

    def learn(self, rows):
        self.coarse.sample = self.sample
        self.coarse.learn(rows)

    def put(self, start, block):
        self.coarse.put(start, block)
        row = self._range(start, start + len(block))
        rest = block.to(row.device) - self._coarse_rows(row)
        if self.fine is not None:
            self.fine.put(start, rest)
        else:
            self.rest[start:start + len(block)] = rest.to(self.rest.dtype)

    def lookup(self, codes):
        rest = self.fine.lookup(codes) if self.fine is not None else take(self.rest, codes).float()
        return rest + self._coarse_rows(codes)

    def _coarse_rows(self, row):
        flat = self.coarse.lookup(self.coarse.encode(row.reshape(-1, 1)))            # ids are checked already
        return flat.reshape(row.shape + (self.dim,))

    def _range(self, start, stop):
        device = next(t.device for t in self.buffers() if t.numel())
        return torch.arange(start, stop, device=device)

    def _first(self, queries, start, stop):
        """Coarse scores ``[Q, stop - start]``."""
        if hasattr(self.coarse, "scores"):
            return self.coarse.scores(queries, start, stop)
        return queries @ self._coarse_rows(self._range(start, stop)).T

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` best rows of ``queries [Q, D]`` in two stages: scores float32 and ids int64, [Q, k], best first.

        At least ``k`` rows are scored anew, ``keep`` of them if that is more. Of equal scores the smaller id is first.
        """
        keep = min(max(k, self.keep), self.fields.n)
        score, best = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, self.fields.n, BLOCK):
            stop = min(start + BLOCK, self.fields.n)
            found, index = self._first(queries, start, stop).topk(min(keep, stop - start), dim=1)
            score, best = torch.cat([score, found], 1), torch.cat([best, index + start], 1)
            score, index = score.topk(min(keep, score.shape[1]), dim=1)
            best = best.gather(1, index)
        best = best.sort(dim=1).values
        out = [torch.einsum("qd,qkd->qk", some, self.lookup(mine))
               for some, mine in zip(queries.split(max(1, PAIRS // keep)), best.split(max(1, PAIRS // keep)))]
        score, index = torch.cat(out).sort(dim=1, descending=True, stable=True)
        return score[:, :k].contiguous(), best.gather(1, index)[:, :k].contiguous()
