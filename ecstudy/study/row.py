"""A run before it starts (:class:`Cell`) and what it leaves behind: one row of named columns.

The id of a run is a hash of what decides its result: the canonical method, the training settings and the data's
fingerprint. Labels (section), the name or folder under which the data was opened, and the device do not enter it, so
the same run asked for by two sections, or from two machines, is the same row.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import pandas as pd

from .. import paths
from ..training.run import LATER

STATUSES = ("ok", "unreachable", "diverged", "failed")
DONE = STATUSES[:3]                      # a failed row is kept to be read, and run again by the next sweep

#: Every column of a row, in order. Sizes are bytes, times ``*_ms`` milliseconds per batch and ``seconds`` seconds;
#: ``bytes_breakdown``, ``stage_seconds``, ``settings`` and ``allocation`` hold JSON text.
COLUMNS = tuple("""
    run_id section task method spec family dataset model dim budget budget_bytes reached status reason seed lr batch
    auc auc_low auc_high valid_auc logloss ne em f1 recall_1 recall_5 recall_10 recall_20 recall_100
    bytes_full bytes_inference bytes_training peak_bytes seconds stage_seconds steps latency_ms latency_full_ms
    decode_ms search_ms device threads torch python version commit dirty data_fingerprint created
    epochs valid_logloss forward_ms forward_full_ms latency_p10_ms latency_p90_ms bytes_breakdown machine settings
    allocation
