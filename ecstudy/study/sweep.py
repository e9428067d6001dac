"""Run what is missing: one cell (:func:`run`), a list of cells (:func:`fill`) or a grid (:func:`sweep`).

A run is in the store whole or not at all, so work may be interrupted anywhere and the same call goes on with the rest.
"""
from __future__ import annotations

import functools
import itertools
import numbers
import time
import traceback
from dataclasses import fields, replace

import pandas as pd

from . import executors, store
from . import progress as progress_of
from .row import DONE, Cell, CellError, frame, known

BUSY = "busy"                        # what an attempt returns when another process holds the cell


class RunFailed(RuntimeError):
    """A run that was started failed; the message names the cell and the reason, and the store holds a row of both."""


def run(cell: Cell | None = None, *, force: bool = False, progress=None, **settings) -> dict:
    """Train, deploy and measure one cell; its row. A row that is there already is returned as it is.

    Started by ``torchrun``, its processes run the cell together (:mod:`ecstudy.training.distributed`).

    Parameters
    ----------
    cell, settings:
        A :class:`~ecstudy.study.row.Cell`, or its fields: ``method``, ``dataset`` and what differs from the defaults.
    force:
        Measure again and replace the row.
    progress:
        None shows the stages in notebooks and terminals, True always, False never; or a callable that takes
        ``stage=, step=, total=, valid_auc=`` after every validation.

    Raises
    ------
    CellError, SpecError, DataError
        Before any work, for a value that cannot be used; CellError also if another process is running this very cell.
    RunFailed
        If the run itself failed, with the error as its cause; the store then holds a row with status ``failed``.
    """
    if cell is None:
        for name in ("method", "dataset"):
            if name not in settings:
                raise CellError(f"{name} is missing")
        cell = Cell(**checked_names(settings))
    elif settings:
        raise CellError(f"give a cell or its fields, not both ({', '.join(settings)})")
    from ..training import distributed

    with distributed.joined(cell) as group:
        if group is None:
            return _run(cell, force, progress)
        return group.follow(cell) if group.rank else group.tell(_run(cell, force, progress))


def _run(cell: Cell, force: bool, progress) -> dict:
    if not force and (row := store.rows().get(cell.run_id)) and row["status"] in DONE:
        return store.add_section(row, cell.section)
    cell.check()
    with progress_of.stages(describe(cell), progress) as report:
        row = attempt(cell, force=force, raising=True, progress=report)
    if row == BUSY:
        raise CellError(f"{describe(cell)} is being run by {store.holder(cell.run_id)}; wait for it")
    return row


def sweep(methods, budgets=(None,), *, dataset=None, datasets=None, models="dlrm", dims=16, seeds=0, lrs=0.001,
          base_dim: int | None = None, processes: int = 0, shard: str | None = None, fail_fast: bool = False,
          force: bool = False, progress: bool | None = None, tune: bool = False, missing: str = "run",
          executor=None, cpus: int | None = None, gpus: float | None = None, address: str | None = None,
          kind: type[Cell] = Cell, **common) -> pd.DataFrame:
    """Run the missing cells of a grid and return one row per cell of it.

    Parameters
    ----------
    methods, budgets, datasets, models, dims, seeds, lrs:
        A value or a list of values each; the grid is their product. A method whose size is fixed (Full, or a spec that
        gives the size itself) runs once, not once per budget. ``dataset`` is the same as ``datasets``.
    base_dim:
        Fix bytes while the dimension grows: a fraction then means so many bytes as it is of the full table at this
        dimension.
    processes:
        0 runs here, n >= 1 in so many spawned workers.
    shard:
        ``"i/n"``: only the i-th of n parts. Parts are disjoint, complete, and depend on the cells alone, so machines
        need not speak to one another. ``1/n ... n/n`` and ``0/n ... (n-1)/n`` are both understood.
    fail_fast:
        Stop at the first failure. Otherwise a failure becomes a row with status ``failed`` and the rest goes on.
    force:
        Measure all cells again.
    progress:
        None shows a bar in notebooks and terminals, True always, False never.
    tune:
        Only the first seed runs every learning rate; the other seeds run, per method, budget, data set, model and
        dimension, the one with the best validation AUC. The paper's grid is 0.001, 0.01, 0.1 (section 5.1.3).
    missing:
        ``"run"``, or ``"skip"`` to return only the rows that are there (pages of published rows need no data).
    executor, cpus, gpus, address:
        ``"ray"`` runs cells on Ray, ``processes`` of them at a time (0: as many as fit), each with so many CPUs and
        (parts of) GPUs; see :func:`ecstudy.study.executors.ray`. Or a callable as that module describes.
    kind:
        The class of the cells, :class:`~ecstudy.study.row.Cell` or one derived from it.
    common:
        Further fields of a cell, the same for all cells.

    Raises
    ------
    CellError, SpecError, DataError
        Before any work, for a value that cannot be used.
    RunFailed
        With ``fail_fast``, naming the cell and the reason.
    """
    if (dataset is None) == (datasets is None):
        raise CellError("give one of dataset and datasets")
    datasets = dataset if datasets is None else datasets
    known("missing", missing, ("run", "skip"))
    fill_in = functools.partial(fill, processes=processes, fail_fast=fail_fast, force=force, progress=progress,
                                executor=executors.chosen(executor, processes, cpus=cpus, gpus=gpus, address=address))
    if missing == "skip":
        fill_in = there
    seeds = _many("seeds", seeds)
    if not tune:
        return fill_in(grid(methods, budgets, datasets, models, dims, seeds, lrs, base_dim, kind, **common),
                       shard=shard)
    if shard is not None:
        raise CellError(f"shard {shard!r} with tune: the choice of a learning rate needs all of them; run the first "
                        "seed in shards without tune, then all seeds with tune on one machine")
    tried = grid(methods, budgets, datasets, models, dims, seeds[:1], lrs, base_dim, kind, **common)
    rows = fill_in(tried)
    ids = set(rows["run_id"])
    best = chosen([cell for cell in tried if cell.run_id in ids], rows)
    others = [replace(cell, seed=seed) for seed in seeds[1:] for cell in best]
    return pd.concat([rows, fill_in(others)], ignore_index=True) if others else rows


