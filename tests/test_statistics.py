"""What is said of rows: every statistic against hand computation, another library, brute force or simulation."""
from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ecstudy import report
from ecstudy.measure import auc, components, delong_covariance, delong_paired, paired
from ecstudy.report.significance import cliques
from ecstudy.study import statistics as S
from ecstudy.study import store
from ecstudy.study.row import CellError, frame, plain


def run(method, budget, seed, auc, *, lr=0.001, status="ok", valid=None, **more) -> dict:
    ok = status == "ok"
    return dict(run_id=f"{method}-{budget}-{seed}-{lr}" + "".join(map(str, more.values())), section="dlrm", task="ctr",
                method=method, spec=method, family="baseline" if method == "full" else "inter-feature",
                dataset="synthetic_test", model="dlrm", dim=16, budget=budget, seed=seed, lr=lr, status=status,
                auc=auc, valid_auc=(auc if valid is None else valid) if ok else None, data_fingerprint="f00",
                created="2026-01-01T00:00:00+00:00") | more


FULL = [run("full", 1.0, s, a) for s, a in enumerate((0.80, 0.81, 0.82))]


def line(table: pd.DataFrame, method: str, budget: float = 0.1) -> pd.Series:
    found = table[table["method"].eq(method) & table["budget"].eq(budget)]
    assert len(found) == 1
    return found.iloc[0]


def brute(label, scores):
    """AUCs and DeLong's covariance [M, M] from all pairs, O(m n)."""
    label, scores = np.asarray(label, dtype=bool), np.asarray(scores, dtype=float)
    wins = [(s[label][:, None] > s[~label]) + 0.5 * (s[label][:, None] == s[~label]) for s in scores]
    covariance = lambda axis, n: np.atleast_2d(np.cov([w.mean(axis=axis) for w in wins])) / n
    return [w.mean() for w in wins], covariance(1, label.sum()) + covariance(0, (~label).sum())


def scored(n=300, models=2, seed=0, gap=0.0, seeds=1, own=0.3):
    """Labels [n] and scores [models, seeds, n]: models share the rows' noise, seeds add theirs."""
    random = np.random.default_rng(seed)
    label = random.random(n) < 0.3
    common = random.normal(size=n) + label
    scores = [[common + gap * i * label + own * random.normal(size=n) for _ in range(seeds)] for i in range(models)]
    return label, np.array(scores)


# -- DeLong ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ties", [False, True])
def test_covariance_is_that_of_all_pairs(ties):
    label, scores = scored(models=3)
    scores = np.round(scores[:, 0]) if ties else scores[:, 0]
    areas, covariance = delong_covariance(label, scores)
    by_hand, expected = brute(label, scores)
    assert areas == pytest.approx(by_hand, abs=1e-12) and covariance == pytest.approx(expected, rel=1e-9)
    got = delong_paired(label, scores[0], scores[1])
    assert got.se ** 2 == pytest.approx(expected[0, 0] + expected[1, 1] - 2 * expected[0, 1], rel=1e-9)


def test_over_seeds_components_are_averaged():
    label, scores = scored(seeds=3, gap=0.2)
    got = delong_paired(label, scores[0], scores[1])
    _, covariance = brute(label, scores.reshape(6, -1))
    weights = np.array([1, 1, 1, -1, -1, -1]) / 3                 # variance of a linear combination of six AUCs
    assert got.se ** 2 == pytest.approx(weights @ covariance @ weights, rel=1e-9)
    assert got.difference == pytest.approx(np.mean([auc(label, a) - auc(label, b) for a, b in zip(*scores)]), abs=1e-12)
    assert delong_paired(label, scores[0][:1], scores[1][:1]) == delong_paired(label, scores[0][0], scores[1][0])
    one = delong_paired(label, scores[0][0], scores[1][0])
    assert paired(label, components(label, scores[0][0]) - components(label, scores[1][0])) == one
    with pytest.raises(ValueError, match="3 and 2 seeds"):
        delong_paired(label, scores[0], scores[1][:2])


