"""Avazu Kaggle click-through rate challenge: ``python data_prep/avazu.py train.gz --out data/avazu``.

The file is ``train.csv`` of the challenge (40,428,967 rows), plain or gzip.
"""
import sys

from ecstudy.data.prepare import prepare_avazu
from ecstudy.data.prepare_script import run

if __name__ == "__main__":
    sys.exit(run(prepare_avazu))
