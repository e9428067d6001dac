"""A notebook's profile as arguments of ``ecstudy sweep``, so that a grid is written down once.

``ecstudy sweep $(python -m ecstudy.report.profile notebooks/profiles/real.yaml)`` fills the rows the notebook would.
"""
from __future__ import annotations

import sys
from pathlib import Path

from ..extras import need

_PLURAL = {"dataset": "datasets", "model": "models", "dim": "dims", "lr": "lrs"}
_NOT_OURS = ("profile",)


def flags(path) -> list[str]:
    """Arguments of ``ecstudy sweep`` for a profile (YAML, names as in the notebook's parameters).

    Raises ValueError if the file is not a mapping of names to values or lists of values.
    """
    settings = need("yaml", "book").safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected lines `name: value`, got {type(settings).__name__}")
    out = []
    for name, value in settings.items():
        if name not in _NOT_OURS:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            out += ["--" + _PLURAL.get(name, name).replace("_", "-"), text]
    return out


if __name__ == "__main__":
    print(" ".join(flags(sys.argv[1])))
