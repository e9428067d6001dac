"""Dedup: planted duplicates, brute force over all pairs of blocks, exact sizes, and a log whose blocks repeat."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import margin, write
from test_contract import Largest

import ecstudy as ec
from ecstudy import models
from ecstudy.budget import full_bytes
from ecstudy.data.cardinalities import FIELDS
from ecstudy.methods._duplicates import Blocks, distinct
from ecstudy.training import Run, Settings
from ecstudy.training.timeline import FakeRun, timeline

CRITEO = [int(n) for n in FIELDS["criteo"][1]]


def repeated(groups: int, copies: int, rows: int, noise: float, dim: int = 8, seed: int = 0):
    """A table in which ``groups`` blocks of ``rows`` rows stand ``copies`` times each, shuffled: (table, group [N])."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(groups).repeat(copies)[torch.randperm(groups * copies, generator=generator)]
    table = torch.randn(groups, rows * dim, generator=generator)[group]
    return (table + noise * (2 * torch.rand(table.shape, generator=generator) - 1)).view(-1, dim), group


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
def test_planted_duplicates_are_all_found_and_nothing_else(rows, noise):
    table, group = repeated(40, 12, rows, noise)
    chosen, place = distinct(Blocks(table, rows), 40, 0.7)
    assert sorted(group[chosen].tolist()) == list(range(40))
    assert torch.equal(group[chosen][place], group)


@pytest.mark.parametrize("kept", [400, 200, 41])
def test_duplicates_go_first(kept):
    table, group = repeated(40, 12, 5, 0.01)
    chosen, place = distinct(Blocks(table, 5), kept, 0.7)
    assert len(chosen) == kept and torch.equal(chosen, chosen.unique())
    assert torch.equal(group[chosen][place], group)                      # no block stands for one of another group
    assert torch.equal(place[chosen], torch.arange(kept))                # what is kept stands for itself


@pytest.mark.parametrize("kept", [1, 2, 3, 17, 100, 250, 499, 500])
def test_exactly_as_many_blocks_stay_as_asked(kept):
    table = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    blocks = Blocks(table, 2)
    chosen, place = distinct(blocks, kept, 0.7)
    assert len(chosen) == kept and torch.equal(place.unique(), torch.arange(kept))
    quartile = blocks.take(torch.arange(500)).kthvalue(6, 1).values      # a block is replaced by an earlier one
    assert (quartile[chosen][place] <= quartile).all()


