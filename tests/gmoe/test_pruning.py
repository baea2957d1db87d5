"""Experts that nobody chose are taken away, and the model gives the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gmoe
from gmoe import MoEConv
from gmoe.moe import MoELayer
from gmoe.pruning import groups_of, named
from gmoe.routers import TokenChoice
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import (
    EDGES,
    EXPERTS,
    WIDTH,
    Mine,
    X,
    moefied,
    pruned_on,
    routings_of,
)
from tests.helpers.vits import images


def token_layer(router: Any = None, num_experts: int = EXPERTS) -> gmoe.MoE:
    if router is None:
        router = TokenChoice(WIDTH, num_experts=num_experts)
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=num_experts)
    return gmoe.MoE(router, experts).double().eval()


def chosen_in(*routings: gmoe.Routing) -> tuple[int, ...]:
    """The experts that some token has."""
    return tuple(sorted({expert for one in routings for expert in one.expert.tolist()}))


def test_a_router_that_needs_more_experts_keeps_the_first_of_the_others() -> None:
    layer = token_layer(gmoe.ExpertChoice(WIDTH, num_experts=EXPERTS, k=3))
    only = torch.full((2, 1), 5), torch.ones(2, 1)
    routing = gmoe.Routing.from_choices(*only, num_experts=EXPERTS)
    assert gmoe.prune(layer, routing) == {"": (0, 1, 5)}


# layers that share a router -----------------------------------------------------------------------


def test_layers_of_one_router_shrink_together_by_all_of_its_calls() -> None:
    router = TokenChoice(WIDTH, num_experts=EXPERTS)
    first, second, other = token_layer(router), token_layer(router), token_layer()
    model = nn.Sequential(first, other, second)
    groups = groups_of(model)
    assert [[*group.layers] for group in groups] == [["0", "2"], ["1"]]
    assert [group.calls for group in groups] == [[0, 2], [1]]
    expected, routings = model(X), routings_of(model, X)
    kept = gmoe.prune(model, routings)
    assert kept["0"] == kept["2"] == chosen_in(routings[0], routings[2])
    assert first.kept == second.kept == kept["0"]
    assert_same(model(X), expected)


def test_one_layer_of_several_under_a_router_is_refused() -> None:
    router = TokenChoice(WIDTH, num_experts=EXPERTS)
    first, second = token_layer(router), token_layer(router)
    first.keep((0, 1))
    with pytest.raises(ValueError, match=r"^router: got one of 2 experts, expected the layer's 8"):
        second.keep((0, 1))
    assert second.num_experts == EXPERTS


# afterwards ---------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, MoELayer)]


def test_balance_goes_on_after_pruning() -> None:
    """The bias of kept experts, and steps of training that move it."""
    torch.manual_seed(0)
    layer: Any = MoEConv("gcn", WIDTH, WIDTH, num_experts=EXPERTS).double()
    for _ in range(3):
        layer(X, EDGES)
    router: Any = layer.router
    bias_E = router.next_bias_E.clone()
    layer.keep((0, 4, 7))
    assert torch.equal(router.next_bias_E, bias_E[[0, 4, 7]])
    layer.train()
    for _ in range(3):
        layer(X, EDGES).square().sum().backward()
    assert router.next_bias_E.isfinite().all()


# refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS).double()
    slots = gmoe.SoftMoE(gmoe.SoftSlots(WIDTH, num_experts=EXPERTS), experts).double()
    mine = gmoe.MoE(Mine(WIDTH, num_experts=EXPERTS), experts)
    bound = moefied()
    parametrizations.weight_norm(bound.blocks[1].mlp.experts.down)
    unstacked = gmoe.unstack(moefied(start="plain"))
    without = MoEConv("gcn", WIDTH, WIDTH, router=None)
    for model, inputs, said in (
        (slots, (X,), "SoftSlots, of which no expert"),
        (mine, (X,), "Mine, of which no expert"),
        (bound, (images(1),), "parametrized"),
        (unstacked, (images(1),), "experts with a Linear in place of a part"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rf"^model: got .*{said}"):
            pruned_on(model, *inputs)
        with pytest.raises(ValueError, match=rf"^model: got .*{said}"):
            layers_of(model)[-1].keep((*range(EXPERTS),))
        assert {layer.num_experts for layer in layers_of(model)} == {EXPERTS}
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    routing = gmoe.Routing.to_all(torch.ones(2, 8))
    with pytest.raises(ValueError, match="a MoEConv without one router"):
        gmoe.prune(without, routing)
    with pytest.raises(ValueError, match=r"^model: got Linear without layers"):
        gmoe.prune(nn.Linear(2, 2), routing)
    with pytest.raises(ValueError, match=r"^model: got 1, whose experts are those of a layer"):
        gmoe.prune(nn.Sequential(gmoe.MoE(token_layer().router, experts), mine), routing)


def test_routings_that_are_not_the_models_are_refused_and_nothing_changes() -> None:
    layer = token_layer()
    model = nn.Sequential(layer, token_layer())
    one, two = routings_of(model, X)
    other = gmoe.Routing.to_all(torch.ones(2, 3))
    for routings, said in (
        ([], "none"),
        ([[]], "0 of a forward pass"),
        ([one], "1 of a forward pass, expected 2"),
        ([one, two, one, two], "4 of a forward pass, expected 2"),
        ([[one, two], [one]], "1 of a forward pass, expected 2"),
        ([one, other], r"Routing\(2 tokens, 3 experts, load .* for 1, expected one of 8 experts"),
        ([one, X], "Tensor, expected a Routing"),
        ({"0": one, "1": two}, "a dictionary"),
        (X, "Tensor, expected"),
    ):
        with pytest.raises(ValueError, match=rf"^routings: got {said}"):
            gmoe.prune(model, routings)  # type: ignore[arg-type]
    assert {part.num_experts for part in layers_of(model)} == {EXPERTS}


def test_data_of_which_a_layer_saw_nothing_are_refused() -> None:
    model = nn.Sequential(token_layer(), token_layer())
    routings = routings_of(model, X[:0])
    with pytest.raises(ValueError, match=r"^routings: got some in which no expert of 0 was chosen"):
        gmoe.prune(model, routings)
    assert {part.num_experts for part in layers_of(model)} == {EXPERTS}


def test_a_layer_of_open_widths_is_pruned_after_its_first_call() -> None:
    layer = MoEConv("gcn", -1, 4, num_experts=3)
    with pytest.raises(ValueError, match=r"^model: got .*, whose widths are open, expected"):
        gmoe.prune(layer, gmoe.Routing.to_all(torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"^model: got .*, whose widths are open, expected"):
        layer.keep((0, 1))


def test_names_are_listed_and_the_model_itself_has_none() -> None:
    assert named(["blocks.1.mlp", ""]) == "blocks.1.mlp, the model itself"
