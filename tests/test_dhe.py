"""What ``dhe`` promises: exact hash codes, and batched networks equal to plain ones with their normalisations."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from planted import margin, write, zipf_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ecstudy as ec
from ecstudy.budget import build, full_bytes, solve
from ecstudy.data.cardinalities import FIELDS
from ecstudy.fields import Fields
from ecstudy.methods._networks import mish_, runs
from ecstudy.methods.dhe import BUCKETS, Dhe, cells, primes
from ecstudy.tables import IntTable

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = [700, 30, 400, 4, 900]                       # three networks, two plain fields


def small(seed=0, device="cpu", **options):
    return ec.make("dhe", SIZES, 4, seed=seed, device=device, **dict(width=5, hashes=64) | options)


def batch(rows=200, seed=0):
    """Ids that repeat, differently often in every field."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([zipf_ids(rng, size, rows, 0.3 * f) for f, size in enumerate(SIZES)], 1))


# --- codes ------------------------------------------------------------------------------------------------------------

def test_the_primes_are_the_primes():
    found = primes()
    assert found[0] == 1_000_003 and found[-1] < 2 ** 20 and len(found) == 3527           # 82,025 - 78,498
    assert all(p % q for p in found[::50].tolist() for q in range(2, 1025))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_are_those_of_python_integers(device):
    emb = ec.make("dhe(width=1, hashes=3526)", 1_000_000, 16, seed=5, device=device)
    emb.hash[0, -1], emb.hash[1, -1] = BUCKETS - 1, BUCKETS - 1                            # the largest there is
    emb.hash[0, -2], emb.hash[1, -2] = 1, 1
    a, b, p = (part.tolist() for part in emb.hash)
    rows = [0, 1, 2, 2_147, 2_148, 999_999, 33_762_576, 2 ** 30, 2 ** 31 - 2, 2 ** 31 - 1]
    rows += np.random.default_rng(0).integers(2 ** 31 - 10 ** 6, 2 ** 31, 40).tolist()
    expected = [[(a[j] * x + b[j]) % p[j] % BUCKETS for j in range(3526)] for x in rows]
    found = emb.hashed(torch.tensor(rows, device=device))
    assert torch.equal(found.cpu().long(), torch.tensor(expected))
    u = emb.inputs(torch.tensor(rows, device=device)).cpu().double()
    torch.testing.assert_close(u, torch.tensor(expected).double() * 2 / (BUCKETS - 1) - 1, atol=2e-7, rtol=0)


