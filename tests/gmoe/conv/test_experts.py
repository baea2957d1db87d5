"""Whichever way the experts are run, the layer equals E separate PyG convs masked by the routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import (
    CGConv,
    ChebConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GeneralConv,
    GINConv,
    GINEConv,
    GraphConv,
    LEConv,
    ResGatedGraphConv,
    SAGEConv,
    SGConv,
    TAGConv,
    TransformerConv,
)

from gmoe import MoEConv
from gmoe.conv.aggregate import AggregateOnce
from gmoe.conv.graph import parameters_of
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, routing_of

AGGREGATE_ONCE: list[tuple[Any, dict[str, Any]]] = [
    (GCNConv, {}),
    (GCNConv, {"improved": True}),
    (GCNConv, {"normalize": False}),
    (GCNConv, {"add_self_loops": False, "bias": False}),
    (GCNConv, {"aggr": "mean"}),
    (SAGEConv, {}),
    (SAGEConv, {"aggr": "sum", "root_weight": False}),
    (SAGEConv, {"aggr": "max", "bias": False}),
    (SAGEConv, {"normalize": True}),
    (SAGEConv, {"aggr": ["mean", "max"]}),
    (SAGEConv, {"root_weight": False, "bias": False, "normalize": True}),
    (GraphConv, {}),
    (GraphConv, {"aggr": "mean", "bias": False}),
    (GraphConv, {"aggr": "max"}),
    (GINConv, {}),
    (GINConv, {"train_eps": True, "eps": 0.5}),
    (GINConv, {"eps": -0.3, "aggr": "mean"}),
]

LOCAL: list[tuple[Any, dict[str, Any]]] = [
    (SAGEConv, {"project": True}),
    (GATConv, {"heads": 2}),
    (GATConv, {"heads": 2, "concat": False, "add_self_loops": False}),
    (GATConv, {"edge_dim": 2, "residual": True, "bias": False}),
    (GATConv, {"edge_dim": 2, "heads": 2, "fill_value": "max"}),
    (GATv2Conv, {"heads": 2, "edge_dim": 2}),
    (GATv2Conv, {"share_weights": True, "add_self_loops": False}),
    (TransformerConv, {"heads": 2, "edge_dim": 2}),
    (TransformerConv, {"beta": True, "heads": 2, "concat": False}),
    (GeneralConv, {"in_edge_channels": 2}),
    (GeneralConv, {"attention": True, "heads": 2, "l2_normalize": True}),
    (GeneralConv, {"skip_linear": True, "directed_msg": False}),
    (ResGatedGraphConv, {"edge_dim": 2}),
    (ResGatedGraphConv, {"root_weight": False}),
    (LEConv, {}),
    (GINEConv, {"edge_dim": 2, "train_eps": True}),
    (lambda i, _, **kwargs: CGConv(i, **kwargs), {"dim": 2}),
]

FULL: list[tuple[Any, dict[str, Any]]] = [
    (ChebConv, {"K": 3}),
    (TAGConv, {"K": 2}),
    (SGConv, {"K": 2}),
    (GCNConv, {"flow": "target_to_source"}),
    (lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o))), {}),
]

WIDTH = 4


def build(cls: Any, kwargs: dict[str, Any], **moe: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(cls, WIDTH, WIDTH, **{"num_experts": 3, "router": None, **moe}, **kwargs).double()


def edge_args(conv: MoEConv, num_edges: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the conv takes and its options allow."""
    found = {}
    if "edge_weight" in parameters_of(conv._prototypes()[0]):
        found["edge_weight"] = features(num_edges, seed=7).abs() + 0.1
    width = kwargs.get("edge_dim") or kwargs.get("in_edge_channels") or kwargs.get("dim")
    if width is not None:
        found["edge_attr"] = features(num_edges, width, seed=8)
    return found


def ids(value: Any) -> str | None:
    return getattr(value, "__name__", None) or (",".join(f"{k}={v}" for k, v in value.items()) or "default")


def weights(num_tokens: int, kind: str = "some") -> torch.Tensor:
    """Expert 1 is starved, and some tokens have no expert."""
    weight_TE = features(num_tokens, 3, seed=3)
    if kind == "some":
        weight_TE[:, 1] = 0
        weight_TE[::3] = 0
        weight_TE[1::4, 0] = 0
    return weight_TE if kind != "none" else torch.zeros_like(weight_TE)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("cls", "kwargs"), AGGREGATE_ONCE, ids=ids)
