"""Configurations in files: today's, and those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.train.presets import DIGITS_GRAPH
from experiments.train.run_folder import differences_of
from experiments.train.saved import restore


def test_configurations_of_older_versions() -> None:
    there = DIGITS_GRAPH.science()
    del there["shared_router"]  # which had the default
    old = there | {"ema": 0.0, "tie_routers": False, "patch": None}
    assert restore(old, DIGITS_GRAPH.data_root) == DIGITS_GRAPH
    assert differences_of(DIGITS_GRAPH, old | {"k": 2}) == {"k": (2, 1)}
    with pytest.raises(ValueError, match=r"ema: got 0\.9, expected 0\.0"):
        restore(old | {"ema": 0.9}, DIGITS_GRAPH.data_root)


def test_every_committed_run_is_still_read() -> None:
    found = [
        json.loads(path.read_text())
        for path in (Path(__file__).parents[3] / "results").glob("*.json")
    ]
    variants = [
        variant for study in found for variant in study.get("variants", []) if "config" in variant
    ]
    gone = 0
    for variant in variants:
        config = variant["config"]
        beside = (
            config.get("shared_expert", False) is not False and config.get("dense_start") is False
        )
        if beside and config["router"] != "dense":
            gone += 1
            with pytest.raises(ValueError, match=r"^dense_start: got False beside a shared expert"):
                restore(config, Path())
            continue
        differences = differences_of(restore(config, Path()), config)
        assert set(differences) <= {"file", "digest"}  # the data are not here
    assert len(variants) > 100
    assert gone == 16
