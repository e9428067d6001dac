"""Quantisers of trained vectors whose codebooks faiss learns, against faiss's own decoders and against brute force."""
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import ecstudy as ec
from ecstudy.methods._posttrain import blocks, equal_groups, weights_of
from ecstudy.methods._product import balanced, unpacked
from ecstudy.packed import Codes, pack, unpack

faiss = pytest.importorskip("faiss")

N, D = 600, 24


def correlated(n=N, d=D, seed=0):
    """Vectors with a mean, correlated columns and falling variances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return torch.randn(n, d, generator=generator) * torch.linspace(2, 0.1, d) @ mix + 0.3


X, IDS = correlated(), torch.arange(N)
QUERIES = correlated(40, seed=1)


def squared(emb, x=X):
    return float((emb(torch.arange(len(x))) - x).square().sum())


# --- packing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_are_packed_lowest_bits_first(bits):
    generator = torch.Generator().manual_seed(bits)
    for parts in (1, 3, 8, 13):
        codes = torch.randint(0, 1 << bits, (9, parts), generator=generator)
        packed = pack(codes, bits)
        width = -(-parts * bits // 8)
        for row, content in zip(codes.tolist(), packed):
            number = sum(code << bits * p for p, code in enumerate(row))
            assert bytes(content.tolist()) == number.to_bytes(width, "little")
        held = Codes(11, parts, bits)
        held.write(2, packed)
        assert ec.memory(held) == 11 * width + 7
        order = torch.tensor([[1, 0], [5, 4]])
        assert torch.equal(held.read(order).long()[1], codes[[3, 2]]) and not held.read(order[0]).any()
        assert torch.equal(unpacked(packed, parts, bits), codes)
        assert torch.equal(unpack(held.bytes, torch.tensor(3 * width), parts, bits).long(), codes[1])


# --- pq ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts, bits", [(6, 4), (3, 8), (8, 6), (4, 9), (24, 3)])
def test_pq_decodes_what_faiss_decodes(parts, bits):
    small = ec.compress(X, f"pq(parts={parts}, bits={bits})")
    index = faiss.IndexPQ(D, parts, bits)
    faiss.copy_array_to_vector(small.books.even.numpy().ravel(), index.pq.centroids)
    index.is_trained = True
    content = small.codes.bytes[:N * small.codes.width].view(N, -1).numpy()
    assert np.array_equal(index.sa_decode(content), small(IDS).numpy())
    assert np.array_equal(index.sa_encode(X.numpy()), content)
    assert torch.equal(small(torch.tensor([[5, 7]])), small(IDS)[[5, 7]][None])


def test_pq_learns_as_well_as_faiss():
    index = faiss.IndexPQ(D, 6, 4)
    index.do_polysemous_training = False
    index.train(X.numpy())
    own = float(np.square(index.sa_decode(index.sa_encode(X.numpy())) - X.numpy()).sum())
    assert squared(ec.compress(X, "pq(parts=6, bits=4)")) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("parts, bits", [(7, 4), (5, 8), (13, 3), (23, 2), (10, 5)])
def test_parts_of_two_widths_are_the_nearest_centroids(parts, bits):
    small = ec.compress(X, f"pq(parts={parts}, bits={bits})")
    wide = D % parts
    each = [D // parts + (p < wide) for p in range(parts)]
    books = [*small.books.wide.view(wide, 1 << bits, -1), *small.books.even.view(parts - wide, 1 << bits, -1)]
    assert [book.shape[1] for book in books] == each
    assert small.books.wide.numel() + small.books.even.numel() == (1 << bits) * D   # whatever the number of parts
    nearest = [book[torch.cdist(x, book).argmin(1)] for x, book in zip(X.split(each, 1), books)]
    expected = torch.cat(nearest, 1)
    torch.testing.assert_close((small(IDS) - X).square().sum(1), (expected - X).square().sum(1), rtol=1e-4, atol=1e-5)
    assert (small(IDS) == expected).all(1).float().mean() > 0.99         # the others are ties


def test_pq_weighs_what_the_fact_sheet_says():
    """3.14 % and 1.58 % of DPR's 21,015,324 passages: 64 and 32 parts of 12 bits."""
    n, dim = 21_015_324, 768
    for parts, share in ((64, 3.14), (32, 1.58)):
        row = ec.weigh(f"pq(bits=12, parts={parts})", n, dim)
        assert row["bytes_inference"] == n * parts * 12 // 8 + 7 + 4096 * dim * 4
        assert round(row["inference_pct"], 2) == share
    assert ec.weigh("pq(bits=12)", n, dim, 0.0315)["knob"] == 64 and ec.weigh("pq", n, dim, 0.0158)["knob"] == 48