def there(cells, **ignored) -> pd.DataFrame:
    """The rows of those cells that have one, in the order of the cells; nothing is run."""
    found = store.rows()
    return frame(found[cell.run_id] for cell in cells if found.get(cell.run_id, {}).get("status") in DONE)


def chosen(cells: list[Cell], rows: pd.DataFrame) -> list[Cell]:
    """Of cells that differ in the learning rate alone, the one whose row has the best validation AUC.

    ``rows`` are those of the cells, in their order. Test metrics are not looked at; a cell that no learning rate
    brought to an end keeps the first, so that its row of the next seed gives the same reason.
    """
    best: dict[Cell, tuple[float, Cell]] = {}
    for cell, status, value in zip(cells, rows["status"], rows["valid_auc"], strict=True):
        value = value if status == "ok" and not pd.isna(value) else -1.0
        key = replace(cell, lr=1.0)
        if key not in best or value > best[key][0]:
            best[key] = value, cell
    return [cell for _, cell in best.values()]


def grid(methods, budgets, datasets, models="dlrm", dims=16, seeds=0, lrs=0.001, base_dim=None,
         kind: type[Cell] = Cell, **common) -> list[Cell]:
    """The cells of a product, each once; seeds turn slowest, so that a sweep cut short has whole replicates."""
    from ..budget import budget_bytes

    for name in checked_names(common, kind):
        if name in ("method", "budget", "model", "dim", "seed", "lr"):
            raise CellError(f"{name}: a grid takes {name}s, a value or a list of values")
    cells = {}
    for seed, dataset, model, dim, lr, method, budget in itertools.product(
            _many("seeds", seeds), _many("datasets", datasets), _many("models", models), _many("dims", dims),
            _many("lrs", lrs), _many("methods", methods), _many("budgets", budgets)):
        cell = kind(method=method, dataset=dataset, model=model, dim=dim, budget=budget, seed=seed, lr=lr, **common)
        if cell.budget is not None and not _sized_by_budget(cell.spec):
            cell = replace(cell, budget=None)
        if isinstance(cell.budget, float) and base_dim is not None:
            cell = replace(cell, budget=budget_bytes(cell.budget, cardinalities(cell.dataset), base_dim))
        cells.setdefault(cell.run_id, cell)
    return list(cells.values())


