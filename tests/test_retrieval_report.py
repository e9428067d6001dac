"""Figures and tables of retrieval, on rows made by hand."""
from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from ecstudy import report
from ecstudy.report import retrieval


def row(method, budget, em, recall, reached=None, **more):
    full = 4 * 384 * 1000
    return dict(run_id=f"{method}{budget}", task="rag", section="rag", method=method.partition("(")[0], spec=method,
                family="post-training", dataset="made/facts", model="template", dim=384, seed=0, lr=math.nan, batch=0,
                budget=budget, status="ok", reason="", bytes_full=full, bytes_inference=full * (reached or budget),
                em=em, f1=em, **{f"recall_{k}": min(1.0, recall + k / 200) for k in (1, 5, 10, 20, 100)}, seconds=2.0,
                decode_ms=0.5, latency_full_ms=0.25, search_ms=0.1, settings=json.dumps(dict(asked=400))) | more


@pytest.fixture
def rows():
    missed = row("pq", 0.03, math.nan, math.nan, 0.2, status="unreachable", reason="codebooks alone take more")
    return pd.DataFrame([row("full", 1.0, 0.5, 0.5), row("svd", 0.1, 0.4, 0.3), row("svd", 0.03, 0.1, 0.1),
                         row("prune", 0.1, 0.3, 0.25), row("int_quant", 0.25, 0.49, 0.5), missed])


def test_cells_are_in_per_cent_with_intervals_over_questions(rows):
    cells = report.retrieval_cells(rows).set_index(["method", "budget"])
    svd = cells.loc["svd", 0.1]
    assert (svd["em"], svd["reached_pct"], svd["decode_ratio"], svd["asked"]) == (40, pytest.approx(10), 2, 400)
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(160, 400, method="wilson")
    assert svd["em_half"] == pytest.approx(50 * (high - low), rel=1e-4)
    part = report.retrieval_cells(rows.assign(settings=json.dumps(dict(asked=400, read=100)))).iloc[1]
    low, high = proportion_confint(40, 100, method="wilson")
    assert part["em_half"] == pytest.approx(50 * (high - low), rel=1e-4) and part["em_half"] > 1.9 * svd["em_half"]
    assert part["recall_10_half"] == svd["recall_10_half"]
    assert cells.loc["pq", 0.03]["status"] == "unreachable" and math.isnan(cells.loc["pq", 0.03]["em"])


def test_a_figure_is_of_one_corpus_and_reader(rows):
    with pytest.raises(ValueError, match="several datasets.*other/facts"):
        report.quality(pd.concat([rows, rows.assign(dataset="other/facts")]))
    with pytest.raises(ValueError, match="ecstudy rag eval"):
        report.table6(rows.assign(task="ctr"))
    with pytest.raises(ValueError, match="measure 'emm'"):
        report.quality(rows, "emm")
    with pytest.raises(ValueError, match="need a reader"):
        report.quality(rows.assign(em=math.nan))


def test_the_best_compressor_of_a_budget_may_stay_below_it(rows):
    both = pd.concat([rows, rows.assign(dataset="made/others", em=rows["em"] - 0.02)])
    found = report.best_compressors(both)
    lines = found.frame.set_index("Memory")
    assert list(lines.index) == ["at most 25 %", "at most 10 %", "at most 3 %"]
    assert lines["Best"].tolist() == ["INT8/16 (25 %)", "SVD (10 %)", "SVD (3 %)"]
    assert lines.loc["at most 10 %", "exact match"] == "39.0 %" and lines.loc["at most 10 %", "of Full's"] == "79.6 %"
    near = report.best_compressors(pd.concat([rows, rows[rows["method"] == "svd"].assign(
        method="pca", spec="pca", decode_ms=0.1, em=lambda r: r["em"] - 0.005)]))
    assert "PCA (0.1 ms)" in near.frame["of these decodes fastest"].tolist()
    with pytest.raises(ValueError, match="no rows of Full"):
        report.best_compressors(rows[rows["method"] != "full"])


