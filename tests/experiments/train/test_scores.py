"""Paired differences: their mean, and the interval by Student's t."""

from __future__ import annotations

from math import inf

import pytest

from experiments.train.scores import Difference, better_in, of_shared_seeds, paired


@pytest.mark.parametrize(
    ("values", "quantile"),
    [
        ([1.0, 2.0, 3.0], 4.3027),
        ([float(value) for value in range(10)], 2.2622),
    ],
)
def test_the_interval_is_students(values: list[float], quantile: float) -> None:
    """By hand: the standard error of 1 to n, times the quantile of the tables."""
    n = len(values)
    standard_error = (n * (n + 1) / 12) ** 0.5 / n**0.5
    difference = Difference.of(values)
    assert (difference.mean, difference.n) == (sum(values) / n, n)
    half = quantile * standard_error
    expected = (difference.mean - half, difference.mean + half)
    assert (difference.low, difference.high) == pytest.approx(expected, abs=1e-3)


def test_a_known_variance_of_the_mean_takes_the_place_of_the_spread() -> None:
    values = [1.0, 2.0, 3.0]
    assert Difference.around(2.0, 1 / 3, 3) == Difference.of(values)
    wide = Difference.around(2.0, 4 / 3, 3)
    assert wide.high - wide.mean == pytest.approx(2 * (Difference.of(values).high - 2))


def test_one_difference_says_nothing_of_its_spread() -> None:
    difference = Difference.of([2.0])
    assert (difference.low, difference.high, difference.side) == (-inf, inf, "level")
    assert str(difference) == "+2.00"


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ([1.0, 1.1, 0.9], "above"),
        ([-1.0, -1.1, -0.9], "below"),
        ([1.0, -1.1, 0.2], "level"),
    ],
)
def test_an_interval_that_leaves_out_zero_is_on_a_side(values: list[float], side: str) -> None:
    assert Difference.of(values).side == side


def test_a_difference_is_written_with_its_interval() -> None:
    difference = Difference(mean=1.234, low=-0.5, high=2.0, n=3)
    assert str(difference) == "+1.23 (-0.50 to +2.00)"
    assert difference.text("+.1f") == "+1.2 (-0.5 to +2.0)"


def test_of_an_error_less_is_better() -> None:
    assert better_in("accuracy", [0.5, 0.6], [0.4, 0.7]) == "1 of 2"
    assert better_in("rmse", [0.5, 0.6], [0.6, 0.7]) == "2 of 2"
    said = paired("rmse", [0.5, 0.75], [0.75, 1.0])
    assert said == "-0.2500 rmse (95 % interval -0.2500 to -0.2500), n = 2, better on 2 of 2 seeds"


def test_one_seed_has_a_difference_and_no_interval() -> None:
    assert paired("accuracy", [0.5], [0.4]) == "+10.00 points, n = 1, better on 1 of 1 seeds"


def test_what_ran_other_seeds_is_compared_on_those_that_both_ran() -> None:
    ours = {"config": {"seeds": [3, 1, 7]}, "test": {"values": [0.3, 0.1, 0.7]}}
    theirs = {"config": {"seeds": [0, 1, 2, 3]}, "test": {"values": [0.0, 0.11, 0.2, 0.33]}}
    assert of_shared_seeds(ours, theirs) == ([0.3, 0.1], [0.33, 0.11])
    assert of_shared_seeds(ours, {"config": {"seeds": [5]}, "test": {"values": [1.0]}}) == ([], [])
