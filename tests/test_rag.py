"""Retrieval: the folder of a corpus, raw files, scores, exact search, generated facts; oracles by hand or numpy."""
from __future__ import annotations

import gzip
import json
import lzma
import pickle

import numpy as np
import pytest
import torch

import ecstudy as ec
from ecstudy.data.layout import DataError
from ecstudy.rag import generated, score, search, sources
from ecstudy.rag.corpus import Corpus, CorpusWriter, Passage


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECSTUDY_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- the folder -------------------------------------------------------------------------------------------------------

def test_a_corpus_is_read_as_it_was_written(tmp_path):
    with CorpusWriter(tmp_path / "c", name="small") as writer:
        places = [writer.add("Größe", "Ein Maß."), writer.add("B", "second\n text"), writer.add("C", "third")]
        writer.ask(" who  is it? ", ["x", "x", " "], group="g", split="test", gold=[2, 0, 2], article="C")
        writer.ask("nobody knows", ["y"], group="h", split="train")
        writer.join({"both": ["g", "h"]})
    assert places == [0, 1, 2]
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 3 and corpus.meta["questions"] == {"g": {"train": 0, "test": 1}, "h": {"train": 1, "test": 0}}
    assert corpus.passages([2, 0]) == [Passage(2, "C", "third"), Passage(0, "Größe", "Ein Maß.")]
    assert [p.text for p in corpus.block(1, 9)] == ["second text", "third"]
    first, second = corpus.asked
    assert (first.question, first.answers, first.gold, first.article) == ("who is it?", ("x",), (0, 2), "C")
    assert second.gold is None
    assert corpus.questions("both") == [first, second] and corpus.questions("g", "test") == [first]
    with pytest.raises(IndexError, match="passage 3"):
        corpus.passages([3])
    with pytest.raises(DataError, match="no test questions of h"):
        corpus.questions("h", "test")
    with pytest.raises(DataError, match="'i'.* has both, g, h"):
        corpus.questions("i")
    with pytest.raises(DataError, match="no vectors; run `ecstudy rag encode"):
        corpus.vectors


def test_empty_and_duplicate_passages_and_questions_without_answers_are_counted(tmp_path):
    with CorpusWriter(tmp_path / "c", name="small") as writer:
        assert [writer.add("A", "same"), writer.add("A", " same "), writer.add("B", "same"), writer.add("A", " \n")] \
            == [0, 0, 1, None]
        assert writer.ask("q", [], group="g", split="test") is None
        assert writer.ask(" ", ["a"], group="g", split="test") is None
        assert writer.ask("q", ["a"], group="g", split="test") == 0
    assert Corpus.open(tmp_path / "c").meta["dropped"] == dict(
        empty_passages=1, duplicate_passages=1, empty_questions=1, questions_without_answers=1)


def test_what_fails_leaves_nothing_and_what_is_there_stays(tmp_path):
    def write(text, **options):
        with CorpusWriter(tmp_path / "c", name="small", **options) as writer:
            place = writer.add("A", text)
            writer.ask("q", ["a"], group="g", split="test", gold=[place + (text == "bad")])

    with pytest.raises(DataError, match=r"gold passages \[1\].*below 1"):
        write("bad")
    assert list(tmp_path.iterdir()) == []
    write("one")
    before = Corpus.open(tmp_path / "c").fingerprint
    with pytest.raises(DataError, match="exists"):
        write("two")
    with pytest.raises(DataError):
        write("bad", overwrite=True)
    assert Corpus.open(tmp_path / "c").fingerprint == before
    write("two", overwrite=True)
    assert Corpus.open(tmp_path / "c").fingerprint != before and [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(DataError, match="no passages"):
        with CorpusWriter(tmp_path / "d", name="none"):
            pass
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="not a prepared corpus"):
        CorpusWriter(tmp_path / "e", name="e", overwrite=True)


# -- raw files --------------------------------------------------------------------------------------------------------

SQUAD = {"version": "v2.0", "data": [
    {"title": "Black_Death", "paragraphs": [{"context": "It came from Asia.", "qas": [
        {"question": "Whence?", "id": "1", "answers": [{"text": "Asia", "answer_start": 13}]},
        {"question": "When?", "id": "2", "answers": [], "is_impossible": True}]}]},
    {"title": "Normans", "paragraphs": [{"context": "They came by ship.", "qas": [
        {"question": "How?", "id": "3", "answers": ["by ship", "ship"]}]}]}]}
