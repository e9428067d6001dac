"""Retrieval (paper, section 5.5): encode passages, compress their vectors, search, read, score.

::

    prep      sources.py, generated.py   raw files, or invented facts -> a corpus folder (corpus.py)
    encode    encode.py                  passages and questions -> vectors, memory-mapped
    compress  ecstudy.compress           vectors -> codes
    search    search.py                  exact top k over codes decoded block by block
    read      reader.py, generator.py, generated.TemplateReader
    score     score.py                   exact match, F1, recall
    run       run.py                     all of it for one cell -> one row of the study

A *reader* is any callable ``reader(questions, passages, scores) -> answers``: questions list[str] of length Q, passages
a list of Q lists of at most k :class:`~ecstudy.rag.corpus.Passage` (best first), scores float32 [Q, k] as retrieval
gave them; one answer text per question. Its attribute ``fingerprint``, a text, tells readers apart in a row's settings.
"""
