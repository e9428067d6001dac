"""How good retrieval and reading are: recall at k, exact match and F1 with the official normalisations.

SQuAD's script (Rajpurkar et al. 2016) lower-cases, drops punctuation (the 32 ASCII characters) and the articles a, an,
the, and joins what is left with single spaces; DPR's for NQ-open (Karpukhin et al. 2020) first brings Unicode into
form NFD. A prediction counts as its best match over all given answers.
"""
from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from typing import Callable, Sequence

import numpy as np

KS = (1, 5, 10, 20, 100)                                    # the columns recall_*
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# DPR's SimpleTokenizer: runs of letters, digits and marks, or one other visible character ([^\w] splits at underscores)
_TOKEN = re.compile(r"[^\W_]+|[^\s]")


def normalise_squad(text: str) -> str:
    """``The  Beatles!`` -> ``beatles``: the normalisation of SQuAD's evaluation script."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalise_nq(text: str) -> str:
    """The same after Unicode normalisation NFD, as in DPR's evaluation of NQ-open."""
    return normalise_squad(unicodedata.normalize("NFD", text))


NORMALISE: dict[str, Callable[[str], str]] = {"squad": normalise_squad, "nq": normalise_nq}


def rule(group: str) -> Callable[[str], str]:
    """The normalisation of a group of questions: NQ's for groups named ``nq...``, else SQuAD's."""
    return NORMALISE["nq" if group.startswith("nq") else "squad"]


def exact(prediction: str, answers: Sequence[str], normalise: Callable[[str], str] = normalise_squad) -> float:
    """1.0 if the prediction equals one of the answers after normalisation, else 0.0.

    Raises
    ------
    ValueError
        If there are no answers: such a question cannot be scored.
    """
    _need(answers)
    mine = normalise(prediction)
    return float(any(mine == normalise(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str], normalise: Callable[[str], str] = normalise_squad) -> float:
    """Harmonic mean of precision and recall of the normalised words, best over the answers. Raises as :func:`exact`."""
    _need(answers)
    mine = normalise(prediction).split()
    return max(_overlap(mine, normalise(answer).split()) for answer in answers)


def _need(answers) -> None:
    if not answers:
        raise ValueError("no answers: expected at least one; leave out questions that have none")


def _overlap(mine: list[str], theirs: list[str]) -> float:
    same = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * same / (len(mine) + len(theirs)) if same else 0.0


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a passage holds one of the answers as a run of whole words, upper and lower case alike (DPR's rule)."""
    words = _words(text)
    for answer in answers:
        wanted = _words(answer)
        if wanted and any(words[i:i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1)):
            return True
    return False


def _words(text: str) -> list[str]:
    # composed again before cutting: an accent of its own would be a character that is no letter
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower())


def gold_rank(ids: np.ndarray, gold: Sequence[Sequence[int] | None]) -> np.ndarray:
    """Rank of the first gold passage among ``ids`` [Q, k] of each question, int64 [Q], from 1; 0 where there is none.

    ``gold`` holds the passage ids of each question, None where none is known (a miss, whatever was found).
    """
    ids = np.asarray(ids)
    if len(gold) != len(ids):
        raise ValueError(f"{len(ids)} searches for {len(gold)} questions: expected one each")
    owner = np.repeat(np.arange(len(gold)), [0 if g is None else len(g) for g in gold])
    wanted = np.array([i for g in gold if g is not None for i in g], dtype=np.int64)
    found = ids[owner] == wanted[:, None]
    place = np.where(found.any(1), found.argmax(1) + 1, ids.shape[1] + 1)
    rank = np.full(len(gold), ids.shape[1] + 1)
    np.minimum.at(rank, owner, place)
    return np.where(rank > ids.shape[1], 0, rank)


def recall(rank: np.ndarray, k: int) -> float:
    """Share of questions whose first gold passage is among the first ``k``; ``rank`` [Q] as :func:`gold_rank`'s."""
    rank = np.asarray(rank)
    return float(((rank >= 1) & (rank <= k)).mean())
