"""A line of a table says what its runs found."""

from __future__ import annotations

from typing import Any

from experiments.show.tables import study_table
from tests.helpers.run_folders import variant


def study(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"reference": "dense", "wide": "dense-4x", "variants": list(variants)}


DENSE, WIDE = variant("dense", [0.70, 0.72], 100), variant("dense-4x", [0.90, 0.92], 400)


def test_headroom() -> None:
    for dense, wide, recovered in (
        (0.9, 0.9, "no headroom"),
        (0.9, 0.95, "no headroom"),
        (0.5, 0.9, "110 %"),
    ):
        ends = variant("dense", [dense] * 2), variant("dense-4x", [min(0.9, wide), wide])
        found = study_table(study(*ends, variant("moe", [0.94])))
        assert [line.split(" | ")[5] for line in found.splitlines()[2:]] == [
            "– |",
            "– |",
            f"{recovered} |",
        ]


def test_headroom_of_errors_is_what_they_lose() -> None:
    for wide, moe, recovered in ((1.0, 0.9, "150 %"), (1.4, 1.6, "no headroom")):
        runs = [("dense", 1.2), ("dense-4x", wide), ("moe", moe)]
        errors = [{**variant(name, [value] * 2), "metric": "rmse"} for name, value in runs]
        last = study_table(study(*errors)).splitlines()[-1]
        assert last.split(" | ")[5] == f"{recovered} |"
