"""Experts of several kinds, a shared expert, and what the router may see."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch_geometric.nn import GATConv, GCNConv, SAGEConv, TAGConv

from gmoe import GNNMoE, MLPConv, MoEConv, active_parameters, count_flops
from gmoe.conv.aggregate import GCNExperts
from gmoe.conv.base import MixedExperts
from gmoe.conv.aggregate import MLPConvExperts
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph

WIDTH = 4


@pytest.mark.parametrize("graph", GRAPHS)
def test_gcn_gat_and_mlp_equal_masked(graph: str) -> None:
    num_nodes, edge_index = GRAPHS[graph]
    conv = MoEConv(["gcn", GATConv, "mlp"], WIDTH, WIDTH, k=2).double()
    assert isinstance(conv.experts, MixedExperts)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index)
    weight_TE = features(num_nodes, 3, seed=3)
    weight_TE[:, 1] = 0
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=0 * weight_TE)


def test_kinds_are_grouped_wherever_they_stand_in_the_list() -> None:
    kinds: list[Any] = [
        "gcn",
        "mlp",
        GCNConv,
        partial(SAGEConv, aggr="sum"),
        "mlp",
        "low_pass",
        partial(SAGEConv, aggr="max"),
    ]
    conv = MoEConv(kinds, WIDTH, WIDTH, k=3).double()
    assert isinstance(conv.experts, MixedExperts)
    assert conv.experts.members == [(0, 2), (1, 4), (3,), (5,), (6,)]
    assert [type(conv.expert(e)).__name__ for e in range(7)] == [
        "GCNConv",
        "MLPConv",
        "GCNConv",
        "SAGEConv",
        "MLPConv",
        "FilterConv",
        "SAGEConv",
    ]
    edge_index = random_graph(9, 9, 30)
    assert_equals_masked(conv, features(9, WIDTH), edge_index)


def test_one_kind_in_a_list_is_one_group() -> None:
    conv = MoEConv(["gcn", GCNConv, "GCNConv"], WIDTH, WIDTH)
    assert isinstance(conv.experts, GCNExperts)
    assert conv.num_experts == 3


def test_edge_arguments_go_to_the_experts_that_take_them() -> None:
    edge_index = random_graph(9, 9, 30)
    kinds: list[Any] = ["gcn", partial(GATConv, edge_dim=2), "mlp", "graph"]
    conv = MoEConv(kinds, WIDTH, WIDTH, k=3).double()
    args = {"edge_weight": features(30, seed=1).abs() + 0.1, "edge_attr": features(30, 2, seed=2)}
    assert_equals_masked(conv, features(9, WIDTH), edge_index, **args)
    with pytest.raises(ValueError, match="edge_attr: got a tensor, but the conv takes"):
        MoEConv(["gcn", "mlp"], WIDTH, WIDTH).double()(features(9, WIDTH), edge_index, edge_attr=args["edge_attr"])


def test_kinds_that_see_far_run_on_the_whole_graph() -> None:
    with pytest.warns(UserWarning, match="TAGConv runs on the whole graph"):
        conv = MoEConv(["tag", "gcn", partial(TAGConv, K=2)], WIDTH, WIDTH, k=2).double()
    assert isinstance(conv.experts, MixedExperts)
    assert isinstance(conv.experts.groups[0], SeparateExperts)
    assert_equals_masked(conv, features(9, WIDTH), random_graph(9, 9, 30))


@pytest.mark.parametrize("kind", ["gcn", "sage", "graph", "gin", "mlp", "filter", "gat", "transformer"])
@pytest.mark.parametrize("router_input", ["input", ("both", "degree")])
def test_a_shared_expert_is_added_on_every_node(kind: str, router_input: Any) -> None:
    conv = MoEConv(kind, WIDTH, WIDTH, num_experts=3, shared_expert=True, router_input=router_input).double()
    assert_equals_masked(conv, features(9, WIDTH), random_graph(9, 9, 30))


@pytest.mark.parametrize(("conv", "shared"), [("gcn", "mlp"), (["low_pass", "two_hop"], True), ("mlp", SAGEConv)])
def test_a_shared_expert_of_another_kind(conv: Any, shared: Any) -> None:
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=2, shared_expert=shared).double()
    assert_equals_masked(layer, features(9, WIDTH), random_graph(9, 9, 30))


def test_shared_expert_where_the_transform_comes_first() -> None:
    conv = MoEConv("sage", 32, 2, num_experts=3, shared_expert=True).double()
    assert conv.experts.transforms_first
    assert_equals_masked(conv, features(9, 32), random_graph(9, 9, 30))


def test_a_shared_expert_covers_nodes_without_another_and_counts_in_full() -> None:
    conv = MoEConv("gcn", WIDTH, WIDTH, num_experts=4, shared_expert=True, router="expert_choice").double()
    plain = MoEConv("gcn", WIDTH, WIDTH, num_experts=4, router="expert_choice").double()
    assert active_parameters(conv) - active_parameters(plain) == WIDTH * WIDTH + WIDTH
    x, edge_index = features(9, WIDTH), random_graph(9, 9, 30)
    y, routing = conv(x, edge_index, return_routing=True)
    missed = torch.ones(9, dtype=torch.bool).index_fill(0, routing.token, False)
    assert conv.shared is not None
    torch.testing.assert_close(y[missed], conv.shared.expert(0)(x, edge_index)[missed])
    assert count_flops(conv, x, edge_index) > count_flops(plain, x, edge_index)


def test_reset_draws_the_shared_expert_anew() -> None:
    conv = MoEConv("gcn", WIDTH, WIDTH, shared_expert=True)
    assert conv.shared is not None
    before = [p.clone() for p in conv.shared.parameters()]
    conv.reset_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, conv.shared.parameters(), strict=True))


def test_degree_is_log_of_one_plus_in_degree() -> None:
    conv = MoEConv("gcn", WIDTH, WIDTH, num_experts=2, router_input="degree").double()
    assert conv.router is not None
    assert conv.router.dim == 1
    seen: list[torch.Tensor] = []
    conv.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    conv(features(4, WIDTH), torch.tensor([[0, 1, 2, 0], [1, 1, 1, 3]]))
    torch.testing.assert_close(seen[0], torch.tensor([[0.0], [3.0], [0.0], [1.0]], dtype=torch.float64).log1p())


@pytest.mark.parametrize(
    ("router_input", "dim"), [("input", 4), ("both", 8), (("degree", "aggregate"), 5), (["both", "degree"], 9)]
)
def test_router_input_parts(router_input: Any, dim: int) -> None:
    conv = MoEConv("sage", WIDTH, WIDTH, num_experts=2, router_input=router_input)
    assert conv.router is not None
    assert conv.router.dim == dim
    shared = GNNMoE(WIDTH, 8, 3, num_experts=2, shared_router=True, router_input=router_input)
    assert shared.shared_router is not None
    assert shared.shared_router.dim == dim
    shared(features(9, WIDTH).float(), random_graph(9, 9, 30))


@pytest.mark.parametrize(
    ("router_input", "message"),
    [
        ("edges", "router_input: got 'edges', expected one of 'input', 'aggregate', 'both', 'degree'"),
        ((), "router_input: got nothing"),
        (("input", "x"), "router_input: got 'x'"),
    ],
)
def test_bad_router_input(router_input: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConv("gcn", WIDTH, WIDTH, router_input=router_input)
    with pytest.raises(ValueError, match=message):
        GNNMoE(WIDTH, WIDTH, WIDTH, router_input=router_input)


def test_number_of_experts_follows_a_list() -> None:
    assert MoEConv(["gcn", "mlp", "gcn"], WIDTH, WIDTH).num_experts == 3
    assert MoEConv("gcn", WIDTH, WIDTH).num_experts == 8
    with pytest.raises(ValueError, match="conv: got a list of 3 convs, expected num_experts=4"):
        MoEConv(["gcn", "mlp", "gcn"], WIDTH, WIDTH, num_experts=4)
    model = GNNMoE(WIDTH, 8, 3, conv=["gcn", "mlp"], num_layers=3)
    assert model.convs[0].num_experts == 2


def test_mlp_conv_ignores_the_graph_and_takes_bipartite_input() -> None:
    conv = MoEConv(MLPConv, (3, WIDTH), 5, num_experts=2, hidden_channels=7).double()
    assert isinstance(conv.experts, MLPConvExperts)
    assert_equals_masked(conv, (features(6, 3), features(4, WIDTH)), torch.tensor([[5, 0], [1, 3]]))
    assert conv.expert(0).hidden_channels == 7
    plain = MLPConv(WIDTH, 5, bias=False).double()
    torch.testing.assert_close(plain(features(4, WIDTH)), plain.down(plain.up(features(4, WIDTH)).clamp(min=0)))


def test_gnn_with_mixed_experts_and_a_shared_one_learns() -> None:
    torch.manual_seed(0)
    x, edge_index = features(30, WIDTH).float(), random_graph(30, 30, 90)
    y = (x[:, 0] > 0).long()
    model = GNNMoE(WIDTH, 16, 2, conv=["gcn", "sage", "mlp", "identity"], k=2, shared_expert=True, num_layers=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x, edge_index), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
