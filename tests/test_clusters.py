"""Codes and clusters (``light_rec``, ``cel``, ``cce``): pointers at their bits, splits, moves, sums of codewords."""
from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import margin, trained, write, zipf_ids

import ecstudy as ec
from ecstudy.budget import build
from ecstudy.data.cardinalities import FIELDS
from ecstudy.methods import _pointed
from ecstudy.methods import cel as cel_module
from ecstudy.methods.robe import PRIME
from ecstudy.packed import Bitstream
from ecstudy.training import Optimizers
from ecstudy.training.timeline import FakeRun

SIZES, DIM = [500, 20, 203], 8
CRITEO = [int(n) for n in FIELDS["criteo"][1]]
METHODS = ["cce", "cce(chunks=1)", "cel(splits=2)", "light_rec(codewords=16)"]
every_method = pytest.mark.parametrize("spec", METHODS)


def batch(rows=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in SIZES], 1)


def everyone():
    return torch.stack([torch.arange(500) % n for n in SIZES], 1)


def planted_rows(n: int, kinds: int, noise: float = 0.0, dim: int = DIM, seed: int = 0):
    """``n`` rows of ``kinds`` vectors: (rows, kind [n])."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(n)[torch.randperm(n, generator=generator)] % kinds
    rows = torch.randn(kinds, dim, generator=generator)[kind]
    return rows + noise * torch.randn(n, dim, generator=generator), kind


# --- pointers at their bits -------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2 ** 31))
def test_codes_stand_end_to_end(bits, parts, eights, seed):
    """Against the same bits in one long Python integer."""
    rng = np.random.default_rng(seed)
    rows, size = 8 * eights, 8 * eights - int(rng.integers(0, 8))
    codes = rng.integers(0, 2 ** bits, (rows, parts))
    codes[size:] = 0                                              # past the last row: zero
    stream = Bitstream(rows, parts, bits)
    for start in rng.permutation(range(0, rows, 8)).tolist():     # in any order, one not touching the other
        stream.write(start, torch.from_numpy(codes[start:min(start + 8, size)]))
    number = int.from_bytes(bytes(stream.bytes[:-7].tolist()), "little")
    flat = [number >> i * bits & (1 << bits) - 1 for i in range(rows * parts)]
    assert flat == codes.ravel().tolist()
    row = torch.from_numpy(rng.integers(0, rows, (3, 4)))
    assert torch.equal(stream.read(row), torch.from_numpy(codes)[row])
    assert ec.memory(stream) == rows * parts * bits // 8 + 7


def test_impossible_streams_are_refused():
    for rows, parts, bits in ((9, 1, 4), (8, 0, 4), (8, 1, 0), (8, 1, 33)):
        with pytest.raises(ValueError, match="multiple of 8 rows, 1 to 32 bits"):
            Bitstream(rows, parts, bits)


@every_method
def test_deployment_reads_what_training_looked_up(spec):
    emb = ec.make(spec, SIZES, DIM, 0.5, seed=1).train()
    optimizer = Optimizers(emb, lr=0.02)
    for seed in range(3):
        optimizer.zero_grad()
        (emb(batch(40, seed)) * torch.randn(40, 3, DIM)).sum().backward()        # most ids are never seen
        optimizer.step()
    if spec.startswith("cce"):
        emb.cluster(optimizer.rows)
    if spec.startswith("cel"):
        emb.least = 0
        assert emb.regroup(optimizer.rows) > 0
    knob, ids = emb.config["knob"], everyone()
    before = emb.eval()(ids).detach()
    assert torch.equal(emb.deploy()(ids), before)
    meta = build(spec, SIZES, DIM, knob=knob, device="meta").deploy()
    assert ec.memory(meta) == ec.memory(emb) and "aux" not in dict(emb.named_modules())


def test_what_ships_is_weighed_to_the_bit():
    emb = ec.make("cce", SIZES, DIM, rows=50).deploy()            # 20 ids stay whole; 203 ids have no more than 50 rows
    sizes = {name: tensor.numel() for name, tensor in emb.state_dict().items()}
    assert sizes == {"pointers.bytes": (504 + 208) * 4 * 6 // 8 + 7, "second": 8, "table.weight": 20 * 8,
                     "tables.weight": 2 * (50 + 50) * 8}
    emb = ec.make("cel", SIZES, DIM, clusters=130).deploy()       # at most half as many clusters as ids
    sizes = {name: tensor.numel() for name, tensor in emb.state_dict().items()}
    assert sizes == {"index.bytes": (504 + 208) * 8 // 8 + 7, "vectors.weight": (130 + 101) * 8, "table.weight": 20 * 8}
    emb = ec.make("light_rec(codewords=8)", SIZES, DIM, books=3).deploy()
    sizes = {name: tensor.numel() for name, tensor in emb.state_dict().items()}
    assert sizes == {"codes.bytes": 703 * 2 + 7, "codeword.weight": 2 * 3 * 8 * 8, "table.weight": 20 * 8}


def test_weights_at_criteos_sizes():
    """Of every id at dimension 16: four pointers of twelve bits, 9.4 %; six codes of a byte, also 9.4 %."""
    found = {spec: ec.weigh(spec, CRITEO, 16, 0.1) for spec in ("cce", "cel", "light_rec")}
    assert found["cce"]["knob"] == 4096 and 9.375 < found["cce"]["inference_pct"] < 10
    assert found["light_rec"]["knob"] == 6 and 9.375 < found["light_rec"]["inference_pct"] < 9.6
    assert 300 < found["light_rec"]["training_pct"] < 301
    assert 300_000 < found["cel"]["knob"] < 524_288 and found["cel"]["inference_pct"] > 9.99     # 19 bits an id
    for spec, reached in (("cce", True), ("cce(chunks=1)", True), ("cel", True), ("light_rec", False)):
        assert ec.weigh(spec, CRITEO, 16, 0.01)["reachable"] is reached
    assert ec.weigh("cce(chunks=1)", CRITEO, 16, 0.01)["knob"] == 32                             # 5 bits an id


# --- cce --------------------------------------------------------------------------------------------------------------

def test_before_the_first_clustering_both_pointers_are_hashes():
    emb = ec.make("cce", SIZES, DIM, rows=50).eval()
    out, weight = emb(everyone()), emb.tables.weight.detach()
    for field, f, first, r, begin in ((0, 0, 0, 50, 0), (2, 1, 504, 50, 200)):
        for i in range(0, SIZES[field], 17):
            parts = []
            for chunk in range(4):
                (a, c), (b, d) = ([int(x) for x in seeds[:, chunk]] for seeds in (emb.aux.first, emb.second))
                one = ((first + i) * a + c) % PRIME % r + begin + chunk * r
                two = ((first + i) * b + d) % PRIME % r + begin + chunk * r + 400
                parts.append(weight[one] + weight[two])
            assert torch.equal(out[i, field], torch.cat(parts))


def test_clustering_gives_nearest_centroids_and_the_mean_of_what_is_left():
    emb = ec.make("cce(iterations=5)", SIZES, DIM, rows=20, seed=2).eval()
    for _ in range(2):                                            # from hashes, and from learned pointers
        before = emb(everyone()).detach()
        old = emb.second.clone()
        emb.cluster()
        assert not torch.equal(emb.second, old)
        after = emb(everyone()).detach()
        first, second = (table.view(2, 4, 20, 2) for table in emb.tables.weight.detach().view(2, -1, 2))
        number = {0: torch.arange(500), 1: torch.arange(504, 707)}
        for f, field in ((0, 0), (1, 2)):
            size = SIZES[field]
            x = before[:size, field].view(size, 4, 2)
            code = emb.pointers.read(number[f])
            hashed = emb.hashed(number[f], torch.full((size,), f), emb.second)
            for chunk in range(4):
                distance = torch.cdist(x[:, chunk].double(), first[f, chunk].double())
                mine = distance.gather(1, code[:, chunk, None])[:, 0]
                assert (mine <= distance.amin(1) + 1e-6).all()
                for row in range(20):                             # the second table: means of what is left over
                    there = hashed[:, chunk] == row
                    rest = x[there, chunk] - first[f, chunk][code[there, chunk]]
                    mean = rest.mean(0) if there.any() else torch.zeros(2)
                    torch.testing.assert_close(second[f, chunk, row], mean, atol=1e-6, rtol=1e-4)
                expected = first[f, chunk][code[:, chunk]] + second[f, chunk][hashed[:, chunk]]
                torch.testing.assert_close(after[:size, field].view(size, 4, 2)[:, chunk], expected)
        assert torch.equal(after[:20, 1], before[:20, 1])         # the small field has a plain table


def test_blocks_and_samples_are_bounded_and_blocks_change_nothing(monkeypatch):
    seen, inner = [], _pointed.nearest.__globals__["codes_of"]
    rows = torch.randn(sum(SIZES), DIM, generator=torch.Generator().manual_seed(0))
    whole = ec.compress(rows[:500], "cce(points=10)", rows=16)
    monkeypatch.setattr(_pointed, "BLOCK", 64)
    monkeypatch.setattr(_pointed, "codes_of", lambda x, *rest: (seen.append(len(x)), inner(x, *rest))[1])
    from ecstudy.methods import cce
    sampled, lloyd = [], cce.lloyd
    monkeypatch.setattr(cce, "lloyd", lambda x, *rest, **more: (sampled.append(len(x)), lloyd(x, *rest, **more))[1])
    state = torch.get_rng_state()
    pieces = ec.compress(rows[:500], "cce(points=10)", rows=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert max(seen) == 64 and sum(seen) == 500 and sampled == [160]
    assert torch.equal(whole(torch.arange(500)), pieces(torch.arange(500)))


def test_a_matrix_of_few_kinds_is_kept_and_k_means_is_as_good_as_faiss():
    rows, _ = planted_rows(500, 12)
    for spec, options in (("cce", dict(rows=64)), ("cce(chunks=1)", dict(rows=64)), ("cel", dict(clusters=64))):
        torch.testing.assert_close(ec.compress(rows, spec, **options)(torch.arange(500)), rows, atol=1e-5, rtol=1e-4)
    rows = torch.randn(3000, DIM, generator=torch.Generator().manual_seed(3))
    found = ec.compress(rows, "cel", clusters=64)(torch.arange(3000))
    other = faiss.Kmeans(DIM, 64, niter=20, seed=1)
    other.train(rows.numpy())
    theirs = other.index.search(rows.numpy(), 1)[0].mean()
    assert (found - rows).square().sum(1).mean() < 1.03 * theirs


def test_the_schedule_clusters_at_epoch_ends_and_moments_begin_anew():
    emb = ec.make("cce(every=0.5, rounds=3)", SIZES, DIM, rows=20).train()
    called, inner = [], emb.cluster
    emb.cluster = lambda optimizer: (called.append(run_step[0]), inner(optimizer))
    run, run_step = FakeRun(steps_per_epoch=8, steps=30), [0]
    for _ in emb.schedule(run):
        run_step[0] += 1
    assert called == [4, 8, 12] and int(emb.aux.learned) == 3
    assert run.stages[0]["gated"]                                 # no snapshot with hashed pointers ships
    emb = ec.make("cce", SIZES, DIM, rows=20).train()
    optimizer = Optimizers(emb)
    emb(batch()).square().sum().backward()
    optimizer.step()
    table = [h is emb.tables for h in optimizer.rows.holders].index(True)
    emb.cluster(optimizer.rows)
    assert not any(m.any() for m in optimizer.rows.moments[table])
    assert all(m.any() for m in optimizer.rows.moments[1 - table])


def test_a_snapshot_of_before_or_after_a_clustering_is_restored_whole():
    emb = ec.make("cce", SIZES, DIM, rows=20).eval()
    states, values = [], []
    for _ in range(3):
        states.append({name: tensor.clone() for name, tensor in emb.state_dict().items()})
        values.append(emb(everyone()))
        emb.cluster()
    for state, value in zip(states, values):
        emb.load_state_dict(state)
        assert torch.equal(emb(everyone()), value)


# --- cel --------------------------------------------------------------------------------------------------------------

def watched(emb, steps=3, rows=200):
    """Batches through a linear head; (gradient of each interaction's own loss, its number) of every coded field."""
    torch.manual_seed(5)
    head, out = torch.nn.Linear(len(SIZES) * DIM, 1), []
    for seed in range(steps):
        ids = batch(rows, seed)
        label = (torch.rand(rows) < 0.3).float()
        F.binary_cross_entropy_with_logits(head(emb.train()(ids).flatten(1))[:, 0], label).backward()
        x = emb(ids).detach().requires_grad_()
        each = F.binary_cross_entropy_with_logits(head(x.flatten(1))[:, 0], label, reduction="sum")
        out.append((torch.autograd.grad(each, x)[0][:, emb.coded], emb._numbered(ids)[0]))
    return torch.cat([g for g, _ in out]), torch.cat([n for _, n in out])


def test_what_is_watched_is_each_interactions_own_gradient():
    emb = ec.make("cel", SIZES, DIM, clusters=16)
    gradient, number = watched(emb)
    for f in range(2):
        torch.testing.assert_close(emb.aux.fisher[f], gradient[:, f].T @ gradient[:, f], atol=1e-6, rtol=1e-4)
        for n in number[:, f].unique().tolist():
            mine = number[:, f] == n
            assert emb.aux.seen[n] == mine.sum()
            torch.testing.assert_close(emb.aux.gradient[n], gradient[mine, f].sum(0), atol=1e-6, rtol=1e-4)
    assert emb.aux.seen.sum() == number.numel()
    before = emb.aux.gradient.clone()
    emb.eval()(batch())
    with torch.no_grad():
        emb.train()(batch())
    assert torch.equal(emb.aux.gradient, before)
    emb.regroup()
    assert not emb.aux.gradient.any() and not emb.aux.seen.any() and not emb.aux.fisher.any()


def interval(clusters=8, splits=3, seed=0, **options):
    """A module of one field with gradients of our own: every id seen, drawn to one side or the other."""
    emb = ec.make(f"cel(splits={splits})", [200], DIM, clusters=clusters, **options).train()
    generator = torch.Generator().manual_seed(seed)
    emb.aux.seen[:200] = torch.randint(1, 9, (200,), generator=generator).float()
    axis = F.normalize(torch.randn(16, DIM, generator=generator), dim=1)
    side = torch.randn(200, generator=generator) * 3
    noise = torch.randn(200, DIM, generator=generator)
    emb.aux.gradient[:200] = side[:, None] * axis[emb.aux.cluster[:200].long()] + 0.1 * noise
    emb.aux.fisher[0] = torch.eye(DIM) * emb.aux.seen.sum()
    return emb


def test_a_cluster_parts_along_its_first_principal_component():
    """Against the eigenvectors of the covariance, cluster by cluster."""
    emb = interval(clusters=8, splits=2)                          # two clusters, room for six more
    gradient, seen, old = emb.aux.gradient[:200].clone(), emb.aux.seen[:200].clone(), emb.aux.cluster[:200].clone()
    rows = emb.vectors.weight.detach().clone()
    optimizer = Optimizers(emb)
    emb(torch.arange(200)[:, None]).sum().backward()
    optimizer.step()
    emb.aux.gradient[:200], emb.aux.seen[:200] = gradient, seen   # the step was no part of it
    emb.aux.fisher[0] = torch.eye(DIM) * seen.sum()
    rows, moments = emb.vectors.weight.detach().clone(), [m.clone() for m in optimizer.rows.moments[0]]
    moved = emb.regroup(optimizer.rows)
    new = emb.aux.cluster[:200]
    assert old.unique().tolist() == [0, 1] and new.unique().tolist() == [0, 1, 2, 3] and moved == (new != old).sum()
    for k in (0, 1):
        mine = old == k
        x = gradient[mine] - seen[mine, None] * gradient[mine].sum(0) / seen[mine].sum()
        side = x.double() @ torch.linalg.eigh(x.T.double() @ x.double()).eigenvectors[:, -1] > 0
        left = new[mine] != k
        assert torch.equal(left, side) or torch.equal(left, ~side)
        assert seen[mine][left].sum() <= seen[mine][~left].sum()  # the larger half keeps its row
        child = int(new[mine][left][0])
        for tensor, was in zip((emb.vectors.weight, *optimizer.rows.moments[0]), (rows, *moments)):
            assert torch.equal(tensor[child], was[k]) and torch.equal(tensor[k], was[k])


@pytest.mark.parametrize("limited, taken", [(False, 0), (False, 2), (True, 0)])
def test_only_clusters_of_enough_interactions_split_and_the_best_first(limited, taken):
    emb = interval(clusters=8, splits=1)                          # four clusters, and room for four more
    if taken:
        emb.aux.cluster[190:196] = torch.tensor([4, 4, 4, 5, 5, 5]).int()        # two of the free ones are not free
    old, gradient, seen = (t[:200].clone() for t in (emb.aux.cluster, emb.aux.gradient, emb.aux.seen))
    mass = torch.bincount(old, seen)
    emb.least = least = float(mass[:4].median()) / 2 if limited else 0           # half of them have more than that
    emb.regroup()
    gain = {}
    for k in range(4 + taken):
        mine = old == k
        x = (gradient[mine] - seen[mine, None] * gradient[mine].sum(0) / seen[mine].sum()).double()
        side = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
        halves = [(side[part].sum() ** 2 / 2 / seen[mine][part].sum()).item() for part in (side > 0, side < 0)]
        if mass[k] > 2 * least and sum(halves) > mine.sum() / np.pi:
            gain[k] = sum(halves) - mine.sum().item() / np.pi
    able = sorted(gain, key=lambda k: -gain[k])[:4 - taken]
    parted = [k for k in range(4 + taken) if (emb.aux.cluster[:200][old == k] != k).any()]
    assert parted == sorted(able) and len(able) == (2 if limited or taken else 4)


def test_a_gain_that_noise_would_give_is_none():
    """150 ids with 0.6 of the noise gain 27 as halves, less than 150 / pi; 50 with all of it 25, more than 50 / pi."""
    emb = ec.make("cel(splits=1, least=0)", [200], DIM, clusters=4)
    emb.aux.cluster[:200] = (torch.arange(200) >= 150).int()
    emb.aux.seen[:200] = 1.0
    emb.aux.gradient[:200, 0] = torch.where(torch.arange(200) < 150, 0.6, 1.0) * (1 - torch.arange(200) % 2 * 2)
    emb.aux.fisher[0] = 200 * torch.eye(DIM)
    assert emb.regroup() == 25 and (emb.aux.cluster[:150] == 0).all() and len(emb.aux.cluster[150:200].unique()) == 2


def test_ids_move_to_the_cluster_of_least_loss():
    """Against the loss written out for every id and every cluster."""
    emb = interval(clusters=16, splits=0, prior=3.0)
    emb.aux.seen[::3] = 0                                         # not seen: they stay
    emb.aux.round.fill_(1)                                        # the turn of reassignment
    with torch.no_grad():
        emb.vectors.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.03)
    root = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2))
    emb.aux.fisher[0] = root @ root.T * emb.aux.seen.sum()
    old, gradient, seen = (t[:200].clone() for t in (emb.aux.cluster.long(), emb.aux.gradient, emb.aux.seen))
    moved = emb.regroup()
    e, fisher = emb.vectors.weight.detach().double(), (root @ root.T).double()
    step = e[None] - e[old][:, None]                              # [200, 16, D]
    loss = (gradient.double()[:, None] * step).sum(2)
    loss += (seen.double()[:, None] + 3) / 2 * torch.einsum("ncd,de,nce->nc", step, fisher, step)
    expected = torch.where(seen > 0, loss.argmin(1), old)
    assert torch.equal(emb.aux.cluster[:200].long(), expected) and moved == (expected != old).sum() > 20


