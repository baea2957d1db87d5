"""Layer-wise inference of HeteroGNNMoE equals the forward on the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from gmoe import HeteroGNNMoE, link_neighbor_loader, neighbor_loader
from gmoe.conv.hetero import RelationalConv
from tests.helpers.equal import assert_same
from tests.helpers.mag import COUNTS, DATA, IN, OUT, call, mag, model
from tests.helpers.masked import features


def trained(**kwargs: Any) -> HeteroGNNMoE:
    return as_if_trained(model(num_layers=3, **kwargs))


def as_if_trained(gnn: HeteroGNNMoE) -> HeteroGNNMoE:
    """With gains that are not zero, and copies that differ, in evaluation."""
    with torch.no_grad():
        for name, value in gnn.named_parameters():
            if name.endswith("gain"):
                value.fill_(3.0)
            if ".experts." in name:
                value.add_(torch.randn_like(value) / 3)
    return gnn.eval()


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert_same(found, expected)
        return
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        assert_same(found[name], logits)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"k": 2},
        {"router": "expert_choice", "norm": "graph_norm"},
        {"start": "copies", "residual": "linear", "target": None},
        {"router": None, "norm": "batch_norm", "residual": "none"},
        {"every": 2, "router": "attention_vote"},
    ],
    ids=str,
)
def test_it_equals_the_forward(kwargs: dict[str, Any], batch_size: int) -> None:
    """Whatever the size of the chunks, for routers and norms that look at all nodes, too."""
    gnn = trained(**kwargs)
    expected, routings = call(gnn, return_routing=True)
    found, again = gnn.inference(DATA, batch_size=batch_size, return_routing=True)
    assert_equal(found, expected)
    for one, other in zip(again, routings, strict=True):
        assert_same(one.to_dense(), other.to_dense())
    assert not next(
        iter(found.values()) if isinstance(found, dict) else iter([found])
    ).requires_grad


def test_it_holds_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No map of a layer sees more rows than a chunk has."""
    seen = []
    from_parts = RelationalConv.from_parts

    def watched(conv: Any, name: str, parts: Any, *args: Any) -> Tensor:
        seen.append(max(map(len, parts)))
        return from_parts(conv, name, parts, *args)

    monkeypatch.setattr(RelationalConv, "from_parts", watched)
    trained().inference(DATA, batch_size=2)
    assert max(seen) == 2


@pytest.mark.parametrize("make", [neighbor_loader, link_neighbor_loader])
def test_of_a_loader_the_graph_and_the_batch_size_are_taken(make: Any, capsys: Any) -> None:
    gnn = trained()
    seeds = "paper" if make is neighbor_loader else ("paper", "cites", "paper")
    loader = make(DATA, [1], seeds, batch_size=4, backend="gmoe")
    assert_same(gnn.inference(loader), call(gnn))
    assert not capsys.readouterr().err
    assert_same(gnn.inference(loader, progress_bar=True), call(gnn))
    assert "paper" in capsys.readouterr().err


def test_graphs_of_a_batch_are_separate() -> None:
    graphs = [mag(seed=1), mag({name: n + 3 for name, n in COUNTS.items()}, seed=2)]
    for graph in graphs:
        for name, n in list(graph.num_nodes_dict.items()):
            graph[name].x = features(n, IN, seed=n)
    torch.manual_seed(0)
    gnn = HeteroGNNMoE(IN, 6, OUT, DATA.metadata(), router="expert_choice", norm="graph_norm")
    gnn, batch = as_if_trained(gnn.double()), Batch.from_data_list(graphs)
    expected = gnn(batch.x_dict, batch.edge_index_dict, batch_dict=batch.batch_dict)
    assert_equal(gnn.inference(batch, batch_size=7), expected)


def test_relations_may_be_absent_and_types_empty() -> None:
    data = mag({**COUNTS, "institution": 0, "author": 0})
    gnn = trained(num_nodes_dict=data.num_nodes_dict)
    expected = call(gnn, data)
    del data["author", "writes", "paper"]
    assert_same(gnn.inference(data, batch_size=3), expected)


def test_what_is_refused() -> None:
    few, stranger = mag({**COUNTS, "author": 8}), mag()
    stranger["paper", "is", "paper"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    wide = mag()
    wide["paper"].x = torch.zeros(COUNTS["paper"], IN + 1).double()
    cases: list[tuple[Any, str]] = [
        (Data(x=torch.zeros(3, IN)), "loader"),
        (few, "loader"),
        (stranger, "loader"),
        (wide, "x_dict"),
    ]
    for data, argument in cases:
        with pytest.raises(ValueError, match=rf"^{argument}.*: got"):
            trained().inference(data)
    with pytest.raises(ValueError, match=r"^batch_size: got"):
        trained().inference(DATA, batch_size=0)
