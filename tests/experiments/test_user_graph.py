"""A user's own graph in its forms: what is read, split and encoded, what is refused, and the command line."""

from __future__ import annotations

import json
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
    by_pyg,
    write_csv,
    write_npz,
    write_pt,
)

SEVERAL = [form for form in FORMS if not form.startswith("csv")]


@pytest.mark.parametrize("form", FORMS)
def test_one_split(form: str, tmp_path: Path) -> None:
    graph = user_graph(FORMS[form](tmp_path))
    assert_holds(graph, arrays())
    for seed in (0, 7):
        split = graph.splits(seed)
        assert all(split[part].tolist() == np.flatnonzero(arrays()[f"{part}_masks"]).tolist() for part in split)
    assert graph.metric_name == "accuracy"
    assert "edge_weight" not in graph.data


@pytest.mark.parametrize("form", SEVERAL)
def test_several_splits(form: str, tmp_path: Path) -> None:
    given = arrays(SPLITS)
    graph = user_graph(FORMS[form](tmp_path, given))
    for seed in (0, 3, SPLITS + 1):
        assert graph.splits(seed)["val"].tolist() == np.flatnonzero(given["val_masks"][seed % SPLITS]).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_without_masks_each_seed_draws_a_split(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {key: value for key, value in arrays().items() if not key.endswith("_masks")}
    given["node_labels"][:5] = -1  # without a label, in no part
    graph = user_graph(FORMS[form](tmp_path, given))
    assert "no masks: each seed splits it 60/20/20 by class" in capsys.readouterr().out
    first, again, other = (graph.splits(seed) for seed in (0, 0, 1))
    assert [len(first[part]) for part in first] == [21, 7, 7]
    assert sorted(torch.cat(list(first.values())).tolist()) == list(range(5, NODES))
    assert torch.equal(first["train"], again["train"])
    assert not torch.equal(first["train"], other["train"])


@pytest.mark.parametrize("form", FORMS)
def test_what_graphs_may_lack(form: str, tmp_path: Path) -> None:
    """No edges; a single feature; a class that no split has; -1 outside the splits."""
    given = arrays()
    given["edges"] = np.zeros((0, 2), dtype=np.int64)
    given["node_features"] = given["node_features"][:, :1]
    given["node_labels"][-1], given["node_labels"][-2] = -1, 5
    graph = user_graph(FORMS[form](tmp_path, given))
    assert_holds(graph, given)
    assert graph.num_outputs == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node_labels": (slice(0, 20), -1)}, "a node of train_mask has label -1, expected 0 or more"),
        ({"node_labels": (slice(None), 0)}, "the largest label is 0, expected 1 or more"),
        ({"node_labels": (-1, 10**9)}, "the largest label is 1000000000, expected 1 or more, and less than"),
        ({"test_masks": (slice(None), False)}, "test_mask of split 0 is empty"),
    ],
)
def test_refused_in_every_form(form: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = arrays()
    for key, (where, value) in change.items():
        given[key][where] = value
    with pytest.raises(ValueError, match=f"mine.*: {message}"):
        user_graph(FORMS[form](tmp_path, given))


def test_roc_auc_takes_two_classes(tmp_path: Path) -> None:
    assert user_graph(write_npz(tmp_path, arrays(classes=2)), "roc_auc").metric_name == "roc_auc"
    with pytest.raises(ValueError, match="metric: got 'roc_auc' for 3 classes, expected 'accuracy'"):
        user_graph(write_npz(tmp_path), "roc_auc")
    given = arrays(classes=2)
    given["node_labels"][given["val_masks"]] = 1
    one = write_npz(tmp_path, given)
    assert user_graph(one).num_outputs == 2
    with pytest.raises(ValueError, match="val_mask has nodes of one class only, expected both"):
        user_graph(one, "roc_auc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": None, "node_features": None}, r"x \(or node_features\), edge_index \(or edges\) missing"),
        ({"val_masks": None}, "val_mask missing, .*all masks or none"),
        ({"x": np.ones((NODES, 2))}, "got both x and node_features"),
        ({"edges": arrays()["edges"].T}, r"edges has shape \(2, \d+\), expected \(edges, 2\)"),
        ({"edges": None, "edge_index": arrays()["edges"]}, r"'edge_index' needs to be of shape \[2, num_edges\]"),
        ({"edges": np.array([[0, 1.5]])}, "the edges hold 1.5, expected whole numbers"),
        ({"edges": np.array([[0, NODES]])}, f".*found {NODES}"),
        ({"edges": np.array([["a", "b"]])}, "edges holds <U1, expected numbers"),
        ({"node_labels": np.full(NODES, np.nan)}, "the labels hold nan, expected whole numbers"),
        ({"node_labels": np.eye(NODES)[:, :3].astype(int)}, r"the labels have shape \(40, 3\), expected one a node"),
        ({"node_labels": np.arange(7)}, r"y has shape \(7,\), expected one row for each of 40 nodes"),
        ({"node_features": np.full((NODES, 2), np.inf)}, "the features of node 0 are not all finite"),
        ({"node_features": np.ones(NODES)}, r"got features of shape \(40,\)"),
        ({"node_features": np.array([{}] * NODES)}, "not a whole .npz file of plain arrays .*allow_pickle"),
        ({"train_masks": np.arange(5)}, "train_mask holds other values than 0 and 1, expected a mask"),
        ({"train_masks": np.ones(5, bool)}, r"train_mask has shape \(5,\), expected one row"),
        ({"train_masks": np.ones(NODES, bool)}, r"node \d is in train_mask and"),
        ({"edge_weight": np.ones(3)}, r"edge_weight has shape \(3,\), expected one row for each of \d+ edges"),
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


