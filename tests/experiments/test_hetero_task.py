"""A small planted ogbn-mag as batches: on the whole graph and sampled; and what is refused."""

from __future__ import annotations

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

PARTS: tuple[Split, ...] = get_args(Split)
PAPERS = 130


@pytest.fixture(scope="module")
def mag(tmp_path_factory: pytest.TempPathFactory) -> GraphData:
    """Papers whose first feature is their number."""
    root = tmp_path_factory.mktemp("ogb")
    write_planted("ogbn-mag", root, PAPERS, 400, 5)
    graph = load_graph(make_config(data_root=root, offline=True))
    graph.data["paper"].x[:, 0] = torch.arange(PAPERS)
    return graph


def make_config(**changes: Any) -> HeteroConfig:
    if changes.get("sampling") == "neighbor":
        changes = {"fanout": (3, 3)} | changes
    return HeteroConfig(dataset="ogbn-mag", hidden=8, experts=2, batch_size=16, **changes)


def make_task(mag: GraphData, config: HeteroConfig) -> Task:
    return graph_task(directed(mag, config), config, 0)


@pytest.mark.parametrize("sampling", ["full", "neighbor"])
@pytest.mark.parametrize("evaluation", ["full", "sampled"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_each_paper_counts_once(mag: GraphData, sampling: Any, evaluation: Any, batch_size: int) -> None:
    task = make_task(mag, make_config(sampling=sampling, evaluation=evaluation))
    for part in PARTS:
        for seed in (None, 2):
            ids: list[int] = []
            for batch in task.loader(part, batch_size, seed):
                nodes = batch.counted(batch.inputs[0]["paper"])[:, 0].long()
                assert torch.equal(batch.target, mag.data["paper"].y[nodes])
                ids += nodes.tolist()
            assert sorted(ids) == mag.splits(0)[part].sort().values.tolist()


@pytest.mark.parametrize("router", ["dense", "token_choice"])
def test_all_neighbors_give_the_logits_of_the_whole_graph(mag: GraphData, router: Any) -> None:
    config = make_config(router=router, sampling="neighbor", evaluation="sampled", fanout=(-1, -1))
    task = make_task(mag, config)
    model = build_model(config, task).eval()
    (whole,) = make_task(mag, make_config()).loader("val", 1, None)
    with torch.no_grad():
        full = model(*whole.inputs)
        for part in PARTS:
            for batch in task.loader(part, 16, 1):
                ids = batch.counted(batch.inputs[0]["paper"])[:, 0].long()
                # of the experts alone that a paper chooses, whoever else is in the batch
                torch.testing.assert_close(batch.counted(model(*batch.inputs)), full[ids], rtol=1e-4, atol=1e-4)


def test_a_batch_without_some_kinds_of_nodes(mag: GraphData) -> None:
    """No draws at all: the seeds alone are left."""
    config = make_config(sampling="neighbor", fanout=(0, 0))
    task = make_task(mag, config)
    model = build_model(config, task)
    for batch in task.loader("train", 16, 0):
        assert {kind: len(ids) for kind, ids in batch.inputs[2].items() if len(ids)} == {"paper": len(batch.target)}
        task.loss(batch.counted(model(*batch.inputs)), batch.target).backward()


@pytest.mark.parametrize("undirected", [True, False])
def test_relations_have_reverses(mag: GraphData, undirected: bool) -> None:
    config = make_config(undirected=undirected)
    task = make_task(mag, config)
    graph = task.graph
    assert isinstance(graph, HeteroData)
    assert len(graph.edge_types) == (7 if undirected else 4)
    cites = set(map(tuple, graph["paper", "cites", "paper"].edge_index.T.tolist()))
    assert (cites == {(b, a) for a, b in cites}) == undirected
    assert len(mag.data.edge_types) == 4
    if undirected:
        writes = graph["author", "writes", "paper"].edge_index
        assert torch.equal(graph["paper", "rev_writes", "author"].edge_index, writes.flip(0))
    assert task.in_channels == {"paper": 128, "author": None, "institution": None, "field_of_study": None}
    assert (task.kind, task.target, task.num_classes) == ("hetero", "paper", 349)