def test_every_method_is_drawn(rows):
    for picture in (report.quality(rows), report.recall_curves(rows), report.retrieval_costs(rows)):
        assert all(name in picture.svg for name in ("SVD", "Pruning", "INT8/16")) and "PQ" not in picture.svg
    assert "Uncompressed vectors reach 50.0 %" in report.quality(rows).alt
    assert "Below 7 % of the memory SVD is best: 10.0 % at 3 %" in report.quality(rows).alt
    assert "at 10 % the best recall@10 is 35.0 % (SVD)" in report.recall_curves(rows).alt


def test_the_table_stands_beside_the_paper(rows):
    html = report.table6(rows).html
    # SVD at 10 %: 31.02 of 41.14; ours 40 of 50
    assert "75.4 % at 10 %" in html and "80.0 %" in html and "16.9 ms" in html
    assert retrieval.paper_cell("svd", 3.0) == pytest.approx((math.nan,) * 3, nan_ok=True)
    assert retrieval.paper_cell("opq", 10)[0] != retrieval.paper_cell("opq", 10)[0]


def test_the_table_of_the_paper_is_whole():
    paper = retrieval.paper_table6()
    assert len(paper) == 24 and set(retrieval.PAPER.values()) == set(paper["method"])
    assert (paper["em"] <= 41.14).all()


def test_a_cell_that_serves_several_budgets_is_one_line(rows):
    again = row("int_quant", 0.5, 0.49, 0.5, reached=0.25)
    assert len(report.table6(pd.concat([rows, pd.DataFrame([again])])).frame) == len(report.table6(rows).frame) == 5
    assert len(report.table6(pd.concat([rows, pd.DataFrame([again | dict(bytes_inference=1e5)])])).frame) == 6


def test_a_panel_of_recall_has_room_for_the_names_of_its_lines(rows):
    names = "svd mag_svd pca pq mag_pq opq pca_pq rq rabitq int4 tt_rec dedup prune".split()
    many = pd.DataFrame([row("full", 1.0, 0.5, 0.5)] + [row(m, 0.1, 0.4, 0.3) for m in names])

    def height(picture):
        return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', picture.svg).group(1))

    assert height(report.recall_curves(many)) > height(report.recall_curves(many[:4])) + 30


def curves(name, first):
    """Ten passages, 100 retrievals: the first holds ``first`` of them, the rest is even; and by chance."""
    parts = []
    for order, share in (("found", first), ("by chance", 0.1)):
        held = np.r_[share, np.full(9, (1 - share) / 9)].cumsum()
        parts.append(pd.DataFrame(dict(dataset=name, order=order, passages=10, retrievals=100, found=10,
                                       id_share=np.arange(1, 11) / 10, occurrence_share=held)))
    return pd.concat(parts, ignore_index=True)


def test_skew_of_retrieval():
    picture = report.retrieval_skew(pd.concat([curves("a/x", 0.73), curves("b/y", 0.1)]))
    assert "a/x: 100 retrievals of 10 passages, a tenth of the passages holds 73 % found, 10 % by chance" in picture.alt
    assert "b/y: 100 retrievals of 10 passages, a tenth of the passages holds 10 % found" in picture.caption
    rare = curves("c/z", 0.4).assign(passages=1000, id_share=np.r_[1:11, 1:11] / 1000)
    rare["found"] = np.where(rare["order"].eq("found"), 10, 120)                # by chance more are found
    few = report.retrieval_skew(rare.sort_values("order", kind="stable"))
    assert "c/z: 100 retrievals of 1,000 passages, a hundredth of the passages holds 100 % found" in few.alt
    with pytest.raises(ValueError, match="no curves"):
        report.retrieval_skew(curves("a", 0.1)[:0])


