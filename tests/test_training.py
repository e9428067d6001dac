"""The loop: schedules by a fake run, early stopping, shared stages, and the whole path on data with a known ceiling."""
from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from traits import trait

import ecstudy as ec
from ecstudy import models
from ecstudy.budget import full_bytes
from ecstudy.data import DatasetWriter, open_dataset
from ecstudy.data.layout import Dataset
from ecstudy.memory import memory
from ecstudy.method import Step
from ecstudy.registry import names
from ecstudy.study.row import Cell
from ecstudy.training import Optimizers, Run, Settings, timeline
from ecstudy.training.batches import Batches
from ecstudy.training.timeline import FakeRun, example

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Dataset:
    """3,000 rows whose label follows from two fields and one number."""
    rng = np.random.default_rng(0)
    sizes = [40, 12, 300]
    effects = [rng.normal(size=n) for n in sizes]
    folder = tmp_path_factory.mktemp("data") / "small"
    with DatasetWriter(folder, name="small", fields=["a", "b", "c"], cardinalities=sizes, dense=["x"]) as writer:
        for split, rows in (("train", 3000), ("valid", 600), ("test", 700)):
            ids = np.stack([rng.integers(0, n, rows) for n in sizes], 1)
            x = rng.normal(size=(rows, 1))
            logit = 1.5 * effects[0][ids[:, 0]] * effects[1][ids[:, 1]] + effects[2][ids[:, 2]] + x[:, 0]
            writer.append(split, ids, x, rng.random(rows) < 1 / (1 + np.exp(-logit)))
    return Dataset.open(folder)


def make_run(dataset, spec="full", budget=1.0, device="cpu", **settings) -> Run:
    settings = Settings(**({"lr": 0.005, "batch": 64, "max_epochs": 3} | settings))
    emb = ec.make(spec, dataset.cardinalities, 8, budget, seed=settings.seed, counts=dataset.counts)
    head = models.make("dlrm", fields=3, dim=8, dense=1, seed=settings.seed)
    return Run(emb, head, dataset, settings, device=device)


def test_schedules_by_a_fake_run():
    assert timeline("full") == [("train", 4, "all")]
    assert [(stage, update) for stage, _, update in timeline("deeplight")] == [("warm-up", "all"), ("prune", "all")]
    assert timeline("autosrh") == [("warm-up", 4, "all"), ("search", 4, "emb"), ("search", 4, "aux"),
                                   ("fine-tune", 4, "all")]
    assert timeline("autosrh(order='published')")[-1] == ("retrain", 4, "all")
    for name in names(trains=True):
        stages = [stage for stage, _, _ in timeline(name)]
        assert stages and len(set(stages)) <= 3, name


def test_autosrh_alternates_training_and_validation_rows():
    emb, run = example("autosrh"), FakeRun()
    steps = [(step.split, step.update if isinstance(step.update, str) else "gates") for step in emb.schedule(run)]
    assert steps[4:12] == [("train", "emb"), ("valid", "gates")] * 4
    assert [stage["fresh"] for stage in run.stages] == [True, True, True]
    assert not emb.aux.gate.requires_grad


def test_deeplight_prunes_only_once_warm_and_reaches_its_budget():
    emb, run = example("deeplight"), FakeRun(steps_per_epoch=400)
    cells, kept, seen = emb.fields.n * emb.dim, emb.kept, []
    for step in emb.schedule(run):
        seen.append((step.stage, int((emb.table.weight != 0).sum())))
    assert all(count == cells for stage, count in seen if stage == "warm-up")
    pruning = [count for stage, count in seen if stage == "prune"]
    assert len(pruning) >= 200 and pruning == sorted(pruning, reverse=True)
    assert int((emb.table.weight != 0).sum()) == kept
    assert [stage["gated"] for stage in run.stages] == [False, True] and not run.stages[1]["fresh"]


