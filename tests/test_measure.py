"""Measures against scikit-learn, brute force and the bootstrap."""
import ctypes
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ecstudy import measure
from ecstudy.measure import (
    Diverged,
    auc,
    auc_interval,
    delong_paired,
    logloss,
    measure_latency,
    normalised_entropy,
    peak,
)
from ecstudy.measure.peak import _RESET, _STATUS

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def sample(rows=2000, levels=None, rate=0.3, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    label = random.random(rows) < rate
    score = random.normal(size=rows) + 0.7 * label
    if levels:
        score = np.round(score * levels) / levels
    return label.astype(np.uint8), score.astype(dtype)


def components(label, score):
    """DeLong's structural components by comparing every positive with every negative."""
    gap = score[label == 1][:, None].astype(np.float64) - score[label == 0][None]
    wins = (gap > 0) + 0.5 * (gap == 0)
    return wins.mean(1), wins.mean(0)


def brute(label, *scores):
    """AUCs and their covariance matrix, O(positives x negatives)."""
    v10, v01 = zip(*(components(label, s) for s in scores))
    return [v.mean() for v in v10], np.atleast_2d(np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 100, 1, 0.25])
@pytest.mark.parametrize("rate", [0.5, 0.03, 0.999])
def test_auc_equals_scikit_learn(dtype, levels, rate):
    reference = pytest.importorskip("sklearn.metrics").roc_auc_score
    label, score = sample(5000, levels, rate, dtype=dtype)
    assert auc(label, score) == pytest.approx(reference(label, score.astype(np.float64)), abs=1e-12)
    assert auc_interval(label, score)[0] == pytest.approx(auc(label, score), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_by_hand(dtype):
    score = np.array([0.1, 0.4, 0.35, 0.8], dtype)
    assert auc([0, 0, 1, 1], score) == 0.75
    assert auc([0, 1], np.ones(2, dtype)) == 0.5
    assert auc([0, 1], np.array([0.0, -0.0], dtype)) == 0.5                 # the two zeros are equal
    assert auc([0, 1, 1, 0], np.array([-1e30, -1e-40, 1e-40, -1], dtype)) == 1.0
    assert auc([1, 0], np.array([0, 1], dtype)) == 0.0
    one_ulp = np.nextafter(dtype(1), dtype(2))
    assert auc([0, 1], np.array([1, one_ulp], dtype)) == 1.0                # no rounding, no bins


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors(device, dtype):
    label, score = sample(300)
    tensor = torch.from_numpy(score).to(device, dtype).requires_grad_()
    rounded = tensor.detach().double().cpu().numpy()
    for kind in (torch.bool, torch.uint8, torch.float32, torch.int64):
        assert auc(torch.from_numpy(label).to(device, kind), tensor) == auc(label, rounded)
    assert auc(torch.from_numpy(label)[:, None], tensor[:, None]) == auc(label, rounded)
    assert logloss(label, tensor) == pytest.approx(logloss(label, rounded))


def test_auc_is_invariant_and_symmetric():
    label, score = sample(3000, levels=7)
    assert auc(label, np.exp(score)) == auc(label, score)                   # any increasing map
    assert auc(1 - label, -score) == pytest.approx(auc(label, score), abs=1e-15)
    assert auc(label, -score) == pytest.approx(1 - auc(label, score), abs=1e-15)
    order = np.random.default_rng(1).permutation(3000)
    assert auc(label[order], score[order]) == auc(label, score)


def test_inputs_are_not_changed():
    label, score = sample(100)
    kept = label.copy(), score.copy()
    auc(label, score), auc_interval(label, score), delong_paired(label, score, score[::-1]), logloss(label, score)
    np.testing.assert_array_equal(label, kept[0])
    np.testing.assert_array_equal(score, kept[1])


@pytest.mark.parametrize("levels", [None, 2])
def test_interval_equals_brute_force(levels):
    label, score = sample(400, levels)
    (area,), variance = brute(label, score)
    got, low, high = auc_interval(label, score, level=0.9)
    reach = 1.6448536269514722 * math.sqrt(variance[0, 0])
    assert (got, low, high) == pytest.approx((area, area - reach, area + reach), abs=1e-12)


def test_interval_equals_bootstrap():
    label, score = sample(1500, levels=5)
    random = np.random.default_rng(2)
    p, n = score[label == 1], score[label == 0]            # resampled within classes, whose sizes DeLong holds fixed
    labels = np.repeat([1, 0], [len(p), len(n)])
    areas = [auc(labels, np.concatenate([random.choice(p, len(p)), random.choice(n, len(n))])) for _ in range(2000)]
    _, low, high = auc_interval(label, score)
    assert (high - low) / 2 / 1.959964 == pytest.approx(np.std(areas), rel=0.08)


def test_interval_covers_the_truth():
    """Normal scores 1 apart: AUC = Phi(1 / sqrt 2)."""
    truth, random, inside = 0.5 * math.erfc(-0.5), np.random.default_rng(3), 0
    for _ in range(400):
        label = np.repeat([0, 1], [150, 60])
        _, low, high = auc_interval(label, random.normal(size=210) + label)
        inside += low <= truth <= high
    assert 0.91 <= inside / 400 <= 0.98


def test_interval_edges():
    assert auc_interval([0, 0, 1, 1], [1.0, 2, 3, 4]) == (1.0, 1.0, 1.0)
    assert auc_interval([0, 0, 1, 1], [1.0, 1, 1, 1]) == (0.5, 0.5, 0.5)
    label, score = sample(12)
    assert 0 <= auc_interval(label, score)[1] <= auc_interval(label, score)[2] <= 1
    narrow, wide = (np.diff(auc_interval(*sample(500), level=v)[1:])[0] for v in (0.8, 0.99))
    assert wide / narrow == pytest.approx(2.5758293 / 1.2815516)


@pytest.mark.parametrize("levels", [None, 2])
def test_paired_equals_brute_force(levels):
    label, a = sample(400, levels)
    b = a + sample(400, levels, seed=9)[1]
    areas, cov = brute(label, a, b)
    got = delong_paired(label, a, b)
    se = math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert got.difference == pytest.approx(auc(label, a) - auc(label, b), abs=1e-12)
    assert got.se == pytest.approx(se, rel=1e-9)
    assert got.p == pytest.approx(math.erfc(abs(areas[0] - areas[1]) / se / math.sqrt(2)), rel=1e-9)
    assert got.se < math.sqrt(cov[0, 0] + cov[1, 1])                        # pairing pays: the two share rows
    back = delong_paired(label, b, a)
    assert back.difference == pytest.approx(-got.difference) and back.p == pytest.approx(got.p)


def test_paired_p_is_uniform_under_no_difference():
    random, ps = np.random.default_rng(4), []
    for _ in range(500):
        label = np.repeat([0, 1], [200, 100])
        signal = label + random.normal(size=300)
        ps.append(delong_paired(label, signal + random.normal(size=300), signal + random.normal(size=300)).p)
    assert np.quantile(ps, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.08)
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09


def test_paired_edges():
    label, score = sample(100)
    assert delong_paired(label, score, score) == (0.0, 0.0, 1.0)
    assert delong_paired(label, score, 2 * score + 1) == (0.0, 0.0, 1.0)     # the same ranking
    perfect, wrong = np.array([0, 0, 1, 1.0]), np.array([1, 1, 0, 0.0])
    assert delong_paired([0, 0, 1, 1], perfect, wrong) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [auc, auc_interval, logloss, normalised_entropy, lambda y, s: delong_paired(y, y, s)])