def test_gains_of_a_split_count_what_is_decided():
    line = dict(against="norms", dataset="a/x", spec="mag_pq", measure="em")
    table = pd.DataFrame([line | dict(budget=0.1, difference=0.02, low=0.01, high=0.03),
                          line | dict(budget=0.03, difference=0.02, low=-0.01, high=0.05)])
    picture = report.split_gains(table)
    assert "Of 2 pairs, splitting by retrievals is better in 1 and worse in 0" in picture.caption
    assert "MagPQ 10 %" in picture.svg and "MagPQ 3 %" in picture.svg
    with pytest.raises(ValueError, match="no differences of 'f1'"):
        report.split_gains(table, "f1")


def test_gains_of_scattered_rows(rows):
    line = dict(against="in order", spec="tt_rec(order='scattered')", measure="recall_10", budget=0.25)
    table = pd.DataFrame([line | dict(dataset="a/x", difference=0.3, low=0.2, high=0.4),
                          line | dict(dataset="a/y", difference=-0.2, low=-0.3, high=-0.1)])
    picture = report.order_gains(table, "recall_10")
    assert "Of 2 pairs, scattering is better in 1 and worse in 1" in picture.caption and "TT-Rec 25 %" in picture.svg
    with pytest.raises(ValueError, match="against 'in order'"):
        report.order_gains(table.assign(against="norms"), "recall_10")


def test_a_share_has_the_interval_of_its_pairs(rows, monkeypatch):
    from ecstudy.rag import compare

    half = 1.959964 * np.std(np.r_[np.zeros(360), -np.ones(40)], ddof=1) / 20
    published = {("svd0.1", "full1.0", "em"): dict(value=0.4, base_value=0.5, difference=-0.1, low=-0.1 - half,
                                                   high=-0.1 + half, count=400)}
    monkeypatch.setattr(compare, "_published", lambda: published)
    own = np.r_[np.ones(160), np.zeros(240)]                             # 40 of Full's 200 answers are lost
    base = np.r_[np.ones(200), np.zeros(200)]
    expected = 100 * 1.959964 * np.std(own - 0.8 * base, ddof=1) / 20 / 0.5
    html = report.table6(rows.assign(settings=json.dumps(dict(asked=400, k=10, judge="gold", weights="norms")))).html
    assert f"80.0 ± {expected:.1f} %" in html.replace("\N{NO-BREAK SPACE}", " ") and "20.0 %" in html


def test_corpus_size_relates_each_corpus_to_its_own_full(rows):
    small = rows.assign(dataset="part/facts", recall_10=rows["recall_10"] * 1.5)
    large = rows.assign(settings=json.dumps(dict(asked=400, passages=9000)))
    small = small.assign(settings=json.dumps(dict(asked=400, passages=900)),
                         recall_10=small["recall_10"].where(small["method"].ne("prune"), 0.55))
    picture = report.corpus_size(large, small)
    # Full .55 and .825; of four cells only prune's share moves: .30/.55 = 54.5 % here, .55/.825 = 66.7 % there
    assert "From 900 to 9,000 passages uncompressed vectors go from 82.5 to 55.0 %" in picture.caption
    assert "changes by +0.0 points" in picture.caption
    with pytest.raises(ValueError, match="method full"):
        report.corpus_size(large, small[small["method"].ne("full")])


def test_each_set_of_questions_gets_its_own_figure(rows):
    two = pd.concat([rows, rows.assign(dataset="made/other")])
    shown = report.each(report.quality, two).html
    assert shown.count("<figure") == 2 and "made/facts" in shown and "made/other" in shown
    part = two.assign(dataset=two["dataset"].str.replace("made", "part"))
    two, part = (t.assign(settings=json.dumps(dict(asked=4, passages=9))) for t in (two, part))
    assert report.each(report.corpus_size, two, small=part).html.count("Hollow: part/") == 2
    with pytest.raises(ValueError, match="no rows of retrieval"):
        report.each(report.quality, rows[:0])
