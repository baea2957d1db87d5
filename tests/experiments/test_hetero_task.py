"""A small planted ogbn-mag as batches, on the whole graph and sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch_geometric.data import HeteroData

from experiments.build import build_model
from experiments.config import HeteroConfig
from experiments.data import GraphData, Split, Task
from experiments.data.graphs import directed, graph_task
from experiments.data.named import load_graph
from experiments.planted import write_planted

PAPERS = 130


@pytest.fixture(scope="module")
def mag(tmp_path_factory: pytest.TempPathFactory) -> GraphData:
    """Papers whose first feature is their number."""
    root = tmp_path_factory.mktemp("ogb")
    write_planted("ogbn-mag", root, PAPERS, 400, 5)
    graph = load_graph(make_config(data_root=root, offline=True))
    graph.data["paper"].x[:, 0] = torch.arange(PAPERS)
    return graph


def make_config(data_root: Path = Path("data"), **changes: Any) -> HeteroConfig:
    return HeteroConfig(dataset="ogbn-mag", data_root=data_root, hidden=8, experts=2, **changes)


def make_task(mag: GraphData, **changes: Any) -> Task:
    config = make_config(**changes)
    return graph_task(directed(mag, config), config, 0)


@pytest.mark.parametrize("router", ["dense", "token_choice"])
@pytest.mark.parametrize("how", [{}, {"sampling": "neighbor", "evaluation": "sampled", "fanout": (-1, -1)}])
def test_each_paper_counts_once_with_the_logits_of_the_whole_graph(mag: GraphData, router: Any, how: Any) -> None:
    """Of the experts alone that a paper chooses, whoever else is in the batch."""
    task = make_task(mag, router=router, **how)
    model = build_model(make_config(router=router), task).eval()
    (whole,) = make_task(mag).loader("val", 1, None)
    full = model(*whole.inputs)
    for part in get_args(Split):
        for batch_size, seed in ((16, None), (16, 2), (1000, 2)):
            ids: list[int] = []
            for batch in task.loader(part, batch_size, seed):
                nodes = batch.counted(batch.inputs[0]["paper"])[:, 0].long()
                assert torch.equal(batch.target, mag.data["paper"].y[nodes])
                torch.testing.assert_close(batch.counted(model(*batch.inputs)), full[nodes], rtol=1e-4, atol=1e-4)
                ids += nodes.tolist()
            assert sorted(ids) == mag.splits(0)[part].sort().values.tolist()


def test_a_batch_without_some_kinds_of_nodes(mag: GraphData) -> None:
    """No draws at all: the seeds alone are left."""
    task = make_task(mag, sampling="neighbor", fanout=(0, 0))
    model = build_model(make_config(), task)
    for batch in task.loader("train", 16, 0):
        assert {kind: len(ids) for kind, ids in batch.inputs[2].items() if len(ids)} == {"paper": len(batch.target)}
        task.loss(batch.counted(model(*batch.inputs)), batch.target).backward()


@pytest.mark.parametrize("undirected", [True, False])
def test_relations_have_reverses(mag: GraphData, undirected: bool) -> None:
    graph = make_task(mag, undirected=undirected).graph
    assert isinstance(graph, HeteroData)
    assert len(graph.edge_types) == (7 if undirected else 4)
    cites = set(map(tuple, graph["paper", "cites", "paper"].edge_index.T.tolist()))
    assert (cites == {(b, a) for a, b in cites}) == undirected
    assert len(mag.data.edge_types) == 4
    if undirected:
        writes = graph["author", "writes", "paper"].edge_index
        assert torch.equal(graph["paper", "rev_writes", "author"].edge_index, writes.flip(0))
