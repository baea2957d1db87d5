"""The one aggregation that experts share is that of the conv itself.

Experts are compared with PyG's convs in ``test_experts.py``, and composed in ``tests/compose``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmoe import Graph, MoEConv, Routing
from gmoe.conv import aggregate
from gmoe.conv.matrix import Matrix
from tests.helpers.masked import features, random_graph

NODES, EDGES, WIDTH, OUT = 7, 20, 4, 3


@pytest.mark.parametrize("conv", ["sage", "gin", "graph"])
def test_an_aggregation_of_pygs_runs_on_the_meta_device_and_under_autocast(conv: str) -> None:
    with torch.device("meta"):
        layer = MoEConv(conv, WIDTH, OUT, num_experts=2, aggr="max")
        out = layer(torch.empty(NODES, WIDTH), torch.empty(2, EDGES, dtype=torch.int64))
    assert out.shape == (NODES, OUT)
    torch.manual_seed(0)
    layer = MoEConv(conv, WIDTH, OUT, num_experts=2, aggr="max").eval()
    x, edge_index = features(NODES, WIDTH).float(), random_graph(NODES, NODES, EDGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x, edge_index)
    torch.testing.assert_close(low.float(), layer(x, edge_index), rtol=0.1, atol=0.1)


WEIGHTED = {"edge_weight": torch.rand(EDGES, dtype=torch.float64)}
ROOTLESS = {"root_weight": False}
SUMS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "gcn": ("gcn", {}, {}, True),
    "gcn, weighted": ("gcn", {}, WEIGHTED, True),
    "gcn, improved, weighted": ("gcn", {"improved": True}, WEIGHTED, True),
    "gcn without loops": ("gcn", {"add_self_loops": False}, {}, True),
    "gcn without norms": ("gcn", {"normalize": False}, WEIGHTED, True),
    "gcn without a bias": ("gcn", {"bias": False}, {}, True),
    "gcn, target to source": ("gcn", {"flow": "target_to_source"}, {}, True),
    "gin": ("gin", {"eps": 0.5}, {}, True),
    "gin that learns eps": ("gin", {"train_eps": True}, {}, False),
    "gin of means": ("gin", {"aggr": "mean"}, {}, False),
    "gin of the largest": ("gin", {"aggr": "max"}, {}, False),
    "sage": ("sage", {}, {}, False),  # its roots move anyway
    "sage without roots": ("sage", ROOTLESS, {}, True),
    "sage without roots, normalized": ("sage", {**ROOTLESS, "normalize": True}, {}, True),
    "sage that adds": ("sage", {**ROOTLESS, "aggr": "sum"}, {}, True),
}
"""Convs, their options, arguments of a call, and whether they may sum in the order of the pairs."""


def to_one_each(num_experts: int = 4) -> tuple[Routing, Tensor]:
    """One of the first three experts for each node, and the weights."""
    weight = torch.rand(NODES, 1, dtype=torch.float64, requires_grad=True)
    chosen = torch.arange(NODES)[:, None] % 3
    return Routing.from_choices(chosen, weight, num_experts=num_experts), weight


def are_in_order_of_pairs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each sum from here on, whether it is in the order of the pairs."""
    found: list[bool] = []

    class Noted(Matrix):
        times_before = Matrix.times

        def times(self, x: Tensor, order: Tensor | None = None) -> Tensor:
            found.append(order is not None)
            return Noted.times_before(self, x, order)

    monkeypatch.setattr(Matrix, "times", Noted.times)
    return found


@pytest.mark.parametrize("num_edges", [EDGES, 0])
@pytest.mark.parametrize("name", SUMS)
def test_sums_in_the_order_of_the_pairs_are_those_of_the_tokens(
    name: str, num_edges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, and gradients of those, too; with an expert without nodes, and given loops."""
    conv, conv_options, given, may = SUMS[name]
    torch.manual_seed(0)
    layer = MoEConv(conv, WIDTH, OUT, num_experts=4, start="copies", **conv_options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = features(NODES, WIDTH)
    edge_index = random_graph(NODES, NODES, EDGES)[:, :num_edges]
    edge_index[:, : num_edges // 5] = edge_index[:1, : num_edges // 5]
    given = {key: value[:num_edges].clone().requires_grad_() for key, value in given.items()}
    routing, weight = to_one_each()
    leaves = [weight, *given.values(), *layer.experts.parameters()]
    in_order = are_in_order_of_pairs(monkeypatch)
    found = []
    for most in (2**30, 0):
        monkeypatch.setattr(aggregate, "NUMBERS", most)
        y = layer(x, edge_index, routing=routing, **given)
        # Without an edge, nothing follows from the weights of edges.
        options: Any = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True, **options)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        found.append([y, *grads, *torch.autograd.grad(penalty, leaves, **options)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    assert any(in_order) == may


@pytest.mark.parametrize("conv", ["gcn", "gin"])
def test_sums_are_in_the_order_of_the_pairs_only_where_that_is_less(
    conv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregate, "NUMBERS", 0)
    in_order = are_in_order_of_pairs(monkeypatch)
    copies, shared = (
        MoEConv(conv, WIDTH, OUT, num_experts=4, start=start).double()
        for start in ("copies", "shared")
    )
    x, edge_index = features(NODES, WIDTH), random_graph(NODES, NODES, EDGES)
    one_each, _ = to_one_each()
    all_experts = Routing.to_all(torch.ones(NODES, 4, dtype=torch.float64))
    copies(x, edge_index, routing=one_each)
    copies(x, Graph(edge_index, NODES), routing=one_each)
    assert in_order == [True, True]
    in_order.clear()
    copies(x, edge_index)  # the router sees the sum
    copies(x, edge_index, routing=all_experts)
    copies(x.clone().requires_grad_(), edge_index, routing=one_each)
    copies(x, Graph(edge_index, NODES, x=x), routing=one_each)
    shared(x, edge_index, routing=one_each)
    assert in_order == [False] * 5


def test_compiled_and_exported_sums_are_those_of_eager_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"num_experts": 4, "start": "copies", "router": None}
            self.gcn = MoEConv("gcn", WIDTH, WIDTH, **options)
            self.gin = MoEConv("gin", WIDTH, OUT, **options)

        def forward(self, x: Tensor, edge_index: Tensor, chosen: Tensor) -> Tensor:
            routing = Routing.from_choices(
                chosen, torch.ones_like(chosen, dtype=x.dtype), num_experts=4, validate=False
            )
            y = self.gin(x, edge_index, routing=routing)
            return y + self.gcn(x, edge_index, routing=routing)[:, :OUT]

    torch.manual_seed(0)
    model = Routed().double().requires_grad_(False)
    chosen = torch.arange(NODES)[:, None] % 3
    inputs = (features(NODES, WIDTH), random_graph(NODES, NODES, EDGES), chosen)
    expected = model(*inputs)
    monkeypatch.setattr(aggregate, "NUMBERS", 0)
    torch.testing.assert_close(model(*inputs), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
    nodes, edges = {0: torch.export.Dim("nodes")}, {1: torch.export.Dim("edges")}
    program = torch.export.export(model, inputs, dynamic_shapes=(nodes, edges, nodes))
    torch.testing.assert_close(program.module()(*inputs), expected)
