"""The physical side of in-training pruning: invariants under random operations, serving forms, the bounded id map."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ecstudy as ec
from ecstudy.methods._ids import WAYS, IdMap
from ecstudy.methods._slots import SERVING, ChunkTable, CompactHash, Slots, dithered, kept_shares
from ecstudy.training import Optimizers

# --- random operations ------------------------------------------------------------------------------------------------


def check(slots: Slots, optimizers=None) -> None:
    """What must hold at any time, each by counting all of it."""
    owned = slots.address[slots.address > 0].tolist()
    free = slots.free[:int(slots.top)].tolist()
    assert len(owned) <= slots.slots                                     # the budget
    assert len(set(owned)) == len(owned)                                 # no slot is owned twice
    assert sorted(owned + free) == list(range(1, slots.slots + 1))       # owned and free slots are all there are
    assert bool((slots.weight[0] == 0).all())                            # slot 0
    assert slots.weight.shape == (slots.slots + 1, slots.width)
    for pair in optimizers.rows.moments if optimizers else ():
        for moment in pair or ():
            assert moment.shape == slots.weight.shape and bool((moment[0] == 0).all())
    assert slots.live().tolist() == slots.address.view(-1).nonzero().view(-1).tolist()


OPERATION = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 10 ** 6)),
    st.tuples(st.just("look"), st.integers(0, 10 ** 6)),
    st.tuples(st.just("round"), st.just(0)),
    st.tuples(st.just("reload"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.floats(0.01, 1), st.booleans(),
       st.sampled_from(["product", "count", "gradient"]), st.sampled_from(["uniform", "dynamic", "listed"]),
       st.booleans(), st.lists(OPERATION, max_size=20))
def test_invariants_hold_under_random_operations(n, k, share, online, utility, ratios, normalise, operations):
    fields = [n, 3]
    slots = max(1, int(share * (n + 3) * k))
    options = dict(slots=slots, chunks=k, utility=utility, normalise=normalise, gamma=0.9,
                   ratios=tuple(range(1, k + 1)) if ratios == "listed" else ratios)
    if online:                                                   # 16 ids at once out of 80: many have to go
        options |= dict(online=True, capacity=16)
        fields = [60, 20]
    emb = ec.make("fiited", [2 ** 40, 2 ** 30] if online else fields, 4, **options).train()
    opt = Optimizers(emb, lr=0.1)
    held = emb.aux.slots
    check(held)
    for name, seed in operations:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randint(0, size, (6,), generator=generator) for size in fields], 1)
        if name == "step":
            opt.zero_grad()
            (emb(ids) * torch.randn(6, 2, 4, generator=generator)).sum().backward()
            opt.step()
            emb.steps += 1
        elif name == "look":
            emb.eval()(ids), emb.train()
        elif name == "round":
            before = held.live().numel()
            said = emb.round(opt)
            assert held.live().numel() == before + said["admitted"] - said["evicted"]
            assert sum(said["shares"]) / k <= 1 + 1e-6
        else:
            emb.load_state_dict({key: value.clone() for key, value in emb.state_dict().items()})
        check(held, opt)
        assert int(emb.kept().sum()) == held.live().numel()
    emb.eval()
    ids = torch.stack([torch.arange(40) % size for size in fields], 1)
    before, kept = emb(ids).clone(), emb.kept()
    emb.deploy()
    assert torch.equal(emb(ids), before)
    assert bool((emb.kept() >= kept).all()) and int(emb.kept().sum()) == slots      # free slots ship as zeros


def test_slots_are_handed_out_last_in_first_out():
    slots = Slots(4, 2, 3, 5, 0.1, "product", 1.0)
    slots.spread(4)                                              # two whole rows of four; the fifth slot is free
    assert slots.address.tolist() == [[1, 2], [0, 0], [3, 4], [0, 0]] and slots.free[:1].tolist() == [5]
    fresh = slots.swap(torch.tensor([5, 0]), torch.tensor([2, 7]))       # chunks (2, 1) and (0, 0) out
    assert fresh.tolist() == [1, 4]                              # pushed 4, then 1; popped in reverse
    assert slots.address.tolist() == [[0, 2], [1, 0], [3, 0], [0, 4]] and int(slots.top) == 1
    assert bool((slots.weight[[1, 4]] == 0).all()) and bool((slots.weight[[2, 3]] != 0).all())
    with pytest.raises(RuntimeError, match="2 slots are wanted and 1 are free"):
        slots.pop(2)


# --- utilities --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["product", "count", "gradient"])
@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5])
def test_utility_is_the_decayed_sum(kind, gamma):
    """Against the recurrence of the paper, visited at every step in float64; with 0.5 the unit changes."""
    rng, slots = np.random.default_rng(0), Slots(7, 2, 3, 4, 0.1, kind, gamma)
    expected = np.zeros((7, 2))
    for _ in range(150):
        rows = np.sort(rng.choice(7, 4, replace=False))
        count, grad = rng.integers(1, 9, 4), rng.normal(size=(4, 6)).astype(np.float32)
        size = np.linalg.norm(grad.astype(np.float64).reshape(4, 2, 3), axis=2)
        gain = {"product": size * count[:, None], "gradient": size, "count": np.repeat(count[:, None], 2, 1)}[kind]
        expected *= gamma
        expected[rows] += gain
        slots.observe(torch.from_numpy(rows), torch.from_numpy(count), torch.from_numpy(grad))
    found = slots.utility.double() * gamma ** int(slots.clock)
    if gamma == 0.5:
        assert int(slots.clock) < 150
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.05)       # bfloat16 has 8 bits


def test_small_gains_add_up():
    total = torch.zeros(1)
    plain = torch.zeros(1, dtype=torch.bfloat16)
    for step in range(4000):
        total = dithered(total + 0.001, torch.tensor(step)).float()
        plain += 0.001
    assert total.item() == pytest.approx(4, rel=0.05) and plain.item() < 1


def test_dither_goes_to_a_neighbour_and_is_right_on_average():
    x = torch.tensor([1.0 + 2 ** -9])                            # half way between two bfloat16
    seen = torch.cat([dithered(x, torch.tensor(step)) for step in range(1 << 10)]).float()
    assert set(seen.tolist()) == {1.0, 1.0 + 2 ** -7} and seen.mean().item() == pytest.approx(x.item(), abs=2e-4)


def test_shares_keep_their_mean_and_stay_below_one():
    assert kept_shares([1, 1, 1, 1], 0.3) == pytest.approx([0.3] * 4)
    assert kept_shares([8, 4, 2, 1], 0.1) == pytest.approx([8 / 37.5, 4 / 37.5, 2 / 37.5, 1 / 37.5])
    assert kept_shares([8, 4, 2, 1], 0.5) == pytest.approx([1, 4 / 7, 2 / 7, 1 / 7])         # the first is full
    assert kept_shares([9, 9, 1], 0.9) == pytest.approx([1, 1, 0.7])
    assert kept_shares([5, 1], 1.0) == [1, 1]
    assert kept_shares([1, 0, 0], 0.5) == pytest.approx([1, 0.25, 0.25]) and kept_shares([0, 0], 0.5) == [0.5, 0.5]


# --- what ships -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [*SERVING, None])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 2, 3, 4, 8, 12]), st.floats(0, 1),
       st.integers(0, 1000))
def test_every_form_finds_every_chunk_and_no_other(form, rows, k, share, seed):
    rng = np.random.default_rng(seed)
    kept = max(1, int(share * rows * k))
    chunks = np.sort(rng.choice(rows * k, kept, replace=False))
    values = torch.from_numpy(rng.normal(size=(kept, 2)).astype(np.float32))
    table = ChunkTable(rows, k, 2, kept, form)
    table.fill(torch.from_numpy(chunks), values)
    expected = torch.zeros(rows * k, 2)
    expected[torch.from_numpy(chunks)] = values
    assert torch.equal(table.gather(torch.arange(rows)), expected.view(rows, k * 2))
    assert torch.equal(table.gather(torch.zeros(2, 0, 3, dtype=torch.int64)), torch.zeros(2, 0, 3, k * 2))
    if form == "hash":
        assert table.index.chunks().tolist() == chunks.tolist()
    if form is None:
        assert ec.memory(table) == min(ec.memory(ChunkTable(rows, k, 2, kept, f, "meta")) for f in SERVING)
    small = table.quantised(8)
    tolerance = values.abs().amax(1).max() / 100
    assert (small.gather(torch.arange(rows)) - expected.view(rows, -1)).abs().max() <= tolerance
    assert ec.memory(small) < ec.memory(table)


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("bits", [10, 33, 47, 57])
def test_the_hash_covers_universes_of_any_size(bits, k):
    rng = np.random.default_rng(bits)
    chunks = torch.from_numpy(np.unique(np.append(rng.integers(0, k << bits, 600), [0, (k << bits) - 1])))
    index = CompactHash(1 << bits, k, len(chunks))
    order = index.fill(chunks // k, chunks % k)
    assert torch.equal(index.chunks(), chunks)
    # so many buckets that 16 to 32 chunks share one: all but their bits are stored
    buckets = len(index.start) - 1
    assert 16 <= len(chunks) / buckets < 32 and 2 ** index.low * buckets == 2 ** (bits + (k - 1).bit_length())
    assert index.key.element_size() == next(size for size in (1, 2, 4, 8) if 8 * size >= index.low)
    held = {}
    for chunk in chunks.tolist():
        held.setdefault(chunk // k, []).append(chunk % k)
    rows = torch.cat([chunks // k, torch.from_numpy(rng.integers(0, 1 << bits, 500))])
    place, code = index.span(rows)
    assert code.tolist() == [sum(1 << j for j in held.get(row, [])) for row in rows.tolist()]
    first = torch.tensor([row * k + min(held[row]) for row in (chunks // k).tolist()])
    assert torch.equal(chunks[order][place[:len(chunks)]], first)


def test_the_hash_takes_few_bytes_per_chunk_and_halves_small_buckets():
    rng = np.random.default_rng(1)
    rows, kept = 33_762_577, 200_000
    chunks = torch.from_numpy(np.unique(rng.integers(0, 4 * rows, kept)))
    for spaced in (chunks, torch.arange(len(chunks)) * 4, torch.arange(len(chunks)) + 10 ** 8):
        index = CompactHash(rows, 4, len(chunks))
        index.fill(spaced // 4, spaced % 4)
        assert ec.memory(index) < 2.4 * len(chunks)              # the 4.4 bytes of open addressing are the usual count
        assert int(index.start.diff().max()) < 100               # 16 to 32 on average, however ids lie
    weights = [ec.memory(CompactHash(rows, 4, m, "meta")) for m in range(1, 400_000, 997)]
    assert weights == sorted(weights)


# --- the bounded map --------------------------------------------------------------------------------------------------

class Reference:
    """Buckets as lists: who arrives takes an empty entry, else that of lowest utility which is not busy."""

    def __init__(self, ids: IdMap):
        self.ids, self.rows = ids, {}

    def admit(self, ids, utility, busy):
        busy, taken = set(busy) | {r for r, i in self.rows.items() if i in ids}, []
        by_bucket = {}
        for i in ids:
            if i not in self.rows.values():
                by_bucket.setdefault(int(self.ids.entries(torch.tensor(i))[0]), []).append(i)
        for first, new in by_bucket.items():
            able = [r for r in range(first, first + WAYS) if r not in busy]
            able.sort(key=lambda r: (utility[r] if r in self.rows else -1, r))
            for i, r in zip(new, able):
                self.rows[r] = i
                taken.append(r)
        return taken


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.lists(st.integers(0, 2 ** 40), max_size=40, unique=True), max_size=6),
       st.integers(0, 1000))
def test_the_map_evicts_the_least_useful_of_a_bucket(capacity, batches, seed):
    rng, ids = np.random.default_rng(seed), IdMap(capacity)
    reference = Reference(ids)
    assert ids.rows % WAYS == 0 and capacity <= ids.rows < capacity + WAYS
    for batch in batches:
        utility, busy = rng.random(ids.rows), rng.choice(ids.rows, 2)
        weight = torch.from_numpy(utility).float()
        place, taken = ids.admit(torch.tensor(batch, dtype=torch.int64), lambda rows: weight[rows],
                                 torch.from_numpy(busy))
        expected = reference.admit(batch, weight.tolist(), busy.tolist())
        assert sorted(taken.tolist()) == sorted(expected)
        assert {r: i for r, i in enumerate(ids.key.tolist()) if i >= 0} == reference.rows
        where = {i: r for r, i in reference.rows.items()}
        assert place.tolist() == [where.get(i, ids.rows) for i in batch]
        assert torch.equal(ids.find(torch.tensor(batch, dtype=torch.int64)), place)


def test_an_empty_map_knows_nobody_and_a_full_bucket_refuses():
    ids = IdMap(1)
    assert ids.find(torch.tensor([[0, 5]])).tolist() == [[16, 16]]
    none = torch.zeros(0, dtype=torch.int64)
    place, taken = ids.admit(torch.arange(20), lambda rows: torch.zeros(rows.shape), none)
    assert sorted(place.tolist()) == [*range(16), 16, 16, 16, 16] and len(taken) == 16     # never out of an own batch
    place, taken = ids.admit(torch.tensor([99]), lambda rows: torch.zeros(rows.shape), torch.arange(16))
    assert place.tolist() == [16] and not len(taken)
    with pytest.raises(ValueError, match="capacity=0"):
        IdMap(0)
