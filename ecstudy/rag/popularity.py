"""How often questions that are not tested find each passage: what a system in use could count."""
from __future__ import annotations

import numpy as np

from .. import paths
from ..study import store
from .corpus import Corpus
from .search import search


def popularity(corpus: Corpus, k: int = 10) -> np.ndarray:
    """How often each passage is among the first ``k`` of the questions for training, int64 [n]; exact search, cached.

    Raises DataError if the corpus has no such questions.
    """
    asked = corpus.questions(None, "train")
    path = paths.runs() / "rag" / f"popular-{corpus.fingerprint}-{corpus.encoding['fingerprint']}-{k}.npy"
    if not path.is_file():
        hits = search(corpus.vectors, np.asarray(corpus.question_vectors)[[q.id for q in asked]], k)
        with store._whole(path, binary=True) as file:
            np.save(file, np.bincount(hits.ids.ravel(), minlength=len(corpus)))
    return np.load(path, allow_pickle=False)
