"""Two processes take the steps of one: weights and AUC of every method that may, and what is refused."""
from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import ecstudy as ec
from ecstudy import models
from ecstudy.data import DatasetWriter
from ecstudy.data.layout import Dataset
from ecstudy.registry import names
from ecstudy.study import Cell, CellError, fill, run
from ecstudy.training import Run, Settings, distributed
from ecstudy.training.batches import Batches

# 61 rows do not divide by two: slices of 31 and 30
SETTINGS = dict(lr=0.002, batch=61, max_epochs=1.0, evals_per_epoch=3, seed=3)
SPECS = {
    "adapt_emb": 0.5, "autosrh": 0.5, "auto_dim(widths=[8, 2, 4])": None, "compo": 0.5, "dedup": 0.5, "deeplight": 0.5,
    "full": None, "hash_trick": 0.5, "int_quant": 0.5, "mde": 0.5, "opt_embed(widths=[8, 2, 4])": None, "robe": 0.5,
    "small_dim": 0.5, "top_k": 0.5, "tt_rec": 0.5, "compo|int8": 0.5, "double_hash": 0.5, "memcom": 0.5, "unified": 0.5,
    "binary_code": 0.5, "amtl": 0.5, "ham(orth=0)": 0.5, "mag_prune": 0.5, "pep(decay=0)": 0.5, "sseds(batches=6)": 0.5,
    "cce(every=0.5)": 0.5, "fp16": 0.5, "mixed_prec": 0.5, "post4bits": 0.5, "split": 0.5,
}
CELL = dict(method="full", dataset="small", dim=8, batch=61, max_epochs=1, lr=0.002)
EXACT_TO = 1e-4              # of weights of the order of 0.1, after float32 sums in another order


def trained(folder: str, spec: str, budget, group=None, **more) -> dict:
    """Final weights and logits of a short training."""
    dataset = Dataset.open(folder)
    settings = Settings(**(SETTINGS | more))
    emb = ec.make(spec, dataset.cardinalities, 8, budget, seed=3, counts=dataset.counts)
    head = models.make("wdl", fields=3, dim=8, dense=1, seed=3)
    training = Run(emb, head, dataset, settings, group=group)
    training.go()
    if group is not None:
        group.agree(emb, head)
    weights = {f"emb.{k}": v.numpy().copy() for k, v in emb.state_dict().items()}
    weights |= {f"head.{k}": v.numpy().copy() for k, v in head.state_dict().items()}
    with torch.no_grad():
        emb.before_evaluation()
        emb.deploy()
    _, logit = training.logits(Batches(dataset, "test", 100))
    return weights | dict(best=training.best, steps=training.steps, logit=logit.numpy())


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes: trains every method and, if the first, writes what came of it."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    group = distributed.Group()
    tables(group)
    for number, (spec, budget) in enumerate(SPECS.items()):
        found = trained(folder, spec, budget, group)
        if rank == 0:
            np.savez(f"{folder}/{number}.npz", **found)
    warm_ups(group, folder)
    drift = torch.nn.Linear(2, 2)
    with torch.no_grad():
        drift.weight.fill_(rank)
    with pytest.raises(RuntimeError, match="hold different weights"):
        group.agree(drift)
    dist.destroy_process_group()


def tables(group) -> None:
    """The exchange by hand: overlapping rows, a table only one process touched, one that none did, a 1-D array."""
    mine = [[(torch.tensor([1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])), None, None,
             (torch.tensor([7]), torch.tensor([0.5]))],
            [(torch.tensor([0, 4, 9]), torch.tensor([[5.0, 6.0], [7.0, 8.0], [9.0, 10.0]])),
             (torch.tensor([2]), torch.tensor([[1.0, 1.0, 1.0]])), None, None]][group.rank]
    a, b, c, d = group.rows(mine, [(10, 2), (3, 3), (4, 2), (8,)])
    assert a[0].tolist() == [0, 1, 4, 9] and a[1].tolist() == [[5, 6], [1, 2], [10, 12], [9, 10]]
    assert b[0].tolist() == [2] and b[1].tolist() == [[1, 1, 1]] and c is None
    assert d[0].tolist() == [7] and d[1].tolist() == [0.5]
    never, once, both = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0 + group.rank])
    if group.rank:
        once.grad = torch.tensor([3.0, 4.0])
    group.parameters([never, once, both])
    assert never.grad is None and once.grad.tolist() == [3, 4] and both.grad.tolist() == [2, 5]
    assert group.tell({"a": group.rank}) == {"a": 0} and not group.all(group.rank == 0) and group.all(True)


