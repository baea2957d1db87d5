"""Whichever way the experts are run, the layer equals E separate PyG convs masked by the routing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn import (
    CGConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GINEConv,
    SAGEConv,
    SimpleConv,
    SoftmaxAggregation,
    TAGConv,
)

from gmoe import ROUTERS, FilterConv, MoEConv
from gmoe.conv import attention as attention_module
from gmoe.conv import graph as graph_module
from gmoe.conv.aggregate import AggregateOnce, FilterExperts, MLPConvExperts
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.base import MixedExperts
from gmoe.conv.graph import Graph
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import (
    FORMS,
    GRAPHS,
    assert_equals_masked,
    coo,
    csr,
    default_float64,
    features,
    random_graph,
    routing_of,
    simple_graph,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

WIDTH, EDGE_DIM = 4, 3
FILL = torch.tensor([1.0, -1.0, 2.0])
Case = tuple[Any, dict[str, Any]]

AGGREGATE_ONCE: list[Case] = [
    ("gcn", {}),
    ("gcn", {"improved": True}),
    ("gcn", {"normalize": False}),
    ("gcn", {"add_self_loops": False, "bias": False}),
    ("gcn", {"cached": True}),
    ("sage", {}),
    ("sage", {"aggr": "sum", "root_weight": False}),
    ("sage", {"aggr": "max", "bias": False}),
    ("sage", {"normalize": True}),
    ("sage", {"aggr": ["mean", "max"]}),
    ("sage", {"root_weight": False, "bias": False, "normalize": True}),
    ("graph", {}),
    ("graph", {"aggr": "mean", "bias": False}),
    ("graph", {"aggr": "max"}),
    ("gin", {}),
    ("gin", {"train_eps": True, "eps": 0.5}),
    ("gin", {"eps": -0.3, "aggr": "mean"}),
]

LINEAR = [case for case in AGGREGATE_ONCE if case[0] != "gin"]

ATTENTION: list[Case] = [
    ("gat", {}),
    ("gat", {"heads": 2, "negative_slope": 0.7, "bias": False}),
    ("gat", {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    ("gat", {"heads": 2, "edge_dim": EDGE_DIM}),
    ("gat", {"edge_dim": EDGE_DIM, "fill_value": "max"}),
    ("gat", {"edge_dim": EDGE_DIM, "fill_value": 0.5, "concat": False}),
    ("gat", {"edge_dim": EDGE_DIM, "fill_value": FILL}),
    ("gat", {"edge_dim": EDGE_DIM, "add_self_loops": False, "residual": True}),
    ("gatv2", {}),
    ("gatv2", {"heads": 2, "negative_slope": 0.7, "bias": False}),
    ("gatv2", {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    ("gatv2", {"share_weights": True, "heads": 2}),
    ("gatv2", {"share_weights": True, "edge_dim": EDGE_DIM, "bias": False}),
    ("gatv2", {"heads": 2, "edge_dim": EDGE_DIM, "fill_value": "add"}),
    ("gatv2", {"edge_dim": EDGE_DIM, "fill_value": FILL}),
    ("transformer", {}),
    ("transformer", {"heads": 2, "bias": False}),
    ("transformer", {"heads": 2, "concat": False}),
    ("transformer", {"heads": 2, "beta": True}),
    ("transformer", {"heads": 2, "beta": True, "concat": False, "edge_dim": EDGE_DIM}),
    ("transformer", {"root_weight": False, "beta": True, "edge_dim": EDGE_DIM}),
    ("transformer", {"heads": 2, "edge_dim": EDGE_DIM}),
]

LOCAL: list[Case] = [
    ("sage", {"project": True}),
    ("sage", {"local": True}),  # also what has a faster path of its own
    ("gat", {"local": True, "heads": 2, "edge_dim": EDGE_DIM, "fill_value": "max"}),
    ("gatv2", {"local": True, "share_weights": True, "add_self_loops": False}),
    ("gatv2", {"aggr": "max"}),
    ("transformer", {"local": True, "beta": True, "heads": 2}),
    ("general", {"in_edge_channels": EDGE_DIM}),
    ("general", {"attention": True, "heads": 2, "l2_normalize": True}),
    ("general", {"skip_linear": True, "directed_msg": False}),
    ("res_gated_graph", {"edge_dim": EDGE_DIM}),
    ("res_gated_graph", {"root_weight": False}),
    ("le", {}),
    ("film", {}),
    ("gine", {"edge_dim": EDGE_DIM, "train_eps": True}),
    (CGConv, {"dim": EDGE_DIM}),
    ("simple", {}),
]

FULL: list[Case] = [
    ("gcn", {"aggr": "mean"}),
    ("cheb", {"K": 3}),
    ("tag", {"K": 2}),
    ("sg", {"K": 2}),
    ("sage", {"local": False}),
    (lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o))), {}),
]

LISTS: list[Case] = [
    (["gcn", "gat", "mlp"], {}),
    (["gcn", "le", "film"], {}),  # of which the last takes no weights
    (["graph", partial(GATConv, edge_dim=EDGE_DIM, fill_value=2.0), "sage"], {}),
    ([partial(GATv2Conv, edge_dim=EDGE_DIM), "le", partial(GATConv, edge_dim=EDGE_DIM)], {}),
    (["sage", partial(SAGEConv, flow="target_to_source"), partial(GATConv, flow="target_to_source")], {}),
    (["tag", "gcn", partial(TAGConv, K=2)], {}),
    (["low_pass", "high_pass", partial(FilterConv, filter="high_pass", hops=3)], {}),
    (["identity", "two_hop", "mlp"], {}),
    (["low_pass", "gcn", partial(FilterConv, add_self_loops=False)], {"bias": False}),
]

ALL = [*AGGREGATE_ONCE, *ATTENTION, *LOCAL, *FULL, *LISTS]

BIPARTITE = [
    case
    for case in [*AGGREGATE_ONCE, *ATTENTION, *LOCAL, LISTS[2]]
    if case[0] not in ("gcn", "film", CGConv) and not case[1].get("skip_linear")
]

SOME: list[Case] = [
    *(("gcn", {}), ("sage", {}), ("graph", {}), ("gin", {}), ("sage", {"aggr": "max"}), ("gcn", {"aggr": "mean"})),
    *(("gat", {"heads": 2}), ("gatv2", {}), ("transformer", {"heads": 2}), ("le", {}), ("sage", {"project": True})),
    *((["low_pass", "high_pass", "two_hop"], {}), (["gcn", "gat", "le"], {})),
]


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
    found = {}
    if "edge_weight" in conv.edge_names:
        found["edge_weight"] = features(num_edges, seed=7).abs() + 0.1
    named = ("edge_dim", "in_edge_channels", "dim")
    if any(getattr(plain, key, None) == EDGE_DIM for plain in conv.experts.convs() for key in named) or any(
        isinstance(plain, GINEConv) for plain in conv.experts.convs()
    ):
        found["edge_attr"] = features(num_edges, EDGE_DIM, seed=8)
    return found


@pytest.mark.parametrize(("conv", "kwargs"), ALL, ids=ids)
def test_equals_masked(conv: Any, kwargs: dict[str, Any]) -> None:
    layer = build(conv, kwargs)
    for graph, (num_nodes, edge_index) in GRAPHS.items():
        if num_nodes == 1 and (conv, kwargs) in FULL[-1:]:
            continue  # batch norm of one row
        x, args = features(num_nodes, WIDTH), edge_args(layer, edge_index.size(1))
        for kind in ("all", "some", "none") if graph == "mixed" else ("some",):
            assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes, kind), **args)
        if "edge_weight" in args and graph == "mixed":
            del args["edge_weight"]
            assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes), **args)


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("conv", "kwargs"), SOME, ids=ids)
def test_forms_of_the_edges(conv: Any, kwargs: dict[str, Any], form: str) -> None:
    """Each form gives what plain edges give, and a Graph of it the very same."""
    layer = build(conv, kwargs)
    edges, x = simple_graph(9, 9, loops=False), features(9, WIDTH)
    adj = FORMS[form](edges, (9, 9))
    with default_float64():  # of which PyG's EdgeIndex makes its weights
        assert_equals_masked(layer, x, adj, reference_adj=edges, weight_TE=weights(9))
        routing = routing_of(weights(9))
        assert torch.equal(layer(x, Graph(adj, 9), routing=routing), layer(x, adj, routing=routing))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conv", ["gcn", partial(GCNConv, aggr="mean"), "sage", "gat", "le", "filter"], ids=name)
def test_self_loops_count_as_pyg_counts_them_in_that_form(conv: Any, form: str) -> None:
    """To the loops of a sparse matrix GCN adds its own, of an edge_index it replaces them."""
    edges = simple_graph(9, 9)
    adj = FORMS[form](edges, (9, 9))
    with default_float64():
        same = edges if form == "int32" else adj  # on which PyG's own gradients are wrong
        assert_equals_masked(build(conv, {}), features(9, WIDTH), adj, reference_adj=same, weight_TE=weights(9))


@pytest.mark.parametrize("sizes", [(9, 5), (5, 9), (6, 6)], ids=str)
@pytest.mark.parametrize(("conv", "kwargs"), BIPARTITE, ids=ids)
def test_bipartite(conv: Any, kwargs: dict[str, Any], sizes: tuple[int, int]) -> None:
    """Loops join the nodes of equal index."""
    num_src, num_dst = sizes
    if "edge_dim" in kwargs and conv in ("gat", "gatv2") and num_src < num_dst:
        kwargs = {
            **kwargs,
            "fill_value": 2.0,
        }  # PyG fails to reduce over the in-edges of more destinations than sources
    one_width = "share_weights" in kwargs or conv in ("gin", "gine", "simple", "general", "le")
    x = (features(num_src, WIDTH), features(num_dst, WIDTH if one_width else 6, seed=1))
    layer = build(conv, kwargs, WIDTH if one_width else (WIDTH, 6))
    args = edge_args(layer, 20)
    assert_equals_masked(layer, x, random_graph(*sizes, 20), weight_TE=weights(num_dst), **args)


@pytest.mark.parametrize("conv", ["sage", "gat", "gen", ["sage", partial(SAGEConv, flow="target_to_source")]], ids=name)
def test_bipartite_nodes_in_the_other_flow_are_refused(conv: Any) -> None:
    """PyG's convs would take their messages from the second set, and give outputs for the first."""
    layer = build(conv, {} if isinstance(conv, list) else {"flow": "target_to_source"}, router="token_choice")
    for sizes in ((9, 5), (6, 6)):
        x = (features(sizes[0], WIDTH), features(sizes[1], WIDTH))
        with pytest.raises(ValueError, match=r"x: got a tuple .*flow='target_to_source'"):
            layer(x, random_graph(5, 5, 9))
    with pytest.raises(ValueError, match="flow: got 'target_to_source' for Graph"):
        Graph(random_graph(9, 5, 20), (9, 5)).in_flow("target_to_source")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "conv", ["sage", "graph", "gat", "transformer", "res_gated_graph", ["sage", "gatv2", "mlp"]], ids=ids
)
def test_forms_of_bipartite_edges(conv: Any, form: str) -> None:
    layer = build(conv, {}, (WIDTH, 6))
    for sizes in ((9, 5), (5, 9)):
        edges, x = simple_graph(*sizes), (features(sizes[0], WIDTH), features(sizes[1], 6, seed=1))
        if conv == "gat" or isinstance(conv, list):  # of whose loops PyG adds some to a matrix's own
            edges = edges[:, edges[0] != edges[1]]
        with default_float64():
            adj = FORMS[form](edges, sizes)
            assert_equals_masked(layer, x, adj, reference_adj=edges, weight_TE=weights(sizes[1]))
            routing = routing_of(weights(sizes[1]))
            assert torch.equal(layer(x, Graph(adj, sizes), routing=routing), layer(x, adj, routing=routing))