@pytest.mark.parametrize("spec", ["pq(parts=6, bits=4)", "pq(parts=7, bits=8)", "opq(parts=7, bits=4, rounds=2)"])
def test_faiss_searches_the_same_codes(spec):
    small = ec.compress(X, spec)
    scores, ids = small.index().search(QUERIES.numpy(), 10)
    exact = QUERIES @ small(IDS).T
    np.testing.assert_allclose(scores, exact.topk(10).values.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, exact.gather(1, torch.from_numpy(ids)).numpy(), rtol=1e-4, atol=1e-4)


def test_few_rows_and_equal_rows_are_kept():
    few = correlated(3)
    for spec in ("pq(parts=5)", "mag_pq(parts=5, groups=1)"):
        assert torch.equal(ec.compress(few, spec)(torch.arange(3)), few)
    same = few[:1].expand(300, -1)
    for spec in ("pq(parts=6, bits=4)", "opq(parts=6, bits=4, rounds=1)", "rq(levels=3, bits=3)", "int4", "rabitq",
                 "pca_pq(parts=4, bits=4)", "int4(scale='row')", "mag_pq(parts=6, bits=3)"):
        out = ec.compress(same, spec)(torch.tensor([0, 299]))
        tolerance = 0.3 if "row" in spec else 0.01                       # a row's own range has 16 steps
        torch.testing.assert_close(out, same[:2], atol=tolerance, rtol=1e-2)


# --- rotations --------------------------------------------------------------------------------------------------------

def test_axes_are_dealt_to_parts_of_equal_product():
    # logs above the least: 3, 2, 2, 1, 1, 0 -> part 0 takes 3, part 1 takes 2 and 2, part 0 takes 1, 1: 5 and 4 + 0
    order = balanced(torch.tensor([3.0, 2, 2, 1, 1, 0]).exp(), 2)
    assert order.tolist() == [0, 3, 4, 1, 2, 5]
    assert sorted(balanced(torch.linspace(5, 1, 7), 3).tolist()) == list(range(7))
    assert balanced(torch.tensor([1.0, 0, 0, 0]), 2).unique().tolist() == [0, 1, 2, 3]      # rank one


@pytest.mark.parametrize("parts", [6, 7])
def test_opq_loses_no_more_than_faiss_and_less_than_pq(parts):
    small = ec.compress(X, f"opq(parts={parts}, bits=4)")
    turn = small.turn.float()
    torch.testing.assert_close(turn.T @ turn, torch.eye(D), atol=2e-3, rtol=0)
    assert squared(small) < 0.75 * squared(ec.compress(X, f"pq(parts={parts}, bits=4)"))
    assert squared(small) < squared(ec.compress(X, f"opq(parts={parts}, bits=4, rounds=0)"))
    if D % parts == 0:
        index = faiss.index_factory(D, f"OPQ{parts},PQ{parts}x4np")
        index.train(X.numpy())
        assert squared(small) < 1.03 * float(np.square(index.sa_decode(index.sa_encode(X.numpy())) - X.numpy()).sum())
    books = small.books.decode(small.codes.read(IDS))
    torch.testing.assert_close(small(IDS), books @ turn.T)


def test_pca_pq_stays_on_the_leading_axes():
    small = ec.compress(X, "pca_pq(parts=5, bits=6, width=8)")
    mean = X.mean(0)
    axes = torch.linalg.svd(X - mean, full_matrices=False).Vh
    out = small(IDS) - mean
    torch.testing.assert_close(out @ axes[8:].T, torch.zeros(N, D - 8), atol=0.02, rtol=0)      # turned in float16
    dropped = float(((X - mean) @ axes[8:].T).square().sum())
    assert dropped < squared(small) < dropped + 0.2 * float(((X - mean) @ axes[:8].T).square().sum())