GOLD = [dict(question="who won", answers=["Ann"], ctxs=[dict(title="T", text="no", isgold=False),
                                                      dict(title="Race", text="Ann won.", isgold=True)]),
        dict(question="who lost", answers=["Bob"], ctxs=[dict(title="Race", text="Bob lost.", isgold=True)])]


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    with lzma.open(folder / "ottqa.json.xz", "wt", encoding="utf-8") as file:
        json.dump({"/wiki/Caf%C3%A9_Müller": "A dance .", "/wiki/Rome": "A town .", "/wiki/Oslo": "Another ."}, file)
    with gzip.open(folder / "psgs.tsv.gz", "wt", encoding="utf-8") as file:
        file.write('id\ttext\ttitle\n1\t"He said ""no"", then left"\tAaron\n2\tplain text\tBaron\n')
    (folder / "own.jsonl").write_text('{"title": "X", "text": "x text"}\n\n{"contents": "untitled"}\n')
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "gold.jsonl").write_text("".join(json.dumps(g) + "\n" for g in GOLD))
    (folder / "open.jsonl").write_text('{"question": "Who won?", "answer": ["Ann"]}\n'
                                       '{"question": "who slept", "answer": ["Cid"]}\n')
    (folder / "train.txt").write_text("who slept\t['Cid']\nwhich house\t\"['Ch\u00e2teau', \"\"d'Amboise\"\"]\"\n"
                                      "how many\t['581 ( second edition )']\n")
    return folder


def test_each_kind_of_file_is_read(raw):
    assert list(sources.read_passages(raw / "ottqa.json.xz")) == [
        ("Café Müller", "A dance ."), ("Rome", "A town ."), ("Oslo", "Another .")]
    assert list(sources.read_passages(raw / "psgs.tsv.gz")) == [
        ("Aaron", 'He said "no", then left'), ("Baron", "plain text")]
    assert list(sources.read_passages(raw / "own.jsonl")) == [("X", "x text"), ("", "untitled")]
    seen = []
    for name in ("psgs.tsv.gz", "own.jsonl"):
        assert len(list(sources.read_passages(raw / name, lambda *a: seen.append(a)))) == 2
    assert [name for name, _ in seen] == ["psgs.tsv.gz", "own.jsonl"] and all(0 <= share <= 1 for _, share in seen)
    squad = list(sources.read_squad(raw / "squad.json"))
    assert squad == [("Whence?", ["Asia"], "Black Death", "It came from Asia."),
                     ("When?", [], "Black Death", "It came from Asia."),
                     ("How?", ["by ship", "ship"], "Normans", "They came by ship.")]
    (raw / "bare.json").write_text(json.dumps(SQUAD["data"]))
    assert list(sources.read_squad(raw / "bare.json")) == squad
    assert list(sources.read_gold(raw / "gold.jsonl"))[0] == ("who won", ["Ann"], "Race", "Ann won.")
    assert [a.answers for a in sources.read_questions(raw / "train.txt")] == [
        ["Cid"], ["Château", "d'Amboise"], ["581 ( second edition )"]]


def test_files_become_one_corpus_and_no_question_is_asked_twice(raw):
    corpus = sources.prepare("wiki", passages=[raw / "ottqa.json.xz", raw / "psgs.tsv.gz"], squad=[raw / "squad.json"],
                             gold=[raw / "gold.jsonl"], questions=[raw / "open.jsonl"], train=[raw / "train.txt"],
                             test_squad=0.5, test_gold=1.0)
    assert corpus.folder.parent.name == "rag" and corpus.name == "wiki"
    assert len(corpus) == 3 + 2 + 2 + 2 and corpus.meta["dropped"]["questions_without_answers"] == 1
    groups = {g: [q.question for q in corpus.asked if q.group == g] for g in corpus.meta["questions"]}
    assert groups == dict(squad=["Whence?", "How?"], nq=["who won", "who lost"], nq_rest=["who slept"],
                          nq_train=["which house", "how many"])
    assert corpus.sets["nq_open"] == ["nq", "nq_rest"] and len(corpus.questions("nq_open", "test")) == 3
    assert [q.split for q in corpus.questions("nq_train")] == ["train", "train"]
    for q in corpus.asked:
        if q.gold:
            passage, = corpus.passages(q.gold)
            assert q.article == passage.title and any(answer in passage.text for answer in q.answers)
    assert [q.gold for q in corpus.questions("nq_rest")] == [None]
    assert len(sources.prepare("few", passages=[raw / "ottqa.json.xz"], gold=[raw / "gold.jsonl"], keep=1)) == 3


