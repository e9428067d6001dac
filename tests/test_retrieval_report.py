"""Figures and tables of retrieval, on rows made by hand."""
from __future__ import annotations

import json
import math

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


def test_skew_of_retrieval():
    picture = report.retrieval_skew({"even": np.ones(1000), "one": np.eye(1, 1000)[0]})
    assert "even 1 %" in picture.alt and "one 100 %" in picture.alt and "passages" in picture.alt
    with pytest.raises(ValueError, match="nothing was retrieved"):
        report.retrieval_skew({"none": np.zeros(5)})
