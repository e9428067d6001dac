"""Training of the extractive reader on a corpus' training questions; the test ones are opened once, at the end.

An example is a question with a gold passage. Where the answer stands is not told, only what it is: every place that
spells one of the answers counts, and the loss is minus the log of the probability of all of them together (first and
last token each; Clark and Gardner 2018 call it the summed objective). Some examples are negative: a passage that
retrieval ranks high and that holds no answer, whose target is position 0. They make scores of different passages
comparable, which reading ten at once needs. Questions for training of which no gold passage is known (DPR's files) are
used with the nearest passage that spells an answer.

Split: questions of ``split == "train"`` only; a twentieth of their articles is kept apart (:func:`split`) to watch
training and to set how passages are weighed. No gold passage of a question of the test or kept apart is trained on, not
even as a negative.

The order of examples and dropout follow from seed and step alone, so a run that was killed goes on from its last
checkpoint to the same weights. Embeddings and the first layer stay frozen: most of the parameters, little of the
accuracy, and the backward pass is shorter. Matrix products in bf16, weights and optimiser in float32.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch

from .. import __version__
from ..data.layout import DataError
from ..extras import need
from ..study.progress import bar, duration
from .corpus import Corpus, Passage, Question, digest_of
from .encode import minilm
from .reader import (DTYPES, FORMAT, SpanReader, Window, autocast, choose, load, padded, quiet, wanted,
                     windows)
from .score import exact, f1, has_answer, rule
from .search import search

POOL = 64                             # batches whose examples are sorted by length together: little padding
KEPT_APART = 20                       # one article in so many is not trained on
NEARBY = 20                           # passages among which negatives are looked for
CANDIDATES = 5                        # negatives of a question at most
DISTANT = 5                           # among so many nearest passages one that spells the answer is taken for gold
WEIGHTS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
WATCHED = 300                         # questions kept apart that are really read: about ten seconds


@dataclass(frozen=True)
class Training:
    """How a reader is trained. A core with bf16 instructions trained on 10 examples (160 tokens) a second and read 29.

    ``frozen`` counts the encoder layers that stay as they are, embeddings always; ``negatives`` is a share of the
    examples; ``distant`` adds training questions without a gold passage, with the nearest one that spells the answer
    (needs vectors); ``limit`` takes so many questions at random (all: None). ``base`` is a folder with a transformers
    encoder, None the packaged MiniLM.
    """

    base: str | None = None
    epochs: int = 4
    batch: int = 16
    lr: float = 2e-4
    warmup: float = 0.05
    decay: float = 0.01
    dropout: float = 0.1
    frozen: int = 1
    negatives: float = 0.25
    distant: bool = True
    seed: int = 0
    limit: int | None = None
    length: int = 256
    stride: int = 64
    span: int = 15
    dtype: str = "bfloat16"

    def __post_init__(self):
        whole = dict(epochs=1, batch=1, frozen=0, seed=0, span=1)
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: expected at least one question, or None for all")
        for name, most in dict(lr=1.0, warmup=1.0, decay=1.0, dropout=1.0, negatives=1.0).items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected 0 to {most:g}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected {' or '.join(DTYPES)}")


class Example(NamedTuple):
    """A question's windows with the tokens that begin (``starts``) and end (``ends``) an answer, as arrays."""

    windows: list[Window]
    starts: list[np.ndarray]
    ends: list[np.ndarray]


