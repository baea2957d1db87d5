"""A gain is worth having if its whole interval is above 0 and its mean is half a point."""

from __future__ import annotations

import pytest

from experiments.study.worth import Gain


@pytest.mark.parametrize(
    ("mean", "low", "is_worth"), [(2.0, 1.0, True), (2.0, -1.0, False), (0.2, 0.1, False)]
)
def test_a_gain_is_worth_having_above_zero_and_half_a_point(
    mean: float, low: float, is_worth: bool
) -> None:
    assert Gain(mean=mean, low=low, high=2 * mean - low, n=5).is_worth == is_worth


def test_a_gain_is_written_in_points() -> None:
    gain = Gain.of([1.0, 2.0, 3.0])
    assert str(gain) == "+2.00 points [-0.48, +4.48]"
