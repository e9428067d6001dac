"""Fewer bits per number, against oracles: PyTorch's operators, caches simulated in plain Python, formulas by hand."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import margin, write, zipf_ids

import ecstudy as ec
from ecstudy.budget import build
from ecstudy.fields import Fields
from ecstudy.memory import memory
from ecstudy.methods.mixed_prec import WAYS, CachedTable
from ecstudy.methods.mpe import LEAST, Levels
from ecstudy.rowwise import GROUP, PackedArray, RowTable, greedy, least_to_largest, stored
from ecstudy.tables import HalfTable, round_half
from ecstudy.training import Optimizers

HALVES = {"fp16": (torch.float16, 10, -14), "bf16": (torch.bfloat16, 7, -126)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- half precision ---------------------------------------------------------------------------------------------------

def neighbours(x: float, mantissa: int, least: int) -> tuple[float, float]:
    """The numbers of a half format around ``x``, in Python floats."""
    step = 2.0 ** (max(math.frexp(x)[1] - 1, least) - mantissa)
    low = math.floor(x / step) * step
    return low, low if low == x else low + step


@pytest.mark.parametrize("form", HALVES)
@settings(max_examples=100, deadline=None)
@given(st.floats(-60000, 60000, width=32))
def test_random_rounding_takes_a_neighbour(form, x):
    dtype, mantissa, least = HALVES[form]
    found = set(round_half(torch.full((64,), x), dtype).double().tolist())
    assert found <= set(neighbours(x, mantissa, least))
    if x == float(torch.tensor(x).to(dtype)):                     # a number of the format stays
        assert found == {x}


@pytest.mark.parametrize("x", [1.0003, -3.14159, 2e-5, -7.7e-8, 1e-9, 300.3])
@pytest.mark.parametrize("form", HALVES)
def test_random_rounding_is_right_on_average(form, x):
    dtype, mantissa, least = HALVES[form]
    torch.manual_seed(0)
    x = float(torch.tensor(x))
    low, high = neighbours(x, mantissa, least)
    draws = 40_000
    up = float((round_half(torch.full((draws,), x), dtype).double() > (low + high) / 2).double().mean())
    share = (x - low) / (high - low)
    assert abs(up - share) < 5 * math.sqrt(max(share * (1 - share), 1e-4) / draws)


def test_what_does_not_fit_is_cut_and_what_is_no_number_stays():
    x = torch.tensor([70000.0, -1e9, math.inf, math.nan, 65504.0, 65503.0])
    out = round_half(x, torch.float16)
    assert out[:2].tolist() == [65504, -65504] and out[2] == math.inf and out[3].isnan() and out[4] == 65504
    assert out[5] <= 65504
    assert torch.isfinite(round_half(torch.full((1000,), 3.4e38), torch.bfloat16)).all()


def test_small_updates_survive_random_rounding_and_only_that():
    torch.manual_seed(0)
    index = torch.arange(200)
    for stochastic in (True, False):
        table = HalfTable(200, 16, stochastic=stochastic)
        table.put(0, torch.ones(200, 16))
        for _ in range(300):                                      # a third of half the distance of numbers above 1
            table.write(index, table.read(index) + 2.0 ** -11 / 3)
        mean = float(table.read(index).mean())
        assert abs(mean - (1 + 100 * 2 ** -11)) < 2e-3 if stochastic else mean == 1


def test_half_tables_weigh_and_train_as_the_sheet_says():
    for spec in ("fp16", "fp16(dtype='bf16')"):
        row = ec.weigh(spec, [1000, 200], 16, 0.5)
        assert (row["inference_pct"], row["training_pct"]) == (50, 250)
    assert not ec.weigh("fp16", [1000, 200], 16, 0.49)["reachable"]
    matrix = normal(100, 8)
    assert torch.equal(ec.compress(matrix, "fp16")(torch.arange(100)), matrix.half().float())
    with pytest.raises(ValueError, match="dtype='fp8': expected 'fp16' or 'bf16'"):
        ec.make("fp16(dtype='fp8')", 10, 4)
    with pytest.raises(ValueError, match="rounding='up'"):
        ec.make("fp16(rounding='up')", 10, 4)


# --- rows of few bits -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 16, 64])
def test_greedy_ranges_are_those_of_torch(bits, width):
    x = normal(60, width) * torch.rand(60, 1) + normal(60, 1, seed=1)
    x[:5] = 0.25                                                  # rows without a range
    low, step = greedy(x, 2 ** bits - 1)
    for i in range(60):
        high, least = torch.choose_qparams_optimized(x[i], width, 200, 0.16, bits)
        expected = stored(torch.tensor(float(least)), torch.tensor(float(high)), 2 ** bits - 1)
        assert (float(low[i]), float(step[i])) == (float(expected[0]), float(expected[1]))


@pytest.mark.parametrize("search", ["greedy", "minmax"])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_are_stored_as_torch_packs_them(bits, search):
    x = normal(50, 16) * torch.rand(50, 1)
    table = RowTable(50, 16, bits, search=search)
    table.encode(x, block=7)
    packed = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_prepack")(x, search == "greedy")
    width = 16 * bits // 8
    ends = packed[:, width:].contiguous().view(torch.float16)                # step, low end
    assert torch.equal(ends.flip(1), table.range)
    ours = table.codes.bytes[:50 * width].view(50, width)
    # PyTorch multiplies by the reciprocal of the step: halves may be rounded the other way
    assert (ours != packed[:, :width]).float().mean() < 0.01
    expected = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_unpack")(packed)
    assert ((table.gather(torch.arange(50)) - expected).abs() <= table.range[:, 1:] * 1.001).all()
    assert memory(table) == 50 * (width + 4) + 7


def test_the_search_never_errs_more_than_the_whole_range():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) ** 3
    for bits in (2, 4):
        errors = []
        for find in (greedy, least_to_largest):
            low, step = find(x, 2 ** bits - 1)
            code = torch.where(step > 0, (x - low) / step, 0).round().clamp(0, 2 ** bits - 1)
            errors.append((code * step + low - x).square().sum(1))
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_step_writes_is_right_on_average(bits):
    torch.manual_seed(0)
    rows, table = normal(20, 16) * 0.01, RowTable(60, 16, bits)
    index = torch.randperm(60)[:20]
    total, draws = torch.zeros(20, 16, dtype=torch.double), 2000
    for _ in range(draws):
        table.write(index, rows)
        total += table.read(index)
    step = take_step(table, index)
    assert ((total / draws - rows).abs() < 5 * step / math.sqrt(draws) / 2 + 1e-6).all()
    untouched = torch.ones(60, dtype=torch.bool)
    untouched[index] = False
    assert not table.read(untouched.nonzero().view(-1)).any()
    table.write(index[:0], rows[:0])                              # nothing


def take_step(table, index):
    return table.range[index, 1:].float()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_arrays_are_quantised_in_groups(bits, length):
    weight = normal(length)
    array = PackedArray(length, bits)
    array.encode(weight, block=3)
    expected = torch.empty(length)
    for start in range(0, length, GROUP):
        part = weight[start:start + GROUP][None]
        low, step = greedy(torch.nn.functional.pad(part, (0, GROUP - part.shape[1]), value=float(part[0, -1])),
                           2 ** bits - 1)
        code = torch.where(step > 0, (part - low) / step, 0).round().clamp(0, 2 ** bits - 1)
        expected[start:start + GROUP] = code * step + low
    torch.testing.assert_close(array.gather(torch.arange(length)), expected)
    start = torch.arange(length - min(length, 5) + 1)
    assert torch.equal(array.blocks(start, min(length, 5)), array.gather(start[:, None] + torch.arange(min(length, 5))))
    assert memory(array) == -(-length // GROUP) * (GROUP * bits // 8 + 4) + 7


@pytest.mark.parametrize("bits, share", [(2, 12.5), (4, 18.75), (8, 31.25)])
def test_post4bits_rounds_what_full_training_left(bits, share):
    row = ec.weigh(f"post4bits(bits={bits})", [50_000, 20_000], 16)
    assert row["inference_pct"] == pytest.approx(share, rel=1e-4) and row["training_pct"] == 300
    emb = ec.make("post4bits", [40, 9], 16, (share + 0.5) / 100)
    assert emb.bits == bits
    weight = emb.table.weight.detach().clone()
    reference = RowTable(49, 16, bits)
    reference.encode(weight)
    assert torch.equal(emb.deploy().table.gather(torch.arange(49)), reference.gather(torch.arange(49)))
    trained = ec.make(f"post4bits(bits={bits})", 49, 16).eval()
    trained.fit(weight)
    compressed = ec.compress(weight, "post4bits", bits=bits)
    assert torch.equal(compressed(torch.arange(49)), reference.gather(torch.arange(49)))
    assert torch.equal(trained.deploy()(torch.arange(49)), compressed(torch.arange(49)))


def test_post4bits_refuses_other_widths():
    with pytest.raises(ValueError, match="bits=3: expected 2, 4 or 8"):
        ec.make("post4bits(bits=3)", 10, 4)
    with pytest.raises(ValueError, match="search='best': expected 'greedy' or 'minmax'"):
        ec.make("post4bits(search='best')", 10, 4)


# --- a cache of rows in full precision --------------------------------------------------------------------------------

class Cache:
    """The cache of a CachedTable in dictionaries and loops: owners of slots, uses of ids."""

    def __init__(self, cached, policy):
        self.cached, self.policy, self.sets = cached, policy, max(1, -(-cached // WAYS))
        self.owner, self.uses, self.clock = {}, {}, 0

    def step(self, ids):
        self.clock += 1
        for i in ids:
            self.uses[i] = self.uses.get(i, 0) + 1 if self.policy == "lfu" else self.clock
        inside = set(self.owner.values())
        for number in range(self.sets):
            asking = sorted((i for i in ids if i not in inside and i % self.sets == number),
                            key=lambda i: (-self.uses[i], i))
            slots = [s for s in range(number, self.cached, self.sets)]
            slots.sort(key=lambda s: (self.uses[self.owner[s]] if s in self.owner else -1, s))
            for i, slot in zip(asking, slots):
                if slot not in self.owner or self.uses[i] > self.uses[self.owner[slot]]:
                    self.owner[slot] = i


@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("bits, cached", [(8, 70), (4, 20), (2, 1), (4, 0), (8, 300)])
def test_the_cache_is_the_simulated_one(policy, bits, cached):
    rng = np.random.default_rng(0)
    emb = build(f"mixed_prec(bits={bits}, policy='{policy}')", 300, 8, knob=cached)
    table, cache, meant = emb.table, Cache(cached, policy), {}
    assert isinstance(table, CachedTable)
    for t in range(40):
        ids = torch.from_numpy(np.unique(np.minimum(rng.zipf(1.3, 30) - 1, 299)))
        rows = normal(len(ids), 8, seed=t)
        table.write(ids, rows)
        cache.step(ids.tolist())
        meant |= dict(zip(ids.tolist(), rows))
        owner = emb.aux.owner.tolist()
        assert {s: i for s, i in enumerate(owner) if i >= 0} == cache.owner
        place = emb.aux.place
        assert {i: int(place[i]) for i in (place >= 0).nonzero().view(-1).tolist()} == {
            i: s for s, i in cache.owner.items()}
        inside = set(cache.owner.values())
        read = table.read(torch.tensor(sorted(meant)))
        for i, row in zip(sorted(meant), read):
            if i in inside:
                assert torch.equal(row, meant[i])                 # to the bit
            else:                                                 # rounded once, within a range of the row
                spread = float(meant[i].max() - meant[i].min())
                assert (row - meant[i]).abs().max() <= spread / (2 ** bits - 1) * 1.01 + 1e-3
    before = table.read(torch.arange(300))
    emb.deploy()
    assert torch.equal(emb.table.read(torch.arange(300)), before)
    if cached <= len(meant):                                      # no slot was left that owners did not fill
        kept = emb.table.map.marked(300).nonzero().view(-1)
        assert set(cache.owner.values()) <= set(kept.tolist()) and len(kept) == cached


def test_mixed_precision_weighs_as_the_sheet_says():
    sizes = [90_000, 10_000]
    for options, knob, share, training in (("", 5000, 36.4, 249), ("(bits=4)", 1000, 19.9, None)):
        spec = f"mixed_prec{options}"
        emb = build(spec, sizes, 16, knob=knob, device="meta")
        if training:
            assert 100 * emb.training_bytes() / (100_000 * 64) == pytest.approx(training, abs=1)
        assert 100 * memory(emb.deploy()) / (100_000 * 64) == pytest.approx(share, abs=0.15)
    with pytest.raises(ValueError, match="policy='fifo'"):
        ec.make("mixed_prec(policy='fifo')", 10, 4)
    with pytest.raises(ValueError, match="pass counts="):
        ec.make("mixed_prec(policy='static')", 10, 4)
    with pytest.raises(ValueError, match="bits=16: expected 2, 4 or 8"):
        ec.make("mixed_prec(bits=16)", 10, 4)


def test_a_static_cache_holds_the_most_frequent_ids_and_trains_them_in_full():
    counts = np.random.default_rng(0).permutation(60)
    emb = ec.make("mixed_prec(policy='static', bits=2)", [40, 20], 8, cached=7, counts=counts).train()
    reference = emb.table.read(torch.arange(60)).requires_grad_()
    opt = Optimizers(emb, lr=0.01)
    plain = torch.optim.SparseAdam([torch.nn.Parameter(reference.detach().clone())], 0.01)
    ids = torch.stack([torch.arange(40), torch.arange(40) % 20], 1)
    weight = normal(40, 2, 8)
    for _ in range(3):
        opt.zero_grad()
        (emb(ids) * weight).sum().backward()
        opt.step()
        table = plain.param_groups[0]["params"][0]
        (torch.nn.functional.embedding(emb.fields.flat(ids), table, sparse=True) * weight).sum().backward()
        plain.step()
        plain.zero_grad()
    hot = np.argsort(-counts)[:7]
    torch.testing.assert_close(emb.table.read(torch.from_numpy(hot)), table.detach()[hot])
    marked = emb.deploy().table.map.marked(60)
    assert set(marked.nonzero().view(-1).tolist()) == set(hot.tolist())


# --- mixed precision by groups ----------------------------------------------------------------------------------------

SIZES = [50, 20, 8, 300]
COUNTS = np.random.default_rng(5).integers(0, 1000, 378)


def mpe(knob=None, counts=COUNTS, **options):
    torch.manual_seed(0)
    return build("mpe", SIZES, 8, knob=knob, counts=counts, **options)


@pytest.mark.parametrize("numbers", [[5, 0, 60, 300, 13], [0, 378], [370, 8], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 2000]])
def test_levels_find_every_id_among_those_of_its_width(numbers):
    levels = Levels(numbers, 3)
    width = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
    width = width[torch.randperm(len(width), generator=torch.Generator().manual_seed(0))]
    levels.fill(width.to(torch.uint8))
    found, place = levels.locate(torch.arange(len(width)))
    assert torch.equal(found, width)
    for b in range(len(numbers)):
        assert place[width == b].tolist() == list(range(numbers[b]))


def test_groups_are_equal_parts_by_frequency_and_the_penalty_is_the_published_one():
    emb = mpe(groups=6, penalty=0.5)
    order = np.argsort(COUNTS, kind="stable")
    assert emb.aux.group[order].tolist() == (np.arange(378) // 63).tolist()
    total = np.array([COUNTS[order[g * 63:(g + 1) * 63]].sum() for g in range(6)])
    with torch.no_grad():
        emb.aux.gamma.copy_(normal(6, 7) * 0.003)
    p = np.exp(emb.aux.gamma.numpy() / 0.003)
    p /= p.sum(1, keepdims=True)
    expected = 0.5 * (p @ np.arange(7) / (total / total.min())).sum()
    assert float(emb.weighed()) == pytest.approx(expected, rel=1e-4)


def test_rounding_and_its_gradients_are_those_of_lsq_plus():
    emb = mpe()
    with torch.no_grad():
        emb.beta.copy_(normal(8) * 0.1)
    for b in (1, 2, 3, 6):
        rows, alpha, dy = normal(30, 8).requires_grad_(), torch.tensor(0.3, requires_grad=True), normal(30, 8, seed=3)
        code, value = emb.rounded(rows, alpha, b)
        emb.beta.grad = None
        (value * dy).sum().backward()
        low, high = -2 ** (b - 1), 2 ** (b - 1) - 1
        v = ((rows - emb.beta) / alpha).detach()
        q = v.round().clamp(low, high)
        assert torch.equal(code.detach(), q)
        torch.testing.assert_close(value.detach(), q * 0.3 + emb.beta.detach())
        inside = (v >= low) & (v <= high)
        torch.testing.assert_close(rows.grad, dy * inside)
        torch.testing.assert_close(alpha.grad, (torch.where(inside, q - v, q) * dy).sum())
        torch.testing.assert_close(emb.beta.grad, (dy * ~inside).sum(0))


def test_the_search_looks_up_the_mixture():
    emb = mpe(groups=6).train()
    with torch.no_grad():
        emb.aux.gamma.copy_(normal(6, 7) * 0.005)
        emb.beta.copy_(normal(8) * 0.01)
    rows, group = emb.table.weight.detach(), emb.aux.group.long()
    p = (emb.aux.gamma / 0.003).softmax(1)[group]
    expected = torch.zeros_like(rows)
    for b in range(1, 7):
        alpha = emb.alpha[b - 1] + LEAST
        q = ((rows - emb.beta) / alpha).round().clamp(-2 ** (b - 1), 2 ** (b - 1) - 1)
        expected += p[:, b:b + 1] * (q * alpha + emb.beta)
    ids = torch.stack([torch.arange(300) % size for size in SIZES], 1)
    torch.testing.assert_close(emb(ids), expected[emb.fields.flat(ids)])


@pytest.mark.parametrize("limit", [None, 2000, 1500, 600, 250])
def test_widths_are_lowered_to_the_limit_and_what_trained_is_what_ships(limit):
    emb = mpe(limit, groups=12)
    with torch.no_grad():
        emb.aux.gamma.copy_(normal(12, 7) * 0.002)
        emb.beta.copy_(normal(8) * 0.01)
    bits = emb.choose()
    p = (emb.aux.gamma / 0.003).softmax(1)
    learned = [max(b for b in range(7) if p[g, b] >= 1 / 14) for g in range(12)]
    learned[-1] = max(1, learned[-1])
    assert all(b <= most for b, most in zip(bits, learned)) and (bits == learned if limit is None else True)
    emb.settle(bits)
    emb.begin()
    with torch.no_grad():
        emb.table.weight.add_(normal(378, 8) * 0.05)
    ids = torch.stack([torch.arange(300) % size for size in SIZES], 1)
    before = emb.eval()(ids).detach()
    if limit:
        assert bits != learned
    emb.deploy()
    assert torch.equal(emb(ids), before)
    assert memory(emb) <= emb.limit
    dropped = torch.tensor(bits)[torch.from_numpy(np.argsort(np.argsort(COUNTS, kind="stable"))) // emb.each] == 0
    for f, (size, first) in enumerate(zip(SIZES, emb.fields.offset.tolist())):
        assert torch.equal((before[:size, f] == 0).all(1), dropped[first:first + size])


def test_rows_begin_again_with_their_first_values_and_learned_widths_are_saved(tmp_path):
    emb = ec.make("mpe", SIZES, 8, 0.1, counts=COUNTS, seed=3, groups=12)
    first = emb.table.weight.detach().clone()
    assert 0.9 * Fields(SIZES).bound() < first.abs().max() <= Fields(SIZES).bound()
    with torch.no_grad():
        emb.table.weight.zero_()
    emb.begin()
    assert torch.equal(emb.table.weight, first)
    emb.deploy()
    loaded = ec.load(ec.save(emb, tmp_path / "a"))
    ids = torch.stack([torch.arange(300) % size for size in SIZES], 1)
    assert torch.equal(loaded(ids), emb(ids)) and memory(loaded) == memory(emb)
    given = ec.make("mpe", SIZES, 8, counts=COUNTS, groups=12, bits=emb.fitted["bits"])
    assert memory(given.deploy()) == memory(emb)


@pytest.mark.parametrize("options, text", [("groups=0", "groups=0"), ("most=9", "most=9"), ("tau=0.0", "tau=0.0"),
                                           ("bits=[7]", "expected 126 widths"), ("limit=10", "limit=10: expected at")])
def test_mpe_names_what_it_cannot_do(options, text):
    with pytest.raises(ValueError, match=text):
        ec.make(f"mpe({options})", SIZES, 8, counts=COUNTS)


# --- logs on which it must pay ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def all_count(tmp_path_factory):
    """A field of 3,000 ids with power-law frequencies, each with an effect of its own."""
    rng = np.random.default_rng(1)
    ids = np.stack([zipf_ids(rng, 3000, 20_000, 0.7), rng.integers(0, 10, 20_000)], 1)
    return write(tmp_path_factory.mktemp("all") / "data", [3000, 10], ids, 2.5 * rng.normal(size=3000)[ids[:, 0]])


@pytest.mark.parametrize("spec, budget, least", [
    ("fp16", 0.5, 0.01), ("post4bits", 0.3, 0.03), ("mixed_prec(bits=2)", 0.3, 0.03), ("mpe", 0.1, 0.03)])
def test_a_row_of_few_bits_pays_where_every_id_counts(spec, budget, least, all_count):
    assert margin(spec, all_count, budget, max_epochs=3) > least
