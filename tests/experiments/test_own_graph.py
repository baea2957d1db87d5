"""A user's own graph in its forms: what is read, split and encoded, what is refused, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_geometric.data import HeteroData
from torch_geometric.utils import to_undirected

from experiments.config import GraphConfig
from experiments.data import load_tasks
from experiments.data.own_graph import own_graph
from experiments.train import main
from tests.experiments.user_data import (
    FORMS,
    NODES,
    SPLITS,
    Evil,
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
    graph = own_graph(FORMS[form](tmp_path))
    assert_holds(graph, arrays())
    for seed in (0, 7):
        split = graph.splits(seed)
        assert all(split[part].tolist() == np.flatnonzero(arrays()[f"{part}_masks"]).tolist() for part in split)


@pytest.mark.parametrize("form", SEVERAL)
def test_several_splits(form: str, tmp_path: Path) -> None:
    given = arrays(SPLITS)
    graph = own_graph(FORMS[form](tmp_path, given))
    for seed in (0, 3, SPLITS + 1):
        assert graph.splits(seed)["val"].tolist() == np.flatnonzero(given["val_masks"][seed % SPLITS]).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_without_masks_each_seed_draws_a_split(form: str, tmp_path: Path) -> None:
    given = {key: value for key, value in arrays().items() if not key.endswith("_masks")}
    given["node_labels"][:5] = -1  # without a label, in no part
    graph = own_graph(FORMS[form](tmp_path, given))
    first, other = graph.splits(0), graph.splits(1)
    assert [len(first[part]) for part in first] == [21, 7, 7]
    assert sorted(torch.cat(list(first.values())).tolist()) == list(range(5, NODES))
    assert not torch.equal(first["train"], other["train"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node_labels": (slice(0, 20), -1)}, "got a negative label in a split"),
        ({"node_labels": (slice(None), 0)}, "the largest label is 0, expected 1"),
        ({"node_labels": (-1, 10**9)}, "the largest label is 1000000000"),
        ({"test_masks": (slice(None), False)}, "without nodes in one part"),
        ({"node_features": (3, np.nan)}, "features of shape|row 3 has 'f0'=.?nan"),
    ],
)
def test_graphs_that_cannot_be(form: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = arrays()
    for key, (where, value) in change.items():
        given[key][where] = value
    with pytest.raises(ValueError, match=f"mine.*: .*({message})"):
        own_graph(FORMS[form](tmp_path, given))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_file_is_one_error(form: str, data: st.DataObject, tmp_path: Path) -> None:
    found = list(tmp_path.iterdir())
    path = found[0] if found else FORMS[form](tmp_path)
    file = data.draw(st.sampled_from(sorted(path.iterdir()))) if path.is_dir() else path
    whole = file.read_bytes()
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        own_graph(path)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{path}: is whole"
    file.write_bytes(whole)
    assert said.startswith(str(path))
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": None, "node_features": None}, "x, edge_index missing"),
        ({"val_masks": None}, "val_mask missing, .*all masks or none"),
        ({"x": np.ones((NODES, 2))}, "got both x and node_features"),
        ({"edges": None, "edge_index": arrays()["edges"]}, r"'edge_index' needs to be of shape \[2, num_edges\]"),
        ({"edges": np.array([[0, 1.5]])}, "edge_index holds other than whole numbers"),
        ({"edges": np.array([[0, NODES]])}, f".*found {NODES}"),
        ({"edges": np.array([["a", "b"]])}, "cannot be read .*expected rows of numbers"),
        ({"node_labels": np.full(NODES, np.nan)}, "y holds other than whole numbers"),
        ({"node_labels": np.eye(NODES)[:, :3].astype(int)}, r"y has shape \(40, 3\), expected a label a node"),
        ({"node_labels": np.int64(3)}, "cannot be read .*expected rows of numbers"),
        ({"train_masks": np.arange(5)}, "train_mask holds other values than 0 and 1, expected a mask"),
        ({"edge_weight": np.ones(3)}, r"edge_weight has shape \(3,\), expected a finite number an edge"),
    ],
)
def test_a_wrong_npz(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{path}: ({message})"):
        own_graph(path)


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
    graph = own_graph(write_npz(tmp_path, other))
    assert_holds(graph, given)
    assert graph.splits(3)["test"].tolist() == np.flatnonzero(given["test_masks"]).tolist()


def test_edge_weights(tmp_path: Path) -> None:
    weight = torch.rand(len(arrays()["edges"])).double()
    more: dict[str, Any] = {"edge_weight": weight, "name": "mine", "adj_t": torch.eye(3).to_sparse_csr()}
    npz = by_pyg(arrays()) | {"edge_weight": weight.numpy()}
    csv = write_csv(tmp_path, weight=weight.tolist())
    for path in (write_pt(tmp_path, **more), write_npz(tmp_path, npz), csv):
        torch.testing.assert_close(own_graph(path).data.edge_weight, weight.float())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x": None, "val_mask": None}, "x, val_mask missing"),
        ({"x": [[1.0]] * NODES}, "x is a list, expected a dense tensor"),
        ({"x": torch.eye(NODES).to_sparse()}, "x is a Tensor, expected a dense tensor"),
        ({"x": torch.ones(1).expand(NODES, 10**12)}, "x claims more numbers than the file holds"),
        ({"y": torch.tensor(1)}, r"y has shape \(\), expected a label a node"),
        ({"train_mask": torch.ones(NODES, 1, 1, dtype=torch.bool)}, "got y or a mask of shape"),
    ],
)
def test_a_wrong_pt(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path, **more)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        own_graph(path)


def test_a_malicious_file_is_not_run(tmp_path: Path) -> None:
    path = write_pt(tmp_path, x=Evil(tmp_path / "evil"))
    known = set(torch.serialization.get_safe_globals())
    with pytest.raises(ValueError, match=f"^{path}: cannot be read .holds other objects than tensors"):
        own_graph(path)
    assert not (tmp_path / "evil").exists()
    assert set(torch.serialization.get_safe_globals()) == known


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_root: got .*none.npz, which does not exist"):
        own_graph(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"nodes\.csv"):
        own_graph(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"data_root: got .*mine.txt, expected FILE.npz, FILE.pt, or a folder"):
        own_graph(tmp_path / "mine.txt")
    torch.save(HeteroData(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine.pt: (cannot be read|got a HeteroData)"):
        own_graph(tmp_path / "mine.pt")


def test_names_in_csv_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arrays()
    names = np.array(["theory", "10-K form", "NA"])[given["node_labels"]].tolist()
    names[-1] = ""  # in no split, without a label
    kind = ["xyz"[node % 3] for node in range(NODES)]
    graph = own_graph(write_csv(tmp_path, given, label=names, kind=kind))
    assert "mine: labels are 10-K form, NA, theory" in capsys.readouterr().out
    assert graph.data.y.tolist() == [["10-K form", "NA", "theory", ""].index(name) if name else -1 for name in names]
    torch.testing.assert_close(graph.data.x[:, :3], torch.from_numpy(given["node_features"]))
    assert graph.data.x[:, 3:].argmax(dim=1).tolist() == ["xyz".index(name) for name in kind]


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:03}" for i in range(NODES)],  # 007 is not 7
        ["NA", "nan", "None", "null", *map(str, range(NODES - 4))],  # text and numbers, and what pandas takes for none
        [f"{10**17 + i}" for i in range(NODES)],  # no float holds them
    ],
)
def test_ids_are_text(names: list[str], tmp_path: Path) -> None:
    assert_holds(own_graph(write_csv(tmp_path, ids=names)), arrays())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("edges.csv", "target", "to", r"no column target; got \['source', 'to'\]"),
        ("nodes.csv", "label", "class", r"no column label; got \['id', 'class'"),
        ("nodes.csv", "f1", "", "got a column without a name"),
        ("edges.csv", "\nn", "\nx", r"edge 0 has 'x\d+', which is no node"),
        ("edges.csv", "\nn", "\nn1,n", "has no rows, or more fields|Expected 2 fields"),
        ("nodes.csv", "n2,", "n1,", "id is missing or given twice"),
        ("nodes.csv", "n2,", ",", "id is missing or given twice"),
        ("nodes.csv", "\nn2,", "\nn2,red", r"row 2 has 'label'='red\d', expected a number"),
        ("nodes.csv", ",train", ",trian", "got splits .*, expected train, val, test or nothing"),
    ],
)
def test_a_wrong_csv(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    folder = write_csv(tmp_path, ids=[f"n{i}" for i in range(NODES)])
    (folder / file).write_text((folder / file).read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"{file}: .*({message})"):
        own_graph(folder)


def command(path: Path, *args: str) -> None:
    main(
        ["graph", "--data-root", str(path), "--out", str(path.parent / "run"), "--epochs", "2", "--hidden", "8",
         "--experts", "2", "--no-progress", *args]
    )  # fmt: skip


@pytest.mark.parametrize("form", ["npz", "csv"])
def test_command_line(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(FORMS[form](tmp_path, arrays(classes=2)), "--seeds", "0", "1", "--metric", "roc_auc")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["metric"], summary["test"]["n"]) == ("roc_auc", 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "none" / "none.npz")
    assert stop.value.code == 2
    assert "none.npz, which does not exist" in " ".join(capsys.readouterr().err.split())


def test_directions_are_those_of_the_command_line(tmp_path: Path) -> None:
    given = arrays()
    path = write_npz(tmp_path, given)
    edges = torch.from_numpy(given["edges"].T)
    for undirected, expected in ((False, edges), (True, to_undirected(edges))):
        config = GraphConfig(dataset="graph", data_root=path, undirected=undirected, adjacency="edge_index")
        task = load_tasks(config)(0)
        assert task.graph is not None
        assert set(map(tuple, task.graph.edge_index.T.tolist())) == set(map(tuple, expected.T.tolist()))
