"""An executor on Ray: each item is one task with its CPUs and its (fraction of a) GPU. See :func:`executors.ray`."""
from __future__ import annotations

import os

from ..extras import need
from .executors import THREADS, WorkerDied, cores, environment
from .row import CellError


class RayExecutor:
    """``executor(work, items)`` as :mod:`ecstudy.study.executors` describes it; Ray starts with the first item.

    ``elsewhere`` tells that items may run on machines with other devices than this one.
    """

    elsewhere = True

    def __init__(self, count: int | None = None, cpus: int | None = None, gpus: float | None = None,
                 address: str | None = None, env: dict[str, str] | None = None):
        whole = [("count", count), ("cpus", cpus)]
        for name, value in whole:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} {value!r}: expected an integer of at least 1")
        if gpus is not None and (isinstance(gpus, bool) or not gpus >= 0 or gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"gpus {gpus!r}: expected a share of one GPU in [0, 1], or a whole number of them")
        self.ray = need("ray", "ray")
        self.count, self.gpus, self.env = count, gpus, env or {}
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        # here the cores are shared out; a cluster's nodes are not known, so a run takes one core unless told
        local = self.address == "local"
        self.cpus = cpus or (max(1, cores() // count) if count and local else 1)

    def __call__(self, work, items):
        items = list(items)
        gpus = self.gpus
        if gpus is None:
            gpus = float(any(str(getattr(item, "device", "cpu")).startswith("cuda") for item in items))
        started = not self.ray.is_initialized()
        if started:
            self._start(gpus)
        waiting, running = items[::-1], {}
        try:
            # a task that dies is not tried again: its item gets a row that says so, as with processes
            task = self.ray.remote(_serve).options(num_cpus=self.cpus, num_gpus=gpus, max_retries=0)
            shared = self.ray.put(work)
            while waiting or running:
                while waiting and len(running) < (self.count or len(items)):
                    item = waiting.pop()
                    running[task.remote(shared, item, self._environment(), self.cpus)] = item
                for done in self.ray.wait(list(running))[0]:
                    item = running.pop(done)
                    yield item, self._outcome(done)
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)
            if started:
                self.ray.shutdown()

    def _start(self, gpus: float) -> None:
        if self.address != "local":
            self.ray.init(address=self.address, log_to_driver=False)
            return
        import torch

        if gpus > (here := torch.cuda.device_count()):           # Ray would wait for ever
            raise CellError(f"a run asks for {gpus:g} GPU, this machine has {here}; ask for less, or give the address "
                            "of a cluster")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # libraries read these while they load, before a task comes; on a cluster Ray sets them by the task's CPUs
        with environment({name: str(self.cpus) for name in THREADS}):
            self.ray.init(address="local", num_cpus=max(cores(), self.cpus * (self.count or 1)),
                          include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                          _node_ip_address="127.0.0.1")

    def _environment(self) -> dict[str, str]:
        home = {"ECSTUDY_HOME": os.environ["ECSTUDY_HOME"]} if "ECSTUDY_HOME" in os.environ else {}
        return {name: str(self.cpus) for name in THREADS} | home | self.env

    def _outcome(self, reference):
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:        # killed, out of memory, its node lost
            return WorkerDied("the worker process died: " + " ".join(f"{type(error).__name__}: {error}".split())[:400])


def _serve(work, item, variables: dict[str, str], threads: int):
    import torch

    torch.set_num_threads(threads)
    with environment(variables):                     # a worker serves others afterwards
        return work(item)
