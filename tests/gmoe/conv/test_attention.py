"""Experts of attention; they are compared with PyG's convs in ``test_experts.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe import MoEConv, Routing
from tests.helpers.masked import assert_equals_masked, features, random_graph

EDGES = random_graph(20, 20, 60)


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("conv", ["gat", "gatv2"])
def test_features_of_replaced_loops_may_be_anything(conv: str, start: Any) -> None:
    """Such as a direction, which is 0/0 on a loop: PyG removes it before it looks."""
    torch.manual_seed(0)
    edge_index = torch.tensor([[0, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
    direction = torch.randn(5, 2)
    direction[[2, 4]] = torch.tensor([[torch.nan, torch.inf], [torch.nan, torch.nan]])
    layer = MoEConv(conv, 4, 3, edge_dim=2, num_experts=2, start=start)
    x = torch.randn(3, 4, requires_grad=True)
    y = layer(x, edge_index, edge_attr=direction)
    y.square().sum().backward()
    assert y.isfinite().all()
    grads = [parameter.grad for parameter in [x, *layer.parameters()]]
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("hooked", ["lin_src", "lin_dst"])
def test_a_hook_on_either_end_runs_though_inputs_could_be_summed_first(hooked: str) -> None:
    torch.manual_seed(0)
    layer = MoEConv("gat", (3, 3), 8, add_self_loops=False, num_experts=2, start="plain").eval()
    x, edge_index = (torch.randn(6, 3), torch.randn(4, 3)), torch.tensor([[0, 5, 3], [1, 2, 3]])
    expected = layer(x, edge_index)
    called = []
    layer.experts.get_submodule(hooked).register_forward_hook(lambda *_: called.append(hooked))
    torch.testing.assert_close(layer(x, edge_index), expected)
    assert called


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("conv", ["gat", "gatv2"])
def test_loops_among_turned_edges_have_the_features_that_pyg_gives_them(conv: str) -> None:
    """PyG averages the features of in-edges over the second row, whatever the flow."""
    layer = MoEConv(
        conv, 4, 3, edge_dim=2, flow="target_to_source", num_experts=2, k=2, start="plain"
    )
    attr = features(20, 2)
    assert_equals_masked(layer.double(), features(7, 4), random_graph(7, 7, 20), edge_attr=attr)


ROADS = {
    "all experts on all nodes": (2**40, 2**20),
    "rows gathered at once": (0, 2**20),
    "rows gathered in blocks": (0, 30),
}
"""Of :data:`gmoe.routed.FEW_NUMBERS` and :data:`gmoe.products.NUMBERS`."""

LAYERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gat": ("gat", 1, {}),
    "gat, K=2": ("gat", 2, {"edge_dim": 2}),
    "gat, wide heads": ("gat", 1, {"out_channels": 16, "heads": 1}),
    "gat, of one expert": ("gat", 1, {"num_experts": 1}),
    "gat without loops": ("gat", 1, {"add_self_loops": False, "residual": True}),
    "gatv2": ("gatv2", 1, {"edge_dim": 2}),
    "gatv2, K=2": ("gatv2", 2, {"share_weights": True}),
    "transformer": ("transformer", 1, {"edge_dim": 2, "beta": True}),
    "transformer, K=2": ("transformer", 2, {"edge_dim": 2, "beta": True}),
}


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_road_gives_the_same(name: str, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients, and second gradients."""
    conv, k, options = LAYERS[name]
    layer = _layer(conv, start, k, **options)
    x, routing = features(20, 12).requires_grad_(), _routing(k, layer.num_experts)
    attr = features(60, 2) if "edge_dim" in options else None
    wanted = [x, *layer.experts.parameters()]
    found = []
    for few, numbers in ROADS.values():
        monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", few)
        monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
        y = layer(x, EDGES, edge_attr=attr, routing=routing)
        loss = (y * features(*y.shape, seed=9)).sum()
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        square = sum(grad.square().sum() for grad in grads)
        assert isinstance(square, torch.Tensor)
        second = torch.autograd.grad(square, wanted, allow_unused=True, materialize_grads=True)
        found.append([y, *grads, *second])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])


COMPILED = dict(zip(("gat", "gatv2", "transformer"), ROADS, strict=True))
"""A road of each conv that is compiled by default, so that all roads are."""


@pytest.mark.parametrize(
    ("conv", "road"),
    [
        pytest.param(conv, road, marks=[pytest.mark.slow] * (COMPILED[conv] != road))
        for conv in COMPILED
        for road in ROADS
    ],
)
def test_each_road_compiles(conv: str, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, numbers = ROADS[road]
    monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", few)
    monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
    layer = _layer(conv, "copies", 1)
    x = features(20, 12).requires_grad_()
    torch.compiler.reset()
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = run(x, EDGES, routing=_routing(1, 3))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.experts.parameters()])])
    torch.testing.assert_close(*found)


def _layer(conv: str, start: Any, k: int, **options: Any) -> MoEConv:
    """A layer whose experts differ and count."""
    options = {"out_channels": 4, "heads": 2, "num_experts": 3} | options
    layer = MoEConv(conv, 12, start=start, k=k, **options).double()
    for name, parameter in layer.named_parameters():
        if name.endswith(("_difference", "gain")):
            torch.nn.init.normal_(parameter)
    return layer


def _routing(k: int, num_experts: int) -> Routing:
    expert_TK = features(20, num_experts).topk(k).indices
    return Routing.from_choices(expert_TK, features(20, k), num_experts=num_experts)
