"""Claims of retrieval: the paper's own Table 6 makes each hold, changed figures turn each; differences by hand."""
from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from ecstudy import paths
from ecstudy.rag import compare, run
from ecstudy.report.retrieval import PAPER, paper_table6
from ecstudy.study import retrieval_claims as rag
from ecstudy.study.claims import CLAIMS
from ecstudy.study.verdicts import DOES_NOT, HOLDS, UNDECIDED, UNTESTED, Estimate, Item, figure, judge

CLAIMED = [c for c in CLAIMS if c.section == rag.SECTION]
NOMINAL = {3.14: 0.03, 2.99: 0.03, 1.58: 0.016, 1.57: 0.016}


def paper_rows(se=0.003) -> pd.DataFrame:
    """Table 6 as evidence: shares of Full's exact match with a standard error."""
    ours = {theirs: name for name, theirs in PAPER.items()}
    table = paper_table6()
    full = table.loc[table["method"] == "Full", "em"].iloc[0]
    rows = [dict(section=rag.SECTION, dataset="wiki/nq", method=ours[r["method"]], spec=ours[r["method"]], status="ok",
                 budget=NOMINAL.get(r["memory_pct"], r["memory_pct"] / 100), share=r["em"] / full, share_se=se,
                 em=r["em"] / 100, decode_ms=r["decompress_latency_ms_batch1024"], gain_se=se)
            for r in table.to_dict("records") if r["method"] != "Full"]
    rows = pd.DataFrame(rows)
    inner = rows.assign(method="mag_" + rows["method"])[["method", "budget", "em"]]
    rows = rows.merge(inner, on=["method", "budget"], how="left", suffixes=("", "_plain"))
    return rows.assign(gain=rows["em"] - rows["em_plain"])


TURN = {"R1": ("int_quant", "share", 0.9), "R2": ("int_quant", "share", 1.0), "R3": ("pq", "share", 0.5),
        "R4": ("mag_pq", "gain", -0.1), "R5": ("mag_svd", "gain", 0.1), "R6": ("svd", "share", 0.5),
        "R7": ("dedup", "share", 0.9), "R8": ("prune", "share", 0.95), "R9": ("svd", "share", 0.6),
        "R10": ("tt_rec", "decode_ms", 1e-3), "R11": ("prune", "decode_ms", 3.0)}


@pytest.mark.parametrize("c", CLAIMED, ids=lambda c: c.id)
def test_the_papers_table_makes_each_claim_hold_and_other_figures_turn_it(c):
    rows = paper_rows()
    assert c.decide(rows).verdict == HOLDS, c.decide(rows).text
    method, column, value = TURN[c.id]
    turned = rows.assign(**{column: rows[column].where(rows["method"].ne(method), value)})
    assert c.decide(turned).verdict == DOES_NOT, c.decide(turned).text
    assert c.decide(rows.assign(dataset="synthetic_facts/facts")).verdict == UNTESTED
    assert c.decide(rows[rows["method"].eq("rabitq")]).verdict == UNTESTED
    if column != "decode_ms":
        assert c.decide(paper_rows(se=0.5)).verdict == UNDECIDED
        assert c.decide(rows.assign(**{column: np.nan})).verdict == UNTESTED


def test_a_corpus_too_small_for_a_size_leaves_the_verdict_to_the_others():
    c, rows = next(c for c in CLAIMED if c.id == "R3"), paper_rows()
    small = rows[rows["method"].ne("mag_pq")].assign(dataset="small/nq")
    found = c.decide(pd.concat([rows, small]))
    assert found.verdict == HOLDS and found.parts["small/nq"].verdict == UNTESTED
    assert "no rows: MagPQ 3 %" in found.parts["small/nq"].text


