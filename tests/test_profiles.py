"""``ecstudy study``: a profile is measured once, whatever interrupts it."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ecstudy import paths
from ecstudy.study import CellError, profiles, results

PROFILE = """
profile: p/dlrm
section: mine
dataset: synthetic_criteo_xs
methods: [full, hash_trick, top_k]
budgets: [0.1]
seeds: [0, 1]
lrs: [0.001]
batch: 2048
evals_per_epoch: 1
patience: 1
max_epochs: 0.1
processes: {processes}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    data = paths.data()
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    if data.is_dir():                              # generated data made before is used, not made again
        (tmp_path / "data").symlink_to(data)
    folder = tmp_path / "notebooks" / "profiles" / "p"
    folder.mkdir(parents=True)
    (folder / "dlrm.yaml").write_text(PROFILE.format(processes=2))
    return tmp_path


def rows(home) -> dict:
    found = {}
    for path in (home / "runs" / "rows").glob("*.json"):
        row = json.loads(path.read_text())
        found[row["run_id"]] = row
    return found


def test_a_killed_study_goes_on_to_the_same_rows(home, monkeypatch):
    command = [sys.executable, "-m", "ecstudy", "study", "p", "--only", "dlrm"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(rows(home)) < 2 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = rows(home)
    assert 2 <= len(kept) < 9, "killed too late to be of use"
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "6 ok" in again.stdout, again.stderr
    whole = rows(home)
    assert len(whole) == 9 and {k: whole[k] for k in kept} == kept         # three yardsticks beside the six runs
    assert not list((home / "runs").rglob("*.tmp"))

    (home / "other" / "notebooks").mkdir(parents=True)                       # without interruption, in one process
    monkeypatch.setenv("ECSTUDY_HOME", str(home / "other"))
    (home / "other" / "data").symlink_to(home / "data")
    path = home / "notebooks" / "profiles" / "p" / "dlrm.yaml"
    alone = profiles.measure(path, processes=0)
    assert set(alone["run_id"]) == {k for k, r in whole.items() if r["model"] == "dlrm"}
    for row in alone.to_dict("records"):
        assert row["auc"] == pytest.approx(whole[row["run_id"]]["auc"], abs=1e-6)


def test_profiles_are_found_beside_the_package_too(home, monkeypatch):
    assert profiles.names() == ["p"]
    monkeypatch.setenv("ECSTUDY_HOME", str(home / "elsewhere"))
    if (paths.PACKAGE.parent / "notebooks").is_dir():
        assert "quick" in profiles.names()
    else:
        with pytest.raises(CellError, match="no profiles"):
            profiles.files("quick")


def test_publishing_writes_the_rows_of_the_profiles_data_alone(home):
    from ecstudy.study import run

    fast = dict(batch=2048, evals_per_epoch=1, patience=1, max_epochs=0.1, section="mine")
    run(method="full", dataset="synthetic_criteo_xs", **fast)
    run(method="full", dataset="synthetic_easy", **fast | dict(max_epochs=0.02))
    done = subprocess.run([sys.executable, "-m", "ecstudy", "study", "p", "--publish"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (home / "results" / "mine.csv").read_text()
    assert text.count("synthetic_criteo_xs,") and "synthetic_easy" not in text and len(results("mine")) == 2
