"""MoEConv within PyG and torch: positional arguments, to_hetero, explainers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.nn import (
    ChebConv,
    DegreeScalerAggregation,
    GATConv,
    GCNConv,
    GINConv,
    HeteroConv,
    HGTConv,
    MLPAggregation,
    RGCNConv,
    SAGEConv,
)

from gmoe import GNNMoE, Graph, MoEConv
from gmoe.conv.kinds import OPTIONS
from tests.contract import opened
from tests.helpers.conv_cases import KINDS, NODES, WIDTH, graph, layer
from tests.helpers.folded import fold
from tests.helpers.masked import assert_equals_masked, csr, features

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")


def test_the_convs_own_arguments_come_by_position() -> None:
    gat: Any = MoEConv(GATConv, WIDTH, 8, 8, num_experts=2, start="plain")
    assert (gat.num_experts, gat.expert(0).heads) == (2, 8)
    assert MoEConv(GATConv, -1, 8, 2)(*graph()).shape == (NODES, 16)
    with pytest.raises(ValueError, match=r"improved: got 8, .* num_experts=8"):
        MoEConv(GCNConv, WIDTH, 8, 8)


def test_mistyped_and_misplaced_arguments_are_told_what_is_meant() -> None:
    by_name = {
        name
        for name, part in inspect.signature(MoEConv).parameters.items()
        if part.kind is part.KEYWORD_ONLY
    }
    assert set(OPTIONS) == by_name
    moe, gnn = partial(MoEConv, GCNConv, WIDTH, 8), partial(GNNMoE, WIDTH, 8, 3)
    own_network: Any = nn.Sequential(nn.Linear(WIDTH, 8))
    calls: list[tuple[Callable[[], Any], str]] = [
        (partial(moe, top_k=2), r"^top_k: got 2, .*did you mean 'k'\?"),
        (
            partial(moe, balance="bias"),
            r"^balance: got 'bias', .*router_kwargs=\{'balance': \.\.\.}",
        ),
        (partial(moe, hops=2), "^hops: got 2, expected an argument of MoEConv or of GCNConv"),
        *((partial(build, router_kwargs=[1]), r"router_kwargs: got \[1\]") for build in (moe, gnn)),
        *(
            (partial(MoEConv, conv, WIDTH, 8), "a MoEConv for each relation in PyG's HeteroConv")
            for conv in ("hgt", HGTConv, HeteroConv)
        ),
        (
            partial(MoEConv, HGTConv, WIDTH, 8, (["a"], [("a", "to", "a")])),
            "a MoEConv for each relation in PyG's HeteroConv",
        ),
        (
            partial(MoEConv, "gin", WIDTH, 8, own_network),
            "^nn: got a network, expected nothing: .*pass a factory",
        ),
        (
            partial(MoEConv, GINConv, own_network),
            "^in_channels: got a Sequential, .*pass a factory",
        ),
        (partial(MoEConv, GCNConv, WIDTH), "^out_channels: got nothing"),
        (
            partial(MoEConv, GCNConv(8, 8), 8, 8),
            "^conv: got an instance of GCNConv, expected the class, GCNConv, or a",
        ),
        (partial(MoEConv, ["gcn", GCNConv(8, 8)], 8, 8), "^conv: got an instance of GCNConv"),
        (
            partial(MoEConv, RGCNConv, 8, 8, 1),
            "^conv: got RGCNConv, whose forward takes .*edge_type",
        ),
        (
            partial(MoEConv(GCNConv, WIDTH, 8), *graph(), None, None),
            "^forward: got 2 arguments behind edge_index, expected at most 1",
        ),
        (partial(moe, *[True] * 9), "conv: got GCNConv, which cannot be built as"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("conv", "name", "message"),
    [
        (
            partial(ChebConv, K=2),
            "lambda_max",
            "since ChebConv takes it but a layer of experts does not",
        ),
        ("gat", "return_attention_weights", r"since GATConv takes it .*; ask layer\.expert\(e\)"),
        ("gcn", "edge_wieght", r"did you mean 'edge_weight'\?"),
    ],
)
def test_an_unknown_argument_of_a_call_is_named(conv: Any, name: str, message: str) -> None:
    x, edge_index = graph()
    with pytest.raises(
        ValueError,
        match=f"^{name}: got True, expected one of the arguments x, edge_index.*{message}",
    ):
        MoEConv(conv, WIDTH, 8)(x, edge_index, **{name: True})


@pytest.mark.parametrize("conv", ["gcn", "gat", partial(SAGEConv, aggr="max")])
def test_features_of_another_type_than_the_weights_are_refused(conv: Any) -> None:
    """As PyG's layers do; GCN cast them in silence."""
    x, edge_index = graph()
    moe = MoEConv(conv, WIDTH, 8)
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected torch.float32"):
        moe(x.double(), edge_index)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x.bfloat16(), edge_index).shape == (NODES, 8)