@pytest.mark.parametrize("write", [write_npz, write_pt])
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no archive", lambda whole: whole[: len(whole) // 2]])
def test_no_whole_archive(write: Write, damage: Any, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{path}: (not a whole .npz|cannot be read as a PyG Data)"):
        user_graph(path)


def test_edge_weights_and_features(tmp_path: Path) -> None:
    given = arrays()
    count = len(given["edges"])
    weight, attr = torch.rand(count, 1).double(), torch.arange(count)
    more = {"edge_weight": weight, "edge_attr": attr, "name": "mine", "adj_t": torch.eye(3).to_sparse_csr()}
    npz = by_pyg(given) | {"edge_weight": weight.numpy(), "edge_attr": attr.numpy()}
    for path in (write_pt(tmp_path, given, **more), write_npz(tmp_path, npz)):
        data = user_graph(path).data
        torch.testing.assert_close(data.edge_weight, weight.view(-1).float())
        assert torch.equal(data.edge_attr, attr.view(-1, 1).float())
        assert "name" not in data
    graph = user_graph(write_pt(tmp_path, given, edge_index=EdgeIndex(given["edges"].T.copy())))
    assert type(graph.data.edge_index) is Tensor
    data = user_graph(write_csv(tmp_path, weight=weight.view(-1).tolist())).data
    torch.testing.assert_close(data.edge_weight, weight.view(-1).float())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"edge_attr": torch.full((len(arrays()["edges"]), 2), torch.nan)}, "edge_attr of edge 0 is not finite"),
        ({"x": None, "val_mask": None}, "x, val_mask missing"),
        ({"x": [[1.0]] * NODES}, "x is a list, expected a dense tensor"),
        ({"x": torch.eye(NODES).to_sparse()}, "x is a Tensor, expected a dense tensor"),
        ({"y": torch.tensor(1)}, r"the labels have shape \(\), expected one a node"),
        ({"train_mask": torch.ones(NODES, 1, 1, dtype=torch.bool)}, "got masks of shapes"),
    ],
)
def test_a_wrong_pt(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path, **more)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        user_graph(path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_file_is_not_run(inside: bool, tmp_path: Path) -> None:
    evil = Evil(tmp_path / "evil")
    path = write_pt(tmp_path, x=evil) if inside else tmp_path / "mine.pt"
    if not inside:
        torch.save(evil, path)
    known = set(torch.serialization.get_safe_globals())
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as a PyG Data .not written by torch.save, or not"):
        user_graph(path)
    assert not (tmp_path / "evil").exists()
    assert set(torch.serialization.get_safe_globals()) == known


@pytest.mark.parametrize("content", [{"x": torch.ones(3)}, torch.ones(3), HeteroData()])
def test_a_pt_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=f"mine.pt: got a {type(content).__name__}, expected a PyG Data"):
        user_graph(tmp_path / "mine.pt")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_root: got .*none.npz, which does not exist"):
        user_graph(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"nodes\.csv is missing"):
        user_graph(tmp_path)
    (tmp_path / "graph.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data_root: got .*graph.json, expected FILE.npz, FILE.pt, or a folder"):
        user_graph(tmp_path / "graph.json")


