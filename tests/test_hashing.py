"""Weight sharing by hashing: places of ids, sketches and fits against plain Python, dictionaries and numpy."""
from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import test_contract as contract
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import margin, write, zipf_ids

import ecstudy as ec
from ecstudy.budget import build
from ecstudy.data.cardinalities import FIELDS
from ecstudy.fields import Fields
from ecstudy.methods._hashing import Hashes, mix
from ecstudy.methods.binary_code import BinaryCode, block_rows, length
from ecstudy.methods.cafe import DOWN, FADE, FREE, MASS, MIDDLE, SECOND, SLACK, UP
from ecstudy.training import Optimizers
from ecstudy.training.timeline import FakeRun

SIZES = [100, 37, 3, 1]
CRITEO = [int(n) for n in FIELDS["criteo"][1]]
WORD = (1 << 64) - 1


def every_id(sizes=SIZES):
    rows = torch.arange(max(sizes))
    return torch.stack([rows % size for size in sizes], 1)


def flat_ids(sizes=SIZES):
    return [(f, i, sum(sizes[:f]) + i) for f, n in enumerate(sizes) for i in range(n)]


# --- hash functions ---------------------------------------------------------------------------------------------------

def python_hash(key: int, seed: int, rows: int) -> int:
    """SplitMix64's output function on unbounded integers, and the upper half of 64 bits as a fraction of ``rows``."""
    x = (key ^ seed) & WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return ((x ^ x >> 31) >> 32) * rows >> 32


def test_the_mixer_is_splitmix64():
    """The first outputs of the generator seeded with 0 and 1234567, as published for it."""
    state = torch.tensor([0x9E3779B97F4A7C15 - (1 << 64), 1234567 + 0x9E3779B97F4A7C15 - (1 << 64)])
    assert [v & WORD for v in mix(state).tolist()] == [0xE220A8397B1DCDAF, 6457827717110365317]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 62), st.integers(-2 ** 63, 2 ** 63 - 1), st.integers(1, 2 ** 31))
def test_hashes_are_those_of_python_integers(key, seed, rows):
    hashes = Hashes(1)
    hashes.seed.fill_(seed)
    assert hashes(torch.tensor([key]), rows).item() == python_hash(key, seed, rows) < rows


def test_ids_are_spread_evenly_and_collide_as_often_as_chance_at_every_distance():
    torch.manual_seed(0)
    rows, n, draws = 64, 6400, 30
    hashes = Hashes(draws)
    codes = hashes(torch.arange(n), rows)
    chi = ((torch.stack([torch.bincount(c, minlength=rows) for c in codes.T]) - n / rows) ** 2 / (n / rows)).sum(1)
    assert ((chi - (rows - 1)) / (2 * (rows - 1)) ** 0.5).abs().max() < 5
    for distance in (1, 2, 64, 1000):                             # by an affine hash all of these collide, or none
        share = (codes[distance:] == codes[:-distance]).float().mean(0)
        assert ((share - 1 / rows).abs() < 5 * (1 / rows / (n - distance)) ** 0.5).all()
    pairs = codes[:, ::2] * rows + codes[:, 1::2]                 # two functions together: independent
    assert abs((pairs[5:] == pairs[:-5]).float().mean() - rows ** -2) < 5 * rows ** -1 / (n * draws / 2) ** 0.5