def test_articles_are_in_one_split_in_all_groups(raw):
    shared = [g | dict(ctxs=[dict(c, title="Normans") for c in g["ctxs"]]) for g in GOLD]
    (raw / "gold.jsonl").write_text("".join(json.dumps(g) + "\n" for g in shared))
    for seed in range(4):
        corpus = sources.prepare(f"s{seed}", squad=[raw / "squad.json"], gold=[raw / "gold.jsonl"], seed=seed,
                                 test_squad=0.5)
        assert len({q.split for q in corpus.asked if q.article == "Normans"}) == 1
    articles = [f"a{i}" for i in range(20) for _ in range(i + 1)]                     # 210 questions
    test = sources.by_article(articles, 0.3)
    assert abs(sum(a in test for a in articles) / 210 - 0.3) < 0.06
    assert test == sources.by_article(reversed(articles), 0.3) != sources.by_article(articles, 0.3, seed=1)
    assert sources.by_article(articles, 0.0) == set() and len(sources.by_article(articles, 1.0)) == 20


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"text": "x"}\nnonsense\n', "line 2: not JSON"),
    ("a.jsonl", '{"title": "x"}\n', "line 1: no text or contents or passage, it has title"),
    ("a.json", "[1]", "expected one object of links"),
    ("a.tsv", "id\ttext\n", "expected id, text and title"),
    ("a.tsv", "id\ttext\ttitle\n1\tx\n", "line 2: 2 columns, expected 3"),
    ("a.txt", "x", "ends in .tsv, .jsonl or .json"),
    ("a.json.gz", "x", "not JSON"),
])
def test_a_file_of_another_form_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        sources.prepare("c", passages=[tmp_path / name])
    assert not (tmp_path / "data" / "rag" / "c").exists() and not list((tmp_path / "data" / "rag").iterdir())


def test_damaged_files_and_wrong_options_are_told(tmp_path, raw):
    whole = (raw / "ottqa.json.xz").read_bytes()
    (raw / "cut.json.xz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged"):
        sources.prepare("c", passages=[raw / "cut.json.xz"])
    (raw / "bad.txt").write_text("who\t[__import__('os').getcwd()]\n")
    with pytest.raises(DataError, match="line 1: expected a question, a tab"):
        sources.prepare("c", passages=[raw / "own.jsonl"], train=[raw / "bad.txt"])
    with pytest.raises(DataError, match="nothing to prepare"):
        sources.prepare("c", questions=[raw / "open.jsonl"])
    with pytest.raises(DataError, match="test_gold 2"):
        sources.prepare("c", gold=[raw / "gold.jsonl"], test_gold=2)
    with pytest.raises(DataError, match="does not exist"):
        sources.prepare("c", gold=[raw / "absent.jsonl"])


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_published_vectors_are_read_without_running_anything(tmp_path, capsys):
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "0.npy", vectors)
    for name, protocol in (("1.pkl", 2), ("2.pkl", 4)):
        (tmp_path / name).write_bytes(pickle.dumps([(str(i), v) for i, v in enumerate(vectors)], protocol))
    assert [p.name for p in sources.in_order(tmp_path)] == ["0.npy", "1.pkl", "2.pkl"]
    for path in sources.in_order(tmp_path):
        assert np.array_equal(sources.read_vectors(path), vectors)
    for content in ([("0", Evil())], Evil()):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match="builtins.print"):
            sources.read_vectors(tmp_path / "evil.pkl")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        sources.read_vectors(tmp_path / "evil.npy")
    assert "must not run" not in capsys.readouterr().out
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="not a list of"):
        sources.read_vectors(tmp_path / "odd.pkl")


# -- scores -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, wanted", [
    ("The  Beatles!", "beatles"), ("a an the", ""), ("U.S.A.", "usa"), ("Anthem of a Theatre", "anthem of theatre"),
    ("1,000,000", "1000000"), ("twenty-one", "twentyone"), ("it's", "its"), ("the-end", "theend"), ("£5 “x”", "£5 “x”"),
])
def test_normalisation_of_squad(text, wanted):
    assert score.normalise_squad(text) == wanted


