"""Figures and tables from rows made here: every number checked against a computation by hand."""
from __future__ import annotations

import ast
import math
import re
import shutil
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecstudy import report
from ecstudy.registry import names
from ecstudy.report import drawings, identities, pages, picture, speed, style, taxonomy, weights
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
    assert list(lines) == ["Full", "inter-feature", "CompoEmb", "ROBE", "Hash"]      # the paper's order, by family
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
    assert "Generated data, quick profile" in report.mark(rows, "quick/dlrm").html
    medium = report.mark(rows, "medium/dlrm").html
    assert "Generated data, medium profile" in medium and "minutes" not in medium
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
    family = style.families()
    here = {str(p.relative_to(tmp_path / "methods").with_suffix("")) for p in (tmp_path / "methods").rglob("*.md")}
    assert here == {f"{family[m]}/{m}" for m in names()} | set(style.FAMILIES)
    robe = (tmp_path / "methods" / "inter-feature" / "robe.md").read_text()
    assert robe.startswith("# ROBE\n") and "## How it trains" in robe and "Real data" in robe and "Generated" in robe
    assert "literalinclude} ../../../ecstudy/methods/robe.py" in robe
    assert "| hashing | All vectors are blocks" in (tmp_path / "methods" / "inter-feature.md").read_text()
    assert "No rows yet" in (tmp_path / "methods" / "intra-feature" / "autosrh.md").read_text()
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
                    section="dlrm", data_fingerprint="f", device="cpu", lr=0.001, batch=128, ne=0.9)

    def frame(*lines):
        return pd.DataFrame([row(*line, seed) for line in lines for seed in (0, 1)])

    none = frame(("full", 1.0, 0.8)).iloc[:0]
    rows = frame(("full", 1.0, 0.8), ("deeplight", 0.5, 0.7), ("deeplight", 0.01, 0.75), ("robe", 0.5, 0.79),
                 ("robe", 0.001, 0.74))
    text = "".join(_reading(rows, none))
    assert "DeepLight gets" not in text and "ROBE is" not in text          # ROBE loses, DeepLight's cause is not tested
    assert "0 of 2 methods are less than 0.005 below Full; the lowest is DeepLight, -0.1000" in text
    near = frame(("full", 1.0, 0.8), ("robe", 0.5, 0.797), ("unified", 0.5, 0.79), ("unified", 0.1, 0.8),
                 ("robe", 0.1, 0.79), ("robe", 0.001, 0.7))
    text_of = "".join(_reading(near, none))
    assert "1 of 2 methods are less than" in text_of
    assert "Beyond the paper's methods** the highest is at 10 % " in text_of
    assert "Unified (+0.0000" in text_of and "of the paper's ROBE (-0.0100" in text_of and "0.1 % " not in text_of
    assert "little is lost by any method**: the lowest of 1 is ROBE" in "".join(_reading(
        near[near["method"] != "unified"], none))
    assert "at most 0.900 over all 10 runs" in text
    assert "Nothing is worse" not in "".join(_reading(rows.assign(ne=1.01), none))
    text = _reading(rows, frame(("deeplight", 1.0, 0.71)))[1]
    assert "0.7005 at 50 %, 0.7505 at 1 %" in text and "ends at 0.7105" in text and "ROBE" not in text
    assert "DeepLight gets" not in "".join(_reading(rows, frame(("deeplight", 1.0, 0.81))))
    more = pd.concat([rows, frame(("autosrh", 0.001, 0.76), ("tt_rec", 0.01, 0.77), ("tt_rec", 0.5, 0.78))])
    other = frame(("autosrh(order='published')", 0.001, 0.72), ("tt_rec(init='paper')", 0.5, 0.75))
    text = "".join(_reading(more, other))
    assert "has 0.7605 at 0.1 %" in text and "prunes last, 0.7205" in text and "it has 0.7505 at 50 % here" in text
    assert "Pruning once" not in "".join(_reading(more, none))
    more = frame(("full", 1.0, 0.8), ("cce", 0.1, 0.75), ("cce", 0.01, 0.7))
    other = frame(("cce(every=0.25)", 0.1, 0.76))
    assert "it has 0.7605 instead of 0.7505 at 10 %." in "".join(_reading(more, other))
    assert "CCE gains" not in "".join(_reading(more, frame(("cce(every=0.25)", 0.1, 0.74))))


