"""The commands ``ecstudy rag prep | encode | compress | search | eval | train-reader`` (extras ``cli`` and ``rag``)."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, List, Optional

import typer

from .. import paths
from ..data.layout import DataError
from ..study.progress import bar, duration
from .corpus import Corpus, folder_of
from .train_reader import Training

rag = typer.Typer(no_args_is_help=True, help="Retrieval: compress the vectors of passages, search, read and score.")

CorpusName = Annotated[str, typer.Argument(help="A corpus of data/rag, synthetic_facts (generated), or a folder.")]
Files = Optional[List[Path]]
EncoderPath = Annotated[Optional[Path], typer.Option(help="Folder of a local encoder (default: the packaged MiniLM).")]
QuestionEncoderPath = Annotated[Optional[Path], typer.Option(help="Of questions, where it is another (DPR).")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Length = Annotated[Optional[int], typer.Option(help="Tokens of a text that are read (default: 256).")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")]
Shown = Annotated[Optional[bool], typer.Option("--progress/--no-progress", help="By default shown on a terminal.")]


def _advance(total: int, title: str, shown):
    """A bar over ``total`` items, moved by ``report(done, total, seconds left)``."""
    from contextlib import contextmanager

    @contextmanager
    def moved():
        with bar(total, title, shown) as step:
            before = 0

            def report(done, _, left=None):
                nonlocal before
                step("" if left is None else f"{duration(left)} left", advance=done - before)
                before = done
            yield report
    return moved()


def _describe(corpus: Corpus) -> str:
    asked = ", ".join(f"{group} {counts['train']:,} train {counts['test']:,} test"
                      for group, counts in corpus.meta["questions"].items())
    dropped = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in corpus.meta["dropped"].items()
                        if count)
    return (f"{corpus.folder}: {len(corpus):,} passages; questions: {asked or 'none'}"
            + (f"; left out: {dropped}" if dropped else "") + f"; fingerprint {corpus.fingerprint}")


@rag.command()
def prep(
    out: Annotated[str, typer.Argument(help="Name in data/rag or folder to create; synthetic_facts is generated.")],
    passages: Annotated[Files, typer.Option(help="OTT-QA .json, .jsonl, or DPR's psgs_w100.tsv; repeatable.")] = None,
    squad: Annotated[Files, typer.Option(help="SQuAD .json; repeatable.")] = None,
    gold: Annotated[Files, typer.Option(help="JSON lines of questions with a gold passage; repeatable.")] = None,
    questions: Annotated[Files, typer.Option(help="Questions to test: NQ-open .jsonl, DPR .csv; repeatable.")] = None,
    train: Annotated[Files, typer.Option(help="Questions for training readers; repeatable.")] = None,
    of: Annotated[Optional[str], typer.Option("--of", help="A corpus to draw from, with --keep: its gold passages and "
                                                           "so many others, and their vectors.")] = None,
    name: Annotated[Optional[str], typer.Option(help="Of the corpus (default: the folder's).")] = None,
    keep: Annotated[Optional[int], typer.Option(help="Keep so many background passages.")] = None,
    test_squad: Annotated[float, typer.Option(help="Share of SQuAD questions for testing, by articles.")] = 0.3,
    test_gold: Annotated[float, typer.Option(help="Share of gold questions for testing, by articles.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the split and of what is kept or generated.")] = 0,
    distinct: Annotated[bool, typer.Option("--distinct/--not-distinct", help="Join equal passages.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing corpus.")] = False,
    progress: Shown = None,
):
    """Prepare a corpus from raw files (plain, gzip or xz), draw a smaller one from another, or generate one."""
    from .generated import PRESETS, generate
    from .sources import prepare, subset

    if of is not None:
        if keep is None or passages or squad or gold or questions or train:
            raise DataError("--of takes --keep, the number of other passages, and no files")
        return typer.echo(_describe(subset(Corpus.open(of), out, keep, name=name, seed=seed, overwrite=overwrite)))
    if folder_of(out).name in PRESETS and not (passages or squad or gold):
        return typer.echo(_describe(generate(out, seed=seed, overwrite=overwrite)))
    typer.echo(_describe(prepare(
        out, passages=passages or (), squad=squad or (), gold=gold or (), questions=questions or (), train=train or (),
        name=name, keep=keep, test_squad=test_squad, test_gold=test_gold, seed=seed, distinct=distinct,
        overwrite=overwrite, progress=progress)))


@rag.command()
def encode(
    corpus: CorpusName, encoder: EncoderPath = None, question_encoder: QuestionEncoderPath = None,
    dtype: Dtype = "bfloat16", length: Length = None, device: Device = "cpu",
    shards: Annotated[Files, typer.Option(help="Published vectors in place of encoding: .npy or DPR's .pkl files in "
                                               "order, repeatable, or the folder of all.")] = None,
    progress: Shown = None,
):
    """Encode passages and questions; interrupt at any time, the same command goes on."""
    from .encode import Encoder, adopt
    from .encode import encode as run
    from .sources import in_order

    opened = Corpus.open(corpus)
    options = dict(dtype=dtype, length=length, device=device)
    asks = None if question_encoder is None else Encoder(question_encoder, **options)
    with _advance(len(opened), "passages", progress) as report:
        if shards:
            found = [file for path in shards for file in in_order(path)]
            state = adopt(opened, found, asks or Encoder(encoder, **options), encoder=found[0].name, progress=report)
        else:
            state = run(opened, Encoder(encoder, **options), asks, progress=report)
    typer.echo(f"{opened.folder}: {state['done']:,} vectors of {state['dim']} dimensions, fingerprint "
               f"{state['fingerprint']}")


@rag.command()
def compress(
    corpus: Annotated[str, typer.Argument(help="An encoded corpus, or vectors as .npy [n, D].")],
    method: Annotated[str, typer.Option("--method", "-m", help="As pq, int_quant or 'rescore(coarse=\"pq\")'.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="0.1, 10%, 50000 (bytes), 16MiB or none.")] = "none",
    out: Annotated[Optional[Path], typer.Option(help="The file (default: in runs/rag).")] = None,
    sample: Annotated[Optional[int], typer.Option(help="Rows to learn from (default: the method's).")] = None,
    seed: Annotated[int, typer.Option(help="Of what the method draws.")] = 0,
    progress: Shown = None,
):
    """Compress vectors into a file, shard by shard; interrupt at any time, the same command goes on."""
    from ..cli import budget as parsed
    from ..cli import size
    from ..registry import get
    from ..spec import parse
    from .store import compress_file

    spec, given = parse(method), Path(corpus)
    vectors, stem, weights = given, given.stem, None
    if given.suffix != ".npy":
        opened = Corpus.open(corpus)
        vectors, stem = opened.folder / "vectors.npy", opened.name
        weights = opened.norms if hasattr(get(spec.name), "weights") else None      # lengths before normalisation
    if out is None:
        out = paths.runs() / "rag" / f"{stem}-{spec.name}-{budget}.safetensors"
        out.parent.mkdir(parents=True, exist_ok=True)
    compress_file(vectors, method, parsed(budget), out, sample=sample, seed=seed, weights=weights, progress=progress)
    typer.echo(f"{out}: {size(out.stat().st_size)}")


@rag.command()
def search(
    corpus: CorpusName,
    question: Annotated[List[str], typer.Argument(help="What to ask, in words.")],
    codes: Annotated[Optional[Path], typer.Option(help="A file of `ecstudy rag compress` (default: the vectors as they "
                                                       "are).")] = None,
    k: Annotated[int, typer.Option("-k", help="Passages to show.")] = 5,
    encoder: EncoderPath = None, length: Length = None, dtype: Dtype = "bfloat16", device: Device = "cpu",
):
    """Show the passages nearest to a question."""
    from ..api import load
    from .encode import Encoder
    from .run import open_corpus
    from .search import search as run

    opened = open_corpus(corpus)
    asks = Encoder(encoder, length=length, dtype=dtype, device=device)
    if asks.description != opened.encoding["question_encoder"]:
        raise DataError(f"{opened.name} was encoded by {opened.encoding['question_encoder']}, this is "
                        f"{asks.description}; pass --encoder, --length and --dtype as for `ecstudy rag encode`")
    emb = opened.vectors if codes is None else load(codes, device)
    rows = len(opened.vectors) if codes is None else emb.fields.n
    if rows != len(opened):
        raise DataError(f"{codes} holds {rows:,} vectors, {opened.name} {len(opened):,} passages: expected its own")
    hits = run(emb, asks.questions([" ".join(question)]), min(k, len(opened)))
    for score, passage in zip(hits.scores[0], opened.passages(hits.ids[0])):
        typer.echo(f"{score:.4f}  [{passage.id}] {passage.title}: {passage.text}")


@rag.command("eval")
def evaluate(
    corpus: CorpusName,
    methods: Annotated[str, typer.Option("--methods", "--method", "-m", help="With commas, as full,pq,int_quant.")],
    budgets: Annotated[str, typer.Option("--budgets", "--budget", "-b",
                                         help="With commas, as 0.1,3% or none.")] = "none",
    questions: Annotated[Optional[str], typer.Option(help="Groups or sets of questions, with commas (default: all "
                                                          "together).")] = None,
    reader: Annotated[Optional[str], typer.Option(help="none, template, or the folder of a trained reader.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    k: Annotated[int, typer.Option("-k", help="Passages given to the reader.")] = 10,
    how: Annotated[Optional[str], typer.Option(help="decode, scores, own or faiss (default: the method's).")] = None,
    judge: Annotated[str, typer.Option(help="gold, or answer: a passage that holds the answer's words.")] = "gold",
    limit: Annotated[Optional[int], typer.Option(help="Ask only so many questions.")] = None,
    sample: Annotated[Optional[int], typer.Option(help="Read only so many where little was found (recall below "
                                                       "0.3).")] = None,
    section: Annotated[str, typer.Option(help="The section of the study the rows are for.")] = "rag",
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Measure again what is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    progress: Shown = None,
):
    """Compress, search, read and score; interrupt at any time, the same command goes on with the missing rows."""
    from ..cli import budget, dumps, number, numbers, records, share, show, split
    from .run import open_corpus, sweep

    open_corpus(corpus)
    settings = {} if reader is None else dict(reader=reader)
    table = sweep(corpus, split(methods), [budget(b) for b in split(budgets)],
                  questions=[None] if questions is None else split(questions), seeds=numbers("seeds", seeds, int),
                  k=k, how=how, judge=judge, limit=limit, sample=sample, section=section, device=device,
                  force=force, progress=progress, **settings)
    if as_json:
        typer.echo(dumps(records(table)))
    else:
        head = ["questions", "method", "budget", "seed", "status", "memory", "EM", "F1", "recall@1", "recall@10",
                "recall@100", "time", "decode", "search", "reason"]
        show(head, [[
            row["dataset"], row["spec"], share(row["budget"]), row["seed"], row["status"],
            number(row["bytes_inference"] and 100 * row["bytes_inference"] / row["bytes_full"], ".4g", " %"),
            *(number(None if row[name] is None else 100 * row[name], ".1f")
              for name in ("em", "f1", "recall_1", "recall_10", "recall_100")),
            "" if row["seconds"] is None else duration(row["seconds"]), number(row["decode_ms"], ".3g", " ms"),
            number(row["search_ms"], ".3g", " ms"), row["reason"],
        ] for row in records(table)])
    if failed := int((table["status"] == "failed").sum()):
        typer.echo(f"error: {failed} of {len(table)} runs failed; the same command runs them again", err=True)
        raise typer.Exit(1)


@rag.command("train-reader")
def train_reader(
    corpus: CorpusName,
    out: Annotated[Optional[Path], typer.Option(help="The folder to create (default: data/readers/<corpus>).")] = None,
    base: EncoderPath = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training questions.")] = Training.epochs,
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = Training.batch,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = Training.lr,
    negatives: Annotated[float, typer.Option(help="Passages without an answer, as a share.")] = Training.negatives,
    distant: Annotated[bool, typer.Option("--distant/--no-distant", help="Use questions without a known passage, too "
                                          "(needs vectors).")] = Training.distant,
    frozen: Annotated[int, typer.Option(help="First layers that stay as they are.")] = Training.frozen,
    limit: Annotated[Optional[int], typer.Option(help="Train on so many questions, for a trial.")] = None,
    seed: Annotated[int, typer.Option(help="Of the head, the order and dropout.")] = Training.seed,
    length: Annotated[int, typer.Option(help="Tokens of question and passage together.")] = Training.length,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = Training.dtype,
    device: Device = "cpu",
    threads: Annotated[Optional[int], typer.Option(min=1, help="Cores to use (default: torch's own).")] = None,
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 300.0,
    evaluate: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Read the test questions' gold passages at "
                                           "the end.")] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what is there and begin anew.")] = False,
    progress: Shown = None,
):
    """Train the span reader on a corpus' training questions; interrupt at any time, the same command goes on."""
    import torch

    from ..study.row import check_device
    from .train_reader import train

    check_device(device)
    opened = Corpus.open(corpus)
    out = paths.data() / "readers" / opened.name if out is None else out
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Training(base=None if base is None else str(base), epochs=epochs, batch=batch, lr=lr, seed=seed,
                        negatives=negatives, distant=distant, frozen=frozen, limit=limit, length=length,
                        stride=length // 4, dtype=dtype)
    found = train(opened, out, settings, device=device, every=every, restart=restart, evaluate=evaluate,
                  progress=progress)
    scores = ", ".join(f"{group} EM {row['em']:.1f} F1 {row['f1']:.1f} ({row['n']:,} questions)"
                       for group, row in found.get("test", {}).items())
    typer.echo(f"{out}: {found['steps']:,} steps on {found['trained']['questions']:,} questions in "
               f"{duration(found['seconds'])}; gold passages of the test: {scores or 'not read'}")