def test_divergence_is_named(call, bad):
    label, score = sample(100)
    score[[3, 50]] = bad
    with pytest.raises(Diverged, match="2 of 100 predictions are NaN or infinite"):
        call(label, score)
    assert issubclass(Diverged, ValueError)


@pytest.mark.parametrize("call, message", [
    (lambda: auc([1, 1, 1], [1.0, 2, 3]), "3 positive and 0 negative labels, expected at least 1 of each"),
    (lambda: auc_interval([0, 0, 1], [1.0, 2, 3]), "1 positive and 2 negative labels, expected at least 2"),
    (lambda: auc([0, 2, 1], [1.0, 2, 3]), "label 2 in row 1, expected 0 or 1"),
    (lambda: auc([0, 1], [1.0, 2, 3]), "2 labels for 3 predictions"),
    (lambda: auc([], []), "0 labels for 0 predictions"),
    (lambda: auc_interval([0, 1, 0, 1], [1.0, 2, 3, 4], level=95), "level=95, expected between 0 and 1"),
    (lambda: normalised_entropy([1, 1], [0.5, 1]), "base rate 1.0, expected strictly between"),
    (lambda: measure_latency({}, batches=[1]), "0 callables"),
    (lambda: measure_latency({"a": print}, batches=[]), "0 batches"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_logloss_equals_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics").log_loss
    label, logit = sample(2000, dtype=np.float64)
    assert logloss(label, logit) == pytest.approx(reference(label, 1 / (1 + np.exp(-logit))), rel=1e-12)
    logit_, label_ = torch.from_numpy(logit), torch.from_numpy(label).double()
    want = torch.nn.functional.binary_cross_entropy_with_logits(logit_, label_).item()
    assert logloss(label, logit) == pytest.approx(want, rel=1e-12)


def test_logloss_is_stable():
    assert logloss([1, 0], [1e4, -1e4]) == 0.0
    assert logloss([0, 1], [1e4, -1e4]) == 1e4
    assert logloss([1], [40.0]) == pytest.approx(math.exp(-40), rel=1e-12)
    assert logloss([1], np.float32([88.0])) == pytest.approx(math.exp(-88), rel=1e-6)   # float32 gives 0


def test_normalised_entropy():
    label, logit = sample(2000)
    rate = label.mean()
    constant = np.full(2000, math.log(rate / (1 - rate)))
    assert normalised_entropy(label, constant) == pytest.approx(1)
    assert normalised_entropy(label, constant * 0 + math.log(0.2 / 0.8), base_rate=0.2) == pytest.approx(1)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert normalised_entropy(label, logit) == pytest.approx(logloss(label, logit) / entropy)
    assert normalised_entropy(label, logit, base_rate=0.01) < normalised_entropy(label, logit)


@pytest.mark.parametrize("device", DEVICES)
def test_latency_runs_all_in_turn(device):
    seen: dict[str, list[int]] = {"first": [], "second": []}
    calls = []

    def record(name):
        def call(batch, other):
            assert torch.is_inference_mode_enabled() and other == batch + 1
            seen[name].append(batch)
            calls.append(name)
        return call

    batches = [(i, i + 1) for i in range(4)]
    got = measure_latency({n: record(n) for n in seen}, batches=batches, repeats=8, warmup=4, device=device)
    assert list(got) == ["first", "second"] and len(calls) == 2 * 12
    assert all(set(calls[i:i + 2]) == set(seen) for i in range(0, 24, 2))   # one each per round
    assert len({tuple(calls[i:i + 2]) for i in range(0, 24, 2)}) == 2       # in both orders
    assert all(sorted(s) == sorted(list(range(4)) * 3) for s in seen.values())
    assert all(a != b for a, b in zip(seen["first"], seen["second"]))       # a batch is not warm from the other
    assert not torch.is_inference_mode_enabled()
    for latency in got.values():
        assert 0 < latency.p10 <= latency.median <= latency.p90
        assert latency.ratio == pytest.approx(latency.median / got["first"].median)


def test_latency_in_milliseconds(monkeypatch):
    clock = [0]
    monkeypatch.setattr("ecstudy.measure.latency.time.perf_counter_ns", lambda: clock[0])

    def cost(ms):
        def call(batch):
            clock[0] += int(ms * 1e6) * batch
        return call

    got = measure_latency({"full": cost(2), "x": cost(3)}, batches=list(range(1, 12)), repeats=11, warmup=0)
    assert got["full"] == pytest.approx((12, 4, 20, 1))
    assert got["x"] == pytest.approx((18, 6, 30, 1.5))


@pytest.mark.parametrize("milliseconds, warm, rounds", [(1, 5, 50), (25, 5, 29), (400, 1, 11)])
def test_latency_within_a_limit(monkeypatch, milliseconds, warm, rounds):
    clock, calls = [0], []
    monkeypatch.setattr("ecstudy.measure.latency.time.perf_counter_ns", lambda: clock[0])

    def call(batch):
        calls.append(batch)
        clock[0] += int(milliseconds * 1e6)

    got = measure_latency({"a": call}, batches=[0], repeats=50, warmup=5, limit=0.84)
    assert len(calls) == warm + rounds and got["a"].median == milliseconds


@pytest.mark.parametrize("device", DEVICES)
def test_latency_of_tensors_and_errors_restore(device):
    import gc

    weight = torch.randn(8, 8, device=device)
    got = measure_latency({"matmul": lambda x: x @ weight}, batches=[torch.randn(4, 8, device=device)], repeats=3,
                          warmup=1, device=device)
    assert got["matmul"].ratio == 1

    def fail(batch):
        raise KeyError("inside")

    with pytest.raises(KeyError):
        measure_latency({"a": fail}, batches=[1])
    assert gc.isenabled() and not torch.is_inference_mode_enabled()


resettable = pytest.mark.skipif(not (_STATUS.is_file() and _RESET.exists()), reason="no mark that can be reset")
MB = 1 << 20


def measured(blocks, right):
    """The system may take the process's own pages back meanwhile, so the figure counts if one of three tries has it."""
    tries = []
    for _ in range(3):
        got = blocks()
        if not all(block.exact for block in got):
            continue
        tries.append([block.bytes / MB for block in got])
        if right(*got):
            return
    if not tries:
        pytest.skip("this system does not reset the high-water mark")
    raise AssertionError(f"MB measured: {tries}")


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=resettable)] + DEVICES[1:])
def test_peak_sees_what_was_freed(device):
    def blocks():
        before = torch.ones(100 * MB, dtype=torch.uint8, device=device)
        with peak(device) as p:
            kept = torch.ones(80 * MB, dtype=torch.uint8, device=device)
            del kept
            kept = torch.ones(40 * MB, dtype=torch.uint8, device=device)
        del before, kept
        with peak(device) as q:
            pass
        return p, q

    def right(p, q):                                       # not the 120 of both, not the 40 left, not what was before
        return 78 * MB < p.bytes < 100 * MB and p.total > p.bytes + 98 * MB and q.bytes < 8 * MB   # q: forgotten

    measured(blocks, right)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=resettable)] + DEVICES[1:])
