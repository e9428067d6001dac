"""Figures of models, dimensions, allocation, latency, ablations and the explorer: numbers by hand from planted rows."""
from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as xml

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from ecstudy import report
from ecstudy.report import impact, picture
from ecstudy.study.row import frame

FULL_BYTES, LIMIT = 64_000, 6_400
T2 = 4.302653                                            # t(0.975, 2 degrees of freedom)


def run(method, budget, seed, auc, *, family="inter-feature", status="ok", model="dlrm", dim=16, **more) -> dict:
    ok = status == "ok"
    share = 1.0 if method == "full" else budget if budget < 1 else budget / (FULL_BYTES * dim / 16)
    return dict(
        run_id=f"{method}-{budget}-{seed}-{model}-{dim}-{more.get('spec')}", section="dlrm", task="ctr", method=method,
        spec=method, family=family, dataset="synthetic_test", model=model, dim=dim, budget=budget, seed=seed, lr=0.001,
        batch=128, status=status, reason="", auc=auc if ok else None, valid_auc=auc if ok else None,
        budget_bytes=None if method == "full" else LIMIT, bytes_full=FULL_BYTES * dim / 16,
        bytes_inference=FULL_BYTES * dim / 16 * share, bytes_training=3 * FULL_BYTES * dim / 16 * share, seconds=10.0,
        latency_ms=0.6, latency_full_ms=0.4, device="cpu", threads=1, commit="abc", created="2026-01-01") | more


