"""alpt: two looks at every batch, scales that learn, rows rounded without bias; against references written out here."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import margin, write

import ecstudy as ec
from ecstudy import models
from ecstudy.data.cardinalities import FIELDS
from ecstudy.methods.alpt import SMALLEST, RoundToScale
from ecstudy.training import Optimizers, RowAdam, Run, Settings
from ecstudy.training.timeline import FakeRun, example

ROWS = 30_000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1,500 ids, each with an effect of its own; a third of them ten times as frequent and six times as strong."""
    rng = np.random.default_rng(5)
    often = np.arange(1500) % 3 == 0
    p = np.where(often, 10.0, 1.0)
    ids = np.stack([rng.choice(1500, ROWS, p=p / p.sum()), rng.integers(0, 10, ROWS)], 1)
    effect = rng.normal(size=1500) * np.where(often, 3.0, 0.5)
    return write(tmp_path_factory.mktemp("alpt") / "data", [1500, 10], ids, effect[ids[:, 0]])


def run_on(data, spec="alpt", **options):
    emb = ec.make(spec, data.cardinalities, 8, None, seed=0)
    head = models.make("wdl", fields=2, dim=8, dense=0, seed=0)
    return Run(emb, head, data, Settings(**(dict(lr=0.01, batch=256, max_epochs=1) | options)))


# --- sizes and schedule -----------------------------------------------------------------------------------------------

def test_memory_is_the_papers():
    for bits, deployed, training in ((8, 31.25, 243.75), (16, 56.25, 268.75)):
        for dataset in ("criteo", "avazu", "company"):
            row = ec.weigh(f"alpt(bits={bits})", [int(n) for n in FIELDS[dataset][1]], 16, None)
            assert (row["inference_pct"], row["training_pct"]) == (deployed, training)
    assert ec.weigh("alpt", [1000], 16, 0.5)["knob"] == 8 and ec.weigh("alpt", [1000], 16, 0.6)["knob"] == 16
    assert not ec.weigh("alpt", [1000], 16, 0.3)["reachable"]


def test_every_batch_is_looked_at_twice():
    emb, run = example("alpt"), FakeRun()
    steps = list(emb.schedule(run))
    assert [(step.again, callable(step.update)) for step in steps] == [(False, False), (True, True)] * 4
    assert {step.split for step in steps} == {"train"} and not emb.table.holding


# --- the gradient of a scale ------------------------------------------------------------------------------------------

def test_gradient_of_a_scale_is_the_published_rule():
    torch.manual_seed(0)
    w, scale = torch.randn(50, 8) * 0.3, torch.rand(50, 1) * 0.01 + 0.001
    scale.requires_grad_()
    upstream = torch.randn(50, 8)
    out = RoundToScale.apply(w, scale, -128, 127)
    (out * upstream).sum().backward()
    v = (w / scale).detach()
    slope = torch.where(v <= -128, -128.0, torch.where(v >= 127, 127.0, v.round() - v))
    assert (v >= 127).any() and (v <= -128).any() and (v.abs() < 100).any()
    torch.testing.assert_close(scale.grad, (upstream * slope).sum(1, keepdim=True))
    torch.testing.assert_close(out, v.round().clamp(-128, 127) * scale.detach())


def test_gradient_of_a_scale_agrees_with_finite_differences():
    """Outside the range of the function itself; inside, of the function whose rounding passes straight through."""
    torch.manual_seed(1)
    w, scale, h = torch.randn(40, 1, dtype=torch.float64), torch.full((40, 1), 0.013, dtype=torch.float64), 1e-7
    outside = ((w / scale).abs() > 129)
    error = (w / scale).round() - w / scale                       # what rounding adds, held fixed

    def value(s):
        return torch.where(outside, RoundToScale.apply(w, s, -128, 127), (w / s + error) * s)

    numeric = (value(scale + h) - value(scale - h)) / (2 * h)
    scale.requires_grad_()
    RoundToScale.apply(w, scale, -128, 127).sum().backward()
    assert outside.any() and not outside.all()
    torch.testing.assert_close(scale.grad, numeric, rtol=1e-5, atol=1e-5)


# --- the step against a reference -------------------------------------------------------------------------------------