def test_reassignment_lowers_the_true_loss_of_the_history():
    """The second-order loss is a model; the log loss of the very same interactions must fall."""
    rng = np.random.default_rng(0)
    emb = ec.make("cel(splits=0)", [200], DIM, clusters=8, prior=0.0).train()
    with torch.no_grad():
        emb.vectors.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    ids = torch.from_numpy(rng.integers(0, 200, (8000, 1)))
    weight = torch.ones(DIM)
    label = torch.from_numpy(rng.random(8000) < 1 / (1 + np.exp(-1.5 * np.where(np.arange(200) % 3, 1, -1))[ids[:, 0]]))

    def loss(x):
        return F.binary_cross_entropy_with_logits(x[:, 0] @ weight, label.float())

    before = loss(emb(ids))
    before.backward()
    emb.aux.round.fill_(1)
    assert emb.regroup() > 100
    after = loss(emb.eval()(ids))
    # within what eight vectors can reach: every id with the best of them by its own true loss
    each = F.binary_cross_entropy_with_logits((emb.vectors.weight @ weight)[None].expand(8000, 8),
                                              label.float()[:, None].expand(8000, 8), reduction="none")
    best = torch.zeros(200, 8).index_add_(0, ids[:, 0], each.detach()).amin(1).sum() / 8000
    assert after < before - 0.9 * (before - best)


