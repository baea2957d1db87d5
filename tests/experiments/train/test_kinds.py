"""The kinds of data: each is one class, and nothing else asks which it is."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gmoe
from experiments.train import config as configs
from experiments.train.command import parse
from experiments.train.data.graphs import graph_task
from experiments.train.kinds import kind_of
from experiments.train.kinds.graphs import check_width
from experiments.train.presets import PRESETS
from tests.helpers.made_graph import make_graph

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


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({"router": "dense"}, False),
        ({"router": "dense", "hidden": 10**9}, True),  # activations
        ({"layers": 3, "hidden": 10**7}, True),  # weights
        ({"layers": 1, "hidden": 10**9, "router": "dense", "jk": "last"}, False),  # which has none
    ],
)
def test_a_width_that_memory_cannot_hold_is_refused_before_a_weight_is_drawn(
    changes: dict[str, Any], is_refused: bool
) -> None:
    config: Any = replace(PRESETS["graph"][1], **changes)
    task = graph_task(make_graph(), config, 0)
    if is_refused:
        with pytest.raises(ValueError, match=r"^hidden: got 1\d+, with which training holds at"):
            kind_of(config).model(task)
    else:
        check_width(config, task)


def test_the_critical_look_has_the_parameters_of_its_code() -> None:
    """Two linear layers and a norm a block, an input layer, a last norm and an output layer."""
    preset = PRESETS["roman-empire"][1]
    graph = make_graph()
    changes: dict[str, Any] = {"router": "dense", "layers": 3, "hidden": 10}
    config = replace(preset, **changes)
    model = kind_of(config).model(graph_task(graph, config, 0))
    block = (10 * 2 * 10 + 10) + (10 * 10 + 10) + 2 * 10
    in_channels = graph.data.num_features
    rest = (in_channels * 10 + 10) + 2 * 10 + (10 * graph.num_outputs + graph.num_outputs)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * block + rest
    recipe = (config.optimizer, config.lr, config.weight_decay, config.epochs, config.eval_every)
    assert recipe == ("adamw", 3e-5, 0.0, 1000, 1)


@pytest.mark.parametrize("preset", ["mosaic", "digits-graph", "minesweeper"])
def test_blocks_take_the_place_of_a_preset_s_layers(preset: str) -> None:
    """Their residual is the identity, whatever the preset has; another one is refused."""
    config: Any = parse([preset, "--ffn", "experts"])
    assert config.residual == "identity"
    graph = make_graph()
    model: Any = kind_of(config).model(graph_task(graph, config, 0))
    assert isinstance(model, gmoe.BlockGNN)
    assert len(model.ffns) == config.layers
    config = parse([preset, "--ffn", "experts", "--residual", "linear"])
    with pytest.raises(ValueError, match="residual: got 'linear' with ffn, expected 'identity'"):
        kind_of(config).model(graph_task(graph, config, 0))