def split(corpus: Corpus) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions with gold passages: to train on, kept apart, and of the test.

    Kept apart is one in ``KEPT_APART`` of the training articles, at least one of each group, by a hash of their names.

    Raises
    ------
    DataError
        If one of the three is empty, or an article or a gold passage is in both splits.
    """
    asked = [q for q in corpus.asked if q.gold]
    train, test = ([q for q in asked if q.split == name] for name in ("train", "test"))
    if both := {i for q in train for i in q.gold} & {i for q in test for i in q.gold}:
        raise DataError(f"{corpus.folder}: passage {min(both)} is gold of training and of test questions; expected a "
                        "split by article, so prepare the corpus again")
    if both := {q.article for q in train if q.article} & {q.article for q in test}:
        raise DataError(f"{corpus.folder}: article {min(both)!r} is in both splits; prepare the corpus again")
    groups: dict[str, set[str]] = {}
    for q in train:
        groups.setdefault(q.group, set()).add(_topic(q))
    aside = {topic for topics in groups.values()
             for topic in sorted(topics, key=_hash)[:math.ceil(len(topics) / KEPT_APART)]}
    apart, fit = ([q for q in train if (_topic(q) in aside) == which] for which in (True, False))
    for name, part in (("to train on", fit), ("kept apart from training", apart), ("of the test", test)):
        if not part:
            raise DataError(f"{corpus.folder} has no questions with gold passages {name}: expected some of several "
                            "articles in both splits")
    return fit, apart, test


def _topic(q: Question) -> str:
    return q.article or q.question


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def places(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Where ``text`` spells one of the answers as whole words, as (first character, one past the last).

    Upper and lower case and white space do not matter (``5 , 2018`` is found in ``5, 2018``).
    """
    found = set()
    for answer in answers:
        parts = [re.escape(part) for part in re.findall(r"\w+|[^\w\s]", answer)]
        if parts:
            pattern = r"(?<!\w)" * answer.strip()[0].isalnum() + r"\s*".join(parts) + r"(?!\w)"
            found |= {m.span() for m in re.finditer(pattern, text, flags=re.IGNORECASE)}
    return sorted(found)


