"""The command line: what is typed is read right, what is printed serves people and programs, errors are one line."""
from __future__ import annotations

import csv
import inspect
import io
import json
import sys

import numpy as np
import pytest

pytest.importorskip("typer", reason="the command line needs the extra cli")
from typer.testing import CliRunner  # noqa: E402

import ecstudy.training  # noqa: E402
from ecstudy import __main__ as entry  # noqa: E402
from ecstudy import cli  # noqa: E402
from ecstudy.data.cardinalities import FIELDS  # noqa: E402
from ecstudy.data.layout import Dataset, DatasetWriter  # noqa: E402
from ecstudy.memory import memory  # noqa: E402
from ecstudy.registry import names  # noqa: E402
from ecstudy.study import COLUMNS, CellError, store  # noqa: E402
from ecstudy.study.row import complete  # noqa: E402

KEYS = ["method", "budget", "reachable", "reason", "knob", "bytes_full", "bytes_inference", "bytes_training",
        "inference_pct", "training_pct"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with DatasetWriter(tmp_path / "data" / "tiny", name="tiny", fields=["a", "b"], cardinalities=[50, 70]) as writer:
        for split in ("train", "valid", "test"):
            writer.append(split, np.array([[0, 1], [4, 6]]), None, np.array([0, 1]))
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    asked = []

    def run_cell(cell, *, progress=None):
        asked.append(cell)
        if cell.method == "robe":
            raise ZeroDivisionError("no\nluck")
        return dict(status="ok", auc=0.751234567, bytes_full=1000, bytes_inference=100, bytes_training=3000,
                    seconds=75.0, latency_ms=0.25)

    monkeypatch.setattr(ecstudy.training, "run_cell", run_cell)
    return asked


def ok(*words):
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def error(code, *words):
    """The one line of an error that ends with ``code``."""
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


# -- reading ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, parts", [
    ("full", ["full"]), ("full, compo", ["full", "compo"]),
    ("robe(block=16, sign=True),full", ["robe(block=16, sign=True)", "full"]),
    ("a(x=(1,2),y=[3,4])|int8,b", ["a(x=(1,2),y=[3,4])|int8", "b"]), ("a(x=','),b", ["a(x=',')", "b"]),
    ("a(x=\")\"),b", ["a(x=\")\")", "b"]),
])
def test_commas_cut_at_the_top_level_only(text, parts):
    assert cli.split(text) == parts


@pytest.mark.parametrize("text", ["", "a,", ",a", "a,,b", "a(b", "a)b", "a(x='b)"])
def test_lists_that_cannot_be_cut(text):
    with pytest.raises(CellError, match="expected values"):
        cli.split(text)


@pytest.mark.parametrize("text, value", [
    ("0.1", 0.1), ("1e-3", 0.001), ("1.0", 1.0), ("10%", 0.1), ("100 %", 1.0), ("50000", 50000), ("16MiB", 16 * 2**20),
    ("1.5 kB", 1500), ("none", None),
])
def test_budgets(text, value):
    assert cli.budget(text) == value and type(cli.budget(text)) is type(value)


@pytest.mark.parametrize("text", ["", "big", "1", "0", "1.5", "150%", "-1", "nan", "MiB", "1e6"])
def test_budgets_that_are_none(text):
    with pytest.raises(CellError, match="budget"):
        cli.budget(text)


def test_fields_are_read_from_everywhere(home):
    assert cli.cardinalities("avazu") == list(FIELDS["avazu"][1])
    assert cli.cardinalities("5000,300, 7") == [5000, 300, 7] and cli.cardinalities("12") == [12]
    for prepared in ("tiny", "data/tiny", "data/tiny/meta.json"):
        assert cli.cardinalities(prepared) == [50, 70]
    (home / "sizes.json").write_text("[3, 4]")
    (home / "sizes.csv").write_text("field,cardinality\na,3\nb,4\n")
    assert cli.cardinalities("sizes.json") == cli.cardinalities("sizes.csv") == [3, 4]


