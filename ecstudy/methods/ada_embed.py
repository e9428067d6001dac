r"""Rows compete for memory while training goes on: those looked up often and with large gradients have it.

**Idea** (AdaEmbed; Lai et al., OSDI 2023; in production as ITEP in TorchRec and FBGEMM). An id's importance is how
often it is looked up times the norm of its gradient, decayed,
$$u_i = \gamma\, u_{i-1} + a_i\, g_i ,$$
and compared between fields after division by the 95th percentile of its field. From time to time ids above a threshold
take the rows of ids below. Pruned ids are zero, keep being watched, and may come back.

**Stored** ``slots`` rows and an index that finds them: an address per id, one bit per id, or a compact hash of the
surviving ids, whichever is lightest. **Size** by ``slots``.

**Training** one stage, in place: ``fiited`` with one chunk per row, where storage, rounds and options are told. Per id
there are one address of four bytes and one utility of two, 9.4 % at dimension 16: at a budget of 10 % training takes
less than 40 % of the full weights. ``utility="count"`` is what ITEP does.

**Deviations** ITEP counts in some of the steps only, decays by 0.98 per round and pairs candidates as they come; here
every step is counted, $\gamma$ applies per step, and of candidates that do not fit the most important enter. AdaEmbed
reallocates only if enough sampled rows cross the threshold, to save the time of moving them (``trigger=0.05``: pruned
ids above it are at least a twentieth of the slots); a round here costs little and is always held. The percentile is
taken of the utilities that are not zero: in a large field most ids are never met, and its 95th percentile would be
zero.
"""
from __future__ import annotations

from ._slots import WARMUP, InTraining


class AdaEmbed(InTraining):
    paper = "OSDI 2023 (Lai et al.)"
    space = r"s d + \min(5 n / 128,\ s / 4 + n / 256,\ 9 s / 16)"
    time = r"O(d)"

    def __init__(self, fields, dim, slots=None, utility="product", gamma=0.9999, interval=None, warmup=WARMUP,
                 sample=1 << 18, normalise=True, online=False, capacity=None, serving=None, trigger=0.0):
        super().__init__(fields, dim, slots, 1, utility, "uniform", gamma, interval, warmup, sample, normalise, 0.0,
                         online, capacity, serving, trigger)
