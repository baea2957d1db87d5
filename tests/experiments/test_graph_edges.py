"""The edges of a task: the forms of a graph agree, and weights and features reach the convs that take them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch_geometric.data import Data

from experiments.data.graph_task import transformed, uses_csr
from tests.experiments.made_graph import ATTR, NODES, logits_of, make_config, make_graph, make_task

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


@pytest.mark.parametrize("conv", ["sage", "graph", "gin"])
def test_a_matrix_with_self_loops(conv: str) -> None:
    config = make_config(conv=(conv,), undirected=True, self_loops=True)
    csr, plain = (make_task(replace(config, adjacency=form), make_graph()) for form in ("csr", "edge_index"))
    assert next(iter(csr.loader("val", 1, None))).inputs[1].is_sparse_csr
    torch.testing.assert_close(logits_of(config, csr), logits_of(config, plain))


@pytest.mark.parametrize("conv", [("gcn",), ("sage", "low_pass")])
def test_self_loops_are_not_doubled(conv: tuple[str, ...]) -> None:
    """PyG's normalization adds a self-loop to each node of a matrix, of edge_index only where there is none."""
    config = make_config(conv=conv, self_loops=True)
    (batch,) = make_task(config, make_graph(simple=True)).loader("val", 1, None)
    assert not batch.inputs[1].is_sparse_csr
    with pytest.raises(ValueError, match=r"adjacency: got 'csr', expected .* because of self-loops"):
        make_task(replace(config, adjacency="csr"), make_graph(simple=True))
    if conv == ("gcn",):  # which has them anyway
        bare = make_task(replace(config, self_loops=False, router_input=("node",)), make_graph(simple=True))
        config = replace(config, router_input=("node",))
        looped = make_task(config, make_graph(simple=True))
        torch.testing.assert_close(logits_of(config, looped), logits_of(config, bare))


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
        ({"conv": ("gat",), "edge_features": True}, "edge_features"),
        ({"conv": ("gcn", "sage")}, "edge_weight"),
    ],
)
def test_where_there_is_no_matrix(changes: dict[str, Any], because: str) -> None:
    graph = make_graph(weights=because == "edge_weight", attr=True, simple=True)
    config = make_config(conv=changes.get("conv", ("gcn",)), **{k: v for k, v in changes.items() if k != "conv"})
    assert not uses_csr(config, graph.data)
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


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer", "gine"])
def test_edge_features_reach_the_convs(conv: str) -> None:
    config = make_config(conv=(conv,), edge_features=True)
    graph = make_graph(attr=True)
    task = make_task(config, graph)
    assert task.edge_dim == ATTR
    before = logits_of(config, task)
    graph.data.edge_attr = graph.data.edge_attr + 1
    assert not torch.allclose(logits_of(config, make_task(config, graph)), before)
    bare = make_task(replace(config, edge_features=False), graph)
    assert bare.edge_dim is None
    assert len(next(iter(bare.loader("val", 1, None))).inputs) == 2


def test_directions_and_loops() -> None:
    graph = make_graph(weights=True, attr=True)
    assert transformed(graph, make_config()) is graph.data
    before = graph.data.edge_index.clone()
    config = make_config(undirected=True, self_loops=True)
    data = transformed(graph, config)
    assert torch.equal(graph.data.edge_index, before)  # the next run begins with the same
    assert isinstance(data, Data)
    pairs = list(map(tuple, data.edge_index.T.tolist()))
    assert len(pairs) == len(set(pairs)) == len(data.edge_weight) == len(data.edge_attr)
    assert {(b, a) for a, b in pairs} == set(pairs)
    assert {(node, node) for node in range(NODES)} <= set(pairs)
    given = set(map(tuple, before.T.tolist()))
    assert set(pairs) == given | {(b, a) for a, b in given} | {(node, node) for node in range(NODES)}
    for edge, (a, b) in enumerate(pairs):
        old = (a, b) in given or (b, a) in given
        value = 1 + (a + b) / NODES if old else 1  # of both directions, so that the mean of them is the same
        assert float(data.edge_weight[edge]) == pytest.approx(value)
        if old:
            assert data.edge_attr[edge].tolist() == pytest.approx([(a + b) / NODES, a * b / NODES**2])
    loop = pairs.index((0, 0))
    near = [edge for edge, (a, b) in enumerate(pairs) if b == 0 and a != 0]
    if (0, 0) not in given:
        torch.testing.assert_close(data.edge_attr[loop], data.edge_attr[near].mean(dim=0))
    assert data.edge_attr[pairs.index((NODES - 1, NODES - 1))].tolist() == [0, 0]  # no in-edges