def test_candidates_are_drawn_where_there_are_more_and_the_schedule_takes_turns():
    emb = interval(clusters=16, splits=0, candidates=4)
    old = emb.aux.cluster[:200].clone()
    emb.aux.round.fill_(1)
    emb.regroup()
    new = emb.aux.cluster[:200]
    assert len(new[new != old].unique()) <= 4
    emb = ec.make("cel(every=0.25, rounds=5)", SIZES, DIM, clusters=16)
    turns = []
    emb.regroup = lambda optimizer: turns.append(step[0])
    step, run = [0], FakeRun(steps_per_epoch=8, steps=20)
    for _ in emb.schedule(run):
        step[0] += 1
    assert turns == [2, 4, 6, 8, 10]


def test_ids_begin_by_remainder_in_as_many_clusters_as_splits_can_double():
    for clusters, splits, start in ((100, 4, 6), (16, 4, 1), (3, 4, 1), (100, 0, 100)):
        emb = ec.make(f"cel(splits={splits})", [500], DIM, clusters=clusters)
        assert torch.equal(emb.aux.cluster[:500].long(), torch.arange(500) % start)


def test_blocks_of_ids_change_no_cluster(monkeypatch):
    results = []
    for block in (1 << 16, 24):
        monkeypatch.setattr(cel_module, "BLOCK", block)
        emb = interval(clusters=8, splits=2)
        assert emb.regroup() > 0
        results.append(emb.deploy().index.read(torch.arange(200)))
    assert torch.equal(*results)