def test_aggregate_once_equals_masked(cls: Any, kwargs: dict[str, Any], graph: str) -> None:
    num_nodes, edge_index = GRAPHS[graph]
    conv = build(cls, kwargs)
    assert isinstance(conv.experts, AggregateOnce)
    args = edge_args(conv, edge_index.size(1), kwargs)
    for weight_TE in (weights(num_nodes, "all"), weights(num_nodes)):
        assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE, **args)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weights(num_nodes))  # no edge weights


@pytest.mark.parametrize("router_input", ["input", "both"])
def test_cached_equals_masked(router_input: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(GCNConv, {"cached": True}, router="token_choice", router_input=router_input)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index)


def test_reset_parameters_forgets_a_cached_graph() -> None:
    """As PyG's own does."""
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(GCNConv, {"cached": True}, router="token_choice")
    conv(features(num_nodes, WIDTH), edge_index)
    conv.reset_parameters()
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index[:, :1])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("cls", "kwargs"), LOCAL, ids=ids)
def test_local_equals_masked(cls: Any, kwargs: dict[str, Any], graph: str) -> None:
    num_nodes, edge_index = GRAPHS[graph]
    conv = build(cls, kwargs, local=True)  # also what has a faster path of its own
    assert isinstance(conv.experts, SeparateExperts)
    assert conv.experts.local == [True] * 3
    args = edge_args(conv, edge_index.size(1), kwargs)
    for kind in ("all", "some", "none"):
        weight_TE = weights(num_nodes, kind)
        assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE, **args)


@pytest.mark.parametrize("graph", ["mixed", "no edges"])
@pytest.mark.parametrize(("cls", "kwargs"), FULL, ids=ids)
def test_anything_else_runs_in_full_with_a_warning(cls: Any, kwargs: dict[str, Any], graph: str) -> None:
    num_nodes, edge_index = GRAPHS[graph]
    with pytest.warns(UserWarning, match="whole graph for every expert.*cost follows num_experts"):
        conv = build(cls, kwargs)
    args = edge_args(conv, edge_index.size(1), kwargs)
    for kind in ("all", "some", "none"):
        weight_TE = weights(num_nodes, kind)
        assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE, **args)


@pytest.mark.parametrize("kinds", [[GCNConv, "sage", GATConv], ["gat", LEConv, "transformer"]], ids=["full", "local"])
def test_mixed_kinds_equal_masked(kinds: list[Any]) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(kinds, {})
    for kind in ("all", "some", "none"):
        assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weights(num_nodes, kind))
    names = [type(conv.expert(i)).__name__ for i in range(3)]
    assert [name.removesuffix("Conv").lower() for name in names] == [
        kind if isinstance(kind, str) else kind.__name__.removesuffix("Conv").lower() for kind in kinds
    ]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "router",
    ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform"],
)
@pytest.mark.parametrize("cls", [GCNConv, GINConv, GATConv])
def test_routers_equal_masked(cls: Any, router: str, k: int) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    for router_input in ("input", "both"):
        conv = build(cls, {}, router=router, k=k, router_input=router_input)
        assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index)


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("cls", [GCNConv, SAGEConv])
def test_backends_equal_masked(cls: Any, backend: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {}, backend=backend)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weights(num_nodes))


@pytest.mark.parametrize("sizes", [(9, 5), (5, 9), (6, 6)], ids=str)
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (SAGEConv, {}),
        (SAGEConv, {"aggr": "max", "project": True}),
        (GraphConv, {}),
        (GINConv, {}),
        (GATConv, {"heads": 2}),
        (GATConv, {"edge_dim": 2, "add_self_loops": False}),
        (GATv2Conv, {}),
        (TransformerConv, {}),
        (GeneralConv, {}),
        (ResGatedGraphConv, {}),
        (LEConv, {}),
    ],
    ids=ids,
)
def test_bipartite_equals_masked(cls: Any, kwargs: dict[str, Any], sizes: tuple[int, int]) -> None:
    num_src, num_dst = sizes
    conv = build(cls, kwargs)
    edge_index = random_graph(num_src, num_dst, 20)
    x = (features(num_src, WIDTH), features(num_dst, WIDTH, seed=1))
    args = edge_args(conv, 20, kwargs)
    assert_equals_masked(conv, x, edge_index, weight_TE=weights(num_dst), **args)


