"""Whichever way the experts are run, the layer equals E separate PyG convs masked by the routing.

Kinds, options, graphs and routings are drawn at random in ``tests/compose.py``; here is what it does not draw.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GINConv, GINEConv, SAGEConv, SoftmaxAggregation

from gmoe import FilterConv, MoEConv
from gmoe.conv.aggregate import AggregateOnce, FilterExperts, MLPConvExperts
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.base import MixedExperts
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, simple_graph, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

WIDTH, EDGE_DIM = 4, 3
FILL = torch.tensor([1.0, -1.0, 2.0])
NODES, EDGES = GRAPHS["mixed"]
Case = tuple[Any, dict[str, Any]]

AGGREGATE_ONCE: list[Case] = [
    ("gcn", {}),
    ("gcn", {"improved": True, "cached": True, "bias": False}),
    ("sage", {}),
    ("sage", {"aggr": "max", "bias": False}),
    ("sage", {"aggr": ["mean", "max"], "root_weight": False, "normalize": True}),
    ("graph", {"aggr": "mean"}),
    ("gin", {"train_eps": True, "eps": 0.5}),
    ("gine", {}),
]
ATTENTION: list[Case] = [
    ("gat", {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    ("gat", {"edge_dim": EDGE_DIM, "fill_value": FILL}),
    ("gatv2", {"heads": 2, "edge_dim": EDGE_DIM, "fill_value": FILL}),
    ("gatv2", {"share_weights": True, "bias": False}),
    ("transformer", {"heads": 2, "beta": True, "concat": False, "edge_dim": EDGE_DIM}),
    ("transformer", {"root_weight": False}),
]
LOCAL: list[Case] = [
    ("sage", {"project": True}),
    ("gat", {"local": True, "heads": 2, "edge_dim": EDGE_DIM, "fill_value": "max"}),  # which can be stacked
    ("gatv2", {"aggr": "max"}),
    ("general", {"skip_linear": True, "directed_msg": False}),
    ("le", {}),
    ("gine", {"edge_dim": EDGE_DIM, "train_eps": True}),
]
FULL: list[Case] = [
    ("tag", {"K": 2}),
    ("sage", {"local": False}),
    (lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o))), {}),
]
LISTS: list[Case] = [
    (["gcn", "gat", "mlp"], {}),
    (["graph", partial(GATConv, edge_dim=EDGE_DIM, fill_value=2.0), "le"], {}),
    (["low_pass", "identity", partial(FilterConv, filter="high_pass", hops=3)], {}),
    (["tag", "gcn", "film"], {}),
]
ALL = [*AGGREGATE_ONCE, *ATTENTION, *LOCAL, *FULL, *LISTS]

SOME: list[Case] = [
    *(("gcn", {}), ("gin", {}), ("gat", {"heads": 2}), ("sage", {"project": True}), ("tag", {"K": 2})),
    *((["low_pass", "high_pass", "two_hop"], {}), (["gcn", "gat", "le"], {})),
]
"""One of each way to run experts."""


def name(kind: Any) -> str:
    if isinstance(kind, list):
        return "+".join(map(name, kind))
    return kind if isinstance(kind, str) else getattr(kind, "__name__", None) or name(kind.func)


def ids(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "-" if isinstance(value, dict) else name(value)


def build(
    conv: Any, kwargs: dict[str, Any], in_channels: Any = WIDTH, out_channels: int = WIDTH, **moe: Any
) -> MoEConv:
    torch.manual_seed(0)
    options = {"num_experts": None if isinstance(conv, list) else 3, "router": None, "shared_expert": False, **moe}
    layer = MoEConv(conv, in_channels, out_channels, **options, **kwargs).double()
    if layer.gain is not None:  # so that the routed experts count
        torch.nn.init.constant_(layer.gain, 2.0)
    return layer


def edge_args(conv: MoEConv, num_edges: int) -> dict[str, Tensor]:
    """What the experts take and their options allow."""
    found, plain = {}, conv.experts.convs()
    if "edge_weight" in conv.edge_names:
        found["edge_weight"] = features(num_edges, seed=7).abs() + 0.1
    if any(getattr(one, "edge_dim", None) == EDGE_DIM for one in plain):
        found["edge_attr"] = features(num_edges, EDGE_DIM, seed=8)
    elif any(isinstance(one, GINEConv) for one in plain):
        found["edge_attr"] = features(num_edges, EDGE_DIM if plain[0].lin is not None else WIDTH, seed=8)
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("conv", "kwargs"), ALL, ids=ids)
def test_equals_masked(conv: Any, kwargs: dict[str, Any], device: str) -> None:
    """And under an explainer's mask, whose gradient is compared too; and then without it again."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    layer = build(conv, kwargs)
    args = {name: value.to(device) for name, value in edge_args(layer, EDGES.size(1)).items()}
    x, edges, weight_TE, mask = features(NODES, WIDTH), EDGES, weights(NODES), features(EDGES.size(1), seed=9)
    layer, (x, edges, weight_TE, mask) = layer.to(device), (value.to(device) for value in (x, edges, weight_TE, mask))
    masks = [None] if (conv, kwargs) == FULL[-1] else [None, mask, None]
    for shown in masks:
        assert_equals_masked(layer, x, edges, weight_TE=weight_TE, mask=shown, **args)


