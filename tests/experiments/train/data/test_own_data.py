"""A user's own data.

A graph in files, and graphs that a function returns (``--data module:function``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData

from experiments.train.config import GraphConfig
from experiments.train.data.own_graph import graph_of, own_graph
from experiments.train.kinds import kind_of
from tests.helpers.command import quick
from tests.helpers.evil import Evil
from tests.helpers.user_data import (
    FORMS,
    NODES,
    SPLITS,
    arrays,
    as_data,
    assert_holds,
    by_pyg,
    write_csv,
    write_npz,
    write_pt,
)

MASKS = [
    (form, splits)
    for form in FORMS
    for splits in (None, SPLITS)
    if splits is None or "csv" not in form
]


@pytest.mark.parametrize(("form", "splits"), MASKS)
def test_masks(form: str, splits: int | None, tmp_path: Path) -> None:
    given = arrays(splits)
    graph = own_graph(FORMS[form](tmp_path, given))
    assert_holds(graph, given)
    for seed in (0, 3, SPLITS + 1):
        for part, nodes in graph.splits(seed).items():
            mask = given[f"{part}_masks"]
            assert (
                nodes.tolist() == np.flatnonzero(mask[seed % splits] if splits else mask).tolist()
            )


@pytest.mark.parametrize("form", FORMS)
def test_without_masks_each_seed_draws_a_split(form: str, tmp_path: Path) -> None:
    given = {key: value for key, value in arrays().items() if not key.endswith("_masks")}
    given["node_labels"][:5] = -1  # without a label, in no part
    graph = own_graph(FORMS[form](tmp_path, given))
    first, other = graph.splits(0), graph.splits(1)
    assert [len(first[part]) for part in first] == [21, 7, 7]
    assert sorted(torch.cat(list(first.values())).tolist()) == list(range(5, NODES))
    assert not torch.equal(first["train"], other["train"])


def test_a_class_of_one_node_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No split has it in training and in test."""
    labels = np.arange(NODES) % 2
    labels[0] = 3
    own_graph(write_npz(tmp_path, node_labels=labels))
    assert (
        "one node each, so that no split trains on it and tests it: [3]" in capsys.readouterr()[0]
    )


WRONG: dict[str, list[Any]] = {
    "edges": [
        None,
        np.array([[0, 1.5]]),
        np.array([[0, NODES]]),
        np.array([[-3, 1]]),
        np.array([["a", "b"]]),
    ],
    "edge_index": [arrays()["edges"].T],  # beside edges
    "node_features": [
        None,
        np.ones((NODES, 0)),
        np.ones(NODES),
        np.full((NODES, 1), np.nan),
        np.ones((7, 2)),
    ],
    "node_labels": [
        *(np.full(NODES, y) for y in (np.nan, 0, 1, -1, 10**9)),
        np.zeros(7, int),
        np.eye(NODES)[:, :3],
    ],
    "train_masks": [None, np.arange(NODES)],
    "val_masks": [
        np.zeros(NODES, bool),
        np.ones(NODES, bool),
        np.zeros((3, 5), bool),
        arrays(3)["val_masks"],
    ],
    "edge_weight": [np.ones(3), np.full(len(arrays()["edges"]), np.inf)],
    "train_idx": [np.arange(5)],  # a key that nothing reads
}
"""What may not stand in an npz under these names; ``None`` is nothing at all."""


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_graph(key: str, tmp_path: Path) -> None:
    for value in WRONG[key]:
        path = write_npz(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=f"^{path}: .*(expected|found) "):
            own_graph(path)


@pytest.mark.parametrize(
    "x",
    [
        [[1.0]] * NODES,
        torch.eye(NODES).to_sparse(),
        torch.ones(NODES) * 1j,
    ],
)
def test_a_wrong_pt(x: Any, tmp_path: Path) -> None:
    path = write_pt(tmp_path, x=x)
    with pytest.raises(ValueError, match=f"^{path}: .*expected a dense tensor"):
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
    npz = by_pyg(arrays()) | {"edge_weight": weight.numpy()}
    for path in (
        write_pt(tmp_path, edge_weight=weight),
        write_npz(tmp_path, npz),
        write_csv(tmp_path, weight=weight.tolist()),
    ):
        torch.testing.assert_close(own_graph(path).data.edge_weight, weight.float())