""".split())
TEXT = frozenset("""run_id section task method spec family dataset model status reason stage_seconds device torch python
    version commit data_fingerprint created bytes_breakdown machine settings allocation""".split())
WHOLE = frozenset("dim seed batch threads".split())          # int64, 0 where a row has none; other numbers are float64
EXACT = frozenset("budget lr budget_bytes bytes_full bytes_inference bytes_training peak_bytes steps".split())
FLAGS = frozenset(["dirty"])
_LABELS = ("section", "device", "dataset")                   # fields of a cell that do not enter the run's id


SCHEDULES, SELECT = ("constant", "plateau", "cosine"), ("valid", "test")


class CellError(ValueError):
    """A run that cannot be started; the message names the value, what was expected and the remedy."""


def _number(name: str, value, kind, low, expected: str):
    """``value`` as a plain ``kind``; numpy numbers pass, booleans, strings and fractions of an int do not."""
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value) or value < low:
        raise CellError(f"{name} {value!r}: expected {expected}")
    return kind(value)


@dataclass(frozen=True)
class Cell:
    """The full specification of one run.

    Parameters
    ----------
    method:
        A spec text, for example ``"tt_rec"`` or ``"compo|int8"``.
    dataset:
        The name of a prepared data set, or its folder.
    model, model_options:
        The head (``dlrm``, ``wdl``, ``dcn``) and the arguments it takes beyond its defaults.
    dim:
        Embedding dimension.
    budget:
        A float in (0, 1] is a fraction of the fp32 full table, an int is bytes, ``None`` leaves the method's own size.
    seed, lr, batch:
        Seed of weights and order, learning rate, rows per batch. Defaults are the paper's (section 5.1).
    evals_per_epoch, patience, max_epochs:
        Validations per epoch, validations without improvement before a stage stops, and the most epochs of a stage.
    section:
        The section of the study that asks for the run (a label).
    device:
        ``cpu``, ``cuda``, ``cuda:1``...
    schedule, select:
        Of the learning rate, and the split that selects; see :class:`ecstudy.training.Settings`. Only ablations change
        them.

    Raises
    ------
    CellError
        If a number is out of range. Names are looked up by :meth:`check`, before work starts.
    """

    method: str
    dataset: str
    model: str = "dlrm"
    dim: int = 16
    budget: float | int | None = None
    seed: int = 0
    lr: float = 0.001
    batch: int = 128
    section: str = "dlrm"
    device: str = "cpu"
    evals_per_epoch: int = 10
    patience: int = 10
    max_epochs: float = 10.0
    model_options: dict = field(default_factory=dict, hash=False)
    schedule: str = "constant"
    select: str = "valid"

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        if isinstance(self.dataset, os.PathLike):
            put("dataset", os.fspath(self.dataset))
        for name in ("method", "dataset", "model", "section", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise CellError(f"{name} {value!r}: expected a name")
        if "+" in self.section:
            raise CellError(f"section {self.section!r}: expected a name without '+', which joins sections in a row")
        for name in ("dim", "batch", "evals_per_epoch", "patience"):
            put(name, _number(name, getattr(self, name), int, 1, "an integer of at least 1"))
        put("seed", _number("seed", self.seed, int, 0, "an integer of at least 0"))
        if self.seed >= 2**63:
            raise CellError(f"seed {self.seed}: expected an integer below 2**63")
        put("lr", _number("lr", self.lr, float, math.ulp(0.0), "a number above 0, for example 0.001"))
        put("max_epochs", _number("max_epochs", self.max_epochs, float, math.ulp(0.0), "a number above 0, as 10"))
        put("budget", check_budget(self.budget))
        for name, names in (("schedule", SCHEDULES), ("select", SELECT)):
            known(name, getattr(self, name), names)
        try:
            put("model_options", json.loads(json.dumps(dict(self.model_options))))
        except (TypeError, ValueError):
            raise CellError(f"model_options {self.model_options!r}: expected names with JSON values") from None

    @cached_property
    def spec(self):
        """The parsed method (``ecstudy.spec.Spec``)."""
        from ..spec import parse

        return parse(self.method)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the data. Where the data is not on disk, that of known rows, so that these are still found."""
        if not _on_disk(self.dataset):
            from . import store

            known = [r for r in store.rows().values() if r["dataset"] == self.dataset and r["data_fingerprint"]]
            if known:
                return max(known, key=lambda r: r["created"])["data_fingerprint"]
        return _open(self.dataset).fingerprint

    @cached_property
    def run_id(self) -> str:
        # every field enters, a later one as LATER says: published rows would otherwise lose their ids
        settings = {k: v for k, v in dataclasses.asdict(self).items()
                    if k not in _LABELS and (k not in LATER or v != LATER[k])}
        return hash_of(settings | {"method": self.spec.canonical, "data": self.fingerprint})

    def check(self) -> None:
        """Look up method and options, model, data and device; raises one clear ValueError before any work."""
        from .. import models
        from ..budget import build
        from ..registry import get, names
        from ..spec import SpecError

        known("model", self.model, models.names())
        if not get(self.spec.name).trains:
            raise CellError(f"method {self.method!r}: it compresses trained vectors and does not train; methods that "
                            f"do: {', '.join(names(trains=True))}")
        check_device(self.device)
        data = _open(self.dataset)
        if data.fingerprint != self.fingerprint:
            raise CellError(f"{self.dataset}: the known rows were measured on other data (fingerprint "
                            f"{self.fingerprint}, here {data.fingerprint}); ask again to run on what is here now")
        try:
            build(self.spec, data.cardinalities, self.dim, device="meta")
        except SpecError:
            raise
        except ValueError:          # a method that cannot work at this dimension, say: the run tells, in its own row
            pass
        if self.model_options:
            models.make(self.model, fields=len(data.fields), dim=self.dim, dense=len(data.dense), **self.model_options)

    def measure(self, progress=None) -> dict:
        """Train, deploy and measure; the measured part of the row."""
        from ..training import run_cell

        return run_cell(self, progress=progress)

    def row(self, measured: dict) -> dict:
        """The complete row: what was asked, what was measured, where it comes from."""
        dataset = _open(self.dataset).name if _on_disk(self.dataset) else self.dataset
        asked = dataclasses.asdict(self)
        if self.budget is None and measured.get("bytes_full") and measured.get("bytes_inference"):
            # no budget was asked for: the row stands at the share it takes (Full at 1.0); settings keep the null
            asked["budget"] = float(f"{measured['bytes_inference'] / measured['bytes_full']:.6g}")
        settings = dataclasses.asdict(self) | {"method": self.spec.canonical}
        del settings["section"]
        return complete(
            {k: asked[k] for k in ("section", "model", "dim", "budget", "seed", "lr", "batch")}
            | dict(run_id=self.run_id, task="ctr", method=self.spec.name, spec=self.spec.canonical, dataset=dataset,
                   device=self.device, data_fingerprint=self.fingerprint, settings=settings)
            | measured
        )


