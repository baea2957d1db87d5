"""The committed results: their runs are those of the studies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.run_folder import differences_of
from experiments.studies import STUDIES

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", [name for name in STUDIES if (RESULTS / f"{name}.json").exists()])
def test_runs_are_those_of_the_study(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    recorded = {variant["variant"]: variant for variant in found["variants"]}
    variants = {variant.name: variant for variant in STUDIES[name].variants if variant.name in recorded}
    assert list(recorded) == list(variants)
    assert (found["study"], found["about"]) == (name, STUDIES[name].about)
    for variant in variants.values():
        assert recorded[variant.name]["label"] == variant.label
        differences = differences_of(variant.config, recorded[variant.name]["config"])
        assert set(differences) <= {"digest", "file"}, variant.name  # the data are not here
