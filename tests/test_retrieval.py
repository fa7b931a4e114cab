import numpy as np
import pytest

from jaxattr import evaluation

SCORES = np.array([[0.1, 0.9, 0.5, 0.5], [np.nan, -1.0, -2.0, -3.0]])
RELEVANT = np.array([[False, False, True, True], [True, False, True, False]])


def test_ranks_by_hand_with_ties_to_the_lower_id_and_nan_last():
    assert evaluation.ranks(SCORES, RELEVANT).tolist() == [2, 2]
    tied = np.array([[False, False, False, True]])
    assert evaluation.ranks(SCORES[:1], tied).tolist() == [3]
    assert evaluation.ranks(SCORES[1:], np.array([[True, False, False, False]])).tolist() == [4]


def test_metrics_by_hand():
    assert evaluation.hit_at_k(SCORES, RELEVANT, 1).tolist() == [False, False]
    assert evaluation.hit_at_k(SCORES, RELEVANT, 2).tolist() == [True, True]
    assert evaluation.recall_at_k(SCORES, RELEVANT, 2).tolist() == [0.5, 0.5]
    assert evaluation.recall_at_k(SCORES, RELEVANT, 3).tolist() == [1.0, 0.5]
    assert evaluation.precision_at_k(SCORES, RELEVANT, 3).tolist() == [2 / 3, 1 / 3]
    assert evaluation.mean_reciprocal_rank(SCORES, RELEVANT) == 0.5


def test_a_query_without_finite_scores_finds_nothing():
    # As ja.score gives it: all are tied, and the relevant one has the lowest id.
    scores, relevant = np.full((1, 4), np.nan), np.array([[True, False, False, False]])
    assert evaluation.ranks(scores, relevant).tolist() == [4]
    assert evaluation.mean_reciprocal_rank(scores, relevant) == 0.25
    assert evaluation.strongest(SCORES, 4).tolist() == [[1, 2, 3, 0], [1, 2, 3, -1]]
    for metric in (evaluation.hit_at_k, evaluation.recall_at_k, evaluation.precision_at_k):
        assert metric(scores, relevant, 2).tolist() == [0]
        assert metric(scores, relevant, 4).tolist() == [0]


def test_numbers_of_tables_are_taken():
    scores = np.array([[3.0, None, 1.0]], object)  # as pandas gives it, where some are missing
    assert evaluation.recall_at_k(scores, np.array([[True, False, False]], object), 1) == [1.0]


def test_interval_of_a_mean_covers_it():
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = evaluation.mean_interval(values)
    assert low < values.mean() < high and 0.05 < high - low < 0.13  # 2 * 1.96 * sqrt(.21 / 400)


def test_bad_input():
    with pytest.raises(ValueError, match=r"must both be \[q, n\]"):
        evaluation.ranks(SCORES, RELEVANT[:1])
    with pytest.raises(ValueError, match=r"no relevant training example, at positions \[1\]"):
        evaluation.ranks(SCORES, np.array([[True] * 4, [False] * 4]))
    with pytest.raises(ValueError, match="k must be between 1 and the 4"):
        evaluation.hit_at_k(SCORES, RELEVANT, 5)
    with pytest.raises(ValueError, match="one number per query"):
        evaluation.mean_interval([])
    with pytest.raises(ValueError, match=r"2 values are not finite, at positions \[1, 2\]"):
        evaluation.mean_interval([0.5, np.nan, np.inf, 1.0])
    for scores, got in ((SCORES[0], "float64 .4."), (SCORES * 1j, "complex128")):
        with pytest.raises(ValueError, match=rf"real numbers \[q, n\], got {got}"):
            evaluation.strongest(scores, 1)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint64, np.int64, np.float16])
def test_scores_of_any_type_are_ranked_by_their_size(dtype):
    limits = [0, 1] if dtype is bool else [np.finfo, np.iinfo][dtype is not np.float16](dtype)
    low, high = limits if dtype is bool else (limits.min, limits.max)
    scores = np.array([[1, low, high, 0, low, high, 1]], object).astype(dtype)
    expected = sorted(range(7), key=lambda n: (-int(scores[0, n]), n))
    assert evaluation.strongest(scores, 7)[0].tolist() == expected


def test_graded_relevance_counts_once():
    found = evaluation.recall_at_k([[3.0, 2.0, 1.0]], [[2, 0, 1]], 3)
    np.testing.assert_array_equal(found, [1.0])
