"""What each method promises, against an oracle of its own."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ecstudy as ec
from ecstudy.budget import full_bytes
from ecstudy.data.cardinalities import FIELDS
from ecstudy.fields import Fields
from ecstudy.methods.autosrh import frequency_groups
from ecstudy.methods.compo import Compo, split
from ecstudy.methods.robe import PRIME
from ecstudy.spec import SpecError, parse
from ecstudy.tables import FloatTable

# --- specs ------------------------------------------------------------------------------------------------------------

def test_specs_have_one_canonical_form():
    spec = parse(' robe( sign = True,block=4 ) | int8 ')
    assert spec.canonical == "robe(block=4, sign=True)|int8" and parse(spec.canonical) == spec
    assert parse("int_quant(scale='row|x')").options == {"scale": "row|x"}


@pytest.mark.parametrize("text", ["", "robe(", "robe(4)", "a.b", "robe(x=open('f'))", "robe(x=y)", "|int8", "1", "a b"])
def test_unreadable_specs_are_refused(text):
    with pytest.raises(SpecError, match="spec"):
        parse(text)


# --- hash_trick -------------------------------------------------------------------------------------------------------

def test_hash_trick_collides_by_remainder_within_a_field():
    emb = ec.make("hash_trick(rows=10)", [100, 37], 4)
    a, b = emb(torch.tensor([[3, 0], [13, 4], [23, 8], [4, 1]])).unbind(1)
    assert torch.equal(a[0], a[1]) and torch.equal(a[1], a[2]) and not torch.equal(a[0], a[3])
    assert torch.equal(b[0], b[1]) and not torch.equal(b[0], b[3])          # ceil(37 * 10 / 100) = 4 rows
    assert emb.table.shape == (14, 4)


# --- compo ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.floats(0, 1))
def test_every_id_has_its_own_pair_and_every_row_is_used(sizes, share):
    options = Compo.sizes(Fields(sizes), 4)
    emb = Compo(Fields(sizes), 4, rows=options[int(share * (len(options) - 1))])
    used = [set(), set()]
    for field, size in enumerate(sizes):
        ids = torch.zeros(size, len(sizes), dtype=torch.int64)
        ids[:, field] = torch.arange(size)
        remainder, quotient = (code[:, field].tolist() for code in emb.encode(ids))
        assert len(set(zip(remainder, quotient))) == size
        used[0] |= set(remainder)
        used[1] |= set() if emb.whole[field] else set(quotient)
    assert used[0] == set(range(emb.remainder.shape[0]))
    assert len(used[1]) == (emb.quotient.shape[0] if used[1] else 0)


def test_compo_is_the_product_and_starts_at_the_scale_of_full():
    emb = ec.make("compo(rows=400)", [20_000, 3], 16)
    ids = torch.stack([torch.arange(20_000), torch.arange(20_000) % 3], 1)
    (r0, r1), (q0, q1) = (code[777] for code in emb.encode(ids))
    expected = emb.remainder.weight[r0] * emb.quotient.weight[q0]
    assert torch.equal(emb(ids)[777, 0], expected) and torch.equal(emb(ids)[777, 1], emb.remainder.weight[r1])
    target = Fields([20_000]).bound() / 3 ** 0.5
    assert emb(ids)[:, 0].std().item() == pytest.approx(target, rel=0.1)
    assert emb(ids)[:3, 1].abs().max() <= Fields([20_000]).bound()
    paper = ec.make("compo(rows=400, init='paper')", [20_000, 3], 16)
    assert paper(ids)[:, 0].std() < target / 50                   # the published start, near zero
    total = ec.make("compo(rows=400, combine='sum')", [20_000, 3], 16)
    assert total(ids)[:, 0].std().item() == pytest.approx(target, rel=0.1)


def test_compo_compresses_the_fields_the_study_compresses():
    """Fact sheet 2.2: compressed fields at c = 2, 10, 101 are 24, 23, 19 of Criteo's, 19, 15, 11 of Avazu's."""
    for name, expected in (("criteo", (24, 23, 19)), ("avazu", (19, 15, 11))):
        for c, count in zip((2, 10, 101), expected):
            assert abs(int((split(FIELDS[name][1], c)[1] > 0).sum()) - count) <= 2


# --- robe -------------------------------------------------------------------------------------------------------------

def test_robe_places_follow_the_universal_hash_in_python_integers():
    emb = ec.make("robe(block=4, length=5000)", [10_000_000, 50], 16, seed=3)
    ids = torch.tensor([[9_999_999, 49], [0, 7]])
    row, start = emb.encode(ids)
    a, c, d = emb.hash[0].tolist()
    for b, f, chunk in itertools.product(range(2), range(2), range(4)):
        i = ids[b, f].item() + (10_000_000 if f else 0)
        assert start[b, f, chunk] == (a * i + c * chunk + d) % PRIME % (5000 - 4 + 1)
    x = emb(ids)
    assert torch.equal(x[0, 0, 4:8], emb.array.weight[start[0, 0, 1]:start[0, 0, 1] + 4])


def test_robe_collides_as_often_as_chance():
    """Universal hashing: over random coefficients two ids share a place with probability 1 / places. (Over consecutive
    ids an affine hash spreads more evenly than chance, so collisions are counted over coefficients.)"""
    emb = ec.make("robe(length=65)", 40_000, 16)                  # 50 places
    torch.manual_seed(0)
    ids, draws = torch.tensor([[3], [4], [39_999]]), 6000
    collisions = torch.zeros(3)
    for _ in range(draws):
        emb.hash.copy_(torch.randint(1, PRIME, (1, 3)))
        start = emb.encode(ids)[1].view(-1)
        collisions += torch.stack([start[0] == start[1], start[0] == start[2], start[1] == start[2]]).float()
    sigma = (draws / 50 * (1 - 1 / 50)) ** 0.5
    assert ((collisions - draws / 50).abs() < 4.5 * sigma).all()


def test_robe_signs_are_fair_and_belong_to_the_id():
    emb = ec.make("robe(sign=True)", 2000, 16, 0.5)
    plain = emb.array.blocks(emb.encode(torch.arange(2000)[:, None])[1], 16).view(2000, 16)
    ratio = emb(torch.arange(2000)) / plain
    assert set(ratio.unique().tolist()) == {-1.0, 1.0} and abs(ratio.mean()) < 0.03
    assert torch.equal(emb(torch.tensor([5, 5]))[0], emb(torch.tensor([5]))[0])


# --- int_quant --------------------------------------------------------------------------------------------------------

def test_int_quant_sizes_are_the_papers():
    for budget, bits, share, training in ((0.5, 16, 0.5, 2.5), (0.49, 8, 0.25, 2.25), (0.25, 8, 0.25, 2.25)):
        row = ec.weigh("int_quant", [1000, 200], 16, budget)
        assert (row["knob"], row["inference_pct"], row["training_pct"]) == (bits, 100 * share, 100 * training)
    assert not ec.weigh("int_quant", [1000, 200], 16, 0.1)["reachable"]


def test_int_quant_starts_unbiased():
    emb = ec.make("int_quant", 20_000, 16, 0.25)                  # values far below one step: -1, 0 or 1 step
    codes = emb.table.codes.float()
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    expected = Fields(20_000).bound() / 0.01 / 2                  # E|x| / step for U(-b, b)
    assert codes.abs().mean().item() == pytest.approx(expected, rel=0.05) and abs(codes.mean()) < 0.01


# --- top_k ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("top", [0, 1, 7, 40, 149, 150])
def test_top_k_gives_rows_to_the_most_frequent_ids(top):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, 150)
    emb = ec.make(f"top_k(top={top})", [100, 50], 4, counts=counts)
    ids = torch.stack([torch.arange(100), torch.arange(100) % 50], 1)
    codes = emb.encode(ids)
    row = np.concatenate([codes[:, 0].numpy(), codes[:50, 1].numpy()])
    best = set(np.argsort(-counts, kind="stable")[:top])
    assert {i for i in range(150) if row[i] < top} == best
    assert len(set(row[list(best)])) == top
    assert all(row[i] == top + (i >= 100) for i in range(150) if i not in best)     # one shared row per field


def test_top_k_map_takes_the_lighter_form():
    small, large = (ec.make("top_k", 10_000, 16, budget, counts=np.arange(10_000)) for budget in (0.001, 0.5))
    assert type(small.map).__name__ == "SortedIds" and type(large.map).__name__ == "MarkedIds"


# --- autosrh, deeplight -----------------------------------------------------------------------------------------------

def test_frequency_groups_are_even_and_keep_ties_together():
    even = frequency_groups(torch.arange(600).flip(0), 6)
    assert torch.bincount(even).tolist() == [100] * 6 and even.tolist() == sorted(even.tolist())
    counts = torch.tensor([1] * 760 + list(range(2, 242)))       # like a real log: three quarters occur once
    groups = frequency_groups(counts, 6)
    assert len(groups[:760].unique()) == 1 and torch.bincount(groups).tolist() == [48] * 5 + [760]
    assert (groups[760:].flip(0).diff() >= 0).all()               # more frequent ids in earlier groups
    assert frequency_groups(torch.ones(10, dtype=torch.int64), 6).unique().numel() == 1
    for counts in (torch.tensor([3]), torch.tensor([5, 5, 1]), torch.randint(0, 4, (50,))):
        groups = frequency_groups(counts, 6)
        for value in counts.unique():
            assert groups[counts == value].unique().numel() == 1


def test_gates_move_by_the_published_rule_and_are_multiplied_in():
    emb = ec.make("autosrh", [60, 40], 4, 0.4, counts=np.arange(100))
    gradient = torch.randn(6, 4)
    emb.move_gates([gradient])
    expected = (1 - 0.001 * gradient / (gradient.abs().mean(1, keepdim=True) + 1e-8)).clamp(0, 1)
    assert torch.equal(emb.aux.gate, expected)
    with torch.no_grad():
        emb.aux.gate.copy_(torch.rand(6, 4))
    ids = torch.stack([torch.arange(60), torch.arange(60) % 40], 1)
    gated = emb(ids).detach().clone()
    dense = (emb.table.weight * emb.aux.gate[emb.aux.group.long()]).detach().clone()
    shipped = emb.deploy()(ids)
    keep = torch.zeros(400)
    keep[dense.view(-1).abs().topk(emb.kept).indices] = 1
    mask = keep.view(100, 4)[emb.fields.flat(ids)]
    torch.testing.assert_close(shipped, gated * mask)


# --- compressing trained vectors --------------------------------------------------------------------------------------

MATRIX = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method, budget, error", [
    ("full", 1.0, 0.0), ("int_quant", 0.25, 0.012), ("int_quant", 0.5, 1e-4), ("int_quant(scale='row')", 0.3, 0.01),
    ("full|int8", 0.3, 0.01), ("full|int16", 0.6, 1e-4), ("deeplight", 0.5, 0.4), ("small_dim", 0.5, 0.75),
    ("top_k", 0.5, 0.75), ("hash_trick", 0.5, 0.75), ("autosrh", 0.5, 0.4)])
def test_compress_takes_modules_matrices_and_files(method, budget, error, tmp_path):
    np.save(tmp_path / "m.npy", MATRIX.numpy())
    options = {"counts": np.arange(400)} if method in ("top_k", "autosrh") else {}
    outputs = []
    for source in (torch.nn.Embedding.from_pretrained(MATRIX), MATRIX, MATRIX.numpy(), tmp_path / "m.npy"):
        small = ec.compress(source, method, budget, **options)
        assert small.deployed and ec.memory(small) <= budget * full_bytes(400, 16)
        outputs.append(small(torch.arange(400)))
        loaded = ec.load(ec.save(small, tmp_path / "small"))
        assert torch.equal(loaded(torch.arange(400)), outputs[-1]) and ec.memory(loaded) == ec.memory(small)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    relative = ((outputs[0] - MATRIX).square().sum() / MATRIX.square().sum()).sqrt()
    assert relative <= error + 1e-7


def test_compressions_are_the_least_squares_ones():
    small = ec.compress(MATRIX, "small_dim(width=5)")
    basis = torch.linalg.svd(MATRIX, full_matrices=False).Vh[:5]
    best = MATRIX @ basis.T @ basis
    torch.testing.assert_close(small(torch.arange(400)), best, atol=1e-4, rtol=1e-4)
    small = ec.compress(MATRIX, "hash_trick(rows=7)")
    torch.testing.assert_close(small(torch.tensor(3)), MATRIX[3::7].mean(0))
    small = ec.compress(MATRIX, "top_k(top=10)", counts=np.arange(400)[::-1])
    torch.testing.assert_close(small(torch.tensor([2, 399])), torch.stack([MATRIX[2], MATRIX[10:].mean(0)]))


def test_what_must_be_trained_says_so():
    for method in ("compo", "robe"):
        with pytest.raises(TypeError, match=f"{method} learns by training"):
            ec.compress(MATRIX, method, 0.5)
    broken = MATRIX.clone()
    broken[17, 3] = float("nan")
    with pytest.raises(ValueError, match="row 17 holds NaN or infinity"):
        ec.compress(broken, "full|int8", 0.5)
    with pytest.raises(TypeError, match="source of type list"):
        ec.compress([[1.0]], "full")


def test_load_refuses_foreign_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not an embedding saved by ecstudy"):
        ec.load(tmp_path / "x.safetensors")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.torch

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError):
        ec.save(ec.make("full", 5, 4), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_file_in_methods_is_a_method():
    from ecstudy import registry

    table = ec.methods()
    assert table.knob.to_dict() | {"full": "", "robe": "length"} == table.knob.to_dict()
    assert set(table.index) == set(registry.names()) and table.summary.str.len().min() > 20
    assert isinstance(ec.make("full", 5, 4).table, FloatTable)
    for name in table.index:
        text = registry.docstring(name)
        assert all(word in text for word in ("**Size**", "**Training**", "**Stored**")), name
