"""Graphs on which nothing was chosen: what the rule says of them."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.show.closed.unseen import table, verdict
from experiments.train.scores import Difference


def summary(flops: int, *scores: float) -> dict[str, Any]:
    std = 0.01
    part = {"mean": sum(scores) / len(scores), "std": std, "n": len(scores), "values": [*scores]}
    return {"metric": "accuracy", "flops": flops, "test": part, "val": part}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "gain"),
        ([0.20, 0.21, 0.19], "not told apart"),  # surely above 0, but too small to be a gain
        ([5.0, -4.0, 2.0], "not told apart"),
        ([-0.10, -0.11, -0.09], "loss"),
        ([-5.0, 4.0, -2.0], "not told apart"),
    ],
)
def test_the_rule_names_a_gain_and_a_loss(values: list[float], expected: str) -> None:
    assert verdict(Difference.of(values)) == expected


def test_the_table_has_a_line_an_arm_and_the_verdict_beside_the_experts() -> None:
    results = {
        "chameleon": {
            "dense": summary(100, 0.40, 0.42, 0.44),
            "experts": summary(110, 0.38, 0.40, 0.43),
            "random": summary(110, 0.40, 0.41, 0.43),
        },
        "tolokers": {"experts": summary(110, 0.38, 0.40)},  # its dense model is not finished
    }
    _, _, dense, experts, random = table(results).splitlines()
    assert dense == "| chameleon | dense | accuracy | 42.00 ± 1.00 | 3 | 1.00 | – | – | – | – | – |"
    beside = "-1.67 (-3.10 to -0.23)"
    assert experts == (
        "| chameleon | experts, the default | accuracy | 40.33 ± 1.00 | 3 | 1.10 | "
        f"{beside} | 0 of 3 | {beside} | – | loss |"
    )
    assert random.endswith("| 0 of 3 | -0.67 (-2.10 to +0.77) | -1.00 (-3.48 to +1.48) | – |")
    assert table({}) == "no arm is finished yet"
