"""One pass over a log: what is predicted when, what a row and a trace say, and the figures, against loops by hand."""
from __future__ import annotations

import importlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, roc_auc_score

import ecstudy as ec
from ecstudy import models, paths
from ecstudy.budget import Unreachable
from ecstudy.data import DataError, DatasetWriter, open_dataset, synthetic
from ecstudy.data.layout import Dataset
from ecstudy.registry import names
from ecstudy.report import in_training as figures
from ecstudy.spec import parse
from ecstudy.study import CellError, profiles, results, store, stream
from ecstudy.study.stream import CHOICES, LADDER, StreamCell
from ecstudy.training import ManyStages, Optimizers, Settings, Stream
from ecstudy.training.timeline import FakeRun, example

SIZES, DIM, BATCH = [40, 12, 300], 8, 64
sweeping = importlib.import_module("ecstudy.study.sweep")


def write(folder, label=None, rows: int = 1000) -> Dataset:
    """``rows`` training rows in a fixed order; ``label`` changes their labels."""
    rng = np.random.default_rng(0)
    with DatasetWriter(folder, name=folder.name, fields=["z", "b", "c"], cardinalities=SIZES, dense=["x"]) as writer:
        for split, n in (("train", rows), ("valid", 30), ("test", 30)):
            ids, x = np.stack([rng.integers(0, n_f, n) for n_f in SIZES], 1), rng.normal(size=(n, 1))
            y = rng.random(n) < 1 / (1 + np.exp(-np.sin(ids).sum(1) - x[:, 0]))
            writer.append(split, ids, x, label(y) if label and split == "train" else y)
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Dataset:
    return write(tmp_path_factory.mktemp("data") / "log")


def made(spec: str, log: Dataset, budget=None, **options) -> Stream:
    emb = ec.make(spec, log.cardinalities, DIM, budget, seed=0, counts=log.counts)
    head = models.make("dlrm", fields=3, dim=DIM, dense=1, seed=0)
    return Stream(emb, head, log, Settings(lr=0.01, batch=BATCH), **options)


def rows_of(log: Dataset, start: int, stop: int):
    split = log.split("train")
    ids, dense, label = (torch.from_numpy(np.array(a[start:stop])) for a in (split.ids, split.dense, split.label))
    return ids.long(), dense, label.float()


# -- the pass ---------------------------------------------------------------------------------------------------------

def test_every_batch_is_predicted_before_it_is_trained_on(log):
    run = made("full", log, windows=3)
    run.go()
    emb = ec.make("full", log.cardinalities, DIM, seed=0)
    head = models.make("dlrm", fields=3, dim=DIM, dense=1, seed=0)
    opt, logits = Optimizers(emb, head, 0.01), []
    for start in range(0, 1000, BATCH):                      # 16 batches, the last of 40 rows
        ids, dense, label = rows_of(log, start, start + BATCH)
        with torch.no_grad():
            logits.append(head.eval()(emb.eval()(ids), dense, ids))
        opt.zero_grad()
        F.binary_cross_entropy_with_logits(head.train()(emb.train()(ids), dense, ids), label).backward()
        opt.step()
    np.testing.assert_array_equal(run.logit, torch.cat(logits).numpy())
    assert run.steps == 16 and run.seen == run.predicted == 1000
    y, p = np.asarray(log.split("train").label), 1 / (1 + np.exp(-run.logit.astype(float)))
    ends = [0, *(line["examples"] for line in run.trace)]
    assert ends == [0, 384, 704, 1000]                       # thirds of 1,000, each closed by a whole batch
    for line, first, last in zip(run.trace, ends, ends[1:]):
        own, rate = slice(first, last), y[first:last].mean()
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert line["auc"] == pytest.approx(roc_auc_score(y[own], run.logit[own]), abs=1e-12)
        assert line["logloss"] == pytest.approx(log_loss(y[own], p[own]), abs=1e-9)
        assert line["ne"] == pytest.approx(log_loss(y[own], p[own]) / entropy, abs=1e-9)
        assert "kept" not in line


class Watched(torch.nn.Module):
    """A head that writes down what it was shown, and whether gradients were wanted."""

    def __init__(self, head):
        super().__init__()
        self.head, self.shown = head, []

    def forward(self, embedded, dense, ids):
        self.shown.append((torch.is_grad_enabled(), self.training, ids.clone()))
        return self.head(embedded, dense, ids)


