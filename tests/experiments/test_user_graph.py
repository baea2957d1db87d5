"""A user's own graph in its three forms: what is read, what is refused, and the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import HeteroData
from torch_geometric.utils import to_undirected

from experiments.config import GraphConfig
from experiments.data import load_tasks
from experiments.data.user_graph import user_graph
from experiments.train import main
from tests.experiments.user_data import (
    FORMS,
    NODES,
    SPLITS,
    Evil,
    Write,
    arrays,
    assert_holds,
    write_csv,
    write_npz,
    write_pt,
)


@pytest.mark.parametrize("form", FORMS)
def test_one_split(form: str, tmp_path: Path) -> None:
    graph = user_graph(FORMS[form](tmp_path))
    assert_holds(graph, arrays())
    for seed in (0, 7):
        split = graph.splits(seed)
        for part in ("train", "val", "test"):
            assert split[part].tolist() == np.flatnonzero(arrays()[f"{part}_masks"]).tolist()
    assert graph.metric_name == "accuracy"
    assert graph.data.edge_weight is None
    assert "edge_weight" not in graph.data


@pytest.mark.parametrize("form", ["npz", "pt"])
def test_several_splits(form: str, tmp_path: Path) -> None:
    given = arrays(SPLITS)
    graph = user_graph(FORMS[form](tmp_path, given))
    assert_holds(graph, given)
    for seed in (0, 3, SPLITS + 1):
        expected = np.flatnonzero(given["val_masks"][seed % SPLITS]).tolist()
        assert graph.splits(seed)["val"].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
def test_what_graphs_may_lack(form: str, tmp_path: Path) -> None:
    """No edges; a single feature; a class that no split has; -1 outside the splits."""
    given = arrays()
    given["edges"] = np.zeros((0, 2), dtype=np.int64)
    given["node_features"] = given["node_features"][:, :1]
    given["node_labels"][-1], given["node_labels"][-2] = -1, 5
    graph = user_graph(FORMS[form](tmp_path, given))
    assert_holds(graph, given)
    assert graph.data.edge_index.shape == (2, 0)
    assert graph.num_outputs == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node_labels": (slice(0, 20), -1)}, "a node of train_mask has label -1, expected 0 or more"),
        ({"node_labels": (slice(None), 0)}, "the largest label is 0, expected 1 or more"),
        ({"node_labels": (-1, 10**9)}, "the largest label is 1000000000, expected 1 or more, and less than"),
        ({"test_masks": (slice(None), False)}, "test_mask is empty"),
    ],
)
def test_refused_in_every_form(form: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = arrays()
    for key, (where, value) in change.items():
        given[key][where] = value
    with pytest.raises(ValueError, match=f"mine.*: {message}"):
        user_graph(FORMS[form](tmp_path, given))


@pytest.mark.parametrize("form", FORMS)
def test_roc_auc_takes_two_classes(form: str, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    two = FORMS[form](tmp_path / "two", arrays(classes=2))
    assert user_graph(two, "roc_auc").metric_name == "roc_auc"
    with pytest.raises(ValueError, match="metric: got 'roc_auc' for 3 classes, expected 'accuracy'"):
        user_graph(FORMS[form](tmp_path), "roc_auc")
    given = arrays(classes=2)
    given["node_labels"][given["val_masks"]] = 1
    (tmp_path / "one").mkdir()
    one = FORMS[form](tmp_path / "one", given)
    assert user_graph(one).num_outputs == 2
    with pytest.raises(ValueError, match="val_mask has nodes of one class only, expected both"):
        user_graph(one, "roc_auc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": None, "val_masks": None}, "edges, val_masks missing, expected the keys node_features, .*test_masks"),
        ({"edges": arrays()["edges"].T}, r"edges has shape \(2, \d+\), expected \(edges, 2\)"),
        ({"edges": np.array([0, 1])}, r"edges has shape \(2,\), expected \(edges, 2\)"),
        ({"edges": np.array([[0, 1.5]])}, "the edges hold 1.5, expected whole numbers"),
        ({"edges": np.array([[0, NODES]])}, f"an edge names node {NODES}, expected numbers in 0..{NODES - 1}"),
        ({"edges": np.array([["a", "b"]])}, "edges holds <U1, expected numbers"),
        ({"node_labels": np.linspace(0, 1, NODES)}, r"the labels hold 0\.02.*, expected whole numbers"),
        ({"node_labels": np.full(NODES, np.nan)}, "the labels hold nan, expected whole numbers"),
        ({"node_labels": np.eye(NODES)[:, :3].astype(int)}, r"the labels have shape \(40, 3\), expected one a node"),
        ({"node_labels": np.arange(7)}, r"y has shape \(7,\), expected one row for each of 40 nodes"),
        ({"node_features": np.full((NODES, 2), np.inf)}, "the features of node 0 are not all finite"),
        ({"node_features": np.ones(NODES)}, r"got features of shape \(40,\)"),
        ({"node_features": np.array(["x"] * NODES)}, "node_features holds <U1, expected numbers"),
        ({"node_features": np.array([{}] * NODES)}, "not a whole .npz file of plain arrays .*allow_pickle"),
        ({"train_masks": np.arange(5)}, "train_mask holds other values than 0 and 1, expected a mask"),
        ({"train_masks": np.ones(5, bool)}, r"train_mask has shape \(5,\), expected one row"),
        ({"train_masks": np.ones(NODES, bool)}, "node 0 is in train_mask and|node 1 is in train_mask and"),
        (
            {"train_masks": np.ones((2, NODES), bool), "val_masks": np.ones((3, NODES), bool)},
            ".*as many splits in each",
        ),
    ],
)
def test_a_wrong_npz(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{path}: ({message})"):
        user_graph(path)


def test_numbers_of_all_kinds(tmp_path: Path) -> None:
    given = arrays()
    other = {
        "node_features": given["node_features"].astype(">f2"),
        "node_labels": given["node_labels"].astype(np.float64)[:, None],
        "edges": given["edges"].astype(np.uint16),
        "train_masks": given["train_masks"].astype(np.int8),
        "val_masks": given["val_masks"].astype(np.float16),
        "test_masks": np.asfortranarray(given["test_masks"][None]),
    }
    given["node_features"] = given["node_features"].astype(np.float16).astype(np.float32)
    graph = user_graph(write_npz(tmp_path, other))
    assert_holds(graph, given)
    assert graph.splits(3)["test"].tolist() == np.flatnonzero(given["test_masks"]).tolist()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"no archive at all"])
@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_no_archive(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: "):
        user_graph(path)


@pytest.mark.parametrize("write", [write_npz, write_pt])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated(write: Write, share: float, tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"^{path}: (not a whole .npz|cannot be read as a PyG Data)"):
        user_graph(path)


def test_an_array_by_the_name_of_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.ones(3))
    path = (tmp_path / "mine.npy").rename(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match=r"not a whole \.npz file of plain arrays \(one array"):
        user_graph(path)


def test_edge_weights_and_features_of_a_pt(tmp_path: Path) -> None:
    given = arrays()
    count = len(given["edges"])
    weight, attr = torch.rand(count, 1).double(), torch.arange(count)
    more = {"edge_weight": weight, "edge_attr": attr, "name": "mine", "adj_t": torch.eye(3).to_sparse_csr()}
    graph = user_graph(write_pt(tmp_path, given, **more))
    assert_holds(graph, given)
    assert torch.equal(graph.data.edge_weight, weight.view(-1).float())
    assert torch.equal(graph.data.edge_attr, attr.float()[:, None])
    assert "name" not in graph.data
    assert "adj_t" not in graph.data


def test_an_edge_index_of_pyg(tmp_path: Path) -> None:
    given = arrays()
    graph = user_graph(write_pt(tmp_path, given, edge_index=EdgeIndex(given["edges"].T.copy())))
    assert_holds(graph, given)
    assert type(graph.data.edge_index) is Tensor


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"edge_weight": torch.ones(3)}, r"edge_weight has shape \(3,\), expected one row for each of \d+ edges"),
        ({"edge_weight": torch.ones(len(arrays()["edges"]), 2)}, r"edge_weight has shape \(\d+, 2\)"),
        ({"edge_attr": torch.ones(3, 2)}, r"edge_attr has shape \(3, 2\)"),
        ({"edge_attr": torch.full((len(arrays()["edges"]), 2), torch.nan)}, "edge_attr of edge 0 is not finite"),
        ({"x": None, "val_mask": None}, "x, val_mask missing, expected x, edge_index, y, train_mask"),
        ({"x": [[1.0]] * NODES}, "x is a list, expected a dense tensor of numbers"),
        ({"x": torch.eye(NODES).to_sparse()}, "x is a Tensor, expected a dense tensor"),
        ({"y": torch.eye(NODES)[:, :3]}, r"the labels have shape \(40, 3\)"),
        ({"y": torch.tensor(1)}, r"the labels have shape \(\), expected one a node"),
        ({"edge_index": torch.zeros(3, 4)}, r"edge_index has shape \(3, 4\), expected \(2, edges\)"),
        ({"train_mask": torch.arange(4)}, "train_mask holds other values than 0 and 1"),
        ({"train_mask": torch.tensor(True)}, r"train_mask has shape \(\), expected one row"),
        ({"train_mask": torch.ones(NODES, 1, 1, dtype=torch.bool)}, ".*expected as many splits in each"),
    ],
)
def test_a_wrong_pt(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path, **more)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        user_graph(path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_file_is_not_run(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, asked = torch.load, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    evil = Evil(tmp_path / "evil")
    path = write_pt(tmp_path, x=evil) if inside else tmp_path / "mine.pt"
    if not inside:
        torch.save(evil, path)
    monkeypatch.setattr(torch, "load", watched)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as a PyG Data .not written by torch.save, or not"):
        user_graph(path)
    assert asked == [True]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("content", "kind"), [({"x": torch.ones(3)}, "dict"), (torch.ones(3), "Tensor"), (HeteroData(), "HeteroData")]
)
def test_a_pt_of_something_else(content: Any, kind: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=f"mine.pt: got a {kind}, expected a PyG Data"):
        user_graph(tmp_path / "mine.pt")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_root: got .*none.npz, which does not exist"):
        user_graph(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"nodes\.csv is missing, expected nodes\.csv and edges\.csv"):
        user_graph(tmp_path)
    (tmp_path / "graph.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data_root: got .*graph.json, expected FILE.npz, FILE.pt, or a folder"):
        user_graph(tmp_path / "graph.json")


def command(path: Path, *args: str) -> None:
    main(
        ["graph", "--data-root", str(path), "--out", str(path.parent / "run"), "--epochs", "2", "--hidden", "8",
         "--experts", "2", "--no-progress", *args]
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_command_line(form: str, tmp_path: Path) -> None:
    several = form in ("npz", "pt")
    path = FORMS[form](tmp_path, arrays(SPLITS if several else None, classes=2))
    command(path, "--seeds", "0", "1", "--metric", "roc_auc")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "roc_auc"
    assert summary["test"]["n"] == 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["file"] == path.name
    assert config["undirected"] is True


@pytest.mark.parametrize("form", FORMS)
def test_command_line_without_edges(form: str, tmp_path: Path) -> None:
    given = arrays()
    given["edges"] = given["edges"][:0]
    command(FORMS[form](tmp_path, given), "--seeds", "0")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("write", "args", "message"),
    [
        (write_npz, ["--metric", "roc_auc"], "metric: got 'roc_auc' for 3 classes, expected 'accuracy'"),
        (write_npz, ["--edge-features"], "edge_features: got True, but mine has none"),
        (partial(write_npz, edges=np.array([[0, 99]])), [], "mine.npz: an edge names node 99, expected"),
        (partial(write_pt, x=Evil(Path("evil"))), [], "cannot be read as a PyG Data"),
        (partial(write_csv, ids=["same"] * NODES), [], "nodes.csv: line 3 has id same, expected each node's own"),
    ],
)
def test_command_line_errors(
    write: Write, args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(write(tmp_path), *args)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("evil").exists()


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "none.npz")
    assert stop.value.code == 2
    assert "none.npz, which does not exist" in capsys.readouterr().err


def test_directions_are_those_of_the_command_line(tmp_path: Path) -> None:
    given = arrays()
    path = write_npz(tmp_path, given)
    edges = torch.from_numpy(given["edges"].T)
    for undirected, expected in ((False, edges), (True, to_undirected(edges))):
        config = GraphConfig(dataset="graph", data_root=path, undirected=undirected, adjacency="edge_index")
        task = load_tasks(config)(0)
        assert task.graph is not None
        assert set(map(tuple, task.graph.edge_index.T.tolist())) == set(map(tuple, expected.T.tolist()))
