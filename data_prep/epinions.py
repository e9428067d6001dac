"""Epinions ratings as clicks: ``python data_prep/epinions.py epinions_ratings.parquet --out data/epinions``.

The file has the columns user, item, category and rating (1 to 5), 770,000 rows. Of each repeated (user, item) pair the
first row stays; the label is rating >= 4; rows are split 80/10/10 at random with seed 0. Ninety per cent of the items
have fewer than five ratings: a harder long tail than Criteo's.
"""
import sys

from ecstudy.data.prepare import prepare_table
from ecstudy.data.prepare_script import run


def prepare_epinions(path, out, *, seed=0, name="epinions", overwrite=False, progress=None):
    """Prepare the Epinions ratings into the folder ``out``."""
    return prepare_table(path, out, label="rating", label_threshold=4.0, categorical=("user", "item", "category"),
                         distinct=("user", "item"), split="random", fractions=(0.8, 0.1, 0.1), seed=seed, name=name,
                         overwrite=overwrite, progress=progress)


if __name__ == "__main__":
    sys.exit(run(prepare_epinions))