def test_a_malicious_file_is_not_run(tmp_path: Path) -> None:
    path = write_pt(tmp_path, x=Evil(tmp_path / "evil"))
    known = set(torch.serialization.get_safe_globals())
    with pytest.raises(
        ValueError, match=f"^{path}: cannot be read .holds other objects than tensors"
    ):
        own_graph(path)
    assert not (tmp_path / "evil").exists()
    assert set(torch.serialization.get_safe_globals()) == known


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(
            ValueError, match=rf"data_root: got {path}, expected FILE.npz, FILE.pt, or a folder"
        ):
            own_graph(path)
    torch.save(HeteroData(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine.pt: (cannot be read|got a HeteroData)"):
        own_graph(tmp_path / "mine.pt")


def test_names_in_csv_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arrays()
    names = np.array(["theory", "10-K form", "Inf"])[given["node_labels"]].tolist()
    names[-1] = ""  # in no split, without a label
    kind = ["xyz"[node % 3] for node in range(NODES)]
    graph = own_graph(write_csv(tmp_path, given, label=names, kind=kind))
    assert "mine: labels are 10-K form, Inf, theory" in capsys.readouterr().out
    assert graph.data.y.tolist() == [
        ["10-K form", "Inf", "theory", ""].index(name) if name else -1 for name in names
    ]
    torch.testing.assert_close(graph.data.x[:, :3], torch.from_numpy(given["node_features"]))
    assert graph.data.x[:, 3:].argmax(dim=1).tolist() == ["xyz".index(name) for name in kind]


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:03}" for i in range(NODES)],  # 007 is not 7
        [
            "NA",
            "nan",
            "None",
            "null",
            *map(str, range(NODES - 4)),
        ],  # text and numbers, and what pandas takes for none
        [f"{10**17 + i}" for i in range(NODES)],  # no float holds them
    ],
)
def test_ids_are_text(names: list[str], tmp_path: Path) -> None:
    assert_holds(own_graph(write_csv(tmp_path, ids=names)), arrays())


def test_a_wrong_csv(tmp_path: Path) -> None:
    folder = write_csv(tmp_path, ids=[f"n{i}" for i in range(NODES)])
    wrong = {
        "edges.csv": [("target", "to"), ("\nn", "\nx"), ("\nn", "\nn1,n")],  # no node; three fields
        "nodes.csv": [
            ("f1", ""),
            ("n2,", "n1,"),
            ("n2,", ","),
            ("\nn2,", "\nn2,red"),
            (",train", ",trian"),
        ],
    }
    for file, changes in wrong.items():
        whole = (folder / file).read_text()
        for old, new in changes:
            (folder / file).write_text(whole.replace(old, new, 1))
            with pytest.raises(ValueError, match=f"^{folder / file}: "):
                own_graph(folder)
        (folder / file).write_text(whole)


def test_a_wrong_cell_of_a_csv_is_named_by_its_row(tmp_path: Path) -> None:
    kind = ["red", "blue", *["red"] * (NODES - 2)]
    kind[3] = ""
    edges = len(arrays()["edges"])
    cases: list[tuple[dict[str, list[Any]], str]] = [
        ({"kind": kind}, "column kind, row: got {3: nan}, expected numbers alone, or at most 100"),
        ({"weight": ["heavy"] * edges}, "column weight, row: got {0: 'heavy'}, expected numbers"),
        ({"weight": [1.0, "x", *[1.0] * (edges - 2)]}, "column weight, row: got {1: 'x'}"),
    ]
    for number, (columns, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=re.escape(message)):
            own_graph(write_csv(folder, arrays(), None, **columns))


def test_the_metric_is_that_of_the_command_line(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    with pytest.raises(ValueError, match="metric: got 'roc_auc' for 3 classes"):
        kind_of(GraphConfig(dataset="graph", data_root=path, metric="roc_auc")).tasks()(0)
    given = arrays(classes=2)
    path = write_npz(
        tmp_path, given, node_labels=np.where(given["test_masks"], 0, given["node_labels"])
    )
    with pytest.raises(
        ValueError, match="metric: got 'roc_auc' with nodes of one class only in test of seed 0"
    ):
        kind_of(GraphConfig(dataset="graph", data_root=path, metric="roc_auc")).tasks()(0)
    path = write_npz(tmp_path, given)
    summary = quick(
        tmp_path / "run", "--data-root", str(path), "--metric", "roc_auc", preset="graph"
    )
    assert summary["metric"] == "roc_auc"


SIZES = ["--layers", "2", "--hidden", "8", "--experts", "2"]


def make_graph() -> Data:
    return as_data(arrays())


def test_command_line(tmp_path: Path) -> None:
    name = "tests.experiments.train.data.test_own_data:make_graph"
    summary = quick(tmp_path / "run", "--data", name, *SIZES, preset="graph")
    assert summary["config"]["data"] == name
    assert 0 <= summary["test"]["mean"] <= 1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "graph: got a int, expected a PyG Data"),
        (HeteroData(), "graph: got a HeteroData, expected a PyG Data"),
        (as_data(arrays(), edge_attr=torch.ones(3)), "graph: got edge_attr, expected x, y"),
    ],
)
def test_anything_else_is_refused_by_name(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        graph_of(found, "graph", "graph")