@pytest.mark.parametrize(("conv", "kwargs"), [*SOME[:5], ("gatv2", {"share_weights": True})], ids=ids)
def test_an_explainers_mask_in_the_other_flow(conv: Any, kwargs: dict[str, Any]) -> None:
    """PyG's GATv2Conv then swaps lin_l and lin_r under any mask, unless they are one: ours does not."""
    layer = build(conv, {**kwargs, "flow": "target_to_source"})
    args, mask = edge_args(layer, EDGES.size(1)), features(EDGES.size(1), seed=9)
    assert_equals_masked(layer, features(NODES, WIDTH), EDGES, weight_TE=weights(NODES), mask=mask, **args)


@pytest.mark.parametrize(
    ("cases", "kind"),
    [(AGGREGATE_ONCE, AggregateOnce), (ATTENTION, AttentionExperts), (LOCAL, True), (FULL, False)],
    ids=["aggregate once", "attention", "local", "full"],
)
def test_every_kind_is_run_in_its_own_way(cases: list[Case], kind: Any) -> None:
    for conv, kwargs in cases:
        experts = build(conv, kwargs).experts
        if isinstance(kind, bool):
            assert isinstance(experts, SeparateExperts)
            assert experts.is_local == [kind] * 3
        else:
            assert isinstance(experts, kind)
    assert isinstance(build("mlp", {}).experts, MLPConvExperts)
    assert isinstance(build(["low_pass", "high_pass", "identity"], {}).experts, FilterExperts)
    assert isinstance(build(["gcn", "gat"], {}).experts, MixedExperts)


@pytest.mark.parametrize("conv", ["sage", "gat", "gen"])
def test_bipartite_nodes_in_the_other_flow_are_refused(conv: Any) -> None:
    """PyG's convs would take their messages from the second set, and give outputs for the first."""
    layer = build(conv, {"flow": "target_to_source"}, router="token_choice")
    with pytest.raises(ValueError, match=r"x: got a tuple .*flow='target_to_source'"):
        layer((features(9, WIDTH), features(5, WIDTH)), random_graph(5, 5, 9))


@pytest.mark.parametrize("conv", ["gcn", ["sage", "gin"]], ids=name)
def test_a_coo_matrix_is_left_as_it_was(conv: Any) -> None:
    """Summed where an edge comes twice, in a matrix of its own."""
    index = torch.tensor([[0, 1, 1, 2], [1, 2, 2, 0]])
    adj = torch.sparse_coo_tensor(index, torch.ones(4, dtype=torch.float64), (3, 3))
    layer, x = build(conv, {}, router="random"), features(3, WIDTH)
    y = layer(x, adj)
    assert not adj.is_coalesced()
    assert adj._nnz() == 4
    torch.testing.assert_close(y, layer(x, adj.coalesce()))
    y.sum().backward()


@pytest.mark.parametrize("conv", ["gcn", "graph", "gat"])
def test_values_of_a_matrix_get_their_gradient(conv: str) -> None:
    edges, x, width = simple_graph(9, 9, loops=False), features(9, WIDTH), [EDGE_DIM] if conv == "gat" else []
    layer = build(conv, {"edge_dim": EDGE_DIM} if conv == "gat" else {}, router="random")
    of_matrix, of_edges = (features(edges.size(1), *width, seed=2).abs().requires_grad_() for _ in range(2))
    layer(x, torch.sparse_coo_tensor(edges.flip(0), of_matrix, (9, 9, *width))).sin().sum().backward()
    layer(x, edges, **{"edge_attr" if width else "edge_weight": of_edges}).sin().sum().backward()
    torch.testing.assert_close(of_matrix.grad, of_edges.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("conv", "kwargs"), ATTENTION, ids=ids)
def test_heads_wider_and_narrower_than_the_input(conv: Any, kwargs: dict[str, Any]) -> None:
    """GAT sums inputs, and transforms the sum, where a head is at least as wide; else the rows that experts need are
    transformed."""
    for in_channels, out_channels in ((2, 5), (6, 3)):
        layer = build(conv, kwargs, in_channels, out_channels)
        args = edge_args(layer, EDGES.size(1))
        assert_equals_masked(layer, features(NODES, in_channels), EDGES, weight_TE=weights(NODES), **args)


def test_partials_of_equal_repr_are_not_taken_for_one() -> None:
    """``repr(SoftmaxAggregation(t))`` does not show t."""
    kinds: list[Any] = [partial(SAGEConv, aggr=SoftmaxAggregation(t=t)) for t in (0.1, 10.0)]
    assert repr(kinds[0].keywords) == repr(kinds[1].keywords)
    layer = build([*kinds, kinds[0]], {})
    assert isinstance(layer.experts, MixedExperts)
    assert layer.experts.members == [(0, 2), (1,)]
    assert [layer.expert(e).aggr_module.t for e in range(3)] == [0.1, 10.0, 0.1]
    assert_equals_masked(layer, features(9, WIDTH), random_graph(9, 9, 30), weight_TE=weights(9))


def test_kinds_are_grouped_wherever_they_stand_in_the_list() -> None:
    by_max, by_sum = (partial(SAGEConv, aggr=aggr) for aggr in ("max", "sum"))
    layer = build(["gcn", "mlp", "GCNConv", by_sum, "low_pass", by_max, by_sum], {}, router="token_choice", k=3)
    assert isinstance(layer.experts, MixedExperts)
    assert layer.experts.members == [(0, 2), (1,), (3, 6), (4,), (5,)]
    assert_equals_masked(layer, features(9, WIDTH), random_graph(9, 9, 30))
    names = [type(layer.expert(e)).__name__.removesuffix("Conv") for e in range(7)]
    assert names == ["GCN", "MLP", "GCN", "SAGE", "Filter", "SAGE", "SAGE"]