def check_budget(budget):
    """A budget as a plain float in (0, 1] (a fraction), an int of at least 2 (bytes) or None; else CellError."""
    if budget is None:
        return None
    if isinstance(budget, numbers.Integral) and not isinstance(budget, bool):
        if budget == 1:
            raise CellError("budget 1: an int is bytes; write 1.0 for the size of the full table")
        return _number("budget", budget, int, 2, "bytes (an int of at least 2) or a fraction (a float) in (0, 1]")
    budget = _number("budget", budget, float, 0.0, "a fraction in (0, 1], or bytes as an int")
    if not 0 < budget <= 1:
        raise CellError(f"budget {budget!r}: a float is a fraction in (0, 1]; bytes are written as an int")
    return budget


def check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise CellError(f"device {device!r}: expected cpu, cuda or cuda:0") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise CellError(f"device {device!r}: no CUDA device is present; use cpu")


def known(kind: str, name: str, names) -> None:
    """Raise CellError naming the nearest known names unless ``name`` is one of ``names``."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"
        raise CellError(f"unknown {kind} {name!r}: {hint}")


def _on_disk(dataset: str) -> bool:
    return any((folder / "meta.json").is_file() for folder in (paths.data() / dataset, Path(dataset).expanduser()))


def _open(dataset: str):
    from ..data import open_dataset

    return open_dataset(dataset)


def hash_of(settings: dict) -> str:
    """16 hexadecimal digits of the SHA-256 of the settings as JSON with sorted names."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(name: str, value):
    """One value of a row as JSON knows it: text "", number None where missing (NaN and infinities are missing)."""
    if name in TEXT:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=float)
    if hasattr(value, "item"):                               # numpy and torch scalars
        value = value.item()
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return False if name in FLAGS else 0 if name in WHOLE else None
    if name in FLAGS:
        return value in (True, "True", "true", 1)
    if isinstance(value, str):
        value = int(value) if name in WHOLE else float(value)
    return int(value) if name in WHOLE else value


def plain(row: dict) -> dict:
    """A row of all COLUMNS with the values JSON knows, from one read or given in any form."""
    return {name: _plain(name, row.get(name)) for name in COLUMNS}


def complete(partial: dict) -> dict:
    """A whole row from what is given: every column present and plain, provenance and time filled in.

    Raises CellError for a column that does not exist, a missing ``run_id`` or an unknown status.
    """
    for name in partial:
        known("column", name, COLUMNS)
    if not partial.get("run_id"):
        raise CellError("a row needs a run_id")
    if partial.get("status") not in STATUSES:
        raise CellError(f"status {partial.get('status')!r}: expected one of {', '.join(STATUSES)}")
    return plain(provenance(partial.get("device") or "cpu") | partial)


def provenance(device: str = "cpu") -> dict:
    """Versions, commit, machine, threads and time of a run that ends now."""
    import torch

    from .. import __version__

    commit, dirty = _commit()
    kind = device.split()[0]                                 # "cpu x2": two processes
    return dict(device=device, machine=_machine(kind), threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(), version=__version__, commit=commit, dirty=dirty,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"))


@functools.lru_cache(maxsize=None)
def _machine(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(device))
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def _commit() -> tuple[str, bool]:
    """Commit of the checkout that holds the package and whether the package differs from it; ("", False) elsewhere."""
    checkout = paths.PACKAGE.parent
    if not (checkout / ".git").exists():                     # installed, maybe inside somebody's own checkout
        return "", False

    def git(*words):
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", paths.PACKAGE.name))
    except (OSError, subprocess.TimeoutExpired):             # no git on this machine
        return "", False


def frame(rows) -> pd.DataFrame:
    """Rows as a DataFrame of all COLUMNS with the same dtypes whatever the rows, also when there are none."""
    rows = list(rows)
    columns = {}
    for name in COLUMNS:
        dtype = str if name in TEXT else bool if name in FLAGS else "int64" if name in WHOLE else "float64"
        columns[name] = pd.Series([_plain(name, r.get(name)) for r in rows], dtype=dtype)
    return pd.DataFrame(columns)