def cardinalities(dataset: str) -> tuple[int, ...]:
    """Of a data set's fields; where the data is not at hand, their sum, as known rows tell it (enough for budgets)."""
    from ..data import DataError, open_dataset

    try:
        return tuple(open_dataset(dataset).cardinalities)
    except DataError:
        for row in store.rows().values():
            if row["dataset"] == dataset and row["bytes_full"] and row["dim"]:
                return (int(row["bytes_full"]) // (4 * row["dim"]),)
        raise


def fill(cells, *, processes: int = 0, shard: str | None = None, fail_fast: bool = False, force: bool = False,
         progress: bool | None = None, executor=None) -> pd.DataFrame:
    """Run the cells whose rows are missing and return the rows of all, in the order of the cells.

    Cells that another process is running now are waited for at the end, and run here should that process fail.
    ``executor`` is one of :mod:`ecstudy.study.executors`; the other arguments are those of :func:`sweep`.
    """
    from ..training import distributed

    if (together := distributed.started()) > 1:
        raise CellError(f"torchrun started {together} processes, which run one cell together: use `ecstudy run`; a "
                        "sweep runs on several processes by --processes, --executor ray or --shard")
    cells = list({cell.run_id: cell for cell in cells}.values())
    if shard is not None:
        cells = part(cells, shard)
    executor = executors.chosen(executor, processes)
    there = store.rows()
    done = {} if force else {c.run_id: there[c.run_id] for c in cells if there.get(c.run_id, {}).get("status") in DONE}
    missing = [cell for cell in cells if cell.run_id not in done]
    for cell in missing:                 # a cluster's devices are not seen from here
        (replace(cell, device="cpu") if getattr(executor, "elsewhere", False) else cell).check()
    for cell in cells:
        if cell.run_id in done:
            done[cell.run_id] = store.add_section(done[cell.run_id], cell.section)

    data = {cell.fingerprint for cell in missing}
    ours, others = [], []
    for row in there.values():
        (ours if row["data_fingerprint"] in data else others).append(row)
    clock = progress_of.Clock(ours, workers=max(1, processes), elsewhere=others)
    left = {cell.run_id: cell for cell in missing}
    busy: list[Cell] = []
    with progress_of.bar(len(missing), "runs", progress) as step:
        def finish(cell, row):
            if isinstance(row, executors.WorkerDied):
                row = store.write(cell.row(dict(status="failed", reason=str(row))))
            else:
                store.adopt(row)             # a worker on another machine may have written it into a store of its own
            done[cell.run_id] = row
            del left[cell.run_id]
            clock.add(row)
            step(f"{row['status']}: {describe(cell)}; {progress_of.duration(clock.left(left.values()))} left")
            if fail_fast and row["status"] == "failed":
                raise RunFailed(f"{describe(cell)}: {row['reason']}")

        work = functools.partial(attempt, force=force)
        try:
            outcomes = executor(work, missing)
            try:
                for cell, row in outcomes:
                    if row == BUSY:
                        busy.append(cell)
                    else:
                        finish(cell, row)
            finally:
                outcomes.close()             # stops the workers that still run, whatever the reason to leave
            for cell in busy:
                finish(cell, _wait(cell, force, step))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(done)} of {len(cells)} rows are there; "
                                    "the same call goes on with the rest") from None
    return frame(done[cell.run_id] for cell in cells)


def attempt(cell: Cell, force: bool = False, raising: bool = False, progress=None):
    """Claim, measure and store one cell. Its row, or BUSY if another process holds it.

    An error becomes a row with status ``failed`` (and is raised with ``raising``); an interruption leaves nothing.
    """
    with store.claim(cell.run_id) as ours:
        if not ours:
            return BUSY
        if not force and (row := store.cached(cell.run_id)) and row["status"] in DONE:
            return store.add_section(row, cell.section)      # done by another process since we looked
        begin = time.perf_counter()
        try:
            return store.write(cell.row(cell.measure(progress)))
        except Exception as error:
            failed = dict(status="failed", reason=one_line(error), seconds=time.perf_counter() - begin)
            row = store.write(cell.row(failed), traceback=traceback.format_exc())
            if raising:
                raise RunFailed(f"{describe(cell)}: {row['reason']}") from error
            return row


def _wait(cell: Cell, force: bool, step):
    told = False
    while (row := attempt(cell, force)) == BUSY:
        if not told:
            step(f"waiting for {describe(cell)}, run by {store.holder(cell.run_id)}", advance=0)
            told = True
        time.sleep(0.2)
    return row


def part(cells: list[Cell], shard: str) -> list[Cell]:
    """The cells of part i of n (``"i/n"``), chosen by their ids alone. Raises CellError for another form."""
    i, slash, n = str(shard).partition("/")
    if not (slash and i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and int(n) >= 1 and int(i) <= int(n)):
        raise CellError(f"shard {shard!r}: expected i/n, part i of n parts, for example 1/4")
    return [cell for cell in cells if int(cell.run_id, 16) % int(n) == int(i) % int(n)]


def describe(cell: Cell) -> str:
    """``compo on criteo at 0.1, seed 0``: the cell in a line of progress or an error."""
    unit = " bytes" if isinstance(cell.budget, int) else ""
    size = "" if cell.budget is None else f" at {cell.budget:.12g}{unit}"
    return f"{cell.method} on {cell.dataset}{size}, seed {cell.seed}"


def one_line(error: BaseException) -> str:
    """The kind of an error and its message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500].rstrip(": ")


def checked_names(cell: dict, kind: type[Cell] = Cell) -> dict:
    """The keywords themselves, or CellError naming the one that is no field of a cell."""
    names = [f.name for f in fields(kind) if f.init]
    for name in cell:
        known("setting", name, names)
    return cell


def _many(name: str, values) -> list:
    """A scalar, or each of several values."""
    if values is None or isinstance(values, (str, numbers.Number)) or not hasattr(values, "__iter__"):
        return [values]
    values = list(values)
    if not values:
        raise CellError(f"{name} is empty: expected a value or a list of values")
    return values


def _sized_by_budget(spec) -> bool:
    """Whether a budget decides the size: not for a method without a knob, nor for a spec that sets the knob itself."""
    from ..registry import get

    knob = get(spec.name).knob
    return knob is not None and knob not in spec.options
