"""Progress of long work: a bar in a notebook (tqdm) or a terminal (rich), plain lines where neither is installed.

Quiet when the output is not a terminal, unless asked.
"""
from __future__ import annotations

import contextlib
import sys
from collections import defaultdict


class Clock:
    """Estimates the time left of a list of cells.

    A cell takes as long as the same method, model and budget did here, else what it took ``elsewhere`` times how much
    longer other cells take here than there, else as long as the method did at other budgets, else the mean of all.

    Parameters
    ----------
    rows, elsewhere:
        Rows of the same data, and of other data.
    workers:
        Cells that run at a time.
    """

    def __init__(self, rows=(), workers: int = 1, elsewhere=()):
        self.workers, self._here, self._there = workers, defaultdict(list), defaultdict(list)
        for known, added in ((self._here, rows), (self._there, elsewhere)):
            for row in added:
                _note(known, row)

    def add(self, row: dict) -> None:
        _note(self._here, row)

    def left(self, cells) -> float | None:
        """Seconds for the cells still to do, or None while nothing has been timed here."""
        here, there = ({kind: sum(s) / len(s) for kind, s in known.items()} for known in (self._here, self._there))
        timed = [s for kind, seconds in self._here.items() if len(kind) == 2 for s in seconds]
        if not timed:
            return None
        both = [kind for kind in here if kind in there and there[kind] > 0]
        factor = sum(here[kind] for kind in both) / sum(there[kind] for kind in both) if both else None

        def of(cell) -> float:
            method = cell.spec.canonical, cell.model
            for kind in ((*method, cell.budget), method):
                if kind in here:
                    return here[kind]
                if factor is not None and kind in there:
                    return factor * there[kind]
            return sum(timed) / len(timed)

        return sum(map(of, cells)) / self.workers


def _note(known: dict, row: dict) -> None:
    kind = row["spec"], row["model"]
    if row["status"] == "unreachable":                       # found out at once, at this budget
        known[*kind, row["budget"]].append(0.0)
    elif row["status"] in ("ok", "diverged") and row["seconds"] is not None:
        known[*kind, row["budget"]].append(row["seconds"])
        known[kind].append(row["seconds"])


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``, ``0.4 s``."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def bar(total: int, title: str, show: bool | None = None):
    """Yields ``step(text)``, to be called after each piece of work with a short text about it.

    ``show``: None draws in notebooks and terminals only, True always, False never.
    """
    kind = _kind(show)
    if not total or kind == "none":
        yield lambda text, advance=1: None
    elif kind == "tqdm":
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=title) as drawn:
            def step(text, advance=1):
                drawn.set_postfix_str(text, refresh=False)
                drawn.update(advance)
            yield step
    elif kind == "rich":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}")
        with Progress(TextColumn(title), *columns, console=Console(stderr=True)) as drawn:
            task = drawn.add_task(title, total=total, text="")
            yield lambda text, advance=1: drawn.update(task, advance=advance, text=text)
    else:
        done = 0

        def step(text, advance=1):
            nonlocal done
            done += advance
            print(f"{title} {done}/{total} {text}", file=sys.stderr, flush=True)
        yield step


@contextlib.contextmanager
def stages(title: str, show=None):
    """Yields what a training loop calls as ``report(stage=, step=, total=, valid_auc=)``; None where nothing is shown.

    ``show`` as in :func:`bar`; a callable is passed on as it is.
    """
    kind = "callable" if callable(show) else _kind(show)
    if kind == "callable":
        yield show
    elif kind == "none":
        yield None
    elif kind == "rich":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}")
        with Progress(*columns, console=Console(stderr=True)) as drawn:
            tasks = {}

            def report(stage, step, total, valid_auc=float("nan")):
                if stage not in tasks:
                    tasks[stage] = drawn.add_task(f"{title}: {stage}", text="")
                drawn.update(tasks[stage], completed=step, total=total, text=f"validation AUC {valid_auc:.4f}")
            yield report
    else:
        yield lambda stage, step, total, valid_auc=float("nan"): print(
            f"{title}: {stage} {step}/{total}, validation AUC {valid_auc:.4f}", file=sys.stderr, flush=True)


def _kind(show: bool | None) -> str:
    if show is False:
        return "none"
    if _in_notebook() and _has("tqdm"):
        return "tqdm"
    if sys.stderr.isatty():
        return "rich" if _has("rich") else "lines"
    return "lines" if show else "none"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")            # whoever runs in a notebook has it loaded
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
