"""The one training loop: it advances a method's schedule, evaluates on validation rows and keeps the best state."""
from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.layout import Dataset
from ..extras import MissingExtra, need
from ..measure.auc import auc, checked
from ..method import Method, Step
from .batches import Batches
from .optimizer import Optimizers


@dataclass(frozen=True)
class Settings:
    """How to train: the study's protocol (paper, section 5.1.3; selection on validation rows only).

    ``evals_per_epoch`` evaluations per epoch; a stage stops after ``patience`` of them without improvement (ties count
    as improvement, except at an AUC of one half) or after ``max_epochs``.

    ``schedule`` of the learning rate within a stage: ``constant`` (the study), ``plateau`` (a tenth after every
    ``patience / 2`` evaluations without improvement) or ``cosine`` (to zero at ``max_epochs``). ``select`` is the split
    that stops a stage and picks its best state: ``valid``, or ``test`` to measure what the published tool's default
    adds to the figures it reports.
    """

    lr: float = 0.001
    batch: int = 128
    seed: int = 0
    evals_per_epoch: int = 10
    patience: int = 10
    max_epochs: float = 10.0
    schedule: str = "constant"
    select: str = "valid"


# Settings that came later enter identities only where they differ from their default: those of before stay the same.
LATER = {f.name: f.default for f in fields(Settings) if f.name in ("schedule", "select")}
EVALUATION_BATCH = 8192
CHANCE = 0.5
BETWEEN = "between"                                  # stages: the name of that time beside theirs