def test_error_over_seeds_is_the_bootstraps():
    label, scores = scored(n=600, seeds=2, gap=0.3)
    random, drawn = np.random.default_rng(1), []
    hits, misses = np.flatnonzero(label), np.flatnonzero(~label)
    for _ in range(600):                                         # rows resampled within classes, alike for all models
        rows = np.concatenate([random.choice(hits, len(hits)), random.choice(misses, len(misses))])
        drawn.append(np.mean([auc(label[rows], a[rows]) - auc(label[rows], b[rows]) for a, b in zip(*scores)]))
    assert delong_paired(label, *scores).se == pytest.approx(np.std(drawn), rel=0.1)


# -- tests of one difference -------------------------------------------------------------------------------------------

def test_p_values_are_those_of_statsmodels():
    from statsmodels.stats.weightstats import ttost_paired

    a, b = np.array([0.8012, 0.8107, 0.8198, 0.805]), np.array([0.80, 0.81, 0.82, 0.805])
    gap = a - b
    se = gap.std(ddof=1) / 2
    assert S.equivalence(gap.mean(), se, 3) == pytest.approx(ttost_paired(a, b, -0.001, 0.001)[0], rel=1e-9)
    assert S.two_sided(gap.mean(), se, 3) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert S.two_sided(1.96, 1.0, math.inf) == pytest.approx(0.0499958, rel=1e-5)
    assert S.two_sided(0.0, 0.0, 2) == 1 and S.two_sided(0.01, 0.0, 2) == 0
    assert S.equivalence(0.0005, 0.0, 2) == 0 and S.equivalence(0.002, 0.0, 2) == 1
    assert math.isnan(S.two_sided(0.1, math.nan, 2)) and math.isnan(S.equivalence(0.1, math.nan, 2))


