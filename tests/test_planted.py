"""For each method a log on which its idea must pay: there it beats ``hash_trick`` at equal bytes.

The methods with a test file of their own have theirs there; they use the same :mod:`planted`.
"""
from __future__ import annotations

import numpy as np
import pytest
from planted import margin, trained, write, zipf_ids

ROWS = 30_000


@pytest.fixture(scope="module")
def every_id_counts(tmp_path_factory):
    """One field of 1,500 equally frequent ids, each with an effect of its own."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.integers(0, 1500, ROWS), rng.integers(0, 10, ROWS)], 1)
    return write(tmp_path_factory.mktemp("every") / "data", [1500, 10], ids, 2.5 * rng.normal(size=1500)[ids[:, 0]])


@pytest.fixture(scope="module")
def few_ids_count(tmp_path_factory):
    """One field of 6,000 ids of which every twentieth matters and is frequent."""
    rng = np.random.default_rng(2)
    order = rng.permutation(6000)
    important, others = order[:300], order[300:]
    first = np.where(rng.random(ROWS) < 0.6, rng.choice(important, ROWS), rng.choice(others, ROWS))
    effect = np.zeros(6000)
    effect[important] = 3 * rng.choice([-1, 1], 300)
    ids = np.stack([first, rng.integers(0, 10, ROWS)], 1)
    return write(tmp_path_factory.mktemp("few") / "data", [6000, 10], ids, effect[first])


def test_compo_pays_where_effects_are_products_of_quotient_and_remainder(tmp_path):
    rng = np.random.default_rng(3)
    ids = np.stack([rng.integers(0, 2500, ROWS), rng.integers(0, 10, ROWS)], 1)
    high, low = rng.choice([-1, 1], 50), rng.choice([-1, 1], 50)
    data = write(tmp_path / "data", [2500, 10], ids, 3.0 * high[ids[:, 0] // 50] * low[ids[:, 0] % 50])
    assert margin("compo", data, 0.05) > 0.05


def test_robe_pays_where_a_small_field_matters(tmp_path):
    """A budget per field in proportion merges the ids of a small field; one array for all fields does not."""
    rng = np.random.default_rng(4)
    ids = np.stack([zipf_ids(rng, 20_000, ROWS), rng.integers(0, 30, ROWS)], 1)
    data = write(tmp_path / "data", [20_000, 30], ids, 2.5 * rng.choice([-1, 1], 30)[ids[:, 1]])
    assert margin("robe", data, 0.05) > 0.1


@pytest.mark.parametrize("spec, budget", [("int_quant", 0.25), ("small_dim", 0.3)])
def test_a_row_for_every_id_pays_where_every_id_counts(spec, budget, every_id_counts):
    assert margin(spec, every_id_counts, budget) > 0.03


@pytest.mark.parametrize("spec", ["deeplight", "autosrh", "top_k"])
def test_pruning_and_selection_pay_where_few_ids_count(spec, few_ids_count):
    assert margin(spec, few_ids_count, 0.08) > 0.03


def test_full_is_the_ceiling(every_id_counts, few_ids_count):
    for data in (every_id_counts, few_ids_count):
        assert trained("full", data, 1.0)[0] > trained("hash_trick", data, 0.1)[0] + 0.05
