"""One row per run: what a cell is, that runs are neither repeated nor lost, and that rows survive publication."""
from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ecstudy.training
from ecstudy.data.layout import DataError, DatasetWriter
from ecstudy.spec import SpecError
from ecstudy.study import (
    COLUMNS,
    Cell,
    CellError,
    RunFailed,
    executors,
    fill,
    grid,
    publish,
    results,
    run,
    store,
    sweep,
)
from ecstudy.study import row as rows_of
from ecstudy.study.progress import Clock, duration

sweeping = importlib.import_module("ecstudy.study.sweep")     # the package exports a function of this name

OK = dict(status="ok", auc=0.75, bytes_full=1000, bytes_inference=100, seconds=2.0, family="inter-feature")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny(home):
    """A data set of two fields in the data folder."""
    with DatasetWriter(home / "data" / "tiny", name="tiny", fields=["a", "b"], cardinalities=[5, 7]) as writer:
        for split in ("train", "valid", "test"):
            writer.append(split, np.array([[0, 1], [4, 6]]), None, np.array([0, 1]))
    return "tiny"


@pytest.fixture
def calls(monkeypatch):
    """A training that takes no time and lists the cells it was asked for."""
    asked = []

    def run_cell(cell, *, progress=None):
        asked.append(cell)
        return dict(OK)

    monkeypatch.setattr(ecstudy.training, "run_cell", run_cell)
    return asked


class Fake(Cell):
    """A cell that needs no data and writes down each of its measurements; its method's name says how it goes."""

    fingerprint = "0123456789abcdef"

    def check(self):
        pass

    def measure(self, progress=None):
        log(self.run_id)
        if self.method == "broken":
            raise ZeroDivisionError("nothing\nto divide by")
        if self.method == "killed" and not (home_of() / "spared").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.method == "interrupted" and not (home_of() / "spared").exists():
            raise KeyboardInterrupt
        if self.method == "slow":
            time.sleep(0.3)
        return OK | dict(auc=0.5 + self.seed / 1000)


def home_of():
    return rows_of.paths.root()


def log(text):
    with open(home_of() / "measured", "a") as file:
        file.write(text + "\n")


def measured():
    path = home_of() / "measured"
    return path.read_text().split() if path.exists() else []


def fakes(*methods, seeds=1):
    return [Fake(method, "anything", seed=seed) for seed in range(seeds) for method in methods]


def files():
    return sorted(p.name for p in (home_of() / "runs" / "rows").glob("*"))


# -- cells -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    (dict(budget=0.0), "fraction in (0, 1]"), (dict(budget=1.5), "fraction in (0, 1]"), (dict(budget=-3), "bytes"),
    (dict(budget=1), "write 1.0"), (dict(budget=True), "True"), (dict(budget="0.1"), "'0.1'"),
    (dict(budget=float("nan")), "nan"), (dict(seed=-1), "at least 0"), (dict(seed=0.5), "integer"),
    (dict(seed=2**63), "below"), (dict(dim=0), "at least 1"), (dict(dim=16.0), "integer"), (dict(lr=0), "above 0"),
    (dict(lr=float("inf")), "inf"), (dict(schedule="cosin"), "cosine"), (dict(select="train"), "valid, test"),
    (dict(batch="128"), "'128'"), (dict(method=""), "method ''"),
    (dict(dataset=None), "None"), (dict(patience=0), "patience 0"), (dict(max_epochs=0), "max_epochs 0"),
    (dict(model_options={"a": object()}), "model_options"), (dict(section="a+b"), "'+'"),
])
def test_a_cell_refuses_what_cannot_be_run(wrong, words):
    with pytest.raises(CellError) as error:
        Cell(**(dict(method="compo", dataset="tiny") | wrong))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_numpy_numbers_are_plain_in_a_cell():
    plain = Cell("compo", "tiny", dim=16, budget=0.1, seed=3, lr=0.001)
    typed = Cell("compo", "tiny", dim=np.int64(16), budget=np.float64(0.1), seed=np.int32(3), lr=np.float64(0.001))
    assert typed == plain and hash(typed) == hash(plain) and type(typed.dim) is int and type(typed.budget) is float
    assert type(Cell("compo", "tiny", budget=np.int64(4096)).budget) is int