# --- light_rec --------------------------------------------------------------------------------------------------------

def ready(spec="light_rec(codewords=16)", books=3, scale=40.0, **options):
    """Vectors of the order of one and matrices other than the identity, so that choices are not by chance."""
    emb = ec.make(spec, SIZES, DIM, books=books, **options)
    with torch.no_grad():
        emb.table.weight.mul_(scale)
        emb.begin(emb.table.weight)
        emb.aux.matrix.weight.add_(0.2 * torch.randn(emb.aux.matrix.shape, generator=torch.Generator().manual_seed(1)))
    return emb


@pytest.mark.parametrize("similarity", ["distance", "bilinear"])
def test_codewords_are_the_most_similar_ones_of_what_is_left(similarity):
    emb = ready(f"light_rec(codewords=16, similarity={similarity!r})").eval()
    out = emb(everyone()).detach()
    codeword = emb.aux.codeword.weight.detach().double().view(2, 3, 16, DIM)
    matrix = emb.aux.matrix.weight.detach().double().view(2, 3, DIM, DIM)
    full = emb.table.weight.detach().double()
    for f, (field, offset) in enumerate(((0, 0), (2, 520))):
        x = full[offset:offset + SIZES[field]]
        total = torch.zeros_like(x)
        for level in range(3):
            c = codeword[f, level]
            s = 2 * x @ matrix[f, level] @ c.T - (c.square().sum(1) if similarity == "distance" else 0)
            top = s.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-6           # no tie that float32 might decide otherwise
            x, total = x - c[s.argmax(1)], total + c[s.argmax(1)]
        torch.testing.assert_close(out[:SIZES[field], field], total.float(), atol=1e-6, rtol=1e-5)
    assert torch.equal(out[:20, 1], emb.table.weight.detach()[500:520])
    assert torch.equal(emb.deploy()(everyone()), out)