def test_equal_rows_merge_and_broken_ones_are_named():
    assert len(distinct(Blocks(torch.zeros(90, 4), 1), 3, 1.0)[0]) == 3
    table = torch.ones(90, 4)
    table[7, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        distinct(Blocks(table, 1), 3, 1.0)


def brute_force(table, kept):
    """Merge the two nearest of all representatives again and again: the later one takes the earlier's row."""
    square = torch.cdist(table, table).fill_diagonal_(torch.inf)
    target, alive = torch.arange(len(table)), len(table)
    while alive > kept:
        a, b = divmod(int(square.argmin()), len(table))
        target[target == max(a, b)] = min(a, b)
        square[max(a, b)] = square[:, max(a, b)] = torch.inf
        alive -= 1
    return (table - table[target]).square().sum()


@pytest.mark.parametrize("kept", [300, 150, 60])
def test_replacements_are_about_as_near_as_brute_force_finds_them(kept):
    """Clusters of all sizes; a pairing at random is tens of times further."""
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(50, 16, generator=generator)
    table = (centre[torch.randint(50, (400,), generator=generator)]
             + 0.1 * torch.rand(400, 1, generator=generator) * torch.randn(400, 16, generator=generator))
    chosen, place = distinct(Blocks(table, 1), kept, 0.9)
    ours, best = (table - table[chosen][place]).square().sum(), brute_force(table, kept)
    assert ours < 2 * best < 0.1 * (table - table[torch.randperm(400, generator=generator)]).square().sum()


def test_blocks_never_trained_merge_first():
    table = ec.make("full", 5000, 16).table.weight.detach().clone()
    trained_rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:300] * 5
    table[trained_rows] += 0.2 * torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    chosen, _ = distinct(Blocks(table, 5), 310, 0.9)
    assert len(set(chosen.tolist()) & set((trained_rows // 5).tolist())) == 300


def test_no_pair_of_all_blocks_is_made():
    largest = []
    for number in (1000, 10_000):
        table = torch.randn(number, 8, generator=torch.Generator().manual_seed(3))
        with Largest({table.untyped_storage().data_ptr()}) as seen:
            distinct(Blocks(table, 1), number // 2, 0.7)
        largest.append(seen.largest)
    assert largest[1] < 2 * 10_000 * 90 * 8


@pytest.mark.parametrize("block", [1, 3, 7])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.2])
def test_what_ships_is_rows_of_the_table_at_their_place_in_the_block(block, budget):
    sizes = [400, 29, 3]
    emb = ec.make(f"dedup(block={block})", sizes, 8, budget)
    table = emb.table.weight.detach().clone()
    emb.deploy()
    assert ec.memory(emb) <= int(full_bytes(sizes, 8) * budget)
    ids = torch.stack([torch.arange(400) % n for n in sizes], 1)
    rows, codes, stored = emb(ids), emb.encode(ids), emb.table.weight
    flat = emb.fields.flat(ids)
    assert stored.shape == (emb.kept * block, 8) and torch.equal(codes % block, flat % block)
    number, padded = flat // block, torch.cat([table, table.new_zeros(-len(table) % block, 8)]).view(-1, block * 8)
    assert torch.equal(emb.map.long()[number], codes // block)
    for part in stored.view(emb.kept, -1):
        assert (padded == part).all(1).any()
    assert (padded == stored.view(emb.kept, -1)[emb.map.long()]).all(1).sum() == emb.kept      # these are as they were
    assert torch.equal(rows, stored[codes])


def test_sizes_at_criteo():
    """The paper's block of 10,000 rows leaves three blocks at 0.1 %; the default of 516 rows leaves 65."""
    for spec, budget, kept in (("dedup(block=10000)", 0.001, 3), ("dedup", 0.001, 64), ("dedup", 0.1, 6539)):
        row = ec.weigh(spec, CRITEO, 16, budget)
        assert row["knob"] == pytest.approx(kept, abs=2) and row["training_pct"] == 300
        assert 0.97 * budget < row["inference_pct"] / 100 <= budget or budget == 0.001
    assert not ec.weigh("dedup(block=10000)", CRITEO, 16, 0.0002)["reachable"]     # below one block and the map


@pytest.mark.parametrize("options, text", [("block=0", "block=0: expected 1 to 30 rows"), ("block=31", "block=31"),
                                           ("kept=0", "kept=0: expected 1 to 30 blocks"), ("kept=31", "kept=31"),
                                           ("similarity=0", "similarity=0: expected the share")])
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        ec.make(f"dedup({options})", 30, 4)


def test_a_matrix_is_compressed_without_training(tmp_path):
    table, _ = repeated(30, 10, 1, 0.01)
    emb = ec.compress(table.numpy(), "dedup", 0.2)
    assert torch.dist(emb(torch.arange(300)), table) < 0.02 * table.norm()
    assert len(emb.table.weight) == emb.kept < 60
    np.save(tmp_path / "x.npy", table.numpy())
    for block in (1, 7):
        found = [ec.compress(x, "dedup", 0.4, block=block) for x in (table, table.numpy(), tmp_path / "x.npy")]
        trained = ec.make("dedup", 300, table.shape[1], 0.4, block=block)
        trained.table.load(table)
        for emb in found:
            assert torch.equal(emb(torch.arange(300)), trained.deploy()(torch.arange(300)))
    broken = table.clone()
    broken[77, 1] = float("inf")
    with pytest.raises(ValueError, match="row 77 holds NaN or infinity"):
        ec.compress(broken, "dedup", 0.4)


# --- stages -----------------------------------------------------------------------------------------------------------

def test_the_warm_up_is_that_of_full_and_the_blocks_are_fine_tuned():
    assert [stage for stage, *_ in timeline("dedup")] == ["warm-up", "fine-tune"]
    run, emb = FakeRun(), ec.make("dedup", 300, 8, 0.3)
    for step in emb.schedule(run):
        assert (emb.map is None) == (step.stage == "warm-up")
    assert [stage["shared"] for stage in run.stages] == ["full", None] and run.stages[1]["fresh"]


@pytest.fixture(scope="module")
def blocks_repeat(tmp_path_factory):
    """A field of 4,000 ids in blocks of 8, whose effects follow one of six patterns of signs."""
    rng = np.random.default_rng(6)
    ids = np.stack([rng.integers(0, 4000, 30_000), rng.integers(0, 8, 30_000)], 1)
    pattern = rng.choice([-1, 1], (6, 8))[rng.integers(0, 6, 500)].reshape(-1)
    return write(tmp_path_factory.mktemp("blocks") / "data", [4000, 8], ids, 2.5 * pattern[ids[:, 0]])


def test_fine_tuning_moves_the_shared_blocks(blocks_repeat, tmp_path):
    def run(schedule=None):
        emb = ec.make("dedup(block=8)", blocks_repeat.cardinalities, 8, 0.1)
        head = models.make("wdl", fields=2, dim=8, dense=0, seed=0)
        run = Run(emb, head, blocks_repeat, Settings(lr=0.01, batch=256, max_epochs=1, evals_per_epoch=2),
                  cache=tmp_path, shared_key={})
        run.go()
        return emb, run

    (first, begun), (again, reused) = run(), run()                        # the second one takes the warm-up as it was
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert begun.steps == reused.steps and set(begun.stage_seconds) == {"warm-up", "fine-tune", "between"}
    assert begun.training_bytes == 3 * full_bytes(blocks_repeat.cardinalities, 8)
    warm = next(tmp_path.iterdir())
    with __import__("safetensors").safe_open(str(warm), "pt") as file:
        assert file.get_tensor("emb.table.weight").shape == (4008, 8)
        before = {tuple(row) for row in file.get_tensor("emb.table.weight").tolist()}
    moved = [tuple(row) not in before for row in first.table.weight.tolist()]
    assert np.mean(moved) > 0.9


def test_a_module_between_collapse_and_deployment_is_saved(tmp_path):
    emb = ec.make("dedup(block=3)", [100, 50], 4, 0.4)
    with torch.no_grad():
        emb.collapse()
    ids = torch.stack([torch.arange(100), torch.arange(100) % 50], 1)
    loaded = ec.load(ec.save(emb, tmp_path / "half"))
    assert torch.equal(loaded(ids), emb(ids)) and torch.equal(loaded.deploy()(ids), emb.deploy()(ids))


# --- where the idea pays ----------------------------------------------------------------------------------------------

def test_equal_blocks_pay_where_effects_repeat(blocks_repeat):
    assert margin("dedup(block=8)", blocks_repeat, 0.06) > 0.2


def test_equal_rows_pay_where_effects_are_few(blocks_repeat):
    assert margin("dedup", blocks_repeat, 0.15) > 0.2