def test_a_module_among_the_arguments_is_each_experts_own() -> None:
    x, edge_index = graph()
    aggr = MLPAggregation(WIDTH, WIDTH, max_num_elements=9, num_layers=1)
    moe: Any = MoEConv(SAGEConv, WIDTH, 8, aggr=aggr, num_experts=3, start="plain")
    weights = [next(moe.expert(index).aggr_module.parameters()) for index in range(3)]
    assert not torch.equal(weights[0], weights[1])
    assert moe(x, edge_index[:, edge_index[1].argsort()]).shape == (NODES, 8)


def test_forward_takes_what_the_conv_takes_by_position() -> None:
    x, edge_index = graph()
    weight = features(edge_index.size(1), seed=7).float().abs()
    moe = layer(["gcn", "graph", "le"])
    assert torch.equal(moe(x, edge_index, weight), moe(x, edge_index, edge_weight=weight))
    for conv, given, message in (
        ("gcn", {"edge_weight": weight}, r"edge_weight: got Tensor by position, expected .* once"),
        (["gcn", "gat", "le"], {}, r"forward: got 1 arguments .* by name"),
        ("film", {}, "edge_type: got"),
        ("sage", {}, "size: got "),
    ):
        with pytest.raises(ValueError, match=message):
            layer(conv)(x, edge_index, weight, **given)


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_a_mask_acts_on_messages_and_not_on_the_router(conv: Any) -> None:
    """Nor is anything of it left.

    ``test_experts.py`` has layers without a router and a shared expert.

    A router that sees the neighbors sees their sum under the mask.
    """
    built = layer(conv, k=2, router_input="node")
    (x, edge_index), moe = graph(), opened(built).double().eval()
    x, mask = x.double(), features(edge_index.size(1), seed=9)
    before, routing = moe(x, edge_index, return_routing=True)
    assert_equals_masked(moe, x, edge_index, mask=mask)
    set_masks(moe, mask, edge_index)
    _, shown = moe(x, edge_index, return_routing=True)
    clear_masks(moe)
    assert torch.equal(shown.to_dense(), routing.to_dense())
    assert torch.equal(moe(x, edge_index), before)


def test_a_mask_that_is_a_parameter_is_no_weight_of_convs_that_run_one_by_one() -> None:
    """GNNExplainer's, which PyG registers as a parameter of every conv."""
    (x, edge_index), moe = graph(), opened(layer("film", start="copies")).eval()
    before = moe(x, edge_index)
    outputs = []
    for model in (moe, fold(copy.deepcopy(moe))):
        set_masks(model, nn.Parameter(features(edge_index.size(1), seed=9).float()), edge_index)
        outputs.append(model(x, edge_index))
        clear_masks(model)
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], before)
    torch.testing.assert_close(moe(x, edge_index), before)


def test_buffers_of_an_aggregation_move_with_the_layer() -> None:
    """Though explainers must not see the conv that they are in."""
    moe = layer(
        "sage",
        aggr=DegreeScalerAggregation("mean", "identity", torch.tensor([1, 2, 1])),
        start="plain",
    )
    name = "experts.prototype.aggr_module.avg_deg_lin"
    assert moe.double().state_dict()[name].dtype == torch.float64
    assert moe.to("meta").state_dict()[name].is_meta


def test_destinations_without_features_are_counted_by_a_matrix_a_graph_or_a_size() -> None:
    edge_index, moe = (
        torch.tensor([[0, 1, 2, 3, 7], [0, 0, 1, 1, 2]]),
        layer("sage").double().eval(),
    )
    x = features(NODES, WIDTH), None
    expected = moe(x, edge_index, size=(NODES, 5))
    for given in (
        (csr(edge_index, (NODES, 5)),),
        (Graph(edge_index, (NODES, 5)),),
        (edge_index, (NODES, 5)),
    ):
        torch.testing.assert_close(moe(x, *given), expected)


def test_destinations_without_features_are_refused_where_a_conv_reads_them() -> None:
    for conv, width, given, message in (
        (
            "transformer",
            (WIDTH, WIDTH),
            {"size": (NODES, 1)},
            "x: got no destination nodes, expected .* reads them",
        ),
        ("sage", -1, {"size": (NODES, 1)}, "x: got .*NoneType"),
        ("sage", WIDTH, {}, "size: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(conv, width)((graph()[0], None), torch.tensor([[0, 1], [0, 0]]), **given)