def test_a_step_is_what_the_page_says(data):
    """Every step of an epoch: (a) head and float32 rows by Adam, codes and scales at rest; (b) the scales of the
    batch's rows by an Adam of their own along autograd's gradient, the head at rest; (c) codes next to w / scale."""
    run = run_on(data, "alpt(scale_lr=0.0003)", max_epochs=0.3)
    emb, table, head, inner = run.emb, run.emb.table, run.head, run.execute
    scales = torch.nn.Parameter(table.scale.clone())
    theirs, count = torch.optim.SparseAdam([scales], lr=0.0003), {False: 0, True: 0}

    def reference():
        rows, w = table.held
        ids, dense, label = run._last
        s = table.scale[rows].requires_grad_()
        v = (w / s).clamp(-128, 127)
        x = ((v + (v.round() - v).detach()) * s)[torch.searchsorted(rows, emb.fields.flat(ids))]
        loss = F.binary_cross_entropy_with_logits(head(x, dense, ids), label)
        grad = torch.autograd.grad(loss, s)[0] / (len(ids) * 8 * 127) ** 0.5
        scales.grad = torch.sparse_coo_tensor(rows[None], grad, scales.shape,
                                              check_invariants=False)
        theirs.step()
        return rows, w

    def execute(step):
        before = [p.detach().clone() for p in head.parameters()]
        codes, scale = table.codes.clone(), table.scale.clone()
        expected = reference() if step.again else None
        inner(step)
        moved = [not torch.equal(a, b) for a, b in zip(before, head.parameters())]
        count[step.again] += 1
        if not step.again:
            assert any(moved) and torch.equal(codes, table.codes) and torch.equal(scale, table.scale)
            rows, w = table.held
            assert torch.equal(rows, emb.fields.flat(run._last[0]).unique())
            assert 0 < (w - table.read(rows)).abs().max() < 0.1              # Adam's move, not rounded
            return
        assert not any(moved) and table.held is None
        torch.testing.assert_close(table.scale, scales.detach(), rtol=1e-3, atol=1e-6)
        rows, w = expected
        assert ((table.codes[rows].float() - (w / table.scale[rows]).clamp(-128, 127)).abs() < 1.001).all()
        rest = torch.ones(len(codes), dtype=torch.bool)
        rest[rows] = False
        assert torch.equal(codes[rest], table.codes[rest]) and torch.equal(scale[rest], table.scale[rest])

    run.execute = execute
    run.go()
    assert count[False] == count[True] == run.steps > 25
    assert table.scale.min() < 0.009 and table.scale.max() > 0.011           # scales went both ways


def test_rows_are_rounded_without_bias_and_element_by_element():
    emb = ec.make("alpt", 2000, 16, None)
    w, rows = torch.full((2000, 16), 0.0132), torch.arange(2000)
    torch.manual_seed(0)
    emb.table.holding, emb.batch = True, 128
    emb.table.write(rows, w)
    emb.move_scales([torch.zeros(2000, 1)])
    assert (emb.table.scale == 0.01).all() and set(emb.table.codes.unique().tolist()) == {1, 2}
    assert (emb.table.read(rows).mean() - 0.0132).abs() < 4.5 * 0.01 * (0.32 * 0.68 / 32_000) ** 0.5
    correlation = torch.corrcoef(emb.table.codes.float().T)
    assert (correlation - torch.eye(16)).abs().max() < 0.12


def test_a_scale_stays_positive():
    emb = ec.make("alpt(scale_lr=1.0)", 5, 4, None)
    emb.table.holding, emb.batch = True, 1
    for gradient in (1.0, 1.0, -1.0):
        emb.table.write(torch.tensor([1, 3]), torch.ones(2, 4))
        emb.move_scales([torch.full((2, 1), gradient)])
        assert (emb.table.scale >= SMALLEST * 0.999).all() and torch.isfinite(emb.table.read(torch.arange(5))).all()
    assert emb.table.scale[[0, 2, 4]].eq(0.01).all()


def test_a_loop_of_your_own_rounds_at_once_and_keeps_the_scales(data):
    emb = ec.make("alpt", [30, 10], 8, None)
    optimizer, codes = Optimizers(emb, lr=0.02), emb.table.codes.clone()
    emb.train()(torch.tensor([[3, 4], [3, 5]])).sum().backward()
    optimizer.step()
    assert set((codes != emb.table.codes).any(1).nonzero().view(-1).tolist()) == {3, 34, 35}
    assert emb.table.scale.eq(torch.tensor(0.01)).all() and emb.table.held is None
    assert isinstance(optimizer.rows, RowAdam) and not emb.aux.first.any()


# --- options and compression ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, scale, scale_lr", [(8, 0.01, 2e-5), (16, 0.01 / 256, 2e-5 / 256)])
def test_defaults_are_the_published_ones_at_8_bits(bits, scale, scale_lr):
    emb = ec.make(f"alpt(bits={bits})", 500, 16, None)
    assert emb.table.scale.eq(torch.tensor(scale)).all() and emb.scale_lr == scale_lr
    expected = ec.make("full", 500, 16).table.weight.std()
    rounding = (scale ** 2 / 6) ** 0.5                            # rounding adds noise of at most this
    assert expected * 0.9 < emb.table.read(torch.arange(500)).std() < (expected ** 2 + rounding ** 2) ** 0.5 * 1.1


@pytest.mark.parametrize("spec, text", [("alpt(bits=4)", "bits=4: expected 8 or 16"), ("alpt(scale=0)", "scale=0"),
                                        ("alpt(scale_lr=-1)", "scale_lr=-1.0: expected a number above"),
                                        ("alpt|int8", "already quantised")])
def test_bad_options_are_named(spec, text):
    with pytest.raises(ValueError, match=text):
        ec.make(spec, 10, 4)


def test_a_scale_per_row_fits_rows_of_very_different_magnitude():
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    rows *= 10.0 ** torch.linspace(-4, 1, 300)[:, None]
    error = {}
    for spec in ("alpt", "int_quant"):
        small = ec.compress(rows, f"{spec}(bits=8)")
        error[spec] = ((small(torch.arange(300)) - rows).norm(dim=1) / rows.norm(dim=1)).median()
    assert error["alpt"] < 0.01 and error["int_quant"] > 0.2      # under one scale, small rows vanish
    small = ec.compress(rows, "alpt")
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((small(torch.arange(300)) - rows).abs() <= step * 0.501).all()


def test_a_row_and_a_scale_for_every_id_pay_where_every_id_counts(data):
    assert margin("alpt", data, 0.5, max_epochs=3) > 0.03
