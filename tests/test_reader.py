"""The extractive reader: spans against a plain search, a planted task it must learn, resumption, cache, bad input."""
from __future__ import annotations

import itertools
import json
import math
import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecstudy.data.layout import DataError
from ecstudy.rag import train_reader
from ecstudy.rag.corpus import Corpus, CorpusWriter, Passage
from ecstudy.rag.reader import SpanReader, Window, best_spans, choose, windows
from ecstudy.rag.reader_cache import SpanCache, pair_keys
from ecstudy.rag.run import open_reader
from ecstudy.rag.train_reader import Training, loss_of, places, rate, targets, train

transformers = pytest.importorskip("transformers", reason="the reader needs the extra rag")
pytest.importorskip("safetensors", reason="a trained reader is saved with the extra save")

NAMES = [f"{a}{b}" for a in ("mo", "ka", "ti", "ru") for b in ("lin", "dor", "vek", "sam")]
YEARS = [f"{y}" for y in range(1900, 1916)]
WORDS = "the a was in by it and who when built opened hall tower bridge river old place".split()
SMALL = dict(length=32, stride=8, dtype="float32", dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A randomly initialised BERT of 2 layers that knows the words of the planted task and single letters."""
    folder = tmp_path_factory.mktemp("base")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *NAMES, *YEARS, *string.punctuation,
             *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=64)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Passages with a name and a year each; "who" asks for the name, "when" for the year; new combinations in test."""
    folder = tmp_path_factory.mktemp("rag") / "synthetic_planted"
    draw = np.random.default_rng(0)
    pairs = list(itertools.product(NAMES, YEARS))
    with CorpusWriter(folder, name="synthetic_planted") as writer:
        for i in draw.permutation(len(pairs)):
            (name, year), title = pairs[i], f"{WORDS[11 + i % 3]} {string.ascii_lowercase[i % 26]} {i // 26}"
            gold = writer.add(title, f"It was built by {name} and opened in {year}.")
            split = "test" if i % 5 == 0 else "train"
            writer.ask(f"who built the {title}", [name.title()], group="squad", split=split, gold=[gold], article=title)
            writer.ask(f"when was the {title} opened", [year, f"in {year}"], group="nq", split=split, gold=[gold],
                       article=title)
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def trained(base, planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "reader"
    settings = Training(base=str(base), epochs=8, lr=3e-3, frozen=0, **SMALL)
    before = SpanReader.open(_headed(base, tmp_path_factory.mktemp("fresh")), cache=False, length=32, stride=8)
    low = train_reader.gold_scores(before, planted, planted.questions(split="test"))
    return SimpleNamespace(out=out, found=train(planted, out, settings), settings=settings, low=low)


def _headed(base, folder):
    torch.manual_seed(1)
    model, tokenizer = train_reader.load(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(base, **options):
    torch.manual_seed(0)
    model, tokenizer = train_reader.load(base)
    return SpanReader(model, tokenizer, **{"length": 32, "stride": 8, "dtype": "float32", **options})


# -- spans -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("span", [1, 3, 15])
def test_best_span_is_what_a_plain_search_finds(span):
    draw = torch.Generator().manual_seed(span)
    first, last = torch.randn(2, 6, 20, generator=draw)
    inside = torch.rand(6, 20, generator=draw) < 0.6
    inside[:, 0] = inside[5] = False
    a, b, score = best_spans(first, last, inside, span)
    for row in range(5):
        pairs = [(i, j) for i in range(20) for j in range(i, min(20, i + span)) if inside[row, i] and inside[row, j]]
        best = max(pairs, key=lambda p: first[row, p[0]] + last[row, p[1]])
        assert (int(a[row]), int(b[row])) == best
        wanted = first[row, best[0]] + last[row, best[1]] - first[row, 0] - last[row, 0]
        assert float(score[row]) == pytest.approx(float(wanted), abs=1e-6)
    assert score[5] == -torch.inf


def test_windows_cover_a_long_passage_and_give_its_characters_back(base):
    reader = tiny(base)
    text = " ".join(NAMES + YEARS + NAMES)
    cut = windows(reader.tokenizer, ["who built it"], [text], 32, 8)
    assert len(cut) > 1 and all(len(w.ids) <= 32 and w.pair == 0 for w in cut)
    seen = {(a, b) for w in cut for a, b in zip(w.first.tolist(), w.last.tolist()) if a >= 0}
    assert [text[a:b] for a, b in sorted(seen)] == text.split()


def test_a_question_longer_than_a_window_is_cut_and_leaves_room(base):
    cut = windows(tiny(base).tokenizer, ["who " * 100], ["built by molin"], 32, 8)
    assert [sum(w.first >= 0) for w in cut] == [3]


def test_reading_in_batches_equals_reading_one_by_one(base, planted, monkeypatch):
    reader = tiny(base)
    asked = planted.questions(split="test")[:12]
    texts = [planted.passages(q.gold)[0].joined for q in asked] + [" ".join(NAMES + YEARS), ""]
    questions = [q.question for q in asked] + ["who", "who"]
    whole = reader.spans(questions, texts)
    monkeypatch.setattr("ecstudy.rag.reader.TOKENS", 1)
    single = reader.spans(questions, texts)
    assert np.array_equal(whole.first, single.first) and np.array_equal(whole.last, single.last)
    assert np.allclose(whole.score, single.score, atol=1e-4)
    assert whole.score[-1] == -np.inf and whole.last[-1] == 0                # an empty passage has no span


# -- choosing over passages ------------------------------------------------------------------------------------------

def test_choosing_by_hand():
    owner, texts = np.array([0, 0, 0, 1, 1]), ["Rome", "the Paris", "Paris!", "x", "y"]
    spans, found = np.array([3.0, 2.5, 2.6, 1.0, 1.0]), np.array([0.1, 0.2, 0.9, 0.5, 0.5])
    assert choose(owner, texts, spans, found, 3) == ["Rome", "x", ""]                    # of equals the earlier
    assert choose(owner, texts, spans, found, 3, weight=1.0) == ["Paris!", "x", ""]      # 3.1, 2.7, 3.5
    # log(e^2.5 + e^2.6) = 3.24 > 3: equal answers add up, the likelier spelling is given
    assert choose(owner, texts, spans, found, 3, together=True) == ["Paris!", "x", ""]
    assert choose(owner[:1], [""], np.array([-np.inf]), found[:1], 1, together=True) == [""]
    assert choose(owner[:0], [], spans[:0], found[:0], 1, together=True) == [""]


def test_lists_of_unequal_length_are_refused(base):
    reader = tiny(base)
    with pytest.raises(ValueError, match="2 questions, 1 lists of passages, 2 of scores"):
        reader(["a", "b"], [[]], np.zeros((2, 1)))
    with pytest.raises(ValueError, match="1 scores for 2 passages"):
        reader(["a"], [[Passage(0, "t", "x"), Passage(1, "t", "y")]], np.zeros((1, 1)))
    assert reader(["a"], [[]], np.zeros((1, 3))) == [""]


@pytest.mark.parametrize("options, message", [
    (dict(length=65), "expected 16 to 64"), (dict(stride=16), "expected 0 to 15"), (dict(span=0), "at least one token"),
    (dict(dtype="float8"), "bfloat16 or float32"), (dict(weight=float("nan")), "finite"),
])
def test_options_of_a_reader_are_checked(base, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(base, **options)


# -- cache -----------------------------------------------------------------------------------------------------------

def test_pairs_are_read_once_across_calls_and_openings(base, tmp_path, monkeypatch):
    path = tmp_path / "spans.sqlite"
    count = []
    read = SpanReader._read
    monkeypatch.setattr(SpanReader, "_read", lambda self, q, t: count.append(len(q)) or read(self, q, t))
    reader = tiny(base, cache=SpanCache(path))
    texts = ["built by molin", "built by kador", "built by molin"]
    one = reader.spans(["who"] * 3, texts)
    assert count == [2] and one.score[0] == one.score[2]
    again = tiny(base, cache=SpanCache(path)).spans(["who", "who", "when"], [texts[1], texts[0], texts[0]])
    assert count == [2, 1]
    assert again.score[:2].tolist() == one.score[1::-1].tolist() and again.last[:2].tolist() == one.last[1::-1].tolist()


def test_readers_that_differ_do_not_share_a_cache(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    plain, short = SpanReader.open(trained.out), SpanReader.open(trained.out, span=3)
    heavy = SpanReader.open(trained.out, weight=9.0)
    assert plain.cache.path != short.cache.path and plain.cache.path == heavy.cache.path
    assert len({r.fingerprint for r in (plain, short, heavy)}) == 3
    assert SpanReader.open(trained.out).fingerprint == plain.fingerprint
    assert str(tmp_path) in plain.cache.path and SpanReader.open(trained.out, cache=False).cache is None


def test_cache_drops_the_oldest_and_keeps_what_is_there(tmp_path):
    cache = SpanCache(tmp_path / "c.sqlite", limit=3)
    keys = pair_keys(["q"] * 5, list("abcde"))
    assert len(set(keys)) == 5 and pair_keys(["qa"], ["b"]) != pair_keys(["q"], ["ab"])
    for i, key in enumerate(keys):
        cache.put([key], *np.array([[i], [i + 1], [i / 2]]).astype(float))
    assert len(cache) == 3 and set(cache.get(keys)) == set(keys[2:])
    cache.put(keys[4:], np.array([9]), np.array([9]), np.array([-np.inf]))
    assert cache.get(keys[4:]) == {keys[4]: (4, 5, 2.0)}
    many = pair_keys(["q"] * 3000, [str(i) for i in range(3000)])
    big = SpanCache(tmp_path / "big.sqlite")
    big.put(many, np.arange(3000), np.arange(3000), np.full(3000, -np.inf))
    assert big.get(many)[many[2999]] == (2999, 2999, -np.inf)


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "c").write_text("something else " * 100)
    with pytest.raises(ValueError, match="expected a reader's cache"):
        SpanCache(tmp_path / "c")
    with pytest.raises(ValueError, match="limit=0"):
        SpanCache(":memory:", limit=0)


# -- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answers, spans", [
    ("It was built by Molin in 1905.", ["molin"], ["Molin"]),
    ("On July 5, 2018 and July 5 , 2018", ["July 5 , 2018"], ["July 5, 2018", "July 5 , 2018"]),
    ("Romeo in Rome, ROME", ["Rome"], ["Rome", "ROME"]),
    ("it cost $5 (five)", ["$5", "(five)"], ["$5", "(five)"]),
    ("nothing", ["", "none", "!"], []),
])
def test_places_of_an_answer(text, answers, spans):
    assert [text[a:b] for a, b in places(text, answers)] == spans


def test_targets_are_the_tokens_of_the_answer(base):
    text = "It was built by molin and opened in 1905, by molin"
    window, = windows(tiny(base).tokenizer, ["who"], [text], 32, 8)
    starts, ends = targets(window, places(text, ["molin"]), 15)
    assert [text[window.first[a]:window.last[b]] for a, b in zip(starts, ends)] == ["molin", "molin"]
    long = places(text, ["built by molin and opened"])
    starts, ends = targets(window, long, 5)
    assert text[window.first[starts[0]]:window.last[ends[0]]] == "built by molin and opened"
    assert not len(targets(window, long, 4)[0])                                         # five tokens
    cut = windows(tiny(base).tokenizer, ["who"], [" ".join(NAMES * 3)], 32, 8)[1]
    assert not len(targets(cut, [(0, 5)], 15)[0])                                       # lies before this window


def test_loss_by_hand():
    def window(n):
        return Window(0, np.zeros(n), np.zeros(n), np.r_[-1, np.arange(n - 1)], np.r_[-1, np.arange(1, n)])

    first, last = torch.randn(2, 2, 4)
    inside = torch.tensor([[False, True, True, True], [False, False, True, False]])
    batch = [(window(4), np.array([1, 3]), np.array([3])), (window(4), np.array([0]), np.array([0]))]
    p = [torch.softmax(first[0], 0), torch.softmax(last[0], 0)]
    q = [torch.softmax(x[1][[0, 2]], 0) for x in (first, last)]
    wanted = -(torch.log(p[0][1] + p[0][3]) + torch.log(p[1][3]) + torch.log(q[0][0]) + torch.log(q[1][0])) / 4
    assert float(loss_of(first, last, inside, batch)) == pytest.approx(float(wanted), abs=1e-5)


def test_rate_rises_and_falls():
    rates = [rate(Training(lr=1.0, warmup=0.1), step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates) and rates[100] == 0.0
    assert rates[55] == pytest.approx(0.5) and all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_learns_the_planted_task_on_articles_it_never_saw(trained):
    test = trained.found["test"]
    assert set(test) == {"nq", "squad"} and all(row["n"] > 40 for row in test.values())
    assert all(trained.low[group]["em"] < 30 for group in test)
    assert all(row["em"] > 95 for row in test.values()), test
    assert trained.found["loss"][-1] < 0.5 * trained.found["loss"][0]
    assert len(trained.found["kept_apart"]) == 8


def test_opened_it_answers_as_it_was_trained(trained, planted):
    reader = SpanReader.open(trained.out, cache=False)
    asked = planted.questions(split="test")
    assert train_reader.gold_scores(reader, planted, asked) == trained.found["test"]
    # over several passages; which of them is meant is not planted, the kind of answer is
    some = asked[:20]
    passages = [planted.passages([*q.gold, *planted.asked[(q.id + 8) % len(planted.asked)].gold]) for q in some]
    answers = reader([q.question for q in some], passages, np.zeros((20, 2)))
    kinds = [NAMES if q.group == "squad" else YEARS for q in some]
    assert sum(any(word in a for word in kind) for a, kind in zip(answers, kinds)) >= 18, answers


def test_killed_and_continued_gives_the_same_bytes(base, planted, tmp_path):
    settings = Training(base=str(base), epochs=2, limit=60, **{**SMALL, "dropout": 0.1})
    train(planted, tmp_path / "whole", settings, evaluate=False)
    steps = json.loads((tmp_path / "whole" / "reader.json").read_text())["steps"]
    assert train(planted, tmp_path / "parts", settings, evaluate=False, stop_after=3, every=0.0) is None
    assert (tmp_path / "parts.part" / "checkpoint.safetensors").is_file() and not (tmp_path / "parts").exists()
    assert train(planted, tmp_path / "parts", settings, evaluate=False, stop_after=steps // 2) is None
    with pytest.raises(ValueError, match="begun with lr=0.0002, asked for is 0.1"):
        train(planted, tmp_path / "parts", Training(**{**vars(settings), "lr": 0.1}))
    found = train(planted, tmp_path / "parts", settings, evaluate=False)
    assert found["steps"] == steps == 2 * math.ceil(60 * 1.25 / 16)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two and not (tmp_path / "parts.part").exists()
    assert found["loss"] == json.loads((tmp_path / "whole" / "reader.json").read_text())["loss"]


def test_a_finished_reader_is_not_trained_again(trained, planted, monkeypatch):
    monkeypatch.setattr(train_reader, "Trainer", None)
    assert train(planted, trained.out, trained.settings) == json.loads(json.dumps(trained.found))
    with pytest.raises(ValueError, match="trained with another epochs"):
        train(planted, trained.out, Training(**{**vars(trained.settings), "epochs": 9}))


def test_frozen_layers_stay_and_the_rest_moves(base, planted, tmp_path):
    train(planted, tmp_path / "r", Training(base=str(base), epochs=1, limit=40, frozen=1, **SMALL), evaluate=False)
    before, after = (train_reader.load(folder)[0].state_dict() for folder in (base, tmp_path / "r"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all("layer.1." in name or "qa_outputs" in name for name in moved)
    assert {name for name in after if "layer.1." in name and "weight" in name} <= moved


def test_without_a_split_by_article_nothing_is_trained(base, planted, tmp_path):
    def corpus(name, asked, answer="molin"):
        with CorpusWriter(tmp_path / name, name=f"synthetic_{name}") as writer:
            ids = [writer.add(f"t{i}", f"by {n}") for i, n in enumerate(NAMES)]
            for i, (split, article) in enumerate(asked):
                writer.ask(f"who {i}", [answer], group="nq", split=split, gold=[ids[i % 3]], article=article)
        return tmp_path / name

    settings = Training(base=str(base), **SMALL)
    with pytest.raises(DataError, match="passage 0 is gold of training and of test"):
        train(corpus("gold", [("train", "a"), ("train", "b"), ("train", "c"), ("test", "d")]), tmp_path / "o", settings)
    with pytest.raises(DataError, match="article 'a' is in both splits"):
        train(corpus("article", [("train", "a"), ("train", "b"), ("test", "a")]), tmp_path / "o", settings)
    with pytest.raises(DataError, match="no questions with gold passages to train on"):
        train(corpus("one", [("train", "a"), ("test", "b")]), tmp_path / "o", settings)
    with pytest.raises(DataError, match="none of 1 training questions has an answer"):
        train(corpus("none", [("train", "a"), ("train", "b"), ("test", "c")], "rome"), tmp_path / "o", settings)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.part").exists()


@pytest.mark.parametrize("options, message", [
    (dict(epochs=0), "epochs=0"), (dict(lr=2.0), "0 to 1"), (dict(limit=0), "at least one question"),
    (dict(dtype="int8"), "bfloat16 or float32"), (dict(batch=1.5), "an integer"),
])
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**options)


def test_a_folder_without_a_trained_reader_is_refused(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="ecstudy rag train-reader"):
        SpanReader.open(tmp_path)
    with pytest.raises(ValueError, match="the weights lack qa_outputs"):
        SpanReader.open(base, cache=False)


def test_the_command_trains_and_goes_on(base, planted, tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing", reason="the command line needs the extra cli")
    from ecstudy.cli import app

    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    words = ["rag", "train-reader", str(planted.folder), "--base", str(base), "--limit", "20", "--epochs", "1",
             "--length", "32", "--dtype", "float32"]
    done = testing.CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    out = tmp_path / "data" / "readers" / "synthetic_planted"
    assert done.stdout.startswith(f"{out}: 2 steps on 20 questions in ")
    assert all(part in done.stdout for part in ("nq EM ", "squad EM "))
    reader = open_reader(out)
    assert isinstance(reader, SpanReader) and reader.stride == 8 and reader.dtype == "float32"
    monkeypatch.setattr(train_reader, "Trainer", None)
    assert testing.CliRunner().invoke(app, words).stdout == done.stdout                  # finished: nothing to do
    done = testing.CliRunner().invoke(app, [*words, "--epochs", "0"])
    assert done.exit_code == 2 and done.stderr == "error: epochs=0: expected an integer of at least 1\n"


def test_negatives_come_from_retrieval_where_there_are_vectors(planted, tmp_path):
    folder = tmp_path / "with_vectors"
    shutil.copytree(planted.folder, folder)
    n, asked = len(planted), planted.asked
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((n, 8)).astype(np.float32)
    near = {q.id: (q.gold[0] + 7) % n for q in asked}      # a question's vector is another passage's
    np.save(folder / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    np.save(folder / "question_vectors.npy", np.load(folder / "vectors.npy")[[near[q.id] for q in asked]])
    (folder / "vectors.json").write_text(json.dumps(dict(done=n, questions_done=True, corpus=planted.fingerprint,
                                                         fingerprint="f")))
    corpus = Corpus.open(folder)
    forbidden = {i for q in corpus.questions(split="test") for i in q.gold}
    questions = corpus.questions(split="train")
    found = train_reader.negatives(corpus, questions, train_reader.nearby(corpus, questions), forbidden)
    texts = {p.id: p.text for p in corpus.block(0, n)}
    for q in questions:
        ids = [p.id for p in found[q.id]]
        assert not forbidden & set(ids) and q.gold[0] not in ids
        assert not any(q.answers[0].lower() in texts[i].lower() for i in ids)
        first = near[q.id]
        if first not in forbidden and q.answers[0].lower() not in texts[first].lower():
            assert ids[0] == first
    assert sum(len(p) == train_reader.CANDIDATES for p in found.values()) > len(found) / 2
    # questions without a known passage take the nearest that spells an answer, and none that may not be trained on
    row = {q.id: [p.id for p in corpus.block(0, n)][:9] for q in questions[:40]}
    corpus.__dict__["asked"] = [q._replace(gold=None) if q.id in row else q for q in asked]
    taken = train_reader.distant(corpus, row, forbidden)
    wanted = {q.id: [(i,) for i in row[q.id] if i not in forbidden and q.answers[0].lower() in texts[i].lower()]
              for q in questions[:40]}
    assert {q.id: q.gold for q in taken} == {i: golds[0] for i, golds in wanted.items() if golds}
    assert 0 < len(taken) < 40


def test_trains_with_vectors_and_questions_of_unknown_passage(base, planted, tmp_path):
    folder = tmp_path / "with_vectors"
    shutil.copytree(planted.folder, folder)
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    unknown = [r for r in records if r["split"] == "train"][:40]
    vectors = np.random.default_rng(0).standard_normal((len(planted), 64)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    np.save(folder / "question_vectors.npy", np.load(folder / "vectors.npy")[[r["gold"][0] for r in records]])
    for r in unknown:
        r["gold"] = None
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "vectors.json").write_text(json.dumps(dict(done=len(planted), questions_done=True, fingerprint="f",
                                                         corpus=planted.fingerprint)))
    settings = Training(base=str(base), epochs=1, **SMALL)
    found = train(Corpus.open(folder), tmp_path / "r", settings, evaluate=False)
    assert found["trained"]["distant"] == 40 and found["trained"]["negatives"] > 0    # the nearest is the right one
    known = [r for r in records if r["split"] == "train" and r["gold"]]
    assert found["trained"]["questions"] == 40 + len(known) - found["trained"]["kept_apart"]
    tried = {(row["weight"], row["together"]): row["em"] for row in found["weighing"]}
    assert len(tried) == 2 * len(train_reader.WEIGHTS)
    chosen = found["reading"]["weight"], found["reading"]["together"]
    assert tried[chosen] == max(tried.values())
    reader = SpanReader.open(tmp_path / "r", cache=False)
    assert (reader.weight, reader.together) == chosen
    none = train(Corpus.open(folder), tmp_path / "n", Training(**{**vars(settings), "distant": False, "limit": 20}),
                 evaluate=False)
    assert none["trained"]["distant"] == 0 and none["trained"]["of"] == found["trained"]["of"] - 40


def test_weighing_takes_the_best_of_what_it_tried(planted, tmp_path, monkeypatch):
    class Known:
        """Spans found without a model: always the name; the passage's score misleads, retrieval does not."""

        def spans(self, questions, texts):
            at = np.array([t.index("by ") + 3 for t in texts])
            ends = np.array([t.index(" and") for t in texts])
            return SimpleNamespace(first=at, last=ends, score=np.linspace(1, 0, len(texts)))

    questions = [q for q in planted.questions("squad", "train")][:20]
    reader = Known()
    ids = np.array([[(q.gold[0] + 1) % len(planted), q.gold[0]] for q in questions])
    monkeypatch.setattr(train_reader, "search", lambda *a: SimpleNamespace(
        ids=ids, scores=np.tile(np.float32([0.4, 0.9]), (20, 1))))
    corpus = Corpus(planted.folder, planted.meta)
    corpus.__dict__.update(vectors=None, question_vectors=np.zeros((len(planted.asked), 1)))
    tried = train_reader.calibrate(reader, corpus, questions)
    assert len(tried) == 2 * len(train_reader.WEIGHTS)
    by = {(row["weight"], row["together"]): row["em"] for row in tried}
    assert by[0.0, False] < 20 and by[1.0, False] == 100 == max(by.values())
    assert (reader.weight, reader.together) == (1.0, False)
