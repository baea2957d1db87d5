"""The data sets by name: PyG's from their raw layouts, with the right split, metric and number of outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from experiments.data.graph_data import GraphData, Split, TwoClassAUROC, per_class_splits
from experiments.data.ogb_metric import OGBMetric
from experiments.data.registry import OGB, PYG, load_graph
from tests.experiments.ogb_data import CLASSES as OGB_CLASSES
from tests.experiments.ogb_data import NODES as OGB_NODES
from tests.experiments.ogb_data import plant
from tests.experiments.pyg_data import CLASSES, NODES, Raw, Writer

BY_ROC_AUC = {"minesweeper", "tolokers", "questions"}
ONE_WAY = {"actor", "chameleon", "squirrel"}
"""Of these PyG leaves the edges as they are."""


@pytest.fixture(scope="module")
def ogb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


def pairs(edge_index: Tensor) -> set[tuple[int, int]]:
    found = list(map(tuple, edge_index.T.tolist()))
    assert len(found) == len(set(found))
    return set(found)


def assert_apart(graph: GraphData, seed: int) -> dict[str, set[int]]:
    split = graph.splits(seed)
    parts = {name: set(split[name].tolist()) for name in get_args(Split)}
    assert all(len(parts[name]) == len(split[name]) > 0 for name in parts)
    assert all(not parts[a] & parts[b] for a, b in itertools.combinations(parts, 2))
    return parts


@pytest.mark.parametrize("name", PYG)
def test_pyg_sets_from_their_raw_layout(name: str, tmp_path: Path) -> None:
    raw: Raw = Writer(tmp_path).write(name)
    load_graph(name, tmp_path, offline=True)
    graph = load_graph(name, tmp_path, offline=True)  # from the processed file
    assert sorted(path.name for path in raw.folder.iterdir()) == raw.files
    data = graph.data
    torch.testing.assert_close(data.x, torch.from_numpy(raw.x.astype(np.float32)))
    assert torch.equal(data.y, torch.from_numpy(raw.y))
    edges = {tuple(pair) for pair in raw.edges.tolist()}
    assert pairs(data.edge_index) == (edges if name in ONE_WAY else edges | {(b, a) for a, b in edges})
    assert graph.num_outputs == int(raw.y.max()) + 1
    assert graph.target is None
    assert graph.metric_name == ("roc_auc" if name in BY_ROC_AUC else "accuracy")
    assert isinstance(graph.metric(), TwoClassAUROC if name in BY_ROC_AUC else MulticlassAccuracy)
    assert graph.note
    for seed in (0, 3, 23):
        parts = assert_apart(graph, seed)
        if raw.masks is not None:
            for part, mask in raw.masks.items():
                chosen = mask if mask.ndim == 1 else mask[seed % len(mask)]
                assert parts[part] == set(np.flatnonzero(chosen).tolist())
        else:
            labels = {part: raw.y[list(nodes)] for part, nodes in parts.items()}
            assert np.bincount(labels["train"]).tolist() == [20] * CLASSES
            assert np.bincount(labels["val"]).tolist() == [30] * CLASSES
            assert sum(map(len, parts.values())) == NODES


def test_drawn_splits_follow_the_seed() -> None:
    y = torch.arange(3).repeat(60)
    split = per_class_splits(y)
    assert all(torch.equal(split(1)[part], split(1)[part]) for part in get_args(Split))
    assert not torch.equal(split(1)["train"], split(2)["train"])
    with pytest.raises(ValueError, match=r"class 2 has 50 nodes, expected more than 20 \+ 30"):
        per_class_splits(y[:152])(0)


@pytest.mark.parametrize("name", OGB)
def test_ogb_sets(name: str, ogb_root: Path) -> None:
    graph = load_graph(name, ogb_root, offline=True)
    by_rank = name == "ogbn-proteins"
    assert graph.num_outputs == OGB[name][0]
    assert graph.metric_name == ("roc_auc" if by_rank else "accuracy")
    assert isinstance(graph.metric(), OGBMetric)
    assert graph.target == ("paper" if name == "ogbn-mag" else None)
    y = graph.data["paper"].y if name == "ogbn-mag" else graph.data.y
    assert y.shape == ((OGB_NODES, 112) if by_rank else (OGB_NODES,))
    assert by_rank or int(y.max()) < OGB_CLASSES
    assert assert_apart(graph, 0) == assert_apart(graph, 5)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset: got 'coraa', expected one of cora, .*, ogbn-mag"):
        load_graph("coraa", tmp_path)