@pytest.mark.parametrize("text, words", [
    ("nowhere", "expected criteo"), ("5,0", "size 0"), ("empty.json", "list of field sizes"), ("bad.json", "not JSON"),
    ("words.json", "'x'"), ("float.json", "2.5"), ("other.csv", "column 'cardinality'"),
    ("two.csv", "keep the rows of one"), ("minus.csv", "'-3'"), ("5,x", "expected criteo"),
])
def test_fields_that_cannot_be_read(home, text, words):
    for name, content in {"empty.json": "{}", "bad.json": "[1", "words.json": '["x"]', "float.json": "[2.5]",
                          "other.csv": "a,b\n1,2\n", "two.csv": "dataset,cardinality\nx,1\ny,2\n",
                          "minus.csv": "cardinality\n-3\n"}.items():
        (home / name).write_text(content)
    assert words in error(2, "weigh", "-m", "full", "--fields", text)


# -- weigh ------------------------------------------------------------------------------------------------------------

def test_weigh_prints_one_object_per_budget():
    found = json.loads(ok("weigh", "--method", "hash_trick", "--budget", "0.5,0.1", "--fields", "5000,300,7",
                          "--dim", "16", "--json"))
    assert [list(w) for w in found] == [KEYS, KEYS] and [w["budget"] for w in found] == [0.5, 0.1]
    for weighed in found:
        made = ecstudy.make("hash_trick", [5000, 300, 7], 16, weighed["budget"]).deploy()
        assert weighed["bytes_inference"] == memory(made) <= weighed["budget"] * weighed["bytes_full"]
        assert weighed["inference_pct"] == pytest.approx(100 * memory(made) / (5307 * 16 * 4))
        assert weighed["reachable"] and weighed["reason"] == "" and isinstance(weighed["knob"], int)


def test_weigh_at_full_size_says_what_cannot_be_reached():
    full, quarter = json.loads(ok("weigh", "-m", "full,int_quant", "-b", "10%", "-f", "criteo", "--json"))
    assert full["bytes_full"] == full["bytes_inference"] == 33_762_577 * 16 * 4
    assert not full["reachable"] and full["reason"] and full["bytes_training"] is full["training_pct"] is None
    assert not quarter["reachable"] and quarter["inference_pct"] == pytest.approx(25, abs=0.1)
    text = ok("weigh", "-m", "full", "-b", "10%", "-f", "criteo")
    assert "unreachable" in text and full["reason"] in text and "33,762,577 ids" in text


def test_weigh_takes_bytes_no_budget_and_another_dimension():
    (weighed,) = json.loads(ok("weigh", "-m", "hash_trick", "-b", "20kB", "-f", "5000", "--json"))
    assert weighed["budget"] == 20_000 and 19_900 < weighed["bytes_inference"] <= 20_000
    (natural,) = json.loads(ok("weigh", "-m", "full", "-b", "none", "-f", "5000", "--dim", "8", "--json"))
    assert natural["budget"] is None and natural["inference_pct"] == 100 and natural["training_pct"] == 300
    (fixed,) = json.loads(ok("weigh", "-m", "hash_trick", "-b", "0.5", "-f", "5000", "--dim", "32", "--base-dim", "16",
                             "--json"))
    assert fixed["bytes_inference"] <= 5000 * 16 * 4 // 2 and fixed["bytes_full"] == 5000 * 16 * 4


def test_weigh_all_methods():
    found = json.loads(ok("weigh", "-m", "all", "-b", "0.1", "-f", "20000,300,7", "--json"))
    assert [w["method"] for w in found] == names() and any(w["reachable"] for w in found)


@pytest.mark.parametrize("words, message", [
    (["-m", "comppo", "-f", "9"], "compo"), (["-m", "full", "-f", "9", "-b", "2.0"], "fraction"),
    (["-m", "hash_trick(rowz=1)", "-f", "9"], "rowz"),
])
def test_weigh_refuses(words, message):
    assert message in error(2, "weigh", *words)


# -- run, sweep, results ----------------------------------------------------------------------------------------------

def test_run_shows_the_row_and_runs_once(calls):
    words = ["run", "-m", "compo", "-d", "tiny", "-b", "10%", "--max-epochs", "0.5", "--seed", "3"]
    text = ok(*words)
    assert "0.7512" in text and "10 %" in text and "1 min 15 s" in text and "tiny" in text
    row = json.loads(ok(*words, "--json"))
    assert list(row) == list(COLUMNS) and row["auc"] == 0.751234567 and len(calls) == 1
    assert (calls[0].max_epochs, calls[0].seed, calls[0].budget) == (0.5, 3, 0.1)
    ok(*words, "--force")
    assert len(calls) == 2