@pytest.mark.parametrize("make", [coo, csr])
@pytest.mark.parametrize("wrap", [False, True], ids=["matrix", "Graph"])
@pytest.mark.parametrize(
    ("conv", "kwargs"),
    [*SOME, ("sage", {"local": True}), ("gat", {"local": True}), (["sage", "le", "graph"], {})],
    ids=ids,
)
def test_values_of_a_sparse_matrix(conv: Any, kwargs: dict[str, Any], wrap: bool, make: Any) -> None:
    """Whatever PyG's conv makes of them: edge weights, or factors of messages."""
    edges = simple_graph(9, 9, loops=False)
    adj = make(edges, (9, 9), features(edges.size(1), seed=2).abs() + 0.1)
    layer = build(conv, kwargs)
    x = features(9, WIDTH)
    assert_equals_masked(layer, x, Graph(adj, 9) if wrap else adj, reference_adj=adj, weight_TE=weights(9))


@pytest.mark.parametrize("make", [coo, csr])
@pytest.mark.parametrize("conv", [["sage", "gat", "film"], ["gin", "sage", "graph"], "graph", "sage"], ids=name)
def test_values_of_a_sparse_matrix_in_lists(conv: Any, make: Any) -> None:
    """Factors or weights for the convs that take them so, and nothing for the others."""
    edges = simple_graph(9, 9, loops=False)
    adj = make(edges, (9, 9), features(edges.size(1), seed=2).abs() + 0.1)
    layer = build(conv, {})
    assert_equals_masked(layer, features(9, WIDTH), adj, weight_TE=weights(9))


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