@pytest.mark.parametrize("distil", [0.0, 2.0])
def test_gradients_are_those_of_the_soft_max_and_the_distillation(distil):
    """Against the recursion written out occurrence by occurrence, with torch's own gradient."""
    emb = ready(distil=distil, temperature=0.5).train()
    ids = batch()
    upstream = torch.randn(len(ids), len(SIZES), DIM, generator=torch.Generator().manual_seed(3))
    out = emb(ids)
    (out * upstream).sum().backward()
    full, codeword, matrix = (h.weight.detach().clone().requires_grad_()
                              for h in (emb.table, emb.aux.codeword, emb.aux.matrix))
    c, m = codeword.view(2, 3, 16, DIM), matrix.view(2, 3, DIM, DIM)
    loss = (full[500 + ids[:, 1]] * upstream[:, 1]).sum()
    for f, (field, offset) in enumerate(((0, 0), (2, 520))):
        x = full[offset + ids[:, field]]
        left, total = x, 0
        for level in range(3):
            length = c[f, level].square().sum(1)
            s = (2 * left @ m[f, level] @ c[f, level].T - length) / (0.5 * length.detach().mean())
            soft = s.softmax(1)
            hard = F.one_hot(s.argmax(1), 16).float()
            chosen = (hard - soft.detach() + soft) @ c[f, level]
            left, total = left - chosen, total + chosen
        torch.testing.assert_close(out[:, field], total.detach(), atol=1e-5, rtol=1e-5)
        loss = loss + (total * upstream[:, field]).sum() + distil * (total - x.detach()).square().mean()
    loss.backward()
    for holder, leaf in zip((emb.table, emb.aux.codeword, emb.aux.matrix), (full, codeword, matrix)):
        torch.testing.assert_close(holder.weight.grad, leaf.grad, atol=2e-5, rtol=2e-3)


