"""The paper's reader: a generator that writes the answer from the passages (section 5.5: RAG with BART).

Three ways, by the local model's type:

``rag_sequence`` (Lewis et al. 2020, section 2.1)
    Beam search for each passage; every candidate is scored under all passages, ``sum_k p(k) p(y | x, k)``, and the best
    is the answer ("thorough decoding").
``rag_token``
    One beam search in which every token is drawn from the mixture over passages.
``seq2seq`` (BART, T5 and others, fine-tuned to answer from one passage)
    Beam search for each passage, which gives its best beam only; equal answers add up ``p(k) p(y | x, k)`` (RAG's "fast
    decoding").

``p(k)`` is the softmax of the retrieval scores of the passages given. Weights are local: nothing is asked of a hub.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from ..extras import need
from ..study.progress import bar
from .corpus import Passage, check_lists, digest_of
from .reader import choose, quiet

KINDS = ("rag_sequence", "rag_token", "seq2seq")
DTYPES = ("float32", "bfloat16", "float16")


def generates(folder) -> bool:
    """Whether a local folder holds a model that writes answers; one that marks spans, or none at all, does not."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        return False
    config = need("transformers", "rag").AutoConfig.from_pretrained(folder, local_files_only=True)
    return config.model_type == "rag" or bool(getattr(config, "is_encoder_decoder", False))


