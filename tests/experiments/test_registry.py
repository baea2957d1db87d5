"""PyG's data sets by name: from their raw layouts; missing, broken or half written files named, nothing in them run."""

from __future__ import annotations

import itertools
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import actor
from torch_geometric.io import fs
from torchmetrics.classification import MulticlassAccuracy

from experiments.data.graph_data import MASKS, TwoClassAUROC, check_graph, per_class_splits, stratified_splits
from experiments.data.registry import FILTERED, PYG, load_graph, readable
from tests.experiments.ogb_data import truncate
from tests.experiments.pyg_data import CLASSES, NODES, Raw, Writer
from tests.experiments.user_data import Evil

BY_ROC_AUC = {"minesweeper", "tolokers", "questions"}
ONE_WAY = {"actor", "chameleon", "squirrel", "chameleon-filtered", "squirrel-filtered"}
"""Of these the edges stay as they are."""
KINDS = ("cora", "citeseer", "amazon-photo", "coauthor-cs", "wikics", "roman-empire", "actor", "chameleon")
"""One of each layout."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(fs, "cp", unreachable)


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
    assert graph.metric_name == ("roc_auc" if name in BY_ROC_AUC else "accuracy")
    assert isinstance(graph.metric(), TwoClassAUROC if name in BY_ROC_AUC else MulticlassAccuracy)
    assert graph.note
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


@pytest.mark.parametrize("name", ["chameleon", "squirrel", "actor"])
def test_duplicated_nodes_are_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Writer(tmp_path).write(name)
    load_graph(name, tmp_path, offline=True)
    assert (f"compare models on {name}-filtered" in capsys.readouterr().out) == (name != "actor")


def test_drawn_splits_follow_the_seed() -> None:
    y = torch.arange(3).repeat(60)
    for split in (per_class_splits(y), stratified_splits(y)):
        assert all(torch.equal(split(1)[part], split(1)[part]) for part in MASKS)
        assert not torch.equal(split(1)["train"], split(2)["train"])
    with pytest.raises(ValueError, match=r"class 2 has 50 nodes, expected more than 20 \+ 30"):
        per_class_splits(y[:152])(0)


@pytest.mark.parametrize("y", [[0] * 50 + [1] * 20 + [2] * 5 + [-1] * 9, [0, 1, 2, 3, 4], [0] * 7 + [1, 2, 3, 4]])
def test_stratified_splits(y: list[int]) -> None:
    """Each class to a node, however small; nodes without a label are in none."""
    labels = torch.tensor(y)
    for seed in range(7):
        split = stratified_splits(labels)(seed)
        every = torch.cat(list(split.values()))
        assert every.sort().values.tolist() == (labels >= 0).nonzero().view(-1).tolist()
        for part, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
            assert len(split[part]) >= 1  # type: ignore[index]
            for label in range(int(labels.max()) + 1):
                count = int((labels == label).sum())
                assert abs(int((labels[split[part]] == label).sum()) - share * count) < 1.3  # type: ignore[index]
    with pytest.raises(ValueError, match="got 4 nodes with a label, expected at least 5"):
        stratified_splits(labels[:4])


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset: got 'coraa', expected one of cora, .*, ogbn-mag"):
        load_graph("coraa", tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [*KINDS, "squirrel-filtered"])
def test_missing_files_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = Writer(tmp_path / "elsewhere").write(name)
    folder = tmp_path / "data" / raw.folder.relative_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as offline:
        load_graph(name, tmp_path / "data", offline=True)
    assert all(file in str(offline.value) for file in raw.files)
    assert str(folder) in str(offline.value)
    assert not (tmp_path / "data").exists()  # a mistyped root is not made
    if name in PYG:
        with pytest.raises(FileNotFoundError) as online:
            load_graph(name, tmp_path / "data")
        assert str(online.value).startswith(str(offline.value))
        assert "no route to host" in str(online.value)
        assert f"{name}: downloading about {PYG[name].megabytes:g} MB to {folder}" in capsys.readouterr().out
    shutil.copytree(raw.folder, folder, dirs_exist_ok=True)
    assert load_graph(name, tmp_path / "data", offline=True).data.num_nodes == len(raw.y)  # as it advised


def mirror(source: Path, last: str | None = None) -> Any:
    """PyG's download_url from a folder; ``last`` is cut off by the user half way."""

    def copy(url: str, folder: str, **kwargs: Any) -> str:
        name = url.rpartition("/")[2]
        path = Path(shutil.copy(source / name, folder))
        if name == last:
            truncate(path)
            raise KeyboardInterrupt
        return str(path)

    return copy


