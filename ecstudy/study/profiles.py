"""Profiles: the grids of the study as files, one folder per profile with one file per notebook.

``notebooks/profiles/real/dlrm.yaml`` holds the parameters of ``notebooks/dlrm.ipynb`` in the profile ``real``;
``dlrm-epinions.yaml`` beside it is the same notebook on other data. ``ecstudy study real`` measures the rows that the
notebooks of a profile would, with the same names and defaults.
"""
from __future__ import annotations

import contextlib
from pathlib import Path

import pandas as pd

from .. import paths
from ..extras import need
from . import ablations, store, stream
from .row import CellError, known
from .statistics import publish_contrasts
from .sweep import sweep

_OF_THE_PAGE = ("profile", "missing")                  # what a notebook shows, not what is measured
_PLURAL = {"dataset": "datasets", "model": "models", "dim": "dims", "lr": "lrs"}


def folder() -> Path:
    """Where profiles are: under the study's home, else beside the package (a checkout)."""
    here = [root / "notebooks" / "profiles" for root in (paths.root(), paths.PACKAGE.parent)]
    return next((path for path in here if path.is_dir()), here[0])


def names() -> list[str]:
    return sorted(p.name for p in folder().iterdir() if p.is_dir()) if folder().is_dir() else []


def files(profile: str, only=None) -> list[Path]:
    """The files of a profile, or those of some notebooks. CellError for a profile or a notebook that is not there."""
    if not names():
        raise CellError(f"no profiles in {folder()}: they come with a checkout of the study")
    known("profile", profile, names())
    found = sorted((folder() / profile).glob("*.yaml"), key=lambda p: (ORDER.index(notebook(p)), p.stem))
    for name in only or ():
        known("notebook", name, [p.stem for p in found])
    return [p for p in found if not only or p.stem in only]


# later ones use rows of earlier ones
ORDER = ("dlrm", "model_impact", "dimension_impact", "ablations", "in_training", "rag")


def notebook(path: Path) -> str:
    """The notebook a file of parameters is for."""
    name = path.stem.partition("-")[0]
    known("notebook", name, ORDER)
    return name


def load(path) -> dict:
    """Parameters of a notebook. Raises CellError if the file is not a mapping of names to values."""
    settings = need("yaml", "book").safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise CellError(f"{path}: expected lines `name: value`, got {type(settings).__name__}")
    return settings


def measure(path, *, processes: int | None = None, progress: bool | None = None) -> pd.DataFrame:
    """The rows of one file, measured where they are missing; of a DLRM grid also the yardsticks of its data."""
    from .baselines import measure as yardsticks

    path = Path(path)
    settings = {k: v for k, v in load(path).items() if k not in _OF_THE_PAGE}
    if processes is not None:
        settings["processes"] = processes
    if notebook(path) == "ablations":
        return ablations.run(**settings, progress=progress)
    if notebook(path) == "rag":
        from ..rag.run import study as retrieve            # one process: all questions are searched together

        settings = {k: v for k, v in settings.items() if k != "processes"}
        return pd.concat(retrieve(**settings, progress=progress).values(), ignore_index=True)
    if notebook(path) == "in_training":
        settings = {_PLURAL.get(k, k) if k != "dataset" else k: v for k, v in settings.items()}
        return pd.concat(stream.study(**settings, progress=progress).values(), ignore_index=True)
    rows = sweep(**{_PLURAL.get(k, k): v for k, v in settings.items()}, progress=progress)
    if notebook(path) == "dlrm":
        yardsticks(settings["dataset"], section=settings["section"], progress=progress)
    return rows


def publish(path) -> list[Path]:
    """Write the measured rows of one file into ``results/``, and their differences to Full beside those published.

    Returns the files written. Raises CellError if nothing is measured.
    """
    settings = load(path)
    data, section = settings["dataset"], settings["section"]
    if notebook(path) == "rag":
        from ..rag.compare import SPLIT
        from ..rag.compare import publish as publish_retrieval

        split = [store.publish(section + SPLIT)] if len(store.results(section + SPLIT)) else []
        return [store.publish(section), *split, *publish_retrieval(section)]
    # ablations prepare the data in several ways, whose names go on after its own
    match = [name for name in store.results(section)["dataset"].unique() if name.startswith(data)]
    written = [store.publish(section, dataset=match or [data])]
    if notebook(path) == "in_training":                    # Full's figures are in every trace
        return [*written, stream.publish(section)]
    if notebook(path) != "ablations":                      # which compare with a setting of their own
        with contextlib.suppress(CellError):               # without Full there is nothing to compare
            written.append(publish_contrasts(section))
    return written
