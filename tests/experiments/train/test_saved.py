"""Configurations in files: today's, and those of the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.train.config import RECORDS
from experiments.train.files import RESULTS
from experiments.train.presets import DIGITS, DIGITS_GRAPH
from experiments.train.run_folder import differences_of
from experiments.train.saved import restore


def test_an_option_that_is_missing_has_its_default() -> None:
    there = DIGITS_GRAPH.science()
    del there["shared_router"]
    assert restore(there, DIGITS_GRAPH.data_root) == DIGITS_GRAPH
    assert differences_of(DIGITS_GRAPH, there | {"k": 2}) == {"k": (2, 1)}


@pytest.mark.parametrize("option", ["ema", "heads", "shared_expert", "nothing"])
def test_an_option_that_is_gone_is_refused_as_any_unknown_one(option: str) -> None:
    """Whatever its value; also an option of graphs in a configuration of images."""
    unknown = f"{option}: got 0.0, unexpected keyword argument"
    with pytest.raises(ValueError, match=re.escape(unknown)):
        restore(DIGITS_GRAPH.science() | {option: 0.0}, DIGITS_GRAPH.data_root)
    with pytest.raises(ValueError, match=r"conv: got .*, unexpected keyword argument"):
        restore(DIGITS.science() | {"conv": ["gcn"]}, DIGITS.data_root)


def configurations(content: Any) -> Iterator[dict[str, Any]]:
    """All that a result file holds."""
    if isinstance(content, dict) and {"dataset", "router"} <= content.keys():
        yield content
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from configurations(part)


def test_every_committed_run_is_read() -> None:
    """But those on pacs, a preset that left."""
    found = 0
    for path in RESULTS.rglob("*.json"):
        for config in configurations(json.loads(path.read_text())):
            if config["dataset"] == "pacs":
                continue
            differences = differences_of(restore(config, Path()), config)
            assert set(differences) <= set(RECORDS)  # the data are not here
            found += 1
    assert found >= 130