@pytest.mark.parametrize("spec", ["opq(parts=7, bits=4, rounds=1)", "pca_pq(parts=5, bits=4)", "rabitq",
                                  "rabitq(width=9, bits=3)"])
def test_scores_are_inner_products_with_what_is_looked_up(spec):
    small = ec.compress(X, spec)
    torch.testing.assert_close(small.scores(QUERIES), QUERIES @ small(IDS).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small.scores(QUERIES, 70, 75), QUERIES @ small(IDS[70:75]).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["pq(parts=5, bits=3", "opq(parts=5, bits=3, rounds=1", "pca_pq(parts=5, bits=3",
                                  "rq(levels=2, bits=3", "mag_pq(parts=4, bits=2"])
def test_rows_of_one_norm_keep_it(spec):
    x = 3 * torch.nn.functional.normalize(X, dim=1)
    kept, plain = (ec.compress(x, f"{spec}, unit={unit})") for unit in (True, False))
    assert float(kept.norm) == pytest.approx(3) and ec.memory(kept) == ec.memory(plain) + 4
    norms = kept(IDS).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((N,), 3.0), rtol=2e-3, atol=0)              # turned in float16
    assert plain(IDS).norm(dim=1).mean() < 2.9                           # means are too short
    torch.testing.assert_close(kept(IDS) / norms[:, None], torch.nn.functional.normalize(plain(IDS), dim=1))
    if hasattr(kept, "scores"):
        torch.testing.assert_close(kept.scores(QUERIES, 9, 500), QUERIES @ kept(IDS[9:500]).T, rtol=1e-4, atol=1e-4)
    if hasattr(kept, "index"):
        with pytest.raises(ValueError, match="compress with unit=False"):
            kept.index()
    differ = [ec.compress(X, f"{spec}, unit={unit})") for unit in (True, False)]
    assert float(differ[0].norm) == 0 and torch.equal(differ[0](IDS), differ[1](IDS))


