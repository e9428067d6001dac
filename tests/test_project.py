"""The project as a reader meets it: what is installed, what README and book promise, what is committed."""
from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import ecstudy as ec
from ecstudy.fields import Fields
from ecstudy.registry import names
from ecstudy.rag.run import RagCell
from ecstudy.spec import parse
from ecstudy.study.stream import StreamCell
from ecstudy.study import ablations, profiles
from ecstudy.study.row import Cell, CellError, frame

ROOT = Path(ec.__file__).resolve().parent.parent
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("not a checkout", allow_module_level=True)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*/*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tracked() -> list[Path]:
    """Files of the project: what git knows or would add, or everything outside the ignored folders without git."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
                          capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [p for name in done.stdout.splitlines() if (p := ROOT / name).is_file()]
    skip = {".venv", ".git", "_build", "runs", "data", "generated"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def python(code: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **settings)


def blocks(path: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), flags=re.S)


def test_importing_the_core_imports_torch_numpy_and_pandas_only():
    optional = ["polars", "sklearn", "scipy", "typer", "rich", "matplotlib", "seaborn", "papermill", "safetensors",
                "yaml", "nbformat", "transformers", "faiss", "ray", "pyarrow.parquet"]
    done = python(f"import sys, ecstudy; print(sorted(set({optional}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    # pandas itself may import pyarrow where it is installed; ours must not reach for its parquet part
    assert done.stdout.strip() == "[]"


def test_report_imports_without_drawing_libraries():
    done = python("import sys, ecstudy.report; print('matplotlib' in sys.modules, 'scipy.stats' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_readme_example_runs(tmp_path):
    code = blocks("README.md")[0]
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 3, 16])\n0.25\n")     # what the comments beside the lines say
    assert not list(tmp_path.iterdir())
    assert 8 <= len([line for line in code.splitlines() if line.strip()]) <= 12


def test_example_method_of_the_book_works(tmp_path):
    code = next(b for b in blocks("book/reproduce.md") if "class Remainder" in b)
    path = tmp_path / "remainder.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("ecstudy.methods.remainder_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fields = Fields([50, 20, 8])
    sizes = [ec.memory(module.Remainder(fields, 16, rows=r).deploy()) for r in (1, 10, 50)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]
    emb = module.Remainder(fields, 16, rows=10)
    a, b = emb(torch.tensor([[3, 4, 5]])), emb(torch.tensor([[13, 14, 5]]))
    assert a.shape == (1, 3, 16) and torch.equal(a, b) and not torch.equal(a[:, 0], a[:, 1])


def test_commands_named_in_the_pages_exist():
    pages = ("README.md", "book/reproduce.md", "book/data.md", "book/scale.md")
    text = "\n".join((ROOT / p).read_text() for p in pages)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) - {"it"} <= targets
    from typer.main import get_command

    from ecstudy.cli import app

    commands = get_command(app).commands
    for line in re.findall(r"^ecstudy .*", text, flags=re.M):
        words = line.split("#")[0].split()
        command = commands[words[1]]
        if hasattr(command, "commands"):
            command = command.commands[words[2]]
        options = {o for p in command.params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, line


def test_environment_installs_what_make_installs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    entries = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "--constraint constraints.txt" in entries
    extras = set(re.search(r"-e \.\[(.*)\]", " ".join(entries)).group(1).split(","))
    made = set(re.search(r"^EXTRAS\s*:=\s*(\S+)", (ROOT / "Makefile").read_text(), flags=re.M).group(1).split(","))
    assert extras == made <= set(PYPROJECT["project"]["optional-dependencies"])
    assert f"python={PYPROJECT['project']['requires-python'].removeprefix('>=')}" in environment["dependencies"]


def test_core_depends_on_three_packages():
    core = {re.match(r"[\w-]+", d).group() for d in PYPROJECT["project"]["dependencies"]}
    assert core == {"torch", "numpy", "pandas"}


def test_constraints_pin_every_requirement_of_the_environment():
    lines = [li for li in (ROOT / "constraints.txt").read_text().splitlines() if li and not li.startswith("#")]
    pins = {}
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line!r}: expected name==version without local label or path"
        name, version = line.split("==")
        pins[name.lower().replace("_", "-")] = version
    assert pins["jupyter-book"].startswith("1.")
    extras = PYPROJECT["project"]["optional-dependencies"]
    chosen = ("save", "cli", "prep", "book", "rag", "dev")
    wanted = [*PYPROJECT["project"]["dependencies"], *(d for e in chosen for d in extras[e])]
    for requirement in wanted:
        assert re.match(r"[\w-]+", requirement).group().lower().replace("_", "-") in pins, requirement


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == PYPROJECT["project"]["version"] == ec.__version__
    assert citation["license"] == PYPROJECT["project"]["license"] == "Apache-2.0"
    assert f"## {ec.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version = {{{ec.__version__}}}" in (ROOT / "book" / "cite.md").read_text()


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_no_path_of_a_machine_is_committed():
    place = re.compile(r"(?<![\w.~$}/-])/(?:root|home/\w+|Users/\w+|work|tmp|mnt)/[\w.]")
    for path in tracked():
        if path.suffix in {".py", ".md", ".ipynb", ".yml", ".yaml", ".toml", ".cff", ".txt", ".csv", ".css", ""}:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                assert not place.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_hold_no_output_and_little_code(path):
    notebook = json.loads(path.read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    lines = [(len("".join(c["source"]).splitlines()), "parameters" in c["metadata"].get("tags", [])) for c in code]
    assert all(n <= (24 if parameters else 12) for n, parameters in lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_call_what_there_is(path):
    from ecstudy import report

    called = re.findall(r"report\.(\w+)\(", path.read_text())
    assert len(called) >= 4 and set(called) <= set(report.__all__)


def parameters(notebook: str) -> set[str]:
    cell = next(c for c in json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
                if "parameters" in c["metadata"].get("tags", []))
    return set(re.findall(r"^(\w+) =", "".join(cell["source"]), flags=re.M))


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_profiles_set_parameters_the_notebook_has(path):
    profile = profiles.load(path)
    assert profile["profile"] == f"{path.parent.name}/{path.stem}"
    assert set(profile) <= parameters(profiles.notebook(path))
    if profiles.notebook(path) == "rag":
        assert profile["methods"][0] == "full"
        assert all(RagCell(m, profile["dataset"], profile["questions"], b, s, reader=profile["reader"]).spec
                   for m in profile["methods"] for b in profile["budgets"] for s in profile["seeds"])
        return
    stream = profiles.notebook(path) == "in_training"
    kept = ("dataset", "batch", "section", *(("windows",) if stream else ("evals_per_epoch", "patience", "max_epochs")))
    (StreamCell if stream else Cell)(**{k: profile[k] for k in kept}, method="full", seed=profile["seeds"][0])
    if "only" in profile:
        assert set(profile["only"] or ()) <= set(ablations.names())
    else:
        assert {parse(m).name for m in profile["methods"]} <= set(names()) and profile["methods"][0] == "full"
        assert all(Cell("full", "x", budget=b, lr=lr) for b in profile["budgets"] for lr in profile["lrs"])


def test_profiles_are_files_of_notebooks(monkeypatch, tmp_path):
    assert {p.stem for p in profiles.files("quick")} == set(profiles.ORDER) == {p.stem for p in NOTEBOOKS}
    assert [p.stem for p in profiles.files("real")][:3] == ["dlrm", "dlrm-beyond", "dlrm-epinions"]
    assert [p.stem for p in profiles.files("real", ["ablations"])] == ["ablations"]
    with pytest.raises(CellError, match="profile 'quik'.*quick"):
        profiles.files("quik")
    with pytest.raises(CellError, match="notebook 'dlmr'.*dlrm"):
        profiles.files("quick", ["dlmr"])
    (tmp_path / "p.yaml").write_text("- a list")
    with pytest.raises(CellError, match="expected lines `name: value`"):
        profiles.load(tmp_path / "p.yaml")


@pytest.mark.parametrize("name", [n for n in profiles.ORDER if n != "rag"])
def test_a_profile_measures_what_its_notebook_shows(name, monkeypatch, tmp_path):
    """The same cells from ``ecstudy study`` as from executing the notebook's own call."""
    module = importlib.import_module("ecstudy.study.sweep")
    asked = []
    monkeypatch.setattr(module.store, "rows", dict)
    done = dict(status="ok", valid_auc=0.5, section="", data_fingerprint="")

    def fill(cells, **options):
        asked.append({cell.run_id for cell in cells})
        return frame([done | dict(run_id=cell.run_id) for cell in cells])

    monkeypatch.setattr(module, "fill", fill)
    monkeypatch.setattr(ablations, "fill", fill)
    monkeypatch.setattr("ecstudy.study.baselines.measure", lambda *a, **k: None)
    path = next(p for p in profiles.files("quick") if p.stem == name)
    profiles.measure(path)
    by_profile, asked[:] = set().union(*asked), []
    code = ["".join(c["source"]) for c in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
            if c["cell_type"] == "code"]
    space = {}
    exec(code[0], space)
    space |= profiles.load(path)
    exec(code[1].split("command =")[0], space)
    assert set().union(*asked) == by_profile and by_profile


def test_a_profile_of_retrieval_measures_what_its_notebook_shows(monkeypatch):
    asked = []
    monkeypatch.setattr("ecstudy.rag.run.sweep", lambda corpus, methods, budgets, **settings: asked.append(
        dict(settings, corpus=corpus, methods=methods, budgets=budgets)) or pd.DataFrame())
    path = next(p for p in profiles.files("quick") if p.stem == "rag")
    profiles.measure(path, processes=2)
    cells = json.loads((ROOT / "notebooks" / "rag.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    space = {}
    exec(code[0], space)
    space |= profiles.load(path)
    exec(code[1].split("command =")[0], space)
    told = [{k: v for k, v in one.items() if k not in ("progress", "missing", "device")} for one in asked]
    assert told[:2] == told[2:] and told[0]["corpus"] == "synthetic_facts" and asked[2]["missing"] == "run"
    assert told[1]["weights"] == "retrieved" and told[1]["section"] == told[0]["section"] + "_split"


def test_every_page_of_the_contents_is_there_or_generated(tmp_path):
    from ecstudy.report import pages

    def entries(node):
        if isinstance(node, dict):
            yield from (v for k, v in node.items() if k in ("root", "file", "glob"))
            node = list(node.values())
        for child in node if isinstance(node, list) else ():
            yield from entries(child)

    generated = {f"book/{p.relative_to(tmp_path).with_suffix('')}" for p in pages.write_pages(tmp_path, weights=False)}
    generated |= {f"book/notebooks/{p.parent.name}/{p.stem}" for p in PROFILES if p.parent.name != "paper"}
    listed = list(entries(yaml.safe_load((ROOT / "_toc.yml").read_text())))
    assert len(listed) == len(set(listed)) and "book/intro" in listed
    for entry in listed:
        if entry.endswith("/*"):
            assert [g for g in generated if g.startswith(entry[:-1])], entry
        else:
            assert entry in generated or (ROOT / f"{entry}.md").is_file(), entry
    text = "\n".join(p.read_text() for p in (ROOT / "book").glob("*.md"))
    included = set(re.findall(r"\{include\} (generated/\S+)\.md", text))
    assert {f"book/{i}" for i in included} <= generated
    committed = {f"book/{p.stem}" for p in (ROOT / "book").glob("*.md")}
    assert committed <= set(listed), "a page that the contents do not list"


def test_workflow_pins_actions_and_runs_local_commands():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    steps = [s for job in workflow["jobs"].values() for s in job["steps"]]
    for step in steps:
        assert "run" in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]), step
        assert "run" not in step or step["run"].startswith("make "), step
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111 and "make test" in ci.read_text() and "make report" in ci.read_text()