class Run:
    """Trains ``emb`` and ``head`` on a data set. ``emb.schedule(run)`` asks it for stages through :meth:`fit`.

    Parameters
    ----------
    progress:
        Called as ``progress(stage=, step=, total=, valid_auc=)`` after every evaluation.
    cache:
        Folder in which warm-ups that several runs share are kept; None keeps none.
    group:
        Processes that run this together (:class:`.distributed.Group`).
    """

    def __init__(self, emb: Method, head: nn.Module, dataset: Dataset, settings: Settings = Settings(), *,
                 device="cpu", progress: Callable | None = None, cache=None, shared_key: dict | None = None,
                 group=None):
        self.emb, self.head, self.dataset, self.settings = emb.to(device), head.to(device), dataset, settings
        self.device, self.progress, self.cache, self.shared_key = device, progress, cache, shared_key
        self.group = group
        self.train = Batches(dataset, "train", settings.batch, device, settings.seed, group)
        self.valid = Batches(dataset, "valid", EVALUATION_BATCH, device)
        self.judge = self.valid if settings.select == "valid" else Batches(dataset, "test", EVALUATION_BATCH, device)
        self._streams: dict[str, Iterator] = {}
        self._share: dict[str, float] = {}
        self.drawn: dict[str, int] = {}              # batches taken of each split
        self.optimizers: Optimizers | None = None
        self.steps = 0
        self.stage_seconds: dict[str, float] = {}
        self._told = 0.0                             # of the time since the beginning, seconds known by stage
        self.training_bytes = 0
        self.best = float("nan")

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train)

    # --- the loop -----------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Train to the end of the method's schedule.

        ``stage_seconds`` gains what a schedule does between its stages (an evolutionary search, say): ``between``.
        """
        torch.manual_seed(self.settings.seed)
        started = time.perf_counter()
        for step in self.emb.schedule(self):
            self.execute(step)
        self.stage_seconds[BETWEEN] = max(0.0, time.perf_counter() - started - self._told)

    def batch(self, split: str):
        if split not in self._streams:
            # the search draws validation rows in its own order, independent of the training stream
            source = self.train if split == "train" else Batches(
                self.dataset, split, self.settings.batch, self.device, self.settings.seed + 1, self.group)
            self._share[split] = source.share
            self._streams[split] = source.epochs(skip=self.drawn.get(split, 0))
        self.drawn[split] = self.drawn.get(split, 0) + 1
        return next(self._streams[split])

    def execute(self, step: Step) -> None:
        """One update."""
        if not step.again:
            self._last, self._split = self.batch(step.split), step.split
        ids, dense, label = self._last
        self.optimizers.zero_grad()
        logit = self.head(self.emb(ids), dense, ids)
        self._logit, loss = logit.detach(), F.binary_cross_entropy_with_logits(logit, label)
        if step.penalty is not None:
            loss = loss + step.penalty()
        if self.group is not None:                   # so that the gradients of all processes add up
            loss = loss * self._share[self._split]
        if callable(step.update):
            gradients = torch.autograd.grad(loss, list(step.wrt() if callable(step.wrt) else step.wrt))
            step.update(gradients if self.group is None else self.group.sum(gradients))
        elif step.update == "emb":
            loss.backward(inputs=self.optimizers.embedding_leaves())
            self.optimizers.step("emb")
        else:
            loss.backward()
            self.optimizers.step()
        self.steps += not step.again                 # a second look at a batch belongs to the same step

    def losses(self) -> Tensor:
        """Loss of each row of the last batch [B], without gradients: what a policy is rewarded by."""
        return F.binary_cross_entropy_with_logits(self._logit, self._last[2], reduction="none")

    def fit(self, stage: str, *, ready: Callable[[], bool] | None = None, fresh: bool = True,
            carry: bool = False, shared: str | None = None, until: Callable[[], bool] | None = None) -> Iterator[Step]:
        """Yield training steps until validation stops improving, then restore the best state.

        Parameters
        ----------
        stage: its name in the row and on the method's page.
        ready: early stopping and snapshots count only once this holds (progressive pruning needs it).
        fresh: begin with a fresh optimiser; otherwise go on with the previous stage's.
        carry: restore the optimiser's state with the best weights, for a next stage with ``fresh=False``.
        shared: a label; stages of the same label, data, model, dimension, seed and settings are trained once and
            reused by all budgets (their recorded seconds count). ``"full"`` is the plain training of a full table,
            common to all methods that begin with it; other labels name the method, its options and the stage.
        until: the stage ends after the step at which this holds, as it stands then: validation is not asked.
        """
        carry = carry or shared == "full"            # whoever reuses the stage may go on with its optimiser
        if fresh:
            self.optimizers = Optimizers(self.emb, self.head, self.settings.lr, self.group)
        self.optimizers.rate(self.settings.lr)               # a stage begins anew with its schedule
        started, first = time.perf_counter(), self.steps
        if shared and self._reuse(stage, shared):
            self._told += time.perf_counter() - started      # it counts with the seconds of its training
            return
        every = max(1, self.steps_per_epoch // self.settings.evals_per_epoch)
        total = max(1, round(self.steps_per_epoch * self.settings.max_epochs))
        best, state, waited, step = -1.0, None, 0, 0
        if self.steps and until is None and (ready is None or ready()):  # a later stage never ends worse than it began
            best, state = self.evaluate(self.judge), self._snapshot(carry)
        self._training()
        while True:
            yield Step(stage=stage)
            step += 1
            if self.settings.schedule == "cosine":
                self.optimizers.rate(self.settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))
            if until is not None:
                if until():
                    best = self.best
                    break
                continue
            if step % every and step < total:
                continue
            counts = ready is None or ready()
            if counts:
                value = self.evaluate(self.judge)
                if value > best or value == best != CHANCE:      # a dead network repeats one half for ever
                    best, waited, state = value, 0, self._snapshot(carry)
                else:
                    waited += 1
                    if self.settings.schedule == "plateau" and waited % max(1, self.settings.patience // 2) == 0:
                        self.optimizers.rate(self.optimizers.lr / 10)
                self._training()
                if self.progress:
                    self.progress(stage=stage, step=step, total=total, valid_auc=value)
            # a stage that never became ready goes on past max_epochs until it is
            if counts and (waited >= self.settings.patience or step >= total):
                break
        if until is None:
            self._restore(state)
        elif shared:
            state = self._snapshot(carry)
        self.training_bytes = max(self.training_bytes, self.emb.training_bytes())
        self.best = best
        self.stage_seconds[stage] = time.perf_counter() - started
        if shared:
            self._keep(shared, state, self.steps - first, self.stage_seconds[stage], carry)
        self._told += time.perf_counter() - started

    def _training(self) -> None:
        self.emb.train()
        self.head.train()

    # --- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Labels [N] and logits [N] of all rows of a split, on the CPU; Diverged if any is not finite."""
        self.emb.eval()
        self.head.eval()
        labels, logits = [], []
        mine = (self.group.rank, self.group.count) if self.group is not None else ()
        for ids, dense, label in batches.once(*mine):
            labels.append(label)
            logits.append(self.head(self.emb(ids), dense, ids))
        if self.group is not None:                   # the same numbers everywhere: all decide alike when to stop
            label, logit = (part.cpu() for part in self.group.whole(batches, labels, logits))
        else:
            label, logit = torch.cat(labels).cpu(), torch.cat(logits).float().cpu()
        checked(label, logit)
        return label, logit

    def score(self) -> float:
        """Validation AUC of the present state, from within a schedule (evolutionary searches)."""
        value = self.evaluate(self.judge)
        self._training()
        return value

    def evaluate(self, batches: Batches) -> float:
        """AUC of what would ship now."""
        self.emb.before_evaluation()
        return auc(*self.logits(batches))

    # --- the best state -----------------------------------------------------------------------------------------

    def _snapshot(self, carry: bool) -> dict[str, Tensor]:
        parts = {"emb": self.emb.state_dict(), "head": self.head.state_dict()}
        if carry:
            parts["opt"] = self.optimizers.state()
        return {f"{part}.{name}": tensor.detach().clone() for part, state in parts.items()
                for name, tensor in state.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        def part(name):
            return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

        # the common warm-up holds no auxiliary state: it stays as the method began it
        missing, unexpected = self.emb.load_state_dict(part("emb"), strict=False)
        if unexpected or any("aux." not in name for name in missing):
            raise RuntimeError(f"snapshot does not fit the method: missing {missing}, unexpected {unexpected}")
        self.head.load_state_dict(part("head"))
        if optimizer := part("opt"):
            self.optimizers.restore(optimizer)

    # --- warm-ups that several budgets share --------------------------------------------------------------------

    def _shared_file(self, label: str):
        if self.cache is None or self.shared_key is None:
            return None
        try:
            need("safetensors", "save")
        except MissingExtra:                         # sharing only saves time: without the library train again
            return None
        settings = {k: v for k, v in asdict(self.settings).items() if k not in LATER or v != LATER[k]}
        key = dict(label=label, data=self.dataset.fingerprint, settings=settings, **self.shared_key)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return Path(self.cache) / f"{digest}.safetensors"

    def _reuse(self, stage: str, label: str) -> bool:
        path = self._shared_file(label)
        there = path is not None and path.is_file()
        if not (there if self.group is None else self.group.all(there)):
            return False
        with need("safetensors", "save").safe_open(str(path), "pt", device=str(self.device)) as file:
            meta = json.loads(file.metadata()["run"])
            state = {name: file.get_tensor(name) for name in file.keys()}
        shapes = {f"{part}.{name}": tensor.shape for part, module in (("emb", self.emb), ("head", self.head))
                  for name, tensor in module.state_dict().items()}
        stale = any(shapes.get(name, tensor.shape) != tensor.shape for name, tensor in state.items())
        if stale if self.group is None else not self.group.all(not stale):   # another version of the method wrote it
            return False
        self._restore(state)
        self.steps += meta["steps"]
        self.stage_seconds[stage], self.best = meta["seconds"], meta["best"]
        self.drawn, self._streams = meta["drawn"], {}                  # go on where the reused stage ended
        self.training_bytes = max(self.training_bytes, self.emb.training_bytes())
        return True

    def _keep(self, label: str, state, steps: int, seconds: float, carry: bool) -> None:
        path = self._shared_file(label)
        if path is None or self.group is not None and self.group.rank:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        kept = {k: v.cpu().contiguous() for k, v in state.items() if label != "full" or not k.startswith("emb.aux.")}
        meta = dict(steps=steps, seconds=seconds, best=self.best, drawn=self.drawn)
        need("safetensors.torch", "save").save_file(kept, temporary, metadata={"run": json.dumps(meta)})
        os.replace(temporary, path)