@pytest.mark.parametrize(
    "kind",
    [partial(GINConv, train_eps=True), partial(GINConv, eps=0.5, aggr="max"), partial(SimpleConv, aggr="sum"), CGConv],
    ids=str,
)
def test_partials_of_convs_that_take_no_widths(kind: Any) -> None:
    assert_equals_masked(build(kind, {}), features(9, WIDTH), random_graph(9, 9, 30), weight_TE=weights(9))


@pytest.mark.parametrize("make", [coo, csr])
@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
def test_rows_of_values_are_edge_features(conv: str, make: Any) -> None:
    edges = random_graph(9, 9, 30).unique(dim=1)
    adj = make(edges, (9, 9), features(edges.size(1), EDGE_DIM, seed=2))
    assert_equals_masked(build(conv, {"edge_dim": EDGE_DIM, "heads": 2}), features(9, WIDTH), adj, weight_TE=weights(9))


@pytest.mark.parametrize("form", ["EdgeIndex by col", "EdgeIndex by row", "int32"])
@pytest.mark.parametrize(
    ("conv", "kwargs"), [("gcn", {}), ("graph", {}), ("gat", {"edge_dim": EDGE_DIM}), LISTS[1]], ids=ids
)
def test_edge_arguments_come_in_the_order_of_the_edges_as_given(conv: Any, kwargs: dict[str, Any], form: str) -> None:
    layer, edges = build(conv, kwargs), simple_graph(9, 9)
    adj = FORMS[form](edges, (9, 9))
    with default_float64():
        plain = torch.as_tensor(adj).long() if form == "int32" else adj.as_tensor()
        args = edge_args(layer, edges.size(1))
        assert_equals_masked(layer, features(9, WIDTH), adj, reference_adj=plain, weight_TE=weights(9), **args)


