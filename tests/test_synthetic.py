"""Generated click logs: the same rows everywhere, the skew and ceiling they promise, and their statistics."""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from ecstudy import data, paths
from ecstudy.data import DataError, Dataset, generate, open_dataset
from ecstudy.data import synthetic as syn
from ecstudy.data.cardinalities import FIELDS, ROWS
from ecstudy.data.prepare import criteo_split
from ecstudy.data.statistics import frequency_curve, main, statistics
from ecstudy.data.synthetic import Permutation, Synthetic, expected_auc, split_bounds


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A written Criteo-like log of 20,000 rows."""
    return generate("criteo", tmp_path_factory.mktemp("synthetic") / "small", rows=20_000, name="synthetic_small")


def train_counts(log):
    ids = log.rows(0, split_bounds(log.n_rows)[0])[0]
    return np.concatenate([np.bincount(ids[:, f], minlength=n) for f, n in enumerate(log.cardinalities)])


# ---------------------------------------------------------------- cardinalities

@pytest.mark.parametrize("name, fields, total", [("criteo", 26, 33_762_577), ("avazu", 22, 9_449_445),
                                                 ("company", 43, 66_102_027)])
def test_cardinalities_are_the_papers(name, fields, total):
    names, sizes = FIELDS[name]
    assert len(names) == len(sizes) == len(set(names)) == fields and sum(sizes) == total


def test_full_scale_has_the_true_cardinalities():
    for shape in ("criteo", "avazu"):
        assert Synthetic(shape, rows=1_000, scale=1).cardinalities == list(FIELDS[shape][1])


def test_scaled_cardinalities_keep_small_fields():
    log = Synthetic("synthetic_criteo_xs")
    for n, true in zip(log.cardinalities, FIELDS["criteo"][1]):
        assert min(true, syn.FLOOR) <= n <= true
    assert log.cardinalities[2] == round(10_131_227 * 60_000 / ROWS["criteo"])


# ---------------------------------------------------------------- the same rows everywhere

@pytest.mark.parametrize("settings, ids_hash, dense_hash, probability", [
    (dict(preset="criteo", rows=3_000, seed=1), "bbc9177f6c5b655c", "313fcdbaff69b653",
     [0.461336228562, 0.348928764667, 0.021467160481]),
    (dict(preset="avazu", rows=3_000, seed=2, drift=0.5), "eac6e2b08bdf6cb2", "e3b0c44298fc1c14",
     [0.211078894948, 0.073680616206, 0.245790608135]),
])
def test_fixed_fingerprint(settings, ids_hash, dense_hash, probability):
    """Ids and numeric values are exact on every machine; probabilities pass through one exponential."""
    ids, dense, label, p = Synthetic(**settings).rows(0, 3_000)
    short = lambda array, kind: hashlib.sha256(np.ascontiguousarray(array, kind).tobytes()).hexdigest()[:16]
    assert short(ids, "<i4") == ids_hash
    assert short(dense, "<f4") == dense_hash
    np.testing.assert_allclose(p[[0, 1_500, 2_999]], probability, rtol=1e-9)


def test_slices_and_blocks_agree():
    log = Synthetic("criteo", rows=30_000, drift=0.3)
    whole = log.rows(0, 30_000)
    for low, high in ((0, 1), (8_191, 8_193), (12_345, 29_999), (30_000, 30_000)):
        for part, all_of_it in zip(log.rows(low, high), whole):
            np.testing.assert_array_equal(part, all_of_it[low:high])


def test_chunk_size_does_not_change_the_data(tmp_path):
    one = generate("avazu", tmp_path / "one", rows=5_000, chunk_rows=777)
    two = generate("avazu", tmp_path / "two", rows=5_000, chunk_rows=100_000)
    for split in ("train", "valid", "test"):
        for kind in ("ids", "dense", "label"):
            np.testing.assert_array_equal(getattr(one.split(split), kind), getattr(two.split(split), kind))
    np.testing.assert_array_equal(one.counts, two.counts)
    assert one.meta["ceiling"] == two.meta["ceiling"]


def test_seed_changes_ids_and_labels():
    a, b = (Synthetic("criteo", rows=2_000, seed=s).rows(0, 2_000) for s in (0, 1))
    assert (a[0] == b[0])[:, 2].mean() < 0.2 and (a[2] != b[2]).any() and (a[1] != b[1]).any()


def test_memory_does_not_grow_with_the_table():
    """10,000 rows at full cardinality: no array of table size, in building or in drawing."""
    tracemalloc.start()
    log = Synthetic("criteo", scale=1)
    log.rows(45_000_000, 45_010_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20 < 4 * max(log.cardinalities), peak           # even one int32 per id of C3 would be seen


# ---------------------------------------------------------------- popularity

@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 24, 32, 100, 1_000, 65_537, 300_000])
def test_permutation_is_a_bijection(n):
    out = Permutation(n, 5)(np.arange(n, dtype=np.uint64))
    np.testing.assert_array_equal(np.sort(out), np.arange(n))


def test_order_of_ids_says_nothing_about_popularity():
    out = Permutation(1_000_003, 9)(np.arange(20_000, dtype=np.uint64)).astype(float)
    assert abs(np.corrcoef(np.arange(20_000), out)[0, 1]) < 0.03
    share = np.bincount((out / 1_000_003 * 10).astype(int), minlength=10) / 20_000
    assert (abs(share - 0.1) < 0.01).all()
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03              # neighbours in rank are not in id


@pytest.mark.parametrize("n, exponent, tail", [(20, 0.0, 0.0), (500, 1.0, 0.0), (5_000, 0.9, 0.2), (5_000, 1.6, 0.0)])
def test_law_draws_the_closed_form(n, exponent, tail):
    draws = 200_000
    rank = syn._Law(n, exponent, tail)(syn._hash(3, np.arange(draws, dtype=np.uint64)))
    e = 1 - exponent or 1e-3
    edges = np.arange(1, n + 2, dtype=float) ** e
    p = (1 - tail) * np.diff(edges) / (edges[-1] - 1) + tail / n
    cells = np.unique(np.geomspace(1, n, 12).astype(int))
    seen = np.add.reduceat(np.bincount(rank.view(np.int64), minlength=n), np.r_[0, cells[:-1]]) / draws
    want = np.add.reduceat(p, np.r_[0, cells[:-1]])
    assert rank.max() < n
    np.testing.assert_allclose(seen, want, atol=5 * np.sqrt(want.max() / draws))


def test_law_reaches_both_ends_of_a_large_field():
    n = 10_131_227
    law = syn._Law(n, 0.95)
    ends = law(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] == 0 and 0.999 * n < ends[1] < n
    assert (np.diff(law.knots.astype(np.int64)) >= 0).all()


def test_elementary_functions_match_the_library():
    x = np.concatenate([np.geomspace(1e-9, 1e9, 500), [1.0]])
    np.testing.assert_allclose(syn._log(x), np.log(x), rtol=1e-13, atol=1e-15)
    y = np.linspace(-30, 30, 500)
    np.testing.assert_allclose(syn._exp(y), np.exp(y), rtol=1e-13)


@pytest.mark.parametrize("preset, top10", [("synthetic_criteo_s", (0.90, 0.95)), ("synthetic_avazu_s", (0.95, 0.99)),
                                           ("synthetic_criteo_xs", (0.90, 0.95))])
def test_skew_bands(preset, top10):
    counts = np.sort(train_counts(Synthetic(preset)))[::-1]
    assert top10[0] <= counts[:len(counts) // 10].sum() / counts.sum() <= top10[1]
    assert 0.80 <= (counts < 5).mean() <= 0.90


def test_skew_option_orders_the_concentration():
    share = []
    for skew in (0.0, 0.7, 1.0, 1.5):
        counts = np.sort(train_counts(Synthetic("criteo", rows=10_000, skew=skew)))[::-1]
        share.append(counts[:100].sum() / counts.sum())
    assert share == sorted(share) and share[-1] > 1.3 * share[1]


def test_missing_shares_and_zeros():
    log = Synthetic("criteo", rows=60_000)
    ids, dense, *_ = log.rows(0, 60_000)
    share = {name: s for names, s in syn.SHAPES["criteo"].missing.items() for name in names}
    zero = {"I1": 0.426, "I2": 0.276, "I7": 0.225, "I10": 0.479, "I12": 0.743}      # of present values, real sample
    for k, name in enumerate(log.dense):
        gone, drawn = share.get(name, 0.0), (log._columns[k][2][:1_024] == 0).mean()
        assert abs((dense[:, k] == 0).mean() - (gone + (1 - gone) * drawn)) < 0.01, name
        assert abs(drawn - zero.get(name, drawn)) < 0.08, name
    assert (dense >= 0).all() and np.isfinite(dense).all()
    # columns of a group are missing together: where C19 holds its "missing" id, so do C20, C25 and C26
    column = {name: ids[:, f] for f, name in enumerate(log.fields)}
    common = {name: np.bincount(column[name]).argmax() for name in ("C19", "C20", "C25", "C26")}
    gone = column["C19"] == common["C19"]
    assert abs(gone.mean() - 0.4418) < 0.01
    for name, top in common.items():
        np.testing.assert_array_equal(column[name] == top, gone)


def test_numeric_values_are_logs_of_counts():
    x = np.expm1(Synthetic("criteo", rows=5_000).rows(0, 5_000)[1].astype(np.float64))
    np.testing.assert_allclose(x, np.rint(x), rtol=1e-5, atol=1e-5)


def test_avazu_hour_is_time():
    log = Synthetic("avazu", rows=24_000)
    hour = log.rows(0, 24_000)[0][:, 0]
    assert (np.diff(hour) >= 0).all() and hour[0] == 0 and hour[-1] == log.cardinalities[0] - 1


# ---------------------------------------------------------------- the teacher

@pytest.mark.parametrize("preset, base_rate, ceiling", [("criteo", 0.256, 0.80), ("avazu", 0.170, 0.76),
                                                        ("synthetic_easy", 0.3, 0.85)])
def test_base_rate_and_ceiling(preset, base_rate, ceiling):
    log = Synthetic(preset, rows=100_000)
    *_, label, p = log.rows(0, 100_000)
    assert abs(label.mean() - base_rate) < 0.01 and abs(p.mean() - base_rate) < 0.006
    assert abs(expected_auc(p) - ceiling) < 0.006


def test_labels_follow_the_probabilities():
    *_, label, p = Synthetic("criteo", rows=60_000).rows(0, 60_000)
    order = np.argsort(p).reshape(10, -1)
    np.testing.assert_allclose(label[order].mean(1), p[order].mean(1), atol=0.03)


def test_expected_auc_is_the_mean_over_labels():
    from ecstudy.measure import auc

    random = np.random.default_rng(0)
    p = random.random(2_000) ** 2
    drawn = np.mean([auc(random.random(2_000) < p, p) for _ in range(60)])
    assert abs(expected_auc(p) - drawn) < 0.004


def test_clusters_make_ids_alike():
    """With clusters=1 an id has the effect of its cluster: at most 64 values per field; with 0 none is shared."""
    distinct = {}
    for clusters in (0.0, 1.0):
        field = Synthetic("criteo", rows=60_000, clusters=clusters)._fields[2]
        distinct[clusters] = len(np.unique(field.effects(np.arange(5_000, dtype=np.uint64), None)[0]))
    assert distinct[1.0] <= 64 and distinct[0.0] > 4_000


def test_effects_have_unit_variance():
    for clusters in (0.0, 0.5, 1.0):
        field = Synthetic("criteo", rows=60_000, clusters=clusters)._fields[11]
        effect, _ = field.effects(np.arange(9_000, dtype=np.uint64), None)
        assert 0.6 < effect.var() < 1.6


def test_rank_zero_has_no_interactions():
    assert Synthetic("criteo", rows=5_000, rank=0)._weights[1] == 0 < Synthetic("criteo", rows=5_000)._weights[1]


def test_drift_moves_late_rows_only():
    still, moving = (Synthetic("criteo", rows=50_000, drift=d) for d in (0.0, 1.0))
    for (low, high), agree, correlation in (((0, 500), (0.97, 1.0), (0.98, 1.0)),
                                            ((49_000, 50_000), (0.0, 0.6), (-0.5, 0.6))):
        a, b = still.rows(low, high), moving.rows(low, high)
        assert agree[0] <= (a[0][:, 2] == b[0][:, 2]).mean() <= agree[1]
        logit = [np.log(p / (1 - p)) for p in (a[3], b[3])]
        assert correlation[0] <= np.corrcoef(*logit)[0, 1] <= correlation[1]
    np.testing.assert_array_equal(still.rows(0, 1)[0], moving.rows(0, 1)[0])


@pytest.mark.parametrize("settings, text", [
    (dict(preset="movielens"), "'movielens', expected one of criteo"), (dict(rows=3), "rows 3, expected 28"),
    (dict(scale=0.0), "scale 0.0, expected 0 <"), (dict(scale=2), "scale 2"), (dict(skew=-1), "skew -1"),
    (dict(rank=11), "rank 11"), (dict(rank=1.5), "whole number"), (dict(clusters=1.1), "clusters 1.1"),
    (dict(drift=-0.1), "drift -0.1"), (dict(seed=0.5), "seed 0.5"), (dict(rows=float("nan")), "rows nan"),
])
def test_bad_settings(settings, text):
    with pytest.raises(DataError, match=text):
        Synthetic(**{"rows": 1_000, **settings})


@pytest.mark.parametrize("low, high", [(-1, 5), (5, 4), (0, 1_001)])
def test_bad_slices(low, high):
    with pytest.raises(DataError, match="expected 0 <= start"):
        Synthetic("criteo", rows=1_000).rows(low, high)


# ---------------------------------------------------------------- written data sets

@pytest.mark.parametrize("rows", [28, 29, 30, 97, 45_840_617])
def test_split_is_the_papers(rows):
    train, test = split_bounds(rows)
    if rows < 1_000:
        splits = criteo_split(rows)
        assert (splits[:train] == 0).all() and (splits[train:test] == 2).all() and (splits[test:] == 1).all()
    else:
        assert (train, test - train, rows - test) == (39_291_958, 3_274_330, 3_274_329)


def test_written_rows_are_the_generators(small):
    log, (train, test) = Synthetic("criteo", rows=20_000), split_bounds(20_000)
    for split, low, high in (("train", 0, train), ("test", train, test), ("valid", test, 20_000)):
        ids, dense, label, _ = log.rows(low, high)
        part = small.split(split)
        np.testing.assert_array_equal(part.ids, ids)
        np.testing.assert_array_equal(part.dense, dense)
        np.testing.assert_array_equal(part.label, label)
    assert small.meta["source"]["rows"] == 20_000 and small.name == "synthetic_small"


def test_ceiling_is_measured_on_the_written_labels(small):
    from sklearn.metrics import log_loss, roc_auc_score

    train, test = split_bounds(20_000)
    *_, label, p = Synthetic("criteo", rows=20_000).rows(train, test)
    ceiling = small.meta["ceiling"]
    assert ceiling["auc_test"] == pytest.approx(roc_auc_score(label, p))
    assert ceiling["logloss_test"] == pytest.approx(log_loss(label, p))
    assert ceiling["auc_expected"] == pytest.approx(0.80, abs=0.02) and 0.7 < ceiling["auc_valid"] < 0.9


def test_existing_folder_is_kept(small):
    with pytest.raises(DataError, match="overwrite"):
        generate("criteo", small.folder, rows=1_000)
    assert Dataset.open(small.folder).fingerprint == small.fingerprint


def test_overwrite_replaces(tmp_path):
    first = generate("avazu", tmp_path / "x", rows=1_000)
    second = generate("avazu", tmp_path / "x", rows=1_000, seed=1, overwrite=True)
    assert first.fingerprint != second.fingerprint == Dataset.open(tmp_path / "x").fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_nothing_stays_behind_after_an_interruption(tmp_path, monkeypatch):
    def stop(stage, fraction):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        generate("avazu", tmp_path / "x", rows=1_000, progress=stop)
    assert not list(tmp_path.iterdir())


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(syn.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000}))
    with pytest.raises(DataError, match="GB free"):
        generate("avazu", tmp_path / "x", rows=1_000)
    assert not list(tmp_path.iterdir())


def test_progress_is_reported(tmp_path):
    seen = []
    generate("avazu", tmp_path / "x", rows=1_000, chunk_rows=300, progress=lambda stage, part: seen.append(part))
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) > 3


def test_default_names(home):
    plain = generate("avazu", rows=1_000)
    other = generate("avazu", rows=1_000, seed=3)
    assert plain.folder.parent == paths.data() and plain.name != other.name
    assert all(d.name.startswith("synthetic_avazu") for d in (plain, other))


def test_presets_are_opened_by_name(home, monkeypatch):
    monkeypatch.setitem(syn.PRESETS, "synthetic_criteo_xs", ("criteo", 2_000))
    dataset = open_dataset("synthetic_criteo_xs")
    assert dataset.folder == paths.data() / "synthetic_criteo_xs" and dataset.name == "synthetic_criteo_xs"
    stamp = (dataset.folder / "meta.json").stat().st_mtime_ns
    assert open_dataset("synthetic_criteo_xs").fingerprint == dataset.fingerprint
    assert (dataset.folder / "meta.json").stat().st_mtime_ns == stamp            # not generated again
    meta = json.loads((dataset.folder / "meta.json").read_text())
    meta["source"]["version"] = -1                                               # by another generator
    (dataset.folder / "meta.json").write_text(json.dumps(meta))
    assert open_dataset("synthetic_criteo_xs").meta["source"]["version"] == syn.VERSION
    assert [p.name for p in paths.data().iterdir()] == ["synthetic_criteo_xs"]


def test_presets_and_shapes_agree():
    for name, (shape, rows) in syn.PRESETS.items():
        assert name.startswith("synthetic_") and shape in syn.SHAPES and rows <= syn.SHAPES[shape].rows
    assert sum(Synthetic("synthetic_criteo_l").cardinalities) == 33_762_577


def test_open_by_folder_and_prepared_name(home, small):
    assert open_dataset(small.folder).fingerprint == small.fingerprint
    assert open_dataset(str(small.folder)).fingerprint == small.fingerprint
    made = generate("avazu", rows=1_000, name="mine")
    assert open_dataset("mine").fingerprint == made.fingerprint


@pytest.mark.parametrize("name", ["criteo_typo", "", "no/such/folder"])
def test_unknown_data_set(home, name):
    generate("avazu", rows=1_000, name="mine")
    with pytest.raises(DataError) as error:
        open_dataset(name)
    for word in (repr(name), "synthetic_criteo_s", "mine", "ecstudy prep"):
        assert word in str(error.value)


def _open(home, queue, barrier):
    import os

    os.environ["ECSTUDY_HOME"] = home
    syn.PRESETS["synthetic_criteo_xs"] = ("criteo", 5_000)
    barrier.wait(60)
    queue.put(open_dataset("synthetic_criteo_xs").fingerprint)


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(2)
    workers = [context.Process(target=_open, args=(str(tmp_path), queue, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert len(found) == 1 and [w.exitcode for w in workers] == [0, 0]
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["synthetic_criteo_xs"]


def test_public_names():
    assert set(data.__all__) == {"DataError", "Dataset", "DatasetWriter", "generate", "open_dataset"}


# ---------------------------------------------------------------- statistics

@pytest.mark.parametrize("split", ["train", "test"])
def test_statistics_against_plain_counting(small, split):
    part, train = small.split(split), small.split("train")
    unique = [np.unique(part.ids[:, f], return_counts=True)[1] for f in range(26)]
    counts = np.sort(np.concatenate(unique))[::-1]
    n = sum(small.cardinalities)
    unseen = sum((~np.isin(small.split("test").ids[:, f], train.ids[:, f])).sum() for f in range(26))
    got = statistics(small, split)
    assert (got["rows"], got["ids"], got["seen_ids"]) == (len(part), n, len(counts))
    assert got["once_share"] == pytest.approx((counts == 1).sum() / n)
    assert got["under5_share"] == pytest.approx(((counts < 5).sum() + n - len(counts)) / n)
    assert got["top10_share"] == pytest.approx(counts[:n // 10].sum() / counts.sum(), abs=1e-4)
    assert got["unseen_test_share"] == pytest.approx(unseen / small.split("test").ids.size)
    assert got["zero_share"] == pytest.approx((part.dense == 0).mean())
    assert got["base_rate"] == pytest.approx(part.label.mean())
    assert got["ceiling_auc"] == small.meta["ceiling"]["auc_test"]


def test_statistics_do_not_depend_on_the_chunk(small, monkeypatch):
    from ecstudy.data import statistics as module

    want = statistics(small)
    monkeypatch.setattr(module, "CHUNK", 101)
    monkeypatch.setattr(module, "_CAP", 50)         # most counts are "large" now
    assert statistics(small) == want


def test_statistics_of_an_unknown_split(small):
    with pytest.raises(DataError, match="split 'all'"):
        statistics(small, "all")


def test_frequency_curve(small):
    curve = frequency_curve(small)
    counts = np.sort(np.asarray(small.counts))[::-1]
    assert len(curve) <= 200 and curve.ids.iloc[0] == 1 and curve.id_share.iloc[-1] == 1
    np.testing.assert_allclose(curve.occurrence_share, np.cumsum(counts)[curve.ids - 1] / counts.sum())
    np.testing.assert_array_equal(curve["count"], counts[curve.ids - 1])


def test_statistics_command(small, tmp_path, capsys):
    out = tmp_path / "deep" / "statistics.csv"
    main([str(small.folder), str(small.folder), "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.dataset) == ["synthetic_small"] * 2 and table.rows[0] == len(small.split("train"))
    assert table.top10_share[0] == pytest.approx(statistics(small)["top10_share"], abs=1e-5)
    assert [p.name for p in out.parent.iterdir()] == ["statistics.csv"]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent")])
    assert "no data set" in capsys.readouterr().err
