"""Figures and tables from rows made here: every number checked against a computation by hand."""
from __future__ import annotations

import math
import re
import shutil
import xml.etree.ElementTree as xml

import numpy as np
import pandas as pd
import pytest

from ecstudy import report
from ecstudy.registry import names
from ecstudy.report import pages, picture
from ecstudy.report.figures import _spread
from ecstudy.report.summary import best_by_validation, cells
from ecstudy.report.tables import PAPER_NAMES, cell_list, duration
from ecstudy.study import COLUMNS
from ecstudy.study.row import frame

FULL_BYTES = 1000 * 64


def run(method, budget, seed, auc, *, share=None, status="ok", reason="", family="inter-feature", **more) -> dict:
    share = budget if share is None else share
    ok = status == "ok"
    return dict(
        run_id=f"{method}-{budget}-{seed}", section="dlrm", task="ctr", method=method, spec=method, family=family,
        dataset="synthetic_test", model="dlrm", dim=16, budget=budget, seed=seed, lr=0.001, batch=128, status=status,
        reason=reason, auc=auc, valid_auc=auc + 0.01 if ok else None, bytes_full=FULL_BYTES if ok else None,
        bytes_inference=FULL_BYTES * share if ok else None, bytes_training=3 * FULL_BYTES * share if ok else None,
        seconds=10.0 * (1 + (method != "full")) if ok else None, latency_ms=0.6 if ok else None,
        latency_full_ms=0.4 if ok else None, device="cpu", threads=1, torch="2.13.0", version="0.1.0", commit="abc",
        created="2026-01-01T00:00:00+00:00", data_fingerprint="f00") | more


@pytest.fixture
def rows() -> pd.DataFrame:
    runs = [run("full", None, s, auc, share=1.0, family="baseline") for s, auc in enumerate((0.80, 0.81, 0.82))]
    runs += [run("compo", 0.1, s, auc) for s, auc in enumerate((0.79, 0.80, 0.80))]
    runs += [run("robe", 0.1, s, auc) for s, auc in enumerate((0.795, 0.806, 0.82))]
    runs += [run("hash_trick", 0.1, s, auc) for s, auc in enumerate((0.75, 0.76, 0.77))]
    runs += [run("robe", 0.01, s, 0.70 + 0.01 * s) for s in range(3)]
    why = 'smallest "size" is 2 % & more'
    runs += [run("compo", 0.01, s, None, status="unreachable", reason=why) for s in range(3)]
    runs += [run("hash_trick", 0.01, s, None, status="diverged", reason="loss is nan") for s in range(3)]
    return frame(runs)


def cell(table: pd.DataFrame, method: str, budget: float) -> pd.Series:
    return table[(table["method"] == method) & (table["budget"] == budget)].iloc[0]


def test_interval_is_students():
    x = [0.79, 0.80, 0.83, 0.78]
    mean, half = report.t_interval(x)
    assert mean == pytest.approx(0.80)
    assert half == pytest.approx(3.182446 * np.std(x, ddof=1) / 2, rel=1e-6)      # t(0.975, 3 degrees of freedom)
    assert report.t_interval([0.5, None, math.nan])[0] == 0.5
    assert math.isnan(report.t_interval([0.5])[1]) and math.isnan(report.t_interval([])[0])


def test_interval_covers_a_normal_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    hit = [abs(mean - 3) <= half for mean, half in (report.t_interval(rng.normal(3, 2, 3)) for _ in range(2000))]
    assert np.mean(hit) == pytest.approx(0.95, abs=0.015)


def test_cells_of_hand(rows):
    table = cells(rows)
    robe = cell(table, "robe", 0.1)
    assert robe["auc"] == pytest.approx((0.795 + 0.806 + 0.82) / 3) and robe["seeds"] == 3
    gaps = np.array([0.795 - 0.80, 0.806 - 0.81, 0.82 - 0.82])                    # paired by seed, not by order of rows
    assert robe["gap"] == pytest.approx(gaps.mean())
    assert robe["gap_half"] == pytest.approx(4.302653 * gaps.std(ddof=1) / math.sqrt(3), rel=1e-6)
    assert robe["reached_pct"] == pytest.approx(10) and robe["training_pct"] == pytest.approx(30)
    assert robe["time_ratio"] == pytest.approx(2) and robe["latency_ratio"] == pytest.approx(1.5)
    pd.testing.assert_frame_equal(table, cells(rows.sample(frac=1, random_state=3)))


