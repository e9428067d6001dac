"""Yardsticks without embeddings: what a prepared data set yields to its base rate and to a one-hot logistic regression.

A compressed model is of use only above these; the gap from them to Full is the room in which methods differ.
"""
from __future__ import annotations

import time
import warnings

import numpy as np

from ..data import open_dataset
from ..data.layout import Dataset, Split
from ..extras import need
from ..measure import auc, auc_interval, logloss, normalised_entropy
from . import store
from .progress import bar
from .row import complete, frame, hash_of

GRID = (0.003, 0.01, 0.03, 0.1, 0.3)                     # C of scikit-learn: inverse strength of the L2 penalty
CHUNK = 500_000                                           # rows turned into a sparse matrix at once for prediction


def base_rate(dataset: Dataset) -> dict:
    """Predict the training base rate for every row of ``test``: the floor (AUC 0.5, normalised entropy about 1)."""
    start = time.perf_counter()
    label = dataset.split("train").label
    rate = float(label.mean())
    if not 0 < rate < 1:
        raise ValueError(f"base rate {rate} in the training rows of {dataset.name!r}, expected both classes")
    valid, test = (np.full(dataset.rows[s], np.log(rate / (1 - rate))) for s in ("valid", "test"))
    return _metrics(dataset, valid, test) | dict(rate=rate, rows=len(label), seconds=time.perf_counter() - start)


def logistic_regression(dataset: Dataset, *, grid=GRID, max_rows: int | None = 2_000_000, max_iter: int = 100,
                        progress: bool | None = None) -> dict:
    """Logistic regression on the ids, one-hot, and the dense values, standardised; the test split is scored once.

    Columns are the ids seen in training, so an unseen id adds nothing. The penalty is the value of ``grid`` with the
    best AUC on ``valid``. Trained by Newton-CG (faster here than L-BFGS and liblinear) on the last ``max_rows``
    training rows (None: all); memory is about 65 bytes per row and column of the log. ``progress``: see
    :func:`ecstudy.study.progress.bar`.

    Returns auc, auc_low, auc_high (95 %), valid_auc, logloss, ne, c, grid (C -> valid AUC), converged, rows, columns,
    seconds. Raises MissingExtra without scikit-learn (extra ``book``), ValueError for a missing class or empty grid.
    """
    if not grid:
        raise ValueError("grid is empty, expected at least one penalty C > 0")
    linear = need("sklearn.linear_model", "book")
    start = time.perf_counter()
    train = _tail(dataset.split("train"), max_rows)
    encode = _Encoder(dataset, train)
    x, y = encode(train), np.asarray(train.label)
    valid_auc, best = {}, None
    valid = dataset.split("valid")
    with bar(len(grid), f"logistic regression on {dataset.name}", progress) as step:
        for c in grid:                                    # no warm start: it stops before the new optimum is reached
            model = linear.LogisticRegression(C=c, solver="newton-cg", tol=1e-5, max_iter=max_iter)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*failed to converge")  # reported as `converged`
                model.fit(x, y)
            logit = encode.logits(valid, model)
            valid_auc[c] = auc(valid.label, logit)
            if valid_auc[c] == max(valid_auc.values()):
                best = c, model, logit
            step(f"C={c:g}, valid AUC {valid_auc[c]:.4f}")
    c, model, logit = best
    test = encode.logits(dataset.split("test"), model)
    return _metrics(dataset, logit, test) | dict(
        c=c, grid=valid_auc, converged=bool(model.n_iter_[0] < max_iter), rows=len(train), columns=x.shape[1],
        seconds=time.perf_counter() - start)


#: The yardsticks of a data set by spec; ``c=1.0`` is scikit-learn's default penalty, the other is chosen on ``valid``.
YARDSTICKS = {
    "base_rate": lambda dataset, **options: base_rate(dataset),
    "logistic_regression": logistic_regression,
    "logistic_regression(c=1.0)": lambda dataset, **options: logistic_regression(dataset, grid=(1.0,), **options),
}


def measure(name: str, *, section: str = "dlrm", force: bool = False, progress: bool | None = None):
    """The yardsticks of a data set as rows of the study (model ``none``); those already measured are not repeated.

    Returns the rows as a DataFrame. Raises DataError for an unknown data set.
    """
    dataset, rows = open_dataset(name), []
    for spec, yardstick in YARDSTICKS.items():
        settings = dict(yardstick=spec, data=dataset.fingerprint)
        run_id = hash_of(settings)
        row = None if force else store.rows().get(run_id)
        if row is None:
            found = yardstick(dataset, progress=progress)
            row = store.write(complete(dict(
                run_id=run_id, section=section, task="ctr", method=spec.partition("(")[0], spec=spec,
                family="yardstick", dataset=dataset.name, model="none", status="ok",
                data_fingerprint=dataset.fingerprint,
                settings=settings | {k: found[k] for k in ("c", "grid", "rows", "columns", "rate") if k in found},
                **{k: found[k] for k in ("auc", "auc_low", "auc_high", "valid_auc", "logloss", "ne", "seconds")})))
        rows.append(row)
    return frame(rows)


def _metrics(dataset: Dataset, valid: np.ndarray, test: np.ndarray) -> dict:
    """The columns of a result row from the logits of ``valid`` and ``test``."""
    label = dataset.split("test").label
    area, low, high = auc_interval(label, test)
    return dict(auc=area, auc_low=low, auc_high=high, valid_auc=auc(dataset.split("valid").label, valid),
                logloss=logloss(label, test), ne=normalised_entropy(label, test))


def _tail(split: Split, rows: int | None) -> Split:
    return _slice(split, 0 if rows is None else max(0, len(split) - rows), len(split))


def _slice(split: Split, start: int, stop: int) -> Split:
    return Split(split.ids[start:stop], split.dense[start:stop], split.label[start:stop])


class _Encoder:
    """Rows as a sparse matrix: one column per id seen in ``train``, then the dense values standardised on ``train``."""

    def __init__(self, dataset: Dataset, train: Split):
        self.offsets = np.concatenate([[0], np.cumsum(dataset.cardinalities)[:-1]]).astype(np.int64)
        self.seen = np.unique(train.ids + self.offsets)
        self.mean = train.dense.mean(0, dtype=np.float64)
        spread = train.dense.std(0, dtype=np.float64)
        self.scale = 1 / np.where(spread > 0, spread, 1)

    def __call__(self, rows: Split):
        """CSR matrix [N, seen ids + K] of float32."""
        sparse = need("scipy.sparse", "book")
        ids = (rows.ids + self.offsets).ravel()
        column = np.searchsorted(self.seen, ids)
        known = self.seen[np.minimum(column, len(self.seen) - 1)] == ids
        count = known.reshape(rows.ids.shape).sum(1)
        indptr = np.concatenate([[0], np.cumsum(count)])
        onehot = sparse.csr_matrix((np.ones(indptr[-1], np.float32), column[known].astype(np.int32), indptr),
                                   shape=(len(rows), len(self.seen)))
        dense = ((rows.dense - self.mean) * self.scale).astype(np.float32)
        return sparse.hstack([onehot, sparse.csr_matrix(dense)], format="csr") if dense.shape[1] else onehot

    def logits(self, rows: Split, model) -> np.ndarray:
        """Logits [N] of any number of rows, ``CHUNK`` at a time."""
        return np.concatenate([model.decision_function(self(_slice(rows, i, i + CHUNK)))
                               for i in range(0, len(rows), CHUNK)])
