"""Whichever way the experts are run, the layer equals E separate PyG convs masked by the routing.

``tests/compose`` draws kinds, options, graphs and routings at random; here is what it does not
draw.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GINConv, GINEConv, SAGEConv, SoftmaxAggregation

from gmoe import MoEConv
from gmoe.conv.aggregate import AggregateOnce
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.separate import SeparateExperts
from tests.helpers.conv_cases import AGGREGATE_ONCE, ATTENTION, EDGE_DIM, SOME, WIDTH, Case, ids
from tests.helpers.masked import (
    GRAPHS,
    assert_equals_masked,
    features,
    random_graph,
    routing_of,
    simple_graph,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

NODES, EDGES = GRAPHS["mixed"]
# Without a GPU its cases are not collected: they are as many as those of the CPU.
GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()

LOCAL: list[Case] = [
    ("sage", {"project": True}),
    (
        "gat",
        {"local": True, "heads": 2, "edge_dim": EDGE_DIM, "fill_value": "max"},
    ),  # which can be stacked
    *(
        ("le", {}),
        ("gatv2", {"aggr": "max"}),
        ("general", {"skip_linear": True, "directed_msg": False}),
    ),
    ("gine", {"edge_dim": EDGE_DIM, "train_eps": True}),
]
FULL: list[Case] = [
    *(("tag", {"K": 2}), ("sage", {"local": False})),
    (lambda i, o: GINConv(nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o, momentum=None))), {}),
]
LISTS: list[Case] = [
    (["graph", partial(GATConv, edge_dim=EDGE_DIM, fill_value=2.0), "le"], {}),
    (["tag", "gcn", "film"], {}),
]
ALL = [*AGGREGATE_ONCE, *ATTENTION, *LOCAL, *FULL, *LISTS]


TURNED = [(conv, {**kwargs, "flow": "target_to_source"}) for conv, kwargs in SOME[:5]]
TURNED += [("gatv2", {"share_weights": True, "flow": "target_to_source"})]
"""PyG's GATv2Conv then swaps lin_l and lin_r under any mask, unless they are one: ours does not."""


def build(
    conv: Any,
    kwargs: dict[str, Any],
    in_channels: Any = WIDTH,
    out_channels: int = WIDTH,
    **moe: Any,
) -> MoEConv:
    torch.manual_seed(0)
    options = {
        "num_experts": None if isinstance(conv, list) else 3,
        "router": None,
        "start": "plain",
        **moe,
    }
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
        found["edge_attr"] = features(
            num_edges, EDGE_DIM if plain[0].lin is not None else WIDTH, seed=8
        )
    return found


@pytest.mark.parametrize("device", ["cpu", *GPUS])
@pytest.mark.parametrize(("conv", "kwargs"), [*ALL, *TURNED], ids=ids)
def test_equals_masked_under_an_explainers_mask(
    conv: Any, kwargs: dict[str, Any], device: str
) -> None:
    """Its gradient is compared too; and then without it again."""
    layer = build(conv, kwargs)
    args = {name: value.to(device) for name, value in edge_args(layer, EDGES.size(1)).items()}
    x, edges, weight_TE, mask = (
        features(NODES, WIDTH),
        EDGES,
        weights(NODES),
        features(EDGES.size(1), seed=9),
    )
    layer, (x, edges, weight_TE, mask) = (
        layer.to(device),
        (value.to(device) for value in (x, edges, weight_TE, mask)),
    )
    for shown in [None] if (conv, kwargs) == FULL[-1] else [mask, None]:
        assert_equals_masked(layer, x, edges, weight_TE=weight_TE, mask=shown, **args)


def test_no_kind_is_run_in_a_slower_way_than_it_could_be() -> None:
    ways: Any = {
        AggregateOnce: AGGREGATE_ONCE,
        AttentionExperts: ATTENTION,
        SeparateExperts: [*LOCAL, *FULL],
    }
    for way, cases in ways.items():
        assert all(isinstance(build(*case).experts, way) for case in cases)
    ways = [build(*case).experts.ways for case in (*LOCAL, *FULL)]
    # General and GINE send their nodes as they are; the others transform them first.
    expected = ["part", "part", "part", "part", "rows", "rows", *["whole"] * len(FULL)]
    assert ways == [[way] * 3 for way in expected]


@pytest.mark.parametrize("conv", ["gcn", ["sage", "gin"]], ids=str)
def test_a_coo_matrix_is_left_as_it_was(conv: Any) -> None:
    """Summed where an edge comes twice, in a matrix of its own."""
    index = torch.tensor([[0, 1, 1, 2], [1, 2, 2, 0]])
    adj = torch.sparse_coo_tensor(index, torch.ones(4, dtype=torch.float64), (3, 3))
    layer, x = build(conv, {}, router="random"), features(3, WIDTH)
    y = layer(x, adj)
    assert (adj.is_coalesced(), adj._nnz()) == (False, 4)
    torch.testing.assert_close(y, layer(x, adj.coalesce()))
    y.sum().backward()


