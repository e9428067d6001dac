"""Rows of several machines become one store; the Slurm script of the book asks for disjoint parts."""
from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ecstudy.rag.run import found, retrieved
from ecstudy.study import Cell, CellError, fill, results, store
from ecstudy.study import row as rows_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path / "here"))
    return tmp_path / "here"


def some_row(run_id="r1", created="2024-01-02T00:00:00+00:00", **more):
    return rows_of.complete(dict(run_id=run_id, section="s", status="ok", method="compo", created=created) | more)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """Writes rows into the store of another machine."""
    def write(*rows, logits=(), **more):
        with monkeypatch.context() as patch:
            patch.setenv("ECSTUDY_HOME", str(tmp_path / "there"))
            for row in rows:
                store.write(row, **more)
            for run_id in logits:
                store.write_logits(run_id, np.array([0.5, -1.0]))
        return tmp_path / "there"
    return write


def test_new_and_better_rows_are_taken_over_and_nothing_else(there):
    old, new = "2024-01-01T00:00:00+00:00", "2024-01-03T00:00:00+00:00"
    store.write(some_row("older", auc=0.1))
    store.write(some_row("newer", auc=0.1))
    store.write(some_row("good", auc=0.1))
    store.write(some_row("bad", created=new, status="failed", reason="x"))
    other = there(some_row("older", new, auc=0.2), some_row("newer", old, auc=0.2, section="t"),
                  some_row("good", new, status="failed", reason="y"), some_row("bad", old, auc=0.2),
                  some_row("only", old, auc=0.2), logits=["older", "newer"])
    assert store.merge(other) == dict(new=1, better=2, kept=2)
    found = results().set_index("run_id")
    assert found["auc"].to_dict() == dict(older=0.2, newer=0.1, good=0.1, bad=0.2, only=0.2)
    assert set(found["status"]) == {"ok"} and found["section"]["newer"] == "s+t"
    assert store.logits("older").tolist() == [0.5, -1.0] and store.logits("newer") is None
    assert store.merge(other) == dict(new=0, better=0, kept=5)
    for part in (other / "runs", other / "runs" / "rows"):           # whichever of its folders was copied
        assert store.merge(part)["kept"] == 5


def test_logits_of_a_row_that_came_back_alone_are_fetched(there):
    other = there(some_row("a"), some_row("b", "2024-01-01T00:00:00+00:00"), logits=["a", "b"])
    store.write(some_row("a"))
    store.write(some_row("b"))                                       # measured again here: those are not its logits
    assert store.merge(other)["kept"] == 2
    assert store.logits("a").tolist() == [0.5, -1.0] and store.logits("b") is None


def test_what_a_run_of_retrieval_found_comes_with_its_row(there):
    other = there(some_row("a", task="rag"), some_row("b", task="rag"))
    ids = np.array([[3, 1], [0, 2]], np.int32)
    (folder := other / "runs" / "rag").mkdir()
    np.savez(folder / "a.npz", ids=ids)
    np.savez(folder / "spans.npz", ids=ids)                          # of no row
    assert store.merge(other)["new"] == 2
    assert retrieved("a", 4, k=1).tolist() == [1, 0, 0, 1] and found("b") is None and found("spans") is None


def test_a_failure_comes_with_its_traceback(there, home):
    other = there(some_row("bad", status="failed", reason="x"), traceback="line 7")
    assert store.merge(other)["new"] == 1
    assert json.loads((home / "runs" / "rows" / "bad.json").read_text())["traceback"] == "line 7"


def test_what_are_no_rows_is_refused_before_anything_is_taken(there, tmp_path):
    with pytest.raises(CellError, match="nowhere: no rows there; expected"):
        store.merge(tmp_path / "nowhere")
    other = there(some_row("a"), some_row("z"))
    for text in ("{", "[]", "{}", json.dumps(some_row("another")), json.dumps(some_row("z") | {"status": "fine"})):
        (other / "runs" / "rows" / "z.json").write_text(text)
        with pytest.raises(CellError, match=r"z\.json: not a row") as error:
            store.merge(other)
        assert "\n" not in str(error.value) and results().empty


def test_the_command(there):
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from typer.testing import CliRunner

    from ecstudy import cli

    other = there(some_row("a"))
    done = CliRunner().invoke(cli.app, ["merge", str(other), str(other)])
    assert done.exit_code == 0 and done.stdout.splitlines() == [
        f"{other}: 1 new, 0 better, 0 already here", f"{other}: 0 new, 0 better, 1 already here"]
    refused = CliRunner().invoke(cli.app, ["merge", str(other / "nothing")])
    assert refused.exit_code == 2 and "no rows there" in refused.output


class Fake(Cell):
    fingerprint = "0123456789abcdef"

    def check(self):
        pass

    def measure(self, progress=None):
        if self.method == "broken":
            raise ZeroDivisionError("nothing to divide by")
        return dict(status="ok", auc=0.5, bytes_full=1000, bytes_inference=100, seconds=2.0)


def test_a_sweep_keeps_what_a_worker_wrote_elsewhere(tmp_path, monkeypatch):
    def elsewhere(work, items):
        for item in items:
            with monkeypatch.context() as patch:
                patch.setenv("ECSTUDY_HOME", str(tmp_path / "node"))
                outcome = work(item)
            yield item, outcome

    cells = [Fake(method, "anything") for method in ("a", "broken")]
    assert list(fill(cells, executor=elsewhere)["status"]) == ["ok", "failed"]
    assert len(list((tmp_path / "node" / "runs" / "rows").iterdir())) == 2
    assert [store.cached(c.run_id)["status"] for c in cells] == ["ok", "failed"]


@pytest.mark.parametrize("first", [0, 1])
def test_the_slurm_script_of_the_book_covers_every_part_once(tmp_path, first):
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "book" / "scale.md").read_text(), re.S)
    path = tmp_path / "sweep.sbatch"
    path.write_text(script.group(1))
    command = tmp_path / "bin" / "ecstudy"
    command.parent.mkdir()
    command.write_text('#!/bin/bash\necho "$ECSTUDY_HOME $@"\n')
    command.chmod(0o755)
    cells = [Fake("a", "anything", seed=seed) for seed in range(40)]
    from ecstudy.study.sweep import part

    seen, homes = [], set()
    for task in range(first, first + 4):
        environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
                                    "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "4"}
        environment.pop("ECSTUDY_HOME")
        done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shard = re.search(r"--shard (\S+)", done.stdout).group(1)
        seen += [c.run_id for c in part(cells, shard)]
        homes.add(done.stdout.split()[0])
    assert sorted(seen) == sorted(c.run_id for c in cells) and len(homes) == 1