@pytest.mark.parametrize("wrong, error, words", [
    (dict(method="comppo"), SpecError, "compo"), (dict(method="compo("), SpecError, "compo("),
    (dict(method="hash_trick(rowz=3)"), SpecError, "rowz"), (dict(method="compo|int9"), SpecError, "int9"),
    (dict(dataset="tinny"), DataError, "tinny"), (dict(model="dlmr"), CellError, "did you mean dlrm"),
    (dict(device="gpu!"), CellError, "gpu!"), (dict(model_options={"depht": 3}), ValueError, "depht"),
])
def test_unknown_names_are_reported_before_work_starts(tiny, calls, wrong, error, words):
    settings = dict(method="compo", dataset="tiny", budget=0.5) | wrong
    with pytest.raises(error) as caught:
        run(**settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    methods, dataset = [settings.pop("method"), "full"], settings.pop("dataset")
    settings = {{"model": "models", "budget": "budgets"}.get(k, k): v for k, v in settings.items()}
    with pytest.raises(error):
        sweep(methods, dataset=dataset, **settings)
    assert not calls and not files()


def test_an_absent_device_is_an_error(tiny, calls):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with pytest.raises(CellError, match="no CUDA device"):
        run(method="compo", dataset=tiny, device="cuda")


def test_the_run_id_is_stable():
    # Published rows are found by this hash: if it changes, every one of them is run again.
    assert Fake("robe(sign=True, block=16)|int8", "anything", budget=0.1).run_id == "fa8f7007b11b0eb4"


def test_the_run_id_follows_all_that_decides_a_result_and_nothing_else():
    base = dict(method="robe(block=16, sign=True)", dataset="x", budget=0.1)
    same = [base, base | dict(method="robe( sign=True,block=16 )"), base | dict(dataset="/elsewhere/x"),
            base | dict(section="other"), base | dict(device="cuda"), base | dict(lr=1e-3)]
    other = [dict(method="robe(block=8, sign=True)"), dict(budget=0.2), dict(budget=None), dict(budget=100),
             dict(seed=1), dict(dim=32), dict(lr=0.002), dict(batch=256), dict(model="wdl"), dict(evals_per_epoch=4),
             dict(patience=3),
             dict(max_epochs=1), dict(model_options={"depth": 2}), dict(schedule="cosine"), dict(select="test")]
    assert len({Fake(**cell).run_id for cell in same}) == 1
    assert len({Fake(**(base | change)).run_id for change in [{}] + other}) == len(other) + 1
    moved = Fake(**base)
    moved.__dict__["fingerprint"] = "other data"
    assert moved.run_id != Fake(**base).run_id
    assert Fake(**base, model_options=dict(a=1, b=2)).run_id == Fake(**base, model_options=dict(b=2, a=1)).run_id


def test_a_row_has_every_column_and_says_where_it_comes_from(tiny, calls):
    row = run(method="compo", dataset=tiny, budget=0.5, seed=3, section="mine")
    assert tuple(row) == COLUMNS
    assert (row["method"], row["dataset"], row["budget"], row["seed"], row["section"], row["task"]) == (
        "compo", "tiny", 0.5, 3, "mine", "ctr")
    assert row["torch"] and row["python"] and row["version"] == ecstudy.__version__
    assert row["created"].endswith("+00:00")
    assert row["threads"] >= 1 and row["machine"] and row["device"] == "cpu" and row["ne"] is None
    settings = json.loads(row["settings"])
    assert Cell(**settings).run_id == row["run_id"]                 # the row alone tells how to repeat the run


def test_without_a_budget_the_row_stands_at_the_share_it_takes(tiny, calls):
    row = run(method="full", dataset=tiny)
    assert row["budget"] == 0.1 and json.loads(row["settings"])["budget"] is None


# -- running what is missing ------------------------------------------------------------------------------------------

def test_running_twice_does_nothing(tiny, calls):
    first = run(method="compo", dataset=tiny, budget=0.5)
    assert run(method="compo", dataset=tiny, budget=0.5) == first and len(calls) == 1
    run(method="compo", dataset=tiny, budget=0.5, force=True)
    assert len(calls) == 2


def test_a_sweep_runs_each_missing_cell_once(tiny, calls):
    grid_of = dict(dataset=tiny, seeds=[0, 1])
    table = sweep(["full", "compo"], [0.5, 0.25], **grid_of)
    assert len(calls) == len(table) == 2 * (1 + 2)            # Full has no knob: once per seed
    again = sweep(["full", "compo"], [0.5, 0.25], **grid_of)
    assert len(calls) == 6
    pd.testing.assert_frame_equal(table, again)
    sweep(["full", "compo"], [0.5, 0.25, 0.125], **grid_of)
    assert [c.budget for c in calls[6:]] == [0.125, 0.125]


def test_the_learning_rate_is_chosen_on_validation_rows_of_the_first_seed(tiny, monkeypatch):
    asked = []

    def run_cell(cell, *, progress=None):
        asked.append(cell)
        best = {"full": 0.1, "compo": 0.01}[cell.method]
        if cell.budget == 0.25:
            return dict(status="unreachable", reason="too small")
        # the test metric would choose another one
        return OK | dict(valid_auc=0.8 - abs(cell.lr - best), auc=0.9 - abs(cell.lr - 0.001))

    monkeypatch.setattr(ecstudy.training, "run_cell", run_cell)
    grid_of = dict(dataset=tiny, lrs=[0.001, 0.01, 0.1], tune=True)
    table = sweep(["full", "compo"], [0.5, 0.25], seeds=[3, 4, 5], **grid_of)
    later = {(c.method, c.budget, c.seed, c.lr) for c in asked if c.seed != 3}
    assert later == {("full", None, 4, 0.1), ("full", None, 5, 0.1), ("compo", 0.5, 4, 0.01), ("compo", 0.5, 5, 0.01),
                     ("compo", 0.25, 4, 0.001), ("compo", 0.25, 5, 0.001)}
    assert len(table) == len(asked) == 9 + len(later)
    pd.testing.assert_frame_equal(table, sweep(["full", "compo"], [0.5, 0.25], seeds=[3, 4, 5], **grid_of))
    assert len(asked) == 15
    with pytest.raises(CellError, match="shard"):
        sweep("full", seeds=[3, 4], shard="1/2", **grid_of)


def test_a_grid_takes_scalars_or_lists_and_drops_budgets_that_decide_nothing(tiny):
    assert grid("compo", 0.5, tiny) == [Cell("compo", tiny, budget=0.5)]
    cells = grid(["full", "hash_trick(rows=3)", "compo"], [0.5, 0.25], tiny, dims=(8, 16), section="dims")
    assert [(c.dim, c.method, c.budget) for c in cells] == [
        (dim, method, budget) for dim in (8, 16)
        for method, budget in (("full", None), ("hash_trick(rows=3)", None), ("compo", 0.5), ("compo", 0.25))]
    with pytest.raises(CellError, match="methods is empty"):
        grid([], 0.5, tiny)
    with pytest.raises(CellError, match="did you mean batch"):
        grid("compo", 0.5, tiny, batchs=3)
    with pytest.raises(CellError, match="takes seeds"):
        grid("compo", 0.5, tiny, seed=3)
    with pytest.raises(CellError, match="one of dataset and datasets"):
        sweep("compo", 0.5)
    with pytest.raises(CellError, match="dataset is missing"):
        run(method="compo")


def test_a_base_dimension_fixes_the_bytes(tiny):
    cells = grid("compo", 0.5, tiny, dims=[16, 32], base_dim=16)
    assert [(c.dim, c.budget) for c in cells] == [(16, 12 * 16 * 4 // 2), (32, 12 * 16 * 4 // 2)]


def test_one_run_serves_several_sections(tiny, calls):
    run(method="full", dataset=tiny, section="dlrm")
    assert run(method="full", dataset=tiny, section="dims")["section"] == "dlrm+dims"
    sweep("full", dataset=tiny, section="models")
    assert len(calls) == 1
    for section in ("dlrm", "dims", "models"):
        assert list(results(section=section)["section"]) == [section]
    assert results(section="rag").empty


def test_failures_are_rows_and_run_again(tiny, monkeypatch):
    def broken(cell, *, progress=None):
        raise ZeroDivisionError("no\nluck")

    monkeypatch.setattr(ecstudy.training, "run_cell", broken)
    with pytest.raises(RunFailed, match="ZeroDivisionError: no luck") as error:
        run(method="compo", dataset=tiny, budget=0.5)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    failed = results()
    assert list(failed["status"]) == ["failed"] and failed["reason"][0] == "ZeroDivisionError: no luck"
    (path,) = (home_of() / "runs" / "rows").glob("*.json")
    assert "broken" in json.loads(path.read_text())["traceback"]
    monkeypatch.setattr(ecstudy.training, "run_cell", lambda cell, *, progress=None: dict(OK))
    assert run(method="compo", dataset=tiny, budget=0.5)["status"] == "ok"
    assert list(results()["status"]) == ["ok"] and "traceback" not in path.read_text()


@pytest.mark.parametrize("status", ["unreachable", "diverged"])
def test_other_outcomes_are_done(tiny, monkeypatch, status):
    asked = []
    monkeypatch.setattr(ecstudy.training, "run_cell", lambda cell, *, progress=None: asked.append(1) or dict(
        status=status, reason="so it is"))
    for _ in range(2):
        assert run(method="compo", dataset=tiny, budget=0.5)["status"] == status
    assert len(asked) == 1


def test_a_failure_does_not_stop_a_sweep_unless_told_to():
    table = fill(fakes("compo", "broken", "full"))
    assert list(table["status"]) == ["ok", "failed", "ok"]
    with pytest.raises(RunFailed, match="broken on anything.*ZeroDivisionError"):
        fill(fakes("broken", "robe"), fail_fast=True)
    assert len(results(method="robe")) == 0


def test_an_interrupted_sweep_goes_on_to_the_same_rows():
    cells = fakes("a", "b", "interrupted", "c", seeds=2)
    with pytest.raises(KeyboardInterrupt, match="2 of 8 rows"):
        fill(cells)
    assert len(files()) == 2 and len(measured()) == 3 and not list((home_of() / "runs" / "claims").iterdir())
    (home_of() / "spared").touch()
    table = fill(cells)
    assert list(table["run_id"]) == [c.run_id for c in cells] and set(table["status"]) == {"ok"}
    assert sorted(measured()) == sorted([c.run_id for c in cells] + [cells[2].run_id])


def test_shards_partition_the_cells():
    cells = fakes(*"abcdefgh", seeds=5)
    for first in (0, 1):                                             # both ways to count
        parts = [sweeping.part(cells, f"{i}/{3}") for i in range(first, first + 3)]
        assert sorted(c.run_id for part in parts for c in part) == sorted(c.run_id for c in cells)
        assert all(len(part) > 5 for part in parts)
    assert sweeping.part(cells, "1/1") == cells
    for wrong in ("4/3", "1", "a/b", "1/0", "-1/3", "", "1/3/3"):
        with pytest.raises(CellError, match="i/n"):
            sweeping.part(cells, wrong)
    assert len(fill(cells, shard="2/3")) == len(sweeping.part(cells, "2/3")) == len(measured())


def test_published_rows_need_neither_run_nor_data(tiny, calls, home):
    run(method="compo", dataset=tiny, budget=0.5)
    publish(section="dlrm")
    for path in [*(home / "runs" / "rows").iterdir()]:
        path.unlink()
    (home / "data" / "tiny").rename(home / "elsewhere")
    assert len(sweep("compo", 0.5, dataset=tiny)) == 1 and len(calls) == 1
    with pytest.raises(DataError, match="tiny"):                    # a cell that is missing needs the data
        sweep("compo", [0.5, 0.25], dataset=tiny)


def test_other_data_under_the_same_name_is_noticed(tiny, calls, home):
    run(method="compo", dataset=tiny, budget=0.5)
    folder = home / "data" / "tiny"
    folder.rename(home / "elsewhere")
    cell = Cell("full", tiny)
    assert cell.run_id
    (home / "elsewhere").rename(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | dict(fingerprint="changed")))
    with pytest.raises(CellError, match="other data"):
        fill([cell])
    assert fill([Cell("full", tiny)])["data_fingerprint"][0] == "changed"


# -- several processes ------------------------------------------------------------------------------------------------

def square(x):
    return os.environ["OMP_NUM_THREADS"], x * x


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    found = dict(executors.processes(1)(square, [1, 2, 3]))
    threads = str(executors.cores())
    assert found == {1: (threads, 1), 2: (threads, 4), 3: (threads, 9)}
    assert os.environ["OMP_NUM_THREADS"] == "77"
    assert list(executors.processes(3)(square, [])) == []
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="processes"):
            executors.processes(wrong)


def test_a_killed_worker_costs_only_its_own_cell():
    cells = fakes("a", "killed", "b", "broken", "c", "d")
    table = fill(cells, processes=2).set_index("method")
    assert list(table["status"]) == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert table["threads"]["a"] == max(1, executors.cores() // 2)
    assert "SIGKILL" in table["reason"]["killed"] and "ZeroDivisionError" in table["reason"]["broken"]
    assert sorted(measured()) == sorted(c.run_id for c in cells) and not multiprocessing.active_children()
    (home_of() / "spared").touch()
    assert list(fill(cells)["status"]) == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert len(measured()) == 6 + 2                          # the failed ones only; the claim of the dead is free


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to tell who lives")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\nfrom ecstudy.study import executors\n"
        f"def work(name):\n    pathlib.Path({str(tmp_path)!r}, name).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(executors.processes(2)(work, ['a', 'b']))\n")
    parent = subprocess.Popen([sys.executable, str(script)],
                              env=os.environ | {"PYTHONPATH": str(rows_of.paths.PACKAGE.parent)})
    try:
        working = [tmp_path / name for name in ("a", "b")]
        assert within(60, lambda: all(path.is_file() and path.read_text() for path in working))
        pids = [int(path.read_text()) for path in working]
        assert all(map(alive, pids))
    finally:
        parent.kill()                                        # it alone, without a word to its workers
        parent.wait()
    assert within(20, lambda: not any(map(alive, pids)))


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_without_a_main_guard_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from ecstudy.study import executors\nfor _ in executors.processes(1)(print, [1]): pass\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(rows_of.paths.PACKAGE.parent)})
    assert done.returncode != 0 and "if __name__ == '__main__':" in done.stderr.splitlines()[-1]


