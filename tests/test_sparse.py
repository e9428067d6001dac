"""Sparse tables: six forms of index, each against the masked dense table; which is taken; ranks and maps of ids."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import ecstudy as ec
from ecstudy import maps, sparse
from ecstudy.data.cardinalities import FIELDS
from ecstudy.memory import memory
from ecstudy.select import largest
from ecstudy.sparse import FORMATS, Bits, RunningCounts, SparseTable, popcount

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
every_device = pytest.mark.parametrize("device", DEVICES)
every_form = pytest.mark.parametrize("form", FORMATS)
CRITEO = sum(int(n) for n in FIELDS["criteo"][1])


def check(weight, kept, form, ids, quantised=False):
    """A form equals the masked dense table, whether values are read one by one or as windows."""
    table = SparseTable.of(weight, kept, form)
    assert table.form == form and table.values.weight.numel() == kept
    mask = torch.zeros(weight.numel(), device=weight.device)
    mask[largest(weight, kept)] = 1
    expected = (weight * mask.view_as(weight))[ids]
    for many in (0, 3, 100):
        sparse.MANY = many
        assert torch.equal(table.gather(ids), expected), (form, tuple(weight.shape), kept, many)
        if quantised and kept:
            error = (table.quantised(8).gather(ids) - expected).abs()
            assert error.max() <= weight.abs().max() / 250 and not error[expected == 0].any()
    assert memory(table) == memory(SparseTable.of(weight.to("meta"), kept, form))


@pytest.fixture(autouse=True)
def many():
    before = sparse.MANY
    yield
    sparse.MANY = before


@every_device
@every_form
@pytest.mark.parametrize("rows, width", [(1, 16), (40, 16), (3000, 16), (300, 8), (33, 10), (10, 1), (20, 3), (70, 64),
                                         (129, 32), (30, 63), (9, 100), (3, 300), (70, 192)])
def test_every_form_equals_the_masked_dense_table(device, form, rows, width):
    if not FORMATS[form].fits(width):
        with pytest.raises(ValueError, match=f"form='{form}': expected one of bitmask, .* at width {width}"):
            SparseTable(rows, width, 1, form)
        return
    generator = torch.Generator().manual_seed(rows + width)
    weight = torch.randn(rows, width, generator=generator)
    weight[::3] = 0                                               # whole rows of zeros, as untrained ids leave behind
    weight[rows // 2:rows // 2 + rows // 6] *= 50                 # and rows kept whole beside each other
    ids = torch.randint(0, rows, (5, 7), generator=generator)
    ids[0, :2] = torch.tensor([0, rows - 1])                      # the last row ends where the values end
    for share in (0, 0.001, 0.05, 0.3, 0.9, 1):
        for kept in {int(share * rows * width), min(int(share * rows * width) + 1, rows * width)}:
            check(weight.to(device), kept, form, ids.to(device), quantised=share == 0.3)
    assert SparseTable.of(weight, 1, form).gather(ids[:0]).shape == (0, 7, width)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.integers(1, 600), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
def test_any_shape(form, rows, width, share, seed):
    if FORMATS[form].fits(width):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
        check(weight, int(share * rows * width), form, torch.randint(0, rows, (40,), generator=generator))


@every_form
def test_places_beyond_the_reach_of_short_integers(form):
    """100,000 rows: groups, runs and blocks of every form end inside; fully kept and empty stretches are longer than
    a run of running counts."""
    weight = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))
    weight[20_000:45_000] = 0
    weight[60_000:70_000] += 10 * weight[60_000:70_000].sign()
    ids = torch.cat([torch.arange(0, 100_000, 97), torch.tensor([99_999, 59_999, 60_000, 69_999, 70_000])])
    check(weight, 400_000, form, ids)


# --- which form -------------------------------------------------------------------------------------------------------

def test_a_light_form_is_chosen_and_more_values_never_weigh_less():
    for width in (1, 8, 16, 32, 100, 300):
        for rows in (30, 5000, 3_000_000):
            cells, forms, before = rows * width, [], 0
            even, low = {round(cells * i / 40) for i in range(41)}, {round(cells ** (i / 19)) for i in range(20)}
            for kept in sorted(even | low):
                table = SparseTable(rows, width, kept, device="meta")
                weights = [memory(SparseTable(rows, width, kept, form, device="meta"))
                           for form in FORMATS if FORMATS[form].fits(width)]
                assert min(weights) <= memory(table) <= sparse.NEARLY * min(weights)
                assert memory(table) >= before
                before = memory(table)
                forms.append(list(FORMATS).index(table.form))
            assert forms == sorted(forms, reverse=True), (width, rows)     # from the slow and small to the fast


def test_values_kept_at_criteo_size():
    """Share of values at each budget, above what the earlier forms (bitmask with int32 counts, int32 positions) kept
    where those were chosen: 1.0375 a row at 10 %, 0.08 at 1 %, 0.008 at 0.1 %."""
    kept = {}
    for budget, form in ((0.5, "bitmask"), (0.1, "packed_csr"), (0.01, "grouped8"), (0.001, "grouped16")):
        found = ec.weigh("deeplight", CRITEO, 16, budget)
        kept[budget] = found["knob"] / CRITEO
        assert SparseTable(CRITEO, 16, found["knob"], device="meta").form == form
        assert 0.9999 * budget <= found["inference_pct"] / 100 <= budget
    assert kept[0.5] > 7.37 and kept[0.1] > 1.19 and kept[0.01] > 0.102 and kept[0.001] > 0.0103


# --- cost -------------------------------------------------------------------------------------------------------------

class Seen(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not self.known & {tensor.untyped_storage().data_ptr()}:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@every_form
def test_a_lookup_makes_no_tensor_of_table_size(form):
    sizes = []
    for rows in (20_000, 200_000):
        weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
        table = SparseTable.of(weight, rows * 3, form)
        seen = Seen()
        seen.known = {t.untyped_storage().data_ptr() for t in [*table.parameters(), *table.buffers()]}
        ids = torch.arange(0, rows, rows // 50)
        table.gather(ids)                                         # small tables of bytes are made once
        with seen:
            table.gather(ids)
        sizes.append(seen.largest)
    assert sizes[1] <= 1.3 * sizes[0] and sizes[0] <= 50 * 16 * 8 * 1.3


@every_device
@every_form
@pytest.mark.parametrize("rows, width, kept", [(1000, 16, 3001), (700, 63, 5000), (500, 200, 901), (9000, 16, 30),
                                               (300, 320, 9000)])
def test_an_index_is_filled_in_blocks_that_may_come_again(device, form, rows, width, kept):
    if not FORMATS[form].fits(width):
        return
    generator = torch.Generator().manual_seed(kept)
    keys = torch.randperm(rows * width, generator=generator)[:kept].sort().values.to(device)
    whole, parts = (FORMATS[form](rows, width, kept, device) for _ in range(2))
    whole.fill(keys)
    for first in range(0, rows, 128):
        count = min(128, rows - first)
        begin, end = torch.searchsorted(keys, torch.tensor([first, first + count], device=device) * width).tolist()
        for _ in range(2):
            parts.put(first, count, keys[begin:end], begin)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


# --- ranks ------------------------------------------------------------------------------------------------------------

def test_popcount():
    values = [0, 1, 2 ** 62, -1, -2 ** 63, 0x5555555555555555, 12345678901234567]
    x = torch.tensor(values)
    assert popcount(x).tolist() == [bin(v & (2 ** 64 - 1)).count("1") for v in values] and x.tolist() == values


@every_device
@pytest.mark.parametrize("share", [0, 0.001, 0.4, 1])
def test_bit_ranks_equal_counting(device, share):
    mask = np.random.default_rng(0).random(200_003) < share
    bits = Bits(len(mask), device)
    bits.fill(torch.from_numpy(mask.nonzero()[0]).to(device))
    position = torch.arange(len(mask), device=device)
    rank, marked = bits.locate(position)
    assert np.array_equal(rank.cpu(), mask.cumsum() - mask) and np.array_equal(marked.cpu(), mask)
    assert torch.equal(bits.get(position).bool(), marked) and torch.equal(bits.rank(position[None]), rank[None])


def test_running_counts_span_their_whole_range():
    before = torch.arange(0, 3000) * 64                           # the most that 1,024 marks of 64 bits can hold
    counts = RunningCounts(3000, 1024, 3000 * 64)
    counts.put(0, before)
    assert torch.equal(counts.at(torch.arange(3000)).long(), before)


@pytest.mark.parametrize("top", [0, 1, 300, 4000, 10_000])
@pytest.mark.parametrize("form", [maps.SortedIds, maps.MarkedIds])
def test_both_maps_find_the_place_of_marked_ids(form, top):
    ids = np.sort(np.random.default_rng(top).permutation(10_000)[:top])
    found = form(10_000, top)
    found.fill(torch.from_numpy(ids))
    place = np.full(10_000, -1)
    place[ids] = np.arange(top)
    every = torch.arange(10_000).view(100, 100)
    assert np.array_equal(found.find(every), place.reshape(100, 100))
    before, marked = found.locate(every)
    assert np.array_equal(before, np.searchsorted(ids, np.arange(10_000)).reshape(100, 100))
    assert np.array_equal(marked, (place >= 0).reshape(100, 100))


def test_a_map_of_bits_weighs_a_little_over_one_bit_per_id():
    assert memory(maps.MarkedIds(CRITEO, 10 ** 6, "meta")) == pytest.approx(CRITEO * 1.25 / 8, rel=1e-3)
