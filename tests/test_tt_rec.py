"""Tensor-train embeddings against their definition."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import margin, write

import ecstudy as ec
from ecstudy.budget import build
from ecstudy.data.cardinalities import FIELDS
from ecstudy.fields import Fields
from ecstudy.methods import tt_rec
from ecstudy.methods.tt_rec import TtRec, cells, columns, grid, scatter
from ecstudy.training import Optimizers

PAPER = {"criteo": (376, 157, 46, 13), "avazu": (336, 147, 40, 11), "company": (329, 133, 39, 11)}
COMPRESSED = {"criteo": (4, 6, 12, 18), "avazu": (2, 2, 6, 11)}


def batch(sizes, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in sizes], 1)


def reference(emb, ids):
    """The definition, id by id in float64, from the cores alone."""
    cores = [core.weight.detach().double() for core in emb.cores]
    d0, d1, d2 = columns(emb.dim)
    out = torch.empty(*ids.shape, emb.dim, dtype=torch.float64)
    starts, plain = [0, 0, 0], 0
    for field, n in enumerate(emb.fields.sizes):
        if cells(n, columns(emb.dim), emb.rank) >= n * emb.dim:
            out[:, field] = emb.table.weight.detach().double()[plain + ids[:, field]]
            plain += n
            continue
        c, b, a = grid(n)
        for row, i in enumerate(ids[:, field].tolist()):
            g0 = cores[0][starts[0] + i % c].view(d0, emb.rank)
            g1 = cores[1][starts[1] + i // c % b].view(emb.rank, d1, emb.rank)
            g2 = cores[2][starts[2] + i // (b * c)].view(d2, emb.rank).T
            out[row, field] = torch.einsum("xr,rys,sz->xyz", g0, g1, g2).reshape(-1)
        starts = [start + factor for start, factor in zip(starts, (c, b, a))]
    assert starts == [core.shape[0] for core in emb.cores]
    return out


@pytest.mark.parametrize("dim, rank", [(16, 1), (16, 7), (8, 20), (12, 5), (7, 3), (1, 2)])
def test_an_embedding_is_the_product_of_its_cores(dim, rank):
    sizes = [3000, 5, 70_001, 900, 40]
    emb = ec.make(f"tt_rec(rank={rank})", sizes, dim)
    ids = batch(sizes, 300)
    ids[:200, 0] %= 90                                            # many ids of few middle rows: groups of all sizes
    expected = reference(emb, ids)
    for dtype in (torch.int64, torch.int32):
        torch.testing.assert_close(emb(ids.to(dtype)).double(), expected, atol=1e-5 * float(expected.std()), rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(emb.deploy()(ids), emb(ids).detach(), rtol=0, atol=0)


def test_blocks_change_nothing(monkeypatch):
    emb = ec.make("tt_rec(rank=6)", [5000, 20_000], 16)
    ids = batch([5000, 20_000], 500)
    whole = emb(ids)
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    (whole * weight).sum().backward()
    expected = [core.weight.grad.clone() for core in emb.cores]
    emb.zero_grad()
    monkeypatch.setattr(sys.modules["ecstudy.methods.tt_rec"], "BLOCK", 700)      # one or a few groups at a time
    with torch.no_grad():
        torch.testing.assert_close(emb(ids), whole)
    (emb(ids) * weight).sum().backward()
    for core, gradient in zip(emb.cores, expected):
        torch.testing.assert_close(core.weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_definition():
    sizes = [400, 2000, 4]                                        # the last stays plain
    emb = ec.make("tt_rec(rank=3)", sizes, 8)
    assert emb.deep.tolist() == [0, 1]
    Optimizers(emb)                                               # sparse gradients
    ids = batch(sizes, 60)
    weight = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(1))
    (emb(ids) * weight).sum().backward()
    c, b, a = zip(*(grid(n) for n in sizes[:2]))
    cores = [core.weight.detach().double().requires_grad_() for core in emb.cores]
    total = 0
    for field in range(2):
        i = ids[:, field]
        g0 = cores[0][sum(c[:field]) + i % c[field]].view(60, 2, 3)
        g1 = cores[1][sum(b[:field]) + i // c[field] % b[field]].view(60, 3, 2, 3)
        g2 = cores[2][sum(a[:field]) + i // (c[field] * b[field])].view(60, 2, 3).mT
        total = total + (torch.einsum("bxr,brys,bsz->bxyz", g0, g1, g2).reshape(60, 8) * weight[:, field]).sum()
    total.backward()
    for core, expected in zip(emb.cores, cores):
        rows, gradient = core.touched()
        touched = expected.grad.abs().sum(1).nonzero()[:, 0]      # and no other row: free slots leave none behind
        assert rows.tolist() == touched.tolist()
        torch.testing.assert_close(gradient.double(), expected.grad[rows], rtol=1e-4, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.integers(1, 3000), st.integers(1, 10 ** 9)))
def test_factors_hold_every_id_and_are_the_studys(n):
    c, b, a = grid(n)
    first = next(x for x in range(max(1, round(n ** (1 / 3)) - 2), n + 1) if x ** 3 >= n)
    assert a * b * c >= n > (a - 1) * b * c                       # as tight as the last factor can be
    assert a <= first and (b - 1) ** 2 * first < n <= b ** 2 * first and c == -(-n // (first * b))


def test_every_id_has_its_own_rows_and_every_row_is_used():
    sizes = [1, 50, 333, 4096, 20_000]
    emb = ec.make("tt_rec(rank=2)", sizes, 16)
    ids = torch.arange(max(sizes))[:, None] % torch.tensor(sizes)
    _, distinct, inverse = emb.encode(ids)
    blocks, (row0, row1, row2), slot = emb.layout(distinct)
    row1 = torch.cat([rows.repeat_interleave(block[1])
                      for rows, block in zip(row1.split([groups for groups, _ in blocks]), blocks)])
    rows = torch.stack([row0, row1, row2], 1)[slot[inverse]]      # [ids, compressed fields, cores]
    assert emb.deep.tolist() == [1, 2, 3, 4]
    used = [set(), set(), set()]
    for place, field in enumerate(emb.deep.tolist()):
        assert len(rows[:, place].unique(dim=0)) == sizes[field]
        for before, column in zip(used, rows[:, place].T):
            assert not before & set(column.tolist())              # fields share no row
            before |= set(column.tolist())
    assert [len(before) for before in used] == [core.shape[0] for core in emb.cores]


def test_columns_are_the_studys_for_powers_of_two_and_even_for_others():
    assert [columns(d) for d in (8, 16, 32, 64, 128)] == [(2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)]
    assert [columns(d) for d in (1, 4, 7, 12, 768)] == [(1, 1, 1), (1, 2, 2), (1, 1, 7), (2, 2, 3), (8, 8, 12)]


@pytest.mark.parametrize("dataset", PAPER)
def test_ranks_and_compressed_fields_are_the_papers(dataset):
    """Fact sheet 2.3: ranks at 50, 10, 1 and 0.1 %, with training memory three times what ships."""
    sizes = [int(n) for n in FIELDS[dataset][1]]
    for i, budget in enumerate((0.5, 0.1, 0.01, 0.001)):
        row = ec.weigh("tt_rec", sizes, 16, budget)
        assert row["knob"] == PAPER[dataset][i]
        assert row["training_pct"] == pytest.approx(3 * row["inference_pct"])
        emb = build("tt_rec", sizes, 16, knob=row["knob"], device="meta")
        assert dataset not in COMPRESSED or len(emb.deep) == COMPRESSED[dataset][i]
    assert round(ec.weigh("tt_rec", sizes, 16, 0.5)["inference_pct"], 1) in (49.8, 50.0)


def test_sizes_end_where_nothing_is_compressed():
    sizes = [300, 20, 2000]
    knobs = TtRec.sizes(Fields(sizes), 16)
    last, before = (build("tt_rec", sizes, 16, knob=knobs[i]) for i in (-1, -2))
    assert last.cores is None and before.cores is not None and len(before.deep) == 1
    assert ec.memory(last) == ec.memory(ec.make("full", sizes, 16))


@pytest.mark.parametrize("rank", [1, 4, 20, 60])
def test_the_start_has_the_scale_of_full_at_every_rank(rank):
    sizes = [200_000, 30]
    emb = ec.make(f"tt_rec(rank={rank})", sizes, 16)
    target = Fields(sizes).bound() / 3 ** 0.5
    ids = batch(sizes, 20_000)
    with torch.no_grad():
        x = emb(ids)[:, 0]
    assert x.std().item() == pytest.approx(target, rel=0.15 if rank == 1 else 0.05)
    assert abs(x.mean().item()) < 0.1 * target


def test_the_published_start_grows_with_the_rank():
    sizes = [200_000, 3]
    ids = batch(sizes, 5000)
    for rank in (4, 40):
        emb = ec.make(f"tt_rec(rank={rank}, init='paper')", sizes, 16)
        for core in emb.cores:
            z = core.weight.detach() * (np.prod(grid(200_000)) / 3) ** (1 / 6)
            assert z.abs().min() >= 2 - 1e-5 and z.square().mean().item() == pytest.approx(5.746, rel=0.03)
            assert abs(z.mean().item()) < 5 * (5.746 / z.numel()) ** 0.5 and z.abs().max() < 7
        with torch.no_grad():
            scale = emb(ids)[:, 0].std().item()
        # E[z^2] = 5.746 of each factor, R^2 paths, scale^2 = 3 / P of all three together
        assert scale == pytest.approx(rank * (5.746 ** 3 * 3 / np.prod(grid(200_000))) ** 0.5, rel=0.1)


@pytest.mark.parametrize("option", ["rank=0", "rank=1.5", "init='zero'", "order='random'"])
def test_bad_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]}=.*expected"):
        ec.make(f"tt_rec({option})", [100, 50], 4)


def table_of(emb):
    """All vectors of a module with one field."""
    with torch.no_grad():
        return emb(torch.arange(emb.fields.n))


def test_fit_recovers_a_table_of_its_rank_and_keeps_the_bounds_of_others():
    truth = table_of(ec.make("tt_rec(rank=5)", 729, 16, seed=3)) * 100
    for rank in (5, 9):                                           # also with rank to spare
        small = ec.compress(truth, f"tt_rec(rank={rank})")
        torch.testing.assert_close(table_of(small), truth, rtol=1e-3, atol=1e-4 * float(truth.std()))
    c, b, a = grid(700)
    rough = torch.randn(a * b * c, 16, generator=torch.Generator().manual_seed(0))[:700]
    errors = []
    for rank in (2, 6, 10):
        error = (table_of(ec.compress(rough, f"tt_rec(rank={rank})")) - rough).square().sum().item()
        grown = torch.nn.functional.pad(rough, (0, 0, 0, a * b * c - 700)).view(a, b, c, 2, 2, 4)
        first = grown.permute(2, 3, 0, 1, 4, 5).reshape(c * 2, -1)
        third = grown.permute(0, 5, 1, 2, 3, 4).reshape(a * 4, -1)
        tails = [torch.linalg.svdvals(cut)[rank:].square().sum().item() for cut in (first, third)]
        assert max(tails) * 0.99 - 1e-3 <= error <= sum(tails) * 1.001 + 1e-3           # the bounds of TT-SVD
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    emb = ec.make("tt_rec(rank=5)", [3, 729, 2, 729], 16)         # plain fields are copied
    emb.fit(torch.cat([rough[:3], truth, rough[3:5], truth.flip(0)]))        # flipped it still has rank 5
    with torch.no_grad():
        x = emb(torch.tensor([[2, 5, 1, 700]]))[0]
    expected = torch.stack([rough[2], truth[5], rough[4], truth[28]])
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)


def test_fit_takes_parts_of_a_matrix_and_any_factors_of_its_columns(tmp_path, monkeypatch):
    rough = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", rough.numpy())
    for spec in ("tt_rec(rank=6)", "tt_rec(rank=6, columns=(3, 3, 2))"):
        monkeypatch.setattr(tt_rec, "FIT", 1 << 25)
        whole = table_of(ec.compress(rough, spec))
        monkeypatch.setattr(tt_rec, "FIT", 1)                     # one value of the middle digit at a time
        for matrix in (rough, rough.numpy(), tmp_path / "x.npy"):
            torch.testing.assert_close(table_of(ec.compress(matrix, spec)), whole, rtol=1e-3, atol=1e-4)
    (c, b, a), pad = grid(700), torch.nn.functional.pad
    grown = pad(rough, (0, 2, 0, a * b * c - 700)).view(a, b, c, 3, 3, 2)          # 18 columns, of which 16 are used
    tails = [torch.linalg.svdvals(cut)[6:].square().sum().item() for cut in
             (grown.permute(2, 3, 0, 1, 4, 5).reshape(c * 3, -1), grown.permute(0, 5, 1, 2, 3, 4).reshape(a * 2, -1))]
    assert (whole - rough).square().sum() <= sum(tails) * 1.001 and whole.shape == (700, 16)
    for wrong in ("(2, 2, 2)", "(4, 4)", "4", "(-4, -4, 1)"):
        with pytest.raises(ValueError, match="expected three factors whose product is at least 16"):
            ec.make(f"tt_rec(columns={wrong})", 700, 16)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.integers(1, 3000), st.integers(1, 3 * 10 ** 9)))
def test_scattering_is_a_permutation_that_parts_neighbours(n):
    step, inverse = scatter(n)
    assert step * inverse % n == 1 % n and (step - 1) * (n - 1) < 2 ** 63
    assert n < 200 or n / 5 < step < n * 4 / 5


@pytest.mark.parametrize("sizes", [[700], [3, 729, 2, 1000]])
def test_scattered_order_is_the_given_order_of_moved_rows(sizes, monkeypatch):
    rough = torch.randn(sum(sizes), 16, generator=torch.Generator().manual_seed(0))
    given, scattered = ec.make("tt_rec(rank=6)", sizes, 16), ec.make("tt_rec(rank=6, order='scattered')", sizes, 16)
    place = [torch.arange(n) * scatter(n)[0] % n if cells(n, columns(16), 6) < n * 16 else torch.arange(n)
             for n in sizes]
    moved = torch.cat([part[p.argsort()] for part, p in zip(rough.split(sizes), place)])
    given.fit(moved), scattered.fit(rough)
    ids = batch(sizes, 500)
    with torch.no_grad():
        expected = given(torch.stack([p[column] for p, column in zip(place, ids.T)], 1))
        for dtype in (torch.int64, torch.int32):
            torch.testing.assert_close(scattered(ids.to(dtype)), expected, rtol=1e-3, atol=1e-4)
    assert ec.memory(given) == ec.memory(scattered)


def test_alike_neighbours_matter_in_the_given_order_only():
    """Runs of 27 alike rows, as passages of an article are: digits in the given order tell runs apart."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(27, 16, generator=generator).repeat_interleave(27, 0)
    mixed = rows[torch.randperm(len(rows), generator=generator)]

    def error(matrix, order):
        return (table_of(ec.compress(matrix, f"tt_rec(rank=4, order='{order}')")) - matrix).square().mean().item()

    alike, random = error(rows, "given"), error(mixed, "given")
    assert abs(random / alike - 1) > 0.2
    assert error(rows, "scattered") == pytest.approx(random, rel=0.15)


def test_ranks_are_those_of_the_paper_for_passages():
    """Fact sheet 5: 21,015,324 x 768 as 276^3 rows and 9 x 9 x 10 columns."""
    for budget, rank in ((0.5, 1801), (0.1, 805), (0.01, 253), (0.001, 79)):
        assert ec.weigh("tt_rec(columns=(9, 9, 10))", 21_015_324, 768, budget)["knob"] == rank


def test_tt_rec_pays_where_effects_factor_over_the_digits(tmp_path):
    """Effects that are a product of one sign per digit: few rows learn what no hash of 100 buckets can hold."""
    rng = np.random.default_rng(7)
    n, rows = 8000, 30_000
    c, b, a = grid(n)
    ids = np.stack([rng.integers(0, n, rows), rng.integers(0, 10, rows)], 1)
    effect = [rng.choice([-1, 1], size) for size in (c, b, a)]
    i = ids[:, 0]
    logit = 3.0 * effect[0][i % c] * effect[1][i // c % b] * effect[2][i // (b * c)]
    data = write(tmp_path / "data", [n, 10], ids, logit)
    assert margin("tt_rec", data, 0.02) > 0.3
