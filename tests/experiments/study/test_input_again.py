"""The control whose layers see the input again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.study.input_again import InputAgain, facebook, minesweeper
from experiments.study.published import CONTROLS
from experiments.train.config import GraphConfig
from experiments.train.user_code import load_object
from gmoe import GNNMoE
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, features

NODES, EDGES = GRAPHS["mixed"]


@pytest.mark.parametrize("column", ["facebook", "minesweeper"])
def test_without_the_columns_of_the_input_it_is_the_dense_model(column: str) -> None:
    """That of the column, in its sizes; with them, every layer hears of the input."""
    config = CONTROLS.columns[column]
    assert isinstance(config, GraphConfig)
    torch.manual_seed(0)
    again = {"facebook": facebook, "minesweeper": minesweeper}[column](4, 3).double()
    dense: Any = GNNMoE(
        4,
        config.hidden,
        3,
        config.layers,
        conv="sage",
        router=None,
        dropout=config.dropout,
        norm=config.norm,
        residual=config.residual,
    ).double()
    states = again.state_dict()
    for name, value in dense.state_dict().items():
        if value.dim():  # no counter of batches
            states[name].zero_()
            states[name][..., : value.size(-1)] = value
    again.load_state_dict(states)
    x = features(NODES, 4)
    for training in (True, False):
        outputs = []
        for model in (again, dense):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x, EDGES))
        assert_same(*outputs)
    last: Any = again.convs[-1]
    last.lin_r.weight.data[:, -4:] = 1
    assert not torch.allclose(again(x, EDGES), dense(x, EDGES))


@pytest.mark.parametrize("column", CONTROLS.columns)
def test_the_study_has_it_on_each_column(column: str) -> None:
    config = CONTROLS.config(column, "dense-input-again")
    assert config is not None
    assert config.model is not None
    model = load_object("model", config.model)(4, 3)
    assert isinstance(model, InputAgain)
    assert (model.hidden_channels, len(model.convs)) == (config.hidden, config.layers)
