"""Curves of test scores over FLOPs: what lies above the dense curve."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.show.closed.curves import Point, above_dense, curves, table


def summary(flops: int, *scores: float) -> dict[str, Any]:
    return {"flops": flops, "test": {"values": scores}}


def test_the_dense_curve_is_straight_over_the_log_of_flops() -> None:
    dense = [Point(8, 100, (50.0,)), Point(16, 400, (60.0,)), Point(32, 1600, (62.0,))]
    assert above_dense(Point(8, 200, (57.0,)), dense) == pytest.approx(2.0)
    assert above_dense(Point(8, 800, (60.0,)), dense) == pytest.approx(-1.0)
    assert above_dense(Point(16, 400, (61.0,)), dense) == pytest.approx(1.0)
    # Nothing is said where the curve does not reach.
    assert above_dense(Point(8, 99, (57.0,)), dense) is None
    assert above_dense(Point(8, 1601, (57.0,)), dense) is None
    assert above_dense(Point(8, 200, (57.0,)), []) is None


def test_the_table_has_a_line_a_point_cheapest_first() -> None:
    results = {
        "mosaic": {
            "copies-8": summary(2_000_000, 0.80, 0.82),
            "dense-16": summary(4_000_000, 0.70, 0.72),
            "dense-8": summary(1_000_000, 0.60, 0.62),
        }
    }
    assert [point.width for point in curves(results)["mosaic"]["dense"]] == [8, 16]
    *_, dense, copies = table(results).splitlines()
    assert dense == "| mosaic | dense, 16 wide | 4 | 71.00 ± 1.41 | – |"
    assert copies == "| mosaic | copies, 8 wide | 2 | 81.00 ± 1.41 | +15.00 |"
    assert table({}) == "no point is finished yet"
