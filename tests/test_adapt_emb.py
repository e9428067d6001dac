"""AdaptEmb: which ids get rows of their own, in the static form and while training, against dictionaries in Python."""
from __future__ import annotations

import numpy as np
import pytest
import test_contract as contract
import torch
from planted import margin, write, zipf_ids

import ecstudy as ec
from ecstudy.budget import build
from ecstudy.data.cardinalities import FIELDS
from ecstudy.training import Optimizers
from ecstudy.training.timeline import FakeRun

SIZES = [100, 37, 3, 1]
DYNAMIC = "adapt_emb(dynamic=True, threshold=3)"


def every_id(sizes=SIZES):
    rows = torch.arange(max(sizes))
    return torch.stack([rows % size for size in sizes], 1)


def random_counts(seed=0, sizes=SIZES):
    return np.random.default_rng(seed).integers(0, 12, sum(sizes))


def expected_rows(sizes, rows, top, counts):
    """Row of every (field, id) of the static form: exclusive rows by id, then the shared ones."""
    kept = [-(-n * rows // max(sizes)) for n in sizes]
    own = [0 if m == n else min(round(top * n), m // 2) for m, n in zip(kept, sizes)]
    place, row, shared = 0, {}, sum(own)
    for f, n in enumerate(sizes):
        part = counts[sum(sizes[:f]):sum(sizes[:f + 1])]
        exclusive = set(sorted(range(n), key=lambda i: (-part[i], i))[:own[f]])
        rare = 0
        for i in range(n):
            if i in exclusive:
                row[f, i], place = place, place + 1
            else:
                row[f, i], rare = shared + rare % (kept[f] - own[f]), rare + 1
        shared += kept[f] - own[f]
    return row, sum(kept)


@pytest.mark.parametrize("rows", [1, 2, 7, 10, 50, 99, 100])
@pytest.mark.parametrize("top", [0, 0.1, 0.3, 1])
def test_static_rows_are_those_of_a_dictionary(rows, top):
    counts = random_counts(rows)
    emb = ec.make(f"adapt_emb(rows={rows}, top={top})", SIZES, 4, counts=counts)
    expected, total = expected_rows(SIZES, rows, top, counts)
    assert emb.table.shape == (total, 4)
    codes = emb.encode(every_id())
    for f, n in enumerate(SIZES):
        assert codes[:n, f].tolist() == [expected[f, i] for i in range(n)]
    assert set(expected.values()) == set(range(total))                # no row is wasted


def test_a_whole_field_has_a_row_for_every_id():
    emb = ec.make("adapt_emb(rows=100)", SIZES, 4, counts=random_counts())
    assert emb.exclusive == 0 and emb.encode(every_id())[:, 0].unique().numel() == 100


@pytest.mark.parametrize("budget, share", [(0.5, 0.1), (0.1, 0.05), (0.01, 0.005), (0.001, 0.0005)])
def test_exclusive_shares_are_the_papers_and_training_weighs_less(budget, share):
    """Fact sheet 1.4: p and training memory 154.4, 35.3, 9.2, 6.5 % on Criteo, there with an int32 for every id."""
    sizes = [int(n) for n in FIELDS["criteo"][1]]
    weighed = ec.weigh("adapt_emb", sizes, 16, budget)
    emb = build("adapt_emb", sizes, 16, knob=weighed["knob"], device="meta")
    assert emb.exclusive / emb.fields.n == pytest.approx(share, rel=0.07)
    paper = {0.5: 154.4, 0.1: 35.3, 0.01: 9.2, 0.001: 6.5}[budget]
    assert weighed["training_pct"] < paper and 0.97 * 100 * budget < weighed["inference_pct"] <= 100 * budget
    dynamic = ec.weigh("adapt_emb(dynamic=True)", sizes, 16, budget)
    assert dynamic["knob"] == weighed["knob"] and dynamic["bytes_inference"] == weighed["bytes_inference"]


def test_a_matrix_is_copied_where_exclusive_and_averaged_where_shared():
    matrix = torch.randn(200, 6)
    counts = random_counts(2, [200])
    emb = ec.compress(matrix, "adapt_emb(rows=40)", counts=counts)
    expected, total = expected_rows([200], 40, 0.1, counts)
    row = torch.tensor([expected[0, i] for i in range(200)])
    for number in range(total):
        torch.testing.assert_close(emb.table.weight[number], matrix[row == number].mean(0))
    with pytest.raises(TypeError, match="leave dynamic out"):
        ec.compress(matrix, "adapt_emb(rows=40, dynamic=True)")


@pytest.mark.parametrize("options, text", [("rows=0", "rows=0: expected 1 to 100"), ("rows=101", "rows=101"),
                                           ("top=1.5", "top=1.5: expected the exclusive share"),
                                           ("threshold=0", "threshold=0: expected at least 1")])
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        ec.make(f"adapt_emb({options})", SIZES, 4, counts=random_counts())


# --- the dynamic form -------------------------------------------------------------------------------------------------

class Reference:
    """The rule of the dynamic form, id by id in Python."""

    def __init__(self, emb):
        self.emb, self.count, self.place, self.owner = emb, {}, {}, {}
        self.hand = [0] * len(SIZES)

    def see(self, batch):
        for row in batch.tolist():
            for f, i in enumerate(row):
                self.count[f, i] = self.count.get((f, i), 0) + 1
        asked = {(f, i) for row in batch.tolist() for f, i in enumerate(row)}
        for f in range(len(SIZES)):
            slots, first = self.emb.own[f], sum(self.emb.own[:f])
            asks = sorted((i for g, i in asked if g == f and (f, i) not in self.place
                           and self.count[f, i] >= self.emb.threshold), key=lambda i: (-self.count[f, i], i))
            hand = self.hand[f]
            for turn, i in enumerate(asks[:slots]):
                slot = first + (hand + turn) % slots
                owner = self.owner.get(slot)
                if owner is None or self.count[f, i] > 2 * self.count[owner]:
                    if owner:
                        del self.place[owner]
                    self.owner[slot], self.place[f, i] = (f, i), slot
            self.hand[f] = (hand + min(len(asks), slots)) % slots if slots else 0


def trained_dynamic(steps=60, rows=20, check=None, seed=1):
    """A dynamic module after ``steps`` batches whose frequent ids change half-way, and a step of Adam each."""
    rng = np.random.default_rng(seed)
    emb = ec.make(f"adapt_emb(rows={rows}, dynamic=True, threshold=3)", SIZES, 4)
    opt = Optimizers(emb, lr=0.05)
    order = [rng.permutation(n) for n in SIZES]
    for step in range(steps):
        if step == steps // 2:
            order = [rng.permutation(n) for n in SIZES]
        ids = np.stack([o[np.minimum(rng.zipf(1.3, 16) - 1, n - 1)] for n, o in zip(SIZES, order)], 1)
        ids = torch.from_numpy(ids)
        opt.zero_grad()
        emb(ids).square().sum().backward()
        opt.step()
        before = {name: tensor.clone() for name, tensor in emb.state_dict().items()}
        emb.promote(opt)
        if check:
            check(emb, opt, ids, before)
    return emb, opt


def test_promotion_follows_the_rule_id_by_id():
    reference, changes = [], [0, 0]

    def check(emb, opt, ids, before):
        reference or reference.append(Reference(emb))
        reference[0].see(ids)
        place = {}
        for f, n in enumerate(SIZES):
            for i, slot in enumerate(emb.aux.place[sum(SIZES[:f]):sum(SIZES[:f + 1])].tolist()):
                if slot >= 0:
                    place[f, i] = slot
        assert place == reference[0].place
        old, new = before["aux.owner"], emb.aux.owner
        moved = (old != new).nonzero().view(-1)
        changes[0] += len(moved)
        changes[1] += int((old[moved] >= 0).sum())
        first, second = opt.rows.moments[0]
        assert not first[moved].any() and not second[moved].any()              # fresh moments ...
        for slot in moved.tolist():                                            # ... and a copy of the shared row
            f = int(torch.bucketize(new[slot], emb.fields.offset, right=True)) - 1
            shared = (int(new[slot]) - sum(SIZES[:f])) % int(emb.modulus[f]) + int(emb.shared_start[f])
            assert torch.equal(emb.table.weight[slot], before["table.weight"][shared])
        kept = torch.ones(len(emb.table.weight), dtype=torch.bool)
        kept[moved] = False
        assert torch.equal(emb.table.weight[kept], before["table.weight"][kept])

    emb, _ = trained_dynamic(check=check)
    assert changes[0] >= emb.exclusive and changes[1] >= 3       # rows were given, and some were taken away again
    assert int(emb.aux.count.sum()) == 60 * 16 * len(SIZES)


@pytest.mark.parametrize("steps", [0, 3, 60])
def test_deployment_of_the_dynamic_form_changes_no_bit(steps):
    emb, _ = trained_dynamic(steps)
    emb.eval()
    before = emb(every_id())
    owners = emb.aux.owner[emb.aux.owner >= 0]
    emb.deploy()
    assert torch.equal(before, emb(every_id()))
    place = emb.map.find(torch.arange(sum(SIZES)))
    assert sorted(place[place >= 0].tolist()) == list(range(emb.exclusive)) and (place[owners] >= 0).all()
    assert "aux" not in dict(emb.named_modules())


def test_an_undeployed_dynamic_module_is_saved_with_its_counts(tmp_path):
    emb, _ = trained_dynamic()
    loaded = ec.load(ec.save(emb, tmp_path / "half")).train()
    assert torch.equal(loaded.eval()(every_id()), emb.eval()(every_id()))
    for module in (emb, loaded):
        module.train()
        module(every_id())
        module.promote()
    assert all(torch.equal(a, b) for a, b in zip(emb.state_dict().values(), loaded.state_dict().values()))
    assert torch.equal(loaded.deploy()(every_id()), emb.deploy()(every_id()))


def test_evaluation_and_rehearsal_count_nothing():
    emb = ec.make(DYNAMIC, SIZES, 4, 0.5)
    emb.eval()(every_id())
    emb.promote()
    with torch.no_grad():
        emb.train()(every_id())
    emb.promote()
    assert not emb.aux.count.any()
    assert len(list(emb.schedule(FakeRun()))) == 4


def test_promotion_makes_nothing_that_grows_with_the_table():
    largest = []
    for size in (5000, 50_000):
        emb = ec.make("adapt_emb(dynamic=True, threshold=1)", [size, 700], 16, 0.5)
        opt = Optimizers(emb)
        for _ in range(2):                                                     # the first step makes the moments
            emb(torch.stack([torch.arange(40) * 11, torch.arange(40)], 1)).sum().backward()
            opt.step()
            known = {t.untyped_storage().data_ptr() for t in [*emb.state_dict().values(), *opt.rows.moments[0]]}
            with contract.Largest(known) as seen:
                emb.promote(opt)
        largest.append(seen.largest)
        assert (emb.aux.place >= 0).sum() == 80
    assert largest[0] == largest[1]


def test_an_empty_batch_promotes_nobody():
    emb = ec.make(DYNAMIC, SIZES, 4, 0.5)
    assert emb(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, 4)
    emb.promote()
    assert not emb.aux.count.any()


@pytest.mark.parametrize("name", [name for name in vars(contract) if name.startswith("test_") and "spec" in (
    getattr(contract, name).__code__.co_varnames[:getattr(contract, name).__code__.co_argcount])])
def test_the_dynamic_form_keeps_the_contract(name, tmp_path):
    test = getattr(contract, name)
    wanted = test.__code__.co_varnames[:test.__code__.co_argcount]
    if "ids" in wanted or name == "test_gradients_reach_every_weight":
        pytest.skip("the same for every option of a method, or of rows that are not yet given")
    for budget in [0.77, 0.1, 0.001] if "budget" in wanted else [None]:
        given = {"spec": "adapt_emb(dynamic=True)", "device": "cpu", "tmp_path": tmp_path, "budget": budget}
        test(**{argument: given[argument] for argument in wanted})


# --- where the idea pays ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def frequent_ids_matter(tmp_path_factory):
    """A field of 5,000 ids with power-law frequencies, each id with an effect of its own."""
    rng = np.random.default_rng(5)
    ids = np.stack([zipf_ids(rng, 5000, 30_000, 1.1), rng.integers(0, 10, 30_000)], 1)
    return write(tmp_path_factory.mktemp("zipf") / "data", [5000, 10], ids, 2.5 * rng.choice([-1, 1], 5000)[ids[:, 0]])


@pytest.mark.parametrize("spec", ["adapt_emb", "adapt_emb(dynamic=True)"])
def test_rows_of_their_own_pay_where_frequent_ids_matter(spec, frequent_ids_matter):
    assert margin(spec, frequent_ids_matter, 0.05) > 0.03