def texts(svg: str) -> set[str]:
    return {"".join(e.itertext()).strip() for e in xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def whole(shown) -> None:
    """What every figure must be: XML, ink of the page, read out, with rows and command under it."""
    xml.fromstring(shown.svg)
    html = shown._repr_html_()
    assert picture.INK not in html and "currentColor" in html and 'role="img"' in html
    assert "data:text/csv" in html and "papermill x" in html and len(shown.alt) > 60 and "nan" not in shown.alt
    assert "nan" not in shown.caption and "synthetic_test" in shown.alt + shown.caption


# -- models ----------------------------------------------------------------------------------------------------------

AUC = {"dlrm": dict(full=0.80, compo=0.79, robe=0.78, hash_trick=0.75),
       "wdl": dict(full=0.78, compo=0.77, robe=0.775, hash_trick=0.74)}


@pytest.fixture
def by_model() -> pd.DataFrame:
    rows = []
    for model, auc in AUC.items():
        for seed, off in enumerate((-0.002, 0.0, 0.002)):
            for m, a in auc.items():
                a += off - (0.001 * seed if m == "robe" else 0)
                rows += [run(m, b, seed, a, model=model) for b in ((1.0,) if m == "full" else (0.1, 0.01))]
    return frame(rows)


def test_models_are_compared_by_their_gap_to_their_own_full(by_model):
    shown = report.models(by_model, command="papermill x")
    whole(shown)
    assert {"CompoEmb", "ROBE", "Hash", "DLRM", "WDL", "10 %", "1 %"} <= texts(shown.svg)
    assert "Full" not in texts(shown.svg)                              # Full is the zero line
    # robe under wdl: 0.775 - 0.78 - mean(0, 1, 2) / 1000
    assert "at 10 %: DLRM CompoEmb -0.0100, WDL ROBE -0.0060" in shown.alt
    assert "DLRM 0.8000, WDL 0.7800" in shown.caption


def test_models_say_what_is_missing(by_model):
    with pytest.raises(ValueError, match="no rows to report"):
        report.models(frame([]))
    with pytest.raises(ValueError, match="the model 'wdl' alone"):
        report.models(by_model[by_model["model"] == "wdl"])
    with pytest.raises(ValueError, match="no finished row of 'full' under wdl"):
        report.models(by_model[(by_model["model"] == "dlrm") | (by_model["method"] != "full")])
    with pytest.raises(ValueError, match="several dims"):
        report.models(pd.concat([by_model, by_model.assign(dim=32)]))
    with pytest.raises(ValueError, match="none of the"):
        report.models(by_model.assign(status="failed"))


def test_rank_agreement_is_kendalls(by_model):
    shown = report.rank_agreement(by_model, command="papermill x")
    line = shown.frame.set_index("budget").loc[0.1]
    # dlrm: compo, robe, hash; wdl: robe, compo, hash. Two pairs of three agree.
    means = [[AUC["dlrm"]["compo"], AUC["dlrm"]["robe"] - 0.001, AUC["dlrm"]["hash_trick"]],
             [AUC["wdl"]["compo"], AUC["wdl"]["robe"] - 0.001, AUC["wdl"]["hash_trick"]]]
    assert line["tau"] == pytest.approx(1 / 3) == pytest.approx(kendalltau(*means).statistic)
    assert line["methods"] == 3 and (line["model_a"], line["model_b"]) == ("dlrm", "wdl")
    assert -1 <= line["low"] <= line["tau"] + 1e-9 and line["tau"] - 1e-9 <= line["high"] <= 1
    assert "DLRM and WDL" in shown.html and "0.33" in shown.html and "nan" not in shown.html.lower()
    with pytest.raises(ValueError, match="alone"):
        report.rank_agreement(by_model[by_model["model"] == "wdl"])
    with pytest.raises(ValueError, match="three methods"):
        report.rank_agreement(by_model[by_model["method"].isin(["full", "compo"])])


# -- dimensions ------------------------------------------------------------------------------------------------------

@pytest.fixture
def by_dim() -> pd.DataFrame:
    rows = []
    for dim, gain in ((16, 0.0), (32, 0.5), (64, 1.0)):
        for seed in range(3):
            rows += [run("full", 1.0, seed, 0.80, dim=dim, family="baseline"),
                     run("deeplight", LIMIT, seed, 0.78 + gain * (0.01 + seed / 1000), dim=dim, family="intra-feature"),
                     run("autosrh", LIMIT, seed, 0.79 + gain * 0.005, dim=dim, family="intra-feature"),
                     run("top_k", LIMIT, seed, 0.785, dim=dim, family="baseline"),
                     run("compo", LIMIT, seed, 0.77 - gain * 0.004, dim=dim)]
        rows += [run("mde", LIMIT, s, 0.7, dim=dim, family="intra-feature",
                     status="ok" if dim < 64 else "unreachable") for s in range(3)]
    return frame(rows)


def test_dimensions_at_fixed_bytes(by_dim):
    shown = report.dimensions(by_dim, command="papermill x")
    whole(shown)
    assert {"DeepLight", "AutoSrh", "CompoEmb", "Top-k", "MDE", "Full", "16", "32", "64"} <= texts(shown.svg)
    assert "CompoEmb -0.0040 to DeepLight +0.0110" in shown.alt and "6,400 bytes" in shown.alt
    only = by_dim[(by_dim["dim"] == 16)]
    with pytest.raises(ValueError, match="dimension 16 alone"):
        report.dimensions(only)
    with pytest.raises(ValueError, match=r"several limits \[6400, 9000\] bytes"):
        report.dimensions(pd.concat([by_dim, only[only["method"] == "compo"].assign(budget_bytes=9000)]))
    with pytest.raises(ValueError, match="no rows with a limit in bytes"):
        report.dimensions(by_dim[by_dim["method"] == "full"])


def test_gains_are_paired_and_grouped_by_what_methods_look_at(by_dim):
    shown = report.dimension_gains(by_dim, command="papermill x")
    found = shown.frame.set_index(["aware", "method"])
    line = found.loc[("importance-aware", "deeplight")]
    assert line["gain"] == pytest.approx(0.011) and line["seeds"] == 3
    assert line["gain_half"] == pytest.approx(T2 * np.std([0.010, 0.011, 0.012], ddof=1) / math.sqrt(3), rel=1e-5)
    assert found.loc[("importance-aware", ""), "gain"] == pytest.approx((0.011 + 0.005) / 2)
    assert found.loc[("importance-aware", ""), "gain_half"] == pytest.approx(line["gain_half"] / 2, rel=1e-5)
    assert found.loc[("frequency-aware", "top_k"), "gain"] == pytest.approx(0)
    assert found.loc[("static", ""), "gain"] == pytest.approx(-0.004)          # mde did not reach 64
    assert math.isnan(found.loc[("static", "mde"), "gain"]) and (">/<" in shown.html)
    assert "0.7800" in shown.html and "0.7910" in shown.html and "+0.0110 ± 0.0025" in shown.html


# -- allocation ------------------------------------------------------------------------------------------------------

def told(mean, rho, low=(0, 1, 2, 4)):
    return json.dumps(dict(ids=100, mean=3.0, spearman=rho, bins=dict(
        low=list(low), high=[max(2 * v - 1, 0) for v in low], ids=[10, 50, 30, 10], mean=mean, q10=[0] * 4,
        q50=mean, q90=[16] * 4), fields=dict(cardinality=[10, 90], mean=[mean[-1], mean[0]])))


@pytest.fixture
def who() -> pd.DataFrame:
    rows = [run("full", 1.0, 0, 0.8), run("compo", 0.1, 0, 0.8)]
    rows += [run("autosrh", 0.1, s, 0.79, family="intra-feature", allocation=told([1 + s, 2, 4, 8 + s], 0.5 + 0.1 * s))
             for s in range(2)]
    return frame([*rows, run("mde", 0.1, 0, 0.79, family="intra-feature", allocation=told([4] * 4, None))])


def test_allocation_against_occurrences(who):
    shown = report.allocation(who, command="papermill x")
    whole(shown)
    assert {"AutoSrh: rank correlation +0.55", "MDE: all ids alike", "numbers per id"} <= texts(shown.svg)
    assert "AutoSrh from 1.5 for the rarest to 8.5 for the most frequent" in shown.alt     # means over two seeds
    assert "CompoEmb" not in shown.alt
    kept = shown.rows.set_index(["method", "seed", "low"])                  # what the CSV under the figure holds
    assert len(kept) == 3 * 4 and kept.loc[("autosrh", 1, 4), "mean"] == 9 and kept["q90"].eq(16).all()
    fields = report.allocation_fields(who, command="papermill x")
    whole(fields)
    assert "AutoSrh 8.5 in the smallest field, 1.5 in the largest" in fields.alt


def test_allocation_takes_the_smallest_dimension_unless_told(who):
    both = pd.concat([who, who.assign(dim=32)])
    assert "dimension 16" in report.allocation(both).alt and "dimension 32" in report.allocation(both, dim=32).alt


def test_allocation_refuses_what_it_cannot_draw(who):
    with pytest.raises(ValueError, match=r"autosrh at several budgets \[0.1, 0.01\]; choose one"):
        report.allocation(pd.concat([who, who[who["method"] == "autosrh"].assign(budget=0.01)]))
    with pytest.raises(ValueError, match="says who got the parameters"):
        report.allocation(who.assign(allocation=""))
    with pytest.raises(ValueError, match="says who got the parameters"):
        report.allocation(who.drop(columns="allocation"))              # rows of an older file
    with pytest.raises(ValueError, match="no rows to report"):
        report.allocation(frame([]))


# -- latency ---------------------------------------------------------------------------------------------------------

def test_latency_is_a_geometric_mean_with_the_interval_of_logarithms():
    ms = [0.4, 0.8, 1.6]                                               # ratios 1, 2, 4
    rows = [run("full", 1.0, s, 0.8, latency_ms=0.4) for s in range(3)]
    rows += [run("compo", 0.1, s, 0.79, latency_ms=ms[s]) for s in range(3)]
    rows += [run("robe", b, 0, 0.79, latency_ms=0.2) for b in (0.1, 0.01)]
    rows = frame(rows)
    found = impact.latency(rows).set_index("method")
    assert found.loc["compo", "ratio"] == pytest.approx(2)
    half = T2 * math.log(2) / math.sqrt(3)
    assert found.loc["compo", "low"] == pytest.approx(2 * math.exp(-half), rel=1e-5)
    assert found.loc["compo", "high"] == pytest.approx(2 * math.exp(half), rel=1e-5)
    assert found.loc["robe", "ratio"].tolist() == pytest.approx([0.5, 0.5]) and found.loc["robe", "low"].isna().all()
    shown = report.latency_against_bytes(rows, command="papermill x")
    whole(shown)
    assert {"CompoEmb", "ROBE", "Full", "MiB"} <= texts(shown.svg)
    assert "slowest: CompoEmb at 10 %, 2×" in shown.alt and "ROBE" in shown.alt
    with pytest.raises(ValueError, match="latency beside Full"):
        report.latency_against_bytes(rows.assign(latency_full_ms=np.nan))
    with pytest.raises(ValueError, match="several models"):
        report.latency_against_bytes(pd.concat([rows, rows.assign(model="wdl")]))


# -- ablations -------------------------------------------------------------------------------------------------------

@pytest.fixture
def choices() -> pd.DataFrame:
    rows = [run("tt_rec", b, s, 0.78 + 0.001 * s) for b in (0.1, 0.01) for s in range(3)]
    rows += [run("tt_rec", b, s, 0.77 + 0.003 * s, spec="tt_rec(init='paper')") for b in (0.1, 0.01) for s in range(3)]
    rows += [run("tt_rec", 0.1, 7, 0.1, spec="tt_rec(init='paper')")]                 # a seed that the other side lacks
    return frame(rows)


PAIR = dict(label="TT-Rec: initial scale", a="tt_rec", b="tt_rec(init='paper')", a_label="free", b_label="published")


def test_an_ablation_is_paired_by_seed_and_budget(choices):
    found = impact.ablated(choices, [PAIR])
    assert found["budget"].tolist() == [0.1, 0.01] and found["seeds"].tolist() == [3, 3]
    change = np.array([-0.010, -0.008, -0.006])
    assert found["difference"].tolist() == pytest.approx([-0.008] * 2)
    assert found["half"].iloc[0] == pytest.approx(T2 * change.std(ddof=1) / math.sqrt(3), rel=1e-5)
    assert found["auc_a"].iloc[0] == pytest.approx(0.781) and found["auc_b"].iloc[0] == pytest.approx(0.773)
    shown = report.ablation(choices, [PAIR], command="papermill x")
    whole(shown)
    assert {"TT-Rec: initial scale:", "published − free", "TT-Rec, 10 %", "0.7810 → 0.7730"} <= texts(shown.svg)
    assert "-0.0080 ± 0.0050" in shown.alt
    table = report.ablation_table(choices, [PAIR], command="papermill x")
    assert "-0.0080 ± 0.0050" in table.html and "free" in table.html


def test_pairs_come_from_the_rows_of_the_ablations(choices):
    spec = choices["spec"] == "tt_rec"
    rows = choices.assign(ablation="tt_init", base="tt_rec", at=choices["budget"],
                          variant=np.where(spec, "free of the rank", "as published"))
    found = impact.ablated(rows)
    assert found["label"].unique().tolist() == ["TT-Rec: initial scale"]
    assert found["a_label"].iloc[0] == "free of the rank"
    assert found["difference"].tolist() == pytest.approx([-0.008] * 2)
    asked = report.ablation_questions(rows).html
    assert "Does TT-Rec fall with more memory because" in asked and "published code: the standard" in asked
    assert asked.count("<dt>") == 1
    with pytest.raises(ValueError, match="no rows of the list"):
        report.ablation_questions(choices)
    by_column = dict(label="data", a=dict(variant="free of the rank"), b=dict(variant="as published"))
    assert impact.ablated(rows, [by_column])["difference"].iloc[0] == pytest.approx(-0.008)


def test_of_several_learning_rates_an_ablation_takes_the_best_on_validation(choices):
    tempting = choices[choices["spec"] == "tt_rec"].assign(lr=0.1, auc=0.99, valid_auc=0.5)
    assert impact.ablated(pd.concat([tempting, choices]), [PAIR])["auc_a"].iloc[0] == pytest.approx(0.781)


def test_ablations_name_mistakes(choices):
    with pytest.raises(ValueError, match="no rows to report"):
        report.ablation(frame([]))
    with pytest.raises(ValueError, match="pairs is missing"):
        report.ablation(choices)
    with pytest.raises(ValueError, match="no column 'colour'"):
        report.ablation(choices, [dict(PAIR, a=dict(colour=1))])
    with pytest.raises(ValueError, match="expected label, a and b"):
        report.ablation(choices, [dict(label="x", a="tt_rec")])
    with pytest.raises(ValueError, match="none of 1 pairs"):
        report.ablation(choices, [dict(PAIR, b="robe")])


# -- the explorer ----------------------------------------------------------------------------------------------------

def parts(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.S).group(1))