def test_deeplight_follows_the_published_curve():
    emb = example("deeplight(every=1)")
    cells = emb.fields.n * emb.dim
    share = 1 - emb.kept / cells
    for t in (1, 100, 6_873, 30_000):
        expected = cells * (1 - share * (1 - 0.99 ** (t / 100)))          # the paper's code: s (1 - 0.99^(t/100))
        assert emb.allowed(t, 68_732) == pytest.approx(expected, rel=1e-4, abs=1)
    assert emb.allowed(68_732, 68_732) == emb.allowed(10 ** 6, 68_732) == emb.kept


@every_device
def test_what_deeplight_measures_is_what_it_ships(small, device):
    """Every evaluation and the deployed table hold at most the allowed non-zeros."""
    run = make_run(small, "deeplight(ramp=20)", 0.05, device)
    kept, seen = run.emb.kept, []
    inner = run.evaluate

    def evaluate(batches):
        value = inner(batches)
        seen.append((run.emb.target, int((run.emb.table.weight != 0).sum())))
        return value

    run.evaluate = evaluate
    run.go()
    assert all(nonzero <= target for target, nonzero in seen if target is not None)
    assert seen[-1][0] == kept
    trained = run.emb.table.weight.detach().clone()
    before = inner(run.valid)
    run.emb.deploy()
    assert int((run.emb.table.values.weight != 0).sum()) <= kept
    assert memory(run.emb) <= 0.05 * full_bytes(small.cardinalities, 8)
    assert int((trained != 0).sum()) <= kept and inner(run.valid) == before


def test_autosrh_fine_tunes_what_is_left(small):
    """Pruned values stay zero through the last stage, and what is measured is what ships."""
    run = make_run(small, "autosrh", 0.1, max_epochs=2)
    seen, inner = {}, run.execute

    def execute(step):
        inner(step)
        seen.setdefault(step.stage, []).append(run.emb.table.weight.detach().clone())

    run.execute = execute
    run.go()
    tuned = seen["fine-tune"]
    zero = tuned[0] == 0
    assert int((~zero).sum()) == run.emb.kept and all(torch.equal(weight == 0, zero) for weight in tuned)
    assert not torch.equal(tuned[0], tuned[-1]) and (run.emb.aux.gate == 1).all()
    before = run.evaluate(run.valid)
    run.emb.deploy()
    assert run.evaluate(run.valid) == before


