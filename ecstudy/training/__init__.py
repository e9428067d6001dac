"""One loop for every method: schedules are generators, the loop advances them."""
from .cell import run_cell
from .optimizer import Optimizers, RowAdam
from .run import Run, Settings
from .timeline import timeline

__all__ = ["Optimizers", "RowAdam", "Run", "Settings", "run_cell", "timeline"]
