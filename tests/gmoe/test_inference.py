"""Layer-wise inference equals the forward on the whole graph, for every way in which experts are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.utils import to_torch_csr_tensor

from gmoe import GNNMoE, NeighborSampler
from tests.gmoe.conv.masked import features, random_graph

NODES, WIDTH = 23, 5


def graph(**extra: Any) -> Data:
    return Data(x=features(NODES, WIDTH), edge_index=random_graph(NODES, NODES, 70), **extra)


def model_of(**kwargs: Any) -> GNNMoE:
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "out_channels": 3, "num_layers": 3, "num_experts": 4, **kwargs}
    model = GNNMoE(WIDTH, **sizes).double()
    with torch.no_grad():  # a few training steps' worth of statistics
        for _ in range(3):
            model.train()(features(NODES, WIDTH, seed=9), random_graph(NODES, NODES, 70, seed=9))
    return model.eval()


def assert_equal(model: GNNMoE, data: Data, batch_size: int, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, routings = model(data.x, data.edge_index, *args, return_routing=True, **kwargs)
    logits, found = model.inference(data, batch_size=batch_size, return_routing=True)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    assert len(found) == len(routings)
    for own, other in zip(found, routings, strict=True):
        torch.testing.assert_close(own.to_dense(), other.to_dense(), atol=1e-10, rtol=0)


CONVS: dict[str, Any] = {
    "gcn": {"conv": "gcn"},
    "gcn improved": {"conv": "gcn", "improved": True},
    "gcn without loops": {"conv": "gcn", "add_self_loops": False},
    "sage": {"conv": "sage"},
    "sage narrow": {"conv": "sage", "num_experts": 2, "hidden_channels": 2},
    "sage max": {"conv": "sage", "aggr": "max"},
    "graph": {"conv": "graph"},
    "gin": {"conv": "gin"},
    "gat": {"conv": "gat", "heads": 2},
    "gatv2": {"conv": "gatv2"},
    "transformer": {"conv": "transformer"},
    "gated": {"conv": "res_gated_graph"},
    "mlp": {"conv": "mlp"},
    "filters": {"conv": ["low_pass", "identity", "high_pass", "two_hop"]},
    "mixed": {"conv": ["gcn", "gat", "mlp", "sage"]},
}


@pytest.mark.parametrize("batch_size", [1, 6, 100])
@pytest.mark.parametrize("conv", CONVS)
def test_every_kind_of_expert(conv: str, batch_size: int) -> None:
    assert_equal(model_of(**CONVS[conv]), graph(), batch_size)


@pytest.mark.parametrize("routing", ["layer", "shared"])
@pytest.mark.parametrize("router_input", ["input", "both", ("aggregate", "degree")])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "uniform"])
def test_routers_decide_among_all_nodes(router: str, router_input: Any, routing: Any) -> None:
    assert_equal(model_of(router=router, routing=routing, router_input=router_input, router_hops=2), graph(), 6)


def test_votes_among_neighbours() -> None:
    assert_equal(model_of(router="attention_vote", router_kwargs={"scope": "neighbours"}), graph(), 6)


@pytest.mark.parametrize("router", [None, "expert_choice"])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch_norm"},
        {"norm": "graph_norm"},
        {"jk": "cat"},
        {"jk": "last", "residual": "linear"},
        {"residual": "none", "act_first": True, "dropout": 0.5, "input_dropout": 0.5},
        {"in_proj": True, "every": 2},
        {"shared_expert": True},
        {"shared_expert": "mlp"},
    ],
    ids=str,
)
def test_options_of_the_model(options: dict[str, Any], router: str | None) -> None:
    if router is None and "shared_expert" in options:
        options = {}
    assert_equal(model_of(router=router, **options), graph(), 6)


@pytest.mark.parametrize("conv", ["gcn", "graph", ["low_pass", "high_pass", "gcn", "mlp"]])
def test_edge_weights(conv: Any) -> None:
    data = graph(edge_weight=features(70, seed=4).abs() + 0.1)
    model = model_of(conv=conv)
    assert_equal(model, data, 6, data.edge_weight)


@pytest.mark.parametrize("router", [None, "expert_choice"])
@pytest.mark.parametrize("routing", ["layer", "shared"])
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin", ["low_pass", "high_pass", "gcn", "mlp"]], ids=str)
def test_values_of_a_sparse_matrix(conv: Any, routing: Any, router: str | None) -> None:
    data = graph()
    ends, values = data.edge_index.unique(dim=1), features(70, seed=4).abs() + 0.1
    data.edge_index = to_torch_csr_tensor(ends.flip(0), values[: ends.size(1)], size=(NODES, NODES))
    assert_equal(model_of(conv=conv, routing=routing, router=router), data, 6)


def test_no_nodes() -> None:
    data = Data(x=torch.zeros(0, WIDTH).double(), edge_index=torch.empty(2, 0, dtype=torch.long))
    assert_equal(model_of(), data, 6)


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
def test_edge_features(conv: str) -> None:
    data = graph(edge_attr=features(70, 2, seed=4))
    torch.manual_seed(0)
    model = GNNMoE(WIDTH, 8, 3, conv=conv, num_experts=4, edge_dim=2, heads=2).double().eval()
    assert_equal(model, data, 6, edge_attr=data.edge_attr)


def test_graphs_of_a_batch_are_pools() -> None:
    batch = torch.arange(NODES) // 12
    data = graph(batch=batch)
    data.edge_index = data.edge_index[:, batch[data.edge_index[0]] == batch[data.edge_index[1]]]
    assert_equal(model_of(router="expert_choice"), data, 6, batch=batch)


def test_no_edges_and_a_cache_and_a_loader() -> None:
    data = graph()
    model = model_of(router="expert_choice")
    loader = NodeLoader(data, NeighborSampler(data, [2, 2, 2]), batch_size=7)
    with torch.no_grad():
        expected = model(data.x, data.edge_index)
    for cache in (False, True):
        torch.testing.assert_close(model.inference(loader, cache=cache), expected)
    data.edge_index = torch.empty(2, 0, dtype=torch.long)
    assert_equal(model, data, 7)


def test_the_model_is_left_as_it_was() -> None:
    model, data = model_of(conv="gcn"), graph()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not model.inference(data, batch_size=5).requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    convs: list[Any] = [m for m in model.modules() if type(m).__name__ == "GCNConv"]
    assert all(conv.normalize for conv in convs)
    assert len(convs) == 3


def test_cached_convs_neither_use_nor_spoil_their_cache() -> None:
    torch.manual_seed(0)
    model = GNNMoE(WIDTH, 8, 3, conv="gcn", num_experts=4, cached=True).double().eval()
    data = graph()
    first = model.inference(data, batch_size=5)
    torch.testing.assert_close(first, model(data.x, data.edge_index))
    torch.testing.assert_close(model.inference(data, batch_size=5), first)


def test_what_looks_further_is_refused() -> None:
    with pytest.warns(UserWarning, match="runs on the whole graph"):
        model = model_of(conv="tag")
    with pytest.raises(RuntimeError, match="inference: TAGConv looks further than one hop"):
        model.inference(graph())
    with pytest.raises(RuntimeError, match="inference: FilterConv looks further than one hop"):
        model_of(conv="two_hop", router=None).inference(graph())
    with pytest.raises(RuntimeError, match="call inference"):
        model.inference_per_layer()


def test_bad_arguments() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="batch_size: got 0"):
        model.inference(graph(), batch_size=0)
    with pytest.raises(ValueError, match="expected a Data with x and edge_index"):
        model.inference(Data(edge_index=torch.empty(2, 0, dtype=torch.long), num_nodes=2))
    assert isinstance(model.inference(graph()), Tensor)