@pytest.mark.parametrize(("conv", "kwargs"), [c for c in ALL if c not in FULL[-1:] + LISTS], ids=ids)
def test_target_to_source(conv: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("local") and kwargs.get("fill_value") == "max":
        kwargs = {**kwargs, "local": None}  # PyG reduces over the out-edges then, which is not local
    layer = build(
        conv, {**kwargs, "flow": "target_to_source"}, router="token_choice", k=2, router_input=("node", "neighbors")
    )
    assert layer.flow == "target_to_source"
    num_nodes, edge_index = GRAPHS["mixed"]
    assert_equals_masked(layer, features(num_nodes, WIDTH), edge_index, **edge_args(layer, edge_index.size(1)))


@pytest.mark.parametrize(("conv", "kwargs"), [case for case in ALL if case not in FULL[-1:]], ids=ids)
def test_an_explainers_mask_acts_on_every_kind(conv: Any, kwargs: dict[str, Any]) -> None:
    """As on masked PyG convs under the same mask; the gradient that the mask gets is compared too."""
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, kwargs)
    x, args = features(num_nodes, WIDTH), edge_args(layer, edge_index.size(1))
    mask = features(edge_index.size(1), seed=9)
    assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes), mask=mask, **args)
    assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes), **args)  # and is gone again


