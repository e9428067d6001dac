"""The commands ``ecstudy prep | weigh | run | sweep | study | merge | results | rag`` and more (extra ``cli``).

Bad input ends with one line and exit code 2, a failure with one line and 1, an interruption with 130.
``ECSTUDY_TRACEBACK=1`` shows where an error came from.
"""
from __future__ import annotations

import csv
import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, List, Optional

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__, paths
from .data import generate
from .data.cardinalities import FIELDS
from .data.layout import SPLITS, Dataset
from .data.prepare import prepare_avazu, prepare_criteo, prepare_table
from .data.prepare_script import HELP, NUMBERS
from .rag.commands import rag
from .study import store
from .study.progress import duration
from .study.row import Cell, CellError, check_budget, frame
from .study.sweep import one_line
from .study.sweep import run as run_one
from .study.sweep import sweep as run_grid

BUDGETS = "0.5,0.1,0.01,0.001"                   # the paper's Table 5
UNITS = dict(KB=1000, MB=1000**2, GB=1000**3, KIB=1024, MIB=1024**2, GIB=1024**3)


class OneLineErrors(TyperGroup):
    """Turns errors into one line and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            code, message = 130, f"interrupted: {error}".rstrip(": ")
        except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            code, message = 2, str(error) or one_line(error)
            _traceback(error)
        except (ImportError, OSError, RuntimeError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            if isinstance(error, (typer.Exit, typer.Abort)):         # the ways a command ends are RuntimeErrors
                raise
            code, message = 1, one_line(error)
            _traceback(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(code)


def _traceback(error) -> None:
    if os.environ.get("ECSTUDY_TRACEBACK"):
        raise error


app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="A reproducible study and toolkit of embedding-table compression.")
prep = typer.Typer(no_args_is_help=True, help="Prepare a data set: a click log of yours or a generated one.")
app.add_typer(prep, name="prep")
app.add_typer(rag, name="rag")


def _version(wanted: bool):
    if wanted:
        typer.echo(f"ecstudy {__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False):
    pass


# -- reading what was typed ------------------------------------------------------------------------------------------

def split(text: str) -> list[str]:
    """Cut at commas outside parentheses and quotes: ``full,robe(block=16, sign=True)`` has two parts."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and not depth:
            parts.append("")
            continue
        parts[-1] += char
    parts = [part.strip() for part in parts]
    if depth or quote or not all(parts):
        raise CellError(f"{text!r}: expected values with commas between them" +
                        (", and parentheses and quotes that are closed" if depth or quote else ""))
    return parts


def budget(text: str) -> float | int | None:
    """``0.1`` and ``10%`` are fractions, ``50000`` and ``16MiB`` are bytes, ``none`` is no budget."""
    text = text.strip()
    if text.lower() == "none":
        return None
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.upper().endswith(u)), "")
    number = text[:len(text) - len(unit)].strip()
    try:
        if unit:
            value = int(float(number) * UNITS[unit])
        elif number.endswith("%"):
            value = float(number[:-1]) / 100
        else:
            value = int(number) if number.isdigit() else float(number)
    except ValueError:
        raise CellError(f"budget {text!r}: expected a fraction (0.1, 10%), bytes (50000, 16MiB) or none") from None
    return check_budget(value)


def _specs(texts: list[str], trains: bool | None = None) -> list[str]:
    """Methods as typed; for ``all`` all of them, or all that train."""
    from .registry import names

    return [spec for text in texts for spec in (names(trains) if text == "all" else split(text))]


def numbers(name: str, text: str, kind) -> list:
    try:
        return [kind(part) for part in split(text)]
    except CellError:
        raise
    except ValueError:
        raise CellError(f"{name} {text!r}: expected {'integers' if kind is int else 'numbers'}, as 0,1,2") from None


