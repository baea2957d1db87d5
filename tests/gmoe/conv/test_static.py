"""Features of shape (B, N, D): B graphs side by side, as PyG's static graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from gmoe import GNNMoE, Graph, MoEConv
from tests.helpers.conv_cases import EDGE_DIM, NODES, WIDTH, graph
from tests.helpers.masked import features

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs on the whole graph"),
    pytest.mark.filterwarnings("ignore:.*this call fills in the width"),
]

GRAPHS = 3
KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gcn": ("gcn", {}, "edge_weight"),
    "sage": ("sage", {}, ""),
    "graph": ("graph", {}, "edge_weight"),
    "gin": ("gin", {}, ""),
    "gine": ("gine", {"edge_dim": EDGE_DIM}, "edge_attr"),
    "gat": ("gat", {"heads": 2, "edge_dim": EDGE_DIM}, "edge_attr"),
    "gatv2": ("gatv2", {}, ""),
    "transformer": ("transformer", {"edge_dim": EDGE_DIM}, "edge_attr"),
    "local convs one by one": ("le", {}, "edge_weight"),
    "others one by one": ("cheb", {"K": 2}, "edge_weight"),
    "several kinds": (["gcn", "le", "sage"], {}, ""),
}
GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "edge_index": lambda edges: edges,
    "Graph": lambda edges: Graph(edges, NODES),
    "EdgeIndex": lambda edges: EdgeIndex(edges, sparse_size=(NODES, NODES)),
}


def _layer(conv: Any, **options: Any) -> Any:
    """A layer whose tokens compete, so that a group that is too large shows."""
    torch.manual_seed(0)
    experts = 3 if isinstance(conv, list) else 4
    layer = MoEConv(conv, WIDTH, 6, num_experts=experts, router="expert_choice", **options)
    torch.nn.init.ones_(layer.gain)
    return layer.double().eval()


def _edge_arg(name: str, edges: Tensor) -> dict[str, Tensor]:
    shape = {"edge_weight": (edges.size(1),), "edge_attr": (edges.size(1), EDGE_DIM)}
    return {name: features(*shape[name]).abs()} if name else {}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", KINDS)
def test_graphs_side_by_side_give_what_each_gives_alone(name: str, given: str) -> None:
    conv, options, edge_arg = KINDS[name]
    layer = _layer(conv, **options)
    edges = graph()[1]
    kwargs = _edge_arg(edge_arg, edges)
    x = features(GRAPHS, NODES, WIDTH).requires_grad_()
    found, routing = layer(x, GIVEN[given](edges), **kwargs, return_routing=True)
    alone = torch.stack([layer(one, edges, **kwargs) for one in x])
    torch.testing.assert_close(found, alone)
    assert routing.num_tokens == GRAPHS * NODES
    (theirs,) = torch.autograd.grad(alone.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], theirs)


def test_edge_arguments_may_come_by_position_and_in_the_graph() -> None:
    layer, edges = _layer("gcn"), graph()[1]
    weight = _edge_arg("edge_weight", edges)["edge_weight"]
    x = features(GRAPHS, NODES, WIDTH)
    expected = layer(x, edges, edge_weight=weight)
    torch.testing.assert_close(layer(x, edges, weight), expected)
    torch.testing.assert_close(layer(x, Graph(edges, NODES, edge_weight=weight)), expected)


def test_other_flows_and_open_widths_go() -> None:
    edges = graph()[1]
    x = features(GRAPHS, NODES, WIDTH)
    layer = _layer("sage", flow="target_to_source")
    torch.testing.assert_close(layer(x, edges)[1], layer(x[1], edges))
    lazy = MoEConv("sage", -1, 6, num_experts=2).double()
    assert lazy(x, edges).shape == (GRAPHS, NODES, 6)
    assert lazy.in_channels == WIDTH


def test_matrices_and_groups_are_refused() -> None:
    layer, edges = _layer("gcn"), graph()[1]
    x = features(GRAPHS, NODES, WIDTH)
    matrix = torch.eye(NODES, dtype=torch.float64).to_sparse_csr()
    for given in (matrix, Graph(matrix, NODES)):
        with pytest.raises(ValueError, match="edge_index: got a Tensor with x of shape"):
            layer(x, given)
    with pytest.raises(ValueError, match="batch: got a Tensor with x of shape"):
        layer(x, edges, batch=torch.zeros(NODES, dtype=torch.long))
    with pytest.raises(ValueError, match="edge_index: got"):
        layer(x, edges + NODES)


def test_an_argument_of_the_conv_that_is_none_is_as_good_as_nothing() -> None:
    x, edges = graph()
    layer = MoEConv("cheb", WIDTH, 6, num_experts=2, K=2).eval()
    torch.testing.assert_close(layer(x, edges, None, lambda_max=None), layer(x, edges))
    with pytest.raises(ValueError, match=r"lambda_max: got 2\.0, .* since ChebConv takes it"):
        layer(x, edges, lambda_max=2.0)
    with pytest.raises(ValueError, match="lambda_maximum: got None"):
        layer(x, edges, lambda_maximum=None)


def test_a_whole_model_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"x: got .*, expected shape \(nodes, features\)"):
        GNNMoE(WIDTH, 8, 3, num_experts=2)(torch.ones(2, NODES, WIDTH), graph()[1])