def test_ranks_leave_out_full_and_what_was_not_reached(rows):
    table = cells(rows).set_index(["method", "budget"])["rank"]
    assert table["robe", 0.1] == 1 and table["compo", 0.1] == 2 and table["hash_trick", 0.1] == 3
    assert table["robe", 0.01] == 1                        # alone there: one could not, one diverged
    assert table.drop("full").drop([("compo", 0.01), ("hash_trick", 0.01)]).notna().all()
    assert math.isnan(cells(rows).set_index("method").loc["full", "rank"])
    assert math.isnan(table["compo", 0.01]) and math.isnan(table["hash_trick", 0.01])


def test_equal_methods_share_the_better_rank(rows):
    twin = rows[(rows["method"] == "robe") & (rows["budget"] == 0.1)].assign(method="top_k", spec="top_k")
    table = cells(pd.concat([rows, twin])).set_index(["method", "budget"])["rank"]
    assert table["robe", 0.1] == table["top_k", 0.1] == 1 and table["compo", 0.1] == 3


def test_a_learning_rate_is_chosen_by_validation_never_by_test(rows):
    better = rows[(rows["method"] == "robe") & (rows["budget"] == 0.1)]
    other = better.assign(lr=0.01, auc=0.99, valid_auc=better["valid_auc"] - 0.001)       # a tempting test AUC
    kept = best_by_validation(pd.concat([other, rows]))
    assert not (kept["lr"] == 0.01).any() and len(kept) == len(rows)


def test_a_failed_run_does_not_hide_a_finished_one(rows):
    failed = rows[rows["method"] == "robe"].assign(status="failed", auc=np.nan, valid_auc=np.nan, lr=0.1)
    assert cell(cells(pd.concat([failed, rows])), "robe", 0.1)["seeds"] == 3


def test_mixed_or_missing_rows_are_refused(rows):
    with pytest.raises(ValueError, match="several datasets.*synthetic_other.*choose one"):
        cells(pd.concat([rows, rows.assign(dataset="synthetic_other")]))
    with pytest.raises(ValueError, match="several dims"):
        report.auc_against_bytes(pd.concat([rows, rows.assign(dim=32)]))
    with pytest.raises(ValueError, match="no rows to report"):
        report.table5(frame([]))
    with pytest.raises(ValueError, match="none of the"):
        report.auc_against_bytes(rows[rows["status"] != "ok"])
    with pytest.raises(ValueError, match="no rows of 'autosrh'"):
        cell_list(rows, "autosrh")


def test_table5_shows_ranks_slashes_and_memory(rows):
    shown = report.table5(rows)
    lines = {re.sub("<.*?>", "", line.split("</td>")[0]).strip(): line for line in shown.html.split("<tr")[2:]}
    lines = {name.split(">")[-1].strip(): line for name, line in lines.items()}
    assert list(lines)[0] == "Full"
    assert "<b>0.8070</b><sup>1</sup>" in lines["ROBE"] and "± 0.0311" in lines["ROBE"] and "10 %" in lines["ROBE"]
    assert "<sup>2</sup>" in lines["CompoEmb"] and ">/</span>" in lines["CompoEmb"]
    assert 'title="smallest &quot;size&quot; is 2 % &amp; more"' in lines["CompoEmb"]
    assert "diverged" in lines["Hash"] and "nan" not in shown.html.lower()
    assert shown.frame.equals(cells(rows)) and "3 seeds" in shown.caption


def test_stacked_specs_are_methods_of_their_own(rows):
    stacked = rows[(rows["method"] == "robe") & (rows["budget"] == 0.1)].assign(spec="robe|int8", auc=0.5)
    table = cells(pd.concat([rows, stacked]))
    assert cell(table, "robe|int8", 0.1)["auc"] == 0.5 and cell(table, "robe", 0.1)["auc"] > 0.8
    assert "robe|int8" in report.auc_against_bytes(pd.concat([rows, stacked])).svg


def test_beside_the_paper(rows):
    table = report.beside_paper(rows).frame.set_index(["method", "budget"])
    assert table.loc[("compo", 0.1), "paper_gap"] == pytest.approx(0.8053 - 0.8061)
    assert table.loc[("compo", 0.1), "paper_latency_ratio"] == pytest.approx(3.55 / 0.88)
    assert table.loc[("compo", 0.1), "paper_training_pct"] == 30
    assert "hash_trick" not in table.index.get_level_values(0)          # not in the paper's table
    with pytest.raises(ValueError, match="paper_dataset 'kdd'"):
        report.beside_paper(rows, paper_dataset="kdd")