@pytest.mark.parametrize("words, message", [
    (["-m", "comppo", "-d", "tiny"], "compo"), (["-m", "compo", "-d", "tinny"], "tinny"),
    (["-m", "compo", "-d", "tiny", "--model", "dlmr"], "dlrm"), (["-m", "compo", "-d", "tiny", "-b", "7.5"], "7.5"),
    (["-m", "compo", "-d", "tiny", "--seed", "-1"], "seed -1"), (["-m", "compo", "-d", "tiny", "--lr", "0"], "lr 0"),
    (["-m", "compo", "-d", "tiny", "--model-option", "x"], "name=value"), (["-m", "compo(", "-d", "tiny"], "compo("),
])
def test_run_refuses_bad_input(calls, words, message):
    assert message in error(2, "run", *words) and not calls


def test_run_tells_of_a_failure_in_one_line(calls):
    assert "ZeroDivisionError: no luck" in error(1, "run", "-m", "robe", "-d", "tiny", "-b", "0.5")


def test_usage_errors_end_with_2():
    for words in (["run", "-m", "compo"], ["weigh", "-m", "full"], ["sweep", "--nonsense"], ["nonsense"],
                  ["run", "-m", "compo", "-d", "tiny", "--dim", "many"]):
        assert CliRunner().invoke(cli.app, words).exit_code == 2


def test_sweep_reads_lists_and_resumes(calls):
    words = ["sweep", "--methods", "full,hash_trick(rows=9),compo", "--budgets", "0.5,10%", "--dataset", "tiny",
             "--seeds", "0,1", "--section", "mine", "--lrs", "0.001,0.01"]
    text = ok(*words)
    assert len(calls) == 2 * 2 * (1 + 1 + 2) and "hash_trick(rows=9)" in text
    rows = json.loads(ok(*words, "--json"))
    assert len(calls) == len(rows) == 16 and {r["section"] for r in rows} == {"mine"}
    assert {r["lr"] for r in rows} == {0.001, 0.01} and rows[0]["logloss"] is None


def test_sweep_shards_are_disjoint_and_complete(calls):
    words = ["sweep", "--methods", "full,compo", "--budgets", "0.5,0.25", "-d", "tiny", "--seeds", "0,1,2", "--json"]
    parts = [[r["run_id"] for r in json.loads(ok(*words, "--shard", f"{i}/2"))] for i in (1, 2)]
    assert len(set(parts[0]) | set(parts[1])) == len(parts[0]) + len(parts[1]) == len(calls) == 9
    assert "shard '3/2'" in error(2, *words, "--shard", "3/2")