def test_holm_by_hand():
    got = S.holm([0.01, 0.04, math.nan, 0.03, 0.005])            # R: p.adjust(c(.01, .04, .03, .005), "holm")
    assert got[[0, 1, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(got[2])
    assert np.isnan(S.holm([math.nan])).all() and len(S.holm([])) == 0
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).random(12) ** 3
    assert S.holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_degrees_of_freedom_of_two_sources():
    assert S.combined(3.0, 4.0, 3) == pytest.approx((5.0, 2 * (25 / 9) ** 2))
    assert S.combined(3.0, 0.0, 4) == (3.0, 3.0)                 # seeds make all the error: Student's
    assert S.combined(0.0, 4.0, 3) == (4.0, math.inf)            # rows make all of it: the normal
    assert all(math.isnan(v) for v in S.combined(3.0, math.nan, 3))


def test_interval_of_both_sources_covers_and_that_of_seeds_does_not():
    """Differences with an effect of seeds, of rows and of both together; the truth is 0. Three seeds."""
    random, hits, narrow = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        rows, seeds, both = random.normal(), random.normal(size=3), 0.5 * random.normal(size=3)
        gaps = rows + seeds + both                               # true error of the rows' part: 1 + 0.25 / 3
        of_seeds = gaps.std(ddof=1) / math.sqrt(3)
        se, df = S.combined(of_seeds, math.sqrt(1 + 0.25 / 3), 3)
        hits += abs(gaps.mean()) <= stats.t.ppf(0.975, df) * se
        narrow += abs(gaps.mean()) <= stats.t.ppf(0.975, 2) * of_seeds
    assert 0.94 <= hits / 2000 <= 0.99                           # on the wide side, as the docstring says
    assert narrow / 2000 < 0.9


# -- learning rates ----------------------------------------------------------------------------------------------------

def test_the_rate_is_chosen_by_the_mean_over_common_seeds():
    runs = [run("robe", 0.1, s, 0.7, lr=0.001, valid=v) for s, v in enumerate((0.70, 0.72, 0.99))]
    runs += [run("robe", 0.1, s, 0.9, lr=0.01, valid=v) for s, v in enumerate((0.73, 0.70))]
    kept = S.chosen(frame(runs))
    assert kept["lr"].unique().tolist() == [0.01] and len(kept) == 2      # 0.715 > 0.71 over seeds 0 and 1
    tempting = [run("robe", 0.1, s, 0.999, lr=0.1, valid=0.6) for s in range(3)]
    assert S.chosen(frame(runs + tempting))["lr"].unique().tolist() == [0.01]


def test_a_tuned_sweep_compares_rates_on_its_first_seed():
    runs = [run("robe", 0.1, 0, 0.7, lr=lr, valid=v) for lr, v in ((0.001, 0.71), (0.01, 0.74), (0.1, 0.73))]
    runs += [run("robe", 0.1, s, 0.7, lr=0.01, valid=0.5) for s in (1, 2)]
    runs += [run("robe", 0.01, 0, 0.6, lr=lr, valid=v) for lr, v in ((0.001, 0.7), (0.01, 0.6))]
    kept = S.chosen(frame(runs))
    assert kept.groupby("budget")["lr"].unique().map(list).to_dict() == {0.1: [0.01], 0.01: [0.001]}
    assert len(S.best_by_validation(frame(runs))) == 4


def test_rates_without_finished_runs_lose_and_divergence_counts_as_chance():
    runs = [run("robe", 0.1, s, 0.6, lr=0.001, valid=0.6) for s in range(2)]
    runs += [run("robe", 0.1, 0, 0.7, lr=0.01, valid=0.65), run("robe", 0.1, 1, None, lr=0.01, status="diverged")]
    runs += [run("robe", 0.1, s, None, lr=0.1, status="failed") for s in range(2)]
    assert S.chosen(frame(runs))["lr"].unique().tolist() == [0.001]       # (0.65 + 0.5) / 2 < 0.6
    lost = frame([run("tt_rec", 0.1, 0, None, lr=lr, status="diverged") for lr in (0.001, 0.01)])
    assert len(S.chosen(lost)) == 2
    tie = frame([run("robe", 0.1, 0, 0.7, lr=lr) for lr in (0.1, 0.001)])
    assert S.chosen(tie)["lr"].tolist() == [0.001]
    apart = frame([run("robe", 0.1, s, 0.7, lr=lr, valid=v) for s, lr, v in ((0, 0.001, 0.7), (1, 0.01, 0.8))])
    assert S.chosen(apart)["lr"].tolist() == [0.01]                       # no common seed: each by its own
    assert S.chosen(frame([])).empty


# -- contrasts ---------------------------------------------------------------------------------------------------------

def test_contrast_by_hand():
    rows = frame(FULL + [run("robe", 0.1, s, a) for s, a in ((2, 0.818), (0, 0.799), (1, 0.807))])
    got = line(S.contrasts(rows), "robe")
    gaps = np.array([-0.001, -0.003, -0.002])
    assert got["difference"] == pytest.approx(-0.002) and got["sd"] == pytest.approx(0.001) and got["seeds"] == 3
    assert got["half"] == pytest.approx(4.3026527 * 0.001 / math.sqrt(3), rel=1e-6)
    assert (got["low"], got["high"]) == pytest.approx((-0.002 - got["half"], -0.002 + got["half"]))
    assert got["p_difference"] == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, rel=1e-6)
    assert got["p_difference_holm"] == got["p_difference"] and got["p_equivalence"] > 0.5
    assert got["sources"] == "seeds" and got["df"] == 2 and math.isnan(got["rows_se"]) and math.isnan(got["total_low"])
    assert got["verdict"] == "undecided"                                  # p 0.074


def test_verdicts_and_the_family_of_holm():
    near = [run("near", 0.1, s, f["auc"] + 1e-5 * s) for s, f in enumerate(FULL)]
    good = [run("good", 0.1, s, f["auc"] + 0.01 + 1e-4 * s) for s, f in enumerate(FULL)]
    bad = [run("bad", 0.1, s, f["auc"] - 0.01 - 1e-4 * s) for s, f in enumerate(FULL)]
    alone = [run("bad", 0.5, s, f["auc"] - 0.01 - 1e-4 * s) for s, f in enumerate(FULL)]
    table = S.contrasts(frame(FULL + near + good + bad + alone))
    assert [line(table, m)["verdict"] for m in ("near", "good", "bad")] == ["equivalent", "better", "worse"]
    family = table[table["budget"].eq(0.1)]
    assert family["p_difference_holm"].tolist() == pytest.approx(S.holm(family["p_difference"]).tolist())
    assert line(table, "bad", 0.5)["p_difference_holm"] == line(table, "bad", 0.5)["p_difference"]
    assert line(table, "bad")["p_difference_holm"] > line(table, "bad")["p_difference"]
    other = S.contrasts(frame(FULL + near + [r | dict(model="wdl", run_id=r["run_id"] + "w") for r in FULL + near]))
    assert (other["p_difference_holm"] == other["p_difference"]).all() and len(other) == 2


