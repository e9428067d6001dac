"""Compressors of trained vectors: each against a dense reference, from files in blocks, and after a kill."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ecstudy as ec
from ecstudy.budget import full_bytes
from ecstudy.methods import _posttrain
from ecstudy.methods._posttrain import Streaming, blocks, equal_groups, sampled, weights_of
from ecstudy.rag import store
from ecstudy.rag.store import compress_file
from ecstudy.registry import get, names
from ecstudy.training.timeline import FakeRun

N, DIM = 700, 24
IDS = torch.arange(N)
EVERY = [name for name in names() if issubclass(get(name), Streaming)]
#: settings in which small tables can be compressed
OWN = {"full": ("full", 1.0), "pq": ("pq(bits=4)", 0.5), "mag_pq": ("mag_pq(bits=3)", 0.5),
       "opq": ("opq(bits=4, rounds=1)", 0.5), "rq": ("rq(bits=3)", 0.2), "pca_pq": ("pca_pq(bits=4)", 0.5),
       "rescore": ("rescore(coarse='pq(bits=4)')", 0.5)}


def rows(n=N, dim=DIM, seed=0) -> np.ndarray:
    """Vectors with a mean, axes of unequal length, and rows of unequal norm."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)) * np.linspace(2, 0.1, dim) @ np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return ((x + rng.normal(size=dim)) * rng.lognormal(size=(n, 1), sigma=0.5)).astype(np.float32)


X = rows()


def looked_up(emb, n=N) -> np.ndarray:
    with torch.no_grad():
        return emb(torch.arange(n)).numpy()


# --- what does not train ----------------------------------------------------------------------------------------------

def test_compressors_are_told_from_methods_that_train():
    assert {"svd", "mag_svd", "pca", "prune"} <= set(names(trains=False))
    assert {"full", "compo", "int_quant", "tt_rec", "dedup"} <= set(names(trains=True))
    assert sorted(names(trains=True) + names(trains=False)) == names()
    assert set(ec.methods().query("trains").index) == set(names(trains=True))
    with pytest.raises(TypeError, match=r"svd compresses vectors .* use ecstudy.compress\(vectors, method, budget\)"):
        next(ec.make("svd", [20, 30], 8).schedule(FakeRun()))


def test_a_grid_of_training_runs_refuses_compressors(tmp_path):
    from ecstudy.data import DatasetWriter
    from ecstudy.study.row import Cell, CellError

    with DatasetWriter(tmp_path / "d", name="d", fields=["a"], cardinalities=[4], dense=[]) as writer:
        for split in ("train", "valid", "test"):
            writer.append(split, np.arange(4)[:, None], np.zeros((4, 0)), np.arange(4) % 2)
    with pytest.raises(CellError, match="'pca|int8': it compresses trained vectors and does not train"):
        Cell("pca|int8", tmp_path / "d").check()
    assert ec.make("svd", 4, 4).training_bytes() == ec.memory(ec.make("svd", 4, 4))


# --- each against a dense reference -----------------------------------------------------------------------------------