def test_peak_nests(device):
    def use(megabytes):
        torch.ones(megabytes * MB, dtype=torch.uint8, device=device)

    def blocks():
        with peak(device) as outer:
            use(120)
            with peak(device) as small:
                use(40)
            with peak(device) as large:
                use(200)
                with peak(device) as inner:
                    use(60)
        return outer, small, large, inner

    def right(*got):
        return all(abs(block.bytes - want * MB) < 12 * MB for block, want in zip(got, (200, 40, 200, 60)))

    measured(blocks, right)


@resettable
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_peak_counts_memory_that_the_allocator_kept():
    code = """
import ctypes, torch
ctypes.CDLL(None).mallopt(-3, 1 << 30)                     # no more mmap for large tensors: freed memory is kept
first = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(150)]
last = torch.ones(1 << 10, dtype=torch.uint8)              # holds the top of the heap
del first
from ecstudy.measure import peak
with peak() as p:
    torch.ones(100 << 20, dtype=torch.uint8)
print(p.exact, p.bytes / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exact, megabytes = done.stdout.split()
    assert exact == "False" or 95 < float(megabytes) < 110


@resettable
def test_reset_tries_again_when_memory_is_freed_meanwhile(monkeypatch):
    module = __import__("sys").modules["ecstudy.measure.peak"]
    levels = iter([(10 * MB, 50 * MB), (10 * MB, 50 * MB), (10 * MB, 10 * MB)])
    monkeypatch.setattr(module, "_levels", lambda device: next(levels))
    assert module._reset(torch.device("cpu"))
    monkeypatch.setattr(module, "_levels", lambda device: (10 * MB, 50 * MB))
    assert not module._reset(torch.device("cpu"))          # accepted, and nothing done


@resettable
def test_peak_without_reset_is_a_lower_bound(monkeypatch):
    module = __import__("sys").modules["ecstudy.measure.peak"]
    monkeypatch.setattr(module, "_reset", lambda device: False)
    with peak() as p:
        torch.ones(50 * MB, dtype=torch.uint8)
    assert not p.exact and 0 <= p.bytes < 70 * MB


def test_peak_survives_an_error():
    with pytest.raises(KeyError):
        with peak() as p:
            raise KeyError
    assert p.bytes >= 0
    assert not __import__("sys").modules["ecstudy.measure.peak"]._active


def test_public_names():
    assert all(hasattr(measure, name) for name in measure.__all__)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Labels drawn from a logistic model of two fields and one dense value; valid and test hold ids never trained."""
    from ecstudy.data.layout import Dataset, DatasetWriter

    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "clicks"
    weights = random.normal(size=(2, 30))
    shape = dict(fields=["a", "b"], cardinalities=[30, 40], dense=["x", "constant"])
    with DatasetWriter(folder, name="clicks", **shape) as out:
        for split, rows, top in (("train", 6000, 30), ("valid", 1500, 30), ("test", 3000, 30)):
            ids = random.integers(0, top, (rows, 2))
            x = random.normal(size=rows)
            truth = weights[0, ids[:, 0]] + weights[1, ids[:, 1]] + 0.8 * x - 1
            if split != "train":
                ids[:50, 1] = 39                           # an id seen in test only
            label = random.random(rows) < 1 / (1 + np.exp(-truth))
            out.append(split, ids, np.stack([50 + 1000 * x, np.full(rows, 3.0)], 1), label)
            np.save(folder.parent / f"{split}.npy", truth)
    return Dataset.open(folder)


