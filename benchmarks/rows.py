"""Where benchmarks put what they measured."""
from __future__ import annotations

from pathlib import Path

import pandas as pd


def publish(rows: list[dict], path: str | None) -> None:
    """Append rows to a CSV; a row measured before with the same settings is replaced. None: only printed."""
    if not path:
        return
    old = pd.read_csv(path) if Path(path).is_file() else pd.DataFrame()
    table = pd.concat([old, pd.DataFrame(rows)], ignore_index=True)
    if "compiled" in table:
        table["compiled"] = table["compiled"].fillna(False).astype(bool)     # not every benchmark knows of it
    keys = ("benchmark", "method", "budget", "batch", "rows", "device", "threads", "compiled")
    same = [c for c in keys if c in table]
    table.drop_duplicates(same, keep="last").sort_values(same).to_csv(path, index=False, float_format="%.5g")