def test_edges_of_contrasts():
    same = [run("same", 0.1, s, f["auc"]) for s, f in enumerate(FULL)]
    less = [run("less", 0.1, s, f["auc"] - 0.005) for s, f in enumerate(FULL)]
    once = [run("once", 0.1, 0, 0.8), run("other", 0.1, 7, 0.8)]
    part = [run("part", 0.1, 0, 0.79), run("part", 0.1, 1, 0.80), run("part", 0.1, 9, 0.99)]
    lost = [run("lost", 0.1, s, None, status="unreachable") for s in range(3)]
    table = S.contrasts(frame(FULL + same + less + once + part + lost))
    assert line(table, "same")["verdict"] == "equivalent" and line(table, "same")["half"] == 0
    assert line(table, "less")["verdict"] == "worse" and line(table, "less")["p_difference"] == 0
    for name, seeds in (("once", 1), ("other", 0)):
        got = line(table, name)
        assert got["verdict"] == "undecided" and got["seeds"] == seeds and math.isnan(got["p_difference_holm"])
        assert math.isnan(got["half"]) and math.isnan(got["sd"])
    assert line(table, "part")["seeds"] == 2 and line(table, "part")["difference"] == pytest.approx(-0.01)
    got = line(table, "lost")
    assert got["status"] == "unreachable" and got["verdict"] == "" and math.isnan(got["difference"])
    assert tuple(table.columns) == S.CONTRAST and S.contrasts(frame([])).empty
    assert "full" not in set(table["method"])


def test_another_reference_is_compared_at_its_own_budget():
    runs = [run("robe", b, s, 0.7 + b) for b in (0.1, 0.5) for s in range(2)]
    runs += [run("hash_trick", b, s, 0.69 + b) for b in (0.1, 0.5) for s in range(2)]
    table = S.contrasts(frame(FULL + runs), reference="hash_trick")
    assert table[table["method"].eq("robe")]["difference"].tolist() == pytest.approx([0.01, 0.01])
    assert line(table, "full", 1.0)["seeds"] == 0


@pytest.mark.parametrize("bad, match", [(dict(sources="rows"), "unknown sources"), (dict(margin=0), "margin 0"),
                                        (dict(level=95), "level 95")])
def test_bad_options_of_contrasts(bad, match):
    with pytest.raises(CellError, match=match):
        S.contrasts(frame(FULL), **bad)


def test_false_verdicts_are_rare():
    """Four methods as good as Full: after Holm at most one family in twenty may claim a difference."""
    random, wrong = np.random.default_rng(5), 0
    for _ in range(1000):
        gaps = random.normal(0, 0.002, (4, 3))
        p = [S.two_sided(g.mean(), g.std(ddof=1) / math.sqrt(3), 2) for g in gaps]
        wrong += (S.holm(p) < 0.05).any()
    assert 0.02 <= wrong / 1000 <= 0.07


# -- test logits -------------------------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of its own, test labels of a data set and logits of three seeds of two methods."""
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    label, scores = scored(n=500, seeds=3, gap=0.15)
    scores = scores.astype(np.float32)
    test = SimpleNamespace(label=label.astype(np.uint8))
    data = SimpleNamespace(fingerprint="f00", split=lambda name: {"test": test}[name])
    monkeypatch.setattr("ecstudy.data.open_dataset", lambda name: data)
    runs = []
    for (method, budget), own in zip((("full", 1.0), ("robe", 0.1)), scores):
        for seed, score in enumerate(own):
            runs.append(run(method, budget, seed, auc(label, score)))
            store.write_logits(runs[-1]["run_id"], score)
    return SimpleNamespace(path=tmp_path, label=label, scores=scores, rows=frame(runs), runs=runs)


