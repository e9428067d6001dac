"""Every memory figure of the paper's Table 5 against weighed bytes: within half a point, or off for a stated reason."""
from __future__ import annotations

import pytest

from ecstudy.registry import get
from ecstudy.report import identities
from ecstudy.report.identities import CLOSE, IDENTITIES, OURS, compare, judge
from ecstudy.report.tables import PAPER_NAMES, paper_table5
from ecstudy.spec import parse

ROWS = paper_table5().to_dict("records")


def known(row) -> str:
    return f"{row['method']}-{row['dataset']}-{row['budget_pct']:g}"


@pytest.mark.parametrize("row", ROWS, ids=known)
def test_weighs_as_the_paper_says_or_for_a_stated_reason(row):
    line = judge(row)
    assert line["verdict"] != "unexplained", line
    assert (line["verdict"] == "differs") == any(line[f"reason_{k}"] for k in ("deployed", "training", "reached"))
    if line["reached"] and line["budget"] is not None:
        assert line["deployed"] <= 100 * line["budget"]                       # a budget is a limit
        if line["verdict"] == "agrees" and line["paper_deployed"] < 10:       # half a point is no test of 0.1 %
            assert line["deployed"] == pytest.approx(line["paper_deployed"], rel=0.1)
            if line["paper_training"] < 100:
                assert line["training"] == pytest.approx(line["paper_training"], rel=0.1, abs=0.05)


def test_all_113_rows_have_an_identity():
    assert len(ROWS) == 113 and {OURS[row["method"]] for row in ROWS} == set(IDENTITIES) == set(PAPER_NAMES)


def test_no_stated_range_is_wider_than_its_rows_need():
    """A range that hid more than it explains would let a method grow unseen."""
    found = compare()
    for method, identity in IDENTITIES.items():
        own = found[(found["method"] == method) & found["reached"] & found["paper_reached"]]
        if not len(own):
            continue
        for kind, differs in (("deployed", identity.deployed_differs), ("training", identity.training_differs)):
            gap = own[kind] - own[f"paper_{kind}"]
            outside = gap[gap.abs() > CLOSE]
            if differs is None:
                assert not len(outside), (method, kind)
                continue
            assert len(outside), f"{method}, {kind}: no row needs the stated difference"
            assert min(outside.min() - 1, -CLOSE) <= differs.low, (method, kind)
            assert differs.high <= max(outside.max() + 1, CLOSE), (method, kind)
            assert len(differs.why) > 20


def test_what_may_be_above_the_paper_is_learned():
    for method, identity in IDENTITIES.items():
        if (differs := identity.deployed_differs) and differs.high > CLOSE:
            assert get(method).learns_size, method


def test_the_papers_formulas_give_the_papers_figures():
    """The words of ``IDENTITIES``, evaluated: one 32-bit word per id is 1/16 of the table, Adam holds two moments."""
    word, paper = 100 / 16, {}
    for row in ROWS:
        paper.setdefault((row["method"], row["budget_pct"]), []).append(row)
    share = {50: 0.10, 10: 0.05, 1: 0.005, 0.1: 0.0005}                       # AdaptEmb: ids with rows of their own
    for (method, budget), rows in paper.items():
        for row in (r for r in rows if r["reached"] != "no"):
            deployed, training = row["reached_pct"], row["train_memory_pct"]
            wanted = {
                "Full": 300, "Dedup": 300, "OptEmbed": 300, "AutoDim": 3 * (2 + 4 + 8 + 16) * word,
                "CompoEmb": 3 * deployed, "TT-Rec": 3 * deployed, "DHE": 3 * deployed, "ROBE": 3 * deployed,
                "MDE": 3 * deployed, "MGQE": 300 + deployed + word, "INT8/16": deployed + 200,
                "ALPT": budget + 200 + 3 * word, "DeepLight": 300 + word, "AutoSrh": 300 + word,
                "AdaptEmb": 3 * (budget - word * share.get(budget, 0)) + word}[method]
            assert training == pytest.approx(wanted, abs=0.75 if method == "TT-Rec" else 0.5), row
            if method == "ALPT":
                assert deployed == pytest.approx(budget + word, abs=0.06)


def test_a_method_that_grew_is_noticed(monkeypatch):
    row = next(r for r in ROWS if r["method"] == "ROBE" and r["dataset"] == "criteo" and r["budget_pct"] == 10)
    true = identities.weighed
    for key, by in (("inference_pct", 0.6), ("training_pct", -0.6)):
        monkeypatch.setattr(identities, "weighed", lambda *a: true(*a) | {key: true(*a)[key] + by})
        assert judge(row)["verdict"] == "unexplained"
    monkeypatch.setattr(identities, "weighed", lambda *a: true(*a) | dict(reachable=False))
    assert judge(row)["verdict"] == "unexplained"


def test_specs_of_the_identities_are_of_their_method():
    for method, identity in IDENTITIES.items():
        assert all(parse(spec).name == method for spec in identity.specs.values())
        budgets = {row["budget_pct"] for row in ROWS if OURS[row["method"]] == method}
        assert set(identity.specs) | set(identity.budgets) <= budgets
