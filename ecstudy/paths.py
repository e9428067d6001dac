"""Where things lie: never relative to the working folder, because notebooks and commands run anywhere.

In a checkout (an editable install) everything lies beside the package. Elsewhere, and wherever ``ECSTUDY_HOME``
points, that folder is the root.
"""
from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    if home := os.environ.get("ECSTUDY_HOME"):
        return Path(home).expanduser().resolve()
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return PACKAGE.parent
    return Path.home() / ".cache" / "ecstudy"


def data() -> Path:
    """Prepared data sets, one folder each (ignored by git)."""
    return root() / "data"


def runs() -> Path:
    """The cache of measured rows and shared warm-ups (ignored by git)."""
    return root() / "runs"


def results() -> Path:
    """Published rows (committed)."""
    return root() / "results"
