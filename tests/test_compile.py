"""``torch.compile`` takes a layer whole: forward and backward are one graph, and give what they give without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmoe import GNNMoE, Graph, MoEConv
from gmoe.routers import ROUTERS

WIDTH = 8
SIZES = (30, 37, 50, 64, 101, 33, 77)
EDGES_OF_A_NODE = 4

AGGREGATIONS = ("max", "min", "mul", "std", "var", "softmax", "powermean")

conv: Callable[..., nn.Module] = partial(MoEConv, in_channels=WIDTH, out_channels=WIDTH)
four: Callable[..., nn.Module] = partial(conv, num_experts=4)
gnn: Callable[..., nn.Module] = partial(GNNMoE, WIDTH, WIDTH, WIDTH, 3, num_experts=4)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GCN": partial(four, "gcn"),
    "GCN, edge weights": partial(four, "gcn"),
    "GCN, copies": partial(four, "gcn", start="copies", router_kwargs={"weight": "straight_through"}),
    "GCN, what neighbors are": partial(four, "gcn", router_input=("node", "neighbors", "degree")),
    "SAGE": partial(four, "sage"),
    "SAGE, normalized": partial(four, "sage", normalize=True),
    "GraphConv": partial(four, "graph"),
    "GIN": partial(four, "gin"),
    "GINE": partial(four, "gine"),
    "MLP": partial(four, "mlp"),
    "filters": partial(conv, ["identity", "low_pass", "high_pass", "two_hop"]),
    **{f"SAGE, {aggr}": partial(four, "sage", aggr=aggr) for aggr in AGGREGATIONS},
    "SAGE, max and mean": partial(four, "sage", aggr=["max", "mean"]),
    **{f"GCN, {router}": partial(four, "gcn", router=router) for router in ROUTERS},
    "GCN, capacity": partial(four, "gcn", router_kwargs={"capacity_factor": 1.0}),
    "GCN, votes of neighbors": partial(
        four,
        "gcn",
        router="attention_vote",
        router_kwargs={"scope": "neighbors"},
    ),
    "GAT": partial(four, "gat"),
    "GAT, narrow heads": partial(MoEConv, "gat", WIDTH, WIDTH // 2, num_experts=4, heads=2),
    "GAT, edge features": partial(four, "gat", edge_dim=WIDTH),
    "GATv2": partial(four, "gatv2"),
    "GATv2, edge features": partial(four, "gatv2", edge_dim=WIDTH),
    "Transformer": partial(four, "transformer"),
    "Transformer, edge features": partial(four, "transformer", edge_dim=WIDTH),
    "GNNMoE of GCN": gnn,
    "GNNMoE of GCN, one router": partial(gnn, shared_router=True),
    "GNNMoE of SAGE": partial(gnn, conv="sage"),
    "GNNMoE of GAT": partial(gnn, conv="gat"),
}
"""Layers that are one graph; in training, with a shared expert where nothing else is said."""


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def made(name: str) -> nn.Module:
    """The layer, with a gain that lets its experts be seen."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for module in layer.modules():
        if isinstance(module, MoEConv) and module.gain is not None:
            nn.init.ones_(module.gain)
    return layer


def inputs(name: str, nodes: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Nodes, edges, and what the layer takes beside them."""
    generator = torch.Generator().manual_seed(nodes)
    edges = EDGES_OF_A_NODE * nodes
    x = torch.randn(nodes, WIDTH, generator=generator)
    edge_index = torch.randint(nodes, (2, edges), generator=generator)
    of_edges: dict[str, Tensor] = {}
    if "edge weights" in name:
        of_edges["edge_weight"] = torch.rand(edges, generator=generator)
    if "edge features" in name or name == "GINE":
        of_edges["edge_attr"] = torch.randn(edges, WIDTH, generator=generator)
    return x, edge_index, of_edges


def trained(call: Any, layer: nn.Module, x: Tensor, edge_index: Any, of_edges: dict[str, Tensor]) -> list[Any]:
    """The output and all gradients of one step."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x, edge_index, **of_edges)
    (y.square().sum() + y.sum()).backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def assert_is_one_graph(name: str, backend: str, sizes: Sequence[int], near: float, prepared: bool = False) -> None:
    """Outputs and gradients are as near to eager ones, by the largest number of each tensor.

    Args:
        name: of the layer.
        backend: of the compiler.
        sizes: numbers of nodes, one step of each.
        near: the largest difference; 0 for equal bits.
        prepared: give a :class:`Graph` for the edges.
    """
    layer = made(name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for nodes in sizes:
        x, edge_index, of_edges = inputs(name, nodes)
        given = (Graph(edge_index, nodes), Graph(edge_index, nodes)) if prepared else (edge_index, edge_index)
        expected = trained(layer, layer, x, given[0], of_edges)
        found = trained(compiled, twin, x, given[1], of_edges)
        for ours, theirs in zip(found, expected, strict=True):
            scale = float(theirs.abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=near * scale)


@pytest.mark.parametrize("name", ["GCN", "SAGE", "GIN", "GAT", "GATv2", "Transformer"])
def test_a_layer_is_one_graph(name: str) -> None:
    assert_is_one_graph(name, "aot_eager", SIZES[:2], near=0)


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_one_graph_of_any_size(name: str, prepared: bool) -> None:
    assert_is_one_graph(name, "aot_eager", SIZES, near=0, prepared=prepared)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + 3  # compiled again three times at most


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_inductor_takes_every_layer_whole(name: str) -> None:
    import torch._inductor.config as inductor  # slow to import

    config: Any = inductor
    with config.patch(fallback_random=True):  # or noise would be drawn by kernels of its own
        assert_is_one_graph(name, "inductor", SIZES[:2], near=2e-5)


def test_a_graph_that_is_given_again_is_not_compiled_again() -> None:
    layer = made("GCN")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, edge_index, _ = inputs("GCN", 30)
    graph = Graph(edge_index, len(x))
    for _ in range(4):  # the second finds the transpose that the first left in the graph
        trained(compiled, layer, x, graph, {})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["x", "edge_weight"])
def test_compiled_sums_follow_what_was_changed_in_place(name: str) -> None:
    """Also those that the graph has kept from an eager call."""
    layer = made("GCN").eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, edge_index, given = inputs("GCN, edge weights", 30)
    graph = Graph(edge_index, len(x), x=x, edge_weight=given["edge_weight"])
    layer(x, graph)
    compiled(x, graph)
    (x if name == "x" else given["edge_weight"]).mul_(2)
    torch.testing.assert_close(compiled(x, graph), layer(x, edge_index, **given))


def test_edges_outside_the_nodes_are_refused_in_compiled_code() -> None:
    layer = made("GCN")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, edge_index, _ = inputs("GCN", 30)
    compiled(x, edge_index)
    edge_index[1, 7] = 30
    with pytest.raises(ValueError, match=r"edge_index: got nodes \d\.\.30, expected values in 0\.\.29"):
        compiled(x, edge_index)


def test_a_graph_that_compiled_code_saw_in_inference_mode_trains() -> None:
    layer = made("GCN").eval()
    x, edge_index, _ = inputs("GCN", 30)
    graph = Graph(edge_index, len(x))
    with torch.inference_mode():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, graph)
    found = trained(layer, layer, x, graph, {})
    torch.testing.assert_close(found, trained(layer, layer, x, edge_index, {}))