def targets(window: Window, spans: Sequence[tuple[int, int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last tokens of the spans that lie in a window whole and have at most ``longest`` tokens."""
    inside = np.flatnonzero(window.first >= 0)
    first, last = window.first[inside], window.last[inside]
    spans = np.array([s for s in spans if len(first) and s[0] >= first[0] and s[1] <= last[-1]], dtype=np.int64)
    if not len(spans):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    start = np.searchsorted(first, spans[:, 0], "right") - 1
    end = np.searchsorted(last, spans[:, 1], "left")
    fits = end - start < longest
    return np.unique(inside[start[fits]]), np.unique(inside[end[fits]])


def positives(reader: SpanReader, corpus: Corpus, questions: Sequence[Question]) -> tuple[list, list[Example]]:
    """Pairs of a question and one of its gold passages that spell an answer: who asked, and the example."""
    owners = [q for q in questions for _ in q.gold]
    texts = [p.joined for p in corpus.passages([i for q in questions for i in q.gold])]
    found: dict[int, Example] = {}
    for w in windows(reader.tokenizer, [q.question for q in owners], texts, reader.length, reader.stride):
        starts, ends = targets(w, places(texts[w.pair], owners[w.pair].answers), reader.span)
        if len(starts):
            for part, value in zip(found.setdefault(w.pair, Example([], [], [])), (w, starts, ends)):
                part.append(value)
    return [owners[i] for i in found], list(found.values())


def nearby(corpus: Corpus, questions: Sequence[Question], k: int = NEARBY, progress=None) -> dict[int, list[int]]:
    """Ids of the ``k`` passages nearest to each question, best first: question id -> passage ids."""
    unique = list({q.id: q for q in questions}.values())
    before = 0
    with bar(len(corpus), "searching", progress) as step:

        def report(done, _):
            nonlocal before
            step("", done - before)
            before = done
        ids = search(corpus.vectors, corpus.question_vectors[[q.id for q in unique]], min(k, len(corpus)),
                     progress=report).ids
    return {q.id: row for q, row in zip(unique, ids.tolist())}


def distant(corpus: Corpus, near: dict[int, list[int]], forbidden: set[int]) -> list[Question]:
    """Training questions whose passage nobody knows, with the nearest one of ``near`` that spells an answer as gold.

    Questions without such a passage are left out. ``forbidden``: ids that may not be trained on.
    """
    asked = [q for q in corpus.asked if q.split == "train" and q.gold is None and q.id in near]
    texts = _texts(corpus, near, forbidden)
    found = []
    for q in asked:
        gold = next((i for i in near[q.id] if i in texts and has_answer(texts[i].joined, q.answers)), None)
        if gold is not None:
            found.append(q._replace(gold=(gold,)))
    return found


def negatives(corpus: Corpus, questions: Sequence[Question], near: dict[int, list[int]],
              forbidden: set[int]) -> dict[int, list[Passage]]:
    """Passages of ``near`` that hold no answer: question id -> ``CANDIDATES`` at most, best first."""
    texts = _texts(corpus, near, forbidden)
    found = {}
    for q in questions:
        if q.id not in found:
            mine = (texts[i] for i in near[q.id] if i in texts and i not in q.gold)
            found[q.id] = list(islice((p for p in mine if not has_answer(p.joined, q.answers)), CANDIDATES))
    return found


def alike(corpus: Corpus, questions: Sequence[Question]) -> dict[int, list[int]]:
    """In place of :func:`nearby` without vectors: gold passages of the same title, then those that follow."""
    gold = sorted({i for q in questions for i in q.gold})
    title = {p.id: p.title for p in corpus.passages(gold)}
    same: dict[str, list[int]] = {}
    for i in gold:
        same.setdefault(title[i], []).append(i)
    place = {i: at for at, i in enumerate(gold)}
    return {q.id: [*same[title[q.gold[0]]], *gold[place[q.gold[0]] + 1:]][:NEARBY] for q in questions}


def _texts(corpus: Corpus, near: dict[int, list[int]], forbidden: set[int]) -> dict[int, Passage]:
    wanted = sorted({i for row in near.values() for i in row} - forbidden)
    return dict(zip(wanted, corpus.passages(wanted)))


class Material:
    """Everything an epoch is drawn from."""

    def __init__(self, reader: SpanReader, corpus: Corpus, settings: Training, progress=None):
        fit, self.apart, self.test = split(corpus)
        forbidden = {i for q in [*self.test, *self.apart] for i in q.gold}
        near = {}
        if (corpus.folder / "vectors.json").is_file():
            unknown = [q for q in corpus.asked if q.split == "train" and q.gold is None] if settings.distant else []
            near = nearby(corpus, [*fit, *unknown], progress=progress)
            fit = fit + distant(corpus, {q.id: near[q.id][:DISTANT] for q in unknown}, forbidden)
        self.given = len(fit)
        if settings.limit is not None and settings.limit < len(fit):
            chosen = np.random.default_rng(settings.seed).choice(len(fit), settings.limit, replace=False)
            fit = [fit[i] for i in sorted(chosen.tolist())]
        self.reader, self.settings = reader, settings
        self.owners, self.examples = positives(reader, corpus, fit)
        if not self.examples:
            raise DataError(f"{corpus.folder}: none of {len(fit)} training questions has an answer of at most "
                            f"{settings.span} tokens in its gold passage; expected passages that spell the answers")
        self.questions, self.answered = len(fit), len({q.id for q in self.owners})
        self.distant = len({q.id for q in self.owners if corpus.asked[q.id].gold is None})
        self.near = negatives(corpus, self.owners, near or alike(corpus, self.owners), forbidden) \
            if settings.negatives else {}
        self.able = np.array([i for i, q in enumerate(self.owners) if self.near.get(q.id)], dtype=np.int64)
        self.count = min(round(len(self.examples) * settings.negatives), len(self.able))
        self.per_epoch = math.ceil((len(self.examples) + self.count) / settings.batch)

    def epoch(self, number: int) -> list[list[tuple]]:
        """Batches of (window, starts, ends), the same for the same seed and number."""
        draw = np.random.default_rng([self.settings.seed, number])
        chosen = []
        for example in self.examples:
            i = int(draw.integers(len(example.windows)))
            chosen.append((example.windows[i], example.starts[i], example.ends[i]))
        if self.count:
            owners = [self.owners[i] for i in draw.choice(self.able, self.count, replace=False)]
            near = [self.near[q.id] for q in owners]
            texts = [p[int(draw.integers(len(p)))].joined for p in near]
            null, seen = np.zeros(1, np.int64), set()
            for w in windows(self.reader.tokenizer, [q.question for q in owners], texts, self.reader.length,
                             self.reader.stride):
                if w.pair not in seen:                              # the first window of a passage stands for it
                    seen.add(w.pair)
                    chosen.append((w, null, null))
        order = draw.permutation(len(chosen))
        batch, batches = self.settings.batch, []
        for start in range(0, len(order), POOL * batch):
            pool = sorted(order[start:start + POOL * batch].tolist(), key=lambda i: len(chosen[i][0].ids))
            batches += [pool[i:i + batch] for i in range(0, len(pool), batch)]
        return [[chosen[i] for i in batches[b]] for b in draw.permutation(len(batches))]


def loss_of(first, last, inside, batch) -> torch.Tensor:
    """Minus the log-probability of all right first tokens and of all right last ones, mean over the batch.

    ``first``, ``last`` are logits [B, L]; besides tokens of the passage only position 0 may be chosen.
    """
    allowed = inside.clone()
    allowed[:, 0] = True
    total = 0.0
    for logits, which in ((first, 1), (last, 2)):
        right = torch.zeros_like(inside)
        rows = np.repeat(np.arange(len(batch)), [len(item[which]) for item in batch])
        right[torch.from_numpy(rows), torch.from_numpy(np.concatenate([item[which] for item in batch]))] = True
        logits = logits.float().masked_fill(~allowed, -torch.inf)
        total = total + (logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)).mean()
    return total / 2


def rate(settings: Training, step: int, steps: int) -> float:
    """Learning rate of a step: up over the first ``warmup`` of them, then down to zero, both straight."""
    rise = max(1, round(settings.warmup * steps))
    return settings.lr * min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))


@dataclass
class State:
    """Where training stands: steps done, seconds spent; of each epoch the mean loss and what :meth:`Trainer.watched`
    questions scored; the sum and count of losses of the epoch that runs."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    watched: list[dict] = field(default_factory=list)
    running: list[float] = field(default_factory=lambda: [0.0, 0])


class Trainer:
    """One run: model, optimiser, material and checkpoint.

    Raises
    ------
    ValueError
        If a checkpoint is there of other settings or another corpus.
    """

    def __init__(self, corpus: Corpus, settings: Training, checkpoint: Path, device="cpu", progress=None):
        self.corpus, self.settings, self.checkpoint, self.device = corpus, settings, checkpoint, device
        self.progress = progress
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)                       # draws the head
            model, tokenizer = load(settings.base or minilm())
        self.reader = SpanReader(model, tokenizer, length=settings.length, stride=settings.stride, span=settings.span,
                                 dtype=settings.dtype, device=device, progress=False)
        _freeze(model, settings.frozen)
        _dropout(model, settings.dropout)
        self.moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.material = Material(self.reader, corpus, settings, progress)
        self.steps = settings.epochs * self.material.per_epoch
        self.optimizer = torch.optim.AdamW(self.moving.values(), lr=settings.lr, weight_decay=settings.decay)
        self.state = State()
        self.key = _key(settings, corpus)
        if checkpoint.is_file():
            self._resume()

    def run(self, every: float = 300.0, stop_after: int | None = None) -> bool:
        """Train on, with a checkpoint every so many seconds; True once all steps are done."""
        state, model = self.state, self.reader.model
        most = self.steps if stop_after is None else min(self.steps, state.step + stop_after)
        begun, before, first, saved = time.monotonic(), state.seconds, state.step, time.monotonic()
        epoch, batches = -1, []
        with bar(self.steps, "training the reader", self.progress) as step, torch.random.fork_rng():
            if state.step:
                step("from a checkpoint", state.step)
            shown = state.step
            while state.step < most:
                if epoch != state.step // self.material.per_epoch:
                    epoch = state.step // self.material.per_epoch
                    batches = self.material.epoch(epoch)
                model.train()
                value = self._step(batches[state.step % self.material.per_epoch])
                state.step += 1
                state.running = [state.running[0] + value, state.running[1] + 1]
                state.seconds = before + time.monotonic() - begun
                if state.step % self.material.per_epoch == 0:
                    state.losses.append(state.running[0] / state.running[1])
                    state.running = [0.0, 0]
                    state.watched.append(gold_scores(self.reader, self.corpus, self.watched()))
                if state.step % 20 == 0 or state.step == most:
                    left = (time.monotonic() - begun) / (state.step - first) * (self.steps - state.step)
                    step(f"loss {value:.2f}, {duration(left)} left", state.step - shown)
                    shown = state.step
                if time.monotonic() - saved > every:
                    self._save()
                    saved = time.monotonic()
        model.eval()
        if state.step < self.steps:
            self._save()
        return state.step == self.steps

    def watched(self) -> list[Question]:
        return _some(self.material.apart, WATCHED)

    def _step(self, batch) -> float:
        torch.manual_seed(self.settings.seed * 1_000_003 + self.state.step)        # dropout of this step
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.settings, self.state.step, self.steps)
        inputs, inside = padded([item[0] for item in batch], self.reader.tokenizer.pad_token_id, self.device)
        with autocast(self.device, self.settings.dtype):
            found = self.reader.model(**wanted(self.reader.model, inputs))
        loss = loss_of(found.start_logits, found.end_logits, inside, batch)
        if not math.isfinite(value := loss.item()):
            raise ArithmeticError(f"the loss is {value} at step {self.state.step}: train with a smaller lr "
                                  f"(now {self.settings.lr}) or dtype float32")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.moving.values(), 1.0)
        self.optimizer.step()
        return value

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Weights that move, the optimiser's moments and where training stands, in one file, whole or not there."""
        tensors = {}
        for name, parameter in self.moving.items():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        meta = json.dumps(dict(key=self.key, state=asdict(self.state)))
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}.tmp")
        need("safetensors.torch", "save").save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary,
                                                    metadata={"training": meta})
        os.replace(temporary, self.checkpoint)

    def _resume(self) -> None:
        with need("safetensors", "save").safe_open(str(self.checkpoint), "pt", device=str(self.device)) as file:
            meta = json.loads(file.metadata()["training"])
            if differ := [name for name, value in self.key.items() if meta["key"].get(name) != value]:
                name = differ[0]
                raise ValueError(f"{self.checkpoint} was begun with {name}={meta['key'].get(name)!r}, asked for is "
                                 f"{self.key[name]!r}; finish it, or begin anew with restart=True (--restart)")
            self.state = State(**meta["state"])
            with torch.no_grad():
                for name, parameter in self.moving.items():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    self.optimizer.state[parameter] = dict(
                        step=torch.tensor(float(self.state.step)), exp_avg=file.get_tensor(f"exp_avg.{name}"),
                        exp_avg_sq=file.get_tensor(f"exp_avg_sq.{name}"))