def test_logistic_regression_finds_the_truth(clicks):
    pytest.importorskip("sklearn")
    from ecstudy.study.baselines import base_rate, logistic_regression

    got, floor = logistic_regression(clicks, progress=False), base_rate(clicks)
    ceiling = auc(clicks.split("test").label, np.load(clicks.folder.parent / "test.npy"))
    assert ceiling - 0.012 < got["auc"] < ceiling + 0.002
    assert got["auc_low"] < got["auc"] < got["auc_high"] and got["ne"] < 0.85 and got["converged"]
    assert got["columns"] == 60 + 2 and got["rows"] == 6000
    assert got["valid_auc"] == got["grid"][got["c"]] == max(got["grid"].values()) and len(got["grid"]) > 1
    assert floor["auc"] == floor["valid_auc"] == 0.5 and floor["rate"] == clicks.meta["base_rate"]["train"]
    assert floor["ne"] == pytest.approx(1, abs=0.01) and floor["ne"] >= 1 and floor["logloss"] > got["logloss"]
    less = logistic_regression(clicks, grid=[0.1], max_rows=500, progress=False)
    assert less["rows"] == 500 and less["auc"] < got["auc"]


def test_logistic_regression_selects_on_valid_and_opens_test_once(clicks, monkeypatch):
    pytest.importorskip("sklearn")
    from ecstudy.study import baselines

    scored = []
    logits = baselines._Encoder.logits

    def counted(self, rows, model):
        scored.append(len(rows))
        return logits(self, rows, model)

    monkeypatch.setattr(baselines._Encoder, "logits", counted)
    monkeypatch.setattr(baselines, "CHUNK", 1000)          # several chunks make no difference
    got = baselines.logistic_regression(clicks, grid=(0.01, 0.1), progress=False)
    assert scored == [1500, 1500, 3000]
    alone = baselines.logistic_regression(clicks, grid=(got["c"],), progress=False)
    assert all(alone[k] == got[k] for k in ("auc", "valid_auc", "logloss"))     # fits do not depend on each other
    with pytest.raises(ValueError, match="grid is empty"):
        baselines.logistic_regression(clicks, grid=())