def test_codebooks_begin_as_good_as_faisss():
    rows = torch.randn(3000, DIM, generator=torch.Generator().manual_seed(4)) @ torch.diag(torch.linspace(0.2, 2, DIM))
    errors = []
    for books in (1, 2, 4):
        found = ec.compress(rows, "light_rec(codewords=16)", books=books)(torch.arange(3000))
        errors.append((found - rows).square().sum(1).mean().item())
        other = faiss.ResidualQuantizer(DIM, books, 4)
        other.max_beam_size, other.train_type = 1, other.Train_default
        other.train(rows.numpy())
        theirs = (other.decode(other.compute_codes(rows.numpy())) - rows.numpy()).__pow__(2).sum(1).mean()
        assert errors[-1] < 1.05 * theirs
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_the_warm_up_is_the_full_table_and_the_second_stage_may_hold_vectors_fixed():
    for tune in (False, True):
        emb = ec.make(f"light_rec(codewords=16, tune={tune})", SIZES, DIM, books=3).train()
        run, seen = FakeRun(), []
        for step in emb.schedule(run):
            emb.zero_grad()
            out = emb(everyone())
            out.square().sum().backward()
            rows = emb.table.weight.grad
            touched = (rows.to_dense() if rows.is_sparse else rows).abs().sum(1) > 0
            plain = torch.equal(out[:, 0], emb.table.weight[:500])
            seen.append((step.stage, plain, bool(touched[:500].any()), bool(touched[500:520].all())))
        assert {s for s in seen} == {("warm-up", True, True, True), ("codes", False, tune, True)}
        assert [(s["stage"], s["shared"]) for s in run.stages] == [("warm-up", "full"), ("codes", None)]
    # a warm-up trained by another method fits: everything else is auxiliary
    full = ec.make("full", SIZES, DIM)
    missing, unexpected = emb.load_state_dict(full.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("aux.") for name in missing)