# -- many methods ------------------------------------------------------------------------------------------------------

def luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_every_method_has_a_look_that_is_read_on_white_and_on_black(rows):
    found = style.looks(rows)
    assert set(names()) <= set(found)
    drawn = [(look.color, look.marker) for look in found.values()]
    assert len(set(drawn)) == len(drawn)
    for colour in {look.color for look in found.values()}:
        light = luminance(colour) + 0.05
        assert 1.05 / light >= 3 and light / (luminance("#121212") + 0.05) >= 3, colour
    within = {}                                                      # of one panel: every line has a marker of its own
    for method, kind in ((m, k) for m, k in style.families().items() if m in style.TITLES):
        within.setdefault(kind, []).append(found[method].marker)
    assert all(len(set(markers)) == len(markers) for markers in within.values())


def test_methods_stand_in_the_papers_order():
    order = style.in_order(["top_k", "zzz", "robe|int8", "autosrh", "robe", "full", "compo"])
    assert order == ["full", "compo", "robe|int8", "robe", "autosrh", "top_k", "zzz"]
    assert style.in_order(["top_k", "new", "compo"], {"new": "inter-feature"}) == ["compo", "new", "top_k"]


def many(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with eleven compressed methods of two families."""
    robe = rows[rows["method"] == "robe"]
    more = [robe.assign(method=f"m{i}", spec=f"m{i}", family="inter-feature" if i % 2 else "intra-feature",
                        auc=robe["auc"] - 0.01 * i) for i in range(8)]
    return pd.concat([rows, *more])


def test_a_crowd_is_drawn_in_a_panel_per_family(rows):
    one, two = report.auc_against_bytes(rows), report.auc_against_bytes(many(rows))
    assert not any(text.startswith(("inter-feature", "intra-feature")) for text in texts(one.svg))
    found = texts(two.svg)
    assert "inter-feature: ids share storage" in found and "intra-feature: smaller rows" in found
    assert {"CompoEmb", "ROBE", "Hash", *(f"m{i}" for i in range(8))} <= set(found)
    assert found.count("Full") == 2 and "faint" in two.caption and two.svg == report.auc_against_bytes(many(rows)).svg
    only = texts(report.auc_against_bytes(many(rows), highlight="m3").svg)
    assert "m3" in only and "m4" not in only and "inter-feature: ids share storage" not in only


def test_tables_have_a_line_above_each_family(rows):
    for shown in (report.table5(many(rows)), report.beside_paper(rows)):
        heads = re.findall(r'<tr class="ec-family"><th colspan="(\d+)">([^<]*)</th></tr>', shown.html)
        assert {int(n) for n, _ in heads} == {shown.html.split("<tbody>")[0].count("<th>")}
        assert [kind for _, kind in heads] in (["inter-feature", "intra-feature"], ["inter-feature"])
    assert shown.html.count("CompoEmb") == 1                         # said once, though it has several budgets


# -- what methods weigh ------------------------------------------------------------------------------------------------

def test_the_diagram_shows_every_stored_byte():
    what = weights.shipped("autosrh")
    assert what.bytes == sum(t.bytes for t in what.tensors)
    assert what.bytes == weights.weighed("autosrh", "criteo", 0.1)["bytes_inference"]
    assert what.bytes <= 0.1 * what.full and what.budget == 0.1
    drawn = drawings.storage("autosrh", what, 33_762_577)
    found = " ".join(texts(drawn.svg))
    for tensor in what.tensors:
        assert tensor.name in found and drawings.shape_text(tensor.shape) in found
        assert tensor.name in drawn.alt and weights.bytes_text(tensor.bytes) in drawn.alt
    fixed = weights.shipped("int_quant")                             # 10 % is below its smallest size
    assert fixed.budget is None and "smallest size" in drawings.storage("int_quant", fixed, 1).caption
    assert fixed.tensors == [("table.codes", (33_762_577, 16), "int8", 33_762_577 * 16)]


def test_tensors_too_many_to_draw_are_summed():
    part = [weights.Tensor(f"t{i}", (i + 1,), "float32", 4 * (i + 1)) for i in range(20)][::-1]
    drawn = drawings.storage("full", weights.Shipped(part, 0.1, 840, 10_000), 100)
    assert "12 smaller tensors" in drawn.alt and f"({sum(4 * (i + 1) for i in range(12))} B" in drawn.alt


def test_bytes_as_a_reader_says_them():
    assert [weights.bytes_text(n) for n in (48, 1536, 216_080_384, 2_160_804_928)] == [
        "48 B", "1.5 KiB", "206 MiB", "2.01 GiB"]


def test_reach_is_weighed():
    assert weights.reach("int_quant").each == (25.0, 50.0)
    compo = weights.reach("compo")
    assert compo.smallest == pytest.approx(0.1328, abs=1e-4) and compo.largest > 99 and not compo.each
    assert weights.reach("full") == (100.0, 100.0, 1, (100.0,))
    assert weights.weighed("robe", "avazu", 1)["inference_pct"] < 1e-4                # one byte, not the whole table
    assert weights.weighed("robe", "avazu", 1.0)["inference_pct"] > 99
    drawn = drawings.reach({m: weights.reach(m) for m in ("compo", "robe", "int_quant")})
    assert "INT8/16 from 25 % to 50 %" in drawn.alt and "ROBE" not in drawn.alt and {"ROBE"} <= set(texts(drawn.svg))


def test_the_taxonomy_has_every_method_once_with_its_formulas():
    text = taxonomy.fragment()
    entries = pages.registry().drop("full")
    for name, entry in entries.iterrows():
        assert text.count(f"(methods/{entry['family']}/{name}.md)") == 1
        assert name not in style.TITLES or entry["group"] and entry["space"] and entry["time"], name
        assert taxonomy.math(entry["space"]) in text and taxonomy.math(entry["time"]) in text
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert lines["CompoEmb"].endswith("| ✓ | ✓ | ✓ | / |") and lines["INT8/16"].endswith("| ✓ | / | / | / |")
    assert "2 sizes" in lines["INT8/16"] and "0.1328" in lines["CompoEmb"] and "any" in lines["ROBE"]
    assert taxonomy.math("a|b") == r"$a\vert b$" and taxonomy.math("") == ""
    tables_ = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables_} == {7, 9, 11}


def test_the_identities_page_marks_what_differs():
    text = identities.fragment()
    found = identities.compare()
    assert f"{len(found)} of the 113 rows" in text and "Not explained" not in text
    assert 'class="ec-below">−6.3<' in text and "The threshold is found in small blocks" in text
    assert text.count("{tab-item}") == 3


# -- look-ups beside the paper's ---------------------------------------------------------------------------------------

def lookup(method, budget, batch, ratio, **more):
    return dict(benchmark="lookup", method=method, budget=budget, batch=batch, device="cpu", threads=1, ms=ratio,
                full_ms=1.0, ratio_full=ratio, solve_seconds=0.5) | more


def test_the_aim_of_a_look_up_is_half_the_papers_ratio():
    assert speed.target(4.0, 2048) == 2.0 and speed.target(4.0, 128) == 2.0
    assert speed.target(1.2, 2048) == 1.5 and speed.target(1.2, 128) == 2.0 and speed.target(math.nan, 2048) == 1.5
    assert speed.paper_ratio("compo", 0.1) == (pytest.approx(3.55 / 0.88), 10)
    assert speed.paper_ratio("int_quant", 0.25)[1] == 25 and speed.paper_ratio("robe(block=4)", 0.002)[1] == 0.1
    assert math.isnan(speed.paper_ratio("top_k", 0.1)[0])


def test_look_ups_say_which_aims_are_met():
    rows = pd.DataFrame([lookup("compo", 0.1, 128, 2.5), lookup("compo", 0.1, 2048, 1.9),
                         lookup("top_k", 0.1, 2048, 1.6), lookup("robe", 0.5, 2048, 1.1)])
    found = speed.lookups(rows).set_index("method")
    assert list(found.index) == ["compo", "robe", "top_k"]
    assert not found.loc["compo", "met_128"] and found.loc["compo", "met_2048"] and not found.loc["top_k", "met_2048"]
    text = speed.fragment(rows)
    assert "met in 2 of 4 cells" in text and "2.5×" in text and "2.02× ✗" in text and "1.5× ✓" in text
    assert "nan" not in text.lower() and "step ÷ head" not in text and "products" not in text
    more = pd.DataFrame([dict(benchmark="products", method="dhe", budget=0.1, batch=128, device="cpu", threads=1,
                              ms=30.0, products_ms=20.0, ratio_products=1.5)])
    assert "<td>DHE</td>" in speed.fragment(pd.concat([rows, more])) and "÷ products" in speed.fragment(more)
    assert "No benchmark rows" in speed.fragment(pd.DataFrame())


def test_compressors_and_pruning_while_training_have_tables():
    common = dict(device="cpu", threads=1, rows=1000, batch=1024)
    rows = pd.DataFrame([
        dict(benchmark="decode", method="pq(parts=48)", budget=0.0327, ms=0.2, ratio_copy=4.0, ratio_full=1.25,
             faiss_ms=0.4, ratio_faiss=0.5, faiss_codes_ms=0.1) | common,
        dict(benchmark="decode", method="int4", budget=0.125, ms=0.3, ratio_copy=6.0, ratio_full=1.875) | common,
        dict(benchmark="compress", method="pq(parts=48)", budget=0.0327, seconds=2.0, faiss_seconds=2.5,
             ratio_faiss=0.8) | common,
        dict(benchmark="in_training", method="fiited", budget=0.1, full_ms=10.0, step_ms=10.5, ratio_full=1.05,
             ratio_rounds=1.06, training_pct=67.5, peak_pct=79.7) | common])
    text = speed.compressors(rows)
    assert "batch of 1,024 rows is decoded from 1,000 vectors" in text and "<td>0.8</td>" in text and "nan" not in text
    assert "FIITED" not in text and "no benchmark" not in text.lower()
    text = speed.fragment(rows)
    assert "<td>67.5</td>" in text and "<td>1.06</td>" in text and "faiss" not in text
    assert "No benchmark rows" in speed.compressors(pd.DataFrame())


def test_equations_of_every_method_are_read_as_such():
    assert pages.markdown("with $$a = b,\\quad c$$ where $a$") == "with\n\n$$\na = b,\\quad c\n$$\n\nwhere $a$"
    for name in names():
        text = re.sub(r"``.*?``|`.*?`", "", pages.markdown(pages.docstring(name)), flags=re.S)
        text = re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.S | re.M)
        for inline in re.findall(r"\$[^$]*\$", text):
            assert inline == "$" + inline[1:-1].strip() + "$" and "\n\n" not in inline, (name, inline)
        assert "$" not in re.sub(r"\$[^$]*\$", "", text), name
        assert not re.search(r"^%", text, flags=re.M), name


def test_tests_named_in_the_book_exist():
    root = pages.paths.root()
    for page in (root / "book").glob("*.md"):
        for path, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text()):
            assert (root / path).is_file(), f"{page.name}: {path}"
            assert not name or f"def {name}(" in (root / path).read_text(), f"{page.name}: {path}::{name}"


def test_each_executed_notebook_has_sockets_of_its_own(tmp_path, monkeypatch):
    """Two that start at once in one folder would otherwise take the same names for them."""
    import nbformat

    from ecstudy.report.execute import execute

    monkeypatch.chdir(tmp_path)
    cell = "import json\nfrom ipykernel.connect import get_connection_info\njson.loads(get_connection_info())"
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(source, tmp_path / "source.ipynb")
    told = []
    for name in ("a", "b"):
        done = nbformat.read(execute(tmp_path / "source.ipynb", tmp_path / f"{name}.ipynb", progress=False), 4)
        told.append(ast.literal_eval(done.cells[-1].outputs[0]["data"]["text/plain"]))
    assert [one["transport"] for one in told] == ["ipc", "ipc"] and told[0]["ip"] != told[1]["ip"]
    assert not any(Path(one["ip"]).parent.exists() for one in told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "b.ipynb", "source.ipynb"]