class GeneratorReader:
    """``reader(questions, passages, scores) -> answers``, the form :mod:`ecstudy.rag` asks of a reader.

    Parameters
    ----------
    model, tokenizer:
        A transformers model and the tokenizer of its generator; :meth:`open` loads both.
    kind:
        One of ``KINDS``.
    beams:
        Of the search, for each passage or together.
    tokens:
        Of the longest answer, begin and end included.
    length:
        Tokens of passage and question together. Where they are more, the passage is cut and not the question
        (transformers' own retriever cuts the end, which is the question).
    form:
        How passage and question become one text.
    prefix:
        Put in front of each text, as T5 wants it.
    questions:
        Questions answered together.

    Raises
    ------
    ValueError
        For an option out of range.
    """

    def __init__(self, model, tokenizer, kind: str, *, beams: int = 4, tokens: int = 20, length: int = 300,
                 form: str = "{title} / {text} // {question}", prefix: str = "", questions: int = 4, device="cpu",
                 identity: str = "", progress: bool | None = None):
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected {', '.join(KINDS)}")
        if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer {type(tokenizer).__name__}: expected a fast one with a token for padding")
        for name, value, least in (("beams", beams, 1), ("tokens", tokens, 3), ("length", length, 16),
                                   ("questions", questions, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
        if missing := [part for part in ("{text}", "{question}") if part not in form]:
            raise ValueError(f"form={form!r}: expected it to hold {missing[0]}")
        self.model, self.tokenizer, self.kind = model.to(device).eval(), tokenizer, kind
        self.beams, self.tokens, self.length, self.form, self.prefix = beams, tokens, length, form, prefix
        self.questions, self.device, self.identity, self.progress = questions, device, identity, progress
        self.__name__ = kind                         # a row's model

    @classmethod
    def open(cls, folder, kind: str | None = None, *, dtype: str = "float32", **options) -> GeneratorReader:
        """A local folder of ``RagSequenceForGeneration``, ``RagTokenForGeneration`` or any sequence-to-sequence model.

        ``kind``: None takes what the folder's ``config.json`` names. A RAG folder holds its generator's tokenizer in
        ``generator_tokenizer``; its separators and longest input are taken from the configuration.

        Raises
        ------
        FileNotFoundError
            If the folder holds no model, or its weights are no safetensors files.
        ValueError
            If the model is of another type.
        """
        folder = Path(folder).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model (no config.json); pass the folder of a local one, as "
                                    "facebook/rag-sequence-nq saved by save_pretrained")
        if not (weights := sorted(folder.glob("*.safetensors"))):
            raise FileNotFoundError(f"{folder} holds no weights as safetensors; load it once with transformers and "
                                    "write it with save_pretrained(folder)")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected {', '.join(DTYPES)}")
        transformers = need("transformers", "rag")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rag = config.get("model_type") == "rag"
        if kind is None:
            named = (config.get("architectures") or [""])[0]
            kind = "seq2seq" if not rag else "rag_token" if "Token" in named else "rag_sequence"
        if kind not in KINDS or rag != (kind != "seq2seq"):
            raise ValueError(f"kind={kind!r} for a model of type {config.get('model_type')!r} in {folder}: expected "
                             + (" or ".join(KINDS[:2]) if rag else KINDS[2]))
        family = dict(rag_sequence="RagSequenceForGeneration", rag_token="RagTokenForGeneration",
                      seq2seq="AutoModelForSeq2SeqLM")[kind]
        with quiet(transformers):
            model = getattr(transformers, family).from_pretrained(folder, local_files_only=True, use_safetensors=True,
                                                                  dtype=getattr(torch, dtype))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "generator_tokenizer" if rag else folder,
                                                                   local_files_only=True)
        defaults = dict(prefix=getattr(model.config, "prefix", None) or "")
        if rag:
            c = model.config
            defaults = dict(form=f"{{title}}{c.title_sep}{{text}}{c.doc_sep}{{question}}",
                            length=c.max_combined_length, prefix=c.generator.to_dict().get("prefix") or "")
        identity = f"{digest_of(weights)[:16]}-{dtype}"
        return cls(model, tokenizer, kind, identity=identity, **{**defaults, **options})

    @property
    def fingerprint(self) -> str:
        """Tells apart readers that give different answers."""
        parts = (self.identity, self.kind, self.beams, self.tokens, self.length, self.form, self.prefix)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def __call__(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]], scores) -> list[str]:
        """One answer text per question; ``""`` without passages. See :mod:`ecstudy.rag` for the arguments.

        Raises
        ------
        ValueError
            As :func:`ecstudy.rag.corpus.check_lists` says.
        """
        check_lists(questions, passages, scores)
        answers = [""] * len(questions)
        # questions with equally many passages are answered together
        groups: dict[int, list[int]] = {}
        for i, found in enumerate(passages):
            if len(found):
                groups.setdefault(len(found), []).append(i)
        with bar(sum(map(len, groups.values())), "writing answers", self.progress) as step, torch.inference_mode():
            for k, members in groups.items():
                for start in range(0, len(members), self.questions):
                    part = members[start:start + self.questions]
                    inputs = self.inputs([questions[i] for i in part], [passages[i] for i in part])
                    weights = torch.from_numpy(np.stack([np.asarray(scores[i][:k], np.float32) for i in part]))
                    for i, answer in zip(part, self._write(*inputs, weights.to(self.device))):
                        answers[i] = answer
                    step("", len(part))
        return answers

    def inputs(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> tuple[Tensor, Tensor]:
        """Tokens and mask int64 [Q * k, L] of each question with each of its passages."""
        asked = [q for q, found in zip(questions, passages) for _ in found]
        flat = [p for found in passages for p in found]
        texts = [self._text(q, p, p.text) for q, p in zip(asked, flat)]
        counts = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        for i in (i for i, n in enumerate(counts) if n > self.length):
            spans = self.tokenizer(flat[i].text, add_special_tokens=False,
                                   return_offsets_mapping=True)["offset_mapping"]
            room = max(0, len(spans) - (counts[i] - self.length) - 1)        # a cut word may become one token more
            texts[i] = self._text(asked[i], flat[i], flat[i].text[:spans[room - 1][1]] if room else "")
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device)

    def _text(self, question: str, passage: Passage, text: str) -> str:
        whole = self.prefix + self.form.format(title=passage.title.strip('"'), text=text, question=question)
        return whole.replace("  ", " ")                                      # as RAG was trained

    def _write(self, ids: Tensor, mask: Tensor, scores: Tensor) -> list[str]:
        k = scores.shape[1]
        search = dict(num_beams=self.beams, max_length=self.tokens, do_sample=False)
        if self.kind == "seq2seq":
            return self._fast(ids, mask, scores, search)
        if self.kind == "rag_sequence":
            return self._words(self._thorough(ids, mask, scores, search))
        return self._words(self.model.generate(context_input_ids=ids, context_attention_mask=mask, n_docs=k,
                                               doc_scores=scores.to(self.model.dtype), **search))

    def _thorough(self, ids, mask, scores, search) -> list[Tensor]:
        """The candidate of each question that all its passages together find likeliest.

        Not by the model's own ``generate``: that hands its generator no mask, and padding is read as text.
        """
        k, best = scores.shape[1], []
        for part, seen, weights in zip(ids.split(k), mask.split(k), scores):
            found = self.model.rag.generator.generate(input_ids=part, attention_mask=seen,
                                                      num_return_sequences=self.beams, **search)
            found = found.unique(dim=0)
            n = len(found)
            loss = self.model(context_input_ids=part.repeat(n, 1), context_attention_mask=seen.repeat(n, 1),
                              doc_scores=weights.expand(n, k), labels=found, exclude_bos_score=True, n_docs=k).loss
            best.append(found[loss.argmin()])
        return best

    def _fast(self, ids, mask, scores, search) -> list[str]:
        q, k = scores.shape
        found = self.model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=1, **search)
        texts = self._words(found)
        likely = self._likelihood(ids, mask, found) + scores.log_softmax(1).flatten()
        likely = likely.double().cpu().numpy()
        return choose(np.repeat(np.arange(q), k), texts, likely, np.zeros(q * k), q, together=True)

    def _likelihood(self, ids, mask, written) -> Tensor:
        """Log-probability of each written sequence [N, T] for its input, float32 [N]; a forced first token is free."""
        logits = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=written[:, :-1]).logits
        each = logits.float().log_softmax(-1).gather(-1, written[:, 1:, None]).squeeze(-1)
        ends = (written[:, 1:] == self.tokenizer.eos_token_id).long()
        after = ends.cumsum(1) - ends > 0                                    # padding behind the end
        each = each.masked_fill(after, 0.0)
        forced = self.model.generation_config.forced_bos_token_id is not None
        return each[:, 1:].sum(1) if forced else each.sum(1)

    def _words(self, tokens) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