def options(pairs: list[str]) -> dict:
    """``key=value`` with JSON values: ``bottom=[512,256]``."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            result[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raise CellError(f"model option {pair!r}: expected name=value with a JSON value, as dropout=0.1") from None
    return result


def cardinalities(text: str) -> list[int]:
    """Field sizes: criteo, avazu, company, numbers with commas, a prepared data set, or a JSON or CSV file."""
    if text in FIELDS:
        return list(FIELDS[text][1])
    if all(part.strip().isdigit() for part in text.split(",")):
        return _sizes([int(part) for part in text.split(",")], text)
    for folder in (Path(text), paths.data() / text):
        if (folder / "meta.json").is_file():
            return list(Dataset.open(folder).cardinalities)
    path = Path(text)
    if not path.is_file():
        raise CellError(f"fields {text!r}: expected {', '.join(FIELDS)}, sizes like 5000,300,7, a prepared data set, "
                        "or a JSON or CSV file")
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CellError(f"{path}: not JSON: {error}") from None
        return _sizes(found.get("cardinalities") if isinstance(found, dict) else found, path)
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if "cardinality" not in (rows.fieldnames or ()):
            raise CellError(f"{path}: expected a CSV file with a column 'cardinality'")
        rows = list(rows)
    if len(sets := dict.fromkeys(row.get("dataset") for row in rows)) > 1:
        raise CellError(f"{path} holds several data sets ({', '.join(map(str, sets))}); keep the rows of one")
    return _sizes([int(row["cardinality"]) if (row["cardinality"] or "").strip().isdigit() else row["cardinality"]
                   for row in rows], path)


def _sizes(sizes, where) -> list[int]:
    if not isinstance(sizes, list) or not sizes:
        raise CellError(f"{where}: expected a list of field sizes, or an object with 'cardinalities'")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CellError(f"{where}: field size {size!r}, expected an integer of at least 1")
    return sizes


# -- showing ---------------------------------------------------------------------------------------------------------

def show(head: list[str], lines: list[list], note: str = "") -> None:
    """A table and a line below it. In a pipe it is as wide as it needs to be, so that no cell is cut or wrapped."""
    terminal = sys.stdout.isatty()
    lines = [[str(cell) for cell in line] for line in lines]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name, column in zip(head, zip(*lines)):
        figures = all(cell[:1].isdigit() for cell in column if cell)
        table.add_column(name, justify="right" if figures else "left", overflow="fold", no_wrap=not terminal)
    for line in lines:
        table.add_row(*map(Text, line))
    Console(width=None if terminal else 10_000, file=sys.stdout).print(table)
    if note:
        typer.echo(note)


def number(value, form: str, unit: str = "") -> str:
    return "" if value is None or value != value else format(value, form) + unit


def size(count) -> str:
    """Bytes for people: ``2.16 GB``."""
    if count is None or count != count:
        return ""
    power = min(4, int(math.log10(count) // 3)) if count >= 1 else 0
    return f"{count / 1000**power:.4g} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def share(value) -> str:
    """A budget as typed: a fraction in per cent, or bytes."""
    return "" if value is None or value != value else f"{100 * value:.4g} %" if value <= 1 else size(value)


def dumps(value) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


def records(table) -> list[dict]:
    """Rows of a DataFrame with null where a number is missing."""
    return [{k: None if v != v else v for k, v in row.items()} for row in table.to_dict("records")]


def show_rows(table) -> None:
    head = ["dataset", "model", "dim", "method", "budget", "seed", "status", "AUC", "log loss", "memory",
            "training memory", "time", "latency", "reason"]
    def percent(row, name):
        return number(row[name] and row["bytes_full"] and 100 * row[name] / row["bytes_full"], ".4g", unit=" %")

    lines = [[
        row["dataset"], row["model"], row["dim"], row["spec"], share(row["budget"]), row["seed"], row["status"],
        number(row["auc"], ".4f"), number(row["logloss"], ".4f"), percent(row, "bytes_inference"),
        percent(row, "bytes_training"), "" if row["seconds"] is None else duration(row["seconds"]),
        number(row["latency_ms"], ".3g", unit=" ms"), row["reason"],
    ] for row in records(table)]
    show(head, lines)


# -- commands --------------------------------------------------------------------------------------------------------

DatasetName = Annotated[str, typer.Option("--dataset", "-d", help="A prepared or generated data set, or a folder.")]
Section = Annotated[str, typer.Option(help="The section of the study the rows are for.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")]
Batch = Annotated[int, typer.Option(help="Rows per batch.")]
Evals = Annotated[int, typer.Option(help="Validations per epoch.")]
Patience = Annotated[int, typer.Option(help="Validations without improvement before a stage stops.")]
Epochs = Annotated[float, typer.Option(help="The most epochs of a stage.")]
Schedule = Annotated[str, typer.Option(help="Of the learning rate: constant, plateau or cosine (ablations).")]
Select = Annotated[str, typer.Option(help="Split that selects: valid, or test as the published tool (ablations).")]
ModelOption = Annotated[Optional[List[str]], typer.Option("--model-option", help="name=JSON of the model, repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Measure again what is there already.")]
Shown = Annotated[Optional[bool], typer.Option("--progress/--no-progress", help="By default shown on a terminal.")]
Budgets = Annotated[str, typer.Option("--budgets", "--budget", "-b",
                                      help="With commas: 0.1 or 10% (fractions), 50000 or 16MiB (bytes), none.")]
BaseDim = Annotated[Optional[int], typer.Option(min=1, help="Fractions refer to the full table at this dimension.")]


@app.command()
def run(
    method: Annotated[str, typer.Option("--method", "-m", help="Method, as compo or 'robe(block=16)|int8'.")],
    dataset: DatasetName,
    budget_: Annotated[str, typer.Option("--budget", "-b", help="0.1, 10%, 50000 (bytes), 16MiB or none.")] = "none",
    model: Annotated[str, typer.Option(help="dlrm, wdl or dcn.")] = Cell.model,
    dim: Annotated[int, typer.Option(help="Embedding dimension.")] = Cell.dim,
    seed: int = Cell.seed,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = Cell.lr,
    batch: Batch = Cell.batch, section: Section = Cell.section, device: Device = Cell.device,
    evals_per_epoch: Evals = Cell.evals_per_epoch, patience: Patience = Cell.patience,
    max_epochs: Epochs = Cell.max_epochs,
    model_option: ModelOption = None, force: Force = False, as_json: AsJson = False, progress: Shown = None,
):
    """Train, deploy and measure one cell; a row that is there already is shown as it is."""
    from .training.distributed import started

    cell = Cell(method, dataset, model, dim, budget(budget_), seed, lr, batch, section, device, evals_per_epoch,
                patience, max_epochs, options(model_option or []))
    first = started() == 1 or os.environ["RANK"] == "0"        # of torchrun's processes
    row = run_one(cell, force=force, progress=progress if first else False)
    if not first:
        return
    if as_json:
        return typer.echo(dumps(row))
    show_rows(frame([row]))
    show(["figure", "value"], [[name, value] for name, value in row.items() if value is not None and value != ""])


@app.command()
def sweep(
    methods: Annotated[str, typer.Option(help="With commas, as full,compo,'robe(block=16)', or all.")],
    datasets: Annotated[str, typer.Option("--datasets", "--dataset", "-d", help="Data sets, with commas.")],
    budgets: Budgets = BUDGETS,
    models: Annotated[str, typer.Option(help="Models, with commas.")] = Cell.model,
    dims: Annotated[str, typer.Option(help="Embedding dimensions, with commas.")] = str(Cell.dim),
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = str(Cell.seed),
    lrs: Annotated[str, typer.Option(help="Learning rates, with commas.")] = str(Cell.lr),
    base_dim: BaseDim = None,
    processes: Annotated[int, typer.Option(min=0, help="Workers; 0 runs in this process.")] = 0,
    executor: Annotated[Optional[str], typer.Option(help="inline, processes or ray; by default as --processes says.")
                        ] = None,
    cpus_per_run: Annotated[Optional[int], typer.Option(min=1, help="Of a run on Ray; also its threads.")] = None,
    gpus_per_run: Annotated[Optional[float], typer.Option(min=0, help="Of a run on Ray: 0.25 lets four share one.")
                            ] = None,
    address: Annotated[Optional[str], typer.Option(help="A running Ray, auto or host:port; else one is started.")
                       ] = None,
    shard: Annotated[Optional[str], typer.Option(help="i/n: only part i of n, for several machines.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    batch: Batch = Cell.batch, section: Section = Cell.section, device: Device = Cell.device,
    evals_per_epoch: Evals = Cell.evals_per_epoch, patience: Patience = Cell.patience,
    max_epochs: Epochs = Cell.max_epochs, schedule: Schedule = Cell.schedule, select: Select = Cell.select,
    tune: Annotated[bool, typer.Option("--tune", help="The first seed tries all learning rates, the other seeds take "
                                                      "the best on validation.")] = False,
    model_option: ModelOption = None, force: Force = False, as_json: AsJson = False, progress: Shown = None,
):
    """Run the missing cells of a grid; interrupt at any time, the same command goes on with the rest."""
    table = run_grid(
        _specs([methods], trains=True), [budget(part) for part in split(budgets)], datasets=split(datasets),
        models=split(models),
        dims=numbers("dims", dims, int), seeds=numbers("seeds", seeds, int), lrs=numbers("lrs", lrs, float),
        base_dim=base_dim, processes=processes, shard=shard, fail_fast=fail_fast, force=force, progress=progress,
        batch=batch, section=section, device=device, evals_per_epoch=evals_per_epoch, patience=patience,
        max_epochs=max_epochs, schedule=schedule, select=select, tune=tune, model_options=options(model_option or []),
        executor=executor, cpus=cpus_per_run, gpus=gpus_per_run, address=address)
    typer.echo(dumps(records(table))) if as_json else show_rows(table)
    if failed := int((table["status"] == "failed").sum()):
        typer.echo(f"error: {failed} of {len(table)} runs failed; the same command runs them again", err=True)
        raise typer.Exit(1)


@app.command()
def study(
    profile: Annotated[str, typer.Argument(help="A folder of notebooks/profiles: quick, real, medium or paper.")],
    only: Annotated[Optional[List[str]], typer.Option(help="Only this file of it, as dlrm; repeatable.")] = None,
    processes: Annotated[Optional[int], typer.Option(min=0, help="Workers, instead of the profile's number.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Write measured rows into results/, run nothing.")] = False,
    progress: Shown = None,
):
    """Measure the missing rows of a profile; interrupt at any time, the same command goes on with the rest."""
    from .study import profiles

    failed = 0
    for path in profiles.files(profile, only):
        if publish:
            for target in profiles.publish(path):
                typer.echo(f"{path.stem}: {target}")
            continue
        typer.echo(f"{path.stem}: {profiles.load(path)['dataset']}", err=True)
        status = profiles.measure(path, processes=processes, progress=progress)["status"]
        failed += int((status == "failed").sum())
        typer.echo(f"{path.stem}: " + ", ".join(f"{n} {kind}" for kind, n in status.value_counts().items()))
    if failed:
        typer.echo(f"error: {failed} runs failed; the same command runs them again", err=True)
        raise typer.Exit(1)


@app.command()
def merge(folders: Annotated[List[Path], typer.Argument(help="ECSTUDY_HOME of other machines (their checkouts), or "
                                                             "the folders with their rows.")]):
    """Take over the rows of other machines: new ones, newer ones, and good ones in place of failed ones."""
    for folder in folders:
        count = store.merge(folder)
        typer.echo(f"{folder}: {count['new']} new, {count['better']} better, {count['kept']} already here")


@app.command()
def yardsticks(dataset: DatasetName, section: Section = Cell.section, force: Force = False, as_json: AsJson = False,
               progress: Shown = None):
    """Measure what a data set yields without embeddings: its base rate and one-hot logistic regressions."""
    from .study.baselines import measure

    table = measure(dataset, section=section, force=force, progress=progress)
    typer.echo(dumps(records(table))) if as_json else show_rows(table)


@app.command()
def results(
    section: Annotated[Optional[str], typer.Option(help="Only rows of this section.")] = None,
    dataset: Annotated[Optional[str], typer.Option("--dataset", "-d", help="Only rows of this data set.")] = None,
    method: Annotated[Optional[str], typer.Option("--method", "-m", help="Only rows of this method.")] = None,
    model: Annotated[Optional[str], typer.Option(help="Only rows of this model.")] = None,
    status: Annotated[Optional[str], typer.Option(help="ok, unreachable, diverged or failed.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all columns as CSV.")] = False,
    as_json: AsJson = False,
    publish: Annotated[Optional[Path], typer.Option(help="Write the matching measured rows into this CSV.")] = None,
    contrasts: Annotated[Optional[Path], typer.Option(help="Write the section's differences to Full, with intervals "
                                                           "and verdicts, into this CSV.")] = None,
):
    """Show the rows that are there, one per run."""
    filters = dict(dataset=dataset, method=method, model=model, status=status)
    filters = {name: value for name, value in filters.items() if value is not None}
    if as_csv and as_json:
        raise CellError("--csv and --json: give one")
    if publish is not None:
        path = store.publish(section, publish, **filters)
        return typer.echo(f"{path}: {len(store.read_csv(path))} rows")
    if contrasts is not None:
        from .study.statistics import publish_contrasts, read_contrasts

        if filters:
            raise CellError(f"--contrasts takes all rows of a section; leave out --{next(iter(filters))}")
        path = publish_contrasts(section, contrasts)
        return typer.echo(f"{path}: {len(read_contrasts(path))} differences")
    table = store.results(section, **filters)
    if as_csv:
        store.write_csv(table, sys.stdout)
    elif as_json:
        typer.echo(dumps(records(table)))
    elif table.empty:
        typer.echo("no rows match; run some with `ecstudy sweep`")
    else:
        show_rows(table)


@app.command()
def claims(as_json: AsJson = False):
    """Judge the paper's claims from the rows that are there."""
    from .study.claims import ledger

    found = ledger()
    if as_json:
        lines = records(found.drop(columns=["parts"]))
        return typer.echo(json.dumps(lines, indent=1, allow_nan=False, ensure_ascii=False))
    show(["claim", "verdict", "what it says", "paper", "here"],
         [[r["id"], r["verdict"], r["claim"], r["paper"], r["text"]] for _, r in found.iterrows()],
         note=", ".join(f"{n} {verdict}" for verdict, n in found["verdict"].value_counts().items()))


