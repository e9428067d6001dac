"""The contract, held by every method and every wrapper around it."""
from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ecstudy as ec
from ecstudy.budget import build, full_bytes, solve
from ecstudy.fields import Fields
from ecstudy.memory import stored
from ecstudy.registry import get, names
from ecstudy.sparse import SparseTable
from ecstudy.spec import parse
from ecstudy.tables import FloatTable
from ecstudy.training import Optimizers
from traits import trait

SIZES, DIM = [50, 20, 8, 300], 16
WRAPPED = [f"{name}{trait(name, 'options')}|int8" for name in names() if trait(name, "wrappable")]
WRAPPED += ["full|int16", "full|int4", "robe|int4", "hash_trick|int2", "compo|fp16", "fp16|int8", "deeplight|bf16"]
ROUNDING = {"int8": 1 / 60, "int16": 1e-4, "int4": 0.15, "int2": 0.6, "fp16": 1e-3, "bf16": 1 / 128}
SPECS = [*(name + trait(name, "options") for name in names()), "robe(block=4, sign=True)", "compo(combine='sum')",
         "int_quant(scale='row')", "small_dim(shared=True)"]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def counts_of(sizes):
    """Training counts: frequent ids first in every field, with ties."""
    return np.concatenate([np.arange(size)[::-1] // 4 for size in sizes])


every_spec = pytest.mark.parametrize("spec", SPECS + WRAPPED)
every_trained = pytest.mark.parametrize("spec", [s for s in SPECS + WRAPPED if get(parse(s).name).trains])
every_device = pytest.mark.parametrize("device", DEVICES)


def make(spec, sizes=SIZES, dim=DIM, device="cpu", seed=0, budget=None, **options):
    if budget is None:
        budget = trait(spec, "budget")
    counts = counts_of([sizes] if isinstance(sizes, int) else sizes) if get(parse(spec).name).needs_counts else None
    emb = ec.make(spec, sizes, dim, budget, seed=seed, counts=counts, device=device, **options)
    if not get(parse(spec).name).trains:                          # empty until it has taken vectors
        emb.fit(torch.randn(emb.fields.n, dim, generator=torch.Generator().manual_seed(seed)))
    return emb


def all_ids(device="cpu"):
    """Every id of every field at least once: [300, F]."""
    rows = torch.arange(max(SIZES), device=device)
    return torch.stack([rows % size for size in SIZES], 1)


@every_device
@every_spec
def test_shapes_and_types(spec, device):
    emb = make(spec, device=device)
    for dtype in (torch.int64, torch.int32):
        x = emb(all_ids(device).to(dtype))
        assert x.shape == (300, 4, DIM) and x.dtype == torch.float32 and x.device.type == device
    emb.deploy()
    assert torch.isfinite(emb(all_ids(device))).all()


@every_spec
def test_an_int_cardinality_is_a_drop_in_for_nn_embedding(spec):
    first, bar, rest = spec.partition("|")
    emb = make(first + trait(spec, "single") * ("(" not in first) + bar + rest, 500, 8)
    reference = torch.nn.Embedding(500, 8)
    for shape in [(), (7,), (2, 3), (2, 3, 4), (0,)]:
        ids = torch.randint(0, 500, shape)
        assert emb(ids).shape == reference(ids).shape


@every_spec
def test_equal_ids_give_equal_vectors_and_rows_do_not_mix(spec):
    emb = make(spec).eval()
    ids = all_ids()
    together = emb(ids)
    for row in (0, 17, 299):
        torch.testing.assert_close(emb(ids[row:row + 1])[0], together[row])


@every_spec
def test_a_field_of_ids_changes_its_own_column_alone(spec):
    emb = make(spec).eval()
    for _ in range(2):                                            # as trained, then as deployed
        ids = all_ids()
        before = emb(ids)
        for field, size in enumerate(SIZES):
            changed = ids.clone()
            changed[:, field] = (ids[:, field] + 1) % size
            moved = (emb(changed) - before).abs().amax((0, 2)) > 1e-5 * before.abs().max()
            alike = spec.startswith("top_k") and not moved[field]         # no id of the field has a row of its own
            assert moved.tolist() == [f == field and not alike for f in range(4)]
        emb.deploy()


@every_device
@every_trained
def test_gradients_reach_every_weight(spec, device):
    emb = make(spec, device=device).train()
    opt = Optimizers(emb)
    ids = all_ids(device)
    generator = torch.Generator().manual_seed(1)
    opt.zero_grad()
    (emb(ids) * torch.randn(300, 4, DIM, generator=generator).to(device)).sum().backward()
    for holder in emb.holders():
        index, grad = holder.touched()
        assert len(index) == len(index.unique()) and grad.shape[0] == len(index)
        idle = len(SIZES) if spec.startswith("top_k") else 0      # a shared row is idle where every id has its own
        assert len(index) >= trait(spec, "every_row") * (holder.shape[0] - idle)
        assert (grad != 0).float().mean() >= trait(spec, "every_value")
    for parameter in emb.dense_parameters():
        assert (parameter.grad != 0).all()


@every_device
@every_spec
def test_seed_decides_and_leaves_the_global_stream_alone(spec, device):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = make(spec, seed=3, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    second, other = make(spec, seed=3, device=device), make(spec, seed=4, device=device)
    a, b, c = first.state_dict(), second.state_dict(), other.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@every_device
@every_trained
def test_training_is_deterministic_and_learns(spec, device):
    def train():
        emb = make(spec, device=device, seed=1)
        head = torch.nn.Linear(4 * DIM, 1).to(device)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, 4 * DIM)[None])
            head.bias.zero_()
        opt = Optimizers(emb, head, lr=0.02)
        ids, losses = all_ids(device), []
        label = (ids[:, 3] % 7 < 3).float()
        torch.manual_seed(0)
        for _ in range(60):
            opt.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(head(emb(ids).flatten(1))[:, 0], label)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses, emb

    losses, emb = train()
    again, _ = train()
    if device == "cpu":
        assert losses == again
    assert losses[-1] < trait(spec, "learns") * losses[0]


@every_spec
def test_state_dict_round_trip(spec, tmp_path):
    emb = make(spec)
    other = make(spec, seed=9)
    other.load_state_dict(emb.state_dict())
    assert torch.equal(emb.eval()(all_ids()), other.eval()(all_ids()))
    ec.save(emb, tmp_path / "a.safetensors")
    loaded = ec.load(tmp_path / "a.safetensors").eval()
    assert torch.equal(emb(all_ids()), loaded(all_ids())) and ec.memory(emb) == ec.memory(loaded)
    emb.deploy()
    ec.save(emb, tmp_path / "b.safetensors")
    loaded = ec.load(tmp_path / "b.safetensors")
    assert loaded.deployed and torch.equal(emb(all_ids()), loaded(all_ids()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@every_spec
def test_memory_is_what_saving_writes(spec, tmp_path):
    emb = make(spec)
    for state in ("training", "deployed"):
        path = ec.save(emb, tmp_path / state)
        content = path.read_bytes()
        header = struct.unpack("<Q", content[:8])[0]
        json.loads(content[8:8 + header])
        assert len(content) - 8 - header == ec.memory(emb) == sum(ec.breakdown(emb).values())
        emb.deploy()


@every_spec
def test_meta_build_matches_the_real_one(spec):
    real = make(spec)
    knob = real.config["knob"]
    meta = build(spec, SIZES, DIM, knob=knob, device="meta")
    for _ in range(2):                                            # as trained, then as deployed
        a, b = stored(meta), stored(real)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].is_meta and a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
        assert ec.memory(meta) == ec.memory(real)
        if not trait(spec, "shape_by_knob"):                      # what ships is learned: at most what the build weighs
            assert get(parse(spec).name).learns_size and ec.memory(real.deploy()) <= ec.memory(meta.deploy())
            return
        assert meta.training_bytes() == real.training_bytes() or real.deployed
        meta.deploy(), real.deploy()


@every_spec
def test_what_is_not_saved_is_a_few_numbers_per_field(spec):
    emb = make(spec)
    saved = {id(t) for t in stored(emb).values()}
    for name, buffer in emb.named_buffers():
        if id(buffer) not in saved:
            assert buffer.numel() <= len(SIZES), name


@every_spec
def test_size_grows_with_the_knob(spec):
    cls, options = get(parse(spec).name), parse(spec).options
    sizes = cls.sizes(Fields(SIZES), DIM, **options)
    if cls.knob is None:
        assert len(sizes) == 0
        return
    probe = sorted({round(i * (len(sizes) - 1) / 60) for i in range(61)})
    weights = [ec.memory(build(spec, SIZES, DIM, knob=sizes[i], device="meta").deploy()) for i in probe]
    assert weights == sorted(weights) and weights[0] < weights[-1]


@pytest.mark.parametrize("budget", [1.0, 0.77, 0.5, 0.3, 0.1, 0.03, 0.01, 0.001])
@every_spec
def test_budget_is_a_limit_met_to_within_one_notch(spec, budget):
    limit = int(full_bytes(SIZES, DIM) * budget)
    cls, options = get(parse(spec).name), parse(spec).options
    try:
        emb = make(spec, budget=budget)
    except ec.Unreachable as error:
        assert error.closest > limit and f"{error.closest:,}" in error.reason
        return
    knob = emb.config["knob"]
    used = ec.memory(emb.deploy())
    assert used <= limit
    if cls.knob is None or knob is None:
        return
    sizes = cls.sizes(Fields(SIZES), DIM, **options)
    place = sizes.index(knob)
    if place + 1 < len(sizes):
        assert ec.memory(build(spec, SIZES, DIM, knob=sizes[place + 1], device="meta").deploy()) > limit


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that operations make, storages in ``known`` (the table, its moments) aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                if tensor.layout == torch.sparse_coo:
                    self.largest = max(self.largest, tensor._values().numel())
                elif tensor.untyped_storage().data_ptr() not in self.known:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@every_spec
def test_a_step_costs_the_same_whatever_the_table(spec):
    """Rule 3: tenfold rows, the same largest tensor in forward, backward and update."""
    largest, same = [], {}
    for scale in (1, 10):
        sizes = [size * scale for size in trait(spec, "step_sizes")]
        emb = make(spec, sizes, budget=1.0 if same else None, **same).train()
        trains = get(parse(spec).name).trains
        if trait(spec, "same_knob"):
            same = {get(parse(spec).name).knob: emb.config["knob"]}
        opt = Optimizers(emb) if trains else None
        ids = torch.stack([torch.arange(40) * 11, torch.arange(40) * 3], 1)
        for _ in range(2 * trains):                               # the first step allocates moments
            known = {t.untyped_storage().data_ptr() for t in stored(emb).values()}
            known |= {t.untyped_storage().data_ptr() for pair in opt.rows.moments if pair for t in pair}
            with Largest(known) as seen:
                opt.zero_grad()
                emb(ids).square().sum().backward()
                opt.step()
        largest.append(seen.largest if trains else 0)
        emb.deploy()
        known = {t.untyped_storage().data_ptr() for t in stored(emb).values()}
        with torch.no_grad(), Largest(known) as seen:
            emb(ids)
        largest.append(seen.largest)
    step, lookup, step10, lookup10 = largest
    assert step10 <= 1.25 * step and lookup10 <= 1.25 * lookup    # duplicates may be fewer, never ten times as many
    assert step10 < 0.2 * 5000 * 10 * DIM * 4


@every_spec
def test_deployment_changes_nothing_but_what_it_says(spec):
    emb = make(spec).eval()
    before = emb(all_ids()).detach()
    after = emb.deploy()(all_ids())
    if trait(spec, "prunes"):
        survivors = after != 0
        tolerance = before.abs().max() * ROUNDING[spec.rpartition("|")[2]] if "|" in spec else 0
        torch.testing.assert_close(after[survivors], before[survivors], atol=float(tolerance), rtol=1e-6)
        assert isinstance(next(iter(emb.holders())), SparseTable)
    elif trait(spec, "selects"):
        assert torch.isfinite(after).all() and (after != 0).any()
    elif trait(spec, "merges") and "|" not in spec:
        assert (after.view(-1, 1, DIM) == before.view(1, -1, DIM)).all(2).any(1).all()
    elif "|" in spec:
        assert 0 < (after - before).abs().max() <= before.abs().max() * ROUNDING[spec.rpartition("|")[2]]
    elif trait(spec, "rounds"):
        assert 0 < (after - before).abs().max() <= trait(spec, "rounds") * before.abs().max()
    elif trait(spec, "exact"):
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(before, after, atol=1e-5 * float(before.abs().max()), rtol=1e-4)
    assert "aux" not in dict(emb.named_modules())


@every_spec
def test_deployed_modules_need_no_gradient_state(spec):
    emb = make(spec)
    training = ec.memory(emb)
    deployed = ec.memory(emb.deploy())
    assert deployed <= training or trait(spec, "prunes")


@pytest.mark.parametrize("ids, error, text", [
    (torch.tensor([[0, 0, 8, 0]]), IndexError, "id 8 in field 2: expected 0 <= id < 8"),
    (torch.tensor([[0, -1, 0, 0]]), IndexError, "id -1 in field 1"),
    (torch.tensor([[0, 0, 0]]), ValueError, r"expected \[B, 4\]"),
    (torch.tensor([[0.0, 0, 0, 0]]), TypeError, "expected integers"),
])
@pytest.mark.parametrize("spec", names())
def test_bad_ids_are_named(spec, ids, error, text):
    with pytest.raises(error, match=text):
        make(spec + trait(spec, "options"))(ids)


def test_bad_arguments_are_named():
    for call, text in [
        (lambda: ec.make("nope", 10, 4), "no method 'nope'"),
        (lambda: ec.make("ful", 10, 4), "did you mean 'full'"),
        (lambda: ec.make("robe(blok=4)", 10, 4), "robe has no option 'blok'; its options: length, block, sign"),
        (lambda: ec.make("robe(block=3)", 10, 4), "expected a divisor of the embedding dimension 4"),
        (lambda: ec.make("full|int9", 10, 4), "no wrapper int9; known wrappers: int8, int16"),
        (lambda: ec.make("full", 10, 4, 1.5), "expected a float fraction in"),
        (lambda: ec.make("full", 10, 4, 0), "expected a positive number of bytes"),
        (lambda: ec.make("full", [], 4), "expected a positive cardinality"),
        (lambda: ec.make("full", [3, 0], 4), "expected a positive cardinality"),
        (lambda: ec.make("full", 10, 0), "dim=0"),
        (lambda: ec.make("top_k", 10, 4), "pass counts="),
        (lambda: ec.make("top_k", 10, 4, counts=[1, 2]), r"expected \[10\]"),
        (lambda: ec.make("int_quant(bits=4)", 10, 4), "bits=4: expected 8 or 16"),
        (lambda: ec.make("int_quant|int8", 10, 4), "already quantised"),
        (lambda: ec.make("small_dim(width=9)", 10, 4), "width=9"),
        (lambda: ec.make("compo(init='x')", 10, 4), "expected 'matched' or 'paper'"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_a_wrapper_that_saves_nothing_is_refused():
    with pytest.raises(ec.SpecError, match=r"\|int8 saves nothing on deeplight"):
        ec.make("deeplight(kept=0)|int8", 10, 4)


def test_unreachable_says_why_and_what_is_closest():
    with pytest.raises(ec.Unreachable, match="full has one size: 2,400 bytes, over the budget of 1,200") as caught:
        ec.make("full", [100, 50], 4, 0.5)
    assert caught.value.closest == 2400


def test_a_budget_in_bytes_and_at_another_dimension():
    assert ec.memory(ec.make("hash_trick", [1000], 8, 3200)) == 3200
    # the dimension study: 10 % of the table at dimension 16 while the dimension is 32
    assert ec.memory(ec.make("hash_trick", [1000], 32, 0.1, base_dim=16)) == 0.1 * 1000 * 16 * 4


def test_solving_allocates_nothing_at_criteo_size():
    from ecstudy.data.cardinalities import FIELDS

    _, sizes = FIELDS["criteo"]
    sizes = [int(n) for n in sizes]

    class NoBig(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                assert out.numel() <= 100_000
            return out

    with NoBig():
        for name in names():
            solve(name, sizes, 16, full_bytes(sizes, 16))


@every_device
def test_holders_train_alike_under_sparse_and_dense_gradients(device):
    """FloatTable and the hashed blocks give torch's own dense gradient, so any optimiser works on a drop-in."""
    for spec in ("full", "robe(block=4)", "hash_trick", "compo"):
        sparse, dense = make(spec, device=device), make(spec, device=device)
        Optimizers(sparse)                                        # switches to sparse gradients
        ids = all_ids(device)[torch.randint(0, 300, (64,))]
        weight = torch.randn(64, 4, DIM, device=device)
        (sparse(ids) * weight).sum().backward()
        (dense(ids) * weight).sum().backward()
        for a, b in zip(sparse.holders(), dense.holders()):
            assert a.weight.grad.is_sparse and not b.weight.grad.is_sparse
            torch.testing.assert_close(a.weight.grad.to_dense(), b.weight.grad)


def test_full_matches_nn_embedding_under_torch_adam():
    emb = make("full", 40, 8)
    reference = torch.nn.Embedding.from_pretrained(emb.table.weight.detach().clone(), freeze=False)
    ids = torch.randint(0, 40, (10, 3))
    for module in (emb, reference):
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            module(ids).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(emb(ids), reference(ids))
    assert isinstance(emb.table, FloatTable)