def test_names_in_csv_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arrays()
    names = np.array(["theory", "10-K form", "NA"])[given["node_labels"]].tolist()
    names[-1] = ""  # in no split, without a label
    kind = [" b "[node % 3 == 0 :].strip() + "xyz"[node % 3] for node in range(NODES)]
    graph = user_graph(write_csv(tmp_path, given, label=names, kind=kind))
    out = capsys.readouterr().out
    assert "mine: labels are names: 10-K form = 0, NA = 1, theory = 2\n" in out
    assert "mine: columns of names, one-hot: kind (3)\n" in out
    assert graph.data.y.tolist() == [["10-K form", "NA", "theory", ""].index(name) if name else -1 for name in names]
    torch.testing.assert_close(graph.data.x[:, :3], torch.from_numpy(given["node_features"]))
    order = sorted(set(kind))
    assert graph.data.x[:, 3:].argmax(dim=1).tolist() == [order.index(name) for name in kind]
    assert graph.data.x[:, 3:].sum(dim=1).eq(1).all()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([f"n{i % 101}" for i in range(3 * NODES)], "column kind has 101 names, expected at most 100"),
        (["x"] * 7 + [""] + ["x"] * (3 * NODES - 8), "line 9 has no kind, expected a name"),
        (["1.5"] * 7 + ["x"] + ["1"] * (3 * NODES - 8), "line 9 has kind=x, expected a number"),
    ],
)
def test_columns_that_cannot_be_encoded(column: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = "\n".join(f"{i % 3},{kind}" for i, kind in enumerate(column))
    (folder / "nodes.csv").write_text(f"label,kind\n{rows}\n")
    (folder / "edges.csv").write_text("source,target\n0,1\n")
    with pytest.raises(ValueError, match=rf"nodes\.csv: {message}"):
        user_graph(folder)


def edit(path: Path, line: int, old: str, new: str) -> None:
    """Change one line, counted from 1, of a text file."""
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:03}" for i in range(NODES)],  # 007 is not 7
        ["NA", "nan", "None", "null", *map(str, range(NODES - 4))],  # text and numbers, and what pandas takes for none
        [f"{10**17 + i}" for i in range(NODES)],  # no float holds them
    ],
)
def test_ids_are_text(names: list[str], tmp_path: Path) -> None:
    assert_holds(user_graph(write_csv(tmp_path, ids=names)), arrays())


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """A mark of the encoding, spaces, capitals, empty lines at the end."""
    folder = write_csv(tmp_path, ids=[f"n{i}" for i in range(NODES)])
    for name in ("nodes.csv", "edges.csv"):
        text = (folder / name).read_text().replace(",", " , ").replace("train", "Train").replace("val", "valid")
        header, _, rest = text.partition("\n")
        text = header.replace(" ", "") + "\n" + rest + "\n\n"
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    graph = user_graph(folder)
    assert_holds(graph, arrays())
    assert graph.splits(0)["val"].tolist() == np.flatnonzero(arrays()["val_masks"]).tolist()


