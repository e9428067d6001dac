"""In-training compression as cells of the study: one pass over a log in the order it came -> one row and one trace.

A row has task ``stream``. Its ``auc``, ``ne`` and ``logloss`` are progressive over the second half of the stream: each
batch is predicted by the module as it stands when the batch arrives, before anything saw its labels
(:class:`ecstudy.training.Stream`); ``valid_auc`` is the same figure, as validation and test rows are not read.
``bytes_training`` is the most it held while
training, ``bytes_inference`` what it ships at the end, ``peak_bytes`` how far the process grew from before the module
was made, ``seconds`` the time of training alone. ``trace`` has what happened on the way, one line per window of the
stream; it is kept in ``runs/traces`` and published beside the rows.
"""
from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import paths
from ..measure import Diverged, auc_interval
from ..measure.peak import peak
from ..training.cell import begin, diverged, weighed
from ..training.run import Settings
from ..training.stream import Stream, one_stage
from ..training.timeline import FakeRun, example
from . import store
from .row import Cell, CellError, _number, _open, hash_of
from .statistics import by_spec
from .sweep import sweep as sweep_of

TASK, SECTION = "stream", "in_training"
PUBLISHED = "in_training_trace.csv"
TRACE = ["run", "examples", "auc", "ne", "logloss", "training_bytes", "seconds", "per_second", "kept"]

#: {count, gradient, product} x {row, chunk: uniform, dynamic}; a row has one position, and so one ratio
LADDER = {(utility, unit): spec for utility in ("count", "gradient", "product")
          for unit, spec in {"rows": f"fiited(chunks=1, utility={utility!r})",
                             "chunks, uniform": f"fiited(ratios='uniform', utility={utility!r})",
                             "chunks, dynamic": f"fiited(utility={utility!r})"}.items()}
LADDER["product", "chunks, dynamic"] = "fiited"
LADDER["product", "chunks, uniform"] = "fiited(ratios='uniform')"
LADDER["product", "rows"] = "fiited(chunks=1)"

#: FIITED's constants that its authors' summaries do not tell, and what else they could be; "" is this study's choice
CHOICES = {"decay per step": {"": 0.9999, "gamma=0.99": 0.99, "gamma=0.999": 0.999, "gamma=1.0": "none"},
           "chunks of a vector": {"": 4, "chunks=1": 1, "chunks=2": 2, "chunks=8": 8, "chunks=16": 16},
           "steps between rounds": {"": "a tenth of an epoch", "interval=20": 20, "interval=500": 500},
           "more rounds at first": {"": "yes", "warmup=()": "no"},
           "spread of positions": {"": 0.5, "spread=0.1": 0.1, "spread=1.0": 1.0},
           "utilities by field": {"": "as they are", "normalise=True": "normalised"},
           "rounds move": {"": "always", "trigger=0.05": "from 5 % of the slots", "trigger=0.2": "from 20 %"}}


def choice(option: str) -> str:
    """The spec of an option in :data:`CHOICES`."""
    return f"fiited({option})" if option else "fiited"


def _not_asked(name: str):
    return field(init=False, default=Cell.__dataclass_fields__[name].default)


@dataclass(frozen=True)
class StreamCell(Cell):
    """The full specification of one pass over a log.

    Parameters
    ----------
    method, dataset, model, dim, budget, seed, lr, batch, section, device, model_options:
        As those of :class:`~ecstudy.study.row.Cell`; a method of several stages is refused by :meth:`check`. One that
        reads counts is given those of the whole stream: it knows the future.
    windows:
        Lines of the trace.
    """

    section: str = SECTION
    windows: int = 20
    # there is one pass, and nothing is selected
    evals_per_epoch: int = _not_asked("evals_per_epoch")
    patience: int = _not_asked("patience")
    max_epochs: float = _not_asked("max_epochs")
    schedule: str = _not_asked("schedule")
    select: str = _not_asked("select")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "windows", _number("windows", self.windows, int, 1, "an integer of at least 1"))

    @property
    def settings(self) -> dict:
        """What was asked, without labels."""
        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {k: v for k, v in asked.items() if k != "section"} | {"method": self.spec.canonical}

    @cached_property
    def run_id(self) -> str:
        decides = {k: v for k, v in self.settings.items() if k not in ("device", "dataset")}
        return hash_of(decides | dict(task=TASK, data=self.fingerprint))

    def check(self) -> None:
        """Look up names as :meth:`Cell.check` does, and rehearse the schedule: it must have one stage."""
        super().check()
        run = FakeRun()
        try:
            for _ in example(self.method, self.dim).schedule(run):
                pass
        except ValueError:                       # options for other field sizes than those of the rehearsal
            return
        if len(run.stages) > 1:
            raise CellError(f"method {self.method!r}: {one_stage(self.spec.name, run.stages[1]['stage'])}")

    def measure(self, progress=None) -> dict:
        """Train, deploy and measure; the measured part of the row. The trace is kept."""
        return run_stream(self, progress)

    def row(self, measured: dict) -> dict:
        measured = dict(measured)
        more = dict(fields=measured.pop("fields")) if "fields" in measured else {}
        return super().row(measured | dict(task=TASK, settings=self.settings | more))


