"""One pass over the rows in the order they came, each batch predicted before it is trained on."""
from __future__ import annotations

import contextlib
import math
import time
from typing import Callable, Iterator

import numpy as np
import torch

from ..measure import auc, logloss, normalised_entropy
from ..measure.auc import checked
from ..method import Step
from .optimizer import Optimizers
from .run import BETWEEN, Run, Settings


class ManyStages(RuntimeError):
    """A method of several stages was given a stream; the message names it."""


def one_stage(method: str, stage: str = "") -> str:
    """What a method of several stages is told."""
    return (f"{method} trains in several stages{f', {stage!r} after the first' if stage else ''}: a single pass over a "
            "stream has one stage; methods that train in place (full, hash_trick, fiited) can be used")


class Stream(Run):
    """Trains on the training rows once, in file order, which is that of time, and predicts every row before it.

    A batch is predicted when it is fetched, in evaluation mode, by the module as it stands then: those ``logit``
    float32 [N] are progressive (prequential) validation. Nothing stops early, and no state is restored. A schedule that
    asks for validation rows gets the batch that comes next: predicted at that moment, and trained on in the next step
    (Liu et al., SIGIR 2020). At the end of the stream, where none comes, such a step is left out.

    Parameters
    ----------
    windows:
        Parts of about equal length into which ``trace`` divides the stream.
    progress:
        Called as ``progress(stage=, step=, total=, valid_auc=)`` at the end of every window, with its AUC.

    Attributes
    ----------
    trace:
        A dict for each window: ``examples`` trained on so far; ``auc``, ``ne`` and ``logloss`` of the window's rows, as
        predicted; ``training_bytes``; ``seconds`` of training so far, predictions not counted; ``per_second``, examples
        a second in the window; and for a method that counts what it keeps, ``kept``: chunks [F, k] as lists.
    """

    def __init__(self, emb, head, dataset, settings: Settings = Settings(), *, windows: int = 20, device="cpu",
                 progress: Callable | None = None):
        super().__init__(emb, head, dataset, settings, device=device, progress=progress)
        if windows < 1:
            raise ValueError(f"windows={windows}: expected at least 1")
        self.rows = self.train.rows
        self.windows = min(windows, -(-self.rows // self.train.batch))
        self.logit = np.full(self.rows, np.nan, np.float32)
        self.trace: list[dict] = []
        self.predicted = self.seen = 0                   # rows
        self.seconds, self._since = 0.0, 0.0
        self._coming, self._next = self.train.once(), None

    def go(self) -> None:
        """Read the stream to its end. ``stage_seconds`` has its one stage; what is beside it is prediction."""
        super().go()
        del self.stage_seconds[BETWEEN]

    def fit(self, stage: str, *, ready=None, fresh=True, carry=False, shared=None, until=None) -> Iterator[Step]:
        """Yield training steps until the pass is over; what else :meth:`Run.fit` takes is of no meaning here.

        Raises
        ------
        ManyStages
            When called a second time.
        """
        if self.optimizers is not None:
            raise ManyStages(one_stage(type(self.emb).__module__.rpartition(".")[2], stage))
        self.optimizers = Optimizers(self.emb, self.head, self.settings.lr)
        self._since = self._now()
        while self._ahead():
            yield Step(stage=stage)
            if self.seen >= self.rows * (len(self.trace) + 1) // self.windows:
                self._close(stage)
        self.training_bytes = max(line["training_bytes"] for line in self.trace)
        self.stage_seconds[stage] = self.seconds

    def batch(self, split: str):
        taken = self._next
        if split == "train":
            self._next = None
            self.seen += len(taken[2])
        return taken

    def execute(self, step: Step) -> None:
        there = self._last is not None if step.again else step.split == "train" or self._ahead()
        if there:
            super().execute(step)
        else:
            self._last = None

    @torch.no_grad()
    def _ahead(self) -> bool:
        """Fetch the batch that comes next, unless that was done, and predict it; whether there is one."""
        if self._next is None and (batch := next(self._coming, None)) is not None:
            ids, dense, label = self._next = batch
            with self._aside():
                self.emb.eval()
                self.head.eval()
                logit = self.head(self.emb(ids), dense, ids)
                self.logit[self.predicted:self.predicted + len(label)] = logit.float().cpu().numpy()
                self.predicted += len(label)
                self._training()
        return self._next is not None

    # --- what is told -------------------------------------------------------------------------------------------

    def measures(self, first: int, last: int) -> dict[str, float]:
        """``auc``, ``ne`` and ``logloss`` of the rows ``first .. last - 1``, as they were predicted.

        NaN where only one class is there. Raises Diverged if a prediction is not finite.
        """
        label, logit = checked(self.train.split.label[first:last], self.logit[first:last])
        both = 0 < label.sum() < len(label)
        return dict(auc=auc(label, logit) if both else math.nan, logloss=logloss(label, logit),
                    ne=normalised_entropy(label, logit) if both else math.nan)

    def _close(self, stage: str) -> None:
        """The window that ends here: a line of the trace."""
        with self._aside():
            before = self.trace[-1] if self.trace else dict(examples=0, seconds=0.0)
            line = dict(examples=self.seen, **self.measures(before["examples"], self.seen),
                        training_bytes=self.emb.training_bytes(), seconds=self.seconds,
                        per_second=(self.seen - before["examples"]) / max(self.seconds - before["seconds"], 1e-9))
            if callable(kept := getattr(self.emb, "kept", None)):
                line["kept"] = kept().tolist()
            self.trace.append(line)
            if self.progress:
                self.progress(stage=stage, step=self.steps, total=-(-self.rows // self.train.batch),
                              valid_auc=line["auc"])

    def _now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def _aside(self):
        """What happens within is no training: ``seconds`` stand still."""
        self.seconds += self._now() - self._since
        yield
        self._since = self._now()