HOLDER = """import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), "somewhere", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()"""


@pytest.fixture
def holder(home):
    """Starts another process that holds the claim of a cell until its input is closed or it is killed."""
    pytest.importorskip("fcntl", reason="the holder locks as Unix does")
    started = []

    def start(cell):
        path = home / "runs" / "claims" / cell.run_id
        path.parent.mkdir(parents=True, exist_ok=True)
        other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(other)
        assert other.stdout.readline() == b"held\n"
        return other

    yield start
    for other in started:
        other.kill()
        other.communicate()


def test_a_claim_excludes_others(holder):
    (cell,) = fakes("a")
    other = holder(cell)
    with store.claim(cell.run_id) as ours:
        assert not ours
    with pytest.raises(CellError, match=f"being run by process {other.pid} on somewhere"):
        run(cell)
    with ThreadPoolExecutor(1) as pool:                              # a sweep waits, and takes the row of the other
        waiting = pool.submit(fill, [cell, *fakes("b")])
        while len(files()) < 1:
            time.sleep(0.01)                                         # meanwhile it does the rest
        assert not waiting.done()
        store.write(cell.row(OK | dict(auc=0.9)))
        other.communicate()
        table = waiting.result(timeout=60)
    assert list(table["auc"]) == [0.9, 0.5] and len(measured()) == 1


