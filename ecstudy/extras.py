"""Optional libraries, loaded where they are used, with one line that names what to install."""
from __future__ import annotations

import importlib
import warnings


class MissingExtra(ImportError):
    """An optional library is absent; the message names the extra that brings it."""


def need(module: str, extra: str):
    """Import ``module`` or raise :class:`MissingExtra` naming the ``extra`` of ecstudy to install."""
    try:
        with warnings.catch_warnings():
            # transformers' bars remark in a notebook that widgets are missing; the study draws its own
            warnings.filterwarnings("ignore", "IProgress not found")
            if module == "transformers":
                importlib.import_module("tqdm.auto")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name.split(".")[0]):
            raise
        raise MissingExtra(f"{module} is not installed; pip install 'ecstudy[{extra}]'") from None
