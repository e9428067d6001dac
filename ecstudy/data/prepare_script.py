"""The command line of the scripts in ``data_prep/``: options read off a prepare function's signature."""
from __future__ import annotations

import argparse
import inspect
import sys

from ..extras import MissingExtra
from .layout import DataError

HELP = dict(
    path="the raw file, plain or gzip",
    out="the folder to create",
    vocab="ids from all rows (the paper) or from training rows only",
    min_count="values with fewer occurrences share the reserved id 0",
    max_bad="largest share of malformed rows that is skipped with a warning",
    split="how rows are split: by the paper's rule, chronological, or random",
    fractions="shares of train, valid, test when the split is not the paper's, as 0.8,0.1,0.1",
    seed="seed of the random split",
    name="name of the data set (default: the folder's)",
    overwrite="replace an existing folder",
    progress="show progress also when not on a terminal",
    chunk_rows="rows held at a time, roughly; the result does not depend on it",
    split_hour="day and hour of the day as two fields in place of hour",
    label="column of 0/1 labels",
    categorical="categorical columns, as a,b,c",
    numeric="numeric columns, as a,b,c",
    time="column to order rows by",
    numeric_transform="log, standard or none",
    label_threshold="label = value >= this number",
    distinct="fields of which each combination of values keeps its first row, as a,b",
    separator="column separator of a text file (default: found in the header)",
    columns="names of all columns of a text file without header, as a,b,c",
    no_quote="quotes are plain characters",
    missing="cell texts that mean no value, as NA,null",
)
NUMBERS = dict(label_threshold=float)       # options whose default (None) does not tell their type


def parser(function) -> argparse.ArgumentParser:
    """An argument parser with one option for each parameter of ``function``."""
    result = argparse.ArgumentParser(description=inspect.getdoc(function).splitlines()[0])
    for name, parameter in inspect.signature(function).parameters.items():
        default, required = parameter.default, parameter.default is inspect.Parameter.empty
        flag = "--" + name.replace("_", "-")
        if name == "path":
            result.add_argument(name, help=HELP[name])
        elif name == "quote":
            result.add_argument("--no-quote", dest=name, action="store_const", const=None, default=default,
                                help=HELP["no_quote"])
        elif name == "progress":
            result.add_argument(flag, action="store_const", const=True, default=None, help=HELP[name])
        elif isinstance(default, bool):
            result.add_argument(flag, action="store_true", help=HELP[name])
        else:
            kind = NUMBERS.get(name) or (str if required or default is None else type(default))
            if kind is tuple or name in ("categorical", "columns"):
                kind = _floats if name == "fractions" else _words
            shown = "" if required or default in (None, (), ("",)) else " (default: %(default)s)"
            result.add_argument(flag, type=kind, default=None if required else default, required=required,
                                help=HELP[name] + shown)
    return result


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def run(function, argv=None) -> int:
    """Parse the command line, prepare, print one line; 0, or 2 after one line naming what is wrong."""
    options = vars(parser(function).parse_args(argv))
    try:
        dataset = function(**options)
    except (DataError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = ", ".join(f"{split} {count:,}" for split, count in dataset.rows.items())
    print(f"{dataset.folder}: {rows} rows, {len(dataset.fields)} fields, {sum(dataset.cardinalities):,} ids, "
          f"{len(dataset.dense)} numeric, fingerprint {dataset.fingerprint}")
    return 0