@pytest.mark.parametrize("spec, budget", [("full", None), ("fiited", 0.5), ("esapn", 0.75), ("cafe", 0.5)])
def test_the_order_is_that_of_the_file(log, spec, budget):
    run = made(spec, log, budget)
    run.head = watched = Watched(run.head)
    run.go()
    places = {tuple(rows_of(log, b * BATCH, b * BATCH + BATCH)[0][0].tolist()): b for b in range(16)}
    assert len(places) == 16
    said = [("train" if grad else "predict", places[tuple(ids[0].tolist())]) for grad, _, ids in watched.shown]
    assert all(grad == training for grad, training, _ in watched.shown)
    by_hand = [("predict", 0)]
    for b in range(16):
        by_hand.append(("train", b))
        if b < 15:
            by_hand.append(("predict", b + 1))
            if spec == "esapn":                              # its policy looks at the batch that comes
                by_hand.append(("train", b + 1))
    assert said == by_hand
    assert np.isfinite(run.logit).all()


@pytest.mark.parametrize("spec, budget", [("fiited", 0.3), ("esapn", 0.75), ("cafe", 0.5)])
def test_labels_that_come_later_change_no_prediction(tmp_path, log, spec, budget):
    def flip(y):
        return np.where(np.arange(len(y)) >= 5 * BATCH, ~y, y)

    other = write(tmp_path / "other", flip)
    a, b = (made(spec, one, budget) for one in (log, other))
    a.go(), b.go()
    np.testing.assert_array_equal(a.logit[:6 * BATCH], b.logit[:6 * BATCH])      # batch 5 was predicted before
    assert np.abs(a.logit[6 * BATCH:] - b.logit[6 * BATCH:]).max() > 0.01


