"""moefy of MLPs that are made of PyG's linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import MLP, Linear

from gmoe import moefy

mlp = partial(MLP, [6, 9, 4], norm=None)


class _Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


READ: dict[str, Callable[[], Any]] = {
    "MLP": mlp,
    "MLP, dropout": partial(mlp, dropout=0.3),
    "MLP, GELU": partial(mlp, act="gelu", act_first=True),
    "MLP, no activation": partial(mlp, act=None),
    "MLP, no bias": partial(mlp, bias=False),
    "Sequential": lambda: nn.Sequential(Linear(6, 9), nn.ReLU(), Linear(9, 4)),
    "Sequential of both": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), Linear(9, 4)),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a batch norm": (partial(mlp, norm="batch_norm"), "MLP of .*BatchNorm1d.* expected linear, "),
    "three layers": (partial(MLP, [6, 9, 9, 4], norm=None), "a MLP of .*expected linear, "),
    "no plain last": (partial(mlp, plain_last=False), "a MLP of .*expected linear, "),
    "a class of one's own": (
        lambda: nn.Sequential(_Doubled(6, 9), nn.ReLU(), Linear(9, 4)),
        "something else|its own class, _Doubled",
    ),
}


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", READ)
def test_experts_of_it_start_as_it_is(name: str, start: Any) -> None:
    torch.manual_seed(0)
    dense: Any = nn.ModuleDict({"mlp": READ[name]()}).eval()
    if start == "copies" and "dropout" in name:
        with pytest.raises(ValueError, match="draws random numbers in training"):
            moefy(dense, targets="mlp", start=start)
        return
    model: Any = moefy(copy.deepcopy(dense), targets="mlp", num_experts=3, start=start)
    layer = model["mlp"]
    x = torch.randn(7, 6)
    torch.testing.assert_close(layer(x), dense["mlp"](x))
    assert layer.experts.hidden_dropout.p == pytest.approx(0.3 if "dropout" in name else 0.0)


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_what_they_are(name: str, start: Any) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        moefy(nn.ModuleDict({"mlp": build()}), targets="mlp", start=start)


def test_a_linear_layer_of_ones_own_is_not_replaced() -> None:
    model = nn.ModuleDict({"linear": _Doubled(6, 4)})
    with pytest.raises(ValueError, match="linear layer of its own class, _Doubled"):
        moefy(model, targets="linear", start="copies")
