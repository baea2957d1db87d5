"""From a graph to batches: who counts, and what the model sees of features and labels."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch_geometric.data import Data

from experiments.config import GraphConfig
from experiments.data import Task
from experiments.data.graph_data import GraphData, Split
from experiments.loop import set_up
from tests.experiments.made_graph import (
    CLASSES,
    NODES,
    PARTS,
    double,
    logits_of,
    make_config,
    make_graph,
    make_split,
    make_task,
    model_of,
)


def counted(task: Task, part: Split, batch_size: int = 7, seed: int | None = None) -> list[int]:
    """The nodes that count, in order; checks that their targets are their own."""
    assert task.graph is not None
    nodes = []
    for batch in task.loader(part, batch_size, seed):
        ids = batch.counted(batch.inputs[0])[:, 0].long()
        assert torch.equal(batch.target, task.graph.y[ids])
        nodes += ids.tolist()
    return nodes


@pytest.mark.parametrize("sampling", ["full", "neighbor", "random_node"])
@pytest.mark.parametrize("evaluation", ["full", "sampled"])
@pytest.mark.parametrize("binary", [False, True])
def test_each_seed_counts_once_and_no_other_node(sampling: Any, evaluation: Any, binary: bool) -> None:
    task = make_task(make_config(sampling=sampling, evaluation=evaluation), make_graph(binary=binary))
    for part in PARTS:
        for batch_size in (1, 7, 1000):
            for seed in (None, 4):
                assert sorted(counted(task, part, batch_size, seed)) == make_split()[part].sort().values.tolist()


@pytest.mark.parametrize("sampling", ["neighbor", "random_node"])
def test_shuffling_follows_the_seed(sampling: Any) -> None:
    task = make_task(make_config(sampling=sampling))

    def epoch(seed: int | None) -> list[tuple[Tensor, ...]]:
        torch.manual_seed(0)
        return [batch.inputs[:2] for batch in task.loader("train", 7, seed)]

    first, again, other = epoch(1), epoch(1), epoch(2)
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert counted(task, "train", seed=1) != counted(task, "train", seed=2)
    assert not torch.equal(first[0][0][:, 0], other[0][0][:, 0])
    assert counted(task, "train") == counted(task, "train")


@pytest.mark.parametrize(
    ("conv", "changes"),
    [
        ("sage", {}),
        ("sage", {"jk": "cat", "undirected": True}),
        ("graph", {}),
        ("gat", {"undirected": True}),
    ],
)
def test_all_neighbors_give_the_logits_of_the_whole_graph(conv: str, changes: dict[str, Any]) -> None:
    """Of convs that look at no degrees; edge weights (of graph) come along."""
    graph = make_graph(weights=conv == "graph")
    config = make_config(router="dense", conv=(conv,), sampling="neighbor", fanout=(-1, -1), **changes)
    task = make_task(config, graph)
    full, model = logits_of(config, task), model_of(config, task)
    for part in PARTS:
        sizes = []
        for batch in task.loader(part, 7, 1) if part == "train" else make_sampled(task, config, graph, part):
            ids = batch.counted(batch.inputs[0])[:, 0].long()
            with torch.no_grad():
                torch.testing.assert_close(batch.counted(model(*map(double, batch.inputs))), full[ids])
            assert len(batch.inputs) == 8  # the layers are trimmed
            sizes.append(len(batch.inputs[0]))
        assert min(sizes) < NODES


def test_layers_that_are_not_as_many_as_hops_are_not_trimmed() -> None:
    config = make_config(sampling="neighbor", fanout=(2, 2, 2), evaluation="sampled", layers=2)
    for part in PARTS:
        assert {len(batch.inputs) for batch in make_task(config, make_graph()).loader(part, 7, 1)} == {2}


def make_sampled(task: Task, config: GraphConfig, graph: GraphData, part: Split) -> Any:
    return make_task(replace(config, evaluation="sampled"), graph).loader(part, 7, None)


def test_random_parts_are_induced() -> None:
    graph = make_graph(weights=True, simple=True)
    task = make_task(make_config(conv=("gat", "graph"), sampling="random_node"), graph)
    assert task.graph is not None
    weight = {tuple(pair): 1 + sum(pair) / NODES for pair in task.graph.edge_index.T.tolist()}
    seen = 0
    for batch in task.loader("train", 20, 1):
        x, edge_index, edge_weight = batch.inputs
        ids = x[:, 0].long()
        inside = {pair for pair in weight if set(pair) <= set(ids.tolist())}
        found = list(map(tuple, ids[edge_index].T.tolist()))
        assert len(found) == len(inside)
        assert set(found) == inside
        torch.testing.assert_close(edge_weight, torch.tensor([weight[pair] for pair in found]))
        seen += len(ids)
    assert seen == NODES


@pytest.mark.parametrize(
    ("conv", "changes"),
    [
        (("sage",), {}),
        (("gcn",), {"shared_expert": True, "undirected": True}),
        (("gatv2",), {}),
        (("graph", "sage"), {"shared_router": True, "router_input": ("node", "neighbors", "degree")}),
        (("low_pass", "high_pass", "identity", "mlp"), {"experts": 4, "jk": "last"}),
    ],
)
@pytest.mark.parametrize("router", ["expert_choice", "dense"])
def test_layerwise_evaluation_equals_full(conv: tuple[str, ...], changes: dict[str, Any], router: Any) -> None:
    graph = make_graph(weights=conv != ("gatv2",))
    graph.data.x[:, 0] /= NODES
    config = make_config(conv=conv, router=router, **changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "edge_weight: made has some")
        full, layerwise = (make_task(replace(config, evaluation=how), graph) for how in ("full", "layerwise"))
    fabric = Fabric(accelerator="cpu", devices=1)
    model = model_of(config, full).float()
    with set_up(fabric, model, config, full) as training:
        by_pieces = replace(training, config=replace(config, evaluation="layerwise"), task=layerwise)
        for part in PARTS[1:]:
            two, pieces = by_pieces.evaluate(part)
            one, routings = training.evaluate(part)
            assert one == two
            assert [r.token.tolist() for r in routings[0]] == [r.token.tolist() for r in pieces[0]]
    logits, _ = model_of(config, full).inference(_double(layerwise.graph), batch_size=7, return_routing=True)  # type: ignore[operator]
    torch.testing.assert_close(logits, logits_of(config, full))


def _double(data: Any) -> Data:
    return Data(**{name: double(value) for name, value in data.to_dict().items()})


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("label_reuse", [0.5, 0.999])
def test_label_reuse_gives_no_label_away_that_the_loss_is_on(binary: bool, label_reuse: float) -> None:
    graph = make_graph(binary=binary)
    config = make_config(label_reuse=label_reuse)
    task = make_task(config, graph)
    split, width = make_split(), graph.data.x.size(1)
    assert task.in_channels == width + CLASSES
    y = graph.data.y
    expected = y if binary else nn.functional.one_hot(y.clamp(min=0), CLASSES).float()
    train = set(split["train"].tolist())
    drawn = []
    for seed in range(20):
        (batch,) = task.loader("train", 1, seed)
        assert isinstance(batch.rows, Tensor)
        given, rows = batch.inputs[0][:, width:], set(batch.rows.tolist())
        known = train - rows
        assert rows
        assert rows <= train
        assert torch.equal(batch.target, y[batch.rows])
        hidden = sorted(set(range(NODES)) - known)
        assert not given[hidden].any()
        assert torch.equal(given[sorted(known)], expected[sorted(known)])
        drawn.append(frozenset(rows))
        (again,) = task.loader("train", 1, seed)
        assert torch.equal(again.inputs[0], batch.inputs[0])
    assert len(set(drawn)) > 10
    if label_reuse == 0.5:
        assert 0.3 < np.mean([len(rows) for rows in drawn]) / len(train) < 0.7
    for part in PARTS[1:]:
        (batch,) = task.loader(part, 1, None)
        given = batch.inputs[0][:, width:]
        assert torch.equal(given[split["train"]], expected[split["train"]])
        assert not given[sorted(set(range(NODES)) - train)].any()
        assert torch.equal(batch.inputs[0][:, :width], graph.data.x)
        assert isinstance(batch.rows, Tensor)
        assert torch.equal(batch.rows, split[part])