def test_a_download_is_whole_or_not_there_and_keeps_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Writer(tmp_path / "mirror").write("actor")
    root = tmp_path / "data"
    monkeypatch.setattr(actor, "download_url", mirror(raw.folder, last="film_split_0.6_0.2_4.npz"))
    with pytest.raises(KeyboardInterrupt):
        load_graph("actor", root)
    assert not [path for path in root.rglob("*") if path.is_file()]
    monkeypatch.setattr(actor, "download_url", mirror(raw.folder))
    load_graph("actor", root)
    assert sorted(path.name for path in (root / "raw").iterdir()) == raw.files
    own = Writer(tmp_path / "own", seed=1).write("actor")
    (own.folder / "film_split_0.6_0.2_0.npz").unlink()
    before = (own.folder / "out1_graph_edges.txt").read_bytes()
    load_graph("actor", tmp_path / "own")
    assert (own.folder / "out1_graph_edges.txt").read_bytes() == before


@pytest.mark.parametrize("name", KINDS)
def test_a_broken_raw_file_is_named(name: str, tmp_path: Path) -> None:
    raw = Writer(tmp_path).write(name)
    for file in raw.files if len(raw.files) < 10 else [raw.files[0], raw.files[-1]]:
        path = raw.folder / file
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2].rstrip(b"\n"), b"", b"<html>404: Not Found</html>"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=r"cannot read (\S+) \(not whole\); .* Delete it") as caught:
                load_graph(name, tmp_path, offline=True)
            assert str(path) in str(caught.value)
            assert not any(other in str(caught.value) for other in raw.files if other != file and other not in file)
        path.write_bytes(whole)
    assert load_graph(name, tmp_path, offline=True).data.num_nodes == len(raw.y)


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    raw, evil = Writer(tmp_path).write("tolokers"), Evil(tmp_path / "evil")
    folder = raw.folder.parent / "processed"
    folder.mkdir()
    for file in ("data.pt", "pre_transform.pt", "pre_filter.pt"):
        torch.save(evil, folder / file)
    load_graph("tolokers", tmp_path, offline=True)
    (tmp_path / "ind.cora.x").write_bytes(pickle.dumps(evil))
    np.savez(tmp_path / "a.npz", a=np.array([evil], dtype=object))
    assert readable(tmp_path / "ind.cora.x")  # looking whether it is whole
    assert readable(tmp_path / "a.npz")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["roman-empire", "wikics", "cora"])
def test_the_node_with_nan_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Writer.graph

    def with_nan(self: Writer, *args: Any, **kwargs: Any) -> Any:
        x, y, edges = graph(self, *args, **kwargs)
        x[71, 2] = np.nan
        return x, y, edges

    monkeypatch.setattr(Writer, "graph", with_nan)
    Writer(tmp_path).write(name)
    with pytest.raises(ValueError, match=f"^{name}: the features of node 71 are not all finite"):
        load_graph(name, tmp_path, offline=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": np.array([[0, NODES]])}, f"found {NODES}"),
        ({"edges": np.array([[-3, 1]])}, "found -3"),
        ({"node_features": np.ones((NODES, 0), np.float32)}, r"got features of shape \(120, 0\)"),
        ({"node_labels": np.zeros(7, np.int64)}, r"y has shape \(7,\), expected one row for each of 120 nodes"),
        ({"val_masks": np.zeros((10, 5), bool)}, r"val_mask has shape \(5, 10\), expected one row"),
        ({"val_masks": np.zeros((10, NODES), bool)}, "val_mask of split 0 is empty"),
        ({"val_masks": np.ones((3, NODES), bool)}, "expected as many splits in each"),
        ({"node_labels": np.full(NODES, -1)}, "a node of train_mask has label -1, expected 0 or more"),
        ({"edges": "no"}, r"cannot read \S+/questions.npz \("),
    ],
)
def test_files_that_are_whole_but_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (path,) = Writer(tmp_path).write("questions").folder.iterdir()
    with np.load(path) as file:
        np.savez(path, **{**file, **changes})
    with pytest.raises(ValueError, match=message):
        load_graph("questions", tmp_path, offline=True)


def test_each_of_several_splits_is_checked() -> None:
    mask = torch.eye(3, dtype=torch.bool)[:, :, None].repeat(1, 1, 2)
    mask[1, :, 1] = False
    data = Data(x=torch.ones(3, 1), edge_index=torch.empty(2, 0, dtype=torch.long), y=torch.arange(3))
    data.update(dict(zip(MASKS.values(), mask, strict=True)))
    with pytest.raises(ValueError, match="g: val_mask of split 1 is empty"):
        check_graph("g", data)
    mask[1, 0, 1] = True
    with pytest.raises(ValueError, match="g: node 0 is in train_mask and val_mask"):
        check_graph("g", data)
