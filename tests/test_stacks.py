"""Wrappers after a method, and ``split`` into two methods: what is stored, looked up and refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import margin, write

import ecstudy as ec
from ecstudy.budget import build, full_bytes
from ecstudy.data.cardinalities import FIELDS
from ecstudy.fields import Fields
from ecstudy.memory import memory
from ecstudy.methods.split import plan
from ecstudy.sparse import SparseTable
from ecstudy.tables import FloatArray, FloatTable, HalfTable
from ecstudy.training import Optimizers

SIZES = [50, 20, 8, 300]
N = sum(SIZES)
COUNTS = np.random.default_rng(0).integers(0, 40, N)


def all_ids(sizes=SIZES):
    rows = torch.arange(max(sizes))
    return torch.stack([rows % size for size in sizes], 1)


# --- wrappers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form, share", [("int16", 2 + 2 / 16), ("int8", 1 + 2 / 16), ("int4", 0.5 + 4 / 16),
                                         ("int2", 0.25 + 4 / 16), ("fp16", 2), ("bf16", 2)])
def test_what_a_wrapped_table_weighs(form, share):
    emb = ec.make(f"full|{form}", SIZES, 16)
    training = memory(emb)
    assert training == full_bytes(SIZES, 16)                                  # it trains as it is
    spare = 7 if form in ("int4", "int2") else 0                              # the last word read ends behind the table
    assert memory(emb.deploy()) == share * N * 16 + spare


@pytest.mark.parametrize("to", [16, 8, 4, 2, torch.float16, torch.bfloat16])
def test_every_holder_of_floats_takes_every_form(to):
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    half = HalfTable(40, 16)
    half.put(0, weight)
    for holder in (FloatTable(40, 16, 0.5), FloatArray(640, 0.5), SparseTable.of(weight, 300), half):
        small = holder.quantised(to)
        assert type(holder) is HalfTable or memory(small) < memory(holder)
        index = torch.arange(holder.shape[0])
        a, b = holder.gather(index), small.gather(index)
        error = float((a - b).detach().norm() / a.detach().norm())
        assert error < {2: 0.5, 4: 0.1, 8: 0.01}.get(to, 0.005), type(holder)
        if isinstance(holder, FloatArray):
            start = torch.arange(600)
            assert torch.equal(small.blocks(start, 16), b[start[:, None] + torch.arange(16)])


@pytest.mark.parametrize("spec, text", [
    ("small_dim(width=1)|int4", r"\|int4 saves nothing on small_dim"), ("fp16|bf16", r"\|bf16 saves nothing on fp16"),
    ("full|int8|int4", "already quantised"), ("full|int4|fp16", "already quantised"), ("full|int3", "no wrapper int3"),
    ("post4bits|int8", "already quantised"), ("full|int4(bits=2)", "no wrapper")])
def test_what_saves_nothing_or_cannot_be_is_refused(spec, text):
    with pytest.raises(ec.SpecError, match=text):
        ec.make(spec, 100, 16)


def test_halves_may_be_quantised_once_more():
    emb = ec.make("full|fp16|int4", SIZES, 16).deploy()
    assert memory(emb) == N * 12 + 7
    assert memory(ec.make("fp16|int8", SIZES, 16).deploy()) == N * 18


def test_wrapped_vectors_of_a_matrix_are_those_of_the_method_for_it():
    matrix = torch.randn(70, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ec.compress(matrix, "full|int4")(torch.arange(70)),
                       ec.compress(matrix, "post4bits")(torch.arange(70)))
    assert torch.equal(ec.compress(matrix, "full|bf16")(torch.arange(70)), matrix.bfloat16().float())


# --- split ------------------------------------------------------------------------------------------------------------

def members(emb):
    """Head and tail ids of every field, by hand: the most frequent ones, ties to the lower id."""
    found, first = [], 0
    for size, own in zip(emb.fields.sizes, emb.own):
        order = np.argsort(-COUNTS[first:first + size], kind="stable")
        found.append((sorted(order[:own].tolist()), sorted(order[own:].tolist())))
        first += size
    return found


@pytest.mark.parametrize("options", ["", "(part=0.2)", "(tail='compo')", "(head='full', tail='full|int4')",
                                     "(head='full|int8', tail='robe(block=4)')", "(head='fp16', tail='tt_rec')"])
def test_an_id_is_looked_up_in_the_part_it_belongs_to(options):
    emb = ec.make(f"split{options}", SIZES, 16, 0.2 if "int8" in options else 0.6, counts=COUNTS).eval()
    for _ in range(2):                                            # as trained, then as deployed
        out = emb(all_ids())
        left = [f for f in range(4) if members(emb)[f][1]]
        assert left and 0 < sum(emb.own) < N
        for f, (head, tail) in enumerate(members(emb)):
            assert len(head) == min(SIZES[f], max(emb.own))
            for part, mine, column in ((emb.head, head, f), (emb.tail, tail, left.index(f) if tail else 0)):
                for rank, i in enumerate(mine):
                    local = torch.zeros(1, len(part.fields), dtype=torch.int64)
                    local[0, column] = rank
                    torch.testing.assert_close(out[i, f], part(local)[0, column])
        emb.deploy()


def test_only_the_part_an_id_belongs_to_is_moved():
    emb = ec.make("split", SIZES, 16, 0.4, counts=COUNTS).train()
    opt = Optimizers(emb, lr=0.1)
    head, tail = members(emb)[3]
    local = torch.tensor([[0, 0, 0, head[3]], [0, 0, 0, tail[5]], [0, 0, 0, head[7]]])
    before = [h.weight.detach().clone() for h in emb.holders()]
    opt.zero_grad()
    emb(local)[:, 3].square().sum().backward()
    opt.step()
    moved = [(h.weight.detach() != b).any(1).nonzero().view(-1).tolist() for h, b in zip(emb.holders(), before)]
    start = sum(emb.own[:3])
    assert moved[0] == [start + 3, start + 7]
    assert moved[1] == [int(emb.tail.encode(torch.tensor([[0] * (len(emb.tail.fields) - 1) + [5]]))[0, -1])]


def test_adapt_emb_is_a_split_of_the_same_ids():
    """One field: own rows for the same ids, and the others share the same rows."""
    counts = np.random.default_rng(1).permutation(100)
    adapt = ec.make("adapt_emb(rows=20)", [100], 8, counts=counts)
    head = memory(build("full", [10], 8)) + memory(adapt.map)
    split = ec.make("split", [100], 8, size=head + 10 * 32, part=head / (head + 10 * 32) + 1e-9, counts=counts)
    assert split.own == [10] and split.tail.table.shape == (10, 8) and memory(split) == memory(adapt)
    ids = torch.arange(100)[:, None]
    vectors = [emb(ids)[:, 0] for emb in (adapt, split)]
    classes = [(v[:, None] == v[None]).all(2) for v in vectors]
    assert torch.equal(*classes) and not classes[0].all()


@pytest.mark.parametrize("options", ["", "(part=0.8)", "(tail='compo')", "(tail='robe')", "(tail='full|int4')",
                                     "(tail='full|int2', head='full|int8')", "(tail='tt_rec')", "(tail='mgqe')"])
def test_bytes_never_fall_along_the_sizes_and_keep_to_the_knob(options):
    from ecstudy.registry import get
    from ecstudy.spec import parse

    spec, sizes = f"split{options}", [5000, 30, 700, 3]
    values = get("split").sizes(Fields(sizes), 16, **parse(spec).options)
    probe = sorted({round(i * (len(values) - 1) / 25) for i in range(26)} | set(range(min(8, len(values)))))
    weights = []
    for i in probe:
        emb = build(spec, sizes, 16, knob=values[i], device="meta").deploy()
        weights.append(memory(emb))
        assert weights[-1] <= values[i]
        head = memory(emb.head) + memory(emb.map)
        if "int" not in options and max(emb.own) > 1:
            assert head <= parse(spec).options.get("part", 0.5) * values[i]
    assert weights == sorted(weights) and weights[-1] > 2 * weights[0]


@pytest.mark.parametrize("budget", [0.5, 0.1, 0.01])
def test_budgets_of_the_study_are_met_at_full_size(budget):
    row = ec.weigh("split", [int(n) for n in FIELDS["criteo"][1]], 16, budget)
    assert row["reachable"] and 0.9999 < row["inference_pct"] / (100 * budget) <= 1
    assert row["training_pct"] < 3 * 100 * budget


def test_trained_vectors_are_split_by_their_norm(tmp_path):
    scale = np.random.default_rng(0).permutation(np.geomspace(0.1, 10, 200)).astype(np.float32)
    matrix = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.from_numpy(scale)[:, None]
    norms = matrix.double().norm(dim=1)
    np.save(tmp_path / "x.npy", matrix.numpy())
    for tail in ("full|int2", "int4(bits=2, scale=\"row\")", "int_quant(bits=8)", "svd"):
        spec = f"split(head='full', tail='{tail}', by='norm')"
        emb = ec.compress(matrix, spec, 0.6)
        own = emb.own[0]
        head = norms.argsort(descending=True)[:own].sort().values
        assert 0 < own < 200 and memory(emb) <= 0.6 * 200 * 64
        out = emb(torch.arange(200))
        assert torch.equal(out[head], matrix[head])
        rest = torch.ones(200, dtype=torch.bool)
        rest[head] = False
        knob = emb.tail.knob and "(" not in tail and "|" not in tail
        alone = ec.compress(matrix[rest], tail, **({emb.tail.knob: getattr(emb.tail, emb.tail.knob)} if knob else {}))
        torch.testing.assert_close(out[rest], alone(torch.arange(200 - own)))
        assert torch.equal(ec.compress(tmp_path / "x.npy", spec, 0.6)(torch.arange(200)), out)
        loaded = ec.load(ec.save(emb, tmp_path / "a"))
        assert torch.equal(loaded(torch.arange(200)), out) and memory(loaded) == memory(emb)


def test_split_by_counts_takes_trained_vectors_too():
    matrix = torch.randn(N, 16, generator=torch.Generator().manual_seed(0))
    emb = ec.make("split", SIZES, 16, 0.5, counts=COUNTS)
    emb.fit(matrix)
    out, first = emb.deploy()(all_ids()), 0
    for f, (head, _) in enumerate(members(emb)):
        assert torch.equal(out[head, f], matrix[first:first + SIZES[f]][head])
        first += SIZES[f]


def test_split_names_what_it_cannot_do():
    for options, text in (("by='x'", "by='x': expected 'count'"), ("part=1", "part=1: expected"),
                          ("size=10", "size=10: expected at least"), ("tail='nope'", "no method 'nope'"),
                          ("head='full|int9'", "no wrapper int9"), ("tail='int_quant|int8'", "already quantised")):
        with pytest.raises(ValueError, match=text):
            ec.make(f"split({options})", SIZES, 16, counts=COUNTS)
    with pytest.raises(ValueError, match="pass counts="):
        ec.make("split", SIZES, 16)
    for options, text in (("tail='deeplight'", "deeplight does not train in one plain stage"),
                          ("tail='svd'", "svd does not train"), ("by='norm'", "use ecstudy.compress")):
        emb = ec.make(f"split({options})", SIZES, 16, 0.6, counts=COUNTS)
        with pytest.raises(TypeError, match=text):
            next(emb.schedule(None))
    with pytest.raises(TypeError, match="compo learns by training"):
        ec.compress(torch.randn(100, 16), "split(tail='compo', by='norm')", 0.6)


def test_plans_are_kept():
    plan.cache_clear()
    for _ in range(2):
        build("split", SIZES, 16, knob=9000, device="meta")
    assert plan.cache_info().hits == 1


def test_split_pays_where_few_ids_are_frequent(tmp_path):
    rng = np.random.default_rng(2)
    order = rng.permutation(6000)
    first = np.where(rng.random(20_000) < 0.6, rng.choice(order[:300], 20_000), rng.choice(order[300:], 20_000))
    effect = np.zeros(6000)
    effect[order[:300]] = 3 * rng.choice([-1, 1], 300)
    data = write(tmp_path / "data", [6000, 10], np.stack([first, rng.integers(0, 10, 20_000)], 1), effect[first])
    assert margin("split", data, 0.15, max_epochs=3) > 0.03
