"""FIITED and AdaEmbed: utilities, rounds and storage against brute force; planted logs; ids that keep arriving."""
from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from planted import trained, write
from test_slots import check

import ecstudy as ec
from ecstudy import models
from ecstudy.data.cardinalities import FIELDS
from ecstudy.training import Optimizers, Run, Settings
from ecstudy.training.timeline import FakeRun

SIZES = [30, 7, 3]
N = sum(SIZES)
OFFSET = torch.tensor([0, 30, 37])


def draw(batch: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(0, size, batch) for size in SIZES], 1))


def step(emb, opt, ids, weight) -> None:
    opt.zero_grad()
    (emb(ids) * weight).sum().backward()
    opt.step()


# --- the plain table as a special case --------------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [1, 4, 8])
def test_without_pruning_it_is_the_full_table_bit_for_bit(chunks):
    """Same seed, same batches with many duplicates, a network on top, rounds on the way: weights, moments, network."""
    both = [ec.make("full", SIZES, 8, seed=5), ec.make("fiited", SIZES, 8, seed=5, slots=N * chunks, chunks=chunks)]
    heads = [models.make("dlrm", fields=3, dim=8, dense=0, seed=1) for _ in both]
    opts = [Optimizers(emb, head, 0.01) for emb, head in zip(both, heads)]
    assert torch.equal(both[0].table.weight, both[1].aux.slots.weight[1:].view(N, 8))
    for number in range(25):
        ids, label = draw(100, number), torch.from_numpy(np.random.default_rng(number).random(100)).float()
        for emb, head, opt in zip(both, heads, opts):
            opt.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(emb(ids), None, ids), label).backward()
            opt.step()
        both[1].after_step(opts[1])
    slots = both[1].aux.slots
    assert len(both[1].log) == 3 and all(said["admitted"] == said["evicted"] == 0 for said in both[1].log)
    assert torch.equal(both[0].table.weight, slots.weight[1:].view(N, 8))
    for a, b in zip(opts[0].rows.moments[0], opts[1].rows.moments[0]):
        assert torch.equal(a, b[1:].view(N, 8)) and bool((a != 0).any())
    for a, b in zip(heads[0].parameters(), heads[1].parameters()):
        assert torch.equal(a, b)
    assert torch.equal(both[0](draw(50, 99)), both[1].deploy()(draw(50, 99)))


def test_counting_rows_equals_a_plain_reference():
    """k = 1 with counts only, as ITEP prunes: an id a dict entry, Adam written out, thresholds by sorting."""
    slots, dim, lr = 12, 4, 0.05
    emb = ec.make("ada_embed(utility='count', normalise=False, gamma=1, warmup=())", SIZES, dim, slots=slots, seed=2)
    opt = Optimizers(emb, lr=lr)
    vectors = {row: emb.aux.slots.assembled(torch.tensor(row)).double() for row in emb.aux.slots.live().tolist()}
    moments = {row: (torch.zeros(dim).double(), torch.zeros(dim).double()) for row in vectors}
    counts, changed, rng = Counter(), 0, np.random.default_rng(8)
    popular = rng.permutation(30)
    for t in range(1, 61):
        # the popular ids of the first field change half way
        ids = draw(8, 1000 + t)
        ids[:, 0] = torch.from_numpy(popular[(rng.zipf(1.5, 8) + (10 if t > 30 else 0)) % 30])
        weight = torch.from_numpy(rng.normal(size=(8, 3, dim))).float()
        expected = torch.stack([vectors.get(row, torch.zeros(dim)) for row in (ids + OFFSET).view(-1).tolist()])
        torch.testing.assert_close(emb(ids).double().view(-1, dim), expected.double(), rtol=1e-4, atol=1e-6)
        step(emb, opt, ids, weight)
        flat = (ids + OFFSET).view(-1).tolist()
        counts.update(flat)
        grads: dict = {}
        for row, grad in zip(flat, weight.double().view(-1, dim)):
            grads[row] = grads.get(row, 0) + grad
        for row, grad in grads.items():
            if row in vectors:
                m, v = moments[row]
                m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad ** 2
                size = lr * (1 - 0.999 ** t) ** 0.5 / (1 - 0.9 ** t)
                moments[row], vectors[row] = (m, v), vectors[row] - size * m / (v.sqrt() + 1e-8)
        if t % 10 == 0:
            assert max(counts.values()) <= 256                   # exact in bfloat16
            threshold = sorted((counts[row] for row in range(N)), reverse=True)[slots]
            into = [row for row in range(N) if row not in vectors and counts[row] > threshold]
            out = [row for row in vectors if counts[row] <= threshold]
            many = min(len(into), len(out))
            before = set(vectors)
            emb.round(opt)
            now = set(emb.aux.slots.live().tolist())
            come, gone = now - before, before - now
            # of equals any may change hands, so utilities are compared
            assert come <= set(into) and gone <= set(out) and len(come) == len(gone) == many
            assert sorted(counts[r] for r in come) == sorted((counts[r] for r in into), reverse=True)[:many][::-1]
            assert sorted(counts[r] for r in gone) == sorted(counts[r] for r in out)[:many]
            for row in gone:
                del vectors[row], moments[row]
            for row in come:
                vectors[row], moments[row] = torch.zeros(dim).double(), (torch.zeros(dim).double(),) * 2
            changed += many
            check(emb.aux.slots, opt)
    assert changed > 10


