"""Ways to run many cells: here one after the other, in several processes, or on Ray.

The protocol is one callable: ``executor(work, items)`` yields ``(item, outcome)`` as outcomes come, in any order.
``work`` is a module-level function of one item that handles its own errors; an outcome is what it returned, or
:class:`WorkerDied` if the process that ran it was killed. Closing the iterator stops what still runs. A cluster's
scheduler is added by writing such a callable.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "POLARS_MAX_THREADS")


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of an item (killed, out of memory, crashed in native code)."""


def inline(work, items):
    """One after the other, in this process."""
    for item in items:
        yield item, work(item)


def processes(count: int):
    """An executor of ``count`` spawned workers that share the cores: each computes with cores // count threads.

    A worker that dies takes only its own item with it; a fresh one continues. Raises ValueError unless count >= 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"processes {count!r}: expected an integer of at least 1")
    return lambda work, items: _run(work, list(items), count)


def ray(count: int | None = None, cpus: int | None = None, gpus: float | None = None, address: str | None = None,
        env: dict[str, str] | None = None):
    """An executor on Ray (extra ``ray``): one machine, or a cluster. A task that dies takes only its own item with it.

    Parameters
    ----------
    count:
        The most items at a time; None lets Ray run as many as fit.
    cpus, gpus:
        What one item takes. ``cpus`` is also its number of threads; the default is cores // count on this machine, 1
        on a cluster. ``gpus`` may be a fraction (0.25: four items share a GPU); the default is 1 for items on
        ``cuda``, else 0.
    address:
        Of a running Ray (``auto``, ``host:port``; default: ``RAY_ADDRESS``). Without one Ray is started here and
        stopped at the end; a Ray that ran before goes on.
    env:
        Environment variables of the workers, for example ``ECSTUDY_HOME`` where the nodes keep their data elsewhere.

    Raises
    ------
    MissingExtra, ValueError
        If Ray is not installed, or a number is out of range.
    """
    from .ray_executor import RayExecutor

    return RayExecutor(count, cpus, gpus, address, env)


def chosen(executor, count: int = 0, **options):
    """The executor that ``sweep(executor=...)`` means: None, a name, or the callable itself.

    None is ``processes`` if there is a ``count``, else ``inline``. Raises ValueError for another name, and for options
    (not None) of an executor that takes none.
    """
    given = [name for name, value in options.items() if value is not None]
    if executor is None:
        executor = "processes" if count else "inline"
    if executor == "ray":
        return ray(count or None, **options)
    if given:
        raise ValueError(f"{given[0]} {options[given[0]]!r}: only executor 'ray' takes it")
    if callable(executor):
        return executor
    if executor not in ("inline", "processes"):
        raise ValueError(f"executor {executor!r}: expected inline, processes or ray")
    return processes(count or cores()) if executor == "processes" else inline


def cores() -> int:
    """Cores this process may use (a container or taskset may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(work, items, count):
    threads = max(1, cores() // count)
    waiting = items[::-1]
    workers: list[_Worker] = []
    try:
        for _ in range(min(count, len(items))):
            workers.append(_Worker(work, threads))
        for worker in workers:
            worker.ready()
        for worker in workers:
            worker.send(waiting.pop())
        while busy := [w for w in workers if w.busy]:
            for pipe in wait([w.pipe for w in busy]):
                index = next(i for i, w in enumerate(workers) if w.pipe is pipe)
                worker = workers[index]
                item, outcome = worker.item, worker.receive()
                if waiting:
                    if isinstance(outcome, WorkerDied):
                        worker.stop()
                        worker = workers[index] = _Worker(work, threads)
                        worker.ready()
                    worker.send(waiting.pop())
                yield item, outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process that takes an item from its pipe, works and sends the outcome back."""

    def __init__(self, work, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads), daemon=True)
        # The child reads these while it loads torch, which may be before any line of ours runs in it.
        with environment({name: str(threads) for name in THREADS}):
            self.process.start()
        theirs.close()                        # so that the death of the child shows as the end of the pipe
        self.busy, self.item = False, None

    def ready(self) -> None:
        """Wait until the process has started; a script that lacks a main guard dies here, and is told so."""
        try:
            self.pipe.recv()
        except EOFError:
            raise WorkerDied(f"a worker could not start ({self._ending()}); a script must call sweep under "
                             "`if __name__ == '__main__':` to use several processes") from None

    def send(self, item) -> None:
        self.busy, self.item = True, item
        with contextlib.suppress(BrokenPipeError):      # it died while idle: receive() will say so
            self.pipe.send(item)

    def receive(self):
        self.busy = False
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return WorkerDied(f"the worker process died: {self._ending()}")

    def _ending(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return name + (" (often the system is out of memory)" if name == "SIGKILL" else "")
        return f"exit code {code}"

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _serve(pipe, work, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # ctrl-C reaches the whole group: the parent decides
    # a parent that is killed says no good-bye, and what it asked for is no longer wanted
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    pipe.send("ready")
    while True:
        try:
            item = pipe.recv()
        except EOFError:                                # the parent has no more work, or is gone
            return
        pipe.send(work(item))


@contextlib.contextmanager
def environment(values: dict):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
