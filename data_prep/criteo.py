"""Criteo Kaggle display advertising challenge: ``python data_prep/criteo.py train.txt --out data/criteo``.

The file is ``train.txt`` of the challenge (45,840,617 rows), plain or gzip. The result takes 157 bytes per row, 7.2 GB
for all of them; while it is made, columns are staged on the same disk.
"""
import sys

from ecstudy.data.prepare import prepare_criteo
from ecstudy.data.prepare_script import run

if __name__ == "__main__":
    sys.exit(run(prepare_criteo))