def truncated(x: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def test_svd_is_the_nearest_matrix_of_its_rank():
    for rank in (1, 7, DIM):
        emb = ec.compress(X, f"svd(rank={rank})")
        np.testing.assert_allclose(looked_up(emb), truncated(X, rank), atol=2e-5)
    small = ec.compress(X, "svd", 0.3)
    assert small.rank == int(N * DIM * 0.3 / (N + DIM)) and ec.memory(small) == 4 * small.rank * (N + DIM)


def test_pca_is_around_the_mean():
    mean = X.astype(np.float64).mean(0)
    emb = ec.compress(X, "pca(rank=5)")
    np.testing.assert_allclose(looked_up(emb), mean + truncated(X - mean, 5), atol=2e-5)
    assert ec.memory(emb) == 4 * (5 * (N + DIM) + DIM)
    plain = ec.compress(X, "pca(rank=5, center=False)")
    np.testing.assert_array_equal(looked_up(plain), looked_up(ec.compress(X, "svd(rank=5)")))
    unit = looked_up(ec.compress(X, "pca(rank=5, unit=True)"))
    expected = looked_up(emb) / np.linalg.norm(looked_up(emb), axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_mag_svd_decomposes_groups_of_equal_total_norm(groups):
    emb = ec.compress(X, f"mag_svd(groups={groups})", 0.4)
    norm = np.linalg.norm(X.astype(np.float64), axis=1)
    order = np.argsort(-norm, kind="stable")
    cuts = np.searchsorted(norm[order].cumsum(), norm.sum() * np.arange(1, groups) / groups) + 1
    expected, used = np.empty_like(X), 0
    for own, (n, rank) in zip(np.split(order, cuts), emb.shape.tolist()):
        assert n == len(own)
        own = np.sort(own)
        expected[own] = truncated(X[own], rank)
        used += rank * (n + DIM)
    np.testing.assert_allclose(looked_up(emb), expected, atol=3e-5)
    sizes, ranks = emb.shape.T.tolist()
    assert sizes == sorted(sizes) and ranks == sorted(ranks, reverse=True)
    assert emb.cells - max(sizes) - DIM < used <= emb.cells            # no rank more would fit
    totals = [norm[own].sum() for own in np.split(order, cuts)]
    assert max(totals) - min(totals) <= 2 * norm.max()
    assert ec.memory(emb) <= 0.4 * full_bytes(N, DIM)


def test_mag_svd_takes_other_weights_than_norms():
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    norm = np.linalg.norm(X, axis=1)
    weights = torch.from_numpy(norm)
    emb = ec.compress(unit, "mag_svd", 0.4, weights=weights)
    half = np.sort(norm.astype(np.float64))[::-1].cumsum() < norm.sum(dtype=np.float64) / 2
    assert int(emb.shape[0, 0]) == half.sum() + 1
    even = ec.compress(unit, "mag_svd", 0.4)
    assert abs(int(even.shape[0, 0]) - N // 2) <= 1
    for bad, text in ((weights[:5], r"weights of shape \(5,\): expected \[700\]"), (-weights, "of row 0: expected")):
        with pytest.raises(ValueError, match=text):
            ec.compress(unit, "mag_svd", 0.4, weights=bad)
    with pytest.raises(ValueError, match="top_k takes no weights; leave it out"):
        ec.compress(X, "top_k", 0.5, weights=norm, counts=np.arange(N))
    with pytest.raises(ValueError, match="mag_svd holds no vectors yet"):
        ec.make("mag_svd", 30, 8)(torch.arange(3))
    for options, text in (("groups=0", "groups=0"), ("cells=5", "cells=5: expected at least 46")):
        with pytest.raises(ValueError, match=text):
            ec.make(f"mag_svd({options})", 30, 8)


def test_groups_are_of_equal_weight_and_never_empty():
    assert equal_groups(torch.tensor([1.0, 4, 1, 1, 1]), 2).tolist() == [1, 0, 1, 1, 1]
    assert equal_groups(torch.ones(6), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(equal_groups(torch.tensor([1e9, 0, 0]), 3).tolist()) == [0, 1, 2]
    assert sorted(equal_groups(torch.zeros(4), 4).tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(weights_of(X), np.linalg.norm(X.astype(np.float64), axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="groups=3: expected 1 to 2"):
        equal_groups(torch.ones(2), 3)


@pytest.mark.parametrize("budget", [0.9, 0.3, 0.05, 0.005])
@pytest.mark.parametrize("dim", [DIM, 128])
def test_pruning_keeps_exactly_the_largest(budget, dim, monkeypatch):
    x = np.round(rows(dim=dim), 1)                                    # many values are equal
    monkeypatch.setattr(_posttrain, "ELEMENTS", 100 * dim)            # in blocks of 64 rows
    emb = ec.compress(x, "prune", budget)
    keep = np.argsort(-np.abs(x).reshape(-1), kind="stable")[:emb.kept]         # of equals the first ones
    expected = np.zeros(x.size, np.float32)
    expected[keep] = x.reshape(-1)[keep]
    np.testing.assert_array_equal(looked_up(emb), expected.reshape(x.shape))
    assert emb.allocation().tolist() == np.bincount(keep // dim, minlength=N).tolist()
    assert ec.memory(emb) <= budget * full_bytes(N, dim) and emb.kept > 0
    larger = ec.weigh(f"prune(kept={emb.kept + 1})", N, dim)
    assert larger["bytes_inference"] > int(budget * full_bytes(N, dim) + 1e-6)


@pytest.mark.parametrize("form", ["bitmask", "csr", "grouped16", "coo"])
def test_pruning_takes_the_form_it_is_told(form):
    emb = ec.compress(X, f"prune(form={form!r}, kept=900)")
    assert emb.table.form == form
    np.testing.assert_array_equal(looked_up(emb), looked_up(ec.compress(X, "prune(kept=900)")))
    with pytest.raises(ValueError, match="kept=-1: expected 0 <= kept"):
        ec.make("prune(kept=-1)", 30, 8)


@pytest.mark.parametrize("bits", [8, 16])
def test_int_quant_scales_by_table_row_or_column(bits):
    top = 2 ** (bits - 1) - 1
    for scale, largest in (("", np.abs(X).max()), (", scale='dim'", np.abs(X).max(0)),
                           (", scale='row'", np.abs(X).max(1, keepdims=True) * 2 ** 0.02)):
        emb = ec.compress(X, f"int_quant(bits={bits}{scale})")
        error = np.abs(looked_up(emb) - X)
        assert (error <= largest / top * 0.5 * 1.02 + 1e-6 * np.abs(X)).all(), scale
        extra = {"": 0, ", scale='dim'": 4 * DIM, ", scale='row'": 2 * N}[scale]
        assert ec.memory(emb) == N * DIM * bits // 8 + extra
    trained = ec.make("int_quant(scale='dim')", 50, 8, 0.3, seed=1)
    plain = ec.make("int_quant", 50, 8, 0.25, seed=1)
    assert torch.equal(trained(torch.arange(50)), plain(torch.arange(50)))      # before it is fitted: the global scale


def test_ranks_are_those_of_the_paper_at_its_size():
    """Fact sheet 5: ranks of SVD at 21,015,324 x 768, and no SVD at 0.1 %."""
    for budget, rank in ((0.5, 383), (0.1, 76), (0.01, 7)):
        assert ec.weigh("svd", 21_015_324, 768, budget)["knob"] == rank
    assert not ec.weigh("svd", 21_015_324, 768, 0.001)["reachable"]


# --- rows in blocks ---------------------------------------------------------------------------------------------------

def test_blocks_and_samples_come_in_order_whatever_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(_posttrain, "ELEMENTS", 100 * DIM)
    np.save(tmp_path / "x.npy", X.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for matrix in (X.astype(np.float16), torch.from_numpy(X.astype(np.float16)), mapped):
        found = list(blocks(matrix))
        assert [start for start, _ in found] == list(range(0, N, 64)) and found[0][1].dtype == torch.float32
        assert np.array_equal(torch.cat([block for _, block in found]), X.astype(np.float16))
        few = sampled(matrix, 150, seed=3)
        place = [int((X.astype(np.float16) == row.numpy()).all(1).argmax()) for row in few]
        assert len(set(place)) == 150 and place == sorted(place)
        assert torch.equal(few, sampled(matrix, 150, seed=3)) and not torch.equal(few, sampled(matrix, 150, seed=4))
        assert np.array_equal(sampled(matrix, None), X.astype(np.float16)) and len(sampled(matrix, 9999)) == N


@pytest.mark.parametrize("name", EVERY)
def test_a_row_that_is_not_finite_is_named(name, monkeypatch):
    monkeypatch.setattr(_posttrain, "ELEMENTS", 100 * DIM)
    broken = X.copy()
    broken[517, 3] = np.inf
    spec, budget = OWN.get(name, (name, 0.5))
    with pytest.raises(ValueError, match="row 517 holds NaN or infinity"):
        ec.compress(broken, spec, budget)


class Most(TorchDispatchMode):
    """Bytes of the largest tensor that operations make, by the address of what it lies in."""

    def __init__(self):
        super().__init__()
        self.most = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and not t.is_meta:
                address = t.untyped_storage().data_ptr()
                self.most[address] = max(self.most.get(address, 0), t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("name", [n for n in EVERY if n in ("full", "int_quant", "svd", "pca", "mag_svd", "prune")])
def test_a_file_is_compressed_without_a_tensor_of_its_size(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_posttrain, "ELEMENTS", 256 * DIM)
    x = rows(20_000)
    np.save(tmp_path / "x.npy", x)
    budget, file, opened = 1.0 if name == "full" else 0.5, set(), store._Work.open

    def noted(self, shapes):
        found = opened(self, shapes)
        file.update(t.untyped_storage().data_ptr() for t in found.values())
        return found

    monkeypatch.setattr(store._Work, "open", noted)
    with Most() as seen:
        compress_file(tmp_path / "x.npy", name, budget, tmp_path / "x")
    # allowed are 8 bytes per row for norms and groups, and 65,536 bins; the matrix has 96 per row
    most = max(size for address, size in seen.most.items() if address not in file)
    assert 0 < most <= max(8 * len(x), 8 << 16) < 4 * x.size // 3
    emb = ec.compress(x, name, budget)
    np.testing.assert_array_equal(looked_up(ec.load(tmp_path / "x"), 2000), looked_up(emb, 2000))


# --- files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EVERY)
def test_a_file_holds_what_compress_gives_and_a_broken_run_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_posttrain, "ELEMENTS", 100 * DIM)
    np.save(tmp_path / "x.npy", X)
    spec, budget = OWN.get(name, (name, 0.5))
    options = dict(seed=5, shard=128)
    whole = compress_file(tmp_path / "x.npy", spec, budget, tmp_path / "whole", **options)
    emb, loaded = ec.compress(X, spec, budget, seed=5), ec.load(whole)
    assert loaded.deployed and ec.memory(loaded) == ec.memory(emb)
    np.testing.assert_array_equal(looked_up(loaded), looked_up(emb))
    puts, put = [0], get(name).put

    def failing(self, start, block):
        puts[0] += 1
        if puts[0] in (4, 9):                                         # twice, in the midst of a shard
            put(self, start, block[:30])
            raise KeyboardInterrupt
        put(self, start, block)

    monkeypatch.setattr(get(name), "put", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress_file(tmp_path / "x.npy", spec, budget, tmp_path / "part", **options)
        assert not (tmp_path / "part").exists()
    learned = []
    monkeypatch.setattr(get(name), "learn", lambda self, rows: learned.append(1))
    again = compress_file(tmp_path / "x.npy", spec, budget, tmp_path / "part", **options)
    assert again.read_bytes() == whole.read_bytes() and not learned and puts[0] == 4 + 5 + 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "whole", "x.npy"]


def test_what_was_begun_for_other_vectors_or_settings_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(_posttrain, "ELEMENTS", 100 * DIM)
    put = get("svd").put
    for other in (dict(vectors=X + 1), dict(budget=0.2), dict(seed=2), dict(method="svd(rank=3)")):
        def failing(self, start, block):
            if start:
                raise KeyboardInterrupt
            put(self, start, block)

        monkeypatch.setattr(get("svd"), "put", failing)
        with pytest.raises(KeyboardInterrupt):
            compress_file(X, "svd", 0.5, tmp_path / "a", shard=64)
        monkeypatch.setattr(get("svd"), "put", put)
        asked = dict(vectors=X, method="svd", budget=0.5, seed=0) | other
        compress_file(asked["vectors"], asked["method"], asked["budget"], tmp_path / "a", seed=asked["seed"], shard=64)
        expected = ec.compress(asked["vectors"], asked["method"], asked["budget"], seed=asked["seed"])
        np.testing.assert_array_equal(looked_up(ec.load(tmp_path / "a")), looked_up(expected))


def test_a_killed_process_is_resumed_by_the_next(tmp_path):
    np.save(tmp_path / "x.npy", X)
    script = textwrap.dedent(f"""
        import sys
        from ecstudy.methods import _posttrain
        from ecstudy.methods.prune import Prune
        from ecstudy.rag.store import compress_file
        _posttrain.ELEMENTS = 100 * {DIM}
        put, count = Prune.put, [0]
        def slow(self, start, block):
            put(self, start, block)
            count[0] += 1
            if count[0] == 5 and sys.argv[2] == "hang":
                print("here", flush=True)
                sys.stdin.read()
        Prune.put = slow
        compress_file(r"{tmp_path / 'x.npy'}", "prune", 0.3, sys.argv[1], shard=128)
        print(count[0])
    """)
    run = [sys.executable, "-c", script]
    process = subprocess.Popen([*run, str(tmp_path / "a"), "hang"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"here"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close(), process.stdout.close()
    blocks_left = subprocess.run([*run, str(tmp_path / "a"), "go"], check=True, capture_output=True).stdout
    assert int(blocks_left) == 11 - 4                                 # of 11 blocks, two shards of two were done
    expected = ec.compress(X, "prune", 0.3)
    np.testing.assert_array_equal(looked_up(ec.load(tmp_path / "a")), looked_up(expected))


@pytest.mark.parametrize("spec", ["tt_rec", "dedup", "pca|int8"])
def test_methods_that_are_held_in_memory_are_written_too(spec, tmp_path):
    np.save(tmp_path / "x.npy", X)
    compress_file(tmp_path / "x.npy", spec, 0.3, tmp_path / "a")
    np.testing.assert_array_equal(looked_up(ec.load(tmp_path / "a")), looked_up(ec.compress(X, spec, 0.3)))


def test_a_method_that_replaces_its_tensors_is_found_out(tmp_path, monkeypatch):
    def replace(self, rows):
        self.basis = torch.ones_like(self.basis)

    monkeypatch.setattr(get("svd"), "learn", replace)
    with pytest.raises(RuntimeError, match="Svd replaced its tensor 'basis'"):
        compress_file(X, "svd", 0.5, tmp_path / "a")
    with pytest.raises(ValueError, match="shard=0: expected a number of rows"):
        compress_file(X, "svd", 0.5, tmp_path / "a", shard=0)
    assert store.fingerprint(X) == store.fingerprint(torch.tensor(X)) != store.fingerprint(X[:-1])