def train(corpus: Corpus | str | Path, out: str | Path, settings: Training = Training(), *, device="cpu",
          every: float = 300.0, restart: bool = False, evaluate: bool = True, stop_after: int | None = None,
          progress: bool | None = None) -> dict | None:
    """Train a reader and write it to the folder ``out``: weights (safetensors), tokenizer and ``reader.json``.

    A killed run goes on when called again with the same settings; a finished one is left as it is.

    Parameters
    ----------
    corpus:
        A prepared corpus, its name or folder. With vectors, negatives come from retrieval and the weight of the
        retrieval score is set; without, negatives are of the same title and the weight is 0.
    every:
        Seconds between two checkpoints, kept in ``<out>.part``.
    restart:
        Drop a checkpoint or a finished reader and begin anew.
    evaluate:
        Read the gold passages of all test questions at the end.
    stop_after:
        Steps of this call at most, to be continued.

    Returns
    -------
    What ``reader.json`` says: settings, what was trained on, seconds, scores; None if steps are left to do.

    Raises
    ------
    DataError
        If the corpus has no questions to train on, or its split is not by article.
    ValueError
        For a setting out of range, or if ``out`` or its checkpoint is of other settings.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    out = Path(out).expanduser()
    part = out.with_name(out.name + ".part")
    if restart:
        shutil.rmtree(part, ignore_errors=True)
    elif out.exists():
        return _finished(out, _key(settings, corpus))
    trainer = Trainer(corpus, settings, part / "checkpoint.safetensors", device, progress)
    if not trainer.run(every, stop_after):
        return None
    reader, material, state = trainer.reader, trainer.material, trainer.state
    reader.progress = progress
    found = dict(format=FORMAT, version=__version__, reading=dict(length=reader.length, stride=reader.stride,
                                                                  span=reader.span, dtype=reader.dtype),
                 key=trainer.key, steps=state.step, seconds=round(state.seconds, 1), loss=state.losses,
                 trained=dict(questions=material.questions, answered=material.answered, distant=material.distant,
                              examples=len(material.examples),
                              negatives=material.count, kept_apart=len(material.apart), of=material.given),
                 kept_apart=state.watched)
    if (corpus.folder / "vectors.json").is_file():
        found["weighing"] = calibrate(reader, corpus, trainer.watched())
        found["reading"].update(weight=reader.weight, together=reader.together)
    if evaluate:
        found["test"] = gold_scores(reader, corpus, material.test)
    _write(out, reader, found)
    shutil.rmtree(part, ignore_errors=True)
    return found


def gold_scores(reader: SpanReader, corpus: Corpus, questions: Sequence[Question]) -> dict[str, dict]:
    """Reading alone, gold passages given: by group ``n``, ``em`` and ``f1`` in percent, the official way."""
    passages = _passages(corpus, [q.gold for q in questions])
    answers = reader([q.question for q in questions], passages, [np.zeros(len(p), np.float32) for p in passages])
    return scores_of(questions, answers)


def scores_of(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict]:
    """By group of questions: how many, exact match and F1 in percent."""
    rows: dict[str, list] = {}
    for q, answer in zip(questions, answers):
        how = rule(q.group)
        rows.setdefault(q.group, []).append((exact(answer, q.answers, how), f1(answer, q.answers, how)))
    return {group: dict(n=len(found), **dict(zip(("em", "f1"), (100 * np.mean(found, 0)).round(2).tolist())))
            for group, found in sorted(rows.items())}


def calibrate(reader: SpanReader, corpus: Corpus, questions: Sequence[Question], k: int = 10) -> list[dict]:
    """Set ``weight`` and ``together`` of a reader by its exact match over the ``k`` passages that plain vectors find.

    Returns all that was tried: weight, together, em. Of equals the simpler is taken (answers apart, smaller weight).
    """
    hits = search(corpus.vectors, corpus.question_vectors[[q.id for q in questions]], min(k, len(corpus)))
    passages, asked = _passages(corpus, hits.ids.tolist()), [q.question for q in questions]
    owner = np.repeat(np.arange(len(asked)), hits.ids.shape[1])
    texts = [p.joined for found in passages for p in found]
    spans = reader.spans([asked[i] for i in owner], texts)
    answers = [text[a:b] for text, a, b in zip(texts, spans.first, spans.last)]
    tried = []
    for together in (False, True):
        for weight in WEIGHTS:
            found = scores_of(questions, choose(owner, answers, spans.score, hits.scores.ravel(), len(asked),
                                                weight=weight, together=together))
            right = sum(row["n"] * row["em"] for row in found.values()) / len(questions)
            tried.append(dict(weight=weight, together=together, em=round(right, 2)))
    best = max(tried, key=lambda row: row["em"])
    reader.weight, reader.together = best["weight"], best["together"]
    return tried


def _passages(corpus: Corpus, ids: Sequence[Sequence[int]]) -> list[list[Passage]]:
    """Passages of each list of ids; one found several times is read once."""
    wanted = sorted({i for row in ids for i in row})
    known = dict(zip(wanted, corpus.passages(wanted)))
    return [[known[i] for i in row] for row in ids]


def _some(questions: list[Question], most: int) -> list[Question]:
    if len(questions) <= most:
        return questions
    return [questions[i] for i in sorted(np.random.default_rng(0).choice(len(questions), most, replace=False).tolist())]


def _freeze(model, layers: int) -> None:
    """Leave embeddings and the first layers of an encoder as they are."""
    base = model.base_model
    stack = next((part.layer for name in ("encoder", "transformer")
                  if hasattr(part := getattr(base, name, None), "layer")), None)
    if stack is None or not hasattr(base, "embeddings"):
        raise ValueError(f"{type(base).__name__}: expected an encoder with embeddings and a list of layers, as BERT")
    if layers > len(stack):
        raise ValueError(f"frozen={layers}: expected at most {len(stack)}, the layers of {type(base).__name__}")
    for part in (base.embeddings, *stack[:layers]):
        part.requires_grad_(False)


def _dropout(model, share: float) -> None:
    """Of states, not of attention: with it the fused attention of CPUs is not taken (a quarter of the time)."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0 if "attention." in name and "output" not in name else share


def _key(settings: Training, corpus: Corpus) -> dict:
    """What a checkpoint and a finished reader must agree on; the base counts by its weights, not by its place."""
    base = digest_of(sorted(Path(settings.base or minilm()).expanduser().glob("*.safetensors")))
    vectors = corpus.encoding["fingerprint"] if (corpus.folder / "vectors.json").is_file() else None
    return asdict(settings) | dict(base=base[:16], corpus=corpus.fingerprint, vectors=vectors)


def _finished(out: Path, key: dict) -> dict:
    path = out / "reader.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    differ = next((name for name, value in key.items() if found.get("key", {}).get(name, found) != value), None)
    if differ:
        raise ValueError(f"{out} exists and was trained with another {differ}; choose another folder, or begin anew "
                         "with restart=True (--restart)")
    return found


def _write(out: Path, reader: SpanReader, found: dict) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    transformers = need("transformers", "rag")
    with quiet(transformers):
        reader.model.save_pretrained(temporary)
        reader.tokenizer.save_pretrained(temporary)
    (temporary / "reader.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)
