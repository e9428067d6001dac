"""Prediction heads against loops and formulas written out by hand."""
import copy
import math

import pytest
import torch

from ecstudy import models

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CRITEO, AVAZU = dict(fields=26, dim=16, dense=13), dict(fields=22, dim=16, dense=0)
EVERY = [*((name, {}) for name in models.names()), ("wdl", {"wide": "ids"})]


def batch(fields, dim, dense, rows=5, device="cpu", seed=1):
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(rows, fields, dim, generator=g), torch.randn(rows, dense, generator=g)
    return x.to(device), z.to(device), torch.randint(0, 10**9, (rows, fields), generator=g).to(device)


def noisy(head):
    """Give every bias a value, so that a forgotten one shows."""
    with torch.no_grad():
        for p in head.parameters():
            if p.dim() == 1 or p.shape[1] == 1:
                p.normal_(generator=torch.Generator().manual_seed(3))
    return head


def dense_layers(sequence, h, last_relu):
    linears = [m for m in sequence if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(linears):
        h = h @ layer.weight.T + layer.bias
        if i + 1 < len(linears) or last_relu:
            h = h.clamp(min=0)
    return h


def size(*widths):
    return sum((a + 1) * b for a, b in zip(widths, widths[1:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [0, 3])
def test_dlrm_is_pairwise_dots(device, dense):
    head = noisy(models.make("dlrm", fields=4, dim=6, dense=dense, seed=0)).to(device)
    x, z, _ = batch(4, 6, dense, device=device)
    vectors, start = list(x.unbind(1)), []
    if dense:
        bottom = dense_layers(head.bottom, z, last_relu=True)
        assert (bottom >= 0).all()
        vectors, start = [bottom, *vectors], [bottom]
    dots = [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i in range(len(vectors)) for j in range(i)]
    want = dense_layers(head.top, torch.cat(start + dots, 1), last_relu=False)[:, 0]
    torch.testing.assert_close(head(x, z), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [0, 3])
def test_wdl_on_embeddings(device, dense):
    head = noisy(models.make("wdl", fields=4, dim=6, dense=dense, seed=0)).to(device)
    x, z, _ = batch(4, 6, dense, device=device)
    u = torch.cat([x.reshape(5, -1), z], 1)
    want = dense_layers(head.deep, u, False)[:, 0] + u @ head.wide.weight[0]
    torch.testing.assert_close(head(x, z), want)
    assert not head.needs_ids and head.wide.bias is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [0, 3])
def test_wdl_on_ids(device, dense):
    head = noisy(models.make("wdl", fields=4, dim=6, dense=dense, seed=0, wide="ids", wide_size=1000)).to(device)
    x, z, ids = batch(4, 6, dense, device=device)
    ids[0] = 7                                            # the same id in every field
    want = dense_layers(head.deep, torch.cat([x.reshape(5, -1), z], 1), False)[:, 0]
    a, b = head.wide_ids.a.tolist(), head.wide_ids.b.tolist()
    wide = [sum(head.wide_ids.weight[((a[f] * i + b[f]) % 2**64 >> 32) * 1000 >> 32, 0] for f, i in enumerate(row))
            for row in ids.tolist()]
    want = want + torch.stack(wide) + (z @ head.wide.weight[0] if dense else 0)
    torch.testing.assert_close(head(x, z, ids), want)
    torch.testing.assert_close(head(x, z, ids.int()), head(x, z, ids))
    assert len(head.wide_ids.slots(ids)[0].unique()) > 1   # the field is part of the hash


@pytest.mark.parametrize("device", DEVICES)
def test_wide_gradient_is_sparse(device):
    head = models.make("wdl", fields=3, dim=2, dense=1, seed=0, wide="ids").to(device)
    x, z, ids = batch(3, 2, 1, device=device)
    head(x, z, ids).sum().backward()
    weight = head.wide_ids.weight
    assert weight.shape == (2**18, 1) and weight.grad.is_sparse and weight.grad._nnz() == 15
    assert [n for n, p in head.named_parameters() if getattr(p, "sparse_grad", False)] == ["wide_ids.weight"]
    assert copy.deepcopy(head).wide_ids.weight.sparse_grad
    slots, add = head.wide_ids.slots(ids).flatten(), torch.zeros(2**18, device=device)
    torch.testing.assert_close(weight.grad.to_dense()[:, 0], add.index_add(0, slots, torch.ones(15, device=device)))


def test_hash_collides_as_chance():
    part = models.make("wdl", fields=2, dim=1, dense=0, seed=0, wide="ids", wide_size=1000).wide_ids
    ids = torch.arange(20_000).unsqueeze(1).expand(-1, 2) * 4096          # a regular stride hurts a bad hash
    slots = part.slots(ids)
    assert slots.min() >= 0 and slots.max() < 1000
    same_slot = (slots[:, 0] == slots[:, 1]).double().mean().item()
    assert same_slot < 0.01                                                # 1/1000 by chance: fields are independent
    for field in range(2):
        load = slots[:, field].bincount(minlength=1000).double()           # 20 each
        assert load.max() < 100 and (load == 0).double().mean() < 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [0, 3])
def test_dcn_crosses(device, dense):
    head = noisy(models.make("dcn", fields=4, dim=6, dense=dense, seed=0)).to(device)
    x, z, _ = batch(4, 6, dense, device=device)
    rows = []
    for u in torch.cat([x.reshape(5, -1), z], 1):
        v = u
        for weight, bias in zip(head.cross, head.cross_bias):
            v = u * torch.dot(v, weight.weight[0]) + v + bias
        rows.append(torch.cat([v, dense_layers(head.deep, u[None], False)[0]]))
    want = torch.stack(rows) @ head.out.weight[0] + head.out.bias
    torch.testing.assert_close(head(x, z), want, rtol=1e-4, atol=1e-4)
    assert len(head.cross) == 3


@pytest.mark.parametrize("name, shape, inputs, parameters", [
    ("dlrm", CRITEO, 367, size(13, 512, 256, 64, 16) + size(367, 512, 256, 1)),
    ("dlrm", AVAZU, 231, size(231, 512, 256, 1)),
    ("wdl", CRITEO, 429, size(429, 256, 256, 1) + 429),
    ("wdl", AVAZU, 352, size(352, 256, 256, 1) + 352),
    ("dcn", CRITEO, 429, 3 * 2 * 429 + size(429, 256, 256, 256) + 429 + 256 + 1),
    ("dcn", AVAZU, 352, 3 * 2 * 352 + size(352, 256, 256, 256) + 352 + 256 + 1),
])
def test_sizes_of_the_paper(name, shape, inputs, parameters):
    head = models.make(name, **shape, seed=0)
    assert (head.top if name == "dlrm" else head.deep)[0].in_features == inputs
    assert sum(p.numel() for p in head.parameters()) == parameters
    if name == "dlrm":
        assert len(head.pairs) == {26: 351, 22: 231}[shape["fields"]]


@pytest.mark.parametrize("name", models.names())
def test_init_is_xavier_normal_with_zero_bias(name):
    head = models.make(name, **CRITEO, seed=0)
    for label, p in head.named_parameters():
        if p.dim() == 1:
            assert not p.any(), label
        elif p.numel() > 20_000:
            want = math.sqrt(2 / sum(p.shape))
            assert p.std().item() == pytest.approx(want, rel=0.03) and abs(p.mean().item()) < 0.03 * want, label
            assert (p.abs() > 1.9 * want).any()                            # uniform would end at 1.73 std


@pytest.mark.parametrize("name, options", EVERY)
def test_seed_alone_decides(name, options):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = models.make(name, **CRITEO, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    b, c = (models.make(name, **CRITEO, seed=s, **options) for s in (1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(a.state_dict().values(), c.state_dict().values(), strict=True))
    unseeded = models.make(name, **CRITEO, **options)                     # the global state, as ordinary modules
    assert not torch.equal(next(unseeded.parameters()), next(models.make(name, **CRITEO, **options).parameters()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", models.names())
def test_rows_are_independent_and_gradients_reach_all(name, device):
    for shape in (CRITEO, AVAZU):
        head = noisy(models.make(name, **shape, seed=0)).to(device)
        x, z, ids = batch(**shape, rows=7, device=device)
        x.requires_grad_()
        logits = head(x, z, ids)
        assert logits.shape == (7,)
        torch.testing.assert_close(head(x[2:4], z[2:4], ids[2:4]), logits[2:4], rtol=1e-4, atol=1e-4)
        if not shape["dense"]:
            torch.testing.assert_close(head(x), logits)
        logits.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        assert x.grad.flatten(1).any(1).all()


def test_a_file_adds_a_model(tmp_path, monkeypatch):
    source = ("from ecstudy.models.layers import Head\n"
              "class Mean(Head):\n"
              "    def logits(self, x, z, ids):\n"
              "        return x.mean((1, 2))\n")
    (tmp_path / "mean_for_test.py").write_text(source)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    assert "mean_for_test" in models.names()
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(models.make("mean_for_test", fields=3, dim=4, dense=0)(x), x.mean((1, 2)))


def test_names():
    assert models.names() == ["dcn", "dlrm", "wdl"]


@pytest.mark.parametrize("call, message", [
    (lambda: models.make("deepfm", **CRITEO), "unknown model 'deepfm', expected one of dcn, dlrm, wdl"),
    (lambda: models.make("layers", **CRITEO), "unknown model 'layers'"),
    (lambda: models.make("dlrm", **CRITEO, width=3), "dlrm has no option 'width', expected one of: none"),
    (lambda: models.make("wdl", **CRITEO, width=3), "no option 'width', expected one of: wide, wide_size"),
    (lambda: models.make("wdl", **CRITEO, wide="onehot"), "wide='onehot', expected 'embeddings' or 'ids'"),
    (lambda: models.make("wdl", **CRITEO, wide="ids", wide_size=0), "wide_size=0"),
    (lambda: models.make("dlrm", fields=1, dim=4, dense=0), "use wdl or dcn"),
    (lambda: models.make("dcn", fields=0, dim=4, dense=0), "fields=0, expected at least 1"),
    (lambda: models.make("dcn", fields=3, dim=4, dense=2)(torch.zeros(5, 4, 3), torch.zeros(5, 2)), r"\[batch, 3, 4\]"),
    (lambda: models.make("dcn", fields=3, dim=4, dense=2)(torch.zeros(5, 3, 4)), r"expected \[5, 2\]"),
    (lambda: models.make("wdl", fields=3, dim=4, dense=0, wide="ids")(torch.zeros(5, 3, 4)), "got none, expected"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, options", EVERY)
def test_half_precision_autocast(name, options, device):
    head = models.make(name, **CRITEO, seed=0, **options).to(device)
    x, z, ids = batch(**CRITEO, device=device)
    x.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        low = head(x * 0.1, z, ids)
    low.float().sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(low.float(), head(x * 0.1, z, ids), rtol=0.1, atol=0.1)
