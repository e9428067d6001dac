"""What ``nis``, ``esapn``, ``amtl`` and ``auto_emb`` promise: widths of ids by policy or by soft selection."""
from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import margin, write, zipf_ids
from torch import nn

import ecstudy as ec
from ecstudy import models
from ecstudy.fields import Fields
from ecstudy.methods._levels import Controller, LevelRows, Sized, per_group, popularity
from ecstudy.methods._search import candidates
from ecstudy.methods.nis import bands
from ecstudy.training import Run, Settings
from ecstudy.training.timeline import FakeRun

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES, DIM = [50, 20, 8, 300], 8
COUNTS = np.random.default_rng(0).permutation(np.arange(378) ** 2 // 40)
FOUR = ["nis", "esapn", "amtl", "auto_emb"]
every_device = pytest.mark.parametrize("device", DEVICES)


def make(spec, budget=None, sizes=SIZES, counts=COUNTS, **options):
    torch.set_num_threads(1)
    return ec.make(spec, sizes, DIM, budget, seed=0, counts=None if spec.startswith("esapn") else counts, **options)


def all_ids(sizes=SIZES):
    return torch.stack([torch.arange(max(sizes)) % size for size in sizes], 1)


def shaken(emb):
    """All weights at random, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(1)
    for p in emb.parameters():
        p.detach().copy_(torch.randn(p.shape, generator=generator))
    return emb


def each_id(emb, sizes=SIZES):
    """Vectors of all ids, the fields one after the other [n, D]."""
    out = emb(all_ids(sizes)).detach()
    return torch.cat([out[:size, f] for f, size in enumerate(sizes)])


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """Power-law ids of which the frequent ones matter, as many that say nothing, and a small field that matters."""
    rng, sizes, rows = np.random.default_rng(2), [2000, 1000, 20], 8000
    ids = np.stack([zipf_ids(rng, 2000, rows), zipf_ids(rng, 1000, rows, 0.5), rng.integers(0, 20, rows)], 1)
    effect, often = np.zeros(2000), np.bincount(ids[:, 0], minlength=2000).argsort()[::-1]
    effect[often[:200]] = 2 * rng.normal(size=200)
    return write(tmp_path_factory.mktemp("data") / "skewed", sizes, ids,
                 effect[ids[:, 0]] + rng.normal(size=20)[ids[:, 2]])


def run_of(spec, log, budget, **settings):
    torch.set_num_threads(1)
    counts = None if spec.startswith("esapn") else log.counts
    emb = ec.make(spec, log.cardinalities, DIM, budget, seed=0, counts=counts)
    head = models.make("wdl", fields=len(log.cardinalities), dim=DIM, dense=0, seed=0)
    return Run(emb, head, log, Settings(**dict(lr=0.01, batch=256, max_epochs=1, evals_per_epoch=2) | settings))


# --- popularity, and rows of few widths -------------------------------------------------------------------------------

def test_buckets_of_popularity():
    count = torch.tensor([0, 1, 2, 3, 6, 7, 8, 2 ** 31 - 1])
    assert popularity(count).tolist() == [0, 1, 1, 2, 2, 3, 3, 31]
    assert popularity(count, 2).tolist() == [0, 2, 3, 4, 5, 6, 6, 62]
    bucket = popularity(torch.tensor([0, 0, 3, 1, 1, 7]))
    found = per_group(Fields([3, 3]), bucket, 4)
    assert found.tolist() == [[2, 0, 1, 0], [0, 2, 0, 1]]
    weighed = per_group(Fields([3, 3]), bucket, 4, torch.tensor([1, 2, 3, 4, 5, 6]))
    assert weighed.tolist() == [[3, 0, 3, 0], [0, 9, 0, 6]]


@every_device
@pytest.mark.parametrize("widths, share", [
    ([0, 2, 4, 6, 8], [5, 1, 3, 0, 2]), ([2, 4, 8], [0, 1, 0]), ([0, 8], [1, 0]), ([0, 1, 2, 3, 8], [0, 0, 9, 1, 0]),
    (list(range(9)), [1] * 9), ([1, 8], [99, 1])])
def test_rows_of_few_widths_are_found_again(widths, share, device):
    rng = np.random.default_rng(0)
    width = torch.from_numpy(rng.choice(widths, 3000, p=np.array(share) / sum(share))).to(device)
    table = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)).to(device)
    rows = [int((width == w).sum()) for w in widths]
    kept = LevelRows(3000, 8, widths, rows, device)
    kept.fill(width, lambda ids, w: table[ids, :w])
    ids = torch.randperm(3000, device=device).view(1000, 3)
    found, own = kept.lookup(ids)
    assert torch.equal(own, width[ids]) and torch.equal(kept.per_id().long(), width)
    assert torch.equal(found, table[ids] * (torch.arange(8, device=device) < width[ids][..., None]))
    cells = int(width.sum())
    assert kept.array.shape == (cells + 8,)
    most = LevelRows(3000, 8, widths, None, "meta", cells)                     # no choice of as many numbers is heavier
    for seed in range(20):
        odds = np.random.default_rng(seed).dirichlet([0.3] * len(widths))
        other = np.random.default_rng(seed).choice(widths, 3000, p=odds)
        while other.sum() > cells:
            other[rng.integers(0, 3000, 50)] = widths[0]
            if (other == widths[0]).all():
                break
        if other.sum() <= cells:
            rows = [int((other == w).sum()) for w in widths]
            assert ec.memory(LevelRows(3000, 8, widths, rows, "meta")) <= ec.memory(most)
    assert ec.memory(kept) <= ec.memory(most)


@pytest.mark.parametrize("cascade", [False, True])
def test_a_row_in_use_is_lifted_normalised_and_packed(cascade):
    fields, widths = Fields(SIZES), [2, 4, 8]
    sized = shaken(Sized(fields, 8, widths, cascade))
    level = torch.randint(3, (378,), generator=torch.Generator().manual_seed(0))
    ids = all_ids()[torch.randperm(300)[:64]]
    flat = fields.flat(ids)
    lifted = torch.empty(64, 4, 8)
    for b, f in product(range(64), range(4)):
        own = int(level[flat[b, f]])
        x = sized.table.weight[flat[b, f], [0, 2, 6][own]:[2, 6, 14][own]]
        for k in range(own, 2) if cascade else [own] * (own < 2):
            x = x @ sized.matrices[k][f]
        lifted[b, f] = x.detach()
    expected = nn.BatchNorm1d(4 * 8, affine=False)(lifted.flatten(1)).view(64, 4, 8).tanh()
    torch.testing.assert_close(sized.train()(flat, level[flat]), expected, atol=1e-4, rtol=1e-4)
    sized.eval()
    mean, var = (part.view(4, 8) for part in (sized.mean, sized.var))
    torch.testing.assert_close(mean, 0.1 * lifted.mean(0), atol=1e-5, rtol=1e-4)
    expected = ((lifted - mean) / (var + 1e-5).sqrt()).tanh()
    before = sized(flat, level[flat])
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=1e-4)
    sized.pack(level, torch.bincount(level).tolist(), 0)
    assert torch.equal(sized(flat), before)
    assert sized.kept.array.shape[0] == sum(widths[int(k)] for k in level) + 8


def test_the_controller_starts_undecided_and_tells_groups_and_states_apart():
    controller = Controller(3, 32, 2, 4)
    assert controller().abs().max() == 0
    shaken(controller)
    scores = controller()
    assert scores.shape == (3, 32, 2, 4) and len(scores.detach().view(-1, 4).unique(dim=0)) == 3 * 32 * 2
    x = F.batch_norm(controller.embedding, None, None, training=True) @ controller.first
    x = torch.stack([x[f * 32 + q] + controller.state[s] for f, q, s in product(range(3), range(32), range(2))])
    x = F.batch_norm(x, None, None, training=True).tanh() @ controller.last + controller.bias
    torch.testing.assert_close(scores.view(-1, 4), x)


@pytest.mark.parametrize("spec", FOUR)
def test_allocation_is_what_is_stored(spec):
    emb = make(spec, 0.6)
    if spec == "esapn":
        emb.aux.level[::3] = 1
    elif spec == "auto_emb":
        nn.init.normal_(emb.aux.search.controller.last)
        nn.init.normal_(emb.aux.search.controller.bias)
    elif spec == "amtl":
        nn.init.normal_(emb.aux.twins.last)
    emb.deploy()
    held = emb.allocation()
    kept = emb.kept if spec in ("nis", "amtl") else emb.sized.kept
    assert held.dtype == torch.int32 and len(held) == 378 and held.unique().numel() > 1
    assert int(held.sum()) == kept.array.shape[0] - DIM <= emb.cells
    if spec == "amtl":
        assert torch.equal(held, each_id(emb).ne(0).sum(1).int())
    if spec != "nis":
        assert emb.fitted["rows"] == [int((held == w).sum()) for w in (range(9) if spec == "amtl" else [2, 4, 8])]


def test_bad_arguments_are_named():
    for spec, text in [("nis(groups=3)", "groups=3: expected a divisor of the embedding dimension 8"),
                       ("nis(cuts=[0.5, 0.1])", "expected rising shares"), ("nis(cells=-1)", "cells=-1: expected 0 to"),
                       ("nis(cost=-1)", "cost=-1"), ("nis(choice=[[1]])", "expected for each of 4 fields 4 places"),
                       ("esapn(explore=0)", "explore=0"), ("esapn(cells=700)", "cells=700: expected 756 to 3024"),
                       ("esapn(rows=[1])", "rows=\\[1\\]: expected numbers of ids of the widths \\[2, 4, 8\\], 378"),
                       ("amtl(hidden=0)", "hidden=0"), ("amtl(cells=4000)", "cells=4000: expected 0 to 3024"),
                       ("amtl(rows=[378])", "expected 9 numbers of ids"), ("auto_emb(first=0)", "first=0"),
                       ("auto_emb(cells=3)", "cells=3: expected 756 to 3024"), ("auto_emb(rows=[378])", "rows=")]:
        with pytest.raises(ValueError, match=text):
            make(spec)


def test_weigh_says_where_a_limit_is_not_the_papers():
    for spec, ours in [("nis", False), ("esapn", True), ("amtl", True), ("auto_emb|int8", True)]:
        row = ec.weigh(spec, [5000, 300, 7], 16, 0.3)
        assert row["reachable"] and ("its source has no budget" in row["reason"]) == ours
        assert row["reason"].endswith("what ships is learned, at most this")
    row = ec.weigh("esapn", [5000, 300, 7], 16, 0.1)
    assert not row["reachable"] and "the smallest esapn" in row["reason"]
    assert ec.weigh("compo", [5000, 300, 7], 16, 0.3)["reason"] == ""


# --- nis --------------------------------------------------------------------------------------------------------------

def test_bands_are_ranks_by_count_and_ties_go_to_the_lower_id():
    counts = torch.tensor([5, 9, 5, 0, 7, 5, 1])
    order = [1, 4, 0, 2, 5, 6, 3]
    reach = [0, 1, 3, 5]
    expected = {i: sum(rank >= r for r in reach[1:]) for rank, i in enumerate(order)}
    assert bands(counts, reach).tolist() == [expected[i] for i in range(7)]
    emb = make("nis(cuts=[0.1, 0.5])")
    for f, (size, part) in enumerate(zip(SIZES, emb.aux.band.split(SIZES))):
        for c in (1, 2):
            chosen = (part < c).nonzero().view(-1)
            assert len(chosen) == emb.reach[f][c] == max(1, round([0.1, 0.5][c - 1] * size))
            own = COUNTS[sum(SIZES[:f]):][:size]
            assert own[chosen].min() >= np.delete(own, chosen).max()


def test_an_id_has_the_column_groups_whose_choice_reaches_it():
    emb = shaken(make("nis(cuts=[0.1, 0.5, 1.0])")).eval()
    choice = torch.randint(4, (4, 4), generator=torch.Generator().manual_seed(3))
    emb.aux.choice.copy_(choice)

    def expected(choice):
        out = []
        for f, (size, first) in enumerate(zip(SIZES, emb.fields.offset.tolist())):
            rank = np.lexsort((np.arange(size), -COUNTS[first:first + size])).argsort()
            for i in range(size):
                total = emb.projection[f, -1]
                for t in range(4):
                    if rank[i] < emb.reach[f][choice[f][t]]:
                        part = slice(2 * t, 2 * t + 2)
                        total = total + emb.table.weight[first + i, part] @ emb.projection[f, part]
                out.append(total.detach())
        return torch.stack(out)

    torch.testing.assert_close(each_id(emb), expected(choice), atol=1e-4, rtol=1e-4)
    emb.settle(choice.tolist())
    choice = choice.sort(1, descending=True).values
    assert emb.fitted == {"choice": choice.tolist()}
    vectors = each_id(emb)
    torch.testing.assert_close(vectors, expected(choice), atol=1e-4, rtol=1e-4)
    emb.deploy()
    torch.testing.assert_close(each_id(emb), vectors)
    again = make("nis(cuts=[0.1, 0.5, 1.0])", choice=choice.tolist())
    assert again.rows() == torch.bincount(emb.allocation() // 2, minlength=5).tolist()


def with_losses(loss):
    return SimpleNamespace(losses=lambda: loss)


def test_the_objective_is_the_gradient_of_the_expected_reward():
    """REINFORCE, averaged over all choices by their probability, against autograd through the expectation."""
    emb = make("nis(cuts=[0.5, 1.0], groups=1, cost=0.7, entropy=0.2, cells=5)", sizes=[6, 4], counts=np.arange(10))
    policy = emb.aux.policy.requires_grad_(True)
    policy.detach().copy_(torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)))
    emb.aux.critic.requires_grad_(True).data.fill_(0.3)                  # any baseline leaves the expectation as it is
    choices, loss = list(product(range(3), range(3))), torch.rand(9, generator=torch.Generator().manual_seed(1))
    pi = policy.softmax(-1)[:, 0]
    found, critic = 0, 0
    for number, (a, b) in enumerate(choices):
        emb.drawn = torch.tensor([[[a], [b]]])
        gradient = torch.autograd.grad(emb.objective(with_losses(loss[number:number + 1])), [policy, emb.aux.critic])
        weight = float((pi[0, a] * pi[1, b]).detach())
        found, critic = found + weight * gradient[0], critic + weight * gradient[1]
    expected = sum(pi[0, a] * pi[1, b] * loss[number] for number, (a, b) in enumerate(choices))
    numbers = sum(pi[f, c] * 8 * rows for f, reach in enumerate([[0, 3, 6], [0, 2, 4]]) for c, rows in enumerate(reach))
    assert float(numbers.detach()) > 5
    entropy = -(pi * pi.log()).sum(1).mean()
    target = torch.autograd.grad(expected + 0.7 * (numbers / 5 - 1) - 0.2 * entropy, policy, retain_graph=True)[0]
    torch.testing.assert_close(found, target, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(critic, 2 * (0.3 + expected.detach()), atol=1e-5, rtol=1e-4)    # towards mean reward
    emb.cells = 80
    assert emb.excess(policy.softmax(-1)) == 0                           # nothing to pay below the limit
    # a batch of rows that drew different choices is the mean over them
    emb.drawn = torch.tensor([[[a], [b]] for a, b in choices])
    together = torch.autograd.grad(emb.objective(with_losses(loss)), policy)[0]
    alone = []
    for number in range(9):
        emb.drawn = torch.tensor([[[c] for c in choices[number]]])
        alone.append(torch.autograd.grad(emb.objective(with_losses(loss[number:number + 1])), policy)[0])
    torch.testing.assert_close(together, torch.stack(alone).mean(0), atol=1e-6, rtol=1e-4)


def test_rows_of_a_batch_draw_their_own_choices_by_the_policy():
    emb = make("nis(cuts=[0.1, 1.0], groups=2)")
    emb.aux.policy.data.copy_(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    drawn = emb.draw(6000)
    share = F.one_hot(drawn, 3).float().mean(0)
    torch.testing.assert_close(share, emb.aux.policy.detach().softmax(-1), atol=0.03, rtol=0)
    emb.drawing = True
    seen = emb.train().mask(emb.fields.flat(all_ids()))
    expected = emb.aux.band[emb.fields.flat(all_ids())][..., None] < emb.drawn
    assert torch.equal(seen, expected.float().repeat_interleave(4, -1)) and len(seen.unique(dim=0)) > 10
    assert torch.equal(emb.eval().mask(emb.fields.flat(all_ids())), torch.ones(300, 4, 8))


@pytest.mark.parametrize("cells", [0, 30, 77, 100, 160, 240])
def test_the_likeliest_choice_that_fits(cells):
    emb = make(f"nis(cuts=[0.3, 1.0], groups=2, cells={cells})", sizes=[20, 10], counts=np.arange(30))
    emb.aux.policy.data.copy_(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(cells)))
    log = emb.aux.policy.detach().log_softmax(-1).view(4, 3)
    reach = [[0, 6, 20], [0, 6, 20], [0, 3, 10], [0, 3, 10]]
    fitting = [c for c in product(range(3), repeat=4) if 4 * sum(reach[d][k] for d, k in enumerate(c)) <= cells]
    best = max(fitting, key=lambda c: float(sum(log[d, k] for d, k in enumerate(c))))
    assert emb.decide() == [list(best[:2]), list(best[2:])]


def test_stages_of_nis_and_new_rows_for_the_choice():
    emb, run = make("nis"), FakeRun(steps_per_epoch=4, steps=4)
    seen, before = [], emb.table.weight.detach().clone()
    for step in emb.schedule(run):
        seen.append((run.stages[-1]["stage"], step.split, emb.drawing, callable(step.update)))
    assert [stage["stage"] for stage in run.stages] == ["warm-up", "search", "retrain"]
    search = [("search", "train", True, False), ("search", "valid", True, True)]
    assert seen == [("warm-up", "train", False, False)] * 4 + search * 4 + [("retrain", "train", False, False)] * 4
    assert emb.searched and not torch.equal(emb.table.weight, before)
    assert emb.table.weight.abs().max() <= emb.fields.bound()


def test_the_search_of_nis_finds_the_ids_that_matter(skewed):
    """A tenth of the first field's ids, none of the second, all of the third."""
    run = run_of("nis(epochs=12, groups=2)", skewed, 0.15, max_epochs=2)
    for step in run.emb.schedule(run):
        run.execute(step)
        if run.emb.drawing:
            policy = run.emb.aux.policy.detach().softmax(-1)
    # from none to everything; at first the probabilities rise from 0.05 to 0.34
    assert run.emb.cuts[2] == 0.1 and (policy[0].argmax(-1) == 3).all() and (policy[2].argmax(-1) == 5).all()
    much = policy[..., 3:].sum(-1).mean(1)
    assert much[0] > 1.5 * much[1] and much[2] > 0.9
    assert float(run.emb.aux.critic.detach()) == pytest.approx(-0.55, abs=0.1)           # about the mean reward
    held = run.emb.deploy().allocation().float()
    assert int(held.sum()) <= run.emb.cells and held[:2000].mean() > 1.5 * held[2000:3000].mean()


# --- esapn ------------------------------------------------------------------------------------------------------------

def grown(emb, batch, asks):
    """Let the ids of a batch grow that ``asks`` says, as :meth:`Esapn.grow` does."""
    from ecstudy.ragged import PerField

    seen = PerField(batch, emb.fields.offset)
    level, count = emb.aux.level[seen.unique].int(), emb.aux.count[seen.unique]
    allowed = emb.affordable(asks(seen.unique), level, count)
    emb.enlarge(seen, allowed, level)
    return seen.unique[allowed]


def test_growing_changes_no_vector_and_begins_with_the_image():
    emb = shaken(make("esapn")).eval()
    for round_ in range(4):                                              # sizes 2, 4, 8; the last round asks in vain
        before, level = each_id(emb), emb.aux.level.clone()
        old = emb.sized.table.weight.detach().clone()
        batch = emb.fields.flat(all_ids()[:100])
        found = grown(emb, batch, lambda ids: (ids % 3 > 0) & (emb.aux.level[ids] < 2))
        ids = batch.unique()
        assert found.tolist() == ids[(ids % 3 > 0) & (level[ids] < 2)].tolist()
        torch.testing.assert_close(each_id(emb), before, atol=1e-4, rtol=1e-4)
        new = emb.sized.table.weight.detach()
        for i in ids.tolist():
            f, k = int(torch.bucketize(i, emb.fields.offset, right=True)) - 1, int(level[i])
            if i not in found:
                assert torch.equal(new[i], old[i]) and emb.aux.level[i] == k
                continue
            first, middle, last = [0, 2, 6, 14][k:k + 3]
            torch.testing.assert_close(new[i, middle:last], old[i, first:middle] @ emb.sized.matrices[k][f])
            assert emb.aux.level[i] == k + 1
    assert emb.aux.level.max() == 2 and int(emb.aux.used) == sum([2, 4, 8][int(k)] for k in emb.aux.level)


def test_a_cap_stops_growth_and_the_popular_are_served_first():
    emb = make("esapn(cells=776)")                                       # 756 numbers at first: ten ids may grow once
    emb.aux.count.copy_(torch.from_numpy(np.random.default_rng(0).permutation(378)))
    batch = emb.fields.flat(all_ids())
    found = grown(emb, batch, lambda ids: torch.ones_like(ids, dtype=torch.bool))
    assert sorted(emb.aux.count[found].tolist()) == list(range(368, 378)) and emb.aux.used == 776
    assert len(grown(emb, batch, lambda ids: emb.aux.level[ids] < 2)) == 0
    emb.cells = 780                                                      # the next size takes 4 more, the first only 2
    emb.aux.count[found] = 0
    found = grown(emb, batch, lambda ids: emb.aux.level[ids] == 0)
    assert emb.aux.count[found].tolist() == [367, 366] or emb.aux.count[found].tolist() == [366, 367]


def test_rewards_are_falls_of_an_ids_loss_relative_to_those_of_the_batch():
    emb = make("esapn(last=4)", sizes=[5, 4])
    shaken(emb.aux.policy)
    emb.aux.policy.requires_grad_(True)
    losses = torch.tensor([0.4, 0.9, 0.2, 0.6])
    emb.batch = emb.fields.flat(torch.tensor([[0, 0], [0, 1], [2, 1], [3, 1]]))          # rows 0 2 3 and 5 6
    mean = {0: 0.7, 2: 0.5, 3: 0.0, 5: 0.6, 6: 0.0}                      # 0: seen for the first time
    action = {0: (3, 0, 1), 2: (1, 1, 0), 3: (2, 0, 1), 5: None, 6: None}                # bucket, size, what was done
    for i, value in mean.items():
        emb.aux.loss[i] = value
        emb.aux.action[i] = 0 if action[i] is None else 1 + 2 * (action[i][0] * 3 + action[i][1]) + action[i][2]
    found = emb.objective(with_losses(losses))
    own = {0: 0.65, 2: 0.2, 3: 0.6, 5: 0.4, 6: (0.9 + 0.2 + 0.6) / 3}
    fall = {i: mean[i] - own[i] for i in (0, 2, 5)}
    typical = sum(fall.values()) / 3
    log = emb.aux.policy().log_softmax(-1)
    expected = -sum((fall[i] - typical) * log[0, action[i][0], action[i][1], action[i][2]] for i in (0, 2)) / 3
    torch.testing.assert_close(found, expected)
    kept = {0: 0.75 * 0.7 + 0.25 * 0.65, 2: 0.75 * 0.5 + 0.25 * 0.2, 3: 0.6, 5: 0.75 * 0.6 + 0.25 * 0.4, 6: own[6]}
    for i in range(9):
        assert float(emb.aux.loss[i]) == pytest.approx(kept.get(i, 0)) and emb.aux.action[i] == 0


@pytest.mark.parametrize("gain", [0.3, -0.3])
def test_the_policy_learns_whether_enlarging_pays(gain):
    """A stand-in for training: losses are lower (or higher) by ``gain`` for ids that just grew."""
    emb = make("esapn(explore=0.5)", sizes=[300, 100])
    emb.aux.policy.requires_grad_(True)
    moved = list(emb.aux.policy.parameters())
    emb.mover = torch.optim.Adam(moved, 0.001)
    rows = torch.stack([torch.arange(300), torch.arange(300) % 100], 1)
    torch.manual_seed(0)
    for _ in range(80):
        emb.aux.level.zero_()
        emb.aux.count.fill_(20)
        emb.aux.used.fill_(800)
        emb.batch = flat = emb.fields.flat(rows)
        emb.aux.loss.fill_(0.7)
        emb.grow()
        emb.batch = flat
        loss = 0.7 - gain * emb.aux.level[flat].float().mean(1) + 0.1 * torch.randn(300)
        emb.move_policy(torch.autograd.grad(emb.objective(with_losses(loss)), moved))
    p = emb.aux.policy().softmax(-1)[:, 4, 0, 1].detach()                # a count of 21: bucket 4
    assert (p > 0.9).all() if gain > 0 else (p < 0.1).all()


def test_actions_by_chance_are_remembered_and_the_likelier_ones_are_taken():
    emb = make("esapn(explore=0.3)", sizes=[4000, 50])
    emb.aux.policy.bias.data[1] = -1.0                                   # enlarging is less likely: e^-1 / (1 + e^-1)
    rows = torch.stack([torch.arange(4000), torch.arange(4000) % 50], 1)
    emb.batch = emb.fields.flat(rows)
    torch.manual_seed(0)
    emb.grow()
    acted, level = emb.aux.action[:4000] > 0, emb.aux.level[:4000].bool()
    assert acted.float().mean() == pytest.approx(0.3, abs=0.03)
    assert level[acted].float().mean() == pytest.approx(float(torch.tensor(-1.0).sigmoid()), abs=0.04)
    assert not level[~acted].any()
    done = emb.aux.action[:4000][acted] - 1                              # a count of 1: bucket 1, size 0
    assert torch.equal(done % 2 == 1, level[acted]) and (done // 2 == 1 * 3 + 0).all()
    assert emb.aux.count[:4000].eq(1).all() and emb.aux.count[4000:].eq(80).all()
    emb.aux.policy.bias.data[1], emb.grows, emb.batch = 1.0, None, emb.fields.flat(rows)
    emb.grow()
    assert emb.aux.level[:4000].float().mean() > 0.9                     # now the likelier one


def test_the_cap_holds_at_every_step_of_a_run(skewed):
    run = run_of("esapn(explore=0.5)", skewed, 0.4, max_epochs=2)
    emb, used, counted = run.emb, [], []
    for step in emb.schedule(run):
        run.execute(step)
        counted.append((step.split, int(emb.aux.count.sum())))
        used.append(int(emb.aux.used))
        assert used[-1] == int(torch.tensor([2, 4, 8])[emb.aux.level.int()].sum()) <= emb.cells
    assert used[0] == 2 * 3020 < used[4] <= used[-1] and emb.cells - used[-1] < 4
    level, count = emb.aux.level.float(), emb.aux.count
    assert level[count > 50].mean() > level[count < 5].mean() + 0.5
    # a training batch is counted when its step is done, and validation rows are not
    assert counted[:4] == [("train", 0), ("valid", 3 * 256), ("train", 3 * 256), ("valid", 6 * 256)]


# --- amtl -------------------------------------------------------------------------------------------------------------

def random_twins(emb, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    for p in emb.aux.twins.parameters():
        p.detach().copy_(scale * torch.randn(p.shape, generator=generator))
    return emb


def test_masks_are_prefixes_forward_and_soft_backward():
    emb = random_twins(make("amtl"), 0.7).train()
    emb.tau = 0.6
    masks = emb.masks()
    scores = emb.aux.twins()
    for f, q in product(range(4), range(64)):
        k = int(scores[f, q].argmax())
        assert torch.equal(masks[f, q].detach(), torch.tensor([1.0] * k + [0.0] * (8 - k)))
    weight = torch.randn(masks.shape)
    found = torch.autograd.grad((masks * weight).sum(), list(emb.aux.twins.parameters()))
    soft = (emb.aux.twins() / 0.6).softmax(-1)
    reach = torch.stack([soft[..., j + 1:].sum(-1) for j in range(8)], -1)               # the share of longer ones
    expected = torch.autograd.grad((reach * weight).sum(), list(emb.aux.twins.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_twins_are_joined_by_frequency_and_read_its_logarithm_and_rank():
    emb = random_twins(make("amtl"))
    twins, bucket = emb.aux.twins, popularity(torch.from_numpy(COUNTS), 2).long()
    scores = twins()
    for f, part in enumerate(bucket.split(SIZES)):
        z = (part - part.double().mean()) / part.double().std(correction=0)
        for i in (0, 3, 7):
            below = (part < part[i]).float().mean() + (part == part[i]).float().mean() / 2
            s = torch.stack([z[i].float(), 2 * below - 1])
            torch.testing.assert_close(twins.attributes[f, part[i]], s, atol=1e-4, rtol=1e-4)
            h, l = (((s @ twins.first[t, f] + twins.shift[t, f]).tanh() @ twins.last[t, f] + twins.bias[t, f])[0]
                    for t in (0, 1))
            a = torch.sigmoid(s[0])
            torch.testing.assert_close(scores[f, part[i]], a * h + (1 - a) * l, atol=1e-4, rtol=1e-4)


def test_the_penalty_weighs_ids_and_begins_at_the_limit():
    emb = random_twins(make("amtl(cells=1000, push=2.0)")).train()
    emb.masks()
    bucket, expected = popularity(torch.from_numpy(COUNTS), 2).split(SIZES), 0
    soft = emb.aux.twins().softmax(-1)
    for f, part in enumerate(bucket):
        for q in part.tolist():
            expected += float((soft[f, q].detach() * torch.arange(9.0)).sum())
    assert expected > 1000
    assert float(emb.penalty().detach()) == pytest.approx(2 * (expected / 1000 - 1), rel=1e-4)
    emb.cells = int(expected) + 1
    assert emb.penalty() == 0


@pytest.mark.parametrize("cells", [3024, 1500, 400, 30, 0])
def test_scores_are_shifted_as_little_as_makes_lengths_fit(cells):
    emb = random_twins(make(f"amtl(cells={cells})"), 0.5)
    z, ids, number = emb.aux.twins().detach().double(), emb.aux.twins.ids, torch.arange(9)

    def total(b):
        return int(((z - b * number).argmax(-1) * ids).sum())

    # lengths change only where two of them score the same
    gap = (z[..., :, None] - z[..., None, :])[ids > 0] / (number[:, None] - number).where(
        number[:, None] != number, torch.tensor(1)).double()
    steps = [0.0] + (gap[gap > 0].unique() + 1e-9).tolist()
    low, high = 0, len(steps) - 1                                        # totals fall along the shifts
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(steps[middle]) <= cells else (middle + 1, high)
    found = emb.decide()
    assert int((found * ids).sum()) == total(steps[low]) <= cells
    assert torch.equal(found[ids > 0], (z - steps[low] * number).argmax(-1)[ids > 0])


def test_what_ships_of_amtl_is_what_was_judged():
    emb = random_twins(make("amtl", 0.4), 0.5).eval()
    emb.before_evaluation()
    before = each_id(emb)
    emb.settle()
    assert torch.equal(each_id(emb.train()), before)                     # lengths stay in the second stage
    assert len(emb.dense_parameters()) == 0
    emb.deploy()
    assert torch.equal(each_id(emb), before) and len(set(emb.allocation().tolist())) > 2


def test_stages_and_temperature_of_amtl():
    emb, run = make("amtl(anneal=0.5)"), FakeRun(steps_per_epoch=8, steps=8)
    seen = [(emb.tau, emb.searching, step.penalty is not None) for step in emb.schedule(run)]
    assert [stage["stage"] for stage in run.stages] == ["train", "fine-tune"]
    assert [tau for tau, *_ in seen[:8]] == pytest.approx([1, 0.75, 0.5, 0.25] + [0.1] * 4)
    assert [rest for _, *rest in seen] == [[True, True]] * 8 + [[False, False]] * 8


def test_amtl_learns_that_a_field_says_nothing(skewed):
    run = run_of("amtl", skewed, 0.15, max_epochs=4)
    run.go()
    held = run.emb.deploy().allocation().float()
    assert held[:2000].mean() > 2 * held[2000:3000].mean() and held[3000:].mean() > 2


# --- auto_emb ---------------------------------------------------------------------------------------------------------

def test_the_mixture_equals_a_plain_layer_per_candidate_and_field():
    emb, ids = shaken(make("auto_emb")).train(), all_ids()[:64]
    search = emb.aux.search
    found = emb(ids)
    flat, weight = emb.fields.flat(ids), search.controller().softmax(-1)
    group = popularity(torch.from_numpy(COUNTS)).long()[flat]
    expected = 0
    for k, (table, matrix) in enumerate(zip(search.tables, search.matrices)):
        x = torch.stack([table.weight[flat[:, f]] @ matrix[f] for f in range(4)], 1)
        x = nn.BatchNorm1d(8, affine=False)(x.view(-1, 8)).view_as(x).tanh()
        expected = expected + torch.stack([weight[f, group[:, f], 0, k] for f in range(4)], 1)[..., None] * x
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert weight.std(1).min() > 0.01                                    # groups differ


def test_the_controller_follows_the_validation_loss(skewed):
    run = run_of("auto_emb", skewed, 0.5)
    emb, moved = run.emb, []
    move = emb.move_controller
    emb.move_controller = lambda gradients: (moved.extend(g.clone() for g in gradients), move(gradients))
    schedule = emb.schedule(run)
    run.execute(next(schedule))
    nn.init.normal_(emb.aux.search.controller.last, std=0.1)
    before = {name: tensor.clone() for name, tensor in emb.state_dict().items()}
    step = next(schedule)
    assert step.split == "valid"
    run.execute(step)
    changed = {name for name, tensor in emb.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"aux.search.controller.{name}" for name in ("embedding", "first", "last", "bias")}
    emb.load_state_dict(before)
    emb.aux.search.running = True
    ids, dense, label = run._last
    loss = F.binary_cross_entropy_with_logits(run.head(emb(ids), dense, ids), label)
    expected = torch.autograd.grad(loss, list(emb.aux.search.controller.parameters()))
    for a, b in zip(moved, expected):
        torch.testing.assert_close(a, b)
    assert expected[0].abs().max() > 0


@pytest.mark.parametrize("cells", [756, 900, 1500, 3024])
def test_groups_take_the_widths_of_the_highest_weight_that_fit(cells):
    sizes = [6, 4]
    cells = cells * 80 // 3024
    counts = np.array([0, 1, 1, 7, 7, 7, 3, 3, 40, 90])
    emb = make(f"auto_emb(cells={cells})", sizes=sizes, counts=counts)
    nn.init.normal_(emb.aux.search.controller.last, generator=torch.Generator().manual_seed(0))
    log = emb.aux.search.shares().detach().double().log()
    groups = {}
    for i, (c, f) in enumerate(zip(counts, [0] * 6 + [1] * 4)):
        groups.setdefault((f, int(np.log2(c + 1))), []).append(i)
    names, best = list(groups), None
    for choice in product(range(3), repeat=len(names)):
        if sum([2, 4, 8][k] * len(groups[g]) for g, k in zip(names, choice)) <= cells:
            value = sum((counts[groups[g]] + 1).sum() * log[g[0], g[1], k] for g, k in zip(names, choice))
            best = max(best or (value, choice), (value, choice))
    emb.choose()
    width = torch.zeros(10, dtype=torch.int32)
    for g, k in zip(names, best[1]):
        width[groups[g]] = [2, 4, 8][k]
    assert emb.deploy().allocation().tolist() == width.tolist()
    if cells == 80:
        assert all(width[groups[g]][0] == [2, 4, 8][int(log[g].argmax())] for g in names)


def test_stages_of_auto_emb():
    emb, run = make("auto_emb"), FakeRun()
    seen = [(run.stages[-1]["stage"], step.split) for step in emb.schedule(run)]
    assert seen == [("search", "train"), ("search", "valid")] * 4 + [("retrain", "train")] * 4
    assert run.stages[0]["shared"] == "auto_emb(first=2, lr=0.001) search" and "search" not in emb.aux._modules
    assert candidates(8, 2) == emb.widths == [2, 4, 8]


# --- where the ideas must pay -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, budget", [("nis", 0.15), ("amtl", 0.15), ("auto_emb", 0.4), ("esapn", 0.4)])
def test_widths_by_popularity_pay_where_frequent_ids_matter(spec, budget, skewed):
    assert margin(spec, skewed, budget, max_epochs=4, patience=3) > 0.03
