"""The study's runs: what to run (:mod:`.row`, :mod:`.sweep`), how (:mod:`.executors`), and the rows (:mod:`.store`)."""
from .row import COLUMNS, Cell, CellError
from .store import publish, results
from .sweep import RunFailed, fill, grid, run, sweep

__all__ = ["COLUMNS", "Cell", "CellError", "RunFailed", "fill", "grid", "publish", "results", "run", "sweep"]
