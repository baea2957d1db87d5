"""The attention weights of routed experts are those that PyG's convs return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_geometric.explain.algorithm.utils import set_masks

from gmoe import Graph, MoEConv
from tests.helpers.masked import (
    GRAPHS,
    csr,
    features,
    routing_of,
    simple_graph,
    weights,
)

NODES, EDGES = GRAPHS["mixed"]
WIDTH, EXPERTS = 4, 3

CONVS: list[tuple[str, dict[str, Any]]] = [
    ("gat", {"heads": 2}),
    ("gat", {"heads": 2, "add_self_loops": False}),
    ("gat", {"heads": 2, "edge_dim": 3, "fill_value": "max", "concat": False}),
    ("gat", {"flow": "target_to_source"}),
    ("gatv2", {"heads": 2}),
    ("gatv2", {"edge_dim": 3, "residual": True}),
    ("gatv2", {"heads": 2, "add_self_loops": False}),
    ("transformer", {"heads": 2}),
    ("transformer", {"heads": 2, "edge_dim": 3, "beta": True}),
]


def layer(conv: str, in_channels: Any = WIDTH, start: Any = "copies", **options: Any) -> MoEConv:
    torch.manual_seed(0)
    made = MoEConv(conv, in_channels, 5, num_experts=EXPERTS, start=start, **options)
    return made.double()


def ids(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def given(options: dict[str, Any], edge_index: Tensor = EDGES) -> dict[str, Tensor]:
    """The edge features that a conv of these options takes."""
    return {"edge_attr": features(edge_index.size(1), 3, seed=2)} if "edge_dim" in options else {}


@pytest.mark.parametrize(("conv", "options"), CONVS, ids=ids)
def test_equal_experts_have_the_edges_weights_and_gradients_of_pygs_conv(
    conv: str, options: dict[str, Any]
) -> None:
    moe, edge_args = layer(conv, **options), given(options)
    outcomes = []
    for called in (moe, moe.expert(0)):
        x = features(NODES, WIDTH).requires_grad_()
        out, (edge_index, alpha) = called(x, EDGES, return_attention_weights=True, **edge_args)
        (grad,) = torch.autograd.grad((alpha * features(*alpha.shape, seed=7)).sum(), x)
        outcomes.append((out, edge_index, alpha, grad))
    assert_close(*outcomes, rtol=0, atol=1e-12)


def test_matrices_are_refused() -> None:
    matrix = csr(simple_graph(NODES, NODES), (NODES, NODES))
    with pytest.raises(ValueError, match=r"^edge_index: got a sparse matrix with return_attention"):
        layer("gat")(features(NODES, WIDTH), matrix, return_attention_weights=True)


@pytest.mark.parametrize("start", ["plain", "shared"])
@pytest.mark.parametrize(("conv", "options"), CONVS, ids=ids)
def test_each_edge_has_the_weights_of_the_experts_that_its_destination_used(
    conv: str, options: dict[str, Any], start: Any
) -> None:
    """Some nodes use two experts, some none; an expert that an edge does not use has zeros."""
    moe, x, edge_args = layer(conv, start=start, **options), features(NODES, WIDTH), given(options)
    weight_TE = weights(NODES)
    _, (edge_index, alpha) = moe(
        x, EDGES, routing=routing_of(weight_TE), return_attention_weights=True, **edge_args
    )
    destination = edge_index[int(options.get("flow") != "target_to_source")]
    for expert in range(EXPERTS):
        _, (edges, plain) = moe.expert(expert)(x, EDGES, return_attention_weights=True, **edge_args)
        assert torch.equal(edge_index, edges)
        is_used = weight_TE[destination, expert] != 0
        assert_close(alpha[:, expert], plain * is_used[:, None], rtol=0, atol=1e-12)


def test_with_one_expert_for_each_node_there_is_one_row_for_each_edge() -> None:
    x, graph = features(NODES, WIDTH), Graph(EDGES, NODES)
    for k, shape in ((1, (EDGES.size(1), 2)), (2, (EDGES.size(1), EXPERTS, 2))):
        moe = layer("transformer", start="plain", heads=2, k=k)
        out, (edge_index, alpha), routing = moe(
            x, graph, return_attention_weights=True, return_routing=True
        )
        assert alpha.shape == shape
        assert torch.equal(edge_index, EDGES)
        assert torch.equal(out, moe(x, graph, routing=routing))


def test_weights_are_asked_for_by_position_as_of_pygs_conv() -> None:
    moe, x = layer("gat"), features(NODES, WIDTH)
    found = moe(x, EDGES, None, None, True)
    assert_close(found, moe(x, EDGES, return_attention_weights=True))
    assert_close(moe(x, EDGES, return_attention_weights=False), found[0])


@pytest.mark.parametrize(("conv", "are_dropped"), [("gat", True), ("transformer", False)])
def test_dropout_shows_where_pyg_shows_it(conv: str, are_dropped: bool) -> None:
    """TransformerConv returns the weights before dropout."""
    moe = layer(conv, dropout=0.99, heads=8)
    _, (_, alpha) = moe(features(NODES, WIDTH), EDGES, return_attention_weights=True)
    assert bool((alpha == 0).any()) == are_dropped


def test_weights_are_those_without_an_explainers_mask() -> None:
    moe, x = layer("gat").eval(), features(NODES, WIDTH)
    out, before = moe(x, EDGES, return_attention_weights=True)
    set_masks(moe, features(EDGES.size(1), seed=9), EDGES)
    explained, found = moe(x, EDGES, return_attention_weights=True)
    assert not torch.allclose(explained, out)
    assert_close(found, before)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
def test_experts_without_weights_by_edge_are_refused_by_name() -> None:
    for conv, message in (
        ("gcn", "GCNConv"),
        (["gat", "gatv2"], "GATConv, GATv2Conv, which run as MixedExperts"),
    ):
        moe = MoEConv(conv, WIDTH, 5, num_experts=2)
        x = features(NODES, WIDTH).float()
        with pytest.raises(ValueError, match=f"^return_attention_weights: got True .*{message}"):
            moe(x, EDGES, return_attention_weights=True)
