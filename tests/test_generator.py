"""The generator path on tiny models with random weights: RAG's formulas, worked out one step at a time."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ecstudy.rag.corpus import Passage
from ecstudy.rag.generator import GeneratorReader, generates
from ecstudy.rag.run import open_reader

transformers = pytest.importorskip("transformers", reason="the generator needs the extra rag")
tokenizers = pytest.importorskip("tokenizers", reason="the generator needs the extra rag")

WORDS = [f"{a}{b}" for a in ("mo", "ka", "ti", "ru", "lo", "be") for b in ("lin", "dor", "vek", "sam", "nix")]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
VOCAB = {word: i for i, word in enumerate([*SPECIAL, "/", "//", *WORDS])}
QUESTIONS = ["kador tivek", "rusam lolin benix", "molin"]
PASSAGES = [[Passage(i, WORDS[i], " ".join(WORDS[(i * 7 + j * 5 + q) % 30] for j in range(6 + i))) for i in range(3)]
            for q in range(3)]
SCORES = np.array([[2.0, 1.0, 0.5], [0.3, 0.2, 0.1], [5.0, 4.9, 0.0]], np.float32)
BART = dict(vocab_size=len(VOCAB), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
            init_std=0.7, dropout=0.0)               # large weights: answers differ from passage to passage


@pytest.fixture(scope="module")
def tokenizer():
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCAB, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>",
                                                                  special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>",
                                                eos_token="</s>", unk_token="<unk>")


def bart(seed=0):
    torch.manual_seed(seed)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval()
    model.final_logits_bias[0, [0, 1, 3]] = -1e4     # a model that writes padding is none that was trained
    return model


def rag(name, seed=0):
    question = transformers.DPRConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                      intermediate_size=8, projection_dim=0)
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question, transformers.BartConfig(**BART), n_docs=3, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        decoder_start_token_id=2)
    torch.manual_seed(seed)
    return getattr(transformers, name)(config=config, question_encoder=transformers.DPRQuestionEncoder(question),
                                       generator=bart(seed)).eval()


def reader(tokenizer, kind, **options):
    model = {"rag_sequence": lambda: rag("RagSequenceForGeneration"), "rag_token": lambda: rag("RagTokenForGeneration"),
             "seq2seq": bart}[kind]()
    return GeneratorReader(model, tokenizer, kind, **{"tokens": 8, "beams": 3, **options})


def next_words(model, ids, written):
    """log p(next token | input, what is written) of one input, [V]."""
    with torch.no_grad():
        logits = model(input_ids=ids[None], decoder_input_ids=torch.tensor([written])).logits
    return logits[0, -1].log_softmax(-1)


def single(r, question, passage):
    return r.inputs([question], [[passage]])[0][0]


def test_text_is_as_rag_was_trained(tokenizer):
    r = reader(tokenizer, "seq2seq")
    ids, mask = r.inputs(["kador  tivek"], [[Passage(0, '"molin"', "rusam lolin")]])
    assert tokenizer.decode(ids[0]) == "<s> molin / rusam lolin // kador tivek </s>" and mask.all()


def test_a_long_passage_is_cut_and_not_the_question(tokenizer):
    r = reader(tokenizer, "seq2seq", length=16)
    ids, mask = r.inputs(QUESTIONS[:1], [[Passage(0, "molin", " ".join(WORDS)), Passage(1, "tilin", "kasam")]])
    assert 15 <= ids.shape[1] <= 16
    kept = tokenizer.decode(ids[0]).split()
    assert kept[:3] == ["<s>", "molin", "/"] and kept[-4:] == ["//", "kador", "tivek", "</s>"]
    text = kept[3:-4]
    assert text == WORDS[:len(text)] and 8 <= len(text) <= 9
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "tilin / kasam // kador tivek"


def test_rag_token_is_the_mixture_over_passages_step_by_step(tokenizer):
    r = reader(tokenizer, "rag_token", beams=1)
    generator = r.model.rag.generator
    for q in range(3):
        weights = torch.from_numpy(SCORES[q]).log_softmax(0)
        inputs = [single(r, QUESTIONS[q], p) for p in PASSAGES[q]]
        written = [2]
        while len(written) < 8 and (len(written) == 1 or written[-1] != 2):
            each = torch.stack([next_words(generator, ids, written) for ids in inputs])
            mixed = (each + weights[:, None]).logsumexp(0)
            written.append(2 if len(written) == 7 else int(mixed.argmax()))        # the last token is forced to end
        wanted = tokenizer.decode(written, skip_special_tokens=True)
        assert wanted and r(QUESTIONS[q:q + 1], PASSAGES[q:q + 1], SCORES[q:q + 1]) == [wanted]


def test_rag_sequence_scores_every_candidate_under_all_passages(tokenizer):
    r = reader(tokenizer, "rag_sequence")
    generator = r.model.rag.generator
    for q in range(3):
        weights = torch.from_numpy(SCORES[q]).log_softmax(0)
        inputs = [single(r, QUESTIONS[q], p) for p in PASSAGES[q]]
        found = set()
        for ids in inputs:
            for row in generator.generate(ids[None], num_beams=3, num_return_sequences=3, max_length=8).tolist():
                found.add(tuple(row[:row.index(2, 1) + 1]))
        scored = {}
        for tokens in found:
            # every token is scored, the start and what follows the end are not
            each = torch.stack([sum(next_words(generator, ids, tokens[:i])[tokens[i]] for i in range(1, len(tokens)))
                                for ids in inputs])
            scored[tokens] = float((each + weights).logsumexp(0))
        order = sorted(scored, key=scored.get, reverse=True)
        assert len(order) > 3 and scored[order[0]] - scored[order[1]] > 1e-3
        wanted = tokenizer.decode(order[0], skip_special_tokens=True)
        assert r(QUESTIONS[q:q + 1], PASSAGES[q:q + 1], SCORES[q:q + 1]) == [wanted]


def test_seq2seq_adds_up_equal_answers(tokenizer):
    r = reader(tokenizer, "seq2seq", beams=1)
    for q in range(3):
        weights = torch.from_numpy(SCORES[q]).log_softmax(0)
        sums = {}
        for k, passage in enumerate(PASSAGES[q]):
            ids, tokens, likely = single(r, QUESTIONS[q], passage), [2], float(weights[k])
            while len(tokens) == 1 or tokens[-1] != 2:
                each = next_words(r.model, ids, tokens)
                tokens.append(2 if len(tokens) == 7 else int(each.argmax()))
                likely += float(each[tokens[-1]])
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            sums[answer] = np.logaddexp(sums.get(answer, -np.inf), likely)
        assert r(QUESTIONS[q:q + 1], PASSAGES[q:q + 1], SCORES[q:q + 1]) == [max(sums, key=sums.get)]


@pytest.mark.parametrize("kind", ["rag_sequence", "rag_token", "seq2seq"])
def test_the_passage_that_retrieval_is_sure_of_decides(tokenizer, kind):
    r = reader(tokenizer, kind)
    for k in range(3):
        scores = np.full((3, 3), -1e4, np.float32)
        scores[:, k] = 0.0
        alone = r(QUESTIONS, [[p[k]] for p in PASSAGES], np.zeros((3, 1), np.float32))
        assert r(QUESTIONS, PASSAGES, scores) == alone
    answers = {a for k in range(3) for a in r(QUESTIONS, [[p[k]] for p in PASSAGES], np.zeros((3, 1)))}
    assert len(answers) > 3                                                  # else the comparison above says nothing


@pytest.mark.parametrize("kind", ["rag_sequence", "rag_token", "seq2seq"])
def test_answered_together_or_one_by_one_is_the_same(tokenizer, kind):
    whole = reader(tokenizer, kind, questions=8)(QUESTIONS, PASSAGES, SCORES)
    assert whole == reader(tokenizer, kind, questions=1)(QUESTIONS, PASSAGES, SCORES) and all(whole)
    uneven = [PASSAGES[0][:2], [], PASSAGES[2]]
    some = reader(tokenizer, kind)(QUESTIONS, uneven, SCORES)
    assert some[1] == "" and some[2] == whole[2]


@pytest.mark.parametrize("kind, name", [("rag_sequence", "RagSequenceForGeneration"),
                                        ("rag_token", "RagTokenForGeneration"), ("seq2seq", None)])
def test_opened_from_a_local_folder_it_writes_the_same(tokenizer, tmp_path, kind, name):
    direct = reader(tokenizer, kind, tokens=8)
    direct.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "generator_tokenizer" if name else tmp_path)
    assert generates(tmp_path) and isinstance(open_reader(tmp_path), GeneratorReader)
    opened = GeneratorReader.open(tmp_path, tokens=8, beams=3)
    assert opened.kind == kind and opened.form == "{title} / {text} // {question}" and opened.length == 300
    assert opened(QUESTIONS, PASSAGES, SCORES) == direct(QUESTIONS, PASSAGES, SCORES)
    assert opened.fingerprint == GeneratorReader.open(tmp_path, tokens=8, beams=3).fingerprint
    assert opened.fingerprint != GeneratorReader.open(tmp_path, tokens=9, beams=3).fingerprint
    with pytest.raises(ValueError, match="expected seq2seq" if not name else "expected rag_sequence or rag_token"):
        GeneratorReader.open(tmp_path, "seq2seq" if name else "rag_token")


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        GeneratorReader.open(tmp_path)
    assert not generates(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="rag")))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        GeneratorReader.open(tmp_path)


@pytest.mark.parametrize("options, message", [
    (dict(beams=0), "beams=0"), (dict(tokens=2), "at least 3"), (dict(length=4), "at least 16"),
    (dict(form="{text}"), "expected it to hold {question}"), (dict(questions=1.5), "an integer"),
])
def test_options_are_checked(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        reader(tokenizer, "seq2seq", **options)
    with pytest.raises(ValueError, match="kind='bart'"):
        GeneratorReader(bart(), tokenizer, "bart")


def test_lists_of_unequal_length_are_refused(tokenizer):
    r = reader(tokenizer, "seq2seq")
    with pytest.raises(ValueError, match="2 questions, 3 lists of passages, 3 of scores"):
        r(QUESTIONS[:2], PASSAGES, SCORES)
    with pytest.raises(ValueError, match="2 scores for 3 passages"):
        r(QUESTIONS, PASSAGES, SCORES[:, :2])
