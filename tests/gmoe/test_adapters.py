"""PEFT adapts stacked experts as they are, by ``target_parameters``."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import gmoe
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import EDGES, EXPERTS, WIDTH, X, conv_layer, moefied, moved
from tests.helpers.vits import images


def adapted(model: nn.Module, *parameters: str) -> Any:
    """The model with adapters of rank 2 beside the parameters whose names end so."""
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=list(parameters))
    return peft.get_peft_model(model, config)


def draw_adapters(model: nn.Module) -> None:
    """Adapters start at zero by their second map."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


CASES: dict[str, Any] = {
    "MLPs beside a shared one": (
        lambda: moefied(start="shared"),
        ("experts.up.weight", "experts.down.weight"),
        (images(),),
    ),
    "MLPs that are copies": (
        lambda: moefied(start="copies"),
        ("experts.up.weight_difference", "experts.down.weight_difference"),
        (images(),),
    ),
    "GCN": (
        lambda: conv_layer("gcn", "copies", "token_choice", 2),
        ("experts.lin.weight_difference",),
        (X, EDGES),
    ),
    "GAT": (
        lambda: conv_layer("gat", "shared", "token_choice", 1),
        ("experts.lin.weight",),
        (X, EDGES),
    ),
    "a model of GATs": (
        lambda: moved(gmoe.GNNMoE(WIDTH, 6, 2, 3, conv="gat", num_experts=EXPERTS).double()),
        ("experts.lin.weight_difference",),
        (X, EDGES),
    ),
}
"""Models, the parameters of their experts, and what they are called with."""


@pytest.mark.parametrize("case", CASES)
def test_adapters_start_equal_learn_alone_and_are_merged(case: str) -> None:
    build, parameters, inputs = CASES[case]
    model = build()
    expected = model(*inputs)
    before = copy.deepcopy(model.state_dict())
    lora = adapted(model, *parameters)
    assert_same(lora(*inputs), expected)

    # The second map starts at zero, so that the first learns from the second step on.
    draw_adapters(lora)
    out = lora(*inputs)
    assert not torch.allclose(out, expected)
    out.square().sum().backward()
    learned = {name for name, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    adapters = {name for name, _ in lora.named_parameters() if "lora" in name}
    assert learned == adapters
    assert len(adapters) >= 2 * len(parameters)

    merged = lora.merge_and_unload()
    assert_same(merged(*inputs), out)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed == {name for name in after if name.endswith(parameters)}