def run_stream(cell: StreamCell, progress=None) -> dict:
    """The measured columns of a row. ``progress`` as that of :class:`~ecstudy.training.Stream`."""
    dataset = _open(cell.dataset)
    settings = Settings(lr=cell.lr, batch=cell.batch, seed=cell.seed)
    with peak(cell.device) as most:
        row, emb, head = begin(cell, dataset)
        if emb is None:
            return row
        run = Stream(emb, head, dataset, settings, windows=cell.windows, device=cell.device, progress=progress)
        try:
            run.go()
            half = run.rows // 2
            row |= run.measures(half, run.rows)
            low, high = auc_interval(run.train.split.label[half:], run.logit[half:])[1:]
        except Diverged as error:
            return diverged(row, run, error)
        with torch.no_grad():
            emb.before_evaluation()
            emb.deploy()
    _keep(cell.run_id, run.trace)
    return weighed(cell, row, run) | dict(auc_low=low, auc_high=high, valid_auc=row["auc"], peak_bytes=most.bytes,
                                          epochs=1.0, fields=list(zip(dataset.fields, dataset.cardinalities)))


# -- traces ----------------------------------------------------------------------------------------------------------

def _file(run_id: str) -> Path:
    return paths.runs() / "traces" / f"{run_id}.csv"


def _keep(run_id: str, lines: list[dict]) -> None:
    table = pd.DataFrame(lines).assign(run=run_id)
    if "kept" in table:
        table["kept"] = [json.dumps(kept, separators=(",", ":")) for kept in table["kept"]]
    with store._whole(_file(run_id)) as file:
        _write(table, file)


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"run": str})             # an id may be all digits


def _write(table: pd.DataFrame, file) -> None:
    table.reindex(columns=TRACE).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def traces(rows: pd.DataFrame) -> pd.DataFrame:
    """What happened on the way: the lines of the traces of ``rows``, each beside the columns of its row.

    A trace is read from where it was measured, else from what is published; runs of which neither is there are left
    out. Columns: those of a row that say which run it is, ``settings`` among them, and :data:`TRACE`, whose ``kept``
    :func:`kept` reads.
    """
    path, published = paths.results() / PUBLISHED, None
    parts = []
    for run_id in rows.loc[rows["status"].eq("ok"), "run_id"]:
        if (own := _file(run_id)).is_file():
            parts.append(_read(own))
            continue
        if published is None:
            published = _read(path) if path.is_file() else pd.DataFrame(columns=TRACE)
        parts.append(published[published["run"] == run_id])
    which = by_spec(rows)[["run_id", "dataset", "model", "dim", "method", "family", "budget", "seed", "lr", "batch",
                           "bytes_full", "bytes_inference", "settings"]].rename(columns={"run_id": "run"})
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=TRACE)
    return which.merge(found, on="run")


def kept(line: dict) -> tuple[list[tuple[str, int]], np.ndarray] | None:
    """Fields with their sizes, largest first, and the share of their chunks that is live [F, k], of a line of
    :func:`traces`.

    None for a method that does not tell.
    """
    if not isinstance(line["kept"], str) or not line["kept"]:
        return None
    names, sizes = zip(*json.loads(line["settings"])["fields"])
    order = np.argsort([-size for size in sizes], kind="stable")
    share = np.array(json.loads(line["kept"])) / np.array(sizes)[:, None]
    return [(names[f], sizes[f]) for f in order], share[order]


def publish(section: str = SECTION) -> Path:
    """Write the traces of a section's rows into ``results``, beside those that are there; the file.

    Raises CellError if none is kept here.
    """
    path = paths.results() / PUBLISHED
    rows = store.results(section, task=TASK)
    found = [_read(own) for run_id in rows["run_id"] if (own := _file(run_id)).is_file()]
    if not found:
        raise CellError(f"section {section!r}: no trace is kept here; nothing to publish")
    here = pd.concat(found)
    if path.is_file():
        before = _read(path)
        here = pd.concat([before[~before["run"].isin(here["run"])], here])
    with store._whole(path) as file:
        _write(here.sort_values(["run", "examples"], ignore_index=True), file)
    return path


# -- grids -----------------------------------------------------------------------------------------------------------

def sweep(methods, budgets=(None,), **options) -> pd.DataFrame:
    """Run the missing cells of a grid of streams; arguments and rows are those of :func:`ecstudy.study.sweep.sweep`,
    with ``windows`` and without what selects a state."""
    return sweep_of(methods, budgets, **dict(section=SECTION, kind=StreamCell) | options)


def study(dataset, methods, budgets, *, drifted: str | None = None, drifted_budget: float | None = None,
          ladder: float | None = None, ladder_seeds=None, choices: float | None = None,
          **options) -> dict[str, pd.DataFrame]:
    """The grids of one notebook, as :func:`sweep` fills them, by name:

    ``rows``, the log; ``drifted``, the same methods on a log that drifts, at one budget (default: the largest);
    ``ladder``, :data:`LADDER` and Full on the log at one budget (``ladder_seeds``: of other seeds than the rest);
    ``choices``, :data:`CHOICES` and Full at one budget. Grids that are not asked for have no rows.
    """
    rows = sweep(methods, budgets, dataset=dataset, **options)
    one = max(budgets) if drifted_budget is None else drifted_budget
    rungs = options if ladder_seeds is None else options | dict(seeds=ladder_seeds)
    return dict(
        rows=rows,
        drifted=rows[:0] if drifted is None else sweep(methods, [one], dataset=drifted, **options),
        ladder=rows[:0] if ladder is None else sweep(["full", *LADDER.values()], [ladder], dataset=dataset, **rungs),
        choices=rows[:0] if choices is None else sweep(
            list(dict.fromkeys(["full", *(choice(o) for group in CHOICES.values() for o in group)])), [choices],
            dataset=dataset, **options))