@app.command()
def methods(as_json: AsJson = False):
    """List the methods."""
    from .registry import table

    found = table()
    if as_json:
        plain = [m | {"knob": m["knob"] or None} for m in found.reset_index().to_dict("records")]
        return typer.echo(json.dumps(plain, indent=1, default=str))
    show(["method", "family", "depends on", "size by", "paper", "idea"],
         [[name, m["family"], m["aware"], m["knob"], m["paper"], m["summary"]]
          for name, m in found.iterrows()])


@app.command()
def weigh(
    method: Annotated[List[str], typer.Option("--method", "-m", help="Methods, repeatable or with commas, or all.")],
    fields: Annotated[str, typer.Option("--fields", "-f", help="criteo, avazu, company, sizes as 5000,300,7, a "
                                        "prepared data set, or a JSON or CSV file of sizes.")],
    budgets: Budgets = BUDGETS,
    dim: Annotated[int, typer.Option(min=1, help="Embedding dimension.")] = Cell.dim,
    base_dim: BaseDim = None,
    as_json: AsJson = False,
):
    """Weigh methods at budgets: deployed and training bytes, without training and without allocating anything."""
    from .budget import weigh as weigh_one

    sizes, limits = cardinalities(fields), [budget(part) for part in split(budgets)]
    found = [weigh_one(spec, sizes, dim, limit, base_dim) for spec in _specs(method) for limit in limits]
    if as_json:
        return typer.echo(dumps(found))
    full = size(found[0]["bytes_full"])
    total = f"{len(sizes)} fields, {sum(sizes):,} ids, dimension {dim}: the full table takes {full}"
    show(["method", "budget", "size by", "memory", "", "training memory", "", "reason"], [
        [w["method"], share(w["budget"]), number(w["knob"], "") if w["reachable"] else "unreachable",
         size(w["bytes_inference"]), number(w["inference_pct"], ".4g", " %"), size(w["bytes_training"]),
         number(w["training_pct"], ".4g", " %"), w["reason"]] for w in found], note=total)


