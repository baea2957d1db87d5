"""The kinds of data: each is one class, and nothing else asks which it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from experiments.train import config as configs
from experiments.train.config import RunConfig
from experiments.train.kinds import KINDS, kind_of
from experiments.train.presets import PRESETS

FOLDER = Path(configs.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))


def questions(source: str) -> list[str]:
    """The ``isinstance(..., SomeConfig)`` of a source."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    asked = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "isinstance"]
    return [call for call in asked if "Config" in call]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_nothing_asks_a_run_for_its_kind(path: Path) -> None:
    assert not questions(path.read_text())


def test_a_question_is_found() -> None:
    source = (
        "def model(config):\n    if isinstance(config, GraphConfig | ImageConfig):\n        pass"
    )
    assert questions(source) == ["isinstance(config, GraphConfig | ImageConfig)"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_kind(name: str) -> None:
    config = PRESETS[name][1]
    assert kind_of(config).config is config


def test_every_kind_has_a_preset() -> None:
    kinds: set[type[RunConfig]] = {type(config) for _, config in PRESETS.values()}
    assert kinds == set(KINDS)
