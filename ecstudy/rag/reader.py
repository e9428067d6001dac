"""Extractive reader: the best span of the passages that retrieval found.

A transformers encoder with a head for the first and the last token of the answer. A passage scores
``max over spans of at most 15 tokens (first logit + last logit) - (first logit + last logit of [CLS])``, as in SQuAD 2:
how much likelier the best span is than that the passage holds no answer. Passages are weighed against each other by
``span score + weight * retrieval score``; with ``together`` equal answers of several passages add up their evidence
(log-sum-exp). Both are set on questions kept apart from training (:mod:`ecstudy.rag.train_reader`).

The paper's reader is a generator (:mod:`ecstudy.rag.generator`); what both share is that the passages are all they see.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import paths
from ..extras import need
from ..study.progress import bar
from .corpus import Passage, check_lists, digest_of
from .reader_cache import SpanCache, pair_keys
from .score import normalise_nq

FORMAT = "reader-1"
DTYPES = ("bfloat16", "float32")
CHUNK = 512                           # pairs read between two writes to the cache
TOKENS = 8192                         # tokens of a batch, padding included


class Spans(NamedTuple):
    """Best span of each pair: characters ``first`` to ``last`` (exclusive), int64 [N]; score float32 [N], -inf for a
    passage without a token."""

    first: np.ndarray
    last: np.ndarray
    score: np.ndarray


class Window(NamedTuple):
    """Tokens of a question and a stretch of its passage. ``first``/``last``: characters of each passage token, -1
    elsewhere; all int32 [L]."""

    pair: int
    ids: np.ndarray
    types: np.ndarray
    first: np.ndarray
    last: np.ndarray


def windows(tokenizer, questions: Sequence[str], texts: Sequence[str], length: int, stride: int) -> list[Window]:
    """Pairs as tokens; a passage over ``length`` is cut into windows that share ``stride`` tokens.

    Questions are cut at a quarter of ``length``, so that a window never has room for the question alone.
    """
    short = tokenizer(list(questions), truncation=True, max_length=length // 4, add_special_tokens=False,
                      return_offsets_mapping=True)["offset_mapping"]
    questions = [q[:spans[-1][1]] if spans else q for q, spans in zip(questions, short)]
    found = tokenizer(questions, list(texts), truncation="only_second", max_length=length, stride=stride,
                      return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True)
    out = []
    for i, pair in enumerate(found["overflow_to_sample_mapping"]):
        inside = np.array([s == 1 for s in found.sequence_ids(i)])
        offsets = np.where(inside[:, None], np.array(found["offset_mapping"][i], dtype=np.int32), -1)
        out.append(Window(pair, np.array(found["input_ids"][i], dtype=np.int32),
                          np.array(found["token_type_ids"][i], dtype=np.int32), offsets[:, 0], offsets[:, 1]))
    return out


def padded(batch: Sequence[Window], pad: int, device) -> tuple[dict[str, Tensor], Tensor]:
    """Windows as a batch: the model's inputs int64 [B, L], and which tokens are of the passage, bool [B, L]."""
    most = max(len(w.ids) for w in batch)
    ids = np.full((len(batch), most), pad)
    mask, types, inside = (np.zeros((len(batch), most), dtype) for dtype in (np.int64, np.int64, bool))
    for row, w in enumerate(batch):
        n = len(w.ids)
        ids[row, :n], mask[row, :n], types[row, :n], inside[row, :n] = w.ids, 1, w.types, w.first >= 0
    named = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
    return {k: torch.from_numpy(v).to(device) for k, v in named.items()}, torch.from_numpy(inside).to(device)


