"""``python -m ecstudy`` and the command ``ecstudy``."""
from __future__ import annotations

import sys


def main() -> None:
    from .extras import MissingExtra, need

    try:
        need("typer", "cli")
        need("rich", "cli")
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    from .cli import app

    app()


if __name__ == "__main__":
    main()