def test_logits_come_back_as_they_were(home):
    assert np.array_equal(store.logits("robe-0.1-0-0.001"), home.scores[1, 0])
    folder = home.path / "runs" / "logits"
    assert len(list(folder.iterdir())) == 6 and store.logits("nothing") is None
    (folder / "broken.npy").write_bytes(b"no array")
    assert store.logits("broken") is None
    np.save(folder / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert store.logits("pickle") is None
    label, logit = S.test_logits(home.rows.iloc[-1])
    assert np.array_equal(label, home.label) and auc(label, logit) == home.rows["auc"].iloc[-1]


def test_contrast_with_logits_adds_the_error_of_rows(home):
    got = line(S.contrasts(home.rows), "robe")
    rows_se = delong_paired(home.label, home.scores[1], home.scores[0]).se
    assert got["rows_se"] == pytest.approx(rows_se, rel=1e-9)
    se, df = S.combined(got["sd"] / math.sqrt(3), rows_se, 3)
    assert (got["se"], got["df"], got["sources"]) == (pytest.approx(se), pytest.approx(df), "seeds+rows")
    assert got["total_high"] == pytest.approx(got["difference"] + stats.t.ppf(0.975, df) * se)
    assert got["p_difference"] == pytest.approx(2 * stats.t.sf(abs(got["difference"]) / se, df))
    seeds = line(S.contrasts(home.rows, sources="seeds"), "robe")
    assert seeds["sources"] == "seeds" and seeds["df"] == 2 and seeds["rows_se"] == got["rows_se"]


@pytest.mark.parametrize("spoil", ["missing", "other", "short", "data"])
def test_logits_of_another_run_or_data_are_not_used(home, spoil, monkeypatch):
    if spoil == "missing":
        (home.path / "runs" / "logits" / "full-1.0-1-0.001.npy").unlink()
    elif spoil == "other":
        store.write_logits("full-1.0-1-0.001", home.scores[0, 0])
    elif spoil == "short":
        store.write_logits("full-1.0-1-0.001", home.scores[0, 1][:-1])
    else:
        home.rows["data_fingerprint"] = "f01"
    got = line(S.contrasts(home.rows), "robe")
    assert math.isnan(got["rows_se"]) and got["sources"] == "seeds"


def test_published_contrasts_stand_in_for_logits(home):
    for row in home.runs:
        store.write(plain(row))
    path = S.publish_contrasts("dlrm")
    assert path == home.path / "results" / "contrasts.csv"
    before = line(S.contrasts(home.rows), "robe")
    for file in (home.path / "runs" / "logits").iterdir():
        file.unlink()
    after = line(S.contrasts(home.rows), "robe")
    assert after["rows_se"] == pytest.approx(before["rows_se"], rel=1e-5) and after["sources"] == "seeds+rows"
    fewer = home.rows[home.rows["seed"].lt(2)]                           # other runs: that error is not theirs
    assert math.isnan(line(S.contrasts(fewer), "robe")["rows_se"])
    again = path.read_bytes()
    assert S.publish_contrasts("dlrm").read_bytes() == again              # nothing lost without logits
    kept = S.read_contrasts(path)
    assert tuple(kept.columns) == S.CONTRAST and line(kept, "robe")["seeds"] == 3
    assert len(store.rows()) == 6                                         # contrasts are no rows
    with pytest.raises(CellError, match="nothing to publish"):
        S.publish_contrasts("other")
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CellError, match="not a table of contrasts"):
        S.contrasts(home.rows)


