"""Data sets: one layout on disk, opened by name; generated ones need no download."""
from __future__ import annotations

import os
from pathlib import Path

from .. import paths
from .layout import DataError, Dataset, DatasetWriter
from .synthetic import PRESETS, generate, open_preset, preset

__all__ = ["DataError", "Dataset", "DatasetWriter", "generate", "open_dataset"]


def open_dataset(name_or_folder: str | os.PathLike) -> Dataset:
    """Open a data set by name or folder.

    A name in ``ecstudy.data.synthetic.PRESETS``, or one with ``_drift0.5`` behind it, is generated into
    ``paths.data()`` on first use; another name is a folder of ``paths.data()``; anything else that is a folder is
    opened as such.

    Raises
    ------
    DataError
        If there is no such data set; the message lists the known names.
    """
    text = os.fspath(name_or_folder)
    if isinstance(name_or_folder, str) and preset(text):
        return open_preset(text)
    is_name = isinstance(name_or_folder, str) and Path(text).name == text
    if is_name and (paths.data() / text / "meta.json").is_file():
        return Dataset.open(paths.data() / text)
    if text and Path(text).expanduser().is_dir():
        return Dataset.open(Path(text).expanduser())
    prepared = sorted(p.parent.name for p in paths.data().glob("[!.]*/meta.json"))
    raise DataError(
        f"no data set {text!r}: neither a folder nor a known name. Generated on first use: {', '.join(PRESETS)}. "
        f"Prepared in {paths.data()}: {', '.join(p for p in prepared if p not in PRESETS) or 'none'}. "
        "Prepare a real log with `ecstudy prep`"
    )
