"""The committed results: their numbers are those that were measured, and their runs those of the studies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.studies import STUDIES

RESULTS = Path(__file__).parents[2] / "results"
NUMBERS = dict(line.split()[::-1] for line in (RESULTS / "numbers.sha256").read_text().splitlines())
"""SHA-256 of the numbers of a file, in order, one a line: renaming keys, options or files leaves them as they are."""


def numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_that_were_measured(name: str) -> None:
    lines = "\n".join(map(repr, numbers(json.loads((RESULTS / name).read_text()))))
    assert hashlib.sha256(lines.encode()).hexdigest() == NUMBERS[name]


@pytest.mark.parametrize("name", [name for name in STUDIES if (RESULTS / f"{name}.json").exists()])
def test_runs_are_those_of_the_study(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    recorded = {variant["variant"]: variant for variant in found["variants"]}
    variants = {variant.name: variant for variant in STUDIES[name].variants if variant.name in recorded}
    assert list(recorded) == list(variants)
    assert (found["study"], found["about"]) == (name, STUDIES[name].about)
    for variant in variants.values():
        assert recorded[variant.name]["label"] == variant.label
        differences = variant.config.differences(recorded[variant.name]["config"])
        assert set(differences) <= {"digest", "file"}, variant.name  # the data are not here