def test_estimates_are_judged_by_normal_intervals():
    wide, sharp = (judge([Item("a", Estimate(0.9, se))], 0.8, unit="share") for se in (0.06, 0.04))
    assert wide.verdict == UNDECIDED and sharp.verdict == HOLDS
    assert sharp.low == pytest.approx(0.9 - 1.959964 * 0.04) and sharp.text == "a 90.0 ± 7.8 %"
    assert figure(-0.031, -0.051, -0.011, "points") == "-3.1 ± 2.0 points"
    # one of three below: at a level for three, 2.394 standard errors
    items = [Item("a", Estimate(0.9, 0.001)), Item("b", Estimate(0.9, 0.001))]
    assert judge([*items, Item("c", Estimate(0.8 - 2.39 * 0.01, 0.01))], 0.8).verdict == UNDECIDED
    assert judge([*items, Item("c", Estimate(0.8 - 2.40 * 0.01, 0.01))], 0.8).verdict == DOES_NOT


# -- differences and skew ---------------------------------------------------------------------------------------------

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Five kept runs of 40 questions over 200 passages: Full, svd, mag_svd by norms and by retrievals, and pca lost."""
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    rng, rows = np.random.default_rng(0), []
    for spec, weights, right in [("full", "norms", 32), ("svd", "norms", 20), ("mag_svd", "norms", 24),
                                 ("mag_svd", "retrieved", 30), ("pca", "norms", 8)]:
        run_id = f"{spec}-{weights}"
        em = (np.arange(40) < right).astype(np.float32)
        if spec != "pca":
            ids = np.stack([rng.permutation(200)[:10] for _ in range(40)])
            run._keep(run_id, question=np.arange(40), ids=ids, scores=np.zeros((40, 10)), rank=np.where(em, 1, 0),
                      em=em, f1=em)
        settings = dict(k=10, judge="gold", limit=None, weights=weights, corpus="nowhere", passages=200)
        rows.append(dict(run_id=run_id, section="rag" + "_split" * (weights == "retrieved"), task="rag", method=spec,
                         spec=spec, dataset="wiki/nq", model="span", seed=0, status="ok", decode_ms=1.0,
                         budget=1.0 if spec == "full" else 0.1, settings=json.dumps(settings),
                         **dict.fromkeys(compare.MEASURES, em.mean())))
    return pd.DataFrame(rows)


def test_differences_are_paired_over_questions(runs):
    found = compare.differences(runs, "full", ("em",)).set_index("run")
    assert set(found.index) == {"svd-norms", "mag_svd-norms"}                # pca's answers are lost
    line = found.loc["svd-norms"]
    lost = np.r_[np.zeros(28), -np.ones(12)]                                 # 12 of 40 answers
    half = 1.959964 * lost.std(ddof=1) / np.sqrt(40)
    assert (line["difference"], line["high"] - line["difference"]) == (pytest.approx(-0.3), pytest.approx(half))
    assert (line["value"], line["base_value"], line["count"]) == (pytest.approx(0.5), pytest.approx(0.8), 40)
    grouped = compare.differences(runs, "ungrouped", ("em",))
    assert list(grouped["run"]) == ["mag_svd-norms"] and grouped["difference"][0] == pytest.approx(0.1)
    by = compare.differences(runs, "norms", ("recall_10",))
    assert list(by["run"]) == ["mag_svd-retrieved"] and by["difference"][0] == pytest.approx(0.15)
    spread = runs[runs["spec"].eq("svd")].assign(spec="svd(order='scattered')", run_id="mag_svd-norms")
    moved = compare.differences(pd.concat([runs[runs["spec"].ne("mag_svd")], spread]), "in order", ("em",))
    assert list(moved["base"]) == ["svd-norms"] and moved["difference"][0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="against 'pq'"):
        compare.differences(runs, "pq")


def test_a_share_is_a_ratio_of_means_over_the_same_questions(runs):
    found = compare.shares(compare.differences(runs, "full", ("em", "f1", "recall_10"))).set_index(["run", "measure"])
    own, base = (np.r_[np.ones(n), np.zeros(40 - n)] for n in (20, 32))
    line = found.loc["svd-norms", "em"]
    half = 1.959964 * np.std(own - 0.625 * base, ddof=1) / np.sqrt(40) / 0.8           # delta method, by hand
    assert (line["share"], line["share_half"]) == (pytest.approx(0.625), pytest.approx(half))
    assert found.loc["svd-norms", "recall_10"]["share_half"] == pytest.approx(half)
    assert np.isnan(found.loc["svd-norms", "f1"]["share_half"])                        # not 0 or 1
    # a share near nothing is known well, however uncertain Full is: 0 of 100 against 50 of 100
    table = pd.DataFrame([dict(measure="em", value=v, base_value=b, count=100, difference=v - b,
                               low=v - b - w, high=v - b + w) for v, b, w in
                          [(0.0, 0.5, 1.959964 * (0.25 / 99) ** 0.5), (0.5, 0.5, 0.0), (0.3, 0.0, 0.1)]])
    found = compare.shares(table)
    assert found["share_half"][:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found["share"][:2].tolist() == [0, 1] and found.loc[2, ["share", "share_half"]].isna().all()


def test_the_interval_of_a_share_covers():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        base = rng.random(400) < 0.5
        own = base & (rng.random(400) < 0.4)                                           # true share: 0.4
        d = own.astype(float) - base
        half = 1.959964 * d.std(ddof=1) / 20
        line = compare.shares(pd.DataFrame([dict(measure="em", value=own.mean(), base_value=base.mean(), count=400,
                                                 low=d.mean() - half, high=d.mean() + half)])).iloc[0]
        covered += abs(line["share"] - 0.4) <= line["share_half"]
    assert 0.92 <= covered / 400 <= 0.98


def test_skew_is_of_full_and_beside_chance(runs):
    found = compare.skew(runs)
    assert list(found["order"].unique()) == ["found", "by chance"]           # no corpus, no other questions
    own = found[found["order"] == "found"]
    counts = np.sort(run.retrieved("full-norms", 200))[::-1]
    assert own["retrievals"].iloc[0] == 400 and own["found"].iloc[0] == (counts > 0).sum()
    assert own["occurrence_share"].iloc[0] == pytest.approx(counts[0] / 400) and own["occurrence_share"].iloc[-1] == 1
    curve = compare.curve(np.array([1, 5, 2]), np.array([1, 2, 0]))
    assert curve["occurrence_share"].tolist() == [5 / 8, 7 / 8, 1] and curve["id_share"].iloc[0] == pytest.approx(1 / 3)


def test_published_figures_stand_in_for_what_was_found(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.store, "results", lambda section: runs[runs["section"] == section])
    written = compare.publish("rag")
    assert [p.name for p in written] == ["rag_differences.csv", "rag_skew.csv"]
    before, skew = compare.differences(runs), compare.skew(runs)
    other = skew[skew["order"] == "found"].assign(order="by other questions", occurrence_share=0.5)
    pd.concat([pd.read_csv(written[1]), other]).to_csv(written[1], index=False)
    here = compare.skew(runs)                                                # what was found is here, the corpus is not
    assert here["order"].nunique() == 3 and here.groupby("order")["occurrence_share"].max()["by other questions"] == 0.5
    pd.concat([skew, other.assign(retrievals=1)]).to_csv(written[1], index=False)
    assert compare.skew(runs)["order"].nunique() == 2                        # that is of other runs
    compare.publish("rag")
    for path in (tmp_path / "runs" / "rag").iterdir():
        path.unlink()
    pd.testing.assert_frame_equal(compare.differences(runs), before, check_dtype=False, rtol=1e-5)
    again, skew = (t.sort_values(["order", "id_share"], ignore_index=True) for t in (compare.skew(runs), skew))
    pd.testing.assert_frame_equal(again, skew, check_dtype=False, rtol=1e-5)
    first = written[0].read_text()
    compare.publish("rag")                                                   # again: the same file
    assert written[0].read_text() == first
    evidence = rag.evidence(runs).set_index("method")
    assert evidence.loc["svd", "share"] == pytest.approx(0.625)
    assert evidence.loc["mag_svd", "gain"] == pytest.approx(0.1)


def test_recall_is_evidence_where_nothing_was_read(runs):
    blind = runs.assign(dataset="small/nq", em=np.nan)
    assert set(rag.evidence(pd.concat([runs, blind]))["dataset"]) == {"wiki/nq"}
    for path in (paths.runs() / "rag").glob("*.npz"):
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files if name not in ("em", "f1")}
        np.savez(path, **kept)
    assert rag.evidence(blind).set_index("method").loc["svd", "share"] == pytest.approx(0.625)