@pytest.mark.parametrize(("conv", "kwargs"), [c for c in ALL if c not in FULL[-1:] + LISTS], ids=ids)
def test_an_explainers_mask_in_the_other_flow(conv: Any, kwargs: dict[str, Any]) -> None:
    """PyG's GATv2Conv then swaps lin_l and lin_r under any mask, unless they are one: ours does not."""
    num_nodes, edge_index = GRAPHS["mixed"]
    if conv == "gatv2":
        kwargs = {**kwargs, "share_weights": True}
    if kwargs.get("local") and kwargs.get("fill_value") == "max":
        kwargs = {**kwargs, "local": None}
    layer = build(conv, {**kwargs, "flow": "target_to_source"})
    x, args = features(num_nodes, WIDTH), edge_args(layer, edge_index.size(1))
    mask = features(edge_index.size(1), seed=9)
    assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes), mask=mask, **args)


@pytest.mark.parametrize("shared_expert", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("conv", ["gcn", "gat", ["low_pass", "gin", "sage"]], ids=name)
def test_routers_and_shared_experts(conv: Any, router: str, shared_expert: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    for k, router_input in ((1, "node"), (2, ("node", "neighbors")), (3, ("neighbors", "degree"))):
        layer = build(conv, {}, router=router, k=k, router_input=router_input, shared_expert=shared_expert)
        args = {name: value for name, value in edge_args(layer, edge_index.size(1)).items() if k > 1}
        assert_equals_masked(layer, features(num_nodes, WIDTH), edge_index, **args)


@pytest.mark.parametrize(
    "shared", ["le", "mlp", partial(GATConv, edge_dim=EDGE_DIM), partial(SAGEConv, flow="target_to_source")], ids=name
)
@pytest.mark.parametrize("conv", ["gcn", "sage", "film"])
def test_a_shared_expert_of_another_kind_takes_edge_arguments_and_flow_of_its_own(conv: str, shared: Any) -> None:
    edge_index = random_graph(9, 9, 30)
    layer = build(conv, {}, shared_expert=shared)
    args = {"edge_weight": features(30, seed=7).abs() + 0.1, "edge_attr": features(30, EDGE_DIM, seed=8)}
    args = {name: value for name, value in args.items() if name in layer.edge_names}
    assert_equals_masked(layer, features(9, WIDTH), edge_index, weight_TE=weights(9), **args)


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize(
    ("conv", "kwargs"), [("gcn", {}), ("sage", {}), *ATTENTION[3:4], *ATTENTION[13:14], *ATTENTION[-1:]], ids=ids
)
def test_backends(conv: Any, kwargs: dict[str, Any], backend: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, kwargs, backend=backend)
    args = edge_args(layer, edge_index.size(1))
    assert_equals_masked(layer, features(num_nodes, WIDTH), edge_index, weight_TE=weights(num_nodes), **args)


@pytest.mark.parametrize("move", [0, 1000])
@pytest.mark.parametrize(("conv", "kwargs"), ATTENTION, ids=ids)
def test_heads_wider_and_narrower_than_the_input(
    conv: Any, kwargs: dict[str, Any], move: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GAT sums inputs, and transforms the sum, where a head is at least as wide; else what experts hear is transformed,
    or, where it costs much to move that, all sources."""
    monkeypatch.setattr(attention_module, "MOVE", move)
    num_nodes, edge_index = GRAPHS["mixed"]
    for in_channels, out_channels in ((2, 5), (6, 3)):
        layer = build(conv, kwargs, in_channels, out_channels)
        args = edge_args(layer, edge_index.size(1))
        assert_equals_masked(layer, features(num_nodes, in_channels), edge_index, weight_TE=weights(num_nodes), **args)


@pytest.mark.parametrize("numbers", [1, 20])
@pytest.mark.parametrize(("conv", "kwargs"), [*ATTENTION, ("gcn", {}), ("sage", {}), ("graph", {})], ids=ids)
def test_block_by_block(conv: Any, kwargs: dict[str, Any], numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; a message a block, and a few."""
    monkeypatch.setattr(graph_module, "SPARSE_DEVICES", ())
    monkeypatch.setattr(graph_module, "NUMBERS", numbers)
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, kwargs)
    args = edge_args(layer, edge_index.size(1))
    assert_equals_masked(layer, features(num_nodes, WIDTH), edge_index, weight_TE=weights(num_nodes), **args)


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
    kinds: list[Any] = [
        "gcn",
        "mlp",
        "GCNConv",
        partial(SAGEConv, aggr="sum"),
        "low_pass",
        partial(SAGEConv, aggr="max"),
        partial(SAGEConv, aggr="sum"),
    ]
    layer = build(kinds, {}, router="token_choice", k=3)
    assert isinstance(layer.experts, MixedExperts)
    assert layer.experts.members == [(0, 2), (1,), (3, 6), (4,), (5,)]
    assert_equals_masked(layer, features(9, WIDTH), random_graph(9, 9, 30))
    assert [name.removesuffix("Conv") for name in (type(layer.expert(e)).__name__ for e in range(7))] == [
        "GCN",
        "MLP",
        "GCN",
        "SAGE",
        "Filter",
        "SAGE",
        "SAGE",
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_graphs(data: st.DataObject) -> None:
    cases = [case for case in ALL if case not in FULL[-1:]]  # batch norm of one row
    conv, kwargs = cases[data.draw(st.integers(0, len(cases) - 1), label="case")]
    num_nodes = data.draw(st.integers(1, 6), label="nodes")
    node = st.integers(0, num_nodes - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=12), label="edges")
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    rows = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0]), min_size=3, max_size=3)
    weight = torch.tensor(data.draw(st.lists(rows, min_size=num_nodes, max_size=num_nodes), label="weights")).double()
    layer = build(conv, kwargs, shared_expert=data.draw(st.booleans(), label="shared"))
    args = edge_args(layer, len(edges))
    loops = sum(source == destination for source, destination in edges)
    mask: Tensor | None = features(len(edges), seed=9)
    # PyG itself takes a mask for one that has loops already where as many are added as taken away
    if (conv, kwargs) in FULL or loops == num_nodes or not data.draw(st.booleans(), label="mask"):
        mask = None
    assert_equals_masked(layer, features(num_nodes, WIDTH), edge_index, weight_TE=weight, mask=mask, **args)


@pytest.mark.parametrize(("conv", "kwargs"), [*SOME, ("film", {})], ids=ids)
def test_no_nodes(conv: Any, kwargs: dict[str, Any]) -> None:
    layer = build(conv, kwargs, router="token_choice")
    x = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    y = layer(x, torch.zeros(2, 0, dtype=torch.long))
    assert y.size(0) == 0
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("conv", "kwargs"), ALL, ids=ids)
def test_cuda_gives_the_same(conv: Any, kwargs: dict[str, Any]) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, kwargs)
    args = {name: value.cuda() for name, value in edge_args(layer, edge_index.size(1)).items()}
    layer, x, weight_TE = layer.cuda(), features(num_nodes, WIDTH).cuda(), weights(num_nodes).cuda()
    assert_equals_masked(layer, x, edge_index.cuda(), weight_TE=weight_TE, **args)