# --- arguments --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, text", [
    ("cce(chunks=3)", "chunks=3: expected a divisor of the embedding dimension 8"), ("cce(rows=1)", "rows=1"),
    ("cce(rows=70000)", "65536"), ("cce(every=0)", "every=0: expected a positive"), ("cce(points=0)", "points=0"),
    ("cel(clusters=0)", "clusters=0: expected an integer from 1 to 250"), ("cel(clusters=251)", "clusters=251"),
    ("cel(every=0)", "every=0: expected a number above 0"), ("cel(prior=-1)", "prior=-1: expected a number of at"),
    ("light_rec(codewords=48)", "expected a power of two from 2 to 256"), ("light_rec(books=9)", "books=9"),
    ("light_rec(similarity='x')", "expected 'distance'"), ("light_rec(temperature=0)", "temperature=0"),
])
def test_bad_options_are_named(spec, text):
    with pytest.raises(ValueError, match=text):
        ec.make(spec, SIZES, DIM)


def test_similarities_that_are_not_distances_must_be_trained():
    with pytest.raises(TypeError, match="light_rec learns by training"):
        ec.compress(torch.randn(500, 8), "light_rec(codewords=16, similarity='bilinear')")


@every_method
def test_fields_too_small_are_plain_tables(spec):
    emb = ec.make(spec, [12, 5], 8)
    assert emb.numbers == 0 and ec.memory(emb) == 17 * 8 * 4
    ids = torch.tensor([[3, 4]])
    out = emb.train()(ids)
    list(emb.schedule(FakeRun()))
    assert torch.equal(emb.eval()(ids), out) and torch.equal(emb.deploy()(ids), out)