# --- utilities and rounds ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("utility", ["product", "count", "gradient"])
def test_utilities_are_taken_at_the_assembled_vector(utility):
    """Live and pruned chunks alike, duplicates within a batch summed, two look-ups of one step together."""
    emb = ec.make("fiited", SIZES, 8, slots=40, utility=utility, gamma=0.9)
    opt, expected = Optimizers(emb), torch.zeros(N, 4)
    for number in range(3):
        opt.zero_grad()
        vectors, counts = torch.zeros(N, 8), torch.zeros(N)
        for part in range(2):
            ids = draw(20, 10 * number + part)
            weight = torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(number))
            (emb(ids) * weight).sum().backward()
            flat = (ids + OFFSET).view(-1)
            vectors.index_add_(0, flat, weight.view(-1, 8))
            counts += torch.bincount(flat, minlength=N)
        opt.step()
        assert emb.aux.slots.touched() is emb.aux.slots.touched()           # asked twice, seen once
        size = vectors.view(N, 4, 2).norm(dim=2)
        gain = {"product": size * counts[:, None], "gradient": size, "count": counts[:, None].expand(N, 4)}[utility]
        expected = 0.9 * expected + gain
    found = emb.aux.slots.utility.double() * 0.9 ** int(emb.aux.slots.clock)
    torch.testing.assert_close(found.float(), expected, rtol=3 / 128, atol=0)      # three roundings
    assert bool((expected[emb.aux.slots.address == 0] > 0).any())


def brute(utility, live, slots, ratios, spread):
    """Thresholds and the new owners, by sorting everything (distinct utilities)."""
    n, k = utility.shape
    mean = slots / (n * k)
    if ratios == "dynamic":
        level = np.sort(utility.ravel())[::-1][min(int(mean * n * k), n * k - 1)]
        weight = np.clip((utility > level).mean(0), mean * (1 - spread), mean * (1 + spread))
    else:
        weight = np.ones(k) if ratios == "uniform" else np.array(ratios, float)
    share = weight * mean / weight.mean()
    assert share.max() <= 1
    above = np.zeros((n, k), bool)
    for j in range(k):
        above[np.argsort(-utility[:, j])[:int(share[j] * n + 1e-6)], j] = True
    into, out = np.flatnonzero(above & ~live), np.flatnonzero(live & ~above)
    flat, many = utility.ravel(), min(len(into), slots - live.sum() + len(out))
    new = live.copy().ravel()
    new[into[np.argsort(-flat[into])[:many]]] = True
    new[out[np.argsort(flat[out])[:max(0, many - (slots - live.sum()))]]] = False
    return new.reshape(n, k), share, many


@pytest.mark.parametrize("ratios, spread", [("uniform", 0.5), ("dynamic", 0.2), ("dynamic", 1.0), ((8, 4, 2, 1), 0.5),
                                            ((1, 1, 1, 3), 0.5)])