def test_one_hot_encoding(clicks):
    pytest.importorskip("scipy")
    from ecstudy.study import baselines

    encode = baselines._Encoder(clicks, clicks.split("train"))
    test = clicks.split("test")
    matrix = encode(test).toarray()
    assert matrix.shape == (3000, 62)
    np.testing.assert_array_equal(matrix[60:, :30].argmax(1), test.ids[60:, 0])
    np.testing.assert_array_equal(matrix[60:, 30:60].argmax(1), test.ids[60:, 1])
    np.testing.assert_array_equal(matrix[:, :60].sum(1), np.where(np.arange(3000) < 50, 1, 2))  # unseen: no column
    train = encode(clicks.split("train")).toarray()
    assert train[:, 60].mean() == pytest.approx(0, abs=1e-4) and train[:, 60].std() == pytest.approx(1, abs=1e-4)
    assert not train[:, 61].any()                          # a constant stays finite


def test_yardsticks_leave_rows_and_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    from ecstudy.data import generate
    from ecstudy.study import baselines, results

    data = generate("criteo", tmp_path / "data" / "tiny", rows=7000, scale=1e-5, name="tiny")
    rows = baselines.measure(str(data.folder), progress=False).set_index("spec")
    assert list(rows.index) == list(baselines.YARDSTICKS) and rows.status.eq("ok").all() and rows.model.eq("none").all()
    assert rows.auc["base_rate"] == 0.5 and rows.auc["logistic_regression"] > 0.55
    assert rows.valid_auc["logistic_regression"] >= rows.valid_auc["logistic_regression(c=1.0)"]
    monkeypatch.setattr(baselines, "YARDSTICKS", dict.fromkeys(baselines.YARDSTICKS))      # calling one would now fail
    again = baselines.measure(str(data.folder)).set_index("spec")
    assert again.auc.equals(rows.auc) and len(results(dataset="tiny")) == 3