@pytest.mark.parametrize("cls", [SAGEConv, GraphConv, GATConv, TransformerConv])
def test_bipartite_of_two_widths(cls: Any) -> None:
    x = (features(9, 3), features(5, 6, seed=1))
    for router_input in ("input", "aggregate", "both"):
        conv = MoEConv(cls, (3, 6), WIDTH, num_experts=3, router="expert_choice", k=2, router_input=router_input).double()
        assert_equals_masked(conv, x, random_graph(9, 5, 20))


def test_wide_to_narrow_and_back() -> None:
    edge_index = random_graph(8, 8, 30)
    for widths in ((17, 2), (2, 17)):
        conv = MoEConv("gcn", *widths, num_experts=3, k=2).double()
        assert_equals_masked(conv, features(8, widths[0]), edge_index)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_graphs_equal_masked(data: st.DataObject) -> None:
    cases = [*AGGREGATE_ONCE, *LOCAL]
    cls, kwargs = cases[data.draw(st.integers(0, len(cases) - 1), label="case")]
    num_nodes = data.draw(st.integers(1, 6), label="nodes")
    node = st.integers(0, num_nodes - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=12), label="edges")
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    rows = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0]), min_size=3, max_size=3)
    weight_TE = data.draw(st.lists(rows, min_size=num_nodes, max_size=num_nodes), label="weights")
    conv = build(cls, kwargs)
    args = edge_args(conv, len(edges), kwargs)
    weight = torch.tensor(weight_TE, dtype=torch.float64)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight, **args)


@pytest.mark.parametrize("cls", [GCNConv, SAGEConv, GINConv, GATConv, "cheb"])
@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
def test_starved_experts_have_zero_gradients(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"K": 2} if cls == "cheb" else {})
    conv(features(num_nodes, WIDTH), edge_index, routing=routing_of(weights(num_nodes))).sum().backward()
    gradients = {name: p.grad for name, p in conv.experts.named_parameters()}
    assert all(value is not None for value in gradients.values())
    starved = [value for name, value in gradients.items() if name.startswith(("nns.1.", "convs.1."))]
    stacked = () if starved else ("lin", "att", "bias")
    starved += [value[1] for name, value in gradients.items() if name.startswith(stacked) and value is not None]
    assert starved
    assert all(not value.any() for value in starved if value is not None)


@pytest.mark.parametrize("cls", [GCNConv, SAGEConv, GINConv, GATConv])
def test_no_nodes(cls: Any) -> None:
    conv = build(cls, {}, router="token_choice")
    x = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    y = conv(x, torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (0, WIDTH)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in conv.experts.parameters())


def test_local_path_runs_on_the_in_edges_of_the_chosen() -> None:
    edge_index = torch.tensor([[0, 2, 4], [1, 3, 5]])
    conv = build(GATConv, {}, local=True)
    rows: list[tuple[int, int]] = []
    assert isinstance(conv.experts, SeparateExperts)
    for expert in conv.experts.convs:
        expert.register_forward_hook(lambda _, args, __: rows.append((args[0].size(0), args[1].size(1))))
    weight_TE = torch.zeros(6, 3, dtype=torch.float64)
    weight_TE[1, 0], weight_TE[3, 2] = 1.0, 1.0
    conv(features(6, WIDTH), edge_index, routing=routing_of(weight_TE))
    assert rows == [(2, 1), (2, 1)]  # a destination and its one source, and the edge between them


@pytest.mark.parametrize("graph", sorted(GRAPHS))
@pytest.mark.parametrize(("cls", "kwargs"), AGGREGATE_ONCE[:14])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_narrow_outputs_are_transformed_first(cls: Any, kwargs: dict[str, Any], graph: str, router: str) -> None:
    """3 experts x 2 columns are narrower than 9: A (x W) in place of (A x) W, except where the aggregate is needed."""
    num_nodes, edge_index = GRAPHS[graph]
    linear = isinstance(kwargs.get("aggr", "mean"), str) and kwargs.get("aggr") != "max"
    for router_input in ("input", "both"):
        conv = MoEConv(cls, 9, 2, num_experts=3, router=router, k=2, router_input=router_input, **kwargs).double()
        assert conv.experts.transforms_first is linear
        assert_equals_masked(conv, features(num_nodes, 9), edge_index)


@pytest.mark.parametrize("out_channels", [2, 9])
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph"])
def test_autocast_gives_bfloat16_in_either_order(conv: str, out_channels: int) -> None:
    """3 x 2 columns are transformed first, 3 x 9 last."""
    num_nodes, edge_index = GRAPHS["mixed"]
    moe = MoEConv(conv, 9, out_channels, num_experts=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe(torch.randn(num_nodes, 9), edge_index).dtype == torch.bfloat16