def test_sweep_with_failures_ends_with_1(calls):
    words = ["sweep", "--methods", "compo,robe", "--budgets", "0.5", "-d", "tiny"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and "ZeroDivisionError: no luck" in result.stdout
    assert result.stderr == "error: 1 of 2 runs failed; the same command runs them again\n"
    assert "robe on tiny" in error(1, *words, "--fail-fast")
    assert "seeds 'a'" in error(2, *words, "--seeds", "a")
    assert "parentheses" in error(2, "sweep", "--methods", "robe(", "-d", "tiny")


def test_an_interruption_says_how_to_go_on(monkeypatch):
    def interrupted(cell, *, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(ecstudy.training, "run_cell", interrupted)
    assert "0 of 1 rows are there; the same call goes on" in error(130, "sweep", "--methods", "full", "-d", "tiny")


def test_results_as_table_csv_json_and_publication(home, calls):
    assert "no rows match" in ok("results")
    ok("sweep", "--methods", "full,compo", "--budgets", "0.5", "-d", "tiny", "--section", "mine")
    text = ok("results", "--method", "compo")
    assert "compo" in text and "0.7512" in text and "full" not in text
    found = list(csv.DictReader(io.StringIO(ok("results", "--csv"))))
    assert [list(row) for row in found] == [list(COLUMNS)] * 2 and found[0]["auc"] == "0.751235"
    assert len(json.loads(ok("results", "--json", "--section", "mine"))) == 2
    assert json.loads(ok("results", "--json", "--section", "other")) == []
    assert "give one" in error(2, "results", "--json", "--csv")
    assert "2 rows" in ok("results", "--section", "mine", "--publish", "out.csv")
    assert {row["method"] for row in store.read_csv(home / "out.csv")} == {"full", "compo"}
    assert "nothing to publish" in error(2, "results", "--section", "other", "--publish", "other.csv")
    assert not (home / "other.csv").exists()


def test_tables_in_a_pipe_are_not_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    reason = "a reason " * 30
    store.write(complete(dict(run_id="r", status="failed", method="m", spec="[bold]m[/bold]", reason=reason)))
    text = ok("results")
    assert reason.strip() in text and "[bold]m[/bold]" in text


# -- methods, version, prep -------------------------------------------------------------------------------------------

def test_methods():
    text, found = ok("methods"), json.loads(ok("methods", "--json"))
    assert [m["method"] for m in found] == names() and all(m["method"] in text for m in found)
    assert {m["method"]: m["knob"] for m in found}["full"] is None


def test_version():
    assert ok("--version") == f"ecstudy {ecstudy.__version__}\n"


def test_prep_synthetic(home):
    text = ok("prep", "synthetic", "easy", "--rows", "500", "--name", "synthetic_500", "--seed", "4")
    made = Dataset.open(home / "data" / "synthetic_500")
    assert sum(made.rows.values()) == 500 and made.fingerprint in text and made.meta["source"]["seed"] == 4
    assert "--overwrite" in error(2, "prep", "synthetic", "easy", "--rows", "500", "--name", "synthetic_500")
    assert "preset 'nope'" in error(2, "prep", "synthetic", "nope")
    assert "skew" in error(2, "prep", "synthetic", "easy", "--rows", "500", "--skew", "9")


def test_prep_table_reads_its_lists(home):
    pytest.importorskip("polars", reason="prep needs the extra prep")
    rows = "".join(f"{i % 2},s{i % 3},i{i % 7},{i}.5\n" for i in range(60))
    (home / "log.csv").write_text("click,shop,item,price\n" + rows)
    ok("prep", "table", "log.csv", "--label", "click", "--categorical", "shop, item", "--numeric", "price",
       "--split", "random", "--fractions", "0.5,0.25,0.25")
    made = Dataset.open(home / "data" / "log")
    assert made.fields == ["shop", "item"] and made.dense == ["price"]
    assert made.rows == dict(train=30, valid=15, test=15)
    words = ["prep", "table", "log.csv", "--out", "x", "--label", "click", "--categorical"]
    assert "'shops'" in error(2, *words, "shops")
    assert "fractions 'a,b'" in error(2, *words, "shop", "--fractions", "a,b")
    assert not (home / "x").exists()


@pytest.mark.parametrize("source", ["criteo", "avazu"])
def test_prep_of_a_file_that_is_not_there(source):
    pytest.importorskip("polars", reason="prep needs the extra prep")
    assert "nowhere.txt" in error(2, "prep", source, "nowhere.txt")


def test_every_option_of_the_prepare_functions_is_offered():
    from ecstudy.data.prepare import prepare_avazu, prepare_criteo, prepare_table

    commands = dict(criteo=prepare_criteo, avazu=prepare_avazu, table=prepare_table, synthetic=cli.generate)
    for name, function in commands.items():
        result = CliRunner().invoke(cli.app, ["prep", name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0
        for option in inspect.signature(function).parameters:
            named = {"path": "path", "preset": "preset", "quote": "--no-quote"}
            flag = named.get(option, "--" + option.replace("_", "-"))
            assert flag in result.stdout, (name, flag)


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == "error: typer is not installed; pip install 'ecstudy[cli]'"


def test_errors_show_their_origin_on_request(monkeypatch):
    monkeypatch.setenv("ECSTUDY_TRACEBACK", "1")
    result = CliRunner().invoke(cli.app, ["weigh", "-m", "full", "-f", "nowhere"])
    assert isinstance(result.exception, CellError)


def test_yardsticks_are_measured_and_shown(monkeypatch):
    from ecstudy.study import baselines

    found = dict(auc=0.7, auc_low=0.6, auc_high=0.8, valid_auc=0.71, logloss=0.5, ne=0.9, seconds=2.0, c=0.1)
    monkeypatch.setattr(baselines, "YARDSTICKS", {"logistic_regression": lambda dataset, **options: found})
    row, = json.loads(ok("yardsticks", "--dataset", "tiny", "--json", "--no-progress"))
    assert row["auc"] == 0.7 and row["model"] == "none" and row["dataset"] == "tiny"
    assert store.results(dataset="tiny")["family"].tolist() == ["yardstick"]
    assert "no data set 'nope'" in error(2, "yardsticks", "--dataset", "nope")
