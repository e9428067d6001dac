r"""Vectors are cut into chunks, and while training goes on the most useful chunks own the memory there is.

**Idea** (FIITED; Luo et al., arXiv 2401.04408). A vector is ``chunks`` pieces of $w = D / k$ numbers. In step $i$ a
chunk was looked up $a_i$ times and its gradient had norm $g_i$; its utility is
$$u_i = \gamma\, u_{i-1} + a_i\, g_i .$$
A pruned chunk is zero. The gradient is taken at the assembled vector, so a pruned chunk has one too, its utility goes
on, and it may come back. From time to time chunks above a threshold take the slots of chunks below. Every chunk
position has its own threshold, hence its own pruning ratio, around the global one. No table is trained beforehand and
none is retrained: memory is small *while* training.

**Stored** ``slots`` chunks and an index that finds them, the lightest of three for that number: an address per chunk
(``address``), one bit per chunk with running counts (``bitmask``), or a compact hash of the surviving chunks alone
(``hash``: the number of a chunk is shuffled one to one, part of it names the bucket, and the rest takes one to four
bytes). At dimension 16 with 4 chunks the bitmask is lightest from about 14 % of full up, the hash below. A row none of
whose chunks survive has no entry in it. ``serving`` names one of them. ``value_bytes`` is what the numbers alone take,
which is what published ratios count. **Size** by ``slots``.

**Training** one stage, in place. Storage is virtually hashed and physically indexed: an address map finds a chunk's
slot in a table of ``slots`` rows, both Adam moments belong to slots, and a stack holds the slots nobody owns. Slot 0 is
zero, is what pruned chunks read and is never updated. Per id there are ``chunks`` addresses of four bytes and as many
utilities of two (37.5 % at dimension 16 with 4 chunks), so at a budget of 10 % training takes about 70 % of the full
*weights*, where the full table takes 300 %. A round is held every ``interval`` steps, and in the first 1,000 steps
every 3, then 30, then 300 (``warmup``: until which step how often). It sees ``sample`` evenly spaced rows for the
thresholds and all rows, block by block, for the swaps; of candidates that do not fit, the most useful enter, and the
least useful leave. A re-grown chunk begins at zero with fresh moments; zero is what it read before, so nothing jumps.
In a loop of your own call ``emb.after_step(optimizers)`` after each update. ``emb.kept()`` counts live chunks by field
and position, and ``emb.log`` tells of every round.

``ratios="dynamic"``: one threshold over the sampled chunks of all positions says what share of each position is above
it; shares stay within ``spread`` of the global one and are scaled to the budget. ``"uniform"``: the same share
everywhere. Numbers ``(8, 4, 2, 1)`` are the shares kept, relative to one another. ``utility`` may be ``"count"``
($a_i$) or ``"gradient"`` ($g_i$) instead of their ``"product"``; ``chunks=1`` prunes rows (``ada_embed``).
``normalise=True`` divides utilities by the 95th percentile of those seen in their field. ``trigger``: a round moves
nothing unless the pruned chunks above the threshold are at least this share of the slots.

``online=True`` is for ids that are not known beforehand: cardinalities are then only what ids stay below (``2**40``
costs nothing), and a map of ``capacity`` ids (default: four for every row's worth of slots) holds those that were met,
with their addresses and utilities. A new id takes the place of the least useful in its bucket of 16. What ships is
the hash, and ids it does not hold are zeros. The budget is then to be given in bytes.

**Deviations** The paper's full text was not at hand: the utility, the chunks, ratios per position, the address map with
free slots, re-initialisation and the absence of retraining are from its abstract, its reviews and summaries; $\gamma$,
interval, warm-up, how thresholds are found, normalisation and the first owners are ours or those of ITEP, its
production sibling. $g_i$ is the norm of the gradient summed over the batch. Utilities are kept for every chunk and
step in bfloat16, rounded so that small gains add up on average. What was seen does not decay on the spot: later gains
are added in units that grow by $1 / \gamma$ a step, which is the same sum without visits or time stamps. The paper's
manual mode lists pruning ratios whose mean is the target; here the budget is the target, so what is listed are
proportions. At the start evenly spaced rows own the slots, as no id is known to matter more. The interval is at most a
tenth of an epoch. A row that comes late is corrected by Adam's global step, as everywhere in this study.
"""
from __future__ import annotations

from ._slots import WARMUP, InTraining


class Fiited(InTraining):
    paper = "arXiv 2401.04408"
    space = r"s d / k + \min(5 n k / 128,\ s / 4 + n k / 256,\ 9 s / 16)"
    time = r"O(d)"

    def __init__(self, fields, dim, slots=None, chunks=4, utility="product", ratios="dynamic", gamma=0.9999,
                 interval=None, warmup=WARMUP, sample=1 << 18, normalise=False, spread=0.5, online=False,
                 capacity=None, serving=None, trigger=0.0):
        super().__init__(fields, dim, slots, chunks, utility, ratios, gamma, interval, warmup, sample, normalise,
                         spread, online, capacity, serving, trigger)

    @classmethod
    def sizes(cls, fields, dim, chunks=4, **options):
        return super().sizes(fields, dim, chunks)
