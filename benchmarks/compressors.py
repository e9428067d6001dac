"""Compressors of trained vectors: decoding a batch beside copying it, product quantisation beside faiss's own.

    python benchmarks/compressors.py [--corpus wiki_183k | --rows 183430] [--threads 1] [--repeats 3] [--out FILE.csv]

Vectors are those of an encoded corpus, or generated ones (unit norm, a spectrum that decays). Batches of 1,024 random
rows are decoded, in turn, by every compressor, by ``nn.functional.embedding`` on the float32 matrix, and, for product
quantisation, by faiss from the same codes: ``faiss_ms`` from ids as ours is (``reconstruct_batch``), ``faiss_codes_ms``
from codes that were picked before. ``copy`` only copies an output of that size. Then product quantisers are trained and
all rows encoded, by ours and by faiss in turn, on as many points and threads; ``faiss_seconds`` is without its sorting
of centroids for a search by Hamming distance, which its default adds.
"""
from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch
from rows import publish

import ecstudy as ec
from ecstudy.measure import measure_latency

BATCH, BATCHES = 1_024, 64
DECODED = ("int_quant(bits=8)", "int_quant(bits=8, scale='dim')", "int_quant(bits=8, scale='row')",
           "int_quant(bits=16)", "int4", *(f"pq(parts={m})" for m in (96, 48, 24)),
           *(f"prune@{b:g}" for b in (0.5, 0.1, 0.03, 0.01, 0.001)))


def generated(rows: int, dim: int) -> np.ndarray:
    """Vectors float32 ``[rows, dim]`` of unit norm whose k-th standard deviation is about ``k ** -0.5``."""
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.standard_normal((dim, dim)))[0] * (1 + np.arange(dim)) ** -0.5
    out = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 1 << 16):
        part = draw.standard_normal((min(1 << 16, rows - start), dim)) @ turn.T
        out[start:start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="an encoded corpus by name or folder (default: generated vectors)")
    parser.add_argument("--rows", type=int, default=183_430, help="of generated vectors")
    parser.add_argument("--dim", type=int, default=384, help="of generated vectors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of training and encoding")
    parser.add_argument("--out", help="append the rows to this CSV")
    args = parser.parse_args()
    import faiss

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.corpus:
        from ecstudy.rag.corpus import Corpus

        vectors = np.array(Corpus.open(args.corpus).vectors)
    else:
        vectors = generated(args.rows, args.dim)
    n, dim = vectors.shape
    common = dict(rows=n, batch=BATCH, device="cpu", threads=args.threads)
    rows = [*decoding(vectors, common), *compressing(vectors, common, args.repeats)]
    publish(rows, args.out)


def decoding(vectors: np.ndarray, common: dict) -> list[dict]:
    import faiss

    n, dim = vectors.shape
    matrix = torch.from_numpy(vectors)
    ids = torch.randint(n, (BATCHES * BATCH,), generator=torch.Generator().manual_seed(0)).split(BATCH)
    source, target = torch.randn(BATCH, dim), torch.empty(BATCH, dim)
    calls = dict(full=lambda i: torch.nn.functional.embedding(i, matrix), copy=lambda i: target.copy_(source))
    sizes, whole = {}, []
    for name in DECODED:
        spec, _, budget = name.partition("@")
        emb = ec.compress(vectors, spec, float(budget) if budget else None).eval()
        calls[name], sizes[name] = emb, ec.memory(emb) / vectors.nbytes
        if spec.startswith("pq"):
            whole.append(emb.index())                                # owns what is taken out of it
            index = faiss.downcast_index(whole[-1].index)            # without its map of columns, here none
            codes = np.stack([emb.codes.read(part).numpy().astype(np.uint8) for part in ids])
            calls[f"{name} faiss"] = lambda i, index=index: index.reconstruct_batch(i.numpy())
            place = {int(part[0]): j for j, part in enumerate(ids)}
            calls[f"{name} codes"] = lambda i, index=index, codes=codes: index.pq.decode(codes[place[int(i[0])]])
            assert np.allclose(emb(ids[0]).numpy(), index.pq.decode(codes[0]), atol=1e-6), name
    found = measure_latency(calls, batches=ids, repeats=200)
    full, copy = found["full"].median, found["copy"].median
    rows = []
    for name, size in sizes.items():
        ms, theirs = found[name].median, [found[f"{name} {how}"].median for how in ("faiss", "codes")
                                          if f"{name} {how}" in found]
        row = dict(benchmark="decode", method=name.partition("@")[0], budget=float(f"{size:.3g}"), **common, ms=ms,
                   full_ms=full, ratio_full=ms / full, copy_ms=copy, ratio_copy=ms / copy)
        if theirs:
            row |= dict(faiss_ms=theirs[0], faiss_codes_ms=theirs[1], ratio_faiss=ms / theirs[0])
        rows.append(row)
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.4f"), flush=True)
    return rows


def compressing(vectors: np.ndarray, common: dict, repeats: int) -> list[dict]:
    import faiss

    rows = []
    for parts in (48, 24):
        times: dict[str, list[float]] = dict(ours=[], faiss=[])
        for _ in range(repeats):
            for name, found in times.items():
                start = time.perf_counter()
                if name == "ours":
                    emb = ec.compress(vectors, f"pq(parts={parts})")
                else:
                    index = faiss.IndexPQ(vectors.shape[1], parts, 8)
                    index.do_polysemous_training = False
                    index.train(vectors)
                    index.add(vectors)
                found.append(time.perf_counter() - start)
        ours, theirs = (float(np.median(t)) for t in times.values())
        rows.append(dict(benchmark="compress", method=f"pq(parts={parts})",
                         budget=float(f"{ec.memory(emb) / vectors.nbytes:.3g}"), **common, seconds=ours,
                         faiss_seconds=theirs, ratio_faiss=ours / theirs))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    return rows


if __name__ == "__main__":
    main()