@pytest.mark.parametrize("slots", [15, 40, 61])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_round_is_what_sorting_everything_says(ratios, spread, slots, normalise):
    rng = np.random.default_rng(slots)
    emb = ec.make("fiited", SIZES, 8, slots=slots, ratios=ratios, normalise=normalise, spread=spread)
    opt = Optimizers(emb)
    step(emb, opt, draw(60, 0), torch.randn(60, 3, 8))
    values = np.outer(2.0 ** np.arange(2), 1 + np.arange(128) / 128).ravel()         # 256 numbers, exact in bfloat16
    for number in range(3):
        # all different; later positions are the more useful ones
        rank = (rng.random((N, 4)) + [0, 0.1, 0.3, 0.7]).ravel().argsort().argsort().reshape(N, 4)
        utility = compared = values[rank + 16 * number]
        if normalise:
            offset = np.cumsum([0, *SIZES])
            top = [np.quantile(utility[offset[f] + np.arange(4096) * n // 4096], 0.95) for f, n in enumerate(SIZES)]
            compared = utility / np.repeat(top, SIZES)[:, None]
        emb.aux.slots.utility.copy_(torch.from_numpy(utility))
        live = emb.aux.slots.address.numpy() > 0
        new, share, many = brute(compared, live, slots, ratios, spread)
        said = emb.round(opt)
        now = emb.aux.slots.address.numpy() > 0
        assert now.sum() <= slots and said["admitted"] == many
        assert said["shares"] == pytest.approx(share.tolist())
        if normalise:                                            # compared to 16 bits: of equals others may move
            assert (now != new).sum() <= 6
        else:
            assert now.tolist() == new.tolist()
        check(emb.aux.slots, opt)
    if ratios == "dynamic":
        assert share[0] < share[3] and (spread == 1 or share[3] <= 1.5001 * share[0])


def test_a_pruned_chunk_comes_back_at_zero_with_fresh_moments():
    emb = ec.make("fiited(warmup=(), interval=5)", SIZES, 8, slots=40, seed=1)
    opt, slots = Optimizers(emb, lr=0.1), emb.aux.slots
    pruned = next(row for row in range(30) if not slots.address[row].any())
    for number in range(4):
        ids = draw(30, number)
        ids[:25, 0] = pruned
        step(emb, opt, ids, torch.randn(30, 3, 8, generator=torch.Generator().manual_seed(number)) + 1)
        assert not emb.eval()(ids)[0, 0].any() and emb.train() is emb        # zero, yet watched
        emb.after_step(opt)
    assert not emb.log
    before = slots.weight.clone(), [m.clone() for m in opt.rows.moments[0]], slots.address.clone()
    emb.after_step(opt)
    assert emb.log[0]["step"] == 5 and emb.log[0]["admitted"] > 0
    assert bool((slots.address[pruned] > 0).all())
    fresh = slots.address[(before[2] == 0) & (slots.address > 0)].long()
    stayed = slots.address[(before[2] == slots.address) & (slots.address > 0)].long()
    for now, then in [(slots.weight, before[0]), *zip(opt.rows.moments[0], before[1])]:
        assert not now[fresh].any() and bool(then[fresh].any()) and torch.equal(now[stayed], then[stayed])
    step(emb, opt, ids, torch.ones(30, 3, 8))
    assert bool((emb.eval()(ids)[0, 0] < 0).all())               # it learns again


def test_rounds_are_held_when_due():
    emb = ec.make("fiited(interval=400)", SIZES, 8, slots=40)
    for _ in range(1300):
        emb.after_step()
    assert [said["step"] for said in emb.log] == [3, 6, 9, 30, 60, 90, 300, 600, 900, 1200]
    assert list(emb.log[0]) == ["step", "admitted", "evicted", "shares"]
    emb = ec.make("fiited(warmup=((4, 2),))", SIZES, 8, slots=40)
    run = FakeRun(steps=25, steps_per_epoch=70)                  # a tenth of an epoch: 7
    assert len(list(emb.schedule(run))) == 25
    assert [said["step"] for said in emb.log] == [2, 4, 7, 14, 21]


def test_thresholds_from_a_sample_are_near_those_of_all_rows():
    rng, chosen = np.random.default_rng(5), []
    utility = torch.from_numpy(rng.lognormal(size=(20_000, 4)))
    for sample in (1 << 20, 2_000):
        emb = ec.make("fiited", [20_000], 8, slots=8_000, sample=sample)
        emb.aux.slots.utility.copy_(utility)
        said = emb.round()
        assert emb.aux.slots.live().numel() == 8_000
        chosen.append(set(emb.aux.slots.live().tolist()))
        assert sum(said["shares"]) == pytest.approx(0.4)
    best = set(utility.view(-1).topk(8_000).indices.tolist())
    assert len(chosen[0] & best) > 7_800 and len(chosen[1] & best) > 7_000


def test_the_ablation_ladder_is_a_set_of_specs():
    for utility, chunks, ratios in itertools.product(["count", "gradient", "product"], [1, 4], ["uniform", "dynamic"]):
        emb = ec.make(f"fiited(utility='{utility}', chunks={chunks}, ratios='{ratios}')", SIZES, 8, 0.5)
        opt = Optimizers(emb)
        for number in range(3):
            step(emb, opt, draw(20, number), torch.ones(20, 3, 8))
            emb.after_step(opt)
        assert emb.log[0]["admitted"] and emb.kept().shape == (3, chunks)
    a, b = (ec.make(spec, SIZES, 8, slots=9, seed=1) for spec in (
        "fiited(chunks=1, ratios='uniform', normalise=True)", "ada_embed"))
    for emb in (a, b):
        opt = Optimizers(emb)
        for number in range(10):
            step(emb, opt, draw(20, number), torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(number)))
            emb.after_step(opt)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_trigger_holds_rounds_back_until_enough_chunks_ask():
    """Eight of 40 slots' worth of pruned rows rise above the owners: a fifth of the slots asks."""
    for trigger, moved in ((0.0, 8), (0.15, 8), (0.25, 0), (1.0, 0)):
        emb = ec.make("fiited", [400], 8, slots=40, chunks=1, trigger=trigger, seed=0)
        slots = emb.aux.slots
        owners = slots.live()
        slots.utility[owners] = torch.arange(10.0, 50.0)[:, None].bfloat16()
        others = torch.arange(400)[~torch.isin(torch.arange(400), owners)]
        slots.utility[others[:8]] = 100.0
        said = emb.round()
        assert said["admitted"] == said["evicted"] == moved and emb._asking(emb._thresholds()[0]) == (
            0.0 if moved else pytest.approx(0.2))
        check(slots)
    with pytest.raises(ValueError, match="trigger=1.5"):
        ec.make("ada_embed", [400], 8, slots=40, trigger=1.5)


# --- memory -----------------------------------------------------------------------------------------------------------

def test_memory_while_training_is_the_budgets():
    emb = ec.make("fiited", SIZES, 8, slots=40)
    opt = Optimizers(emb)
    step(emb, opt, draw(20, 0), torch.ones(20, 3, 8))
    parts = ec.breakdown(emb)
    assert parts == {"aux.slots.weight": 41 * 2 * 4, "aux.slots.address": N * 4 * 4, "aux.slots.utility": N * 4 * 2,
                     "aux.slots.free": 40 * 4, "aux.slots.top": 8, "aux.slots.clock": 8}
    held = sum(m.numel() * m.element_size() for pair in opt.rows.moments for m in pair)
    assert held == 2 * 41 * 2 * 4 and emb.training_bytes() == ec.memory(emb) + held
    assert emb.value_bytes == 41 * 2 * 4                         # slot 0, of zeros, is one of them
    emb.deploy()
    assert emb.value_bytes == 41 * 2 * 4 < ec.memory(emb) == sum(ec.breakdown(emb).values())
    assert ec.memory(emb.table.index) == ec.memory(emb) - emb.value_bytes


def test_memory_at_criteo_size():
    sizes = [int(n) for n in FIELDS["criteo"][1]]
    found = {}
    for name, budget in itertools.product(["fiited", "ada_embed"], [0.5, 0.1, 0.01, 0.001]):
        weighed = ec.weigh(name, sizes, 16, budget)
        assert weighed["reachable"] and 0.999 * budget < weighed["inference_pct"] / 100 <= budget
        found[name, budget] = weighed["training_pct"]
    assert found["fiited", 0.1] < 70 and found["ada_embed", 0.1] < 45


def test_the_lightest_form_ships():
    forms = {kept: ec.make("fiited", [4000], 16, slots=kept).deploy().table.form for kept in (20, 400, 8000, 16_000)}
    assert forms == {20: "hash", 400: "hash", 8000: "bitmask", 16_000: "bitmask"}
    ids = torch.arange(4000)
    given = [ec.make(f"fiited(serving='{form}')", 4000, 16, slots=900).deploy() for form in
             ("address", "bitmask", "hash")]
    assert torch.equal(given[0](ids), given[1](ids)) and torch.equal(given[1](ids), given[2](ids))
    assert given[0].allocation().tolist() == given[0](ids).ne(0).sum(1).tolist() == given[2].allocation().tolist()
    assert int(given[0].allocation().sum()) == 3600


def test_chunks_of_largest_norm_approximate_a_matrix():
    rows = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    emb = ec.make("fiited", SIZES, 8, slots=50)
    emb.fit(rows)
    check(emb.aux.slots)
    norm = rows.view(-1, 2).norm(dim=1)
    expected = torch.where(norm >= norm.sort(descending=True).values[49], 1.0, 0.0)[:, None] * rows.view(-1, 2)
    found = emb.aux.slots.assembled(torch.arange(N))
    assert torch.equal(found, expected.view(N, 8)) and torch.equal(emb.deploy().table.gather(torch.arange(N)), found)


# --- a whole training -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def few_ids_count(tmp_path_factory):
    """3,000 ids of which every twentieth matters and is frequent."""
    rng = np.random.default_rng(2)
    order = rng.permutation(3000)
    important, others = order[:150], order[150:]
    first = np.where(rng.random(10_000) < 0.6, rng.choice(important, 10_000), rng.choice(others, 10_000))
    effect = np.zeros(3000)
    effect[important] = 3 * rng.choice([-1, 1], 150)
    ids = np.stack([first, rng.integers(0, 10, 10_000)], 1)
    return write(tmp_path_factory.mktemp("few") / "data", [3000, 10], ids, effect[first]), np.sort(important)


def test_competition_pays_where_few_ids_count(few_ids_count):
    data, settings = few_ids_count[0], dict(max_epochs=4)
    size = int(0.08 * 3010 * 8 * 4)
    auc = {spec: trained(spec, data, size, **settings)[0] for spec in ("hash_trick", "fiited", "ada_embed")}
    full = trained("full", data, None, **settings)[0]
    print(auc, full)
    assert min(auc["fiited"], auc["ada_embed"]) > auc["hash_trick"] + 0.03
    assert min(auc["fiited"], auc["ada_embed"]) > full - 0.03


def test_a_run_keeps_the_budget_finds_the_ids_and_restores_a_whole_state(few_ids_count):
    data, important = few_ids_count
    emb = ec.make("fiited", data.cardinalities, 8, 0.08, seed=0)
    head = models.make("wdl", fields=2, dim=8, dense=0, seed=0)
    run = Run(emb, head, data, Settings(lr=0.01, batch=256, max_epochs=3, evals_per_epoch=2))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slots = emb.aux.slots
    for move in emb.schedule(run):
        run.execute(move)
        assert slots.live().numel() + int(slots.top) == slots.slots      # at every step
    check(slots, run.optimizers)
    assert [said["step"] for said in emb.log][:3] == [3, 6, 9] and sum(s["admitted"] for s in emb.log) > slots.slots / 4
    assert run.training_bytes == emb.training_bytes() < ec.budget.full_bytes(data.cardinalities, 8)
    held = (slots.address[:3000] > 0).sum(1).float()
    others = np.setdiff1d(np.arange(3000), important)
    assert held[important].mean() > 3 and held[others].mean() < 0.4
    before = run.score()
    emb.deploy()
    assert run.evaluate(run.valid) == before


# --- ids that keep arriving -------------------------------------------------------------------------------------------

def test_online_equals_a_closed_table_while_everybody_fits():
    """Same ids, known beforehand or not: the same vectors, bit for bit, and the same owners of slots."""
    closed = ec.make("fiited(warmup=(), ratios='uniform')", SIZES, 8, slots=N * 4)
    online = ec.make("fiited(warmup=(), ratios='uniform', online=True)", [2 ** 40, 2 ** 20, 3], 8, slots=N * 4)
    closed.aux.slots.own(torch.arange(N * 4))
    closed.aux.slots.weight.zero_()                              # a new id begins at zero
    opts = [Optimizers(emb, lr=0.05) for emb in (closed, online)]
    everybody = torch.stack([torch.arange(30) % size for size in SIZES], 1)
    online.train()(everybody).sum().backward()                   # all arrive, and a round gives all of them slots
    online.aux.slots.touched()
    online.round(opts[1])
    opts[1].zero_grad()
    assert online.kept().tolist() == [[30] * 4, [7] * 4, [3] * 4]
    for number in range(12):
        ids, weight = draw(20, number), torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(number))
        assert torch.equal(closed(ids), online(ids))
        for emb, opt in zip((closed, online), opts):
            step(emb, opt, ids, weight)
            emb.round(opt)
    ids = draw(50, 77)
    assert torch.equal(closed.deploy()(ids), online.deploy()(ids)) and bool(online(ids).all())
    assert not online(torch.tensor([[2 ** 39, 8, 0]]))[0, :2].any()      # ids it never met
    assert online.kept().tolist() == closed.kept().tolist()


def test_online_holds_its_memory_and_the_useful_ids_while_new_ones_keep_arriving():
    emb = ec.make("fiited(online=True, interval=5)", [2 ** 50, 2 ** 40], 8, 8_000, seed=0).train()
    slots, ids = emb.aux.slots, emb.aux.ids
    opt, rng = Optimizers(emb, lr=0.05), np.random.default_rng(0)
    faithful = torch.from_numpy(rng.integers(0, 2 ** 50, 20))
    size, met = ec.memory(emb), set()
    assert slots.slots < 1200 and ids.rows < 2 * slots.slots
    for number in range(80):
        batch = torch.stack([torch.from_numpy(rng.integers(0, 2 ** 50, 100)),
                             torch.from_numpy(rng.integers(0, 2 ** 40, 100))], 1)
        batch[:40, 0] = faithful.repeat(2)
        step(emb, opt, batch, torch.ones(100, 2, 8))
        emb.after_step(opt)
        met |= set(batch[:, 0].tolist())
        if number % 20 == 19:
            check(slots, opt)
            assert ec.memory(emb) == size and ids.rows < len(met) or number < 40
            assert len(ids.key[ids.key >= 0].unique()) == int((ids.key >= 0).sum())
    asked = torch.stack([faithful, torch.zeros(20, dtype=torch.int64)], 1)
    known = emb.eval()(asked)
    assert bool((known[:, 0] < 0).all())                         # all of them learned, in all of their chunks
    assert not emb(torch.tensor([[12345, 6]])).any()             # looking does not admit
    emb.deploy()
    assert ec.memory(emb) <= 8_000 and torch.equal(emb(asked), known)
    assert int(emb.kept().sum()) == slots.slots


def test_online_saves_and_loads(tmp_path):
    emb = ec.make("fiited(online=True)", [2 ** 40], 8, 8_000).train()
    opt = Optimizers(emb, lr=0.05)
    ids = torch.randint(0, 2 ** 40, (50, 1), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        step(emb, opt, ids, torch.ones(50, 1, 8))
        emb.after_step(opt)
    expected = emb.eval()(ids)
    assert bool((expected < 0).all())
    for deployed in (False, True):
        if deployed:
            emb.deploy()
        ec.save(emb, tmp_path / "a.safetensors")
        assert torch.equal(ec.load(tmp_path / "a.safetensors").eval()(ids), expected)


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, message", [
    ("fiited(chunks=3)", "chunks=3: expected a divisor of the embedding dimension 8"),
    ("fiited(utility='norm')", "expected 'product', 'count' or 'gradient'"),
    ("fiited(ratios=(1, 2))", "4 positive numbers"), ("fiited(ratios='ramp')", "'uniform', 'dynamic', or 4"),
    ("fiited(ratios=(1, 2, 0, 1))", "4 positive numbers"), ("fiited(gamma=0)", r"gamma=0: expected a factor"),
    ("fiited(gamma=1.1)", r"gamma=1.1: expected a factor"), ("fiited(interval=0)", "interval=0"),
    ("fiited(spread=2)", "spread=2"), ("fiited(serving='tree')", "expected one of address, bitmask, hash"),
    ("fiited(slots=161)", "expected 1 <= slots <= 160 chunks"), ("fiited(slots=0)", "expected 1 <= slots"),
    ("fiited(capacity=9)", "capacity"), ("fiited(online=True, serving='bitmask')", "online=True finds ids by a hash"),
    ("ada_embed(chunks=2)", "ada_embed has no option 'chunks'"),
])
def test_bad_options_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        ec.make(spec, SIZES, 8)


def test_online_takes_no_matrix():
    with pytest.raises(TypeError, match="leave it out"):
        ec.make("fiited(online=True)", [100], 8, slots=10).fit(torch.zeros(100, 8))
