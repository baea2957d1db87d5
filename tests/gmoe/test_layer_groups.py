"""The layers that one router serves are found together, and lose their experts together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gmoe
from gmoe.layer_groups import groups_of, named
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import EDGES, EXPERTS, WIDTH, X


def token_layer(router: gmoe.Router | None = None) -> gmoe.MoE:
    if router is None:
        router = gmoe.TokenChoice(WIDTH, num_experts=EXPERTS)
    return gmoe.MoE(router, gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)).double()


def test_layers_of_one_router_are_one_group_and_a_layer_in_two_places_has_two_names() -> None:
    router = gmoe.TokenChoice(WIDTH, num_experts=EXPERTS)
    first, second, other = token_layer(router), token_layer(router), token_layer()
    groups = groups_of(nn.Sequential(first, other, nn.ReLU(), second, other))
    assert [list(group.layers) for group in groups] == [["0", "3"], ["1", "4"]]
    assert [group.router for group in groups] == [router, other.router]
    assert groups[1].layers["1"] is groups[1].layers["4"]


def test_the_shared_router_of_a_gnn_serves_all_its_layers_and_shrinks_with_them() -> None:
    torch.manual_seed(0)
    model = gmoe.GNNMoE(WIDTH, 6, 2, 3, num_experts=EXPERTS, conv="gcn").double().eval()
    (group,) = groups_of(model)
    assert group.owner is model
    assert group.router is model.shared_router
    assert len(group.layers) == 2
    group.keep((1, 4, 6))
    assert group.router is not None
    assert group.router.num_experts == group.num_experts == 3
    logits, (routing,) = model(X, EDGES, return_routing=True)
    assert routing.num_experts == 3
    assert logits.shape == (len(X), 2)


@pytest.mark.parametrize("kept", [(), (1, 1), (3, 2), (0, EXPERTS), (-1,)])
def test_experts_that_are_not_there_are_refused_before_anything_changes(kept: Any) -> None:
    layer = token_layer().eval()
    expected = layer(X)
    (group,) = groups_of(layer)
    with pytest.raises(ValueError, match=r"^kept: got \[.*\], expected some of 0 to 7, ascending"):
        group.keep(kept)
    assert_same(layer(X), expected)


def test_a_part_that_cannot_be_shrunk_leaves_the_whole_group_as_it_was() -> None:
    torch.manual_seed(0)
    layer = token_layer().eval()
    nn.utils.parametrize.register_parametrization(layer.experts.down, "weight", nn.Identity())
    before = copy.deepcopy(layer.state_dict())
    (group,) = groups_of(layer)
    with pytest.raises(ValueError, match=r"^model: got .* with a parametrized weight"):
        group.keep((0, 1))
    assert layer.num_experts == layer.router.num_experts == EXPERTS
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_names_are_listed_and_the_model_itself_has_none() -> None:
    assert named(["blocks.1.mlp", ""]) == "blocks.1.mlp, the model itself"