def test_only_training_is_timed(log, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ecstudy.training.stream.time", SimpleNamespace(perf_counter=lambda: now[0]))
    run = made("esapn", log, 0.75, windows=4)
    forward = run.head.forward

    def slow(*args):
        now[0] += 1.0 if torch.is_grad_enabled() else 1000.0
        return forward(*args)

    run.head.forward = slow
    run.go()
    assert run.seconds == 16 + 15 == run.steps               # a policy's step for every batch but the first
    assert run.stage_seconds == {"train": 31.0} and run.trace[-1]["seconds"] == 31.0
    assert [line["seconds"] for line in run.trace] == [8.0, 16.0, 24.0, 31.0]
    assert run.trace[0]["per_second"] == 256 / 8.0


def test_what_is_kept_is_told(log):
    run = made("fiited", log, 0.4, windows=2)
    run.go()
    assert np.array(run.trace[-1]["kept"]).shape == (3, 4)
    assert np.array_equal(run.trace[-1]["kept"], run.emb.kept())
    assert all(np.sum(line["kept"]) <= run.emb.slots for line in run.trace)
    assert {line["training_bytes"] for line in run.trace} == {run.training_bytes} == {run.emb.training_bytes()}
    assert [r["step"] for r in run.emb.log] == list(range(1, 17))       # a tenth of 16 steps


def test_a_stream_has_one_stage(log):
    run = made("deeplight", log, 0.5)
    with pytest.raises(ManyStages, match="deeplight trains in several stages, 'prune' after the first.*fiited"):
        run.go()
    with pytest.raises(CellError, match="method 'deeplight': deeplight trains in several stages"):
        StreamCell("deeplight", str(log.folder), budget=0.5).check()
    with pytest.raises(CellError, match="autosrh"):
        stream.sweep("autosrh", 0.5, dataset=str(log.folder))
    for spec in ("full", "hash_trick", "fiited(chunks=2)", "esapn", *LADDER.values()):
        StreamCell(spec, str(log.folder), dim=16, budget=0.5).check()
    with pytest.raises(ValueError, match="windows=0"):
        made("full", log, windows=0)


def stages(name: str) -> int:
    run = FakeRun()
    for _ in example(name).schedule(run):
        pass
    return len(run.stages)


@pytest.mark.parametrize("name", [n for n in names(trains=True) if stages(n) == 1])
def test_every_method_of_one_stage_goes_through_a_stream(log, name):
    try:
        budget, run = 0.6, made(name, log, 0.6, windows=2)
    except Unreachable:                                      # a log of 352 ids is small for some
        budget, run = math.inf, made(name, log, windows=2)
    run.go()
    assert np.isfinite(run.logit).all() and np.std(run.logit[BATCH:]) > 0
    with torch.no_grad():
        run.emb.before_evaluation()
        run.emb.deploy()
    assert ec.memory(run.emb) <= budget * 4 * sum(SIZES) * DIM


def test_the_ladder_is_of_different_specs_each_written_once():
    assert len(set(LADDER.values())) == len(LADDER) == 9
    assert all(parse(spec).canonical == spec for spec in LADDER.values())
    emb = [ec.make(f"fiited(chunks=1, ratios={r!r}, slots=20)", SIZES, DIM, seed=0) for r in ("uniform", "dynamic")]
    for one in emb:                                          # with one position there is nothing to share out
        one.aux.slots.utility.copy_(torch.rand(352, 1, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(emb[0]._thresholds()[0], emb[1]._thresholds()[0])


# -- cells, rows, traces ----------------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch, log):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    shutil.copytree(log.folder, paths.data() / "log")
    return tmp_path


FAST = dict(dataset="log", dims=DIM, batch=BATCH, lrs=0.01, windows=4)


def test_a_row_tells_of_the_second_half(home):
    row = stream.sweep(["full", "hash_trick", "fiited"], 0.4, seeds=0, **FAST).set_index("method")
    assert (row["status"] == "ok").all() and (row["task"] == "stream").all() and (row["section"] == "in_training").all()
    run = made("full", open_dataset("log"))
    run.go()
    y = np.asarray(run.train.split.label[500:])
    assert row.loc["full", "auc"] == pytest.approx(roc_auc_score(y, run.logit[500:]), abs=1e-9)
    assert row.loc["full", "logloss"] == pytest.approx(log_loss(y, 1 / (1 + np.exp(-run.logit[500:].astype(float)))))
    assert row.loc["full", "auc_low"] < row.loc["full", "auc"] < row.loc["full", "auc_high"]
    full = 4 * sum(SIZES) * DIM
    assert (row["bytes_full"] == full).all() and row.loc["full", "bytes_inference"] == full
    assert row.loc["full", "bytes_training"] == pytest.approx(3 * full, rel=0.01)        # weights and two moments
    for method in ("hash_trick", "fiited"):
        assert row.loc[method, "bytes_inference"] <= row.loc[method, "budget_bytes"] == int(0.4 * full)
    assert row.loc["hash_trick", "bytes_training"] == pytest.approx(3 * row.loc["hash_trick", "bytes_inference"],
                                                                    rel=0.05)
    assert row.loc["fiited", "bytes_training"] < row.loc["full", "bytes_training"]
    assert (row["steps"] == 16).all() and (row["epochs"] == 1).all() and (row["seconds"] > 0).all()
    other = home.parent / f"{home.name}-other"               # another machine
    shutil.copytree(home / "runs", other / "runs")
    shutil.rmtree(home / "runs")
    assert store.merge(other)["new"] == 3 and len(stream.traces(row.reset_index())) == 12
    settings = json.loads(row.loc["full", "settings"])
    assert settings["fields"] == [["z", 40], ["b", 12], ["c", 300]] and "patience" not in settings


def test_ids_depend_on_what_decides(home):
    cell = StreamCell("full", "log", dim=DIM)
    assert cell.run_id != ec.study.Cell("full", "log", dim=DIM, section="in_training").run_id
    assert cell.run_id == StreamCell("full", str(home / "data" / "log"), dim=DIM, section="other").run_id
    assert cell.run_id != StreamCell("full", "log", dim=DIM, windows=7).run_id
    with pytest.raises(CellError, match="windows 0"):
        StreamCell("full", "log", windows=0)
    with pytest.raises(CellError, match="unknown setting 'patience'"):
        stream.sweep("full", dataset="log", patience=3)
    found = stream.sweep("esapn", 0.1, seeds=0, **FAST)
    assert found["status"].tolist() == ["unreachable"] and not len(stream.traces(found))


def test_traces_are_published_and_read_back(home):
    rows = stream.sweep(["full", "fiited"], 0.4, seeds=[0, 1], **FAST)
    measured = stream.traces(rows)
    assert len(measured) == 16 and measured["seed"].nunique() == 2 and measured["kept"].notna().sum() == 8
    store.publish("in_training")
    path = stream.publish()
    assert path == home / "results" / "in_training_trace.csv"
    assert pd.read_csv(path).columns.tolist() == stream.TRACE and "run_id" not in stream.TRACE
    assert stream.publish().read_text() == path.read_text()                     # again changes nothing
    shutil.rmtree(home / "runs")
    shutil.rmtree(home / "data")
    assert len(results("in_training")) == 4                  # the trace is no file of rows
    again = stream.sweep(["full", "fiited"], 0.4, seeds=[0, 1], missing="skip", **FAST)
    pd.testing.assert_frame_equal(stream.traces(again)[measured.columns], measured, check_dtype=False, rtol=1e-5)
    with pytest.raises(CellError, match="no trace is kept here"):
        stream.publish()


def test_an_id_may_be_all_digits(home):
    rows = stream.sweep("full", dataset="log", dims=DIM, batch=BATCH, windows=2, seeds=0)
    (home / "runs" / "traces" / f"{rows['run_id'][0]}.csv").unlink()
    for run in ("1794711173108564", "12e4567890123456"):
        stream._keep(run, [dict(examples=10 * i, auc=0.5) for i in (1, 2)])
        found = stream.traces(rows.assign(run_id=run))
        assert found["examples"].tolist() == [10, 20] and (found["run"] == run).all()


def test_an_interrupted_sweep_goes_on(home, monkeypatch):
    done, run_stream = [], stream.run_stream

    def cut(cell, progress=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.method)
        return run_stream(cell, progress)

    monkeypatch.setattr(stream, "run_stream", cut)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 rows are there"):
        stream.sweep(["full", "hash_trick", "ada_embed", "fiited"], 0.4, seeds=0, **FAST)
    done[:] = []
    rows = stream.sweep(["full", "hash_trick", "ada_embed", "fiited"], 0.4, seeds=0, **FAST)
    assert done == ["ada_embed", "fiited"] and (rows["status"] == "ok").all()
    assert len(list((home / "runs" / "traces").iterdir())) == 4


def test_grids_of_a_notebook(home, monkeypatch):
    asked = []
    monkeypatch.setattr(sweeping, "fill", lambda cells, **options: asked.append(
        [(c.method, c.dataset, c.budget) for c in cells]) or pd.DataFrame(dict(run_id=[c.run_id for c in cells])))
    stream.study("log", ["full", "fiited"], [0.5, 0.1])
    assert asked == [[("full", "log", None), ("fiited", "log", 0.5), ("fiited", "log", 0.1)]]
    stream.study("log", ["full", "fiited"], [0.5, 0.1], drifted="synthetic_easy_drift1", drifted_budget=0.2, ladder=0.1)
    assert asked[2] == [("full", "synthetic_easy_drift1", None), ("fiited", "synthetic_easy_drift1", 0.2)]
    assert [spec for spec, _, _ in asked[3]] == ["full", *LADDER.values()] and asked[3][1][2] == 0.1
    stream.study("log", ["full"], [0.1], ladder=0.1, ladder_seeds=[4], seeds=[0, 1, 2])
    assert len(asked[4]) == 3 and len(asked[5]) == 10
    stream.study("log", ["full"], [0.1], choices=0.1, seeds=[0, 1])
    assert [spec for spec, _, _ in asked[7]][:3] == ["full", "fiited", "fiited(gamma=0.99)"]
    assert len(asked[7]) == 2 * (2 + sum(len(group) - 1 for group in CHOICES.values()))


def test_a_profile_is_measured_and_published(home):
    folder = home / "notebooks" / "profiles" / "p"
    folder.mkdir(parents=True)
    path = folder / "in_training.yaml"
    path.write_text("profile: p/in_training\nsection: in_training\ndataset: log\nmethods: [full, fiited]\n"
                    "budgets: [0.4]\nladder: 0.4\ndim: 8\nseeds: [0]\nlrs: [0.01]\nbatch: 64\nwindows: 2\n")
    assert len(profiles.measure(path)) == 12                 # two, and ten of the ladder, two of which are the same
    assert [p.name for p in profiles.publish(path)] == ["in_training.csv", "in_training_trace.csv"]
    assert len(results("in_training")) == 10
    assert pd.read_csv(home / "results" / "in_training_trace.csv")["run"].nunique() == 10


# -- drift ------------------------------------------------------------------------------------------------------------

class Frozen(Stream):
    """Learns from the first half only."""

    def execute(self, step):
        if self.seen < self.rows // 2:
            super().execute(step)
        else:
            self.batch("train")


def test_drift_raises_the_entropy_of_a_frozen_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    monkeypatch.setitem(synthetic.PRESETS, "synthetic_easy", ("easy", 24_000))
    ne = {}
    for name in ("synthetic_easy", "synthetic_easy_drift1"):
        data = open_dataset(name)
        assert data.name == name and data.meta["source"]["drift"] == float(name.endswith("1"))
        for kind in (Frozen, Stream):
            emb = ec.make("full", data.cardinalities, 8, seed=0)
            head = models.make("dlrm", fields=8, dim=8, dense=0, seed=0)
            run = kind(emb, head, data, Settings(lr=0.02, batch=256), windows=4)
            run.go()
            ne[name[14:], kind.__name__] = run.trace[-1]["ne"]
    frozen = ne["_drift1", "Frozen"]
    assert frozen > ne["", "Frozen"] + 0.03 and frozen > ne["_drift1", "Stream"] + 0.01
    assert open_dataset("synthetic_easy_drift1").fingerprint != open_dataset("synthetic_easy").fingerprint
    with pytest.raises(DataError, match="expected a number from 0 to 1 after '_drift'"):
        open_dataset("synthetic_easy_drifting")
    with pytest.raises(DataError, match="drift 2.0, expected 0 <= drift <= 1"):
        open_dataset("synthetic_easy_drift2")


# -- figures ----------------------------------------------------------------------------------------------------------

def lines(dataset="synthetic_x", shift=0.0) -> pd.DataFrame:
    """Traces of three methods, two seeds and four windows, with figures that can be told by hand."""
    settings = json.dumps(dict(fields=[("z", 10), ("b", 1000)]))
    out = []
    for seed in (0, 1):
        for i in range(4):
            common = dict(dataset=dataset, model="dlrm", dim=16, seed=seed, lr=0.1, batch=8, examples=100 * (i + 1),
                          bytes_full=1000.0, settings=settings, seconds=float(i), per_second=1.0, logloss=0.5)
            full = dict(ne=0.9 - 0.02 * i + 0.01 * seed, auc=0.7 + 0.01 * i)
            out += [
                dict(common, run=f"f{seed}", method="full", family="baseline", budget=1.0, bytes_inference=1000,
                     training_bytes=3000, kept=None, **full),
                dict(common, run=f"h{seed}", method="hash_trick", family="inter-feature", budget=0.1,
                     bytes_inference=100, training_bytes=300, kept=None, ne=full["ne"] + 0.05, auc=full["auc"] - 0.1),
                dict(common, run=f"c{seed}", method="fiited", family="intra-feature", budget=0.1,
                     bytes_inference=100, training_bytes=700, kept=json.dumps([[10 - i, 8 - seed], [100 * i, 20]]),
                     ne=full["ne"] - 0.01 + 0.002 * seed + shift * i, auc=full["auc"])]
    return pd.DataFrame(out)


def test_quality_is_drawn_beside_full():
    found = figures.beside_full(lines())
    own = found[found["method"].eq("fiited")]
    assert own["ne_gap"].tolist() == pytest.approx([-0.01] * 4 + [-0.008] * 4) and (own["auc_gap"].abs() < 1e-12).all()
    table = figures.over_seeds(own, "ne_gap")
    assert table["mean"].tolist() == pytest.approx([-0.009] * 4) and table["low"].tolist() == pytest.approx([-0.01] * 4)
    shown = figures.progressive(lines())
    assert "at 10 % FIITED -0.0090, Hash +0.0500" in shown.alt and "2 seeds" in shown.caption
    assert shown.svg.count("<svg") == 1 and not {"settings", "kept"} & set(shown.rows)
    with pytest.raises(ValueError, match="no trace of 'full'"):
        figures.progressive(lines().query("method != 'full'"))
    with pytest.raises(ValueError, match="Full alone"):
        figures.progressive(lines().query("method == 'full'"))
    with pytest.raises(ValueError, match="no traces to draw"):
        figures.progressive(lines()[:0])


def test_memory_is_drawn_in_per_cent_of_the_weights():
    assert "Full holds 300 %; at 10 % Hash 30 %, FIITED 70 %" in figures.training_memory(lines()).alt


def test_what_is_kept_by_field_and_position():
    fields, share = stream.kept(lines().query("run == 'c1'").iloc[3].to_dict())
    assert fields == [("b", 1000), ("z", 10)] and share == pytest.approx(np.array([[0.3, 0.02], [0.7, 0.7]]))
    assert stream.kept(lines().iloc[0].to_dict()) is None
    shown = figures.kept_chunks(lines())
    at = shown.rows.set_index(["examples", "field", "position"])["kept"]
    assert at[400, "b", 1] == pytest.approx(0.3) and at[100, "z", 2] == pytest.approx((0.8 + 0.7) / 2)
    # at the end b: (0.3 + 0.02) / 2 of 1,000, z: (0.7 + 0.75) / 2 of 10
    assert "largest field, b, keeps 16.0 %" in shown.alt and f"holds {100 * 160 / 167.25:.0f} %" in shown.alt
    with pytest.raises(ValueError, match="'hash_trick' tells"):
        figures.kept_chunks(lines(), "hash_trick")
    with pytest.raises(ValueError, match="at the budget 0.5"):
        figures.kept_chunks(lines(), budget=0.5)


def test_drift_is_an_effect_on_differences():
    shown = figures.drift(lines(), lines("synthetic_x_drift1", shift=0.01))
    own = shown.rows.query("method == 'fiited'")
    assert own["effect"].tolist() == pytest.approx([0.0, 0.01, 0.02, 0.03] * 2)
    assert "FIITED +0.0250" in shown.alt and "Hash +0.0000" in shown.alt
    with pytest.raises(ValueError, match="no method and budget in both"):
        figures.drift(lines(), lines("synthetic_x_drift1").assign(budget=lambda t: t["budget"] / 2))


def run_rows() -> pd.DataFrame:
    out = []
    for seed in (0, 1, 2):
        for i, (method, spec) in enumerate([("full", "full"), *(("fiited", s) for s in LADDER.values())]):
            out.append(dict(run_id=f"{i}{seed}", method=method, spec=spec, dataset="synthetic_x", model="dlrm", dim=16,
                            family="baseline" if i == 0 else "intra-feature", budget=0.1 if i else 1.0, seed=seed,
                            status="ok", reason="", lr=0.1, batch=8, auc=0.7 + 0.01 * i, valid_auc=0.7,
                            ne=0.9 + 0.001 * i + 0.01 * seed, bytes_full=1000.0, bytes_inference=100.0 if i else 1000.0,
                            bytes_training=700.0 if i else 3000.0, seconds=20.0 if i else 10.0, latency_ms=np.nan,
                            latency_full_ms=np.nan))
    return pd.DataFrame(out)


def test_costs_table_and_ladder():
    rows = run_rows()
    table = figures.stream_table(rows).frame.set_index("method")
    assert table.loc["fiited", "ne_gap"] == pytest.approx(0.009) and table.loc["fiited", "throughput"] == 0.5
    assert table.loc["fiited", "training_pct"] == pytest.approx(70) and table.loc["full", "ne_gap"] == 0
    assert "0.50 of Full's examples a second" in figures.stream_costs(rows).alt
    shown = figures.ladder(rows)
    assert "9 variants" in shown.alt and "rows by count +0.0010" in shown.alt
    assert "chunks, dynamic by product +0.0090" in shown.alt
    with pytest.raises(ValueError, match="ladder"):
        figures.ladder(rows.query("method == 'full'"))
    specs = {stream.choice(option): float(i) for group in CHOICES.values() for i, option in enumerate(group)}
    own = rows[rows["spec"] == "fiited"]
    varied = pd.concat([own.assign(spec=spec, ne=own["ne"] + 0.01 * i - 0.025 * (spec == "fiited(gamma=1.0)"))
                        for spec, i in specs.items()])
    shown = figures.choices(varied)
    assert "gamma" not in shown.alt and "decay per step none +0.0050" in shown.caption       # 0.03 - 0.025
    assert "chunks of a vector 16 +0.0400" in shown.caption and "No other value" in shown.caption
    with pytest.raises(ValueError, match="choices"):
        figures.choices(own)
    assert "unreachable" in figures.stream_table(pd.concat([rows, rows[-1:].assign(
        spec="esapn", method="esapn", status="unreachable", ne=np.nan, auc=np.nan)])).html


def test_choices_are_specs_each_written_once_beginning_with_ours():
    specs = [stream.choice(option) for group in CHOICES.values() for option in group if option]
    assert len(set(specs)) == len(specs) and all(parse(spec).canonical == spec for spec in specs)
    emb, every = ec.make("fiited", SIZES, DIM), CHOICES
    assert all(next(iter(group)) == "" for group in every.values())
    assert emb.aux.slots.gamma == every["decay per step"][""] and emb.chunks == every["chunks of a vector"][""]
    assert emb.spread == every["spread of positions"][""] and not emb.normalise and not emb.trigger