@pytest.mark.parametrize(
    ("file", "line", "old", "new", "message"),
    [
        ("edges.csv", 1, "target", "to", "no column target; got source, to"),
        ("nodes.csv", 1, "label", "class", "no column label; got id, class, f0, f1, f2, split"),
        ("nodes.csv", 1, ",", ";", "cannot be read as CSV"),
        ("nodes.csv", 1, "f1", "f0", "line 1 has a column 'f0', expected a name of its own"),
        ("nodes.csv", 1, "f1", "", "line 1 has a column '', expected a name of its own"),
        ("nodes.csv", 5, "n", "\nn", "line 5 is empty"),
        ("edges.csv", 5, "n", "x", r"line 5 has source=x\d+, which is no node"),
        ("edges.csv", 9, ",n", ",", "line 9 has target=.*, which is no node"),
        ("edges.csv", 6, "n", "n1,n", "cannot be read as CSV .*line 6"),
        ("nodes.csv", 4, "n2,", "n1,", "line 4 has id n1, expected each node's own"),
        ("nodes.csv", 4, "n2,", ",", "line 4 has id nan, expected each node's own"),
        ("nodes.csv", 7, ",", ",red", r"line 7 has label=red\d, expected a number"),
        ("nodes.csv", 3, ".", "x", r"line 3 has f0=-?\dx\d+, expected a number"),
        ("nodes.csv", 3, "0.", "1e999", r"line 3 has f0=-?inf, expected a number"),
        ("nodes.csv", 3, ",train", ",trian", "line 3 has split=trian, expected train, val, test or nothing"),
    ],
)
def test_a_wrong_csv(file: str, line: int, old: str, new: str, message: str, tmp_path: Path) -> None:
    given = arrays()
    given["train_masks"][1], given["val_masks"][1], given["test_masks"][1] = True, False, False
    folder = write_csv(tmp_path, given, ids=[f"n{i}" for i in range(NODES)])
    edit(folder / file, line, old, new)
    with pytest.raises(ValueError, match=rf"{file}: {message}"):
        user_graph(folder)


@pytest.mark.parametrize("weight", ["", "heavy", "inf"])
def test_a_weight_that_is_no_number(weight: str, tmp_path: Path) -> None:
    weights: list[Any] = [1.0] * len(arrays()["edges"])
    weights[2] = weight
    with pytest.raises(ValueError, match=r"edges\.csv: line 4 has weight=.*, expected a number"):
        user_graph(write_csv(tmp_path, weight=weights))


@pytest.mark.parametrize(("file", "content"), [("nodes.csv", "label,split\n"), ("nodes.csv", ""), ("edges.csv", "")])
def test_empty_csv(file: str, content: str, tmp_path: Path) -> None:
    folder = write_csv(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=file if not content else "mine: got features of shape|edges.csv: line 2"):
        user_graph(folder)


def command(path: Path, *args: str) -> None:
    main(
        ["graph", "--data-root", str(path), "--out", str(path.parent / "run"), "--epochs", "2", "--hidden", "8",
         "--experts", "2", "--no-progress", *args]
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_command_line(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, arrays(SPLITS if form in SEVERAL else None, classes=2))
    command(path, "--seeds", "0", "1", "--metric", "roc_auc")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "roc_auc"
    assert summary["test"]["n"] == 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["file"] == path.name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--metric", "roc_auc"], "metric: got 'roc_auc' for 3 classes, expected 'accuracy'"),
        (["--edge-features"], "edge_features: got True, but mine has none"),
        (["--data-root", "none.npz"], "none.npz, which does not exist"),
    ],
)
def test_command_line_errors(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(write_npz(tmp_path), *args)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_directions_are_those_of_the_command_line(tmp_path: Path) -> None:
    given = arrays()
    path = write_npz(tmp_path, given)
    edges = torch.from_numpy(given["edges"].T)
    for undirected, expected in ((False, edges), (True, to_undirected(edges))):
        config = GraphConfig(dataset="graph", data_root=path, undirected=undirected, adjacency="edge_index")
        task = load_tasks(config)(0)
        assert task.graph is not None
        assert set(map(tuple, task.graph.edge_index.T.tolist())) == set(map(tuple, expected.T.tolist()))
