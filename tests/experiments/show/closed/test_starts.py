"""The study of experts begun as copies: its ranks, and what is confirmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.show.closed.starts import (
    IN_TABLE,
    WEIGHED,
    confirmed_table,
    is_arm,
    passes,
    ranking,
    read_confirmed,
    table,
)


def test_arms_and_their_variants_are_ranked_and_controls_and_random_twins_are_not() -> None:
    assert is_arm("pooled-once-node-quiet")
    assert is_arm("difference-once-neighbors-constant-top2")
    for other in ("dense-difference", "dense-lr2", "shared", "copies-layer-node-random"):
        assert not is_arm(other)


def validated(value: float) -> dict[str, Any]:
    """The summary of two seeds of a score."""
    return {"metric": "accuracy", "val": {"values": [value, value], "mean": value}}


def test_arms_are_ranked_by_their_mean_gain_in_validation_over_the_weighed_columns() -> None:
    results = {
        column: {
            "copies-layer-node-quiet": validated(0.8),
            "dense": validated(0.4),
            "difference-once-node-quiet": validated(0.7),
            "pooled-layer-node-quiet": validated(0.5),
            "pooled-layer-node-random": validated(0.9),
        }
        for column in WEIGHED
    }
    results["mosaic"]["copies-layer-node-quiet"] = validated(0.9)
    # Is not weighed
    results["digits"] = {"dense": validated(0.4), "copies-layer-node-quiet": validated(0.0)}
    del results["cora"]["pooled-layer-node-quiet"]  # so that this arm is not ranked
    ranked = ranking(results)
    assert [name for name, _ in ranked] == ["copies-layer-node-quiet", "difference-once-node-quiet"]
    assert [mean for _, mean in ranked] == pytest.approx([42.0, 30.0])
    head, _, best, *_ = table(results).splitlines()
    assert head.startswith("| validation − dense (points) | mean | digits-graph | cora | mosaic |")
    assert best.startswith("| copies-layer-node-quiet | +42.00 | +40.00 | +40.00 | +50.00 |")
    assert "| dense | – | 40.00 | 40.00 | 40.00 |" in table(results)
    assert "| pooled-layer-node-quiet | – | +10.00 | – | +10.00 |" in table(results)
    assert table({}) == "no arm is finished yet"


def test_an_arm_passes_unless_it_is_surely_worse() -> None:
    def run(values: list[float]) -> dict[str, Any]:
        test = {"values": values, "mean": sum(values) / len(values)}
        return {"metric": "accuracy", "test": test, "flops": 100}

    dense = [0.80, 0.81, 0.82, 0.83]
    known = {
        "worse": run([value - 0.01 for value in dense]),
        "dense": run(dense),
        "dense-flops": run(dense),
        "shared": run([value - 0.002 for value in dense]),  # .2 points below, always
        "unsure": run(
            [
                value + change
                for value, change in zip(dense, (0.02, -0.05, 0.01, -0.04), strict=True)
            ]
        ),
    }
    assert [passes(known, name) for name in ("shared", "worse", "unsure")] == [True, False, True]
    _, _, first, _, _, worse, _ = confirmed_table({"cora": known}).splitlines()
    assert first == "| cora | dense | 81.50 | 1.00 × | – | – | – |"
    assert worse.startswith("| cora | worse | 80.50 | 1.00 × | -1.00 (-1.00 to -1.00) |")


def test_long_columns_are_confirmed_by_the_table_of_routers(tmp_path: Path) -> None:
    table_of_routers = tmp_path / "routers" / "cifar10"
    table_of_routers.mkdir(parents=True)
    for cell in list(IN_TABLE.values())[:-1]:
        (table_of_routers / f"{cell}.json").write_text("{}")
    assert read_confirmed(tmp_path / "starts-confirmed") == {}
    (table_of_routers / "copies.json").write_text("{}")
    assert set(read_confirmed(tmp_path / "starts-confirmed")["cifar10"]) == set(IN_TABLE)