def test_a_run_leaves_logits_that_its_comparison_uses(tmp_path, monkeypatch):
    """Two seeds of two methods, trained; then the command that publishes their differences."""
    from typer.testing import CliRunner

    from ecstudy.cli import app
    from ecstudy.data.layout import DatasetWriter
    from ecstudy.study import sweep

    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    random = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data" / "tiny", name="tiny", fields=["a", "b"], cardinalities=[50, 70]) as writer:
        for split in ("train", "valid", "test"):
            ids = np.stack([random.integers(0, 50, 200), random.integers(0, 70, 200)], 1)
            writer.append(split, ids, None, (ids[:, 0] + random.integers(0, 50, 200) > 50).astype(int))
    rows = sweep("full,hash_trick".split(","), 0.5, dataset="tiny", seeds=[0, 1], max_epochs=1, progress=False)
    assert (rows["status"] == "ok").all() and len(rows) == 4
    for row in rows.to_dict("records"):
        label, logit = S.test_logits(row)
        assert logit.dtype == np.float32 and auc(label, logit) == pytest.approx(row["auc"], abs=1e-14)
    got = line(S.contrasts(rows), "hash_trick", 0.5)
    assert got["sources"] == "seeds+rows" and got["rows_se"] > 0 and got["seeds"] == 2
    done = CliRunner().invoke(app, ["results", "--section", "dlrm", "--contrasts", str(tmp_path / "c.csv")])
    assert done.exit_code == 0 and "1 differences" in done.output, done.output
    assert line(S.read_contrasts(tmp_path / "c.csv"), "hash_trick", 0.5)["rows_se"] == got["rows_se"]
    done = CliRunner().invoke(app, ["results", "-m", "full", "--contrasts", str(tmp_path / "c.csv")])
    assert done.exit_code == 2 and "leave out --method" in done.output


# -- ranks -------------------------------------------------------------------------------------------------------------

def blocks(values: dict[str, list[float]]) -> pd.DataFrame:
    return frame(FULL + [run(m, 0.1, 0, v, model=f"m{i}") for m, own in values.items() for i, v in enumerate(own)
                         if v is not None])


def test_ranks_are_scipys_and_the_critical_difference_demsars():
    random = np.random.default_rng(3)
    values = {m: (0.7 + 0.01 * i + 0.01 * random.normal(size=8)).tolist() for i, m in enumerate("abcd")}
    found = S.ranks(blocks(values | {"gone": [0.9] * 7}))
    expected = stats.friedmanchisquare(*values.values())
    assert (found.statistic, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    by_hand = np.mean([stats.rankdata([-v for v in block]) for block in zip(*values.values())], axis=0)
    assert found.average[list(values)].tolist() == pytest.approx(by_hand.tolist())
    assert found.critical == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 8)), rel=1e-3)     # Demsar 2006, table 5
    assert found.left_out == ("gone",) and found.average.is_monotonic_increasing and len(found.auc) == 8


def test_ranks_refuse_too_little():
    with pytest.raises(S.TooFew, match="5 blocks.*at least 6"):
        S.ranks(blocks({m: [0.7] * 5 for m in "abc"}))
    with pytest.raises(S.TooFew, match="2 methods reached all 6"):
        S.ranks(blocks({"a": [0.7] * 6, "b": [0.7] * 6, "c": [0.7] * 5}))
    with pytest.raises(S.TooFew, match="0 blocks"):
        S.ranks(frame([]))
    alike = S.ranks(blocks({m: [0.7] * 6 for m in "abc"}))
    assert alike.p == 1 and alike.average.tolist() == [2, 2, 2]


def test_cliques():
    assert cliques([1.0, 1.5, 3.0, 3.2], 1.0) == [(0, 1), (2, 3)]
    assert cliques([1.0, 1.5, 2.0, 3.0], 1.0) == [(0, 2), (2, 3)]
    assert cliques([1.0, 3.0], 1.0) == [] and cliques([1.0, 1.1, 1.2], 2) == [(0, 2)]


@pytest.mark.parametrize("levels", [None, 3])
def test_tau_is_scipys(levels):
    a, b = np.random.default_rng(0).normal(size=(2, 20, 7))
    if levels:
        a, b = np.round(a), np.round(b)
    assert S.tau_b(a, b) == pytest.approx([stats.kendalltau(x, y).statistic for x, y in zip(a, b)], nan_ok=True)