# -- prep: one command per prepare function, its options read off the signature -------------------------------------

GENERATE_HELP = dict(
    preset="What is imitated: criteo, avazu, easy, or a ready data set as synthetic_criteo_s.",
    out="The folder to create (default: beside the other data sets).",
    rows="Rows of the whole log.", scale="Factor of the true field sizes (default: rows / true rows).",
    seed="Seed of ids, effects, rows and labels.", skew="Multiplies the exponents of popularity; 0 is uniform.",
    rank="Dimension of the latent vectors that interact, 0 to 10.",
    clusters="Share of an id's effect that it has in common with its cluster, 0 to 1.",
    drift="How far effects turn and popularity moves by the last row, 0 to 1.",
)
EMPTY = inspect.Parameter.empty


def _prep(name: str, function, help: dict) -> None:
    """Add ``ecstudy prep <name>``. What is not given on the command line stays the function's own default."""
    parameters = inspect.signature(function).parameters
    several = {key for key, p in parameters.items() if isinstance(p.default, tuple)} | {"categorical", "columns"}
    options = [_option(key, p, key in several, help) for key, p in parameters.items()]

    def command(**given):
        chosen = {key: value for key, value in given.items() if value is not None and key != "quote"}
        if given.get("quote"):
            chosen["quote"] = None
        for key in several & chosen.keys():
            parts = [part.strip() for part in chosen[key].split(",")]
            chosen[key] = tuple(numbers(key, chosen[key], float) if key == "fractions" else parts)
        if "path" in chosen and "out" not in chosen:
            fallback = name if name != "table" else Path(chosen["path"]).name.split(".")[0]
            chosen["out"] = paths.data() / (chosen.get("name") or fallback)
        made = function(**chosen)
        rows = ", ".join(f"{made.rows[split]:,} {split}" for split in SPLITS)
        typer.echo(f"{made.folder}: {rows} rows, {len(made.fields)} fields, {sum(made.cardinalities):,} ids, "
                   f"{len(made.dense)} numeric, fingerprint {made.fingerprint}")

    command.__signature__ = inspect.Signature(options)
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__doc__ = inspect.getdoc(function).splitlines()[0].replace("``", "")
    prep.command(name)(command)


