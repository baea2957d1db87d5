"""Experts that are taken away: dead ones without a change, weak ones by their importance."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch_geometric.nn import GCNConv

import gmoe
from gmoe import MoEConv
from gmoe.layer_groups import groups_of
from gmoe.routers import TokenChoice
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import (
    BY_TOKEN,
    EDGES,
    EXPERTS,
    NODES,
    WIDTH,
    Mine,
    X,
    conv_layer,
    moefied,
    moved,
)
from tests.helpers.vits import images


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", BY_TOKEN)
@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
def test_without_dead_experts_a_vit_gives_the_same(start: Any, router: str, k: int) -> None:
    model = moefied(start=start, router=router, k=k, router_kwargs=BY_TOKEN[router])
    x = images(1)
    with torch.no_grad():  # a gate that leaves experts dead
        for layer in model.modules():
            if isinstance(layer, TokenChoice):
                layer.gate.weight[5:] = layer.gate.weight[0] * 0.1
    expected = model(x)
    pruned = gmoe.prune(model, x)
    assert any(len(report.kept) < EXPERTS for report in pruned.layers)
    assert_same(model(x), expected)
    gmoe.prune(model, x)  # nothing is left to remove
    assert_same(model(x), expected)


def test_a_fraction_keeps_the_most_important_of_all_layers() -> None:
    model = moefied()
    x = images(4)
    pruned = gmoe.prune(copy.deepcopy(model), x, keep=0.5)
    numbers = [len(layer.kept) for layer in pruned.layers]
    assert sum(numbers) == EXPERTS  # half of two layers'
    weakest = min(layer.importance[e] for layer in pruned.layers for e in layer.kept[1:] or [0])
    for layer in pruned.layers:
        assert sum(layer.importance) == pytest.approx(1)
        best = max(range(EXPERTS), key=lambda expert: layer.importance[expert])
        assert best in layer.kept
        others = [layer.importance[e] for e in range(EXPERTS) if e not in layer.kept]
        if sum(numbers) == EXPERTS:
            assert max(others) <= max(weakest, min(layer.importance[e] for e in layer.kept))
    assert 0 < pruned.change < 1
    assert "relative change" in str(pruned)


def test_importance_is_load_times_mean_score() -> None:
    layer = conv_layer("gcn", "plain", "token_choice", 2)
    _, routing = layer(X, EDGES, return_routing=True)
    (report,) = gmoe.prune(layer, [(X, EDGES), (X, EDGES)], keep=1.0).layers
    mean_E = torch.stack(
        [routing.scores[routing.token[routing.expert == e], e].mean() for e in range(EXPERTS)]
    )
    product_E = (routing.load * mean_E).nan_to_num()
    found = torch.tensor([report.importance, report.load], dtype=torch.float64)
    load_E = routing.load.double()
    assert_same(found, torch.stack([product_E / product_E.sum(), load_E / load_E.sum()]))


def test_a_number_for_each_layer() -> None:
    model = moefied()
    pruned = gmoe.prune(model, images(8), keep=[2, 3])
    assert [len(layer.kept) for layer in pruned.layers] == [2, 3]
    pruned = gmoe.prune(model, images(8), keep=1)
    assert [len(layer.kept) for layer in pruned.layers] == [1, 1]


@pytest.mark.parametrize(("keep", "same"), [(np.int64(1), 1), (np.float32(0.5), 0.5)])
def test_numbers_of_numpy_are_taken_and_data_is_read_once(keep: Any, same: Any) -> None:
    found = gmoe.prune(moefied(), iter([images(8)]), keep=keep)
    expected = gmoe.prune(moefied(), images(8), keep=same)
    assert str(found) == str(expected)


@pytest.mark.parametrize("keep", [0, 9, 0.0, 1.5, 0.05, [2], [2, 0], True, "all", math.nan])
def test_a_keep_out_of_range_is_refused_and_changes_nothing(keep: Any) -> None:
    model = moefied()
    expected = model(images())
    with pytest.raises((ValueError, TypeError), match="keep"):
        gmoe.prune(model, images(), keep=keep)
    assert_same(model(images()), expected)


def test_a_shared_router_and_its_layers_shrink_together() -> None:
    torch.manual_seed(0)
    model = moved(gmoe.GNNMoE(WIDTH, 6, 3, 3, conv="sage", num_experts=EXPERTS).double())
    assert model.shared_router is not None
    expected = model(X, EDGES)
    pruned = gmoe.prune(model, (X, EDGES))
    (report,) = pruned.layers
    assert report.names == ("convs.0", "convs.1")
    assert {conv.num_experts for conv in model.convs[:2]} == {len(report.kept)}
    assert model.shared_router.num_experts == len(report.kept) < EXPERTS
    assert_same(model(X, EDGES), expected)
    model.train()(X, EDGES).square().sum().backward()


def test_statistics_know_those_that_are_left() -> None:
    model = moefied()
    gmoe.prune(model, images(8), keep=[2, 3])
    stats = gmoe.RoutingStats.of(model)
    with gmoe.record_routing(model) as routings:
        model(images(8))
    stats.update(routings)
    figures = stats.compute()
    assert [len(figure["load"]) for figure in figures] == [2, 3]
    assert all(float(figure["load"].sum()) == pytest.approx(1) for figure in figures)
    assert all(routing.scores.size(1) == routing.num_experts for routing in routings)


def test_balance_goes_on_after_pruning() -> None:
    """The bias of kept experts, and steps of training that move it."""
    torch.manual_seed(0)
    layer: Any = MoEConv(GCNConv, WIDTH, WIDTH, num_experts=EXPERTS).double()
    for _ in range(3):
        layer(X, EDGES)
    router: Any = layer.router
    bias_E = router.next_bias_E.clone()
    gmoe.prune(layer, (X, EDGES), keep=3)
    kept = layer.kept
    assert kept is not None
    assert torch.equal(router.next_bias_E, bias_E[list(kept)])
    layer.train()
    for _ in range(3):
        layer(X, EDGES).square().sum().backward()
    assert router.next_bias_E.isfinite().all()


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    slots = gmoe.SoftMoE(gmoe.SoftSlots(WIDTH, num_experts=EXPERTS), experts)
    mine = gmoe.MoE(Mine(WIDTH, num_experts=EXPERTS), experts)
    bound = moefied()
    parametrizations.weight_norm(bound.blocks[1].mlp.experts.down)
    without = MoEConv("gcn", WIDTH, WIDTH, router=None)
    assigned = gmoe.OracleRouter(WIDTH, num_experts=EXPERTS, assignment=torch.arange(NODES))
    oracle = gmoe.MoE(assigned, gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS))
    with pytest.raises(ValueError, match="SoftSlots, of which no expert"):
        groups_of(slots)[0].keep((0, 1))
    with pytest.raises(ValueError, match="Mine, of which no expert"):
        gmoe.prune(mine, X.float())
    with pytest.raises(ValueError, match="parametrized"):
        gmoe.prune(bound, images(1), keep=2)
    with pytest.raises(ValueError, match="MoEConv without one router"):
        gmoe.prune(without, (X.float(), EDGES))
    with pytest.raises(ValueError, match=r"^keep: got experts to remove to which the oracle"):
        gmoe.prune(oracle, X.float(), keep=2)
    with pytest.raises(ValueError, match=r"^model: got Linear without layers"):
        gmoe.prune(nn.Linear(2, 2), torch.zeros(1, 2))
    for layer in (slots, mine, oracle):
        assert len(layer.experts.up.weight) == EXPERTS


class TwoLayers(nn.Module):
    """A model of which the data reach one layer of experts alone, or both."""

    def __init__(self, calls_both: bool) -> None:
        super().__init__()
        self.calls_both = calls_both
        self.first, self.second = (
            gmoe.MoE(TokenChoice(8, num_experts=4), gmoe.MLPExperts(8, 16, 8, num_experts=4))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Any:
        y: Any = self.first(x)
        return self.second(y) if self.calls_both else y


def test_a_model_that_was_compiled_and_run_is_pruned_by_its_routing() -> None:
    """Compiled code does not call the hooks that count."""
    torch.manual_seed(0)
    model, x = TwoLayers(calls_both=True).eval(), torch.randn(200, 8)
    expected = gmoe.prune(copy.deepcopy(model), x)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert gmoe.prune(model, x).layers == expected.layers
    assert all(sum(layer.load) == pytest.approx(1) for layer in expected.layers)


def test_data_that_do_not_reach_a_layer_are_refused() -> None:
    model = TwoLayers(calls_both=False)
    with pytest.raises(ValueError, match=r"^data: got some on which the router of second does not"):
        gmoe.prune(model, torch.randn(9, 8))
    assert [layer.num_experts for layer in (model.first, model.second)] == [4, 4]


class Processes:
    """As a group of processes, it cannot be copied."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a group of processes")


def test_a_router_with_its_own_processes_is_pruned() -> None:
    torch.manual_seed(0)
    router, experts = TokenChoice(8, num_experts=4), gmoe.MLPExperts(8, 16, 8, num_experts=4)
    layer = gmoe.MoE(router, experts).eval()
    router.process_group = Processes()  # type: ignore[assignment]
    x = torch.randn(50, 8)
    expected = layer(x)
    gmoe.prune(layer, x, keep=4)
    assert_same(layer(x), expected)
    gmoe.prune(layer, x, keep=2)
    assert layer.num_experts == 2
    assert isinstance(layer.router.process_group, Processes)


def test_a_layer_of_open_widths_is_pruned_after_its_first_call() -> None:
    layer = MoEConv("gcn", -1, 4, num_experts=3)
    with pytest.raises(ValueError, match=r"whose widths are open: call it once before"):
        gmoe.prune(layer, (X, torch.zeros(2, 0, dtype=torch.int64)))