# --- double_hash ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("rows, hot", [(60, 0.5), (7, 0.2), (1, 0.5), (2, 1), (141, 0), (140, 0.9)])
def test_frequent_ids_own_rows_and_others_have_two_different_ones(rows, hot, combine):
    counts = np.random.default_rng(rows).integers(0, 12, sum(SIZES))
    emb = ec.make(f"double_hash(rows={rows}, hot={hot}, combine='{combine}')", SIZES, 4, counts=counts)
    kept = min(round(hot * rows), rows - 1)
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    own = {i: place for place, i in enumerate(sorted(order[:kept]))}
    half, weight = (2, emb.table.weight) if combine == "concat" else (1, emb.table.weight)
    assert weight.shape == (rows * half, 4 // half)
    x, shared, users = emb(every_id()), (rows - kept) * half, {}
    for f, i, flat in flat_ids():
        if flat in own:
            expected = weight[own[flat] * half:(own[flat] + 1) * half].flatten()
            places = set(range(own[flat] * half, (own[flat] + 1) * half))
        else:
            first, more = (python_hash(flat, seed, n) for seed, n in
                           zip(emb.hash.seed.tolist(), (shared, max(shared - 1, 1))))
            second = (first + 1 + more) % shared if shared > 1 else first
            a, b = kept * half + first, kept * half + second
            assert a != b or shared == 1
            expected = torch.cat([weight[a], weight[b]]) if combine == "concat" else weight[a] + weight[b]
            places = {a, b}
        torch.testing.assert_close(x[i, f], expected)
        for place in places:
            users.setdefault(place, []).append(flat)
    alone = [0] * len(counts)
    for ids in users.values():
        if len(ids) == 1:
            alone[ids[0]] += 4 // half
    assert emb.allocation().tolist() == [min(a, 4) for a in alone]


def test_two_hashes_tell_apart_what_one_cannot():
    emb = ec.make("double_hash(rows=101, hot=0)", 4000, 4, counts=np.zeros(4000))
    pairs = {tuple(sorted(p)) for p in emb.encode(torch.arange(4000)).tolist()}
    possible = 101 * 100 / 2
    expected = possible * (1 - (1 - 1 / possible) ** 4000)        # distinct pairs among as many draws
    assert abs(len(pairs) - expected) < 5 * expected ** 0.5


def test_double_hash_starts_at_the_scale_of_full():
    emb = ec.make("double_hash(rows=2000)", 20_000, 16, counts=np.arange(20_000))
    own = emb.encode(torch.arange(20_000))[:, 0] < 1000
    target = (1 / 20_000 / 3) ** 0.5
    x = emb(torch.arange(20_000))
    assert x[own].std().item() == pytest.approx(target, rel=0.05)
    assert x[~own].std().item() == pytest.approx(target, rel=0.05)


# --- binary_code ------------------------------------------------------------------------------------------------------

def dealt(n: int, bits: int, form: str) -> list[list[int]]:
    """Bits of an id in each block, lowest first: plain lists, one bit after the other."""
    size = max(1, (n - 1).bit_length())
    rooms = [size % bits or bits] + [bits] * (-(-size // bits) - 1)
    blocks = [[] for _ in rooms]
    turn = itertools.cycle(range(len(rooms)))
    for bit in range(size):
        if form == "succession":
            block = next(b for b, room in enumerate(rooms) if len(blocks[b]) < room)
        else:
            block = next(b for b in turn if len(blocks[b]) < rooms[b])
        blocks[block].append(bit)
    return blocks


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(["skip", "succession"]))
def test_bits_are_dealt_into_blocks_that_index_rows_of_their_own(sizes, share, form):
    bits = 1 + int(share * (length(max(sizes)) - 1))
    emb = BinaryCode(Fields(sizes), 3, bits, form)
    codes, x, used, look = emb.encode(every_id(sizes)), emb(every_id(sizes)), set(), 0
    for f, n in enumerate(sizes):
        blocks = dealt(n, bits, form)
        values = [[sum((i >> b & 1) << k for k, b in enumerate(block)) for block in blocks] for i in range(n)]
        rows = block_rows(n, bits, form)
        if len(blocks) == 1:
            assert rows == [n]
        assert [max(v) + 1 for v in zip(*values)] == rows                     # no row is wasted
        first = np.cumsum([0, *rows[:-1]]) + (max(used) + 1 if used else 0)
        expected = [[int(start + v) for start, v in zip(first, value)] for value in values]
        assert codes[:n, look:look + len(blocks)].tolist() == expected
        assert len({tuple(e) for e in expected}) == n                         # every id has its own set of rows
        used |= {row for e in expected for row in e}
        look += len(blocks)
        torch.testing.assert_close(x[:n, f], emb.table.weight[torch.tensor(expected)].sum(1))
    assert used == set(range(emb.table.shape[0]))


def test_equal_blocks_are_the_published_forms():
    """Six bits in two blocks: every second bit, or three neighbours each."""
    emb = ec.make("binary_code(bits=3)", 64, 4)
    assert emb.encode(torch.tensor([[0b000010], [0b000001], [0b111000], [0b101010]])).tolist() == [
        [0, 8 + 1], [1, 8], [0b100, 8 + 0b110], [0, 8 + 7]]
    emb = ec.make("binary_code(bits=3, form='succession')", 64, 4)
    assert emb.encode(torch.tensor([[0b000010], [0b110001]])).tolist() == [[0b010, 8], [0b001, 8 + 0b110]]
    assert ec.make("binary_code", 64, 4).bits == 3


def test_one_table_for_all_blocks_cannot_tell_the_order_of_blocks():
    shared, apart = (ec.make(f"binary_code(bits=3, form='succession', shared={s})", 64, 4) for s in (True, False))
    ids = torch.tensor([0b010_001, 0b001_010])
    assert shared.table.shape == (8, 4) and apart.table.shape == (16, 4)
    assert torch.equal(*shared(ids)) and not torch.equal(*apart(ids))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.sampled_from(["skip", "succession"]), st.booleans())
def test_sizes_are_discrete_and_never_fall(sizes, form, shared):
    options = BinaryCode.sizes(Fields(sizes), 4, form=form, shared=shared)
    rows = [BinaryCode(Fields(sizes), 4, bits, form, shared).table.shape[0] for bits in options]
    assert rows == sorted(rows) and rows[-1] == sum(sizes) and set(options) <= set(range(1, length(max(sizes)) + 1))


def test_on_criteo_there_are_23_sizes_each_at_most_twice_the_one_before():
    options = BinaryCode.sizes(Fields(CRITEO), 16)
    size = [ec.memory(build("binary_code", CRITEO, 16, knob=bits, device="meta")) for bits in options]
    assert len(options) == 23 and all(a < b for a, b in zip(size, size[1:]))
    assert max(b / a for a, b in zip(size[8:], size[9:])) <= 2


def test_sums_start_at_the_scale_of_full():
    emb = ec.make("binary_code(bits=5)", [20_000, 20], 16)        # 15 bits: three blocks, and a whole field
    x = emb(torch.stack([torch.arange(20_000), torch.arange(20_000) % 20], 1))
    target = (1 / 20_000 / 3) ** 0.5
    assert x[:, 0].std().item() == pytest.approx(target, rel=0.1)
    assert x[:20, 1].std().item() == pytest.approx(target, rel=0.15)


# --- memcom -----------------------------------------------------------------------------------------------------------

def test_memcom_is_a_shared_row_times_a_number_plus_a_number():
    emb = ec.make("memcom(rows=10, bias=True)", SIZES, 4)
    assert emb.table.shape == (10 + 4 + 1 + 1, 4)
    assert torch.equal(emb.scale.weight, torch.ones(141)) and not emb.bias.weight.any()
    with torch.no_grad():
        emb.scale.weight.copy_(torch.randn(141)), emb.bias.weight.copy_(torch.randn(141))
    x = emb(every_id())
    for f, i, flat in flat_ids():
        row = i % [10, 4, 1, 1][f] + [0, 10, 14, 15][f]
        expected = emb.table.weight[row] * emb.scale.weight[flat] + emb.bias.weight[flat]
        torch.testing.assert_close(x[i, f], expected)


def test_multipliers_train_like_a_dense_reference():
    emb = ec.make("memcom(rows=10, bias=True)", [40, 12], 4)
    names = ("table", "scale", "bias")
    plain = {name: getattr(emb, name).weight.detach().clone().requires_grad_() for name in names}
    opt, dense = Optimizers(emb, lr=0.05), torch.optim.Adam(plain.values(), 0.05)
    ids = torch.stack([torch.arange(40), torch.arange(40) % 12], 1)           # all of them: lazy and dense Adam agree
    target = torch.randn(40, 2, 4)
    row = ids % torch.tensor([10, 3]) + torch.tensor([0, 10])
    for _ in range(5):
        opt.zero_grad(), dense.zero_grad()
        (emb(ids) - target).square().sum().backward()
        flat = ids + torch.tensor([0, 40])
        x = plain["table"][row] * plain["scale"][flat][..., None] + plain["bias"][flat][..., None]
        (x - target).square().sum().backward()
        opt.step(), dense.step()
    for name in names:
        torch.testing.assert_close(getattr(emb, name).weight, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_fit_is_the_best_rank_one_form_of_what_shares_a_row(bias):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(120, 6)) * [5, 1, 1, 1, 1, 0.5] + 1.0
    emb = ec.compress(torch.tensor(matrix), f"memcom(rows=8, bias={bias})")
    got, best = emb(torch.arange(120)).detach().numpy(), np.zeros_like(matrix)
    for row in range(8):
        part = matrix[row::8]
        mean = part.mean(1, keepdims=True) if bias else 0
        u, s, v = np.linalg.svd(part - mean, full_matrices=False)
        best[row::8] = u[:, :1] * s[0] @ v[:1] + mean
    assert ((got - matrix) ** 2).sum() <= 1.002 * ((best - matrix) ** 2).sum()
    scale = emb.scale.weight.detach().numpy()
    assert [np.sqrt((scale[row::8] ** 2).mean()) for row in range(8)] == pytest.approx([1] * 8, rel=1e-4)


def test_the_numbers_per_id_are_a_floor():
    assert ec.weigh("memcom", CRITEO, 16, 0.1)["knob"] * sum(CRITEO) / max(CRITEO) == pytest.approx(1.27e6, rel=0.01)
    rows = [ec.weigh(spec, CRITEO, 16, 0.01) for spec in ("memcom", "memcom(bias=True)", "memcom|int8")]
    assert not any(row["reachable"] for row in rows)
    assert [row["inference_pct"] for row in rows] == pytest.approx([6.25, 12.5, 1.5625], abs=0.001)


def test_memcom_allocates_its_multiplier_and_a_row_that_nobody_shares():
    emb = ec.make("memcom(rows=98)", SIZES, 4)                    # 98 of 100, 37 of 37, 3 of 3, 1 of 1
    expected = [1 if i in (0, 1, 98, 99) else 5 for i in range(100)] + [5] * 41
    assert emb.allocation().tolist() == expected


# --- unified ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", ["", "lookups=1", "lookups=4", "lookups=3, combine='sum'"])
def test_fields_look_up_one_table_each_with_its_own_seeds(options):
    emb = ec.make(f"unified(rows=50, {options})", SIZES, 8, seed=2)
    seeds, weight, x = emb.hash.seed.tolist(), emb.table.weight, emb(every_id())
    assert len({s for row in seeds for s in row}) == 4 * emb.lookups and weight.shape == (50, emb.width)
    for f, i, _ in flat_ids():
        pieces = [weight[python_hash(i, seed, 50)] for seed in seeds[f]]
        torch.testing.assert_close(x[i, f], sum(pieces) if "sum" in options else torch.cat(pieces))


def test_a_multiplexed_budget_is_met_to_within_a_row():
    for budget in (0.5, 0.1, 0.01, 0.001):
        row = ec.weigh("unified", CRITEO, 16, budget)
        limit = int(sum(CRITEO) * 64 * budget + 1e-6)
        assert 0 <= limit - row["bytes_inference"] < 32 and row["training_pct"] <= 300.001 * budget
    assert ec.make("unified", [30, 5], 3, 0.9).lookups == 1       # an odd dimension is not cut
    sums = ec.make("unified(rows=500, lookups=4, combine='sum')", 20_000, 16)
    assert sums(torch.arange(20_000)).std().item() == pytest.approx((1 / 20_000 / 3) ** 0.5, rel=0.1)


def test_a_matrix_is_shared_by_the_mean_of_pieces():
    matrix = torch.randn(200, 6)
    emb = ec.compress(matrix, "unified(rows=30)")
    code = emb.encode(torch.arange(200)[:, None])[:, 0]
    pieces = matrix.view(200, 2, 3)
    for row in code.unique().tolist():
        torch.testing.assert_close(emb.table.weight[row], pieces[code == row].mean(0))
    with pytest.raises(TypeError, match="leave combine out"):
        ec.compress(matrix, "unified(rows=30, combine='sum')")


# --- cafe -------------------------------------------------------------------------------------------------------------

class Sketch:
    """The rule of CAFE, id by id in Python; ``slots`` of a bucket are lists [id, score, row]."""

    def __init__(self, emb):
        self.emb, self.sketch = emb, emb.sketch if emb.online else emb.aux.sketch
        self.slots = [[[-1, np.float32(0), -1] for _ in range(4)] for _ in range(emb.hot)]
        self.free, self.added, self.threshold = list(range(emb.hot))[::-1], 0, emb.threshold or 1
        self.promoted, self.demoted, self.refused = 0, 0, 0

    def see(self, flat):
        seed, emb = self.sketch.hash.seed.item(), self.emb
        known, new, met = [], {}, set()
        for i, worth in sorted(zip(*np.unique(flat.numpy(), return_counts=True))):
            bucket = python_hash(int(i), seed, emb.hot)
            met.add(bucket)
            slot = next((s for s in self.slots[bucket] if s[0] == i), None)
            if slot:
                slot[1] += np.float32(worth)
                known.append(slot)
            else:
                new.setdefault(bucket, []).append((-worth, i))
        for bucket, ids in new.items():
            slots, ids = self.slots[bucket], sorted(ids)
            empty = [s for s in slots if s[0] < 0]
            for slot, (worth, i) in zip(empty, ids):
                slot[:] = [i, np.float32(-worth), -1]
            if not empty and (cold := [s for s in slots if s[2] < 0]):
                lowest = min(cold, key=lambda s: s[1])
                lowest[:2] = [ids[0][1], lowest[1] + np.float32(-sum(w for w, _ in ids))]
        self.added += flat.numel()
        if self.added > MASS * emb.hot * self.threshold:
            self.added = 0
            for slot in itertools.chain(*self.slots):
                slot[1] *= np.float32(FADE)
        for bucket in sorted(met):
            for slot in self.slots[bucket]:
                if slot[2] >= 0 and slot[1] < self.threshold * (1 if emb.threshold else SLACK):
                    self.free.append(slot[2])
                    slot[2], self.demoted = -1, self.demoted + 1
        asks = sorted((s for s in known if s[2] < 0 and s[1] >= self.threshold), key=lambda s: -s[1])
        for slot in asks[:len(self.free)]:
            slot[2], self.promoted = self.free.pop(), self.promoted + 1
        refused = sum(s[2] < 0 for s in asks)
        self.refused += refused
        if emb.threshold is None:
            if refused:
                self.threshold *= UP
            elif len(self.free) > FREE * emb.hot:
                self.threshold = max(self.threshold * DOWN, 1)

    def check(self):
        key, score, row = (getattr(self.sketch, name).tolist() for name in ("key", "score", "row"))
        assert key == [[s[0] for s in bucket] for bucket in self.slots]
        assert row == [[s[2] for s in bucket] for bucket in self.slots]
        np.testing.assert_allclose(score, [[s[1] for s in bucket] for bucket in self.slots], rtol=1e-5)
        left = int(self.emb.aux.left)
        assert self.emb.aux.free[:left].tolist() == self.free
        owned = [r for bucket in row for r in bucket if r >= 0]
        assert sorted(owned + self.free) == list(range(self.emb.hot))         # owned once, or free
        assert float(self.emb.aux.threshold) == pytest.approx(self.threshold)


def batches(steps, seed=1, rows=24):
    """Power-law batches; which ids are frequent changes half-way."""
    rng = np.random.default_rng(seed)
    order = [rng.permutation(n) for n in SIZES]
    for step in range(steps):
        if step == steps // 2:
            order = [rng.permutation(n) for n in SIZES]
        ids = [o[np.minimum(rng.zipf(1.2, rows) - 1, n - 1)] for n, o in zip(SIZES, order)]
        yield torch.from_numpy(np.stack(ids, 1))


def learned(spec, steps=60, seed=1, before=None, after=None, fade=None):
    emb = ec.make(spec, SIZES, 4)
    opt = Optimizers(emb, lr=0.05)
    for ids in batches(steps, seed):
        opt.zero_grad()
        emb(ids).square().sum().backward()
        opt.step()
        state = before(emb, opt) if before else None
        emb.promote(opt)
        if after:
            after(emb, opt, ids, state)
    return emb, opt


@pytest.mark.parametrize("rows", [12, 40])
@pytest.mark.parametrize("threshold", [None, 3])
def test_the_sketch_follows_the_rule_id_by_id(threshold, rows):
    reference = []

    def before(emb, opt):
        return emb.table.weight.clone(), [m.clone() for m in opt.rows.moments[0]], emb.sketch.row.clone()

    def after(emb, opt, ids, state):
        reference or reference.append(Sketch(emb))
        reference[0].see(emb.fields.flat(ids))
        reference[0].check()
        weight, moments, row = state
        given = (emb.sketch.row != row) & (emb.sketch.row >= 0)
        new, ids = emb.sketch.row[given].long(), emb.sketch.key[given].tolist()
        kept = torch.ones(len(weight), dtype=torch.bool)
        kept[new] = False
        for was, now in zip((weight, *moments), (emb.table.weight, *opt.rows.moments[0])):
            assert torch.equal(was[kept], now[kept])
            for own, flat in zip(new.tolist(), ids):              # a copy of the shared row, with its moments
                f = int(np.searchsorted(np.cumsum(SIZES), flat, side="right"))
                shared = (flat - sum(SIZES[:f])) % int(emb.modulus[f]) + int(emb.start[f])
                assert torch.equal(now[own], was[shared])

    threshold = "" if threshold is None else f", threshold={threshold}"
    learned(f"cafe(rows={rows}, by='frequency'{threshold})", before=before, after=after)
    found = reference[0]
    assert found.promoted >= found.emb.hot // 2 and found.refused and (found.demoted or threshold or rows == 12)


def meet(emb, *ids):
    """One batch of a single field, and the scores that the only bucket then has."""
    emb.train()(torch.tensor(ids)).sum().backward()
    emb.promote()
    return dict(zip(emb.sketch.key[0].tolist(), emb.sketch.score[0].tolist()))


def test_a_row_is_taken_back_once_a_score_has_faded():
    emb = ec.make("cafe(rows=2, shared=0.5, by='frequency', threshold=2)", 1000, 4)
    meet(emb, 1, 1), meet(emb, 1)
    score, calls = np.float32(3), 0
    assert emb.hot == 1 and emb.encode(torch.tensor([[1]])) == 0
    while score >= 2:                                             # 21 meetings exceed 10 * 1 bucket * 2: one fading
        meet(emb, *[2] * 21)
        score, calls = score * np.float32(FADE), calls + 1
        assert (emb.encode(torch.tensor([[1], [2]])) == 0).flatten().tolist() == [score >= 2, score < 2]
    assert calls == 41                                            # 3 * 0.99^41 < 2, and the hotter id has its row


def test_every_id_is_found_where_the_sketch_has_it():
    emb, _ = learned("cafe(rows=40)")
    own = {int(k): int(r) for k, r in zip(emb.sketch.key.view(-1), emb.sketch.row.view(-1)) if r >= 0}
    codes = emb.encode(every_id())
    assert len(own) > 10
    for f, i, flat in flat_ids():
        assert codes[i, f] == own.get(flat, i % int(emb.modulus[f]) + int(emb.start[f]))
    assert emb.allocation().view(-1)[list(own)].eq(4).all()


def level_rows(emb, f, i):
    """The rows of an id by its score, in Python."""
    flat = sum(SIZES[:f]) + i
    slot = (emb.sketch.key == flat).nonzero()
    row, score = (getattr(emb.sketch, name)[tuple(slot[0])].item() if len(slot) else -1 for name in ("row", "score"))
    if row >= 0:
        return [row]
    first = i % int(emb.modulus[f]) + int(emb.start[f])
    if len(slot) == 0 or np.float32(score) < np.float32(MIDDLE * float(emb.aux.threshold)):
        return [first]
    size, bits = int(emb.modulus2[f]), int(emb.hash.bits(torch.tensor(flat)))
    return [first, (bits * size >> 32) + int(emb.start2[f])]


def test_ids_of_middle_score_are_sums_of_two_rows():
    emb, _ = learned("cafe(rows=30, levels=2)")
    emb.eval()
    codes, vectors, kinds = emb.encode(every_id()), emb(every_id()), Counter()
    for f, i, flat in flat_ids():
        rows = level_rows(emb, f, i)
        kinds[len(rows), rows[0] < emb.hot] += 1
        assert codes[i, f].tolist() == [rows[0], rows[-1]]
        torch.testing.assert_close(vectors[i, f], emb.table.weight[rows].sum(0))
    assert min(kinds[1, True], kinds[2, False], kinds[1, False]) >= 5 and kinds[2, True] == 0
    assert emb.start2[0] == emb.start[-1] + emb.modulus[-1] and emb.table.shape[0] == emb.start2[-1] + emb.modulus2[-1]
    second = emb.table.shape[0] - int(emb.start2[0])
    assert second == pytest.approx(SECOND * (emb.rows - emb.hot), abs=len(SIZES))
    users = Counter(row for f, i, _ in flat_ids() for row in level_rows(emb, f, i))
    alone = [any(users[row] == 1 for row in level_rows(emb, f, i)) for f, i, _ in flat_ids()]
    assert emb.allocation().tolist() == [4 * a for a in alone] and 0 < sum(alone) < len(alone)


def test_an_id_that_becomes_hot_keeps_its_sum():
    given = Counter()

    def before(emb, opt):
        return emb.table.weight.clone(), [m.clone() for m in opt.rows.moments[0]], emb.sketch.row.clone(), {
            flat: (f, i) for f, i, flat in flat_ids()}, float(emb.level)

    def after(emb, opt, ids, state):
        weight, moments, row, place, level = state
        for bucket, column in ((emb.sketch.row != row) & (emb.sketch.row >= 0)).nonzero().tolist():
            own, flat = int(emb.sketch.row[bucket, column]), int(emb.sketch.key[bucket, column])
            f, i = place[flat]
            first = i % int(emb.modulus[f]) + int(emb.start[f])
            second = (int(emb.hash.bits(torch.tensor(flat))) * int(emb.modulus2[f]) >> 32) + int(emb.start2[f])
            torch.testing.assert_close(emb.table.weight[own], weight[first] + weight[second])     # above T: above 0.2 T
            assert all(torch.equal(now[own], was[first]) for was, now in zip(moments, opt.rows.moments[0]))
            given[flat] += 1
        assert float(emb.level) == pytest.approx(MIDDLE * float(emb.aux.threshold))

    learned("cafe(rows=30, levels=2)", before=before, after=after)
    assert len(given) >= 5


def test_scores_are_norms_of_gradients_of_vectors_with_mean_one_in_each_field():
    emb = ec.make("cafe(rows=60)", [60, 9], 4)
    ids = torch.stack([torch.arange(12) // 3, torch.arange(12) % 4], 1)       # every id several times
    weight = torch.randn(12, 2, 4)
    (emb.train()(ids) * weight).sum().backward()
    emb.promote()
    norm = weight.norm(dim=-1).numpy()
    score = dict(zip(emb.sketch.key.view(-1).tolist(), emb.sketch.score.view(-1).tolist()))
    for f, first in ((0, 0), (1, 60)):
        for i in range(4):
            mine = norm[ids[:, f].numpy() == i, f].sum() / norm[:, f].mean()
            assert score[first + i] == pytest.approx(mine, rel=1e-4)


def test_a_newcomer_inherits_a_score_but_must_be_met_again():
    emb = ec.make("cafe(rows=2, shared=0.5, by='frequency', threshold=5)", 1000, 4)
    meet(emb, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    assert meet(emb, 7) == {1: 4, 7: 4, 3: 3, 4: 3}               # in the place of 2, the first of the lowest
    assert meet(emb, 7)[7] == 5 and emb.encode(torch.tensor([[7]])) == 0      # met again: hot
    assert meet(emb, 8, 8, 8, 9) == {1: 4, 7: 5, 8: 7, 4: 3}      # the stronger of two, with the scores of both
    assert emb.encode(torch.tensor([[8]])) == 1                   # not met again, and no row is free
    for i in range(100, 115):
        score = meet(emb, i, i)
    assert score[7] == 5 and 8 not in score                       # hot ids are not replaced


@pytest.mark.parametrize("spec", ["cafe(rows=40)", "cafe(rows=40, levels=2)", "cafe(rows=40, online=False)"])
@pytest.mark.parametrize("steps", [0, 3, 60])
def test_what_ships_looks_up_the_same_vectors(spec, steps, tmp_path):
    emb, _ = learned(spec, steps)
    emb.eval()
    before = emb(every_id())
    loaded = ec.load(ec.save(emb, tmp_path / "half"))
    assert torch.equal(before, loaded.eval()(every_id()))
    emb.deploy()
    assert torch.equal(before, emb(every_id())) and "aux" not in dict(emb.named_modules())
    assert (emb.map is None) == emb.online
    if emb.map is not None:
        place = emb.map.find(torch.arange(sum(SIZES)))
        assert sorted(place[place >= 0].tolist()) == list(range(emb.hot))


def test_a_saved_sketch_goes_on_where_it_was(tmp_path):
    emb, _ = learned("cafe(rows=40)", 20)
    loaded = ec.load(ec.save(emb, tmp_path / "half"))
    for module in (emb, loaded):
        for ids in batches(10, seed=9):
            (module.train()(ids) ** 2).sum().backward()
            module.promote()
    assert all(torch.equal(a, b) for a, b in zip(emb.state_dict().values(), loaded.state_dict().values()))


def test_the_sketch_counts_towards_the_budget_unless_it_stays_behind():
    for budget in (0.5, 0.1, 0.01, 0.001):
        online, offline = (ec.weigh(spec, CRITEO, 16, budget) for spec in ("cafe", "cafe(online=False)"))
        emb = build("cafe", CRITEO, 16, knob=online["knob"], device="meta")
        assert online["bytes_inference"] == emb.table.shape[0] * 64 + emb.hot * 48 + 8
        assert 1.2 * online["knob"] < offline["knob"] < 1.6 * online["knob"]
        assert 0.999 * 100 * budget < online["inference_pct"] <= 100 * budget


def test_evaluation_rehearsal_and_empty_batches_score_nothing():
    emb = ec.make("cafe", SIZES, 4, 0.5)
    emb.eval()(every_id())
    emb.promote()
    with torch.no_grad():
        emb.train()(every_id())
    emb.promote()
    assert len(list(emb.schedule(FakeRun()))) == 4
    emb(torch.zeros(0, 4, dtype=torch.int64)).sum().backward()
    emb.promote()
    assert not emb.sketch.score.any() and int(emb.aux.left) == emb.hot


def test_scoring_makes_nothing_that_grows_with_the_table():
    largest = []
    for size in (5000, 50_000):
        emb = ec.make("cafe", [size, 700], 16, 0.5)
        opt = Optimizers(emb)
        ids = torch.stack([torch.arange(40) * 11, torch.arange(40)], 1)
        for _ in range(3):                                                     # the first step makes the moments
            emb(ids).sum().backward()
            opt.step()
            known = {t.untyped_storage().data_ptr() for t in [*emb.state_dict().values(), *opt.rows.moments[0]]}
            with contract.Largest(known) as seen:
                emb.promote(opt)
        largest.append(seen.largest)
        assert int((emb.sketch.row >= 0).sum()) >= 70
    assert largest[1] <= 1.1 * largest[0]


@pytest.mark.parametrize("name", [name for name in vars(contract) if name.startswith("test_") and "spec" in (
    getattr(contract, name).__code__.co_varnames[:getattr(contract, name).__code__.co_argcount])])
def test_other_forms_keep_the_contract(name, tmp_path):
    test = getattr(contract, name)
    wanted = test.__code__.co_varnames[:test.__code__.co_argcount]
    if "ids" in wanted or "to_reach" in wanted:
        pytest.skip("the same for every option of a method")
    for spec in ("cafe(online=False)", "cafe(levels=2)", "double_hash(combine='concat')", "memcom(bias=True)",
                 "binary_code(form='succession', shared=True)", "unified(lookups=3, combine='sum')"):
        for budget in [0.77, 0.1, 0.001] if "budget" in wanted else [None]:
            given = {"spec": spec, "device": "cpu", "tmp_path": tmp_path, "budget": budget}
            for path in tmp_path.iterdir():
                path.unlink()
            test(**{argument: given[argument] for argument in wanted})


@pytest.mark.parametrize("spec, text", [
    ("double_hash(rows=0)", "rows=0: expected 1 to 141"), ("double_hash(hot=2)", "hot=2: expected the share"),
    ("double_hash(combine='x')", "combine='x': expected 'sum' or 'concat'"),
    ("binary_code(bits=8)", "bits=8: expected 1 to 7"), ("binary_code(form='x')", "form='x': expected 'skip' or"),
    ("unified(lookups=3)", "lookups=3: expected a divisor of the embedding dimension 4"),
    ("unified(rows=0)", "rows=0: expected 1"), ("unified(combine='x')", "combine='x': expected"),
    ("memcom(rows=0)", "rows=0: expected 1 to 100"),
    ("cafe(rows=1)", "rows=1: expected 2 to 141"), ("cafe(rows=2, levels=2)", "rows=2: expected 3 to 141"),
    ("cafe(levels=3)", "levels=3: expected 1, or 2"), ("cafe(levels=2, online=False)", "levels=2 with online=False"),
    ("cafe(shared=1)", "shared=1: expected the share"),
    ("cafe(by='x')", "by='x': expected 'gradient' or"), ("cafe(threshold=0)", "threshold=0: expected a positive"),
])
def test_bad_options_are_named(spec, text):
    with pytest.raises(ValueError, match=text):
        ec.make(spec, SIZES, 4, counts=np.zeros(141))
    with pytest.raises(ValueError, match="at dimension 3: expected an even one"):
        ec.make("double_hash(combine='concat')", SIZES, 3, counts=np.zeros(141))


# --- where the ideas pay ----------------------------------------------------------------------------------------------

N = 12_000


def log(name: str, rng):
    """Sizes, ids and logits of a log on which one idea must pay."""
    other = rng.integers(0, 10, N)
    if name == "frequent":                                        # a third of the rows is spread over 3,900 rare ids
        order, effect = rng.permutation(4000), np.zeros(4000)
        effect[order[:100]] = 3 * rng.choice([-1, 1], 100)
        ids = np.where(rng.random(N) < 0.7, rng.choice(order[:100], N), rng.choice(order[100:], N))
        return [4000, 10], np.stack([ids, other], 1), effect[ids]
    if name == "every":                                           # each id has an effect of its own size
        ids = rng.integers(0, 400, N)
        return [400, 10], np.stack([ids, other], 1), 2.5 * rng.normal(size=400)[ids]
    if name == "small":                                           # a small field decides beside a large one
        ids = np.stack([zipf_ids(rng, 8000, N), rng.integers(0, 30, N)], 1)
        return [8000, 30], ids, 2.5 * rng.choice([-1, 1], 30)[ids[:, 1]]
    ids, a, b = rng.integers(0, 1024, N), rng.normal(size=32), rng.normal(size=32)
    even, odd = (sum((ids >> 2 * k + j & 1) << k for k in range(5)) for j in (0, 1))
    x, y = (even, odd) if name == "skip" else (ids & 31, ids >> 5)
    return [1024, 10], np.stack([ids, other], 1), 2.5 * (a[x] + b[y])         # effects of two halves of the bits


@pytest.mark.parametrize("spec, name, budget, dim, least", [
    ("double_hash", "frequent", 0.05, 16, 0.03), ("cafe", "frequent", 0.05, 16, 0.02),
    ("memcom", "every", 0.3, 8, 0.05), ("unified", "small", 0.05, 8, 0.1),
    ("binary_code", "skip", 0.07, 8, 0.1), ("binary_code(form='succession')", "succession", 0.07, 8, 0.1),
])
def test_it_pays(spec, name, budget, dim, least, tmp_path):
    data = write(tmp_path / "data", *log(name, np.random.default_rng(5)))
    assert margin(spec, data, budget, dim, max_epochs=3, evals_per_epoch=1) > least