# --- mag_pq -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups, parts", [(1, 4), (2, 5), (3, 4)])
def test_mag_pq_takes_the_nearest_centroid_of_a_rows_group(groups, parts):
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3)).square() + 0.01
    for given in (None, weights.numpy()):
        small = ec.compress(X, f"mag_pq(parts={parts}, bits=3, groups={groups})", weights=given)
        group = equal_groups(weights_of(X, given), groups)
        sums = torch.bincount(group, weights_of(X, given))
        assert (sums - sums.mean()).abs().max() < 0.02 * sums.mean()     # equal total norm
        found, at = small.place(IDS)
        assert torch.equal(found, group.long())
        assert [books.bits for books in small.books] == [3 + groups - 1 - g for g in range(groups)]
        taken = torch.zeros(len(small.bytes), dtype=torch.int64)
        for g, width in enumerate(small.width):                          # no byte belongs to two rows
            for byte in range(width):
                taken.index_add_(0, at[group == g] + byte, torch.ones((group == g).sum(), dtype=torch.int64))
        assert taken.max() == 1 and not taken[-7:].any()
        each = [D // parts + (p < D % parts) for p in range(parts)]
        for g, books in enumerate(small.books):
            x, tables = X[group == g], [t for t, *_ in books.halves()]
            flat = [c for t in tables for c in t.view(-1, books.k, t.shape[1])]
            expected = torch.cat([c[torch.cdist(s, c).argmin(1)] for s, c in zip(x.split(each, 1), flat)], 1)
            out = small(IDS)[group == g]
            assert (out == expected).all(1).float().mean() > 0.98
            torch.testing.assert_close((out - x).square().sum(1), (expected - x).square().sum(1), rtol=1e-4, atol=1e-5)


def test_mag_pq_fits_whatever_the_weights():
    for weights in (np.ones(N), np.arange(N) == 5, np.zeros(N), np.geomspace(1, 1e-9, N)):
        small = ec.compress(X, "mag_pq(parts=4, bits=3, groups=4)", weights=weights)
        assert torch.isfinite(small(IDS)).all() and squared(small) < float(X.square().sum())
    with pytest.raises(ValueError, match="expected \\[600\\], one number per row"):
        ec.compress(X, "mag_pq(parts=4, bits=3)", weights=np.ones(3))


# --- rq ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels, splits, bits", [(4, 1, 4), (3, 2, 4), (3, 3, 3)])
def test_rq_decodes_what_faiss_decodes(levels, splits, bits):
    small = ec.compress(X, f"rq(levels={levels}, splits={splits}, bits={bits}, half=False)")
    codes = small.codes.read(IDS).long().view(N, splits, levels)
    for s, book in enumerate(small.books):
        quantiser = faiss.ResidualQuantizer(D // splits, levels, bits)
        faiss.copy_array_to_vector(book.numpy().ravel(), quantiser.codebooks)
        quantiser.is_trained = True
        content = pack(codes[:, s], bits).numpy()
        columns = slice(s * D // splits, (s + 1) * D // splits)
        np.testing.assert_allclose(small(IDS)[:, columns].numpy(), quantiser.decode(content), rtol=1e-5, atol=1e-5)
    error = squared(small)
    assert error < squared(ec.compress(X, f"rq(levels={levels - 1}, splits={splits}, bits={bits}, half=False)"))
    # what is left over is less than after the best of one level, brute force over the first book
    first = torch.cat([book[:1 << bits][torch.cdist(x, book[:1 << bits]).argmin(1)]
                       for x, book in zip(X.chunk(splits, 1), small.books)], 1)
    assert error < float((first - X).square().sum())


# --- int4 -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
def test_int4_keeps_what_lies_on_its_grid(bits):
    top = 2 ** bits - 1
    codes = torch.randint(0, top + 1, (N, D), generator=torch.Generator().manual_seed(bits))
    codes[0], codes[1], codes[:, 0], codes[:, 1] = 0, top, 0, top        # every column and row has its whole range
    grid = codes * 0.25 - 3.0 + torch.arange(D)
    small = ec.compress(grid[:, 2:], f"int4(bits={bits})")
    assert torch.equal(small.codes.read(IDS).long(), codes[:, 2:])
    torch.testing.assert_close(small(IDS), grid[:, 2:])
    grid = (codes * 0.25 - 3.0)[2:]
    small = ec.compress(grid, f"int4(bits={bits}, scale='row')")
    torch.testing.assert_close(small(torch.arange(N - 2)), grid, rtol=1e-3, atol=2e-3)
    assert ec.memory(small) == (N - 2) * (-(-D * bits // 8) + 4) + 7


def test_int4_narrows_ranges_for_outliers():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    x[0] = 40
    small = ec.compress(x, "int4(bits=3)", sample=4000)
    low, step = small.range
    assert (low + 7 * step < 30).all()
    whole = x.amin(0), (x.amax(0) - x.amin(0)) / 7
    plain = ((x - whole[0]) / whole[1]).round() * whole[1] + whole[0]
    out = small(torch.arange(4000))
    assert (out - x).square().sum() < 0.8 * (plain - x).square().sum()
    inside = (x > low) & (x < low + 7 * step)
    assert ((out - x).abs() <= step / 2 + 1e-5)[inside].all()


# --- rabitq -----------------------------------------------------------------------------------------------------------

def test_rabitq_is_faiss_estimator():
    small = ec.compress(X, "rabitq", sample=N)
    turned = ((X - small.mean) @ small.turn.float()).numpy()
    index = faiss.IndexRaBitQ(D, faiss.METRIC_INNER_PRODUCT)
    index.qb = 0                                                         # queries as they are
    index.train(turned)
    index.add(turned)
    q = QUERIES @ small.turn.float()
    scores, ids = index.search(q.numpy(), N)
    own = (small.scores(QUERIES) - (QUERIES @ small.mean)[:, None]).gather(1, torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(own, scores, rtol=2e-3, atol=2e-3 * np.abs(scores).max())


def test_rabitq_estimates_without_bias_and_least_squares_would_not():
    x, q = correlated(30, 16), correlated(5, 16, seed=2)
    true, draws = q @ x.T, []
    for seed in range(300):
        draws.append(ec.compress(x, "rabitq", seed=seed).scores(q))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert (((draws.mean(0) - true) / error).abs() < 4.5).all()
    # the nearest multiple of the signs is shorter by cos^2, 2 / pi of it on average: that would be seen
    assert ((draws.mean(0) - (1 - 2 / torch.pi) * (true - q @ x.mean(0)[:, None]) - true) / error).abs().max() > 10


def test_rabitq_bits_and_axes():
    errors = [squared(ec.compress(X, f"rabitq(bits={bits})")) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[7] < 1e-4 * errors[0]
    small = ec.compress(X, "rabitq(width=5)")
    mean = X.mean(0)
    axes = torch.linalg.svd(X - mean, full_matrices=False).Vh
    torch.testing.assert_close((small(IDS) - mean) @ axes[5:].T, torch.zeros(N, D - 5), atol=0.02, rtol=0)
    assert ec.memory(small) == N + 7 + 2 * N + 2 * D * 5 + 4 * D + 4


# --- rescore ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", ["bits=4", "bits=8, coarse='rabitq'", "bits=16, coarse='opq(bits=4, rounds=1)'",
                                     "bits=32, coarse='svd'"])
def test_rescoring_all_rows_is_exhaustive_search(options):
    size = 24 if "rabitq" in options else 6
    small = ec.compress(X, f"rescore(size={size}, keep={N}, {options})")
    out = small(IDS)
    exact = (QUERIES @ out.T).sort(dim=1, descending=True, stable=True)
    scores, ids = small.search(QUERIES, 12)
    torch.testing.assert_close(scores, exact.values[:, :12], rtol=1e-5, atol=1e-5)
    assert (ids == exact.indices[:, :12]).float().mean() > 0.99          # sums in another order swap near-equals
    share = (out - X).square().sum() / (small.coarse(IDS) - X).square().sum()
    assert share < (0.02 if "bits=4" == options else 1e-4)
    kept = ec.memory(small) - ec.memory(small.coarse)
    assert kept == N * D * 4 if "bits=32" in options else kept < 0.6 * N * D * 4


def test_rescoring_reads_only_the_candidates():
    small = ec.compress(X, "rescore(size=6, coarse='pq(bits=4)', keep=20)")
    scores, ids = small.search(QUERIES, 5)
    candidates = (QUERIES @ small.coarse(IDS).T).topk(20).indices
    fine = (QUERIES @ small(IDS).T).gather(1, candidates)
    torch.testing.assert_close(scores, fine.topk(5).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids.sort().values, candidates.gather(1, fine.topk(5).indices).sort().values)

    from ecstudy.rag.search import search, way

    assert way(small) == "own" and np.array_equal(search(small, QUERIES, 5).ids, ids.numpy())
    assert np.array_equal(search(small, QUERIES, 5, how="decode").ids, (QUERIES @ small(IDS).T).topk(5).indices)


# --- all of them ------------------------------------------------------------------------------------------------------

SPECS = ["pq(parts=7, bits=4)", "mag_pq(parts=5, bits=3)", "opq(parts=5, bits=4, rounds=2)", "pca_pq(parts=5, bits=4)",
         "rq(levels=3, bits=3)", "int4(bits=3)", "int4(scale='row')", "rabitq(bits=2)",
         "rescore(size=5, coarse='mag_pq(bits=3)')"]


@pytest.mark.parametrize("spec", SPECS)
def test_maps_arrays_and_repeated_blocks_give_the_same_bytes(spec, tmp_path, monkeypatch):
    half = X.half()
    np.save(tmp_path / "x.npy", half.numpy())
    monkeypatch.setattr(sys.modules[blocks.__module__], "ELEMENTS", 64 * D)      # ten blocks
    a, b = ec.compress(half.float(), spec, sample=256), ec.compress(tmp_path / "x.npy", spec, sample=256)
    state = {name: t.clone() for name, t in a.state_dict().items()}
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in state.items())
    other = ec.compress(half.float(), spec, sample=256, seed=1)
    chosen = any(not torch.equal(t, other.state_dict()[name]) for name, t in state.items())
    assert chosen or spec == "int4(scale='row')"                         # which has nothing to learn
    for start in (128, 0, 512):                                          # as after an interruption
        a.put(start, half.float()[start:start + 64])
    assert all(torch.equal(t, state[name]) for name, t in a.state_dict().items())
    loaded = ec.load(ec.save(a, tmp_path / "a"))
    assert torch.equal(loaded(IDS), a(IDS)) and ec.memory(loaded) == ec.memory(a)
    broken = X.clone()
    broken[411, 3] = float("inf")
    with pytest.raises(ValueError, match="row 411 holds NaN or infinity"):
        ec.compress(broken, spec)


def test_looking_up_needs_no_faiss(tmp_path):
    for name in ("pq", "opq", "mag_pq", "rq", "pca_pq"):
        ec.save(ec.compress(X, f"{name}(bits=3)"), tmp_path / name)
    code = ("import sys; sys.modules['faiss'] = None\n"
            "import torch, ecstudy as ec\n"
            "for name in ('pq', 'opq', 'mag_pq', 'rq', 'pca_pq'):\n"
            "    assert ec.load(f'{sys.argv[1]}/{name}')(torch.arange(5)).shape == (5, 24)\n"
            "try:\n    ec.compress(torch.randn(300, 8), 'pq')\n"
            "except ImportError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "faiss is not installed; pip install 'ecstudy[rag]'"


def test_torch_and_faiss_share_a_process():
    """faiss first; here torch was."""
    code = ("import faiss, torch\nimport numpy as np\nx = torch.randn(300, 300)\n"
            "index = faiss.IndexFlatL2(300); index.add(x.numpy())\n"
            "assert (index.search(x.numpy(), 1)[1][:, 0] == np.arange(300)).all()\n"
            "assert torch.allclose((x @ x.T).diagonal(), x.square().sum(1), rtol=1e-3)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bad_options_are_named():
    for spec, text in [
        ("pq(parts=25)", "parts=25: expected an integer, 1 to 24, the number of columns"),
        ("pq(bits=0)", "bits=0: expected an integer, 1 to 16"),
        ("opq(rounds=-1)", "rounds=-1: expected an integer of at least 0"),
        ("pca_pq(width=30)", "width=30: expected an integer, 1 to 24 axes"),
        ("mag_pq(groups=9)", "groups=9: expected an integer, 1 to 8"),
        ("mag_pq(bits=16)", "bits=16: expected an integer, 1 to 15"),
        ("rq(splits=5)", "splits=5: expected a divisor of the embedding dimension 24"),
        ("rq(levels=65)", "levels=65: expected an integer, 1 to 64"),
        ("int4(bits=9)", "bits=9: expected an integer, 1 to 8"),
        ("int4(scale='global')", "scale='global': expected 'column' or 'row'"),
        ("rabitq(width=0)", "width=0: expected an integer, 1 to 24"),
        ("rescore(coarse='full')", "coarse='full': expected one of the compressors"),
        ("rescore(bits=9)", "bits=9: expected 1 to 8, 16 or 32"),
        ("rescore(keep=0)", "keep=0: expected an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            ec.compress(X, spec)
    for spec in ("rq(levels=1, bits=3)", "opq(parts=2, bits=3)", "pca_pq(parts=2, bits=3)"):
        with pytest.raises(ValueError, match="do not fit float16 codebooks: pass half=False"):
            ec.compress(X * 1e5, spec)


def test_rescore_takes_its_size_from_the_coarse_method():
    row = ec.weigh("rescore(coarse='pq(bits=4)')", 10_000, 24, 0.25)
    plain = [ec.weigh(f"pq(bits=4, parts={row['knob'] + more})", 10_000, 24)["bytes_inference"] for more in (0, 1)]
    rest = ec.weigh("int4(scale='row')", 10_000, 24)["bytes_inference"]
    assert row["bytes_inference"] == plain[0] + rest <= 0.25 * 960_000 < plain[1] + rest
    assert ec.weigh("rescore(coarse='pq(parts=3)', bits=1)", 10_000, 24, 0.5)["knob"] == 3