def test_exact_match_and_f1():
    assert score.exact("the Eiffel Tower", ["Paris", "Eiffel tower."]) == 1.0
    assert score.exact("Eiffel", ["Eiffel tower"]) == 0.0
    assert score.f1("Eiffel tower in Paris", ["the Eiffel Tower"]) == pytest.approx(2 * (2 / 4) * (2 / 2) / (2 / 4 + 1))
    assert score.f1("b b c", ["b c c"]) == pytest.approx(2 / 3)         # words count as often as they occur in both
    assert score.f1("x", ["y", "x z"]) == pytest.approx(2 / 3) and score.f1("x", ["y"]) == 0.0
    assert score.exact("caf\u00e9", ["cafe\u0301"], score.normalise_nq) == 1.0
    assert score.exact("caf\u00e9", ["cafe\u0301"]) == 0.0
    for function in (score.exact, score.f1):
        with pytest.raises(ValueError, match="no answers"):
            function("x", [])


def test_an_answer_stands_in_a_passage_as_whole_words():
    text = "On 14 December 1972, Gene Cernan (NASA) left Café_X."
    for answer, there in (("14 December 1972", True), ("december 1972 ,", True), ("nasa", True), ("NAS", False),
                          ("Cafe\u0301", True), ("72", False), ("", False), ("Gene  Cernan", True)):
        assert score.has_answer(text, [answer]) is there, answer
    assert score.has_answer(text, ["nobody", "left"]) and not score.has_answer("", ["x"])


def test_ranks_and_recall():
    ids = np.array([[5, 3, 1], [2, 9, 4], [7, 8, 6], [1, 2, 3]])
    rank = score.gold_rank(ids, [(1,), (4, 9), (0,), None])
    assert rank.tolist() == [3, 2, 0, 0]
    assert [score.recall(rank, k) for k in (1, 2, 3)] == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match="4 searches for 1"):
        score.gold_rank(ids, [(1,)])


# -- search -----------------------------------------------------------------------------------------------------------

def brute(vectors, queries, k):
    """ids and scores by a stable sort of everything: of equals the smaller id first."""
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, 1)


@pytest.mark.parametrize("block", [1, 7, 64, 300, 1000])
def test_search_equals_brute_force_with_ties(block):
    random = np.random.default_rng(1)
    vectors = random.integers(-2, 3, (300, 6)).astype(np.float32)        # few values: nearly every score is a tie
    vectors[150:] = vectors[:150]                                        # and each vector is there twice
    queries = random.integers(-2, 3, (9, 6)).astype(np.float32)          # whole numbers: sums are exact
    for k in (1, 10, 299, 300):
        ids, scores = brute(vectors, queries, k)
        hits = search.search(vectors, queries, k, block=block)
        assert np.array_equal(hits.ids, ids) and np.array_equal(hits.scores, scores)
        assert hits.ids.dtype == np.int64 and hits.scores.dtype == np.float32


@pytest.mark.parametrize("spec", ["full", "int_quant(scale='row')"])
def test_search_over_codes_equals_brute_force_over_what_they_decode_to(spec, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(n, 16, generator=generator) for n in (500, 20))
    emb = ec.compress(vectors, spec)
    decoded = emb(torch.arange(500)).detach()
    monkeypatch.setattr(search, "QUERIES", 8)                            # three lots of queries
    hits = search.search(emb, queries, 20, block=64)
    ids, scores = brute(decoded.numpy().astype(np.float64), queries.numpy().astype(np.float64), 20)
    assert np.array_equal(hits.ids, ids)                                 # no two scores are closer than rounding
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5, atol=1e-5)


def test_no_more_than_a_block_is_decoded_at_once():
    emb, asked = ec.compress(torch.randn(1000, 8), "full"), []
    forward = emb.forward
    emb.forward = lambda ids: (asked.append(len(ids)), forward(ids))[1]
    done = []
    search.search(emb, torch.randn(3, 8), 5, block=300, progress=lambda now, total: done.append((now, total)))
    assert asked == [300, 300, 300, 100] and done == [(300, 1000), (600, 1000), (900, 1000), (1000, 1000)]


