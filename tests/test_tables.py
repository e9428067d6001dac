"""Holders of vectors, exact selection, rounding, and the row-sparse optimiser against torch's own."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecstudy.memory import memory
from ecstudy.select import kth_magnitude, largest, prune_
from ecstudy.sparse import SparseTable
from ecstudy.tables import FloatArray, FloatTable, IntTable, coalesce, stochastic_round
from ecstudy.training import RowAdam

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
every_device = pytest.mark.parametrize("device", DEVICES)


@every_device
def test_coalesce_sums_duplicates(device):
    index = torch.tensor([5, 2, 5, 5, 0], device=device)
    unique, total = coalesce(index, torch.arange(10.0, device=device).view(5, 2))
    assert unique.tolist() == [0, 2, 5] and total.tolist() == [[8, 9], [2, 3], [10, 13]]


@every_device
@pytest.mark.parametrize("width", [1, 16])
def test_row_adam_is_torch_sparse_adam(device, width):
    """Same numbers as torch.optim.SparseAdam over many steps, duplicates in a batch and idle rows included."""
    torch.manual_seed(0)
    table = FloatTable(30, width, 0.1).to(device)
    weight = torch.nn.Parameter(table.weight.detach().clone())
    ours, theirs = RowAdam([table], lr=0.01), torch.optim.SparseAdam([weight], lr=0.01)
    for step in range(25):
        ids = torch.randint(0, min(10 + step, 30), (40,), device=device)
        target = torch.randn(40, width, device=device)
        ours.zero_grad()
        (table.gather(ids) - target).square().sum().backward()
        ours.step()
        theirs.zero_grad()
        (torch.nn.functional.embedding(ids, weight, sparse=True) - target).square().sum().backward()
        theirs.step()
    torch.testing.assert_close(table.weight, weight)


@every_device
def test_untouched_rows_do_not_move(device):
    """Lazy Adam: a row's moments do not decay and its weights do not drift while it is idle."""
    table = FloatTable(10, 4, 0.1).to(device)
    optimizer = RowAdam([table], lr=0.1)
    for ids in ([1, 2], [2, 3], [2, 2]):
        before = table.weight.detach().clone()
        optimizer.zero_grad()
        table.gather(torch.tensor(ids, device=device)).square().sum().backward()
        optimizer.step()
        moved = (table.weight != before).any(1).nonzero().view(-1).tolist()
        assert moved == sorted(set(ids))


def test_row_adam_reads_and_writes_each_touched_row_once():
    calls = []

    class Counting(FloatTable):
        def read(self, index):
            calls.append(("read", index.tolist()))
            return super().read(index)

        def write(self, index, rows):
            calls.append(("write", index.tolist()))
            super().write(index, rows)

    table = Counting(10, 4, 0.1)
    optimizer = RowAdam([table])
    table.gather(torch.tensor([7, 3, 7, 7])).sum().backward()
    optimizer.step()
    assert calls == [("read", [3, 7]), ("write", [3, 7])]


def test_bad_learning_rate_is_named():
    with pytest.raises(ValueError, match="lr=-1"):
        RowAdam([FloatTable(2, 2, 0.1)], lr=-1)


@every_device
def test_stochastic_rounding_is_unbiased_and_independent_per_element(device):
    torch.manual_seed(0)
    x = torch.tensor([0.3, -1.75, 2.0, 0.01], device=device)
    draws = torch.stack([stochastic_round(x) for _ in range(4000)])
    error = draws.mean(0) - x
    sigma = ((x - x.floor()) * (1 - (x - x.floor())) / 4000).sqrt()
    assert (error.abs() <= 4.5 * sigma + 1e-6).all()
    assert set(draws[:, 2].tolist()) == {2.0}                     # whole numbers stay
    # the published kernel re-uses one random number for a whole row; equal values must round independently
    rows = stochastic_round(torch.full((2000, 16), 0.5, device=device))
    correlation = torch.corrcoef(rows.T.cpu())
    assert (correlation - torch.eye(16)).abs().max() < 0.12


@every_device
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", [0.01, "row"])
def test_integer_tables_err_by_at_most_one_step(device, bits, scale):
    torch.manual_seed(0)
    table = IntTable(50, 16, bits=bits, scale=scale).to(device)
    rows = torch.randn(50, 16, device=device) * 0.3
    index = torch.arange(50, device=device)
    step = 0.01 if scale == 0.01 else rows.abs().amax(1, keepdim=True) * (1 + 2 ** -6) / table.top
    table.encode(rows)
    assert ((table.read(index) - rows).abs() <= step / 2 + 1e-6).all()
    table.write(index, rows)
    assert ((table.read(index) - rows).abs() <= step + 1e-6).all()
    top = 0.01 * (table.top + 1)
    if scale == 0.01:                                             # what does not fit is clamped, not wrapped
        table.write(index, rows * 1e6)
        assert (table.read(index).abs() <= top * 1.001).all() and (table.read(index).sign() == rows.sign()).all()
    table.write(index, torch.zeros_like(rows))
    assert (table.read(index) == 0).all()


