"""The map of when experts pay: its table."""

from __future__ import annotations

import pytest

from experiments.show.closed.regime_map import gains, map_table


def test_a_line_of_the_map_is_a_place_and_what_rows_have_above_equal_flops() -> None:
    place = {"regimes": 4, "labels": 512, "shown": "communities"}
    places = [
        place | {"model": "dense-flops", "test": [0.50, 0.52]},
        place | {"model": "oracle", "test": [0.60, 0.64]},
        # Without a dense model of equal FLOPs nothing is said
        place | {"labels": 128, "model": "oracle", "test": [0.6]},
    ]
    results = {"places": places}
    above = gains(results)
    assert above[4, 512, "communities", "oracle"] == pytest.approx([10.0, 12.0])
    assert {key[1] for key in above} == {512}
    _, _, line = map_table(results).splitlines()
    assert line == "| communities | 4 | 512 | 51.0 | – | – | – | – | +11.0 ± 1.4 |"
    assert map_table({"places": []}) == "no place is finished yet"