def test_the_papers_numbers():
    paper = report.paper_table5()
    assert set(paper["dataset"]) == {"avazu", "criteo", "company"} and len(paper) == 113
    full = paper[paper["method"] == "Full"].set_index("dataset")["auc"].to_dict()
    assert full == {"avazu": 0.7543, "criteo": 0.8061, "company": 0.7583}
    assert set(paper["method"]) == set(PAPER_NAMES.values())
    assert paper.loc[paper["reached"] == "no", "auc"].isna().all()


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()).strip() for e in xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_auc_figure_names_every_method_and_says_what_it_shows(rows):
    shown = report.auc_against_bytes(rows, command="papermill a.ipynb b.ipynb")
    assert {"Full", "CompoEmb", "ROBE", "Hash", "test AUC", "MiB"} <= set(texts(shown.svg))
    assert "0.8100" in shown.alt and "ROBE at 10 %: 0.8070" in shown.alt and "synthetic_test" in shown.alt
    html = shown._repr_html_()
    assert picture.INK not in html and "currentColor" in html           # ink follows the page, light or dark
    assert 'role="img"' in html and "papermill a.ipynb b.ipynb" in html and "data:text/csv" in html


def test_figures_are_the_same_every_time(rows):
    assert report.auc_against_bytes(rows).svg == report.auc_against_bytes(rows).svg
    assert report.costs(rows).svg == report.costs(rows).svg


def test_one_method_highlighted_keeps_its_colour(rows):
    everything, one = report.auc_against_bytes(rows), report.auc_against_bytes(rows, highlight="robe")
    assert {"CompoEmb", "Hash"}.isdisjoint(texts(one.svg)) and "ROBE" in texts(one.svg)
    from ecstudy.report.style import looks

    assert looks(rows)["robe"] == looks(rows[rows["method"] == "robe"])["robe"]
    assert looks(rows)["robe"].color in everything.svg and looks(rows)["robe"].color in one.svg
    drawn = [look[:2] for look in looks(rows).values()]
    assert len(set(drawn)) == len(drawn)                                # no two methods look alike


def test_rows_behind_a_figure_come_back_from_its_link(rows, tmp_path):
    import base64
    import io

    html = report.auc_against_bytes(rows)._repr_html_()
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1)).decode()
    back = pd.read_csv(io.StringIO(data))
    assert len(back) == len(rows) and back["auc"].sum() == pytest.approx(rows["auc"].sum())
    path = report.costs(rows).save(tmp_path / "costs.svg")
    assert xml.parse(path).getroot().get("aria-label").startswith("Dot plots")


def test_timeline_says_its_stages():
    shown = report.timeline([("warm-up", 8, "all"), ("search", 4, "emb"), ("search", 4, "aux")])
    assert {"warm-up", "search"} <= set(texts(shown.svg))
    assert "search: 8 steps updating embedding only, then auxiliary state" in shown.alt
    with pytest.raises(ValueError, match="without stages"):
        report.timeline([])


def test_frequency_figure_reads_its_curves():
    share = np.array([0.001, 0.01, 0.1, 1.0])
    curves = pd.concat([pd.DataFrame(dict(dataset=name, id_share=share, occurrence_share=share ** power))
                        for name, power in (("synthetic_a", 0.5), ("real_b", 0.25))])
    shown = report.frequency(curves)
    assert "synthetic_a 10 %" in shown.alt and "real_b 32 %" in shown.alt
    assert {"synthetic_a", "real_b"} <= set(texts(shown.svg))


def test_data_fragment_compares_published_and_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    assert "No statistics" in pages._data()
    from ecstudy.data.synthetic import generate

    generate("easy", rows=2000, out=tmp_path / "data" / "synthetic_tiny", name="synthetic_tiny")
    text = pages._data(["synthetic_tiny"])
    assert "<th>synthetic_\N{ZERO WIDTH SPACE}tiny</th>" in text and "Skew" in text
    pages.publish_data(["synthetic_tiny"])
    shutil.rmtree(tmp_path / "data")
    published = pages._data(["synthetic_tiny"])                         # aggregates stay when the data is gone
    assert published.split("base64")[0] == text.split("base64")[0] and "Skew" in published
    pages.publish_data([])
    assert pages._data([]) == published


def test_labels_keep_their_distance_and_order():
    placed = _spread([0.5, 0.5, 0.51, 0.9], 0.1, 0.0, 1.0)
    assert all(b - a >= 0.0999 for a, b in zip(placed, placed[1:])) and 0 <= min(placed) and max(placed) <= 1
    crowded = _spread([1.0] * 20, 0.1, 0.0, 1.0)
    assert np.diff(sorted(crowded)).min() > 0.04 and max(crowded) <= 1 + 1e-9


def test_durations():
    assert [duration(s) for s in (4.24, 59.7, 185, 7800, math.nan)] == ["4.2s", "59.7s", "3m05s", "2h10m", ""]


