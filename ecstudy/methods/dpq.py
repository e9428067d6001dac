r"""An id is a few short codes: each names one of ``centroids`` vectors, which side by side are the embedding.

**Idea** (differentiable product quantisation, DPQ; Chen, Li and Sun, ICML 2020, arXiv 1908.09756). In training an id
has a full query $q$, cut into $P$ parts. Part $j$ takes the code of the centroid that answers loudest,
$$k_j = \arg\max_k\, r(q^{(j)}, c^{(j)}_k), \qquad e = [\,c^{(1)}_{k_1}, \dots, c^{(P)}_{k_P}].$$
In mode ``vq`` the response is $r(q, c) = -\lVert q - c\rVert^2$. The gradient of $e$ goes straight to the query, and
two losses draw query and centroid together,
$$\mathcal L = \lVert c_k - \mathrm{sg}(q)\rVert^2 + \beta\, \lVert \mathrm{sg}(c_k) - q\rVert^2 .$$
In mode ``sx`` the response is a dot product with a key, the embedding is made of values apart from the keys, and the
gradient is that of a soft-max over the responses.

**Stored** for every id $P$ codes of $\log_2 K$ bits in $\lceil P \log_2 K / 8\rceil$ bytes, for every field
$K \times D$ numbers of centroids; queries and keys are gone. A field of so few ids that this would not be smaller (at
$D/2$ parts) is a plain table.

**Size** by ``parts``, a divisor of $D$; centroids weigh the same for all of them. At dimension 16 with 32 centroids
16, 8 and 4 parts are 15.6 %, 7.8 % and 4.7 % of full; there is nothing above. ``centroids=256`` reaches 25 %.

**Training** one stage. Queries and both their moments make 300 %, and centroids come on top. Each distinct id of a
batch is coded once. Every ``revive`` steps a centroid that no id chose since is put on a query of the last batch and
its moments are cleared. Validation codes ids afresh from their queries, and deployment codes all rows by the same
arithmetic, so ids never seen in training hold valid codes. ``fit`` runs k-means in every field and part.

**Deviations** The two losses act as gradients in the backward pass, not as a term that the training loop must add, so
the module trains in any loop; they are means over a batch's occurrences, summed over fields. $\beta$ is 0.25 (the
published code has 0; on the real sample 0, 0.25 and 1 are within 0.0003 of validation AUC). The original normalises
responses over the batch for each centroid: ``normalise=True`` does, from the mean and covariance of the queries, with
running ones for evaluation. It helps ``sx`` (validation AUC 0.7466 against 0.7433 at 10 %) and is the default there;
in ``vq`` it costs (0.7467 against 0.7498), because the loudest centroid is then no longer the nearest. The study's
code normalises over the parts, which changes no arg-max. Reviving is not in the original; centroids begin as queries
do.
"""
from __future__ import annotations

from ._codes import Coded


class Dpq(Coded):
    paper = "arXiv 1908.09756"
    space = r"\frac{1}{32} n P \log_2 K + K d"
    time = r"O(d)"

    def __init__(self, fields, dim, parts=None, centroids=32, mode="vq", beta=0.25, normalise=None, revive=100):
        if mode not in ("vq", "sx"):
            raise ValueError(f"mode={mode!r}: expected 'vq' (nearest centroid) or 'sx' (soft-max of dot products)")
        if centroids not in [2 ** b for b in range(1, 9)]:
            raise ValueError(f"centroids={centroids}: expected a power of two from 2 to 256")
        super().__init__(fields, dim, parts, centroids, centroids, dot=mode == "sx", beta=beta, revive=revive,
                         normalise=mode == "sx" if normalise is None else normalise)
