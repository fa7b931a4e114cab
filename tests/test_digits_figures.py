"""What the pictures of the digits study say and show."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.digits import figures
from jaxattr.evaluation import Difference


def measured(uniform, learned, low, high):
    lds = {"uniform": SimpleNamespace(mean=uniform), "learned": SimpleNamespace(mean=learned)}
    return SimpleNamespace(
        lds=lds, difference=Difference(mean=learned - uniform, low=low, high=high)
    )


GAIN = measured(0.142, 0.166, 0.018, 0.03)
LARGER_BUT_VAGUE = measured(0.1, 0.2, -0.05, 0.25)
LOSS = measured(0.3, 0.28, -0.06, -0.01)
UNKNOWN = measured(0.1, 0.3, math.nan, math.nan)


def test_the_clearest_gain_is_shown_and_not_the_largest():
    results = {"vit": {"A": LARGER_BUT_VAGUE, "B": UNKNOWN}, "resnet": {"A": GAIN, "B": LOSS}}
    assert figures.clearest(results) == ("resnet", "A")
    assert figures.headline(results).split("\n") == [
        "Learned weights gain in 1 of 4 cases and lose in 1 (95 % intervals beyond zero). "
        "The clearest gain: A on resnet",
        "LDS 14.2 % with uniform weights, 16.6 % with learned weights: +2.4 points "
        "(95 % interval +1.8 to +3.0)",
    ]


def test_without_a_clear_gain_the_title_says_so():
    results = {"vit": {"A": LOSS, "B": UNKNOWN}, "mlp": {"B": LARGER_BUT_VAGUE}}
    assert figures.clearest(results) == ("mlp", "B")
    first, second = figures.headline(results).split("\n")
    assert first == (
        "Learned weights gain in none of 3 cases and lose in 1 (95 % intervals beyond zero). "
        "The closest to a gain: B on mlp"
    )
    assert second.endswith("+10.0 points (95 % interval -5.0 to +25.0)")


def test_without_intervals_the_title_says_so():
    results = {"vit": {"A": measured(0.1, 0.2, math.nan, math.nan), "B": UNKNOWN}}
    assert figures.clearest(results) == ("vit", "B")
    first, second = figures.headline(results).split("\n")
    assert first.startswith("Too few retrained models to say") and "B on vit" in first
    assert second.endswith("+20.0 points (no interval)")


def test_proponents_are_positive_and_opponents_negative():
    scores = np.array([0.5, -3.0, 0.0, 2.0, -1.0, 2.0])
    found = figures.strongest(scores, 4, signed=True)
    assert found.proponents.tolist() == [3, 5, 0] and found.opponents.tolist() == [1, 4]
    assert figures.strongest(scores, 1, signed=True).opponents.tolist() == [1]
    assert not len(figures.strongest(np.full(3, np.nan), 2, signed=True).proponents)


def test_squares_have_no_opponents():
    found = figures.strongest(np.array([1.0, 4.0, 0.0, 9.0]), 1, signed=False)
    assert found.proponents.tolist() == [3, 1] and not len(found.opponents)


def test_agreement_is_by_ranks():
    def result(weights):
        alone = {"a": 0.1, "b": 0.2, "c": 0.3}
        return SimpleNamespace(group_lds=alone, weights={"learned": weights})

    assert figures.agreement(result({"c": 9.0, "a": 0.0, "b": 0.1})) == pytest.approx(1)
    assert figures.agreement(result({"c": 0.0, "a": 0.2, "b": 0.1})) == pytest.approx(-1)
    assert math.isnan(figures.agreement(result(dict.fromkeys("abc", 1.0))))