def test_methods_with_a_search_of_their_own_use_it():
    vectors = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    emb = ec.compress(vectors, "full")
    queries = torch.eye(4)
    assert search.way(emb) == search.way(vectors) == "decode"
    emb.scores = lambda q, start, stop: -(q @ vectors[start:stop].T)     # an estimator that turns the order round
    assert search.way(emb) == "scores"
    hits = search.search(emb, queries, 50, block=8)
    assert np.array_equal(hits.ids, brute(-vectors.numpy(), queries.numpy(), 50)[0])
    decoded = search.search(emb, queries, 9, how="decode")
    assert np.array_equal(decoded.ids, brute(vectors.numpy(), queries.numpy(), 9)[0])
    emb.search = lambda q, k: (torch.ones(len(q), k), torch.arange(k).expand(len(q), k))
    assert search.way(emb) == "own" and search.search(emb, queries, 3).ids.tolist() == [[0, 1, 2]] * 4
    with pytest.raises(ValueError, match="has no index"):
        search.search(emb, queries, 3, how="faiss")


def test_faiss_searches_the_same_codes():
    pytest.importorskip("faiss", reason="searching by look-up tables needs the extra rag")
    vectors = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    emb = ec.compress(vectors, "pq(parts=2, bits=4)", sample=600)
    queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    ours, theirs = search.search(emb, queries, 600), search.search(emb, queries, 600, how="faiss")
    np.testing.assert_allclose(theirs.scores, ours.scores, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.ids, theirs.ids):                        # equal codes are equal scores: order is free
        assert sorted(mine) == sorted(other) == list(range(600))


def test_search_refuses_what_cannot_be_searched():
    vectors, queries = torch.randn(10, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"queries of shape \(2, 3\): expected \[Q, 4\]"):
        search.search(vectors, queries[:, :3], 1)
    for k in (0, 11, 1.5, True):
        with pytest.raises(ValueError, match="expected 1 to 10"):
            search.search(vectors, queries, k)
    with pytest.raises(ValueError, match="how='fast'"):
        search.search(vectors, queries, 1, how="fast")
    queries[1, 2] = np.nan
    with pytest.raises(ValueError, match="query 1 holds NaN"):
        search.search(vectors, queries, 1)
    emb = ec.compress(vectors, "full")
    emb.table.weight.data[7, 1] = np.inf
    with pytest.raises(ValueError, match="row 7 is scored NaN or infinity"):
        search.search(emb, torch.ones(1, 4), 1, block=4)
    vectors[3, 0] = np.nan
    with pytest.raises(ValueError, match="row 3 holds NaN"):
        search.search(vectors, torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match="2 fields"):
        search.search(ec.make("full", [3, 4], 4), torch.ones(1, 4), 1)


# -- the generated corpus ---------------------------------------------------------------------------------------------

def test_the_generated_corpus_is_the_same_everywhere_and_can_be_read():
    corpus = generated.open_generated("synthetic_facts_xs")
    assert len(corpus) == 480 and corpus.meta["questions"] == {"facts": {"train": 80, "test": 160}}
    assert corpus.fingerprint == "2f3590deab1f6507"
    assert generated.open_generated("synthetic_facts_xs").meta == corpus.meta
    assert not {q.article for q in corpus.questions("facts", "test")} & \
        {q.article for q in corpus.questions("facts", "train")}
    reader, asked = generated.TemplateReader(), corpus.asked
    assert len({q.question for q in asked}) == len(asked)
    gold = [corpus.passages(q.gold) for q in asked]
    for q, (passage,) in zip(asked, gold):
        assert q.answers[0] in passage.text and q.article == passage.title and q.answers[0] not in q.question
    answers = reader([q.question for q in asked], gold)
    assert all(score.exact(a, q.answers) for a, q in zip(answers, asked))
    # the other passage of the same entity is a distractor: no passage but the gold one gives the right answer
    by_title = {}
    for passage in corpus.block(0, len(corpus)):
        by_title.setdefault(passage.title, []).append(passage)
    others = [[p for p in by_title[q.article] if p.id not in q.gold] for q in asked]
    assert [len(o) for o in others] == [1] * len(asked)
    assert reader([q.question for q in asked], others) == [""] * len(asked)
    everything = [by_title[q.article] + gold[i - 1] for i, q in enumerate(asked)]
    assert reader([q.question for q in asked], everything) == [q.answers[0] for q in asked]
    assert generated.generate("other", entities=6, questions=5, train=3, seed=1).name == "synthetic_other"
    with pytest.raises(DataError, match="at most 144"):
        generated.generate("more", entities=6, questions=144, train=1)
    with pytest.raises(DataError, match="expected one of synthetic_facts"):
        generated.open_generated("synthetic_fact")