def test_a_claim_ends_with_its_holder(holder, home):
    (cell,) = fakes("a")
    other = holder(cell)
    other.kill()                                                     # no good-bye: the file of the claim stays
    other.communicate()
    claim = home / "runs" / "claims" / cell.run_id
    assert claim.exists() and list(fill([cell])["status"]) == ["ok"] and not claim.exists()


def test_two_sweeps_at_once_share_the_work():
    cells = fakes("slow", "slow(a=1)", "slow(a=2)", "slow(a=3)")
    with ThreadPoolExecutor(2) as pool:                              # a claim excludes threads as it does processes
        one, two = pool.map(fill, [cells, cells[::-1]])
    assert sorted(measured()) == sorted(c.run_id for c in cells)
    assert list(one["run_id"]) == list(two["run_id"])[::-1]


# -- the store --------------------------------------------------------------------------------------------------------

def some_row(**more):
    return rows_of.complete(dict(run_id="r1", section="s", status="ok", method="compo", dim=16, seed=0) | more)


def test_tables_have_the_same_columns_and_types_whatever_the_rows():
    empty, full = results(), None
    assert tuple(empty.columns) == COLUMNS and len(empty) == 0
    store.write(some_row(auc=0.75, dirty=True, bytes_full=2_160_804_928, stage_seconds={"train": 1.5}))
    store.write(some_row(run_id="r2", status="failed", reason="x"))
    full = results()
    assert len(full) == 2 and list(full.dtypes) == list(empty.dtypes)
    first = full.set_index("run_id").loc["r1"]
    assert first["stage_seconds"] == '{"train": 1.5}' and first["bytes_full"] == 2_160_804_928 and first["dirty"]
    assert np.isnan(first["logloss"]) and first["reason"] == ""