@pytest.mark.parametrize("conv", ["gcn", "graph", "gat", "le"])
def test_values_of_a_matrix_get_their_gradient(conv: str) -> None:
    edges, x, width = (
        simple_graph(9, 9, loops=False),
        features(9, WIDTH),
        [EDGE_DIM] if conv == "gat" else [],
    )
    layer = build(conv, {"edge_dim": EDGE_DIM} if conv == "gat" else {}, router="random")
    of_matrix, of_edges = (
        features(edges.size(1), *width, seed=2).abs().requires_grad_() for _ in range(2)
    )
    layer(
        x, torch.sparse_coo_tensor(edges.flip(0), of_matrix, (9, 9, *width))
    ).sin().sum().backward()
    layer(x, edges, **{"edge_attr" if width else "edge_weight": of_edges}).sin().sum().backward()
    torch.testing.assert_close(of_matrix.grad, of_edges.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
def test_one_set_of_nodes_for_two_layers(conv: str) -> None:
    """With two widths and one tensor, both ends are the same nodes.

    Each end goes through its own layer.
    """
    layer = build(conv, {"heads": 2}, (WIDTH, WIDTH))
    assert_equals_masked(layer, features(NODES, WIDTH), EDGES, weight_TE=weights(NODES))


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
def test_attention_drops_as_the_separate_convs_do(conv: str) -> None:
    """In each of many copies of a graph anew."""
    copies, layer = 300, build(conv, {"dropout": 0.5})
    x, weight_TE = features(NODES, WIDTH).repeat(copies, 1), weights(NODES, "all").repeat(copies, 1)
    edges = torch.cat([EDGES + NODES * index for index in range(copies)], dim=1)
    expected = layer.eval()(x, edges, routing=routing_of(weight_TE))[:NODES]
    experts: Any = [layer.train().expert(e) for e in range(3)]
    ours = layer(x, edges, routing=routing_of(weight_TE)).view(copies, NODES, WIDTH)
    theirs: Any = sum(weight_TE[:, e, None] * expert(x, edges) for e, expert in enumerate(experts))
    assert ((ours.mean(dim=0) - expected).abs() <= 5 * ours.std(dim=0) / copies**0.5 + 1e-12).all()
    torch.testing.assert_close(
        ours.std(dim=0), theirs.view_as(ours).std(dim=0), rtol=0.3, atol=1e-12
    )


def test_edge_features_that_do_not_fit() -> None:
    x, attr, routing = (
        features(NODES, WIDTH),
        features(EDGES.size(1), EDGE_DIM),
        routing_of(weights(NODES)),
    )
    for conv, kwargs, given, message in (
        ("gatv2", {}, attr, "edge_attr: got a tensor, .*GATv2Conv was built with edge_dim=None"),
        (
            "transformer",
            {},
            attr,
            "edge_attr: got a tensor, .*TransformerConv was built with edge_dim=None",
        ),
        (
            "transformer",
            {"edge_dim": 3},
            None,
            r"edge_attr: got None, expected a tensor of shape \(edges, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build(conv, kwargs)(x, EDGES, edge_attr=given, routing=routing)
    # As PyG has it
    for conv, kwargs in (
        ("gat", {}),
        ("gat", {"edge_dim": 3}),
        ("gatv2", {"edge_dim": 3}),
    ):
        assert_equals_masked(build(conv, kwargs), x, EDGES, weight_TE=weights(NODES))
    for edge_dim, given in ((None, attr), (1, attr[:, 0])):  # one feature an edge, as a vector
        layer = build("gat", {"edge_dim": edge_dim})
        assert_equals_masked(layer, x, EDGES, weight_TE=weights(NODES), edge_attr=given)


def test_kinds_are_grouped_wherever_they_stand_in_the_list() -> None:
    """But not those of one repr: ``repr(SoftmaxAggregation(t))`` does not show t."""
    soft, softer = (partial(SAGEConv, aggr=SoftmaxAggregation(t=t)) for t in (0.1, 10.0))
    assert repr(soft.keywords) == repr(softer.keywords)
    layer = build(
        ["gcn", "graph", "GCNConv", soft, "le", softer, soft], {}, router="token_choice", k=3
    )
    found: list[Any] = [layer.expert(e) for e in range(7)]
    names = [type(expert).__name__.removesuffix("Conv") for expert in found]
    assert names == ["GCN", "Graph", "GCN", "SAGE", "LE", "SAGE", "SAGE"]
    assert [found[e].aggr_module.t for e in (3, 5, 6)] == [0.1, 10.0, 0.1]
    assert_equals_masked(layer, features(9, WIDTH), random_graph(9, 9, 30))
