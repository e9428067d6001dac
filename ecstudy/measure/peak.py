"""Peak memory of a block of code.

On CUDA: the allocator's record of tensors on the device, exact (``torch.cuda.max_memory_allocated``); what the
driver and libraries hold is not in it. On the CPU: physical memory of the whole process, so other threads count and
memory-mapped files count as they are read. What the allocator kept from before is given back first where glibc allows,
so that using it again counts. Where Linux lets a process reset its own high-water mark the figure is exact; elsewhere
(``exact`` false) only growth beyond the highest level the process ever had is seen, a lower bound (on Windows always
0).
"""
from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

import torch

_active: list["Peak"] = []                                 # blocks inside one another share one high-water mark
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Result of :func:`peak`, filled in when the block ends.

    ``bytes``: the highest level in the block above that at its start. ``total``: the highest level itself.
    ``exact``: false where the system gives only a lower bound of ``bytes``.
    """

    bytes: int
    total: int
    exact: bool

    def __init__(self, device: str | torch.device | None = None):
        self.device = torch.device(device or "cpu")

    def __enter__(self) -> "Peak":
        for outer in _active:
            outer._note()
        if self.device.type == "cpu":
            _trim()(0)
        self.exact = _reset(self.device)
        self._start, self.total = _levels(self.device)
        if self.exact:
            self.total = self._start
        else:
            self._start = self.total                       # growth is seen only beyond the old high-water mark
        _active.append(self)
        return self

    def __exit__(self, *error) -> None:
        for block in _active:                              # an inner block reset the mark: its peak is theirs too
            block._note()
        _active.remove(self)
        self.bytes = self.total - self._start

    def _note(self) -> None:
        self.total = max(self.total, _levels(self.device)[1])


def peak(device: str | torch.device | None = None) -> Peak:
    """Context manager measuring a block: ``with peak("cuda") as p: ...`` then ``p.bytes``. Default: the CPU.

    Blocks may be nested, in one thread.
    """
    return Peak(device)


def _levels(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and the highest since the last reset."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE))
        if len(found) == 2:
            return int(found["VmRSS"]) << 10, int(found["VmHWM"]) << 10
    try:
        import resource  # POSIX only
    except ModuleNotFoundError:
        return 0, 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


@functools.cache
def _trim():
    """glibc's malloc_trim, which returns free memory inside the heap to the system; else nothing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: 0


def _reset(device: torch.device) -> bool:
    """Lower the high-water mark to the present level; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    for _ in range(5):                                     # a thread that frees memory in between looks like a refusal
        try:
            _RESET.write_text("5")                         # see proc(5), /proc/pid/clear_refs
        except OSError:
            return False
        now, most = _levels(device)
        if most - now < 1 << 20:
            return True
    return False                                           # some sandboxes accept the write and do nothing
