"""Passages and questions to a corpus of :mod:`ecstudy.rag`: ``python data_prep/passages.py OUT --passages FILE ...``.

The same as ``ecstudy rag prep``. Files may be plain, gzip or xz. The corpus of the study::

    python data_prep/passages.py wiki_183k --passages ottqa_passages.json.xz --squad squad_v1.1_dev.json.xz \
        --gold nq-open-oracle.jsonl.xz --questions NQ-open.dev.jsonl.xz --train topics.dpr.nq.dev.txt.xz

and that of the paper, DPR's 21,015,324 passages (12 GB of text; vectors as published, a folder of 50 shards)::

    python data_prep/passages.py dpr --passages psgs_w100.tsv.gz --questions NQ-open.test.jsonl --not-distinct
    ecstudy rag encode dpr --question-encoder dpr-question_encoder-single-nq-base --shards wikipedia_passages
"""
import sys

from ecstudy.cli import app

if __name__ == "__main__":
    app(["rag", "prep", *sys.argv[1:]])
