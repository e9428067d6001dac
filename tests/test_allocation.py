"""Numbers per id: each method's own count against what its deployed module looks up, and the summary by hand."""
from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import ecstudy as ec
from ecstudy.fields import Fields
from ecstudy.maps import MarkedIds, SortedIds
from ecstudy.measure import allocation
from ecstudy.method import Method
from ecstudy.registry import names
from ecstudy.sparse import FORMATS, SparseTable
from ecstudy.study.row import COLUMNS, TEXT

SIZES, DIM = [50, 20, 8, 300], 16
COUNTS = np.concatenate([np.arange(size)[::-1] // 4 for size in SIZES])
TELL = ["full", "top_k", "adapt_emb", "deeplight", "autosrh", "mde", "auto_dim", "opt_embed", "fiited", "ada_embed",
        "nis", "esapn", "amtl", "auto_emb", "mag_prune", "pep", "sseds", "ham", "memcom", "cafe", "double_hash"]


def make(spec, sizes=SIZES, budget=0.4, counts=None):
    counts = COUNTS if counts is None else counts
    needs = any(spec.startswith(name) for name in ("top_k", "adapt_emb", "autosrh", "mgqe"))
    if spec == "full":
        budget = None
    return ec.make(spec, sizes, DIM, budget, seed=0, counts=counts if needs else None).deploy()


def looked_up(emb) -> torch.Tensor:
    """Vectors of all ids, the fields one after the other [n, D]."""
    rows = torch.arange(max(emb.fields.sizes))
    out = emb(torch.stack([rows % size for size in emb.fields.sizes], 1))
    return torch.cat([out[:size, f] for f, size in enumerate(emb.fields.sizes)]).detach()


@pytest.mark.parametrize("spec", [*TELL[:5], "opt_embed", "adapt_emb(dynamic=True)"])
def test_a_method_counts_what_its_module_looks_up(spec):
    emb = make(spec)
    if spec.startswith("adapt_emb"):                         # without training, new rows are copies of shared ones
        torch.nn.init.normal_(emb.table.weight)
    held, vectors = emb.allocation(), looked_up(emb)
    assert held.dtype == torch.int32 and held.shape == (378,)
    if spec.startswith(("top_k", "adapt_emb")):              # a vector nobody else has is a row of the id's own
        _, inverse, count = torch.unique(vectors, dim=0, return_inverse=True, return_counts=True)
        assert held.tolist() == (DIM * (count[inverse] == 1)).tolist() and 0 < int((held == 0).sum()) < 378
    else:
        assert held.tolist() == vectors.ne(0).sum(1).tolist()
    if spec in ("deeplight", "autosrh"):
        assert int(held.sum()) == emb.kept and held.float().std() > 0


def test_a_whole_field_counts_as_its_own_and_a_shared_row_as_nobodys():
    emb = make("top_k", [5, 4], 0.7, np.array([9, 8, 7, 0, 0, 9, 8, 7, 1]))
    # six of nine rows in all: four of the most frequent ids, and one row for all others of each field
    assert emb.top == 4 and emb.allocation().tolist() == [16, 16, 0, 0, 0, 16, 16, 0, 0]
    five = make("top_k", [5, 4], 0.95, np.array([9, 8, 7, 0, 0, 9, 8, 7, 1]))       # the fourth id is alone on its row
    assert five.top == 6 and five.allocation().tolist() == [16, 16, 16, 0, 0, 16, 16, 16, 16]


@pytest.mark.parametrize("spec", ["deeplight(kept=2000)", "opt_embed(cells=1500)"])
def test_integers_count_like_the_floats_they_stand_for(spec):
    a, b = (ec.make(s, SIZES, DIM, None, seed=0).deploy().allocation() for s in (spec, f"{spec}|int8"))
    assert a.tolist() == b.tolist() and 0 < int(a.sum()) < 378 * DIM


@pytest.mark.parametrize("spec", ["mde", "auto_dim(widths=[16, 8, 4, 2])"])
def test_widths_per_field_are_numbers_per_id(spec):
    emb = make(spec, budget=None if "(" in spec else 0.4)
    widths = (emb.rows if spec == "mde" else emb.mixed).widths
    expected = [w for w, size in zip(widths, SIZES) for _ in range(size)]
    assert emb.allocation().tolist() == expected and len(set(widths)) > 1
    array = (emb.rows if spec == "mde" else emb.mixed).array
    assert array.shape[0] - DIM < sum(expected) <= array.shape[0]                   # what is stored, padding apart


def test_opt_embed_gives_dropped_ids_nothing():
    emb = ec.make("opt_embed(widths=[16, 8, 4, 2], rows=[50, 20, 8, 300])", SIZES, DIM, None, seed=0)
    kept = torch.cat([torch.arange(25), torch.arange(60, 70), torch.arange(378 - 100, 378)])
    emb.aux.kept.fill(kept)
    emb.rows = [25, 10, 0, 100]
    held = emb.deploy().allocation()
    expected = torch.zeros(378, dtype=torch.int32)
    expected[:25], expected[60:70], expected[278:] = 16, 8, 2
    assert held.tolist() == expected.tolist() == looked_up(emb).ne(0).sum(1).tolist()


def test_most_methods_do_not_tell():
    assert {n for n in names(trains=True) if ec.registry.get(n).allocation is not Method.allocation} == {
        *TELL}
    assert allocation(make("hash_trick"), COUNTS) is None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows, width, kept", [(300, 16, 900), (300, 16, 40), (33, 10, 330), (20, 3, 0), (1, 16, 5)])
def test_values_per_row_of_every_form(form, rows, width, kept):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    weight[rows // 2:rows // 2 + rows // 6] *= 50                                   # rows kept whole beside each other
    table = SparseTable.of(weight, kept, form)
    keep = weight.abs().flatten().argsort(descending=True)[:kept]
    expected = torch.bincount(keep // width, minlength=rows)
    assert table.per_row(block=7).tolist() == table.per_row().tolist() == expected.tolist()


@pytest.mark.parametrize("form", [SortedIds, MarkedIds])
def test_marked_ids_of_both_forms(form):
    ids = torch.tensor([0, 3, 64, 65, 199])
    found = form(200, 5)
    found.fill(ids)
    assert found.marked(200, block=9).nonzero().view(-1).tolist() == ids.tolist()


class Planted(Method):
    """Holds any numbers that a test says."""

    def __init__(self, sizes, held):
        super().__init__(Fields(sizes), DIM)
        self.held, self.deployed = torch.as_tensor(held, dtype=torch.int32), True

    def allocation(self):
        return self.held


def test_summary_by_hand():
    counts = np.array([0, 0, 1, 1, 2, 3, 3, 4, 7, 8])
    found = allocation(Planted([4, 6], [0, 2, 4, 4, 0, 8, 16, 16, 16, 5]), counts)
    bins = found["bins"]
    assert bins["low"] == [0, 1, 2, 4, 8] and bins["high"] == [0, 1, 3, 7, 15] and bins["ids"] == [2, 2, 3, 2, 1]
    assert bins["mean"] == [1, 4, 8, 16, 5]
    assert bins["q10"] == [0, 4, 0, 16, 5] and bins["q50"] == [0, 4, 8, 16, 5] and bins["q90"] == [2, 4, 16, 16, 5]
    assert found["fields"] == dict(cardinality=[4, 6], mean=[2.5, pytest.approx(61 / 6, abs=1e-6)])
    assert found["ids"] == 10 and found["mean"] == pytest.approx(7.1)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_summary_against_brute_force(block, monkeypatch):
    monkeypatch.setattr(sys.modules[allocation.__module__], "BLOCK", block)
    rng = np.random.default_rng(3)
    counts = rng.zipf(1.5, 500).clip(max=5000) - 1
    held = np.minimum(rng.poisson(2 + np.log1p(counts)), DIM)
    sizes = [100, 1, 250, 149]
    found = allocation(Planted(sizes, held), counts)
    assert found["spearman"] == pytest.approx(spearmanr(held, counts).statistic, abs=1e-12)
    bins = found["bins"]
    assert sum(bins["ids"]) == 500
    for i, (low, high) in enumerate(zip(bins["low"], bins["high"])):
        own = held[(counts >= low) & (counts <= high)]
        assert bins["ids"][i] == len(own) > 0 and bins["mean"][i] == pytest.approx(own.mean(), abs=1e-6)
        for q in (10, 50, 90):
            assert bins[f"q{q}"][i] == np.quantile(own, q / 100, method="inverted_cdf")
    parts = np.split(held, np.cumsum(sizes)[:-1])
    assert found["fields"]["mean"] == pytest.approx([p.mean() for p in parts], abs=1e-6)


def test_equal_numbers_have_no_correlation_and_mistakes_are_named():
    assert allocation(make("full"), COUNTS)["spearman"] is None
    assert allocation(Planted([3], [1, 2, 3]), np.array([5, 5, 5]))["spearman"] is None
    with pytest.raises(ValueError, match=r"counts of shape \(3,\): expected \[378\]"):
        allocation(make("full"), np.ones(3, dtype=int))
    with pytest.raises(ValueError, match="not deployed"):
        allocation(ec.make("full", SIZES, DIM, None), COUNTS)


def test_a_row_holds_it_as_json_and_old_rows_do_without():
    assert COLUMNS[-1] == "allocation" and "allocation" in TEXT
    from ecstudy.study.row import frame

    found = allocation(make("deeplight"), COUNTS)
    row = frame([dict(run_id="a", allocation=found), dict(run_id="b")])
    assert json.loads(row["allocation"][0]) == found and row["allocation"][1] == ""


def test_a_run_leaves_it_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    from planted import write, zipf_ids

    from ecstudy.study.row import Cell
    from ecstudy.training import run_cell

    rng = np.random.default_rng(0)
    ids = np.stack([zipf_ids(rng, 200, 3000), rng.integers(0, 10, 3000)], 1)
    data = write(tmp_path / "data", [200, 10], ids, np.sin(ids[:, 0]))
    cell = Cell("deeplight", str(tmp_path / "data"), dim=8, budget=0.3, lr=0.01, batch=256, max_epochs=1,
                evals_per_epoch=1, model="wdl")
    found = run_cell(cell)["allocation"]
    assert found["ids"] == 210 and sum(found["bins"]["ids"]) == 210 and -1 <= found["spearman"] <= 1
    assert sum(found["bins"]["ids"][i] for i, low in enumerate(found["bins"]["low"]) if low == 0) == int(
        (np.asarray(data.counts) == 0).sum())
    assert run_cell(Cell("hash_trick", str(tmp_path / "data"), dim=8, budget=0.3, batch=256, max_epochs=1,
                         evals_per_epoch=1, model="wdl"))["allocation"] is None
