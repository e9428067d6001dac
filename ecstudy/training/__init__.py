"""One loop for every method: schedules are generators, the loop advances them."""
from .cell import run_cell
from .optimizer import Optimizers, RowAdam
from .run import Run, Settings
from .stream import ManyStages, Stream
from .timeline import timeline

__all__ = ["ManyStages", "Optimizers", "RowAdam", "Run", "Settings", "Stream", "run_cell", "timeline"]
