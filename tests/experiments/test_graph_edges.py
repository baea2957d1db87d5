"""The edges of a task: the forms of a graph agree, and weights and features reach the convs that take them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch_geometric.utils import add_self_loops

from experiments.data import directed
from tests.experiments.made_graph import NODES, logits_of, make_config, make_graph, make_task

CSR_CASES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("gcn",), {}),
    (("sage",), {}),
    (("graph",), {}),
    (("gin",), {}),
    (("mlp", "sage"), {}),
    (("low_pass", "identity", "high_pass", "two_hop"), {"experts": 4}),
    (("gcn", "graph"), {"shared_expert": True, "shared_router": True}),
]


@pytest.mark.parametrize(("conv", "changes"), CSR_CASES)
@pytest.mark.parametrize(("router", "undirected"), [("dense", True), ("token_choice", False)])
@pytest.mark.parametrize("weights", [False, True])
def test_a_matrix_gives_the_logits_of_edge_index(
    conv: tuple[str, ...], changes: dict[str, Any], router: str, undirected: bool, weights: bool
) -> None:
    graph = make_graph(weights=weights, simple=True)
    config = make_config(
        conv=conv, router=router, router_input=("node", "neighbors", "degree"), undirected=undirected, **changes
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "edge_weight: made has some")
        csr, plain = (make_task(replace(config, adjacency=form), graph) for form in ("csr", "edge_index"))
        auto = make_task(config, graph)
    form = next(iter(csr.loader("val", 1, None))).inputs[1]
    assert form.is_sparse_csr
    assert next(iter(auto.loader("val", 1, None))).inputs[1].is_sparse_csr
    assert not next(iter(plain.loader("val", 1, None))).inputs[1].is_sparse_csr
    torch.testing.assert_close(logits_of(config, csr), logits_of(config, plain))


@pytest.mark.parametrize("conv", [("gcn",), ("sage", "low_pass")])
def test_self_loops_are_not_doubled(conv: tuple[str, ...]) -> None:
    """PyG's normalization adds a self-loop to each node of a matrix, of edge_index only where there is none."""
    graph = make_graph(simple=True)
    graph.data.edge_index = add_self_loops(graph.data.edge_index)[0]
    config = make_config(conv=conv)
    (batch,) = make_task(config, graph).loader("val", 1, None)
    assert not batch.inputs[1].is_sparse_csr
    with pytest.raises(ValueError, match=r"adjacency: got 'csr', expected .* because of self-loops"):
        make_task(replace(config, adjacency="csr"), graph)


def test_parallel_edges_are_not_merged_behind_the_back() -> None:
    graph = make_graph()
    assert graph.data.edge_index.unique(dim=1).size(1) < graph.data.edge_index.size(1)
    (batch,) = make_task(make_config(), graph).loader("val", 1, None)
    assert torch.equal(batch.inputs[1], graph.data.edge_index)
    with pytest.raises(ValueError, match="adjacency: got 'csr', expected 'auto' or 'edge_index' because of parallel"):
        make_task(make_config(adjacency="csr"), graph)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"precision": "bf16-mixed"}, "precision"),
        ({"conv": ("gcn", "sage")}, "edge_weight"),
    ],
)
def test_where_there_is_no_matrix(changes: dict[str, Any], because: str) -> None:
    graph = make_graph(weights=because == "edge_weight", simple=True)
    config = make_config(conv=changes.get("conv", ("gcn",)), **{k: v for k, v in changes.items() if k != "conv"})
    (batch,) = make_task(config, graph).loader("val", 1, None)
    assert not batch.inputs[1].is_sparse_csr
    with pytest.raises(ValueError, match=f"adjacency: got 'csr', expected .* because of {because}"):
        make_task(replace(config, adjacency="csr"), graph)


@pytest.mark.parametrize("adjacency", ["csr", "edge_index"])
@pytest.mark.parametrize("router", ["dense", "expert_choice"])
@pytest.mark.parametrize(
    ("conv", "takes"), [(("gcn",), True), (("graph",), True), (("sage",), False), (("gat",), False)]
)
def test_weights_reach_the_convs_that_take_them(
    conv: tuple[str, ...], takes: bool, router: Any, adjacency: Any
) -> None:
    config = make_config(conv=conv, router=router, adjacency="edge_index" if conv == ("gat",) else adjacency)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighted = make_task(config, make_graph(weights=True, simple=True))
    bare = make_task(config, make_graph(simple=True))
    told = [str(w.message) for w in caught if "edge_weight" in str(w.message)]
    assert told == ([] if takes else [f"edge_weight: made has some, but {conv[0]} takes none"])
    same = torch.equal(logits_of(config, weighted), logits_of(config, bare))
    assert same != takes


def test_weights_of_mixed_kinds() -> None:
    graph = make_graph(weights=True)
    config = make_config(conv=("gcn", "sage"))
    assert len(next(iter(make_task(config, graph).loader("val", 1, None))).inputs) == 3
    assert not torch.equal(logits_of(config, make_task(config, graph)), logits_of(config, make_task(config)))
    dense = replace(config, router="dense")  # of which the first kind alone is built
    assert not torch.equal(logits_of(dense, make_task(dense, graph)), logits_of(dense, make_task(dense)))


def test_directions() -> None:
    graph = make_graph(weights=True)
    assert directed(graph, make_config()) is graph
    before = graph.data.edge_index.clone()
    data = directed(graph, make_config(undirected=True)).data
    assert torch.equal(graph.data.edge_index, before)  # the next run begins with the same
    pairs = list(map(tuple, data.edge_index.T.tolist()))
    given = set(map(tuple, before.T.tolist()))
    assert len(pairs) == len(set(pairs)) == len(data.edge_weight)
    assert set(pairs) == given | {(b, a) for a, b in given}
    # of both directions, so that the mean of them is the same
    torch.testing.assert_close(data.edge_weight, 1 + data.edge_index.sum(dim=0) / NODES)