def warm_ups(group, folder) -> None:
    """One process keeps a shared stage, both take it; only if both see it."""
    if importlib.util.find_spec("safetensors") is None:
        return
    dataset, seconds = Dataset.open(folder), []
    for cache in ("kept", "kept", f"kept-by-{group.rank}", f"kept-by-{group.rank}"):
        emb = ec.make("dedup", dataset.cardinalities, 8, 0.5, seed=3)
        head = models.make("wdl", fields=3, dim=8, dense=1, seed=3)
        training = Run(emb, head, dataset, Settings(**SETTINGS), group=group, cache=f"{folder}/{cache}", shared_key={})
        training.go()
        seconds.append(group.tell(training.stage_seconds["warm-up"]) if group.rank == 0 else group.tell())
        files = os.listdir(f"{folder}/kept")
        assert len(files) == 1 and training.steps >= 52
    assert seconds[0] == seconds[1] and len(set(seconds)) == 3 and not os.path.exists(f"{folder}/kept-by-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    sizes = [40, 12, 300]
    effects = [rng.normal(size=n) for n in sizes]
    home = tmp_path_factory.mktemp("home")
    with DatasetWriter(home / "data" / "small", name="small", fields=list("abc"), cardinalities=sizes,
                       dense=["x"]) as writer:
        for split, rows in (("train", 1600), ("valid", 300), ("test", 450)):
            ids = np.stack([rng.integers(0, n, rows) for n in sizes], 1)
            x = rng.normal(size=(rows, 1))
            logit = 1.5 * effects[0][ids[:, 0]] * effects[1][ids[:, 1]] + effects[2][ids[:, 2]] + x[:, 0]
            writer.append(split, ids, x, rng.random(rows) < 1 / (1 + np.exp(-logit)))
    return str(home / "data" / "small")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def together(folder) -> str:
    """What two processes made of every method, in files beside the data."""
    torch.multiprocessing.spawn(work, (free_port(), folder), nprocs=2)
    return folder


def furthest(found: dict, expected: dict) -> float:
    floats = [name for name, value in expected.items() if np.asarray(value).dtype.kind == "f"]
    return max(float(np.abs(found[name] - expected[name]).max(initial=0)) for name in floats)


@pytest.mark.parametrize("number, spec", list(enumerate(SPECS)), ids=list(SPECS))
def test_two_processes_are_as_one(together, number, spec):
    found = dict(np.load(f"{together}/{number}.npz"))
    alone = trained(together, spec, SPECS[spec])
    assert found["steps"] == alone["steps"] >= 26 and found.keys() == alone.keys()
    if spec == "int_quant":              # a sum that ends in another bit may round another way, one step of the scale
        codes = np.abs(found["emb.table.codes"].astype(int) - alone["emb.table.codes"])
        assert codes.max() <= 1 and (codes > 0).mean() < 0.01
        assert abs(found["best"] - alone["best"]) < 1e-3
        return
    for name, value in alone.items():
        if np.asarray(value).dtype.kind in "biu":
            assert (found[name] == value).all(), name
    assert furthest(found, alone) < EXACT_TO
    assert abs(found["best"] - alone["best"]) < 1e-4


def test_half_of_each_batch_alone_leads_elsewhere(together):
    # what a missing exchange would give: the comparison above tells it from the whole batch
    alone, half = (trained(together, "full", None, **more) for more in ({}, dict(batch=31)))
    assert furthest({k: v for k, v in half.items() if k != "steps"}, alone) > 20 * EXACT_TO


def test_every_method_is_compared_or_refused():
    compared = {spec.split("(")[0].split("|")[0] for spec in SPECS}
    assert compared | set(distributed.WHOLE_BATCH) == set(names(trains=True))


@pytest.mark.parametrize("method", sorted(distributed.WHOLE_BATCH))
def test_methods_of_whole_batches_are_refused(method):
    spec = "adapt_emb(dynamic=True)" if method == "adapt_emb" else method
    with pytest.raises(CellError, match=f"{method} cannot run on 2 processes") as error:
        distributed.check(Cell(spec, "anything"), 2)
    assert "\n" not in str(error.value)


def test_what_cannot_be_divided_is_refused(monkeypatch):
    with pytest.raises(CellError, match="batch 3: expected at least one row for each of the 4 processes"):
        distributed.check(Cell("full", "anything", batch=3), 4)
    with pytest.raises(CellError, match="device 'cuda:1'.*write cuda"):
        distributed.check(Cell("full", "anything", device="cuda:1"), 2)
    assert distributed.started() == 1
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    assert distributed.started() == 2
    with pytest.raises(CellError, match="one cell together: use `ecstudy run`"):
        fill([Cell("full", "anything")])


def test_torchrun_runs_one_cell_and_writes_one_row(folder, monkeypatch):
    home = os.path.dirname(os.path.dirname(folder))
    words = ["run", "--method", "full", "--dataset", "small", "--dim", "8", "--batch", "61", "--max-epochs", "1",
             "--lr", "0.002", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "-m", "ecstudy", *words], capture_output=True, text=True, timeout=300,
        env=os.environ | {"ECSTUDY_HOME": home, "OMP_NUM_THREADS": "1",
                          "PYTHONPATH": str(ec.paths.PACKAGE.parent)})
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)                                    # one row is printed, not two
    assert row["status"] == "ok" and row["device"] == "cpu x2" and row["latency_ms"] > 0 and row["machine"]
    assert json.loads(row["settings"])["device"] == "cpu"
    assert os.listdir(f"{home}/runs/rows") == [f"{row['run_id']}.json"]
    assert os.listdir(f"{home}/runs/logits") == [f"{row['run_id']}.npy"]
    monkeypatch.setenv("ECSTUDY_HOME", home)
    assert run(**CELL)["device"] == "cpu x2"                         # the same run: it is there already
    alone = run(**CELL, force=True)
    assert alone["run_id"] == row["run_id"] and alone["device"] == "cpu" and alone["steps"] == row["steps"]
    assert abs(alone["auc"] - row["auc"]) < 1e-4 and abs(alone["logloss"] - row["logloss"]) < 1e-4


def test_a_refusal_comes_before_anything_waits(folder, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
                            ECSTUDY_HOME=os.path.dirname(os.path.dirname(folder))).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CellError, match="dhe cannot run on 2 processes: it normalises over the whole batch"):
        run(**CELL | dict(method="dhe"))
    assert not torch.distributed.is_initialized() and distributed.current() is None
