"""The list of ablations: one choice at a time, the study's own first, and rows that find their comparison again."""
from __future__ import annotations

import json

import pytest

from ecstudy.spec import parse
from ecstudy.study import CellError, ablations, results, run, store
from ecstudy.study.ablations import ABLATIONS, plan

DATA = "synthetic_criteo_xs"
FAST = dict(batch=2048, evals_per_epoch=1, patience=1, max_epochs=0.1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    from ecstudy import paths

    data = paths.data()
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    if data.is_dir():                              # generated data made before is used, not made again
        (tmp_path / "data").symlink_to(data)
    return tmp_path


def test_the_first_variant_is_the_study_itself():
    for ablation in ABLATIONS:
        first = ablation.variants[0]
        assert (first.spec, first.data, first.settings) == ("{}", "", {}), ablation.name
        assert len({v.label for v in ablation.variants}) == len(ablation.variants) > 1
    assert len(set(ablations.names())) == len(ABLATIONS)


def test_one_choice_at_a_time():
    planned = plan(DATA, seeds=[3], **FAST)
    by = {(p.ablation.name, p.variant.label, p.base, p.at): p.cell for p in planned}
    assert len(by) == len(planned)
    for p in planned:
        first = by[p.ablation.name, p.ablation.variants[0].label, p.base, p.at]
        same = {k: v for k, v in vars(first).items() if not k.startswith("_")}
        differs = {k for k in ("method", "dataset", "schedule", "select", "lr", "batch", "model", "seed")
                   if same[k] != getattr(p.cell, k)}
        assert len(differs) == (p.cell != first), (p, differs)
    assert not [p for p in planned if p.variant.data]                  # variants of this data are not prepared
    kept = by["deeplight_final", "as published", "deeplight", 0.01]
    assert kept.budget is None and "kept=" in kept.method and "final=False" in kept.method
    with pytest.raises(CellError, match="ablation 'tt_innit'.*tt_init"):
        plan(DATA, only=["tt_innit"])


def test_rows_are_measured_once_and_found_again(home):
    rows = ablations.run(DATA, only=["robe_block", "selection"], seeds=[0], **FAST)
    assert set(rows["status"]) == {"ok"} and set(rows["ablation"]) == {"robe_block", "selection"}
    assert len(rows) == 4 * 2 + 5 * 2
    twice = rows[(rows["spec"] == "robe") & (rows["budget"] == 0.1)]
    assert sorted(twice["ablation"]) == ["robe_block", "selection", "selection"]
    assert twice["run_id"].nunique() == 2                              # selection on test is a run of its own
    assert {json.loads(s)["select"] for s in twice["settings"]} == {"valid", "test"}
    assert (rows["at"].isna() == False).all()                          # noqa: E712
    before = store.rows()
    again = ablations.run(DATA, only=["robe_block", "selection"], seeds=[0], missing="skip", **FAST)
    assert store.rows() == before and again["run_id"].tolist() == rows["run_id"].tolist()
    assert not len(ablations.run(DATA, only=["int8_scale"], seeds=[0], missing="skip", **FAST))
    assert set(results("ablation")["run_id"]) == set(rows["run_id"])


def test_deeplight_as_published_holds_more_than_was_asked(home):
    rows = ablations.run(DATA, only=["deeplight_final"], seeds=[0], **FAST)
    rows = rows[rows["at"] == 0.01].set_index("variant")
    asked = parse(rows.loc["as published", "spec"]).options["kept"]
    published, ours = (json.loads(rows.loc[v, "bytes_breakdown"]) for v in ("as published", "pruned to the budget"))
    assert rows.loc["as published", "bytes_inference"] > rows.loc["pruned to the budget", "bytes_inference"]
    assert max(published.values()) > max(ours.values())
    assert asked * 4 <= rows.loc["pruned to the budget", "budget_bytes"]


def test_a_saved_deeplight_that_was_not_pruned_loads(tmp_path):
    import torch

    import ecstudy as ec

    emb = ec.make("deeplight(kept=10, final=False)", [30, 20], 4)
    dense = emb.table.weight.detach().clone()
    emb.deploy()
    assert emb.kept == int(dense.count_nonzero()) > 10
    ec.save(emb, tmp_path / "e.safetensors")
    ids = torch.tensor([[0, 1], [29, 19]])
    assert torch.equal(ec.load(tmp_path / "e.safetensors")(ids), emb(ids))


def test_selecting_on_test_rows_is_another_run(home):
    ours = run(method="full", dataset=DATA, **FAST)
    theirs = run(method="full", dataset=DATA, select="test", **FAST)
    assert ours["run_id"] != theirs["run_id"]