def _option(key: str, parameter: inspect.Parameter, several: bool, help: dict) -> inspect.Parameter:
    """The command-line form of one parameter of a prepare function."""
    default, flag, text = parameter.default, "--" + key.replace("_", "-"), help[key]
    if key in ("path", "preset"):
        kind, info = str, typer.Argument(help=text)
    elif key == "quote":
        kind, default, info = bool, False, typer.Option("--no-quote", help=help["no_quote"])
    elif key == "progress":
        kind, default, info = Optional[bool], None, typer.Option("--progress/--no-progress", help=text)
    elif key == "out":
        kind, default, info = Optional[str], None, typer.Option(flag, help=text, show_default="in the data folder")
    elif isinstance(default, bool):
        kind, info = bool, typer.Option(flag, help=text)
    elif several:
        kind, info = str, typer.Option(flag, help=text, show_default=False)
        if default is not EMPTY:
            shown = ",".join(map(str, default or ())) or False
            kind, default, info = Optional[str], None, typer.Option(flag, help=text, show_default=shown)
    else:
        named = {**NUMBERS, "rows": int, "scale": float}           # the default None does not tell their type
        kind = named.get(key) or (str if default in (None, EMPTY) else type(default))
        kind, info = kind if default is EMPTY else Optional[kind], typer.Option(flag, help=text)
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


HELP = HELP | {"quote": "", "out": "The folder to create."}
_prep("criteo", prepare_criteo, HELP)
_prep("avazu", prepare_avazu, HELP)
_prep("table", prepare_table, HELP)
_prep("synthetic", generate, HELP | GENERATE_HELP)
