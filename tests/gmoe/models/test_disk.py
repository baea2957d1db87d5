"""Layer-wise inference with the embeddings on disk: equal to the forward on the whole graph, or refused by name."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import FeaStConv, SAGEConv

from gmoe import GNNMoE, StoredGraph, neighbor_loader
from tests.gmoe.data.sampled import graph
from tests.gmoe.data.stored_files import store

NODES, OUT = 41, 5


def made_graph() -> Data:
    """With self-loops, some of them twice, parallel edges, and nodes without in-edges."""
    data = graph(NODES, 150)
    data.edge_index = data.edge_index[:, data.edge_index[1] % 6 != 2]
    return Data(x=data.x, edge_index=torch.cat([data.edge_index, torch.tensor([[4, 4, 7, 2], [4, 4, 7, 3]])], 1))


def trained(x: torch.Tensor, edge_index: torch.Tensor, **kwargs: Any) -> GNNMoE:
    """With statistics of a few steps, and gains that are not zero."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 3, "num_experts": 3}
    model = GNNMoE(4, 8, OUT, **(options | kwargs)).double().train()
    with torch.no_grad():
        for _ in range(3):
            model(x, edge_index)
        for name, value in model.named_parameters():
            if name.endswith("gain"):
                value.fill_(3.0)
    return model.eval()


def feast(in_channels: int, out_channels: int) -> FeaStConv:
    return FeaStConv(in_channels, out_channels, heads=2)


MODELS: dict[str, dict[str, Any]] = {
    "gcn": {"conv": "gcn", "k": 2},
    "gcn without loops": {"conv": "gcn", "add_self_loops": False},
    "gcn dense": {"conv": "gcn", "router": None, "num_layers": 2},
    "sage, wide": {"conv": "sage", "norm": "batch_norm", "in_proj": True, "jk": "last"},
    "sage max": {"conv": "sage", "aggr": "max", "residual": "none", "every": 2},
    "gat": {"conv": "gat", "heads": 2, "router_input": ("node", "neighbors", "degree")},
    "gin, sees neighbors": {"conv": "gin", "router_input": ("neighbors", "degree")},
    "graph, no shared expert": {"conv": "graph", "shared_expert": False, "router": "random"},
    "feast": {"conv": feast},
    "filters": {"conv": ["low_pass", "high_pass", "identity"], "num_experts": None},
    "mixed": {"conv": ["sage", "gcn", "mlp"], "num_experts": None, "router": "uniform"},
    "shared router": {"shared_router": True},
    "shared router that sees neighbors": {"shared_router": True, "router_input": ("node", "neighbors", "degree")},
    "threshold": {"router": "expert_choice", "router_kwargs": {"inference": "threshold"}},
    "centroids": {"router": "multi_centroid", "conv": "sage"},
    "centroids by threshold": {
        "router": "multi_centroid",
        "router_kwargs": {"choice": "experts", "inference": "threshold", "normalize": "tokens"},
    },
    "layer norm": {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}, "act": "elu", "act_first": True},
    "one layer": {"num_layers": 1, "jk": "last"},
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*((name, 7) for name in MODELS), ("gcn", 1), ("feast", 1), ("gat", NODES), ("mixed", NODES)],
)
def test_it_equals_the_forward_on_the_whole_graph(tmp_path: Path, name: str, batch_size: int) -> None:
    data = store(tmp_path / "graph", made_graph(), half=True)
    assert data.x is not None
    x = data.x.double()
    model = trained(x, data.edge_index, **MODELS[name])
    expected = model(x, data.edge_index)
    stored = StoredGraph(tmp_path / "graph")
    found = model.inference(stored, batch_size=batch_size, folder=tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["logits.npy"]
    assert np.array_equal(np.load(tmp_path / "out" / "logits.npy"), found.numpy())


def test_of_a_loader_the_graph_and_the_batch_size_are_taken(tmp_path: Path) -> None:
    data = store(tmp_path / "graph", made_graph())
    assert data.x is not None
    model = trained(data.x.double(), data.edge_index)
    loader = neighbor_loader(StoredGraph(tmp_path / "graph"), [2, 2], batch_size=9)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # the second run replaces the file of the first
        found = model.inference(loader, folder=str(tmp_path / "out"), progress_bar=True)
        torch.testing.assert_close(found, model(data.x.double(), data.edge_index), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = model.float().inference(loader, folder=tmp_path / "out")
    torch.testing.assert_close(found, model(data.x, data.edge_index))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "expert_choice"}, "router: got ExpertChoice with inference='group', whose tokens compete"),
        ({"router": "attention_vote"}, "router: got AttentionVote, whose tokens compete"),
        ({"router": "multi_centroid", "router_kwargs": {"choice": "experts"}}, "router: got MultiCentroid"),
        ({"norm": "graph_norm"}, "norm: got GraphNorm, which looks at all rows"),
        ({"norm": "layer_norm"}, "norm: got LayerNorm, which looks at all rows"),
        ({"norm": "pair_norm"}, "norm: got PairNorm"),
        ({"jk": "cat"}, "jk: got 'cat', expected None or 'last'"),
        ({"conv": partial(SAGEConv, flow="target_to_source")}, "flow: got 'target_to_source' of"),
        ({"shared_router": True, "router_hops": 2, "router_input": "neighbors"}, "router_hops: got 2, expected 1"),
        ({"conv": "two_hop"}, "hops: got 2, expected 1"),
    ],
)
def test_what_needs_all_nodes_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    store(tmp_path, made_graph())
    torch.manual_seed(0)
    model = GNNMoE(4, 8, OUT, **({"num_experts": 3} | options)).eval()
    with pytest.raises(ValueError, match=message):
        model.inference(StoredGraph(tmp_path), folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    data = store(tmp_path, made_graph())
    stored, out = StoredGraph(tmp_path), tmp_path / "out"
    model = GNNMoE(4, 8, OUT).eval()
    with pytest.raises(ValueError, match="folder: got None"):
        model.inference(stored)
    with pytest.raises(ValueError, match=r"folder: got .* for a graph in memory"):
        model.inference(data, folder=out)
    for name, value in (("cache", True), ("return_routing", True), ("embedding_device", "meta")):
        with pytest.raises(ValueError, match=f"{name}: got what takes memory for all nodes"):
            model.inference(stored, folder=out, **{name: value})
    with pytest.raises(ValueError, match="x: got 4 columns, expected in_channels=3"):
        GNNMoE(3, 8, OUT).eval().inference(stored, folder=out)
    with pytest.raises(ValueError, match="model: got one in training mode"):
        model.train().inference(stored, folder=out)
    with pytest.raises(ValueError, match=r"model: got torch.bfloat16, expected float32 or float64"):
        model.eval().bfloat16().inference(stored, folder=out)