def best_spans(first: Tensor, last: Tensor, inside: Tensor, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best span of each row by logits [B, L]: its first and last token and its score over position 0, each [B].

    ``inside`` [B, L] says where a span may lie; it has 1 to ``span`` tokens. A row without such a token scores -inf.
    """
    null = first[:, 0] + last[:, 0]
    first, last = (logits.masked_fill(~inside, -torch.inf) for logits in (first, last))
    ahead = torch.nn.functional.pad(last, (0, span - 1), value=-torch.inf).unfold(1, span, 1)      # [B, L, span]
    score, place = (first[:, :, None] + ahead).flatten(1).max(1)
    return place // span, place // span + place % span, score - null


def choose(owner: np.ndarray, texts: Sequence[str], spans: np.ndarray, retrieved: np.ndarray, count: int, *,
           weight: float = 0.0, together: bool = False) -> list[str]:
    """One answer for each of ``count`` questions.

    ``owner`` int64 [N] says whose answer each of N texts could be, ``spans`` and ``retrieved`` [N] score them. The
    winner's most likely spelling is given; ``""`` where there is nothing to choose from. Of equals the earlier wins.
    """
    total = spans.astype(np.float64) + weight * retrieved
    group = total
    if together and len(texts):
        _, where = np.unique([f"{q}\n{normalise_nq(text)}" for q, text in zip(owner, texts)], return_inverse=True)
        sums = np.full(where.max() + 1, -np.inf)
        np.logaddexp.at(sums, where, total)
        group = sums[where]
    answers = [""] * count
    order = np.lexsort((-total, -group, owner))
    heads = order[np.unique(owner[order], return_index=True)[1]]
    for i in heads:
        if np.isfinite(total[i]):
            answers[owner[i]] = texts[i]
    return answers


def autocast(device, dtype: str):
    """bf16 where a matrix product gains from it, weights stay float32."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


class SpanReader:
    """``reader(questions, passages, scores) -> answers``, the form :mod:`ecstudy.rag` asks of a reader.

    Parameters
    ----------
    model, tokenizer:
        A transformers model for question answering and its fast tokenizer; :meth:`open` loads both.
    length, stride:
        Tokens of a window, and how many two windows of a long passage share.
    span:
        Tokens of the longest answer.
    weight, together:
        How passages are weighed (:func:`choose`).
    dtype:
        ``bfloat16`` (matrix products only) or ``float32``.
    cache:
        Where spans are kept between calls; None keeps none. In bf16 a score may differ in its last digits with the
        batch that a pair was read in; the cache holds on to the first.

    Raises
    ------
    ValueError
        For an option out of range, or a tokenizer that cannot say where a token comes from.
    """

    def __init__(self, model, tokenizer, *, length: int = 256, stride: int = 64, span: int = 15, weight: float = 0.0,
                 together: bool = False, dtype: str = "bfloat16", device="cpu", identity: str = "",
                 cache: SpanCache | None = None, progress: bool | None = None):
        if not getattr(tokenizer, "is_fast", False) or tokenizer.cls_token_id is None:
            raise ValueError(f"tokenizer {type(tokenizer).__name__}: expected a fast one that puts [CLS] in front")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected {' or '.join(DTYPES)}")
        most = getattr(model.config, "max_position_embeddings", length)
        if not 16 <= length <= most:
            raise ValueError(f"length={length}: expected 16 to {most} tokens, what the model has positions for")
        if not 0 <= stride < length // 2:
            raise ValueError(f"stride={stride}: expected 0 to {length // 2 - 1}, below half of length={length}")
        if span < 1:
            raise ValueError(f"span={span}: expected answers of at least one token")
        if not np.isfinite(weight):
            raise ValueError(f"weight={weight}: expected a finite number")
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        self.length, self.stride, self.span, self.dtype = length, stride, span, dtype
        self.weight, self.together, self.device, self.cache, self.progress = weight, together, device, cache, progress
        self.identity = identity

    @classmethod
    def open(cls, folder, *, cache: bool | str | Path = True, device="cpu", progress: bool | None = None,
             **options) -> SpanReader:
        """A trained reader, or any local folder of a transformers model for question answering.

        ``cache``: True keeps spans in ``runs/rag``, False nowhere, a path there. Other ``options`` as the class has
        them override what training found.

        Raises
        ------
        FileNotFoundError
            If the folder holds no model.
        ValueError
            If the model has no head for spans.
        """
        folder = Path(folder).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no reader (no config.json); train one with "
                                    "`ecstudy rag train-reader`")
        model, tokenizer = load(folder, head=True)
        path = folder / "reader.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found and found.get("format") != FORMAT:
            raise ValueError(f"{path}: format {found.get('format')!r}, expected {FORMAT!r}; train the reader again")
        settings = {**found.get("reading", {}), **options}
        identity = digest_of(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".txt")
                                    or p.name in ("config.json", "tokenizer.json")))
        reader = cls(model, tokenizer, device=device, progress=progress, identity=identity[:16], **settings)
        if cache is True:
            cache = paths.runs() / "rag" / f"spans-{reader.pair_fingerprint}.sqlite"
        reader.cache = SpanCache(cache) if cache else None
        return reader

    @property
    def pair_fingerprint(self) -> str:
        """Tells apart readers that find different spans in a passage."""
        return _digest(self.identity, self.length, self.stride, self.span, self.dtype)

    @property
    def fingerprint(self) -> str:
        """Tells apart readers that give different answers."""
        return _digest(self.pair_fingerprint, self.weight, self.together)

    def __call__(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]], scores) -> list[str]:
        """One answer text per question; see :mod:`ecstudy.rag` for the arguments.

        Raises
        ------
        ValueError
            As :func:`ecstudy.rag.corpus.check_lists` says.
        """
        check_lists(questions, passages, scores)
        counts = np.array([len(p) for p in passages], dtype=np.int64)
        owner = np.repeat(np.arange(len(questions)), counts)
        texts = [p.joined for found in passages for p in found]
        spans = self.spans([questions[i] for i in owner], texts)
        retrieved = [float(s) for row, n in zip(scores, counts) for s in row[:n]]
        answers = [text[a:b] for text, a, b in zip(texts, spans.first, spans.last)]
        return choose(owner, answers, spans.score, np.array(retrieved), len(questions), weight=self.weight,
                      together=self.together)

    def spans(self, questions: Sequence[str], texts: Sequence[str]) -> Spans:
        """The best span of each text for the question beside it. Pairs that were read before are not read again."""
        if len(questions) != len(texts):
            raise ValueError(f"{len(questions)} questions for {len(texts)} texts: expected one each")
        keys = pair_keys(questions, texts)
        known = self.cache.get(list(dict.fromkeys(keys))) if self.cache is not None else {}
        unseen = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in known}.values())[::-1]
        with bar(len(unseen), "reading", self.progress) as step:
            for start in range(0, len(unseen), CHUNK):
                part = unseen[start:start + CHUNK]
                read = self._read([questions[i] for i in part], [texts[i] for i in part])
                names = [keys[i] for i in part]
                if self.cache is not None:
                    self.cache.put(names, *read)
                known.update(zip(names, zip(*(column.tolist() for column in read))))
                step("", len(part))
        columns = zip(*(known[key] for key in keys)) if keys else ((), (), ())
        return Spans(*(np.array(column, dtype) for column, dtype in zip(columns, (np.int64, np.int64, np.float32))))

    def _read(self, questions, texts) -> Spans:
        self.model.eval()
        cut = sorted(windows(self.tokenizer, questions, texts, self.length, self.stride), key=lambda w: len(w.ids))
        first, last = np.zeros((2, len(texts)), np.int64)
        score = np.full(len(texts), -np.inf, np.float32)
        for batch in _batches(cut):
            for w, a, b, value in zip(batch, *(column.tolist() for column in self._forward(batch))):
                if np.isnan(value):
                    raise ValueError(f"the reader scores {texts[w.pair][:60]!r} NaN for {questions[w.pair]!r}: its "
                                     "weights are damaged; train it again")
                if value > score[w.pair]:
                    first[w.pair], last[w.pair], score[w.pair] = w.first[a], w.last[b], value
        return Spans(first, last, score)

    def _forward(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        inputs, inside = padded(batch, self.tokenizer.pad_token_id, self.device)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            found = self.model(**wanted(self.model, inputs))
        return best_spans(found.start_logits.float(), found.end_logits.float(), inside, self.span)


def load(folder, head: bool = False):
    """Model for question answering (float32) and tokenizer of a local folder; an encoder gets a new head, drawn by
    torch's seed, unless ``head`` asks for a trained one."""
    transformers = need("transformers", "rag")
    with quiet(transformers):
        model, told = transformers.AutoModelForQuestionAnswering.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if head and told["missing_keys"]:
        raise ValueError(f"{folder}: expected a trained reader, but the weights lack "
                         f"{sorted(told['missing_keys'])[0]}; train one with `ecstudy rag train-reader`")
    return model, tokenizer


@contextlib.contextmanager
def quiet(transformers):
    """Without the library's bars and its remark that a head is new."""
    log = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def wanted(model, inputs: dict) -> dict:
    """A model without token types (DistilBERT, RoBERTa with one) is not given them."""
    if getattr(model.config, "type_vocab_size", 0) < 2:
        inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    return inputs


def _batches(cut: list[Window]):
    """Windows, shortest first, in batches of at most ``TOKENS`` tokens with their padding."""
    start = 0
    for stop in range(1, len(cut) + 1):
        if stop == len(cut) or (stop + 1 - start) * len(cut[stop].ids) > TOKENS:
            yield cut[start:stop]
            start = stop


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
