"""Facts of data sets, published aggregates first: statistics (the paper's Table 4) and frequency curves."""
from __future__ import annotations

from dataclasses import replace

import pandas as pd

from .. import paths
from ..data import DataError, open_dataset
from ..data import statistics as measured
from ..data.layout import Dataset
from . import figures, tables
from .picture import Html


def published(name: str) -> pd.DataFrame:
    """A table of ``results/``, empty if it is not there."""
    path = paths.results() / name
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def curve(dataset: Dataset) -> pd.DataFrame:
    """Share of ids against share of occurrences, as published."""
    return measured.frequency_curve(dataset).assign(dataset=dataset.name)[["dataset", "id_share", "occurrence_share"]]


def known(names) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Statistics and curves of all published data sets, and of those ``names`` that are at hand and not published."""
    statistics, curves = published("data_statistics.csv"), published("data_frequency.csv")
    for name in names:
        if (paths.data() / name / "meta.json").is_file():
            here = Dataset.open(paths.data() / name)
            if name not in set(statistics.get("dataset", ())):
                statistics = pd.concat([statistics, pd.DataFrame([measured.statistics(here)])])
            if name not in set(curves.get("dataset", ())):
                curves = pd.concat([curves, curve(here)])
    return statistics, curves


def dataset(name: str, *, command: str = "") -> Html:
    """Table 4 of one data set (fields, ids, rows, how skewed) and its frequency curve.

    Raises DataError if nothing is published of it and it is not at hand.
    """
    statistics, curves = known([name])
    if name not in set(statistics.get("dataset", ())):
        here = open_dataset(name)
        statistics, curves = pd.DataFrame([measured.statistics(here)]), curve(here)
        name = here.name
    if not len(statistics := statistics[statistics["dataset"] == name]):
        raise DataError(f"no statistics of {name!r}")
    parts = [replace(tables.statistics(statistics), caption=f"{name}, training split.")._repr_html_()]
    if len(own := curves[curves["dataset"] == name]):
        parts.append(figures.frequency(own, command=command)._repr_html_())
    return Html("\n".join(parts))