# --- data on which the ideas must pay ---------------------------------------------------------------------------------

ROWS = 16_000


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """1,000 ids of 12 kinds: what an id is takes a few bits, a row shared by remainder does not tell it."""
    rng = np.random.default_rng(5)
    kind, effect = rng.integers(0, 12, 1000), np.linspace(-3, 3, 12)
    ids = np.stack([zipf_ids(rng, 1000, ROWS, 0.6), rng.integers(0, 10, ROWS)], 1)
    return write(tmp_path_factory.mktemp("kinds") / "data", [1000, 10], ids, effect[kind[ids[:, 0]]])


def test_additive_codes_pay_where_ids_fall_into_a_few_kinds(kinds):
    assert margin("light_rec(codewords=16)", kinds, 0.2) > 0.03


@pytest.mark.parametrize("spec, without, budget, least", [("cel", "cel(rounds=0)", 0.07, 0.05),
                                                          ("cce(every=0.5)", "cce(rounds=0)", 0.15, 0.005)])
def test_clusters_pay_where_ids_fall_into_a_few_kinds(spec, without, budget, least, kinds):
    """More than shared rows, and more than the same bytes with hashed pointers and clusters by remainder."""
    ours, size = trained(spec, kinds, budget)
    assert ours > trained("hash_trick", kinds, int(size))[0] + 0.03
    assert ours > trained(without, kinds, budget)[0] + least