def test_a_network_that_says_the_same_of_all_rows_stops_early(small):
    run = make_run(small, max_epochs=30, patience=4, evals_per_epoch=2)
    for parameter in run.head.parameters():
        parameter.requires_grad_(False).zero_()
    run.go()
    assert run.best == 0.5 and run.steps == 5 * (run.steps_per_epoch // 2)


def test_early_stopping_restores_the_best_state(small):
    run = make_run(small, lr=0.03, max_epochs=30, patience=4)
    seen = []
    inner = run.evaluate
    run.evaluate = lambda batches: seen.append(inner(batches)) or seen[-1]
    run.go()
    best = max(seen)
    assert inner(run.valid) == best == run.best
    assert seen.index(best) < len(seen) - 1 and len(seen) - 1 - max(i for i, v in enumerate(seen) if v == best) == 4
    assert run.steps == len(seen) * max(1, len(run.train) // 10)


def test_test_rows_are_not_opened_while_training(small, monkeypatch):
    opened = []
    inner = Dataset.split
    monkeypatch.setattr(Dataset, "split", lambda self, name: opened.append(name) or inner(self, name))
    make_run(small, "autosrh", 0.5).go()
    assert set(opened) == {"train", "valid"}


def test_selection_on_test_rows_looks_at_them_and_at_no_others(small):
    chosen = {}
    for select in ("valid", "test"):
        run = make_run(small, lr=0.03, max_epochs=20, patience=4, select=select)
        seen = []
        run.evaluate = lambda batches, run=run, seen=seen: seen.append(batches) or Run.evaluate(run, batches)
        run.go()
        assert {b.split is run.judge.split for b in seen} == {True}
        chosen[select] = Run.evaluate(run, Batches(small, "test", 512)), run.best
    assert chosen["test"][0] == pytest.approx(chosen["test"][1])       # what it selects by is what it reports
    assert chosen["test"][0] >= chosen["valid"][0]


def test_schedules_of_the_learning_rate(small):
    def rates(schedule, **settings):
        run = make_run(small, "full", schedule=schedule,
                       **settings)
        seen, step = [], run.execute
        run.execute = lambda s: (seen.append(run.optimizers.lr), step(s))
        run.go()
        groups = [g["lr"] for o in (run.optimizers.head_dense,) for g in o.param_groups]
        assert groups == [run.optimizers.rows.lr] == [run.optimizers.lr]
        return np.array(seen), run

    constant, _ = rates("constant")
    assert (constant == 0.005).all()
    cosine, run = rates("cosine", max_epochs=2, patience=100)
    total = 2 * run.steps_per_epoch
    assert np.allclose(cosine, 0.005 * 0.5 * (1 + np.cos(np.pi * np.arange(total) / total)))
    plateau, _ = rates("plateau", lr=0.03, max_epochs=30, patience=4)
    ratios = np.unique(np.round(plateau[1:] / plateau[:-1], 6))
    assert set(ratios) == {0.1, 1.0} and plateau[0] == 0.03


@every_device
def test_runs_repeat_exactly_and_differ_by_seed(small, device):
    def weights(seed):
        run = make_run(small, "int_quant", 0.25, device, seed=seed, max_epochs=1)
        run.go()
        return run.emb.table.codes.cpu(), run.best

    (a, best), (b, again), (c, _) = weights(0), weights(0), weights(1)
    if device == "cpu":
        assert torch.equal(a, b) and best == again
    assert not torch.equal(a, c)


@pytest.mark.parametrize("first, second", [("deeplight", "autosrh"), ("autosrh", "deeplight"), ("autosrh", "autosrh"),
                                           ("autosrh(order='published')", "autosrh(order='published')")])
def test_shared_stages_are_trained_once_and_change_nothing(small, tmp_path, first, second):
    def trained(spec, budget, cache):
        run = make_run(small, spec, budget)
        run.cache, run.shared_key = cache, {"model": "dlrm"}
        run.go()
        run.emb.deploy()
        return run

    alone = trained(second, 0.1, tmp_path / "alone")
    trained(first, 0.3, tmp_path / "both")
    stages = len(list((tmp_path / "both").iterdir()))
    reused = trained(second, 0.1, tmp_path / "both")
    if first == second:
        assert len(list((tmp_path / "both").iterdir())) == stages == (3 if "published" in first else 2)
    assert reused.stage_seconds.keys() == alone.stage_seconds.keys() and reused.steps == alone.steps
    a, b = alone.emb.state_dict(), reused.emb.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_time_between_stages_counts(small):
    """An evolutionary search, centroids that are looked for: what no stage has, and each second once."""
    run = make_run(small, "full")

    def schedule(run):
        yield from run.fit("first")
        time.sleep(0.4)
        yield from run.fit("second")

    run.emb.schedule = schedule
    begin = time.perf_counter()
    run.go()
    whole = time.perf_counter() - begin
    assert list(run.stage_seconds) == ["first", "second", "between"] and run.stage_seconds["between"] >= 0.4
    assert sum(run.stage_seconds.values()) <= whole


def test_another_seed_or_setting_does_not_share(small, tmp_path):
    files = set()
    for settings in ({}, {"seed": 1}, {"lr": 0.004}, {"schedule": "cosine"}, {"schedule": "constant"}):
        run = make_run(small, "deeplight", 0.1, **settings)
        run.cache, run.shared_key = tmp_path, {"model": "dlrm"}
        files.add(run._shared_file("full"))
    assert len(files) == 4


def test_batches_cover_an_epoch_in_a_seeded_order(small):
    batches = Batches(small, "train", 64, seed=5)
    stream = batches.epochs()
    epoch = torch.cat([next(stream)[0] for _ in range(len(batches))])
    assert len(batches) == 3000 // 64 and len(epoch) == 64 * len(batches)
    again = Batches(small, "train", 64, seed=5).epochs(skip=3)
    assert torch.equal(next(again)[0], epoch[3 * 64:4 * 64])
    other = torch.cat([next(stream)[0] for _ in range(len(batches))])
    assert not torch.equal(epoch, other)
    assert sum(len(label) for _, _, label in batches.once()) == 3000


def test_batches_from_a_memory_map_equal_those_in_memory(small, monkeypatch):
    held = [next(Batches(small, "train", 64, seed=2).epochs()) for _ in range(1)]
    monkeypatch.setattr("ecstudy.training.batches.IN_MEMORY", 0)
    mapped = [next(Batches(small, "train", 64, seed=2).epochs()) for _ in range(1)]
    for a, b in zip(held[0], mapped[0]):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_step_on_the_embedding_alone_leaves_the_head(small):
    run = make_run(small)
    run.optimizers = Optimizers(run.emb, run.head, 0.01)
    head = [p.detach().clone() for p in run.head.parameters()]
    table = run.emb.table.weight.detach().clone()
    run.execute(Step(update="emb"))
    assert all(torch.equal(a, b) for a, b in zip(head, run.head.parameters()))
    assert not torch.equal(table, run.emb.table.weight)


def test_sparse_wide_weights_of_a_head_train(small):
    emb = ec.make("full", small.cardinalities, 8)
    head = models.make("wdl", fields=3, dim=8, dense=1, seed=0, wide="ids", wide_size=64)
    run = Run(emb, head, small, Settings(batch=64, max_epochs=1))
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    run.go()
    assert run.optimizers.head_sparse is not None
    assert all(not torch.equal(before[name], p) for name, p in head.named_parameters())


def test_divergence_is_a_row_not_a_crash(small):
    row = Cell("full", small.folder, lr=1e6, batch=64, max_epochs=1).measure()
    assert row["status"] == "diverged" and "NaN or infinite" in row["reason"]


def test_unreachable_is_a_row_that_costs_nothing(small):
    row = Cell("int_quant", small.folder, budget=0.1).measure()
    assert row["status"] == "unreachable" and row["reached"] == 0.25 and "auc" not in row


@every_device
@pytest.mark.parametrize("spec", names(trains=True))
def test_a_cell_measures_everything(small, spec, device):
    cell = Cell(spec + trait(spec, "options"), small.folder, dim=8, budget=trait(spec, "budget"), batch=64,
                max_epochs=1, device=device)
    row = cell.row(cell.measure())
    assert row["status"] == "ok" and 0.5 < row["auc_low"] < row["auc"] < row["auc_high"] < 1
    for name in ("logloss", "ne", "valid_auc", "seconds", "steps", "latency_ms", "latency_full_ms", "forward_ms"):
        assert row[name] > 0, name
    full = full_bytes(small.cardinalities, 8)
    assert row["bytes_full"] == full and row["bytes_inference"] <= row["budget_bytes"] <= full
    expected = {"full": 3, "int_quant": 2.5, "deeplight": 3}.get(spec)
    if expected:
        assert row["bytes_training"] == expected * full
    if spec == "autosrh":                            # plus one byte per id and 6 x 8 gates
        assert row["bytes_training"] == 3 * full + sum(small.cardinalities) + 6 * 8 * 4


def test_on_data_with_a_known_ceiling_full_comes_close_and_methods_order_sensibly():
    """End to end: Full within 0.01 of the attainable AUC, collisions cost, more bytes help the hash trick."""
    dataset = open_dataset("synthetic_easy")
    ceiling = dataset.meta["ceiling"]["auc_test"]

    def auc(spec, budget):
        cell = Cell(spec, "synthetic_easy", budget=budget, batch=512, lr=0.003, max_epochs=6, patience=6)
        return dataclasses.replace(cell).measure()["auc"]

    full, half, tenth = auc("full", None), auc("hash_trick", 0.5), auc("hash_trick", 0.02)
    assert ceiling - 0.01 <= full <= ceiling + 0.005
    assert full - 0.002 > half > tenth and tenth > 0.55
    assert auc("int_quant", 0.5) > full - 0.005                   # 16 bits lose next to nothing