def test_results_are_filtered_by_column():
    for index, (budget, method) in enumerate([(0.5, "compo"), (0.1, "compo"), (None, "full"), (4096, "robe")]):
        store.write(some_row(run_id=f"r{index}", budget=budget, method=method))
    assert list(results(method="compo")["budget"]) == [0.5, 0.1]
    assert list(results(budget=[0.1, 4096])["method"]) == ["compo", "robe"]
    assert list(results(budget=None)["method"]) == ["full"]
    assert list(results(method=["full", "robe"], status="ok")["method"]) == ["full", "robe"]
    with pytest.raises(CellError, match="did you mean method"):
        results(methd="compo")


def test_rows_are_checked_when_they_are_made():
    with pytest.raises(CellError, match="unknown column 'acu'"):
        some_row(acu=0.5)
    with pytest.raises(CellError, match="status 'fine'"):
        some_row(status="fine")
    with pytest.raises(CellError, match="run_id"):
        rows_of.complete(dict(status="ok"))
    row = some_row(auc=float("nan"), logloss=float("inf"), seconds=np.float32(1.5), steps=np.int64(7))
    assert row["auc"] is None and row["logloss"] is None and row["seconds"] == 1.5 and row["steps"] == 7


def test_publication_keeps_what_matters_and_is_stable():
    awkward = dict(reason='a "quote", a comma\nand a line', lr=0.00030000000000000003, budget=216_080_493,
                   bytes_inference=216_080_492, auc=0.7512345678, seconds=12345.6789, dirty=True, seed=2**62,
                   stage_seconds={"train": 1.25})
    store.write(some_row(**awkward))
    store.write(some_row(run_id="r2", seed=1, budget=0.1, auc=0.5))
    store.write(some_row(run_id="r3", status="failed", reason="x"))
    store.write(some_row(run_id="r4", section="other"))
    path = publish(section="s")
    assert path == home_of() / "results" / "s.csv"
    text = path.read_bytes()
    read = {row["run_id"]: row for row in store.read_csv(path)}
    assert set(read) == {"r1", "r2"}                                 # neither failures nor other sections
    for name, value in awkward.items():
        expected = json.dumps(value) if isinstance(value, dict) else value
        assert read["r1"][name] == (pytest.approx(expected, rel=1e-5) if name in ("auc", "seconds", "lr") else expected)
    assert read["r1"]["lr"] == pytest.approx(0.0003, rel=1e-14) and read["r1"]["auc"] == 0.751235
    assert publish(section="s") == path and path.read_bytes() == text
    for cached in (home_of() / "runs" / "rows").iterdir():
        cached.unlink()
    pd.testing.assert_frame_equal(results(), rows_of.frame(read.values()).sort_values(
        store.SORT, ascending=[c != "budget" for c in store.SORT], ignore_index=True))
    store.write(some_row(run_id="r5", seed=9, auc=0.6))
    publish(section="s")
    assert {row["run_id"] for row in store.read_csv(path)} == {"r1", "r2", "r5"}


