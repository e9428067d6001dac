"""Sweeps on Ray: fractions of a GPU are asked for, threads match, and a killed worker costs only its own cell."""
from __future__ import annotations

import os
import signal
import sys
import time

import pytest

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
    assert len(results(status="ok")) == 4 and not list((home / "runs" / "claims").glob("[!k]*.tmp"))
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


def test_leaving_early_stops_what_runs(two_workers):
    outcomes = executors.ray(count=2, cpus=1)(slow, [0.0, 600.0, 600.0, 600.0])
    assert next(outcomes) == (0.0, 0.0)
    outcomes.close()
    end = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2:                 # a CPU is free again once its task is gone
        assert time.monotonic() < end, "tasks go on after the sweep was left"
        time.sleep(0.1)


def slow(seconds):
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


def test_a_local_ray_is_started_and_stopped(two_workers):
    ray.shutdown()
    executor = executors.ray(count=2)
    share = max(1, executors.cores() // 2)
    found = [outcome for _, outcome in executor(surroundings, [1, 2])]
    assert [f["threads"] for f in found] == [share, share] and not ray.is_initialized()
    with pytest.raises(CellError, match="asks for 4 GPU, this machine has"):
        list(executors.ray(gpus=4)(surroundings, [1]))
    assert not ray.is_initialized()