def test_mark_tells_generated_from_real(rows):
    assert "Generated data" in report.mark(rows, "quick").html
    real = report.mark(rows.assign(dataset="criteo_137k")).html
    assert "Real data" in real and "Generated" not in real and "3 seeds" in real


def test_stamp_says_where_rows_come_from(rows):
    html = report.stamp(rows).html
    for text in ("2.13.0", "synthetic_test", "f00", "2026-01-01", "0, 1, 2", "cpu"):
        assert text in html


def test_pages_of_all_methods(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "real_rows", lambda: rows.assign(dataset="criteo_137k"))
    monkeypatch.setattr(pages, "quick_rows", lambda: rows)
    monkeypatch.setattr(pages, "stamp", lambda rows=None: pages.Html("<dl></dl>"))       # it tells the minute
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gone.md").write_text("a method that was removed")
    written = pages.write_pages(tmp_path, weights=False)
    assert {p.stem for p in (tmp_path / "methods").iterdir()} == set(names())
    robe = (tmp_path / "methods" / "robe.md").read_text()
    assert robe.startswith("# ROBE\n") and "## How it trains" in robe and "Real data" in robe and "Generated" in robe
    assert "literalinclude} ../../ecstudy/methods/robe.py" in robe
    assert "No rows yet" in (tmp_path / "methods" / "autosrh.md").read_text()
    assert "ROBE** holds the highest AUC, 0.8070" in (tmp_path / "generated" / "first.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in written}
    pages.write_pages(tmp_path, weights=False)
    assert before == {p: p.stat().st_mtime_ns for p in before}          # nothing is rebuilt when nothing changed


def test_pages_without_any_rows_say_so(tmp_path, monkeypatch):
    for name in ("real_rows", "quick_rows"):
        monkeypatch.setattr(pages, name, lambda: frame([]))
    pages.write_pages(tmp_path, weights=False)
    assert "no published rows" in (tmp_path / "generated" / "real.md").read_text()
    assert "No rows are published" in (tmp_path / "generated" / "first.md").read_text()


def test_what_a_page_weighs_is_the_papers_where_the_paper_is_exact():
    text = pages._weights("robe")
    line = next(line for line in text.split("<tr") if "<td>10 %</td>" in line)
    assert line.count("<td>10 %</td>") >= 2 and line.count("<td>30 %</td>") == 2       # ours and the paper's


def test_docstrings_become_markdown():
    assert pages.markdown("See :class:`Picture`::\n\n    code\n\narXiv 2108.02191") == (
        "See ``Picture``:\n\n    code\n\n[arXiv 2108.02191](https://arxiv.org/abs/2108.02191)")


def test_rows_made_here_have_the_columns_of_the_store(rows):
    assert list(rows.columns) == list(COLUMNS)


def test_text_of_a_docstring_survives_markdown():
    from ecstudy.report.pages import markdown, section

    # a line that begins with % is a comment in MyST: wrapped text must not lose it
    assert markdown("memory is 300\n% of it") == "memory is 300\u00a0% of it"
    assert section("deeplight", "Training").endswith("300\u00a0%.")


def test_what_the_page_says_is_what_the_rows_say():
    """Sentences of the real page stand only on rows that bear them out, and their numbers are the rows'."""
    from ecstudy.report.pages import _reading

    def row(spec, budget, auc, seed):
        return dict(method=spec, spec=spec, family="x", dataset="criteo_137k", model="dlrm", dim=16, budget=budget,
                    seed=seed, status="ok", auc=auc + seed / 1000, valid_auc=auc, seconds=1.0, bytes_inference=1.0,
                    bytes_training=3.0, bytes_full=1.0, reached=budget, latency_ms=1.0, latency_full_ms=1.0, reason="",
                    section="dlrm", data_fingerprint="f", device="cpu", lr=0.001, batch=128)

    def frame(*lines):
        return pd.DataFrame([row(*line, seed) for line in lines for seed in (0, 1)])

    none = frame(("full", 1.0, 0.8)).iloc[:0]
    rows = frame(("full", 1.0, 0.8), ("deeplight", 0.5, 0.7), ("deeplight", 0.01, 0.75), ("robe", 0.5, 0.79),
                 ("robe", 0.001, 0.74))
    assert _reading(rows, none) == []                             # ROBE loses, DeepLight's cause is not tested
    text = _reading(rows, frame(("deeplight", 1.0, 0.71)))[1]
    assert "0.7005 at 50 %, 0.7505 at 1 %" in text and "ends at 0.7105" in text and "ROBE" not in text
    assert "DeepLight" not in "".join(_reading(rows, frame(("deeplight", 1.0, 0.81))))
