"""Files that are missing, broken, or half written: which one, and what to do; and nothing in them is run."""

from __future__ import annotations

import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric import datasets
from torch_geometric.data import Data
from torch_geometric.datasets import actor
from torch_geometric.io import fs

from experiments.data.guard import check_graph, readable
from experiments.data.registry import PYG, load_graph
from tests.experiments.ogb_data import truncate
from tests.experiments.pyg_data import NODES, Raw, Writer
from tests.experiments.user_data import Evil

KINDS = ("cora", "citeseer", "amazon-photo", "coauthor-cs", "wikics", "roman-empire", "actor", "chameleon")
"""One of each layout."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cut(path: Path) -> None:
    """Leave the first half, and of text no whole line at the end."""
    truncate(path)
    if path.suffix in (".txt", ".index"):
        path.write_text(path.read_text().rstrip("\n"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", KINDS)
def test_missing_files_offline(name: str, tmp_path: Path) -> None:
    raw = Writer(tmp_path / "elsewhere").write(name)
    folder = tmp_path / "data" / raw.folder.relative_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as caught:
        load_graph(name, tmp_path / "data", offline=True)
    message = str(caught.value)
    assert all(file in message for file in raw.files)
    assert f"missing in {folder}. Put the file" in message
    assert f"about {PYG[name].megabytes:g} MB" in message
    assert not (tmp_path / "data").exists()  # a mistyped root is not made
    shutil.copytree(raw.folder, folder)
    assert load_graph(name, tmp_path / "data", offline=True).data.num_nodes == len(raw.y)  # as it advised


@pytest.mark.usefixtures("no_network")
def test_some_files_missing(tmp_path: Path) -> None:
    raw = Writer(tmp_path).write("actor")
    for split in (3, 7):
        (raw.folder / f"film_split_0.6_0.2_{split}.npz").unlink()
    message = r"^actor: film_split_0.6_0.2_3.npz, film_split_0.6_0.2_7.npz missing in .*/raw\. Put the files there"
    with pytest.raises(FileNotFoundError, match=message):
        load_graph("actor", tmp_path, offline=True)


@pytest.mark.parametrize("name", ["tolokers", "cora"])
def test_a_failing_download_gives_the_same_advice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(fs, "cp", unreachable)
    with pytest.raises(FileNotFoundError) as offline:
        load_graph(name, tmp_path, offline=True)
    with pytest.raises(FileNotFoundError) as online:
        load_graph(name, tmp_path)
    assert str(online.value).startswith(str(offline.value))
    assert "(the download failed: " in str(online.value)
    assert "no route to host" in str(online.value)
    assert f"{name}: downloading about {PYG[name].megabytes:g} MB to {tmp_path}" in capsys.readouterr().out


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


def test_a_download_that_is_cut_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Writer(tmp_path / "mirror").write("actor")
    root = tmp_path / "data"
    monkeypatch.setattr(actor, "download_url", mirror(raw.folder, last="film_split_0.6_0.2_4.npz"))
    with pytest.raises(KeyboardInterrupt):
        load_graph("actor", root)
    assert not [path for path in root.rglob("*") if path.is_file()]
    monkeypatch.setattr(actor, "download_url", mirror(raw.folder))
    assert load_graph("actor", root).num_outputs == 2
    assert sorted(path.name for path in (root / "raw").iterdir()) == raw.files


def test_a_download_keeps_the_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Writer(tmp_path / "mirror").write("actor")
    own = Writer(tmp_path / "data", seed=1).write("actor")
    (own.folder / "film_split_0.6_0.2_0.npz").unlink()
    before = (own.folder / "out1_graph_edges.txt").read_bytes()
    monkeypatch.setattr(actor, "download_url", mirror(raw.folder))
    load_graph("actor", tmp_path / "data")
    assert (own.folder / "out1_graph_edges.txt").read_bytes() == before


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_raw_file_is_named(name: str, tmp_path: Path) -> None:
    raw = Writer(tmp_path).write(name)
    for file in raw.files if len(raw.files) < 10 else [*raw.files[:2], *raw.files[-2:]]:
        path = raw.folder / file
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2].rstrip(b"\n"), b"", b"<html>404: Not Found</html>"):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=r"cannot read (\S+) \(not whole\); .* Delete it") as caught:
                load_graph(name, tmp_path, offline=True)
            assert str(path) in str(caught.value)
            assert not any(other in str(caught.value) for other in raw.files if other != file and other not in file)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=file):
            load_graph(name, tmp_path, offline=True)
        path.write_bytes(whole)
    assert load_graph(name, tmp_path, offline=True).data.num_nodes == len(raw.y)


def test_a_flipped_byte_of_an_archive_is_noticed(tmp_path: Path) -> None:
    raw = Writer(tmp_path).write("questions")
    path = raw.folder / "questions.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"questions.npz \(not whole\)"):
        load_graph("questions", tmp_path, offline=True)


@pytest.mark.parametrize(
    ("name", "file"), [("amazon-photo", "data.pt"), ("wikics", "data_undirected.pt"), ("cora", "data.pt")]
)
def test_a_truncated_processed_file_is_named(name: str, file: str, tmp_path: Path) -> None:
    Writer(tmp_path).write(name)
    expected = load_graph(name, tmp_path, offline=True).data
    (path,) = tmp_path.rglob(file)
    for broken in (path.read_bytes()[: path.stat().st_size // 2], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="Delete it, and start again") as caught:
            load_graph(name, tmp_path, offline=True)
        assert f"{name}: cannot read {path} (" in str(caught.value)
    path.unlink()
    assert torch.equal(load_graph(name, tmp_path, offline=True).data.edge_index, expected.edge_index)


@pytest.mark.parametrize("name", ["minesweeper", "squirrel"])
def test_processing_that_is_cut_off_does_not_poison_the_next_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Writer(tmp_path).write(name)

    def interrupted(data: Any, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(fs, "torch_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_graph(name, tmp_path, offline=True)
    assert not list(tmp_path.rglob("*.pt"))
    monkeypatch.undo()
    assert load_graph(name, tmp_path, offline=True).data.num_nodes == len(raw.y)


def test_a_full_disk_is_not_blamed_on_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(tmp_path).write("tolokers")

    def full(data: Any, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, "torch_save", full)
    with pytest.raises(OSError, match="No space left"):
        load_graph("tolokers", tmp_path, offline=True)


@pytest.mark.parametrize("file", ["data.pt", "pre_transform.pt", "pre_filter.pt"])
def test_a_processed_folder_runs_nothing(file: str, tmp_path: Path) -> None:
    raw = Writer(tmp_path).write("tolokers")
    folder = raw.folder.parent / "processed"
    folder.mkdir()
    torch.save(Evil(tmp_path / "evil"), folder / file)
    if file == "data.pt":
        with pytest.raises(ValueError, match=f"cannot read {folder / file}"):
            load_graph("tolokers", tmp_path, offline=True)
    else:
        load_graph("tolokers", tmp_path, offline=True)
    assert not (tmp_path / "evil").exists()


def test_looking_whether_a_file_is_whole_runs_nothing(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "evil")
    (tmp_path / "ind.cora.x").write_bytes(pickle.dumps(evil))
    np.savez(tmp_path / "a.npz", a=np.array([evil], dtype=object))
    assert readable(tmp_path / "ind.cora.x")
    assert readable(tmp_path / "a.npz")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["roman-empire", "wikics", "chameleon", "cora"])
def test_the_node_with_nan_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Writer.graph

    def with_nan(self: Writer, *args: Any, **kwargs: Any) -> Any:
        x, y, edges = graph(self, *args, **kwargs)
        x[71, 2] = np.nan
        return x, y, edges

    if name == "chameleon":
        raw = Writer(tmp_path).write(name)
        table = raw.folder / "out1_node_feature_label.txt"
        lines = table.read_text().split("\n")
        lines[72] = lines[72].replace("1,", "nan,", 1)
        table.write_text("\n".join(lines))
    else:
        monkeypatch.setattr(Writer, "graph", with_nan)
        Writer(tmp_path).write(name)
    with pytest.raises(ValueError, match=f"^{name}: the features of node 71 are not all finite"):
        load_graph(name, tmp_path, offline=True)


def rewrite(raw: Raw, **changes: Any) -> None:
    (path,) = raw.folder.iterdir()
    with np.load(path) as file:
        np.savez(path, **{**file, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": np.array([[0, NODES]])}, f"an edge names node {NODES}, expected numbers in 0..{NODES - 1}"),
        ({"edges": np.array([[-3, 1]])}, "an edge names node -3, expected"),
        ({"node_features": np.ones((NODES, 0), np.float32)}, r"got features of shape \(120, 0\)"),
        ({"node_labels": np.zeros(7, np.int64)}, r"y has shape \(7,\), expected one row for each of 120 nodes"),
        ({"val_masks": np.zeros((10, 5), bool)}, r"val_mask has shape \(5, 10\), expected one row"),
        ({"val_masks": np.zeros((10, NODES), bool)}, "val_mask of split 0 is empty"),
        ({"val_masks": np.ones((10, NODES), bool)}, "node 0 is in train_mask and val_mask|node 0 is in val_mask and"),
        ({"val_masks": np.ones((3, NODES), bool)}, "expected as many splits in each"),
        ({"node_labels": np.full(NODES, -1)}, "a node of train_mask has label -1, expected 0 or more"),
        ({"edges": "no"}, r"cannot read \S+/questions.npz \("),
    ],
)
def test_files_that_are_whole_but_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    rewrite(Writer(tmp_path).write("questions"), **changes)
    with pytest.raises(ValueError, match=message):
        load_graph("questions", tmp_path, offline=True)


def test_the_second_of_several_splits_may_not_be_empty() -> None:
    mask = torch.eye(3, dtype=torch.bool)[:, :, None].repeat(1, 1, 2)
    mask[1, :, 1] = False
    data = Data(x=torch.ones(3, 1), edge_index=torch.empty(2, 0, dtype=torch.long), y=torch.arange(3))
    data.update(dict(zip(("train_mask", "val_mask", "test_mask"), mask, strict=True)))
    with pytest.raises(ValueError, match="g: val_mask of split 1 is empty"):
        check_graph("g", data)
    mask[1, 0, 1] = True
    with pytest.raises(ValueError, match="g: node 0 is in train_mask and val_mask"):
        check_graph("g", data)


def test_pyg_reads_what_is_processed_here(tmp_path: Path) -> None:
    Writer(tmp_path).write("tolokers")
    safe = torch.serialization.get_safe_globals()
    ours = load_graph("tolokers", tmp_path, offline=True).data
    assert set(torch.serialization.get_safe_globals()) == set(safe)
    theirs = datasets.HeterophilousGraphDataset(str(tmp_path), "Tolokers")[0]
    assert torch.equal(ours.edge_index, theirs.edge_index)
