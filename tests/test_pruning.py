"""What ``mag_prune``, ``pep``, ``sseds`` and ``ham`` promise: values and columns that go, and how they are chosen."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import margin, write, zipf_ids

import ecstudy as ec
from ecstudy import models
from ecstudy.budget import build, full_bytes
from ecstudy.data.cardinalities import FIELDS
from ecstudy.methods import pep
from ecstudy.methods._columns import keep_columns, numbers
from ecstudy.methods._mixed import Mixed, cells, useful
from ecstudy.select import among, kth_of
from ecstudy.training import Optimizers, Run, Settings
from ecstudy.training.timeline import FakeRun

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
every_device = pytest.mark.parametrize("device", DEVICES)
SIZES = [60, 5, 700, 90]
FOUR = ["mag_prune", "pep", "sseds(batches=4)", "ham(ramp=0.5)"]


def batch(sizes=SIZES, rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (rows,), generator=generator) for size in sizes], 1)


def weights(method) -> torch.Tensor:
    return method.table.weight.detach()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The first field decides; of the third only even ids occur, few of them often."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(0, size, 4000) for size in SIZES], 1)
    ids[:, 2] = 2 * zipf_ids(rng, 350, 4000)
    return write(tmp_path_factory.mktemp("data") / "log", SIZES, ids, 2.5 * rng.normal(size=60)[ids[:, 0]])


@pytest.fixture(scope="module")
def few_ids_count(tmp_path_factory):
    """One field of 3,000 ids of which every twentieth matters and is frequent."""
    rng = np.random.default_rng(2)
    order = rng.permutation(3000)
    important, others = order[:150], order[150:]
    first = np.where(rng.random(12_000) < 0.6, rng.choice(important, 12_000), rng.choice(others, 12_000))
    effect = np.zeros(3000)
    effect[important] = 3 * rng.choice([-1, 1], 150)
    ids = np.stack([first, rng.integers(0, 10, 12_000)], 1)
    return write(tmp_path_factory.mktemp("few") / "data", [3000, 10], ids, effect[first])


@pytest.fixture(scope="module")
def one_field_counts(tmp_path_factory):
    """A small field decides, two large ones do not matter."""
    rng = np.random.default_rng(5)
    ids = np.stack([rng.integers(0, 150, 8000), zipf_ids(rng, 3000, 8000), zipf_ids(rng, 1000, 8000)], 1)
    return write(tmp_path_factory.mktemp("one") / "data", [150, 3000, 1000], ids, 2.5 * rng.normal(size=150)[ids[:, 0]])


def run_of(spec, log, budget=0.3, dim=8, **settings):
    torch.set_num_threads(1)
    emb = ec.make(spec, log.cardinalities, dim, budget)
    head = models.make("wdl", fields=len(log.cardinalities), dim=dim, dense=0, seed=0)
    return Run(emb, head, log, Settings(**dict(lr=0.01, max_epochs=1, evals_per_epoch=2) | settings))


# --- all four -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", ["mag_prune", "pep"])
def test_pruning_of_values_pays_where_few_ids_count(spec, few_ids_count):
    assert margin(spec, few_ids_count, 0.08, max_epochs=2) > 0.03


@pytest.mark.parametrize("spec", ["sseds", "ham"])
def test_pruning_of_columns_pays_where_one_field_counts(spec, one_field_counts):
    assert margin(spec, one_field_counts, 0.05, max_epochs=2) > 0.1


@pytest.mark.parametrize("spec", FOUR)
def test_a_trained_module_fits_its_budget_and_loads_again(spec, log, tmp_path):
    run = run_of(spec, log, 0.2)
    run.go()
    for state in ("trained", "deployed"):
        emb = run.emb.eval()
        loaded = ec.load(ec.save(emb, tmp_path / state)).eval()
        assert ec.memory(loaded) == ec.memory(emb)
        with torch.no_grad():
            assert torch.equal(loaded(batch()), emb(batch())) and emb(batch()).any()
        emb.deploy()
    assert ec.memory(emb) <= 0.2 * full_bytes(SIZES, 8)
    assert (emb.fitted == {}) == ("prune" in spec or spec == "pep")


def test_training_bytes():
    sizes = [int(n) for n in FIELDS["criteo"][1]]
    found = {spec: ec.weigh(spec, sizes, 16, 0.1)["training_pct"] for spec in
             ("mag_prune", "sseds", "ham", "pep", *(f"pep(granularity='{g}')" for g in pep.GRANULARITIES))}
    marks = 100 / 32 * (1 + 2 / 8)                       # a bit per value, and the counts beside each 64 of them
    expected = dict(mag_prune=300, sseds=300, ham=300, pep=600 + marks)
    expected |= {f"pep(granularity='{g}')": {"feature": 318.75, "feature_dim": 600}.get(g, 300) + marks
                 for g in pep.GRANULARITIES}
    assert found == pytest.approx(expected, abs=0.02)
    assert ec.weigh("sseds", sizes, 16, 0.0001)["reachable"] and ec.weigh("pep", sizes, 16, 0.0001)["reachable"]
    assert ec.weigh("sseds(least=1)", sizes, 16, 1e-9)["inference_pct"] == pytest.approx(6.25, abs=0.01)


def test_bad_options_are_named():
    for call, text in [
        ("mag_prune(kept=401)", "kept=401"), ("pep(granularity='id')", "granularity='id': expected one of global"),
        ("pep(s_init=1.0)", "s_init=1.0"), ("pep(epochs=0)", "epochs=0"), ("pep(decay=-1)", "decay=-1"),
        ("sseds(batches=0)", "batches=0"), ("sseds(per='x')", "per='x'"), ("sseds(least=9)", "least=9"),
        ("sseds(cells=7)", "cells=7: expected at least 8"), ("sseds(least=1, cells=60)", "cells=60: expected at least"),
        ("sseds(widths=[4])", r"widths=\[4\]: expected 2 widths"), ("sseds(widths=[9, 1])", r"widths=\[9, 1\]"),
        ("ham(orth=-1)", "orth=-1"), ("ham(ramp=0)", "ramp=0"), ("ham(every=0)", "every=0"),
    ]:
        with pytest.raises(ValueError, match=text):
            ec.make(call, [20, 30], 8)


def test_a_stage_may_end_by_a_rule_of_its_own(log):
    """No validation is asked, and nothing goes back."""
    run, asked = run_of("full", log, None), []
    run.evaluate = lambda batches: asked.append(batches)
    steps = 0
    for step in run.fit("some", until=lambda: steps == 7):
        run.execute(step)
        steps += 1
        last = weights(run.emb).clone()
    assert steps == run.steps == 7 and not asked and torch.equal(weights(run.emb), last)
    assert run.stage_seconds["some"] > 0 and run.training_bytes == 3 * full_bytes(SIZES, 8)


# --- choosing the largest -------------------------------------------------------------------------------------------

@every_device
@pytest.mark.parametrize("kept", [1, 7, 150, 299, 300])
def test_the_largest_over_several_blocks_are_exactly_as_many(kept, device):
    size = torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(kept)).float().to(device)   # many ties
    threshold, ties = kth_of(lambda: size.split(37), kept, device)
    parts = []
    for block in size.split(37):
        keep, ties = among(block, threshold, ties)
        parts.append(keep)
    expected = torch.zeros(300, dtype=torch.bool)
    expected[torch.argsort(size.cpu(), descending=True, stable=True)[:kept]] = True         # of equals the first
    assert torch.equal(torch.cat(parts).cpu(), expected) and ties == 0


# --- mag_prune ------------------------------------------------------------------------------------------------------

def test_mag_prune_keeps_the_largest_of_the_trained_table_and_tunes_only_these(log):
    run = run_of("mag_prune", log)
    emb, cut, tables, moved = run.emb, run.emb.cut, [], []
    emb.cut = lambda: (tables.append(weights(emb).clone()), cut(), tables.append(weights(emb).clone()))
    for step in emb.schedule(run):
        run.execute(step)
        if step.stage == "fine-tune":
            moved.append(weights(emb) != tables[1])
            assert not moved[-1][tables[1] == 0].any()
    trained, pruned = tables
    largest = torch.zeros(855 * 8).index_fill_(0, trained.view(-1).abs().topk(emb.kept).indices, 1).view(855, 8)
    assert torch.equal(pruned, trained * largest) and int(pruned.count_nonzero()) == emb.kept
    assert moved[-1].float().mean() > 0.1


def test_mag_prune_without_tuning_is_the_compressor_on_the_trained_table(log):
    run = run_of("mag_prune(tune=False)", log)
    full = run_of("full", log, None)
    full.emb.load_state_dict(run.emb.state_dict())
    run.go(), full.go()
    kept, ids = run.emb.kept, batch()
    compressed = ec.compress(weights(full.emb), "prune", kept=kept)
    ours = run.emb.deploy()
    flat = full.emb.fields.flat(ids)
    assert torch.equal(ours(ids), compressed(flat)) and ec.memory(ours) == ec.memory(compressed)


# --- pep ------------------------------------------------------------------------------------------------------------

def dense_thresholds(emb) -> torch.Tensor:
    """One threshold per value of the whole table, written out [n, D]."""
    delta, n, dim = emb.aux.threshold, emb.fields.n, emb.dim
    delta = delta.weight if hasattr(delta, "gather") and not isinstance(delta, torch.Tensor) else delta
    if emb.granularity.startswith("field"):
        delta = torch.cat([row.expand(size, -1) for row, size in zip(delta, emb.fields.sizes)])
    return torch.sigmoid(emb.aux.clock + delta.expand(n, dim))


def shaken(granularity, kept=None, sizes=SIZES, dim=8):
    """A table and thresholds about half of which are above the values."""
    emb = ec.make(f"pep(granularity='{granularity}')", sizes, dim, kept=kept)
    generator = torch.Generator().manual_seed(1)
    delta = emb.aux.threshold if isinstance(emb.aux.threshold, torch.nn.Parameter) else emb.aux.threshold.weight
    delta.data.copy_(0.3 * torch.randn(delta.shape, generator=generator))
    emb.aux.clock.fill_(math.log(emb.fields.bound() / 2))
    return emb


@every_device
@pytest.mark.parametrize("granularity", pep.GRANULARITIES)
def test_looked_up_rows_and_gradients_are_those_of_the_whole_table(granularity, device):
    emb = shaken(granularity).to(device)
    table, ids = emb.table.weight, batch().to(device)
    upstream = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(2)).to(device)
    names = [name for name, p in emb.named_parameters() if p.requires_grad]
    whole = table.sign() * (table.abs() - dense_thresholds(emb)).relu()
    expected = F.embedding(emb.fields.flat(ids), whole)
    parameters = [emb.get_parameter(name) for name in names]
    gradients = torch.autograd.grad((expected * upstream).sum(), parameters)
    found = emb(ids)
    torch.testing.assert_close(found, expected)
    assert 0.2 < (found == 0).float().mean() < 0.8
    for a, b in zip(torch.autograd.grad((found * upstream).sum(), parameters), gradients):
        torch.testing.assert_close(a, b)
    shape = {"global": 1, "dimension": 8, "field": 4, "field_dim": 32, "feature": 855, "feature_dim": 855 * 8}
    assert len(names) == 2 and min(p.numel() for p in parameters) == shape[granularity]
    kept = int((whole != 0).sum())
    assert emb.left() == kept
    shipped = emb.deploy().table                         # unfinished: what it looks up, the largest of it
    assert shipped.shape == (855, 8)
    torch.testing.assert_close(emb(ids), expected)


@every_device
@pytest.mark.parametrize("granularity", pep.GRANULARITIES)
def test_thresholds_rise_where_values_do_harm_and_fall_where_they_help(granularity, device):
    emb = ec.make(f"pep(granularity='{granularity}')", SIZES, 8).to(device).train()
    emb.aux.clock.fill_(-6.0)
    opt, ids = Optimizers(emb, lr=0.01), batch().to(device)
    for sign in (1, -1):                                 # a loss that grows with the size of values, one that falls
        before = dense_thresholds(emb).detach().clone()
        opt.zero_grad()
        (sign * emb(ids).abs().sum()).backward()
        if sign < 0:
            opt = Optimizers(emb, lr=0.01)               # without the momentum of the step before
        opt.step()
        moved = sign * (dense_thresholds(emb) - before)[emb.fields.flat(ids).unique()]
        assert (moved >= 0).all() and (moved > 0).float().mean() > 0.5


@every_device
@pytest.mark.parametrize("granularity", ["global", "field", "feature_dim"])
@pytest.mark.parametrize("kept", [0, 1, 1000, 855 * 8])
def test_the_mask_is_what_thresholds_would_prune_last(granularity, kept, device, monkeypatch):
    monkeypatch.setattr(pep, "BLOCK", 64)
    emb = shaken(granularity, kept).to(device)
    first = weights(ec.make("pep", SIZES, 8)).clone()
    ratio = (weights(emb).abs() / dense_thresholds(emb)).detach().cpu().view(-1)
    expected = torch.zeros(855 * 8, dtype=torch.bool)
    expected[ratio.argsort(descending=True, stable=True)[:kept]] = True
    emb.table.weight.data.mul_(3)                        # trained since: the ratio's order is that of before
    emb.mark()
    found = emb.aux.mask.get(torch.arange(855 * 8, device=device)).bool().cpu()
    assert torch.equal(found, expected) and int(found.sum()) == kept
    emb.begin_again()                                    # bit for bit where it began
    assert torch.equal(weights(emb).cpu(), first * expected.view(855, 8))
    ids = batch().to(device)
    assert torch.equal(emb(ids), F.embedding(emb.fields.flat(ids), weights(emb)))


def test_the_clock_begins_where_the_steps_allow():
    emb = ec.make("pep", [4_000_000], 2)                 # initial range 1 / 2000
    assert emb.begin(140_000, 0.001) == 0.001 and float(emb.aux.clock) == pytest.approx(-140)      # as published
    pace = emb.begin(100, 0.001)                         # too few: from a tenth of the initial range, faster
    assert float(torch.sigmoid(emb.aux.clock)) == pytest.approx(1 / 20_000, rel=1e-3)
    assert pace * 100 == pytest.approx(-float(emb.aux.clock), rel=1e-5) and pace > 0.09
    given = ec.make("pep(s_init=-11.0)", [4_000_000], 2)
    assert given.begin(100, 0.001) == 0.001 and float(given.aux.clock) == -11


def test_decay_is_that_of_rows_looked_up_each_once():
    emb = ec.make("pep(decay=0.5)", SIZES, 8)
    Optimizers(emb)
    ids = batch(rows=10).repeat(3, 1)                    # every row several times
    emb(ids)
    emb.penalty().backward()
    row, gradient = emb.table.touched()
    assert torch.equal(row, emb.fields.flat(ids).unique())
    torch.testing.assert_close(gradient, 0.5 * emb.table.read(row))


def test_the_search_ends_at_the_wanted_density_and_training_begins_again(log):
    run = run_of("pep", log, 0.1, batch=32)
    emb, first = run.emb, weights(run.emb).clone()
    head = {name: tensor.clone() for name, tensor in run.head.state_dict().items()}
    clocks, retrained = [], 0
    for step in emb.schedule(run):
        if step.stage == "search":
            clocks.append(float(emb.aux.clock))
        elif not retrained:
            mask = emb.aux.mask.get(torch.arange(855 * 8)).view(855, 8)
            assert int(mask.sum()) == emb.kept and torch.equal(weights(emb), first * mask)
            assert all(torch.equal(tensor, head[name]) for name, tensor in run.head.state_dict().items())
            retrained += 1
        else:
            retrained += 1
            assert not weights(emb)[mask == 0].any()
        run.execute(step)
    assert np.allclose(np.diff(clocks), np.diff(clocks)[0], rtol=1e-3) and clocks[1] > clocks[0]
    assert 20 < len(clocks) < run.steps_per_epoch        # not at its end, a whole epoch: when few enough were left
    assert retrained and int(weights(emb).count_nonzero()) <= emb.kept
    held = mask.sum(1)
    decides, rest = held[:60].float().mean(), held[65:].float().mean()
    assert decides > 3 * rest                            # the field that matters keeps more
    never = held[65:765][1::2]                           # ids that no batch touched go like others, and first
    assert never.float().mean() < 0.1 * 8


def test_a_search_too_short_is_cut_where_it_ends():
    emb, run = ec.make("pep(s_init=-30.0)", SIZES, 8, 0.1), FakeRun(steps=5)
    assert [step.stage for step in emb.schedule(run)] == ["search"] * 5 + ["retrain"] * 5
    assert emb.left() == int(weights(emb).count_nonzero()) == emb.kept > 0


# --- rows of no width -----------------------------------------------------------------------------------------------

@every_device
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("widths", [[0, 8, 3, 0], [0, 8, 0, 8], [0, 0, 0, 0], [2, 0, 2, 1]])
def test_fields_of_width_zero_give_zeros_and_cost_nothing(widths, bits, device):
    mixed, ids = Mixed(SIZES, 8, widths, bound=1.0).to(device), batch().to(device)
    found = mixed.lookup(mixed.encode(ids))
    assert [bool(column.any()) for column in found.unbind(1)] == [w > 0 for w in widths]
    for f, w in enumerate(widths):
        if w:
            own = F.embedding(ids[:, f], mixed.rows(f))
            torch.testing.assert_close(found[:, f], own if w == 8 else own @ mixed.lift(f))
    if any(widths):
        found.square().sum().backward()
    mixed.pack()
    rows = sum(cells(n, w, 8) for n, w in zip(SIZES, widths))
    assert sum(p.numel() for p in mixed.parameters()) == rows + 8 - max(widths)
    if bits:
        mixed.array, mixed.matrix_array = mixed.array.quantised(bits), mixed.matrix_array.quantised(bits)
    with torch.no_grad():
        torch.testing.assert_close(mixed.lookup(mixed.encode(ids)), found.detach(), atol=0.1 if bits else 1e-6, rtol=0)


# --- sseds, ham: which columns --------------------------------------------------------------------------------------

def naive(scores, sizes, dim, limit, least, per):
    """The same choice, everything counted anew for each column."""
    value = scores / torch.tensor(sizes)[:, None] if per == "parameter" else scores
    kept = [set(row.sort(descending=True, stable=True).indices[:least].tolist()) for row in scores]
    for place in value.T.reshape(-1).sort(descending=True, stable=True).indices.tolist():
        column, field = place // len(sizes), place % len(sizes)
        more = [k | {column} if f == field else k for f, k in enumerate(kept)]
        if numbers(sizes, [len(k) for k in more], dim) <= limit:
            kept = more
    widths = useful(sizes, [len(k) for k in kept], dim)
    return torch.tensor([[w == dim or j in k for j in range(dim)] for w, k in zip(widths, kept)])


@pytest.mark.parametrize("per", ["dimension", "parameter"])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_columns_are_taken_by_score_while_they_fit(per, least):
    generator = torch.Generator().manual_seed(0)
    for draw in range(12):
        sizes = torch.randint(1, 400, (6,), generator=generator).tolist()
        scores = torch.rand(6, 8, generator=generator).double().round(decimals=1)        # with ties
        floor, whole = numbers(sizes, [least] * 6, 8), 8 * sum(sizes)
        for limit in (floor, floor + 50, (floor + whole) // 2, whole):
            keep = keep_columns(scores, sizes, 8, limit, least, per)
            assert torch.equal(keep, naive(scores, sizes, 8, limit, least, per))
            assert numbers(sizes, keep.sum(1).tolist(), 8) <= limit and int(keep.sum(1).min()) >= least
        assert keep.all()


def test_a_column_of_a_small_field_is_cheap():
    """By score the large field's columns come first, by score per number the small field's."""
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6]])
    by_score, by_number = (keep_columns(scores, [100, 1000], 4, 1500, 0, per) for per in ("dimension", "parameter"))
    assert by_score.int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]                       # a second one does not fit
    assert by_number.int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    by_score, by_number = (keep_columns(scores, [100, 1000], 4, 1110, 0, per) for per in ("dimension", "parameter"))
    assert by_score.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]] or by_score.sum(1).tolist() == [0, 1]
    assert by_number.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


@every_device
@pytest.mark.parametrize("spec", ["sseds", "ham"])
def test_going_on_from_the_kept_columns_changes_nothing_but_what_is_pruned(spec, device):
    emb = ec.make(spec, SIZES, 8, 0.35).to(device)
    score = emb.aux.saliency if spec == "sseds" else emb.aux.alpha
    score.data.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(4)))
    score.data[2], score.data[3] = torch.arange(8) / 8 + 0.2, -1.0
    keep = keep_columns(score, SIZES, 8, emb.cells, 0, "dimension").to(device)
    widths = keep.sum(1).tolist()
    assert 0 in widths and 8 in widths and any(0 < w < 8 for w in widths)
    ids = batch().to(device)
    expected = F.embedding(emb.fields.flat(ids), weights(emb)) * keep
    emb.choose(reset=False)
    torch.testing.assert_close(emb(ids), expected, atol=1e-7, rtol=1e-5)
    assert emb.fitted == {"widths": widths} and "aux" not in dict(emb.named_modules())
    torch.testing.assert_close(emb.deploy()(ids), expected, atol=1e-7, rtol=1e-5)
    assert ec.memory(emb) == 4 * numbers(SIZES, widths, 8) <= 0.35 * full_bytes(SIZES, 8)
    assert emb.allocation().tolist() == [w for w, n in zip(widths, SIZES) for _ in range(n)]


@pytest.mark.parametrize("spec", ["sseds", "ham", "sseds(least=1)", "sseds|int8", "ham|int8"])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.2, 0.1, 0.02, 0.005])
def test_what_scores_lead_to_fits_the_budget_and_loads_again(spec, budget, tmp_path):
    try:
        emb = ec.make(spec, SIZES, 8, budget)
    except ec.Unreachable as error:
        assert error.closest > budget * full_bytes(SIZES, 8) and (budget == 0.005 or "least" in spec and budget < 0.2)
        return
    inner = getattr(emb, "inner", emb)
    score = inner.aux.saliency if "sseds" in spec else inner.aux.alpha
    score.data.copy_(torch.rand(4, 8, generator=torch.Generator().manual_seed(int(1000 * budget))))
    emb.deploy()
    assert ec.memory(emb) <= budget * full_bytes(SIZES, 8)
    loaded = ec.load(ec.save(emb, tmp_path / "a"))
    assert loaded.deployed and torch.equal(loaded(batch()), emb(batch())) and ec.memory(loaded) == ec.memory(emb)
    again = build(spec, SIZES, 8, knob=emb.config["knob"], device="meta", **emb.fitted)
    assert ec.memory(again.deploy()) == ec.memory(emb)


@pytest.mark.parametrize("spec", ["sseds(batches=10)", "sseds(batches=10, per='parameter')", "ham", "ham(orth=0)"])
def test_the_field_that_decides_keeps_its_columns(spec, log):
    run = run_of(spec, log, 0.15, batch=64)
    for step in run.emb.schedule(run):
        if step.stage == "retrain":
            break
        run.execute(step)
    widths = run.emb.mixed.widths                # the large field would take all there is with a column and a half
    assert widths[0] == 8 and widths[2] == 0 and run.emb.fitted["widths"] == list(widths)


# --- sseds ----------------------------------------------------------------------------------------------------------

def test_saliency_is_the_mean_size_of_the_masks_gradient_and_moves_nothing(log):
    run = run_of("sseds(batches=5, reset=False)", log, 0.3, batch=100)
    emb, seen, draw = run.emb, [], run.batch
    run.batch = lambda split: seen.append((split, draw(split))) or seen[-1][1]
    schedule, before, expected = emb.schedule(run), None, torch.zeros(4, 8)
    for step in schedule:
        if step.stage == "saliency" and before is None:
            before = weights(emb).clone(), {name: t.clone() for name, t in run.head.state_dict().items()}
            seen.clear()
        if step.stage == "retrain":
            break
        run.execute(step)
        saliency = emb.aux.saliency.clone()
    assert [split for split, _ in seen] == ["valid"] * 5
    assert all(torch.equal(t, before[1][name]) for name, t in run.head.state_dict().items())
    for _, (ids, dense, label) in seen:
        rows = F.embedding(emb.fields.flat(ids), before[0]).requires_grad_()
        loss = F.binary_cross_entropy_with_logits(run.head(rows, dense, ids), label)
        gradient = torch.autograd.grad(loss, rows)[0]
        expected += (rows * gradient).detach().sum(0).abs() / 5              # the chain rule through e = v * mask
    torch.testing.assert_close(saliency, expected, atol=1e-7, rtol=1e-3)
    assert expected.min() > 0
    for field, width in enumerate(emb.mixed.widths):     # and the kept columns are those of the trained table
        own = before[0][emb.fields.offset[field]:][:SIZES[field]]
        assert {tuple(c) for c in emb.mixed.rows(field).T.tolist()} <= {tuple(c) for c in own.T.tolist()}
        assert emb.mixed.rows(field).shape == (SIZES[field], width)


def test_the_first_stage_is_that_of_all_methods():
    for spec, label in (("sseds", "full"), ("mag_prune", "full"), ("ham(orth=0)", "full"),
                        ("ham(orth=0.2)", "ham(orth=0.2) pretrain")):
        emb, run = ec.make(spec, SIZES, 8, 0.3), FakeRun()
        steps = list(emb.schedule(run))
        assert run.stages[0]["shared"] == label and steps
        assert all(stage["shared"] is None for stage in run.stages[1:])


# --- ham ------------------------------------------------------------------------------------------------------------

@every_device
def test_the_penalty_is_the_mean_squared_cosine_of_columns(device):
    emb, ids = ec.make("ham(orth=0.7)", SIZES, 8).to(device).train(), batch(rows=40).to(device)
    ids[30:] = ids[:10].clone()                          # rows that come twice count once
    emb(ids)
    means = []
    for field, first in enumerate(emb.fields.offset.tolist()):
        if SIZES[field] < 8:                             # five rows have no eight orthogonal columns
            continue
        table = weights(emb)[first + ids[:, field].unique()].double().cpu()
        cosines = [float(F.cosine_similarity(table[:, i], table[:, j], dim=0)) ** 2
                   for i in range(8) for j in range(8) if i != j]
        means.append(np.mean(cosines))
    assert len(means) == 3 and emb.penalty().item() == pytest.approx(0.7 * np.mean(means), rel=1e-4)


def test_the_penalty_sets_columns_apart():
    emb = ec.make("ham(orth=1.0)", [40, 50], 8).train()
    with torch.no_grad():
        weights(emb).copy_(torch.randn(90, 1) + 0.3 * torch.randn(90, 8))
    opt, ids, seen = Optimizers(emb, lr=0.05), batch([40, 50], 100), []
    for _ in range(40):
        opt.zero_grad()
        emb(ids)
        loss = emb.penalty()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    assert seen[0] > 0.5 and seen[-1] < 0.2 * seen[0]


def test_masks_are_hard_and_hand_their_gradient_to_the_scores():
    emb, ids, upstream = ec.make("ham", SIZES, 8, 0.3).train(), batch(), torch.randn(64, 4, 8)
    emb.aux.alpha.data.copy_(torch.rand(4, 8))
    emb.switch(emb.cells)
    on = emb.aux.mask.bool()
    assert torch.equal(on, keep_columns(emb.aux.alpha, SIZES, 8, emb.cells, 0, "dimension")) and 0 < int(on.sum()) < 32
    emb.aux.alpha.requires_grad_(True)
    out = emb(ids)
    rows = F.embedding(emb.fields.flat(ids), weights(emb))
    assert torch.equal(out, rows * on)                   # nothing between 0 and 1
    slope = torch.autograd.grad((out * upstream).sum(), [emb.aux.alpha, emb.table.weight])
    before = emb.aux.alpha.detach().clone()
    emb.move(slope)
    torch.testing.assert_close(emb.aux.alpha.detach(), before - slope[0])
    torch.testing.assert_close(slope[0], (rows * upstream).sum(0))           # of columns that are off, too
    assert bool((slope[0][~on] != 0).all())
    touched = torch.zeros(855, 8).index_put_((emb.fields.flat(ids),), upstream * on, accumulate=True)
    torch.testing.assert_close(slope[1], touched)


def test_numbers_allowed_fall_to_the_limit_and_only_then_may_the_search_end(log):
    run = run_of("ham(ramp=0.5, every=2)", log, 0.2, batch=32)
    emb, on, ready = run.emb, [], []
    fit = run.fit

    def watched(stage, **options):
        if stage == "search":
            ready.append(options["ready"])
        return fit(stage, **options)

    run.fit = watched
    for step in emb.schedule(run):
        run.execute(step)
        if ready and emb.mixed is None and callable(step.update):
            on.append((numbers(SIZES, emb.aux.mask.sum(1).int().tolist(), 8), ready[0]()))
    ramp = round(0.5 * run.steps_per_epoch)
    assert len(on) > ramp
    for t, (used, may_end) in enumerate(on, 1):          # what is on after step t was allowed at the last even one
        last = t - 1 if t - 1 == ramp else (t - 1) // 2 * 2
        assert used <= (emb.allowed(last, ramp) if last else 855 * 8) and may_end == (last >= ramp)
    assert on[0][0] == 855 * 8 and on[-1][0] <= emb.cells and len({used for used, _ in on}) > 5
    whole = 855 * 8
    assert emb.allowed(0, 100) == whole and emb.allowed(100, 100) == emb.allowed(500, 100) == emb.cells
    assert emb.allowed(50, 100) == pytest.approx((whole * emb.cells) ** 0.5, abs=1)


def test_scores_move_on_validation_rows_and_weights_on_training_rows():
    emb, run = ec.make("ham", SIZES, 8, 0.3), FakeRun()
    steps = [(s.stage, s.split, callable(s.update), s.penalty is not None) for s in emb.schedule(run)]
    assert steps[:4] == [("pretrain", "train", False, True)] * 4
    assert steps[4:20] == [("search", "train", False, False), ("", "valid", True, False)] * 8       # a ramp of 8
    assert steps[20:] == [("retrain", "train", False, False)] * 4
