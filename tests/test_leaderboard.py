"""The table of all methods: what is compared with what."""

import jax
import numpy as np
import pytest

import jaxattr as ja
from experiments.ground_truth import Truth
from experiments.leaderboard import measuring
from experiments.leaderboard.domains import Domain, Entry

generator = np.random.default_rng(0)
SCORES = {"all": generator.normal(size=(6, 40)), "few": generator.normal(size=(4, 40))}
MASKS = ja.evaluation.random_subsets(jax.random.key(0), 40, 24)
OUTPUTS = MASKS @ SCORES["all"].T + generator.normal(size=(24, 6))
TRUTH = Truth(MASKS, np.zeros((24, 0)), OUTPUTS)
DOMAIN = Domain("model", [], TRUTH, None, None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "second"), [("few", "all"), ("all", "few")])
def test_methods_are_compared_on_the_queries_that_both_have(tmp_path, first, second):
    for name, scores in SCORES.items():
        np.savez(tmp_path / f"model-{name}.npz", uniform=scores)
    entries = tuple(Entry(name, lambda: None) for name in (first, second))  # type: ignore
    found = measuring.differences(DOMAIN, entries, tmp_path)["uniform"]
    by_hand = [
        np.mean([_spearman(MASKS @ SCORES[name][q], OUTPUTS[:, q]) for q in range(4)])
        for name in (first, second)
    ]
    assert found.mean == pytest.approx(by_hand[0] - by_hand[1])


def _spearman(x, y):
    return np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1]