def test_codes_near_the_edges_of_the_remainder_are_exact():
    """Where the remainder is 0 or p - 1 a rounding would show: such ids are solved for, for every function."""
    emb = ec.make("dhe(width=1, hashes=1024)", 1_000_000, 16, seed=1)
    a, b, p = emb.hash.tolist()
    for wanted in (0, -1, BUCKETS - 1, BUCKETS):
        rows = []
        for j in range(1024):
            x = (wanted - b[j]) * pow(a[j], -1, p[j]) % p[j]
            rows.append(x + (2 ** 31 - 1 - x) // p[j] * p[j])                              # the largest such id
        found = emb.hashed(torch.tensor(rows)).diagonal()
        expected = [wanted % p[j] % BUCKETS for j in range(1024)]
        assert found.long().tolist() == expected


def test_every_hash_function_is_uniform():
    """Chi-square of every function over bins, for random ids: of 256 statistics none is beyond chance."""
    emb = ec.make("dhe(width=1, hashes=256)", 1_000_000, 16, seed=2)
    rows, bins = 20_000, 50
    codes = emb.hashed(torch.from_numpy(np.random.default_rng(1).integers(0, 2 ** 31, rows))).long()
    share = torch.full((256, bins), BUCKETS / bins, dtype=torch.float64)
    # values below p - 10^6 come twice
    share += (emb.hash[2][:, None] - BUCKETS - torch.arange(bins) * (BUCKETS // bins)).clamp(0, BUCKETS // bins)
    expected = rows * share / emb.hash[2][:, None]
    seen = torch.stack([torch.bincount(column * bins // BUCKETS, minlength=bins) for column in codes.T])
    statistic = ((seen - expected) ** 2 / expected).sum(1)
    assert statistic.max() < 105                     # of 49 degrees of freedom, 105 has probability 6e-6
    assert abs(float(statistic.mean()) - 49) < 3
    # two functions are independent: so is the pair of their bins
    pairs = torch.bincount(codes[:, 0] * 7 // BUCKETS * 7 + codes[:, 1] * 7 // BUCKETS, minlength=49)
    assert ((pairs - rows / 49) ** 2 / (rows / 49)).sum() < 110


def test_no_two_ids_share_a_code_and_normal_codes_are_normal():
    emb = ec.make("dhe(width=1, hashes=64, transform='normal')", 50_000, 16, seed=0)
    x = emb.inputs(torch.arange(50_000))
    assert len(torch.unique(emb.hashed(torch.arange(50_000))[:, :2], dim=0)) == 50_000
    assert torch.isfinite(x).all()
    assert x.mean().abs() < 0.02 and (x.var() - 1).abs() < 0.02 and (x ** 4).mean().sub(3).abs() < 0.2


def test_an_id_has_the_same_code_at_every_size():
    """Codes depend on the row of the full table, not on which fields have a network."""
    a, b = small(), ec.make("dhe(width=15, hashes=64)", SIZES, 4, seed=0)
    b.hash.copy_(a.hash)
    assert len(a.start) == 3 and len(b.start) == 2
    ids = torch.arange(4)[:, None].expand(4, 5)
    found = []
    for emb in (a, b):
        rows, _ = emb.distinct_rows(emb.encode(ids)[1])
        found.append(set(rows.tolist()))
    assert found[1] < found[0] == {*range(4), *range(730, 734), *range(1134, 1138)}


# --- networks ---------------------------------------------------------------------------------------------------------

class Plain(nn.Module):
    """The same function with torch's own layers: one network per field, on all occurrences."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        self.nets = nn.ModuleDict()
        source = emb.networks
        for number, field in enumerate(emb.deep.tolist()):
            layers = []
            for layer, weight in enumerate(source.weights):
                linear = nn.Linear(weight.shape[2], weight.shape[1], bias=layer == 5)
                linear.weight.data = weight.detach()[number].clone()
                layers.append(linear)
                if layer == 5:
                    linear.bias.data = source.bias.detach()[number, 0].clone()
                    continue
                norm = nn.BatchNorm1d(weight.shape[1])
                norm.weight.data = source.scale.detach()[layer, number, 0].clone()
                norm.bias.data = source.shift.detach()[layer, number, 0].clone()
                layers += [norm, nn.Mish()]
            self.nets[str(field)] = nn.Sequential(*layers)
        self.table = nn.Embedding.from_pretrained(emb.table.weight.detach().clone(), freeze=False)

    def forward(self, ids):
        out, first = [None] * ids.shape[1], 0
        a, b, p = self.emb.hash.double()
        for field in self.emb.plain.tolist():
            out[field], first = self.table(ids[:, field] + first), first + self.emb.fields.sizes[field]
        for field, net in self.nets.items():
            x = ids[:, int(field), None] + self.emb.fields.offset[int(field)]
            code = (self.emb.hash[0].long() * x + self.emb.hash[1]) % self.emb.hash[2] % BUCKETS
            out[int(field)] = net((2 * code.double() / (BUCKETS - 1) - 1).float())
        return torch.stack(out, 1)


def test_batched_networks_equal_plain_ones_in_training_and_evaluation():
    emb = small()
    with torch.no_grad():                            # nothing is at its neutral value
        for parameter in (emb.networks.scale, emb.networks.shift, emb.networks.bias):
            parameter.add_(torch.randn_like(parameter) / 3)
        emb.networks.weights[-1].mul_(10)
    plain = Plain(emb)
    assert sorted(plain.nets) == ["0", "2", "4"]
    for step in range(3):
        ids, pull = batch(seed=step), torch.randn(200, 5, 4)
        ours, theirs = emb.train()(ids), plain.train()(ids)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    source = emb.networks
    for number, field in enumerate(emb.deep.tolist()):
        net = plain.nets[str(field)]
        linear, norm = net[::3], net[1::3]
        for layer in range(6):
            expected = linear[layer].weight.grad
            torch.testing.assert_close(source.weights[layer].grad[number], expected, rtol=1e-3,
                                       atol=2e-4 * float(expected.abs().max()))
        for layer in range(5):
            pairs = [(source.scale.grad[layer, number, 0], norm[layer].weight.grad),
                     (source.shift.grad[layer, number, 0], norm[layer].bias.grad),
                     (source.mean[layer, number, 0], norm[layer].running_mean),
                     (source.var[layer, number, 0], norm[layer].running_var)]
            for got, expected in pairs:
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))
        torch.testing.assert_close(source.bias.grad[number, 0], net[-1].bias.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(emb.table.weight.grad, plain.table.weight.grad)
    everything = torch.stack([torch.arange(900) % size for size in SIZES], 1)
    expected = plain.eval()(everything)
    torch.testing.assert_close(emb.eval()(everything), expected, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(emb.deploy()(everything), expected, atol=2e-5, rtol=2e-4)
    assert not emb.dense_parameters() and not any("mean" in name for name in emb.state_dict())


def test_grouping_fields_and_blocks_of_ids_changes_nothing(monkeypatch):
    emb, ids = small().eval(), batch()
    together = emb(ids)
    module = sys.modules[Dhe.__module__]
    monkeypatch.setattr(module, "runs", lambda count, slack: runs(count, 0))               # every field apart
    torch.testing.assert_close(emb(ids), together)
    monkeypatch.setattr(module, "runs", lambda count, slack: runs(count, 10 ** 9))         # all fields in one product
    torch.testing.assert_close(emb(ids), together)
    apart = torch.cat([emb(part) for part in ids.split(7)])
    torch.testing.assert_close(apart, together)


def test_runs_waste_no_more_than_allowed():
    rng = np.random.default_rng(0)
    for slack in (0, 3, 50, 10 ** 6):
        count = sorted(rng.integers(1, 100, 20).tolist(), reverse=True)
        found = runs(count, slack)
        assert [first for first, *_ in found] + [20] == [0] + [last for _, last, _ in found]
        for first, last, width in found:
            part = count[first:last]
            assert width == max(part) and (last - first) * width - sum(part) <= slack
    assert runs([5, 5, 5], 0) == [(0, 3, 5)] and runs([3, 9], 6) == [(0, 2, 9)] and runs([], 4) == []


def test_mish_in_place_is_mish():
    z = torch.cat([torch.linspace(-40, 40, 20_001), torch.tensor([-1e30, 1e30, 0, 100.0, -100.0])])
    torch.testing.assert_close(mish_(z.clone()), torch.nn.functional.mish(z), atol=1e-6, rtol=1e-6)


def test_tiny_batches_train_without_nan():
    emb = small().train()
    for rows in (0, 1, 2):
        out = emb(batch(rows=2)[:rows])
        out.sum().backward()
        assert out.shape == (rows, 5, 4) and torch.isfinite(out).all()
    assert all(torch.isfinite(t.float()).all() for t in emb.state_dict().values())
    assert all(torch.isfinite(p.grad).all() for p in emb.parameters())
    before = emb.networks.mean.clone()
    emb(batch(rows=2)[:0])
    assert torch.equal(emb.networks.mean, before)


def test_embeddings_start_at_the_scale_of_full_and_signal_survives():
    emb = ec.make("dhe(width=40)", [20_000, 300], 16).train()
    x = emb(torch.stack([torch.arange(512), torch.arange(512) % 300], 1))
    target = Fields([20_000]).bound() / 3 ** 0.5
    assert x[:, 0].std().item() == pytest.approx(target, rel=0.25)
    assert x[:, 1].std().item() == pytest.approx(target, rel=0.1)
    # the published start, at the published size: each layer's signal sinks below the epsilon of its normalisation
    paper = ec.make("dhe(width=40, init='paper')", [10_131_227, 300], 16).train()
    y = paper(torch.stack([torch.arange(512), torch.arange(512) % 300], 1))
    assert y[:, 0].std() < Fields([10_131_227]).bound() / 100


@pytest.mark.parametrize("device", DEVICES)
def test_integer_networks_serve(device):
    emb = small(device=device).eval()
    ids = batch().to(device)
    emb(ids)
    before = emb(ids).detach()
    eight = ec.make("dhe(width=5, hashes=64)|int8", SIZES, 4, seed=0, device=device).deploy()
    assert all(isinstance(holder, IntTable) for holder in eight.holders())
    assert (eight(ids) - before).abs().max() < 0.03 * before.abs().max()
    assert ec.memory(eight) < 0.5 * ec.memory(emb.deploy())


# --- size -------------------------------------------------------------------------------------------------------------

def test_deployed_bytes_are_the_networks_the_constants_and_the_plain_rows():
    emb = small().deploy()
    assert len(emb.start) == 3
    assert ec.memory(emb) == 4 * (3 * cells(5, 64, 4) + 3 * 64 + 34 * 4)
    # the study counts ten numbers of normalisation per unit, five of them are folded here
    for h in (3626, 1372, 271, 29):
        assert 1025 * h + 4 * h * (h + 1) + 17 * h + 10 * h == cells(h, 1024, 16) + 10 * h + h - 16


def test_widths_and_compressed_fields_at_criteo_are_about_those_of_the_study():
    """The study's widths, with 4, 5, 8 and 14 fields compressed."""
    sizes = [int(n) for n in FIELDS["criteo"][1]]
    full = full_bytes(sizes, 16)
    for budget, width, fields in ((0.5, 3626, 4), (0.1, 1372, 5), (0.01, 271, 8), (0.001, 29, 14)):
        found = solve("dhe", sizes, 16, int(full * budget))
        emb = build("dhe", sizes, 16, knob=found.knob, device="meta")
        assert width <= found.knob <= width + 2 and len(emb.start) == fields
        assert 0.96 * full * budget < found.inference <= full * budget
        network = 4 * emb.networks.number * cells(found.knob, 1024, 16)
        assert 3 * found.inference * 0.95 < found.training < 3 * found.inference + 0.02 * network + 60_000


def test_fields_left_plain_are_those_whose_network_is_not_smaller():
    sizes = [20, cells(3, 64, 8) // 8, cells(3, 64, 8) // 8 + 1, 5000]
    emb = ec.make("dhe(width=3, hashes=64)", sizes, 8)
    assert sorted(emb.deep.tolist()) == [2, 3] and sorted(emb.plain.tolist()) == [0, 1]
    everything = ec.make("dhe(width=100)", [50, 20], 8)
    assert everything.networks is None and everything(torch.tensor([[49, 19]])).shape == (1, 2, 8)
    assert ec.memory(everything) == 70 * 8 * 4
    options = Dhe.sizes(Fields(sizes), 8, hashes=64)
    assert cells(options[-1], 64, 8) < 5000 * 8 <= cells(options[-1] + 1, 64, 8)


def test_bad_options_are_named():
    for text, message in (("width=0", "width=0: expected"), ("hashes=7", "hashes=7: expected an even number"),
                          ("hashes=4000", "2 to 3527"), ("transform='x'", "transform='x': expected 'uniform'"),
                          ("init='x'", "init='x': expected 'matched'")):
        with pytest.raises(ValueError, match=message):
            ec.make(f"dhe({text})", 5000, 8)


# --- data on which it pays --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, exponent, spec, budget, dim, least", [
    (2000, 0.0, "dhe(hashes=256)", 0.05, 32, 0.2),           # every id counts and rows are wide: a network is shared
    (4000, 1.0, "dhe", 0.1, 32, 0.04),                       # few ids are frequent, but hashing confuses them
])
def test_dhe_pays_where_ids_must_not_be_confused(size, exponent, spec, budget, dim, least, tmp_path):
    """Each id has an effect of its own: a network can tell all ids apart, shared rows cannot."""
    rng = np.random.default_rng(6)
    ids = np.stack([zipf_ids(rng, size, 30_000, exponent), rng.integers(0, 10, 30_000)], 1)
    data = write(tmp_path / "data", [size, 10], ids, 3.0 * rng.choice([-1, 1], size)[ids[:, 0]])
    assert margin(spec, data, budget, dim) > least


def test_the_products_to_be_timed_are_those_of_the_lookup():
    """As many multiplications as the distinct ids need, no padding."""
    emb, ids = small().deploy(), batch()
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                seen.append(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
            return function(*args, **(kwargs or {}))

    with Count():
        emb.products(ids)()
    distinct = sum(len(torch.unique(ids[:, field])) for field in (0, 2, 4))
    assert len(seen) == 18 and sum(seen) == distinct * (64 * 5 + 4 * 5 * 5 + 5 * 4)