def test_explorer_holds_every_cell_and_asks_nobody(by_model):
    rows = by_model[by_model["model"] == "dlrm"]
    html = report.explorer(rows, command="make study", script="../plotly.min.js").html
    assert "http" not in re.sub(r"base64,[^\"]*", "", html) and 'src="../plotly.min.js"' in html
    data = parts(html)
    traces = {t["name"]: t for t in data["figure"]["data"]}
    assert set(traces) == {"Full", "CompoEmb", "ROBE", "Hash"}
    assert traces["CompoEmb"]["x"] == pytest.approx([1, 10]) and traces["CompoEmb"]["y"] == pytest.approx([0.79] * 2)
    hover = traces["ROBE"]["text"][1]
    for said in ("budget 10 %", "3 seeds", "AUC − Full -0.0210", "1.5× Full's (cpu)"):
        assert said in hover
    order = [t["name"] for t in data["figure"]["data"]]
    robe = data["values"][order.index("ROBE")]
    assert robe["latency_ratio"] == pytest.approx([1.5, 1.5]) and robe["gap"] == pytest.approx([-0.021] * 2)
    assert set(data["x"]) <= set(robe) and set(data["y"]) <= set(robe)
    assert data["figure"]["layout"]["xaxis"]["type"] == "log" and "template" not in data["figure"]["layout"]
    assert "<noscript>" in html and html.count("<tr>") == 7 and "data:text/csv" in html and "make study" in html
    assert 'aria-label="Interactive figure of 7 cells of 4 methods' in html


def test_explorer_keeps_the_looks_of_the_other_figures(by_model):
    from ecstudy.report.style import looks

    rows = by_model[by_model["model"] == "dlrm"]
    look = looks(rows)["robe"]
    trace = next(t for t in parts(report.explorer(rows).html)["figure"]["data"] if t["name"] == "ROBE")
    assert trace["marker"]["color"] == look.color
    slow = parts(report.explorer(rows.assign(latency_ms=40.0)).html)["figure"]["data"][0]
    assert min(slow["marker"]["size"]) > max(trace["marker"]["size"])              # slower is larger


def test_explorer_refuses_mixed_and_empty_rows(by_model):
    with pytest.raises(ValueError, match="several models"):
        report.explorer(by_model)
    with pytest.raises(ValueError, match="no rows to report"):
        report.explorer(frame([]))
    with pytest.raises(ValueError, match="none of the"):
        report.explorer(by_model[by_model["model"] == "wdl"].assign(status="diverged"))


def test_a_text_cannot_end_the_explorers_script(by_model):
    rows = by_model[by_model["model"] == "dlrm"]
    html = report.explorer(rows.assign(device="</script><b>")).html
    assert "</script><b>" not in html and parts(html)["values"]