@every_device
def test_integers_train_by_rounding_back_what_adam_wrote(device):
    """One step equals: decode, Adam in float32, round stochastically; there is no float copy of the table."""
    torch.manual_seed(0)
    table = IntTable(200, 8, bits=8, scale=0.01, bound=0.5).to(device).train()
    assert not list(table.parameters()) and memory(table) == 200 * 8
    codes = table.codes.clone()
    optimizer = RowAdam([table], lr=0.005)       # half a step of the scale: rounding to nearest would lose or double it
    ids = torch.arange(100, device=device)
    table.gather(ids.repeat(2)).sum().backward()
    optimizer.step()
    change = (table.codes - codes)[:100].float()
    assert set(change.unique().tolist()) == {-1.0, 0.0} and abs(change.mean() + 0.5) < 0.08
    assert torch.equal(table.codes[100:], codes[100:])
    optimizer.zero_grad()
    assert table.touched() is None


@every_device
def test_a_gather_used_twice_sums_its_gradients(device):
    table = IntTable(10, 4, bits=16, scale="row", bound=0.5).to(device).train()
    (table.gather(torch.tensor([1, 2], device=device)).sum()
     + 2 * table.gather(torch.tensor([[2], [5]], device=device)).sum()).backward()
    index, grad = table.touched()
    assert index.tolist() == [1, 2, 5] and grad[:, 0].tolist() == [1, 3, 2]


@every_device
@pytest.mark.parametrize("length, blocks, block", [(20, 30, 4), (1000, 50, 16), (16, 5, 16), (64, 200, 1)])
def test_overlapping_blocks_have_the_dense_gradient(device, length, blocks, block):
    torch.manual_seed(0)
    array = FloatArray(length, 0.1).to(device)
    start = torch.randint(0, length - block + 1, (blocks,), device=device)
    weight = torch.randn(blocks, block, device=device)
    (array.blocks(start, block) * weight).sum().backward()
    dense = array.weight.grad.clone()
    array.forget()
    array.sparse = True
    (array.blocks(start, block) * weight).sum().backward()
    assert array.weight.grad.is_sparse
    index, values = array.touched()
    assert index.data_ptr() == array.weight.grad._indices().data_ptr()       # summed in the backward pass, not again
    assert torch.equal(index, index.unique())
    torch.testing.assert_close(torch.zeros_like(dense).index_copy(0, index, values), dense)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10 ** 6), st.floats(0, 1), st.booleans())
def test_exact_selection_equals_a_sort(n, seed, share, ties):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator)
    if ties:
        w = (w * 2).round() / 2
    k = int(share * n)
    magnitude = w.abs()
    expected = magnitude.argsort(descending=True, stable=True)[:k].sort().values
    assert torch.equal(largest(w, k), expected)
    if k:
        threshold = kth_magnitude(w, k)
        assert threshold == magnitude.sort(descending=True).values[k - 1].item()
        pruned = w.clone()
        prune_(pruned, k)
        assert torch.equal(pruned.nonzero().view(-1), expected[w[expected] != 0])
        assert torch.equal(pruned[expected], w[expected])


@pytest.mark.parametrize("device", DEVICES)
def test_selection_works_across_blocks(device, monkeypatch):
    monkeypatch.setattr("ecstudy.select.BLOCK", 64)
    torch.manual_seed(0)
    w = torch.randn(100, 16, device=device)
    w[::2] = 0
    for k in (1, 63, 64, 65, 700, 900, 1600):
        expected = w.view(-1).abs().cpu().argsort(descending=True, stable=True)[:k].sort().values
        assert torch.equal(largest(w, k).cpu(), expected)
    pruned = w.clone()
    prune_(pruned, 0)
    assert not pruned.any()


def test_selection_rejects_what_it_cannot_do():
    with pytest.raises(ValueError, match="k=0"):
        kth_magnitude(torch.ones(3), 0)
    with pytest.raises(TypeError, match="expected float32"):
        kth_magnitude(torch.ones(3).double(), 1)


def test_every_holder_quantises_or_says_why_not():
    weight = torch.randn(20, 16)
    holders = [FloatTable(20, 16, 0.5), FloatArray(320, 0.5), SparseTable.of(weight, 100)]
    for holder in holders:
        small = holder.quantised(8)
        assert memory(small) < memory(holder)
        index = torch.arange(holder.shape[0])
        a, b = holder.gather(index), small.gather(index)
        assert (a - b).abs().max() <= a.abs().max() / 100
        with pytest.raises(TypeError, match="already quantised"):
            next(h for h in (small, getattr(small, "values", None)) if type(h).__name__.startswith("Int")).quantised(8)
    with pytest.raises(ValueError, match="scale=0"):
        IntTable(2, 2, scale=0.0)


def test_a_matrix_is_taken_block_by_block_from_a_memory_map(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix)
    mapped = np.load(tmp_path / "m.npy", mmap_mode="r")
    table = FloatTable(1000, 8, 0.1)
    table.load(mapped, block=77)
    assert np.array_equal(table.weight.detach().numpy(), matrix)
