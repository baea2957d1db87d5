"""Six columns of where a node stands, beside a dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from gmoe import GNNMoE, Graph, MoEConv
from gmoe.conv.structure import COLUMNS, structure
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, features

NODES, EDGES = GRAPHS["mixed"]
WIDTH = 3


def by_matrix(x: Tensor, edge_index: Tensor) -> Tensor:
    """The six columns node by node."""
    adjacency = torch.zeros(NODES, NODES, dtype=x.dtype)
    for source, target in edge_index.T.tolist():
        adjacency[target, source] += 1
    degree = adjacency.sum(dim=1)
    step = adjacency / degree.clamp(min=1)[:, None]
    means = [step @ x, step @ step @ x]
    rows = []
    for node in range(NODES):
        row = [degree[node].log1p(), step[node] @ degree.log1p()]
        for mean in means:
            norms = x[node].norm() * mean[node].norm()
            total = x[node].norm() + mean[node].norm()
            row.append(x[node] @ mean[node] / norms if norms > 0 else norms)
            row.append((x[node] - mean[node]).norm() / total if total > 0 else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_columns_are_what_they_say(scale: float) -> None:
    """Also of nodes without neighbors, of zeros, and whatever the scale of the nodes."""
    x = scale * features(NODES, WIDTH)
    x[6] = 0
    found = structure(x, Graph(EDGES, NODES))
    assert found.shape == (NODES, COLUMNS)
    assert_same(found, by_matrix(x, EDGES))
    assert found[6].tolist() == [0] * COLUMNS
    assert_same(found[7], torch.tensor([0, 0, 0, 1, 0, 1.0]).double())


def test_half_precision_rounds_what_float32_gives() -> None:
    """Means of isolated nodes are zero, and a hub has more in-edges than half precision counts."""
    x = features(NODES, WIDTH).half()
    found = structure(x, Graph(EDGES, NODES))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, structure(x.float(), Graph(EDGES, NODES)).half())
    hub = torch.zeros(2, 70_000, dtype=torch.int64)
    for seen in ("structure", "degree"):
        layer = MoEConv("gcn", WIDTH, WIDTH, router_input=seen, num_experts=2).half()
        assert layer(x[:2], hub)[0].isfinite().all()


def test_a_part_of_a_graph_and_two_sets_are_refused() -> None:
    graph = Graph(EDGES, NODES)
    nodes, part = graph.part(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^graph: got 2 of \d nodes, expected all"):
        structure(features(len(nodes), WIDTH), part)
    layer = MoEConv("sage", WIDTH, WIDTH, router_input="structure").double()
    x = features(NODES, WIDTH)
    with pytest.raises(ValueError, match="router_input='structure' takes no bipartite input"):
        layer((x, x.clone()), EDGES)


@pytest.mark.parametrize("options", [{}, {"shared_router": False, "start": "shared"}], ids=str)
def test_a_router_sees_them(options: dict[str, Any]) -> None:
    """The whole model's from the raw features, a layer's from its own; in inference, too."""
    torch.manual_seed(0)
    gnn: Any = GNNMoE(WIDTH, 4, 2, 3, num_experts=3, router_input="structure", **options)
    gnn = gnn.double().eval()
    x = features(NODES, WIDTH)
    logits, routings = gnn(x, EDGES, return_routing=True)
    router = gnn.shared_router or gnn.convs[0].router
    assert_same(router(by_matrix(x, EDGES)).to_dense(), routings[0].to_dense())
    found = gnn.inference(Data(x=x, edge_index=EDGES), batch_size=3)
    assert_same(found, logits)