def test_rank_agreement_of_two_settings():
    def setting(order, noise, model):
        random = np.random.default_rng(len(model))
        return frame([run(m, b, s, 0.7 + 0.01 * order.index(m) + noise * random.normal(), model=model)
                      for m in order for b in (0.1, 0.5) for s in range(3)] + FULL[:0])

    same = S.kendall(setting("abcde", 1e-6, "dlrm"), setting("abcde", 1e-6, "wdl"))
    assert same["tau"].tolist() == pytest.approx([1, 1, 1]) and same["budget"].tolist()[:2] == [0.5, 0.1]
    assert np.allclose(same[["low", "high"]], 1) and same["methods"].eq(5).all()
    turned = S.kendall(setting("abcde", 1e-6, "dlrm"), setting("edcba", 1e-6, "wdl"))
    assert turned["tau"].tolist() == pytest.approx([-1, -1, -1]) and turned["p"].iloc[0] == pytest.approx(2 / 120)
    noisy = S.kendall(setting("abcde", 0.02, "dlrm"), setting("abcde", 0.02, "wdl"))
    assert (noisy["low"] < noisy["high"]).all() and noisy["tau"].between(-1, 1).all()
    pd.testing.assert_frame_equal(noisy, S.kendall(setting("abcde", 0.02, "dlrm"), setting("abcde", 0.02, "wdl")))
    one = setting("abcde", 0.0, "dlrm")
    single = S.kendall(one[one["seed"].eq(0)], one)
    assert np.allclose(single["tau"], 1) and single["low"].isna().all()
    short = pd.concat([one, frame([run("z", 0.1, 0, 0.9), run("z", 0.5, 0, 0.9)])])
    assert S.kendall(short, short)["methods"].eq(5).all()                 # z has one seed, the others three
    with pytest.raises(S.TooFew, match="three methods"):
        S.kendall(one, setting("ab", 0.0, "wdl"))
    with pytest.raises(CellError, match="several models"):
        S.kendall(pd.concat([one, one.assign(model="dcn")]), one)


# -- figures -----------------------------------------------------------------------------------------------------------

def test_figures_say_what_the_contrasts_say():
    near = [run("robe", 0.1, s, f["auc"] + 1e-5 * s) for s, f in enumerate(FULL)]
    bad = [run("compo", b, s, f["auc"] - 0.01 - 1e-4 * s) for b in (0.1, 0.01) for s, f in enumerate(FULL)]
    lost = [run("robe", 0.01, s, None, status="unreachable") for s in range(3)]
    rows = frame(FULL + near + bad + lost)
    forest = report.equivalence(rows, command="make it")
    assert "10 %: 1 equivalent, 1 worse" in forest.alt and "1 %: 1 worse" in forest.alt
    assert forest.svg.count(">worse<") == 2 and forest.svg.count(">equivalent<") == 1 and "3 seeds" in forest.caption
    table = report.contrasts_table(rows)
    assert "\N{MINUS SIGN}0.0101" in table.html and ">/<" in table.html and tuple(table.frame.columns) == S.CONTRAST
    with pytest.raises(ValueError, match="nothing to draw"):
        report.equivalence(frame(FULL))
    several = [run(m, 0.1, 0, 0.7 + 0.01 * i * (-1) ** j, model=f"m{j}") for i, m in enumerate(("robe", "compo", "dpq"))
               for j in range(6)]
    diagram = report.critical_difference(frame(several))
    assert "6 blocks" in diagram.alt and "ROBE 2.00" in diagram.alt
    assert "1 block (" in report.critical_difference(frame(several[:1] + several[6:7]))._repr_html_()


def test_table_of_learning_rates():
    runs = [run("robe", 0.1, 0, 0.7, lr=lr, valid=v) for lr, v in ((0.001, 0.71), (0.01, 0.74))]
    runs += [run("full", 1.0, 0, 0.8), run("compo", 0.1, 0, None, status="unreachable")]
    table = report.learning_rates(frame(runs))
    got = table.frame.set_index("method")
    assert got.loc["robe", ["lr", "tried"]].tolist() == [0.01, 2] and got.loc["robe", "ahead"] == pytest.approx(0.03)
    assert math.isnan(got.loc["full", "ahead"]) and "only one tried" in table.html and "+0.0300" in table.html
