"""Making, compressing, saving and loading embeddings: the library face of the study."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .budget import budget_bytes, build, solve
from .extras import need
from .memory import stored
from .method import Method
from .registry import get
from .spec import Spec, parse

FORMAT = 1


def make(method: str | Spec, num_embeddings: int | Sequence[int], dim: int, budget: float | int | None = None, *,
         seed: int = 0, counts=None, device: str | torch.device = "cpu", base_dim: int | None = None,
         **options) -> Method:
    """An untrained compressed embedding.

    Parameters
    ----------
    method:
        A spec: ``"compo"``, ``"robe(sign=True)"``, ``"compo|int8"``; ``ecstudy.methods()`` lists the names.
    num_embeddings:
        An int makes a drop-in for ``nn.Embedding`` (ids of any shape -> ``[..., dim]``); a list of F cardinalities
        takes ids [B, F], local to each field, and gives [B, F, dim].
    dim:
        Embedding dimension.
    budget:
        Limit for the deployed module: a float is a fraction of the float32 full table (at ``base_dim``, default
        ``dim``), an int is bytes. None takes the method's default size, or the size given in ``options``.
    seed:
        Initial values; the same on every device. Compressors of trained vectors draw their samples by it.
    counts:
        Training occurrences of each id, int [n], fields one after the other; only frequency-aware methods need it.

    Raises
    ------
    SpecError, ValueError
        For an unknown method or option, or an argument out of range.
    Unreachable
        If the method's smallest size is over the budget; has ``reason`` and ``closest`` (bytes).
    """
    spec = parse(method)
    limit = None if budget is None else budget_bytes(budget, num_embeddings, base_dim or dim)
    found = solve(spec, num_embeddings, dim, limit, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        emb = build(spec, num_embeddings, dim, knob=found.knob, counts=counts, **options)
    return _labelled(emb, spec, num_embeddings, found.knob, seed, options).to(device)


def _labelled(emb: Method, spec: Spec, num_embeddings, knob, seed: int, options: dict) -> Method:
    """``emb`` with what :func:`save` writes of it, and its seed."""
    emb.config = dict(spec=spec.canonical, num_embeddings=num_embeddings if isinstance(num_embeddings, int)
                      else [int(n) for n in num_embeddings], dim=emb.dim, knob=knob, options=options)
    for part in emb.modules():
        if isinstance(part, Method):
            part.seed = seed
    return emb


def shell(spec: str | Spec, num_embeddings: int | Sequence[int], dim: int, budget: float | int | None = None, *,
          seed: int = 0, base_dim: int | None = None, tensors=None, **options) -> Method:
    """What a method ships, deployed and not filled.

    ``tensors`` gives its tensors by name, from those of a ``meta`` build (default: zeros, untouched in memory).
    """
    spec = parse(spec)
    limit = None if budget is None else budget_bytes(budget, num_embeddings, base_dim or dim)
    knob = solve(spec, num_embeddings, dim, limit, **options).knob
    emb = build(spec, num_embeddings, dim, knob=knob, device="meta", **options).deploy()
    shapes = stored(emb)
    found = tensors(shapes) if tensors else {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in shapes.items()}
    emb.load_state_dict(found, strict=True, assign=True)
    return _labelled(emb, spec, num_embeddings, knob, seed, options)


def matrix(source: nn.Embedding | Tensor | np.ndarray | str | Path) -> Tensor | np.ndarray:
    """A source of vectors as a matrix [n, D]; a ``.npy`` file as a memory map.

    Raises
    ------
    TypeError
        If it is none.
    """
    if isinstance(source, nn.Embedding):
        source = source.weight.detach()
    elif isinstance(source, (str, Path)):
        source = np.load(source, mmap_mode="r", allow_pickle=False)
    if not isinstance(source, (Tensor, np.ndarray)) or source.ndim != 2:
        raise TypeError(f"source of type {type(source).__name__}: expected nn.Embedding, a matrix [n, D] or .npy file")
    return source


def compress(source: nn.Embedding | Tensor | np.ndarray | str | Path, method: str | Spec,
             budget: float | int | None = None, *, seed: int = 0, sample: int | None = None, weights=None,
             device: str | torch.device = "cpu", **options) -> Method:
    """Compress trained vectors without training; the result is deployed and a drop-in for ``nn.Embedding``.

    Parameters
    ----------
    source:
        An ``nn.Embedding``, a matrix [n, D], or the path of a ``.npy`` file (read block by block, never whole).
    seed, sample:
        Of a method that learns from some of the rows: which, and how many (default: its own number).
    weights:
        Of a method that groups the rows: numbers [n] that groups share evenly (default: the norms of the rows).

    Raises
    ------
    TypeError
        If the method must be trained, or the source is of another kind.
    ValueError
        If a row is not finite (the message says which), or the method takes no sample or weights.
    """
    source = matrix(source)
    n, dim = source.shape
    spec = parse(method)
    if get(spec.name).fits_deployed and not spec.wrappers:
        emb = shell(spec, n, dim, budget, seed=seed, **options).to(device)
    else:
        emb = make(spec, n, dim, budget, seed=seed, device=device, **options)
    with torch.no_grad():
        learned_from(emb, sample=sample, weights=weights).fit(source)
        return emb.deploy()


def learned_from(emb: Method, **what) -> Method:
    """Tell a compressor what to learn from (``sample``, ``weights``); None leaves it as it is."""
    inner = emb
    while hasattr(inner, "inner"):
        inner = inner.inner
    for name, value in what.items():
        if value is not None:
            if not hasattr(inner, name):
                raise ValueError(f"{emb.config['spec']} takes no {name}; leave it out")
            setattr(inner, name, value)
    return emb


def save(emb: Method, path: str | Path) -> Path:
    """Write ``emb`` as safetensors with its specification inside; atomic. Weighs what ``memory(emb)`` says."""
    write = need("safetensors.torch", "save").save_file
    path = Path(path)
    config = emb.config | {"options": emb.config["options"] | emb.fitted}
    header = dict(ecstudy=FORMAT, deployed=emb.deployed, config=config)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write({k: v.detach().cpu().contiguous() for k, v in stored(emb).items()}, temporary,
              metadata={"ecstudy": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(path: str | Path, device: str | torch.device = "cpu") -> Method:
    """Read what :func:`save` wrote: the same module, deployed if it was.

    Raises
    ------
    ValueError
        If the file was not written by :func:`save`.
    """
    safetensors = need("safetensors", "save")
    with safetensors.safe_open(str(path), "pt", device=str(device)) as file:
        header = json.loads((file.metadata() or {}).get("ecstudy", "{}"))
        if header.get("ecstudy") != FORMAT:
            raise ValueError(f"{path} is not an embedding saved by ecstudy (format {FORMAT})")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    config = header["config"]
    emb = build(config["spec"], config["num_embeddings"], config["dim"], knob=config["knob"], device="meta",
                **config["options"])
    if header["deployed"]:
        emb.deploy()
    emb.load_state_dict(tensors, strict=True, assign=True)          # no memory is allocated twice
    emb.config = config
    return emb.to(device)
