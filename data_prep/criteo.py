"""Criteo Kaggle display advertising challenge: ``python data_prep/criteo.py train.txt --out data/criteo``.

The file is ``train.txt`` of the challenge (45,840,617 rows, 11 GB), plain or gzip. The result takes about 7 GB; while
it is made, about twice the size of the raw text is used on the same disk.
"""
import sys

from ecstudy.data.prepare import prepare_criteo
from ecstudy.data.prepare_script import run

if __name__ == "__main__":
    sys.exit(run(prepare_criteo))
