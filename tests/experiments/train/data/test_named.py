"""PyG's data sets by name: from their raw layouts, complete or not there.

Nothing in their files is run.
"""

from __future__ import annotations

import itertools
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import actor

from experiments.train.data.graphs import MASKS, per_class_splits, stratified_splits
from experiments.train.data.named import FILTERED, PYG, TEXTS
from tests.helpers.evil import Evil
from tests.helpers.pyg_data import CLASSES, NODES, load, write_raw

BY_ROC_AUC = {"minesweeper", "tolokers", "questions"}
ONE_WAY = {"actor", *FILTERED, *TEXTS}
"""Of these the edges stay as they are."""


def pairs(edge_index: Tensor) -> set[tuple[int, int]]:
    found = list(map(tuple, edge_index.T.tolist()))
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("name", [*PYG, *FILTERED, *TEXTS])
def test_sets_from_their_raw_layout(name: str, tmp_path: Path) -> None:
    raw = write_raw(name, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    graph = load(name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # a read-only folder will do
    data = graph.data
    torch.testing.assert_close(data.x, torch.from_numpy(raw.x.astype(np.float32)))
    assert torch.equal(data.y, torch.from_numpy(raw.y))
    edges = {tuple(pair) for pair in raw.edges.tolist()}
    assert pairs(data.edge_index) == (
        edges if name in ONE_WAY else edges | {(b, a) for a, b in edges}
    )
    assert graph.num_outputs == int(raw.y.max()) + 1
    assert graph.metric_name == ("roc_auc" if name in BY_ROC_AUC else "accuracy")
    for seed in (0, 3, 23):
        parts = {str(part): set(index.tolist()) for part, index in graph.splits(seed).items()}
        assert not any(parts[a] & parts[b] for a, b in itertools.combinations(parts, 2))
        if raw.masks is not None:
            for part, mask in raw.masks.items():
                assert parts[part] == set(
                    np.flatnonzero(mask if mask.ndim == 1 else mask[seed % len(mask)]).tolist()
                )
        else:
            labels = {part: raw.y[list(nodes)] for part, nodes in parts.items()}
            assert np.bincount(labels["train"]).tolist() == [20] * CLASSES
            assert np.bincount(labels["val"]).tolist() == [30] * CLASSES
            assert sum(map(len, parts.values())) == NODES


@pytest.mark.parametrize(
    "y", [[0] * 50 + [1] * 20 + [2] * 5 + [-1] * 9, [0, 1, 2, 3, 4], [0] * 7 + [1, 2, 3, 4]]
)
def test_stratified_splits(y: list[int]) -> None:
    """Each class to a node, however small; nodes without a label are in none."""
    labels = torch.tensor(y)
    for seed in range(7):
        split = stratified_splits(Data(y=labels), seed)
        assert torch.cat(list(split.values())).sort().values.equal((labels >= 0).nonzero().view(-1))
        for part, share in zip(MASKS, (0.6, 0.2, 0.2), strict=True):
            assert len(split[part]) >= 1
            for label in labels[labels >= 0].unique():
                assert (
                    abs(
                        int((labels[split[part]] == label).sum())
                        - share * int((labels == label).sum())
                    )
                    < 1.3
                )


def test_drawn_splits_follow_the_seed() -> None:
    store = Data(y=torch.arange(3).repeat(60))
    for split in (per_class_splits, stratified_splits):
        assert all(torch.equal(split(store, 1)[part], split(store, 1)[part]) for part in MASKS)
        assert not torch.equal(split(store, 1)["train"], split(store, 2)["train"])
    with pytest.raises(ValueError, match="a class of 50 nodes or fewer"):
        per_class_splits(Data(y=store.y[:152]), 0)


@pytest.mark.parametrize("name", [*PYG, *FILTERED, *TEXTS])
def test_missing_files_are_named_and_where_they_come_from(name: str, tmp_path: Path) -> None:
    raw = write_raw(name, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as offline:
        load(name, tmp_path / "data")
    assert all(path.name in str(offline.value) for path in raw.folder.iterdir())
    assert str(tmp_path / "data") in str(offline.value)
    source = f"experiments.convert {name}" if name in TEXTS else "http|Put them there"
    assert re.search(source, str(offline.value))
    assert not (tmp_path / "data").exists()  # a mistyped root is not made
    with pytest.raises(ValueError, match=r"dataset: got 'coraa', expected one of cora, "):
        load("coraa", tmp_path)


def test_a_download_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_raw("actor", tmp_path / "mirror")
    files = sorted(path.name for path in raw.folder.iterdir())
    root, served = tmp_path / "data", files[:-1]

    def download(url: str, folder: str, **kwargs: Any) -> None:
        name = url.rpartition("/")[2]
        if name not in served:
            raise OSError("no route to host")
        shutil.copy(raw.folder / name, folder)

    monkeypatch.setattr(actor, "download_url", download)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        load("actor", root, offline=False)
    assert not root.exists()
    served.append(files[-1])
    assert load("actor", root, offline=False).data.num_nodes == NODES
    assert sorted(path.name for path in (root / "raw").iterdir()) == files


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    raw, evil = write_raw("cora", tmp_path), Evil(tmp_path / "evil")
    (raw.folder.parent / "processed").mkdir()
    torch.save(evil, raw.folder.parent / "processed" / "data.pt")
    load("cora", tmp_path)
    (raw.folder / "ind.cora.x").write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match=r"ind.cora.x: cannot be read \(holds \w+.mkdir"):
        load("cora", tmp_path)
    assert not (tmp_path / "evil").exists()
