"""The control whose layers see the input again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments.train.config import GraphConfig
from experiments.train.input_again import InputAgain
from experiments.train.presets import MOSAIC
from gmoe import GNNMoE
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, features

NODES, EDGES = GRAPHS["mixed"]


@pytest.mark.parametrize("conv", ["sage", "gcn"])
@pytest.mark.parametrize(
    "options",
    [{"residual": "linear"}, {"residual": "identity", "norm": "batch_norm"}, {"jk": "last"}],
    ids=str,
)
def test_without_the_columns_of_the_input_it_is_the_dense_model(
    conv: str, options: dict[str, Any]
) -> None:
    """With them, every layer hears of the input."""
    sizes = (4, 5, 3, 3)
    torch.manual_seed(0)
    again = InputAgain(*sizes, conv=conv, dropout=0.2, **options).double()
    dense: Any = GNNMoE(*sizes, conv=conv, router=None, dropout=0.2, **options).double()
    states = again.state_dict()
    for name, value in dense.state_dict().items():
        own = name if name in states else name.replace("residuals.1.", "residuals.1.module.")
        if value.dim():  # no counter of batches
            states[own].zero_()
            states[own][..., : value.size(-1)] = value
    again.load_state_dict(states)
    x = features(NODES, 4)
    for training in (True, False):
        outputs = []
        for model in (again, dense):
            torch.manual_seed(1)
            outputs.append(model.train(training)(x, EDGES))
        assert_same(*outputs)
    last: Any = again.convs[-1]
    (last.lin_r if conv == "sage" else last.lin).weight.data[:, -4:] = 1
    assert not torch.allclose(again(x, EDGES), dense(x, EDGES))


@pytest.mark.parametrize("changes", [{}, {"router": "dense", "sampling": "neighbor"}], ids=str)
def test_it_is_a_dense_model_on_the_whole_graph(changes: dict[str, Any]) -> None:
    assert isinstance(MOSAIC, GraphConfig)
    with pytest.raises(ValueError, match=r"input_again: got True with router=.*expected a dense"):
        replace(MOSAIC, input_again=True, **changes)