def test_cached_rows_win_unless_they_failed():
    store.write(some_row(auc=0.7))
    publish(section="s")
    store.write(some_row(auc=0.8, section="t"))
    assert list(results()["auc"]) == [0.8] and list(results(section="s")["auc"]) == [0.8]
    store.write(some_row(status="failed", reason="x"))
    assert list(results()["status"]) == ["ok"] and list(results()["auc"]) == [0.7]
    assert set(results()["section"][0].split("+")) == {"s", "t"}


def test_publishing_nothing_or_nowhere_is_an_error(home):
    with pytest.raises(CellError, match="nothing to publish"):
        publish(section="s")
    with pytest.raises(CellError, match="section or a path"):
        publish()
    assert not (home / "results").exists()


def test_files_that_are_not_rows(home):
    (home / "results").mkdir()
    (home / "results" / "paper.csv").write_text("method,auc\nfull,0.8\n")
    assert results().empty
    (home / "results" / "bad.csv").write_text("run_id,nonsense\nr1,1\n")
    with pytest.raises(CellError, match="bad.csv.*nonsense"):
        results()
    (home / "results" / "bad.csv").write_text("run_id,auc\nr1,high\n")
    with pytest.raises(CellError, match="bad.csv, line 2"):
        results()


def test_nothing_half_written_is_read_or_left(monkeypatch):
    store.write(some_row(auc=0.7))

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        store.write(some_row(auc=0.9))
    assert files() == ["r1.json"] and list(results()["auc"]) == [0.7]


