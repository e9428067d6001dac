"""Vectors in a file -> codes in a file, shard by shard: neither need fit into memory, and a killed run goes on.

The result is what :func:`ecstudy.save` would write of ``ecstudy.compress(vectors, method, budget)``, but for spaces in
its header, and :func:`ecstudy.load` reads it. Until it is whole it lies in the folder ``.<name>.part`` beside it, at
its full size, together with how far it is.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..api import FORMAT, compress, learned_from, matrix, save, shell
from ..extras import need
from ..memory import stored
from ..methods._posttrain import Streaming, block_rows, blocks
from ..registry import get
from ..spec import parse
from ..study.progress import bar

ROOM = 1024                             # bytes of the header for what learning adds to the specification
SHARD = 16                              # blocks of a shard: 256 MiB of float32
PROBES = 256                            # rows that tell one source from another
CODES, STATE = "codes", "state.json"
# names of types in the safetensors format
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def compress_file(vectors, method: str, budget: float | int | None, out: str | Path, *, sample: int | None = None,
                  seed: int = 0, weights=None, shard: int | None = None, progress: bool | None = None,
                  **options) -> Path:
    """Compress vectors into the file ``out``; asked again after an interruption, go on where it stood.

    A method that reads its rows in blocks (all that only take trained vectors, ``full`` and ``int_quant``) is written
    in place. ``tt_rec``, ``dedup`` and wrapped methods hold what they ship in memory, and begin anew.

    Parameters
    ----------
    vectors:
        A matrix [n, D], float32 or float16: a ``.npy`` file, which is mapped and not read whole, an array or a tensor.
    sample, seed, weights, options:
        As in :func:`ecstudy.compress`.
    shard:
        Rows between two points from which a run can go on (default: 256 MiB of float32).
    progress:
        None shows a bar in terminals and notebooks, True always, False never.

    Returns
    -------
    Path
        ``out``, which :func:`ecstudy.load` reads.

    Raises
    ------
    TypeError, ValueError, Unreachable
        As :func:`ecstudy.compress`; a row that is not finite is named.
    """
    source, out, spec = matrix(vectors), Path(out), parse(method)
    if shard is not None and (isinstance(shard, bool) or not isinstance(shard, int) or shard < 1):
        raise ValueError(f"shard={shard!r}: expected a number of rows of at least 1")
    if spec.wrappers or not issubclass(get(spec.name), Streaming):
        found = compress(source, spec, budget, seed=seed, sample=sample, weights=weights, **options)
        return save(found, out)
    n, dim = source.shape
    key = dict(spec=spec.canonical, budget=budget, options=options, sample=sample, seed=seed, weights=_hash(weights),
               vectors=fingerprint(source))
    work = _Work(out, json.loads(json.dumps(key)))
    with torch.no_grad():
        emb = shell(spec, n, dim, budget, seed=seed, tensors=work.open, **(options | work.state["fitted"]))
        learned_from(emb, sample=sample, weights=weights)
        work.resume(emb)
        step = block_rows(dim)
        rows = SHARD * step if shard is None else -(-shard // step) * step
        done = work.state["rows"]
        with bar(-(-n // rows) + 1, spec.name, progress) as tick:
            if done is None:
                emb.learn(source)
                done = work.keep(emb, 0)
            tick("learned", 1 + done // rows)
            for first in range(done, n, rows):
                last = min(first + rows, n)
                for start, block in blocks(source, first, last):
                    emb.put(start, block)
                work.keep(emb, last)
                tick(f"{last:,} of {n:,} rows")
        return work.close(emb)


def fingerprint(source: np.ndarray | Tensor) -> str:
    """Tells one matrix from another by its shape and some of its rows."""
    rows = np.linspace(0, len(source) - 1, min(PROBES, len(source))).astype(np.int64)
    if isinstance(source, Tensor):
        source = source.detach()
        picked = source[torch.from_numpy(rows).to(source.device)].float().cpu().numpy()
    else:
        picked = np.asarray(source[rows], np.float32)
    return hashlib.sha256(f"{tuple(source.shape)}".encode() + picked.tobytes()).hexdigest()


def _hash(weights) -> str | None:
    if isinstance(weights, Tensor):
        weights = weights.detach().cpu().numpy()
    return None if weights is None else hashlib.sha256(np.array(weights, dtype=np.float64).tobytes()).hexdigest()


class _Work:
    """The unfinished file, mapped into memory, and the state of the run beside it."""

    def __init__(self, out: Path, key: dict):
        self.out, self.folder = out, out.with_name(f".{out.name}.part")
        self.key, self.state = key, {"key": key, "rows": None, "fitted": {}, "extra": None}
        try:
            found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            found = {}
        if found.get("key") == key:
            self.state = found
        else:                                              # nothing, or the codes of something else
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file, mapped; zeros unless the run goes on."""
        place, self.layout = 0, {}
        # wide types first, so that every tensor lies where its type may lie
        for name, t in sorted(shapes.items(), key=lambda item: (-item[1].element_size(), item[0])):
            size = t.numel() * t.element_size()
            self.layout[name] = dict(dtype=TYPES[t.dtype], shape=list(t.shape), data_offsets=[place, place + size])
            place += size
        room = ROOM + len(json.dumps(self.key)) + len(json.dumps(self.layout))
        self.header, path = -(-room // 64) * 64, self.folder / CODES
        data = 8 + self.header
        if self.state["rows"] is None or not path.is_file() or path.stat().st_size != data + place:
            self.state |= {"rows": None, "fitted": {}, "extra": None}
            with open(path, "wb") as file:
                file.truncate(data + place)
        self.map, self.tensors = np.memmap(path, np.uint8, "r+"), {}
        for name, t in shapes.items():
            first, last = self.layout[name]["data_offsets"]
            own = torch.from_numpy(self.map[data + first:data + last])
            self.tensors[name] = own.view(t.dtype).view(t.shape)
        return self.tensors

    def resume(self, emb) -> None:
        """Give back what learning left besides the tensors."""
        if self.state["fitted"]:
            emb.fitted = self.state["fitted"]
        if self.state["extra"]:
            emb.state = need("safetensors.torch", "save").load_file(self.folder / self.state["extra"])

    def keep(self, emb, rows: int) -> int:
        """Everything of the first ``rows`` rows is in the file: go on from here."""
        for name, tensor in stored(emb).items():
            if tensor.data_ptr() != self.tensors[name].data_ptr():
                raise RuntimeError(f"{type(emb).__name__} replaced its tensor {name!r}: learn() and put() must write "
                                   "in place")
        self.map.flush()
        before, extra = self.state["extra"], f"rows-{rows}" if emb.state else None
        if extra:                           # a file of its own for every point: the state below names the one it needs
            held = {name: t.detach().cpu().contiguous() for name, t in emb.state.items()}
            need("safetensors.torch", "save").save_file(held, self.folder / extra)
        self.state |= {"rows": rows, "fitted": emb.fitted, "extra": extra}
        new = self.folder / "new"
        new.write_text(json.dumps(self.state), encoding="utf-8")
        os.replace(new, self.folder / STATE)
        if before and before != extra:
            (self.folder / before).unlink(missing_ok=True)
        return rows

    def close(self, emb) -> Path:
        """Write the header and give the file its name."""
        config = emb.config | {"options": emb.config["options"] | emb.fitted}
        about = json.dumps(dict(ecstudy=FORMAT, deployed=True, config=config))
        text = json.dumps({"__metadata__": {"ecstudy": about}} | self.layout, separators=(",", ":")).encode()
        if len(text) > self.header:
            raise RuntimeError(f"the specification takes {len(text)} bytes of a header of {self.header}")
        self.map[:8] = np.frombuffer(np.uint64(self.header).tobytes(), np.uint8)
        self.map[8:8 + self.header] = np.frombuffer(text.ljust(self.header), np.uint8)
        self.map.flush()
        del self.map, self.tensors
        os.replace(self.folder / CODES, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.out
