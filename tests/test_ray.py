"""Sweeps on Ray: fractions of a GPU are asked for, threads match, and a killed worker costs only its own cell."""
from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
import pytest

from ecstudy.data import DatasetWriter
from ecstudy.study import Cell, CellError, executors, fill, results, store, sweep
from ecstudy.study import row as rows_of

ray = pytest.importorskip("ray", reason="ray is not installed; pip install 'ecstudy[ray]'")


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of two CPUs on this machine that ran before the sweeps do; workers know this file by value."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    return tmp_path


class Fake(Cell):
    """A cell that needs no data; its method's name says how it goes."""

    fingerprint = "0123456789abcdef"

    def check(self):
        pass

    def measure(self, progress=None):
        home = rows_of.paths.root()
        home.mkdir(parents=True, exist_ok=True)
        with open(home / "measured", "a") as file:
            file.write(self.run_id + "\n")
        if self.method == "killed":
            time.sleep(0.2)                      # in the middle of its run
            os.kill(os.getpid(), signal.SIGKILL)
        if self.method == "broken":
            raise ZeroDivisionError("nothing to divide by")
        return dict(status="ok", auc=0.5 + self.seed / 1000, bytes_full=1000, bytes_inference=100, seconds=2.0)


def fakes(*methods, seeds=1):
    return [Fake(method, "anything", seed=seed) for seed in range(seeds) for method in methods]


def surroundings(item):
    import torch

    return dict(item=item, threads=torch.get_num_threads(), variable=os.environ["OMP_NUM_THREADS"],
                resources=ray.get_runtime_context().get_assigned_resources())


def test_a_killed_worker_costs_only_its_own_cell(two_workers, home):
    cells = fakes("a", "killed", "b", "broken", "c", "d")
    table = fill(cells, executor=executors.ray(count=2, cpus=1)).set_index("method")
    assert list(table["status"]) == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert "worker process died" in table["reason"]["killed"] and "ZeroDivision" in table["reason"]["broken"]
    assert sorted((home / "measured").read_text().split()) == sorted(c.run_id for c in cells)      # each once
    assert len(results(status="ok")) == 4
    assert ray.is_initialized()                                      # it was not ours to stop


def test_a_run_gets_what_it_asked_for(two_workers):
    found = [outcome for _, outcome in executors.ray(cpus=2, gpus=0.25)(surroundings, [1, 2, 3])]
    assert sorted(f["item"] for f in found) == [1, 2, 3]
    for f in found:
        assert f["threads"] == 2 and f["variable"] == "2"
        assert f["resources"]["CPU"] == 2 and f["resources"]["GPU"] == 0.25


def test_rows_of_a_node_with_its_own_store_come_back(two_workers, home, tmp_path_factory):
    other = tmp_path_factory.mktemp("node")
    cells = fakes("a", "b")
    table = fill(cells, executor=executors.ray(2, 1, env={"ECSTUDY_HOME": str(other)}))
    assert list(table["status"]) == ["ok", "ok"] and not (home / "measured").exists()
    assert len((other / "measured").read_text().split()) == 2
    assert [store.cached(c.run_id)["auc"] for c in cells] == [0.5, 0.5]


def test_leaving_early_stops_what_runs(two_workers, home):
    outcomes = executors.ray(count=2, cpus=1)(slow, [(home, 0), (home, 600), (home, 600), (home, 600)])
    assert next(outcomes) == ((home, 0), 0)
    eventually(lambda: len(list(home.glob("pid*"))) >= 2, "the next items did not start")
    running = [int(path.name[3:]) for path in home.glob("pid*") if path.read_text() == "600"]
    outcomes.close()
    assert running
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in running), "tasks go on")


def eventually(answer, complaint):
    end = time.monotonic() + 60
    while not answer():
        assert time.monotonic() < end, complaint
        time.sleep(0.05)


def slow(item):
    home, seconds = item
    (home / f"pid{os.getpid()}").write_text(str(seconds))
    time.sleep(seconds)
    return seconds


def test_what_cannot_be_asked_for(monkeypatch):
    for wrong in (dict(count=0), dict(cpus=1.5), dict(gpus=-1), dict(gpus=1.5), dict(count=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            executors.ray(**wrong)
    with pytest.raises(ValueError, match="expected inline, processes or ray"):
        executors.chosen("rya")
    with pytest.raises(ValueError, match="only executor 'ray' takes it"):
        sweep("full", dataset="x", gpus=0.5)
    assert executors.chosen(None) is executors.inline


def test_a_sweep_starts_a_ray_and_stops_it(two_workers, home):
    typer = pytest.importorskip("typer.testing", reason="the command line needs the extra cli")
    from ecstudy import cli

    ray.shutdown()
    rng = np.random.default_rng(0)
    with DatasetWriter(home / "data" / "tiny", name="tiny", fields=["a", "b"], cardinalities=[50, 70]) as writer:
        for split, rows in (("train", 256), ("valid", 64), ("test", 128)):
            ids = np.stack([rng.integers(0, n, rows) for n in (50, 70)], 1)
            writer.append(split, ids, None, ids[:, 0] % 2)
    done = typer.CliRunner().invoke(cli.app, [
        "sweep", "--methods", "full,hash_trick", "--budgets", "0.5", "--dataset", "tiny", "--max-epochs", "1",
        "--executor", "ray", "--processes", "2", "--cpus-per-run", "1", "--json"])
    assert done.exit_code == 0, done.output
    table = results()
    assert list(table["status"]) == ["ok", "ok"] and list(table["threads"]) == [1, 1] and (table["auc"] > 0).all()
    assert not ray.is_initialized()


def test_a_gpu_that_is_not_there_is_told_before_ray_starts(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(CellError, match="asks for 99 GPU, this machine has"):
        list(executors.ray(gpus=99)(slow, [1]))