# -- time left --------------------------------------------------------------------------------------------------------

def test_the_time_left_is_learnt_by_kind():
    clock = Clock(workers=2)
    cells = fakes("a", "b")
    assert clock.left(cells) is None
    clock.add(some_row(spec="a", model="dlrm", seconds=10.0))
    clock.add(some_row(spec="x", model="dlrm", seconds=30.0))
    clock.add(some_row(spec="a", model="dlrm", status="failed", seconds=1e9))
    assert clock.left(cells) == (10 + 20) / 2                         # a as measured, b as the mean of all; two workers
    assert clock.left([]) == 0
    # another log: there b takes twice as long as a, and c cannot reach a tenth
    there = [some_row(spec=spec, model="dlrm", seconds=s, budget=0.1) for spec, s in (("a", 4.0), ("b", 8.0))]
    there.append(some_row(spec="c", model="dlrm", status="unreachable", seconds=None, budget=0.1))
    clock = Clock(elsewhere=there)
    cells = [replace(cell, budget=0.1) for cell in fakes("a", "b", "c", "d")]
    assert clock.left(cells) is None
    clock.add(some_row(spec="a", model="dlrm", seconds=10.0, budget=0.5))
    assert clock.left(cells) == pytest.approx(10 + 20 + 0 + 10)        # d is known nowhere: the mean
    assert [duration(s) for s in (None, 0.42, 12, 200, 3900)] == ["?", "0.4 s", "12 s", "3 min 20 s", "1 h 05 min"]


def test_progress_is_quiet_unless_asked(capsys):
    fill(fakes("a"))
    assert capsys.readouterr() == ("", "")
    fill(fakes("b"), progress=True)
    assert "runs 1/1 ok: b on anything" in capsys.readouterr().err
