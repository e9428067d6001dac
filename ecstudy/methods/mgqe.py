r"""Codes into short vectors, of which frequent ids may use all ``high`` and rare ids only the first ``low``.

**Idea** (multi-granular quantised embedding, MGQE; Kang et al., WWW 2020, arXiv 2002.08530). Product quantisation
learned in training as in DPQ (arXiv 1908.09756): part $j$ of an id's query $q$ takes the nearest centroid,
$$k_j = \arg\min_{k < K(i)} \lVert q^{(j)} - c^{(j)}_k\rVert^2, \qquad e = [\,c^{(1)}_{k_1}, \dots, c^{(P)}_{k_P}],$$
where $K(i)$ is ``high`` for the share ``top`` of a field's ids that occur most and ``low`` for the others: what is
seldom seen cannot learn fine distinctions, and needs fewer bits. The first centroids serve all ids.

**Stored** $P$ codes per id, of 8 bits for frequent and 6 for rare ids, in whole bytes per id; one bit per id with
running counts that says which (1.25 bits per id); for every field $K \times D$ numbers of centroids. A field of so
few ids that this would not be smaller (at $D/2$ parts) is a plain table.

**Size** by ``parts``, a divisor of $D$. At the dimension 16 and the field sizes of Criteo, Avazu and Company 16, 8 and
4 parts are 19.6 %, 9.9 % and 5.1 % of full. The paper counts 16.0 % and 11.1 % for 8 and 4, because it keeps an int32
per id where one bit and its counts do.

**Training** one stage, as for ``dpq``: queries and both their moments make 300 %, and centroids come on top.
``fit`` runs k-means in every field and part under the same limits.

**Deviations** Exactly ``top`` of each coded field's ids are frequent, ties to the lower id, so that the size follows
from the knob; the published code takes every id that reaches a count, which enlarges the share to 10.7-14 %. Codes
are really packed; there they are int32. They are taken afresh from the queries wherever validation is measured and at
deployment; there an id keeps the code of its last training step and one never seen has none. The study's code has no
commitment loss and normalises responses over the parts, which changes no arg-max; what DPQ does (``normalise=True``)
costs here (validation AUC 0.7468 against 0.7503 on the real sample at 10 %). How the losses act and how unused
centroids are revived is told at ``dpq``. Seen from another side this is a ``split`` into a head and a tail of ``dpq``
codes of two widths, whose dictionaries are not apart: the tail reads the first centroids of the head.
"""
from __future__ import annotations

import torch

from ..method import require_counts
from ._codes import Coded


class Mgqe(Coded):
    aware = "frequency"
    paper = "arXiv 2002.08530"
    needs_counts = True
    space = r"\frac{1}{32} n \left(P (t \log_2 K + (1 - t) \log_2 K') + 1.25\right) + K d"
    time = r"O(d)"

    def __init__(self, fields, dim, parts=None, counts=None, high=256, low=64, top=0.1, beta=0.25, normalise=False,
                 revive=100):
        powers = [2 ** b for b in range(1, 9)]
        if high not in powers or low not in powers or low > high:
            raise ValueError(f"high={high}, low={low}: expected powers of two from 2 to 256 with low <= high")
        if not 0 <= top <= 1:
            raise ValueError(f"top={top}: expected a share of each field's ids, 0 to 1")
        super().__init__(fields, dim, parts, high, low, top=top, beta=beta, normalise=normalise, revive=revive,
                         counts=require_counts(counts, fields, torch.empty(0).device))
