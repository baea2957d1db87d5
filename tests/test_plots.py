"""What figures read from result files, and compute from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs.plots.curves import Point, above_dense, curves
from docs.plots.regime_map import finished
from docs.plots.results import IN_TABLE, read_confirmed


def test_the_dense_curve_is_straight_over_the_log_of_flops() -> None:
    dense = [Point(8, 100, (50.0,)), Point(16, 400, (60.0,)), Point(32, 1600, (62.0,))]
    assert above_dense(Point(8, 200, (57.0,)), dense) == pytest.approx(2.0)
    assert above_dense(Point(8, 800, (60.0,)), dense) == pytest.approx(-1.0)
    assert above_dense(Point(16, 400, (61.0,)), dense) == pytest.approx(1.0)
    # Nothing is said where the curve does not reach.
    assert above_dense(Point(8, 99, (57.0,)), dense) is None
    assert above_dense(Point(8, 1601, (57.0,)), dense) is None
    assert above_dense(Point(8, 200, (57.0,)), []) is None


def summary(flops: int, *scores: float) -> dict[str, Any]:
    return {"flops": flops, "test": {"values": scores}}


def test_a_curve_has_its_points_cheapest_first() -> None:
    results = {
        "mosaic": {
            "copies-8": summary(2_000_000, 0.80, 0.82),
            "dense-16": summary(4_000_000, 0.70, 0.72),
            "dense-8": summary(1_000_000, 0.60, 0.62),
        }
    }
    lines = curves(results)["mosaic"]
    assert list(lines) == ["dense", "copies"]
    assert [point.width for point in lines["dense"]] == [8, 16]
    (copies,) = lines["copies"]
    assert copies.scores == pytest.approx((80.0, 82.0))
    assert above_dense(copies, lines["dense"]) == pytest.approx(15.0)


def test_the_map_has_points_above_a_dense_model_of_equal_flops(tmp_path: Path) -> None:
    place = {"regimes": 4, "labels": 512, "shown": "communities"}
    places = [
        place | {"model": "dense-flops", "test": [0.50, 0.52]},
        place | {"model": "oracle", "test": [0.60, 0.64]},
        # Without a dense model of equal FLOPs nothing is said.
        place | {"labels": 128, "model": "oracle", "test": [0.6]},
    ]
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"places": places}))
    found = finished(path)
    assert list(found) == [(4, 512, "communities", "oracle")]
    assert found[4, 512, "communities", "oracle"] == pytest.approx([10.0, 12.0])


def test_long_columns_are_confirmed_by_the_table_of_routers(tmp_path: Path) -> None:
    table_of_routers = tmp_path / "routers" / "cifar10"
    table_of_routers.mkdir(parents=True)
    for cell in list(IN_TABLE.values())[:-1]:
        (table_of_routers / f"{cell}.json").write_text("{}")
    assert read_confirmed(tmp_path / "starts-confirmed") == {}
    (table_of_routers / "copies.json").write_text("{}")
    assert set(read_confirmed(tmp_path / "starts-confirmed")["cifar10"]) == set(IN_TABLE)
