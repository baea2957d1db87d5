"""PyG's data sets by name: from their raw layouts; missing and broken files named, nothing in them run."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.datasets import actor
from torchmetrics.classification import MulticlassAccuracy

from experiments.data.graph_data import MASKS, TwoClassAUROC, per_class_splits, stratified_splits
from experiments.data.named import FILTERED, PYG, load_graph
from tests.experiments.pyg_data import CLASSES, NODES, Raw, Writer
from tests.experiments.user_data import Evil

BY_ROC_AUC = {"minesweeper", "tolokers", "questions"}
ONE_WAY = {"actor", "chameleon", "squirrel", "chameleon-filtered", "squirrel-filtered"}
"""Of these the edges stay as they are."""
KINDS = ("citeseer", "amazon-photo", "wikics", "roman-empire", "actor", "chameleon")
"""One of each layout."""


def pairs(edge_index: Tensor) -> set[tuple[int, int]]:
    found = list(map(tuple, edge_index.T.tolist()))
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("name", [*PYG, *FILTERED])
def test_sets_from_their_raw_layout(name: str, tmp_path: Path) -> None:
    raw: Raw = Writer(tmp_path).write(name)
    before = sorted(tmp_path.rglob("*"))
    graph = load_graph(name, tmp_path, offline=True)
    assert sorted(tmp_path.rglob("*")) == before  # a read-only folder will do
    data = graph.data
    torch.testing.assert_close(data.x, torch.from_numpy(raw.x.astype(np.float32)))
    assert torch.equal(data.y, torch.from_numpy(raw.y))
    edges = {tuple(pair) for pair in raw.edges.tolist()}
    assert pairs(data.edge_index) == (edges if name in ONE_WAY else edges | {(b, a) for a, b in edges})
    assert graph.num_outputs == int(raw.y.max()) + 1
    assert isinstance(graph.metric(), TwoClassAUROC if name in BY_ROC_AUC else MulticlassAccuracy)
    for seed in (0, 3, 23):
        parts = {str(part): set(index.tolist()) for part, index in graph.splits(seed).items()}
        assert not any(parts[a] & parts[b] for a, b in itertools.combinations(parts, 2))
        if raw.masks is not None:
            for part, mask in raw.masks.items():
                chosen = mask if mask.ndim == 1 else mask[seed % len(mask)]
                assert parts[part] == set(np.flatnonzero(chosen).tolist())
        else:
            labels = {part: raw.y[list(nodes)] for part, nodes in parts.items()}
            assert np.bincount(labels["train"]).tolist() == [20] * CLASSES
            assert np.bincount(labels["val"]).tolist() == [30] * CLASSES
            assert sum(map(len, parts.values())) == NODES


@pytest.mark.parametrize("y", [[0] * 50 + [1] * 20 + [2] * 5 + [-1] * 9, [0, 1, 2, 3, 4], [0] * 7 + [1, 2, 3, 4]])
def test_stratified_splits(y: list[int]) -> None:
    """Each class to a node, however small; nodes without a label are in none."""
    labels = torch.tensor(y)
    for seed in range(7):
        split = stratified_splits(Labels(labels), seed)
        every = torch.cat(list(split.values()))
        assert every.sort().values.tolist() == (labels >= 0).nonzero().view(-1).tolist()
        for part, share in zip(MASKS, (0.6, 0.2, 0.2), strict=True):
            assert len(split[part]) >= 1
            for label in range(int(labels.max()) + 1):
                count = int((labels == label).sum())
                assert abs(int((labels[split[part]] == label).sum()) - share * count) < 1.3


class Labels:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_drawn_splits_follow_the_seed() -> None:
    store = Labels(torch.arange(3).repeat(60))
    for split in (per_class_splits, stratified_splits):
        assert all(torch.equal(split(store, 1)[part], split(store, 1)[part]) for part in MASKS)
        assert not torch.equal(split(store, 1)["train"], split(store, 2)["train"])
    with pytest.raises(ValueError, match="class 2 has 50 nodes, expected more than 50"):
        per_class_splits(Labels(store.y[:152]), 0)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset: got 'coraa', expected one of cora, .*, ogbn-mag"):
        load_graph("coraa", tmp_path)


@pytest.mark.parametrize("name", [*KINDS, "squirrel-filtered"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    raw = Writer(tmp_path / "elsewhere").write(name)
    folder = tmp_path / "data" / raw.folder.relative_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as offline:
        load_graph(name, tmp_path / "data", offline=True)
    assert all(file in str(offline.value) for file in raw.files)
    assert str(folder) in str(offline.value)
    assert not (tmp_path / "data").exists()  # a mistyped root is not made
    shutil.copytree(raw.folder, folder, dirs_exist_ok=True)
    assert load_graph(name, tmp_path / "data", offline=True).data.num_nodes == len(raw.y)  # as it advised


def test_a_download_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Writer(tmp_path / "mirror").write("actor")
    root, served = tmp_path / "data", list(raw.files[:-1])

    def download(url: str, folder: str, **kwargs: Any) -> None:
        name = url.rpartition("/")[2]
        if name not in served:
            raise OSError("no route to host")
        shutil.copy(raw.folder / name, folder)

    monkeypatch.setattr(actor, "download_url", download)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        load_graph("actor", root)
    assert not root.exists()
    served.append(raw.files[-1])
    load_graph("actor", root)
    assert sorted(path.name for path in (root / "raw").iterdir()) == raw.files


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_raw_file_is_one_error(name: str, data: st.DataObject, tmp_path: Path) -> None:
    if not any(tmp_path.iterdir()):
        Writer(tmp_path).write(name)
    path = data.draw(st.sampled_from(sorted(path for path in tmp_path.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(whole), len(whole) // 2, 0]))])
    try:
        load_graph(name, tmp_path, offline=True)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{tmp_path}: is whole"
    path.write_bytes(whole)
    assert said.startswith(str(tmp_path))
    assert len(said.splitlines()) == 1


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    raw, evil = Writer(tmp_path).write("cora"), Evil(tmp_path / "evil")
    (raw.folder.parent / "processed").mkdir()
    torch.save(evil, raw.folder.parent / "processed" / "data.pt")
    load_graph("cora", tmp_path, offline=True)
    (raw.folder / "ind.cora.x").write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match=r"ind.cora.x: cannot be read \(holds \w+.mkdir"):
        load_graph("cora", tmp_path, offline=True)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": np.array([[0, NODES]])}, f"found {NODES}"),
        ({"edges": np.array([[-3, 1]])}, "found -3"),
        ({"node_features": np.ones((NODES, 0), np.float32)}, r"got features of shape \(120, 0\)"),
        ({"node_features": np.full((NODES, 1), np.nan, np.float32)}, "expected finite numbers"),
        ({"node_labels": np.zeros(7, np.int64)}, r"y or a mask of shape \(7,\), expected a row for each of 120 nodes"),
        ({"val_masks": np.zeros((10, 5), bool)}, r"y or a mask of shape \(5, 10\)"),
        ({"val_masks": np.zeros((10, NODES), bool)}, "without nodes in one part"),
        ({"val_masks": np.ones((10, NODES), bool)}, "node 0 is in two parts"),
        ({"val_masks": np.ones((3, NODES), bool)}, "expected as many in each"),
        ({"node_labels": np.full(NODES, -1)}, "got a negative label in a split"),
        ({"edges": "no"}, "questions.npz: cannot be read"),
    ],
)
def test_files_that_are_whole_but_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (path,) = Writer(tmp_path).write("questions").folder.iterdir()
    with np.load(path) as file:
        np.savez(path, **{**file, **changes})
    with pytest.raises(ValueError, match=message):
        load_graph("questions", tmp_path, offline=True)
