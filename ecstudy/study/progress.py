"""Progress of long work: a bar in a notebook (tqdm) or a terminal (rich), plain lines where neither is installed.

Quiet when the output is not a terminal, unless asked.
"""
from __future__ import annotations

import contextlib
import sys
from collections import defaultdict


class Clock:
    """Estimates the time left of a list of cells from cells already done: by kind of cell, else by the mean of all."""

    def __init__(self, rows=(), workers: int = 1):
        self.workers, self._seconds = workers, defaultdict(list)
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        if row["status"] in ("ok", "diverged") and row["seconds"] is not None:
            self._seconds[row["spec"], row["model"]].append(row["seconds"])

    def left(self, cells) -> float | None:
        """Seconds for the cells still to do, or None while nothing like them has been timed."""
        everything = [s for values in self._seconds.values() for s in values]
        if not everything:
            return None
        mean = sum(everything) / len(everything)
        kinds = (self._seconds.get((c.spec.canonical, c.model)) for c in cells)
        return sum(sum(k) / len(k) if k else mean for k in kinds) / self.workers


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
