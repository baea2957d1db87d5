"""A user's own data.

A graph in files, and graphs that a function returns (``--data module:function``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData

from experiments.train.config import GraphConfig, HeteroConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.own_graph import own_graph
from experiments.train.kinds.graphs import Graphs, HeteroGraphs
from tests.helpers.command import quick
from tests.helpers.user_data import (
    FORMS,
    NODES,
    SPLITS,
    Evil,
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
        torch.ones(1).expand(NODES, 10**12),
        torch.ones(NODES) * 1j,
    ],
)
def test_a_wrong_pt(x: Any, tmp_path: Path) -> None:
    path = write_pt(tmp_path, x=x)
    with pytest.raises(ValueError, match=f"^{path}: .*expected (as many|a dense tensor)"):
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
    more: dict[str, Any] = {
        "edge_weight": weight,
        "name": "mine",
        "adj_t": torch.eye(3).to_sparse_csr(),
    }
    npz = by_pyg(arrays()) | {"edge_weight": weight.numpy()}
    for path in (
        write_pt(tmp_path, **more),
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
        ({"kind": kind}, "row 3 has 'kind'='nan', expected numbers alone, or at most 100 names"),
        ({"weight": ["heavy"] * edges}, "row 0 has 'weight'='heavy', expected numbers alone\\)"),
        ({"weight": [1.0, "x", *[1.0] * (edges - 2)]}, "row 1 has 'weight'='x', expected numbers"),
    ]
    for number, (columns, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=message):
            own_graph(write_csv(folder, arrays(), None, **columns))


def test_the_metric_is_that_of_the_command_line(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    with pytest.raises(ValueError, match="metric: got 'roc_auc' for 3 classes"):
        load_tasks(GraphConfig(dataset="graph", data_root=path, metric="roc_auc"))(0)
    given = arrays(classes=2)
    path = write_npz(
        tmp_path, given, node_labels=np.where(given["test_masks"], 0, given["node_labels"])
    )
    with pytest.raises(
        ValueError, match="metric: got 'roc_auc' with nodes of one class only in test"
    ):
        load_tasks(GraphConfig(dataset="graph", data_root=path, metric="roc_auc"))(0)
    path = write_npz(tmp_path, given)
    summary = quick(
        tmp_path / "run", "--data-root", str(path), "--metric", "roc_auc", preset="graph"
    )
    assert summary["metric"] == "roc_auc"


GRAPH, HETERO = GraphConfig(dataset="graph"), HeteroConfig(dataset="hetero")
SIZES = ["--layers", "2", "--hidden", "8", "--experts", "2"]


def make_graph() -> Data:
    return as_data(arrays())


def make_hetero(**more: Any) -> HeteroData:
    """40 papers with labels, and 10 authors without features."""
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["paper"].x, data["paper"].y = torch.randn(40, 3, generator=generator), torch.arange(40) % 3
    data["author"].num_nodes = 10
    ends = torch.stack([torch.randint(size, (60,), generator=generator) for size in (10, 40)])
    data["author", "writes", "paper"].edge_index = ends
    for name, value in more.items():
        data["paper"][name] = value
    return data


@pytest.mark.parametrize("preset", ["graph", "hetero"])
def test_command_line(preset: str, tmp_path: Path) -> None:
    name = f"tests.experiments.train.data.test_own_data:make_{preset}"
    summary = quick(tmp_path / "run", "--data", name, *SIZES, preset=preset)
    assert summary["config"]["data"] == name
    assert 0 <= summary["test"]["mean"] <= 1


def test_a_heterogeneous_graph() -> None:
    graph = HeteroGraphs(HETERO).own(make_hetero())
    assert (graph.target, graph.num_outputs) == ("paper", 3)
    assert graph.data.node_types == ["paper", "author"]
    assert [len(part) for part in graph.splits(0).values()] == [24, 8, 8]
    part = torch.arange(40) % 3
    masks = {f"{name}_mask": part == i for i, name in enumerate(("train", "val", "test"))}
    graph = HeteroGraphs(HETERO).own(make_hetero(**masks))
    assert graph.splits(5)["val"].tolist() == (part == 1).nonzero().view(-1).tolist()


OWN: dict[type, Callable[[Any, Any], object]] = {
    GraphConfig: lambda made, config: Graphs(config).own(made),
    HeteroConfig: lambda made, config: HeteroGraphs(config).own(made),
}


@pytest.mark.parametrize(
    ("found", "config", "message"),
    [
        (3, GRAPH, "data: got a int for graph, expected a Data"),
        (make_hetero(), GRAPH, "data: got a HeteroData for graph"),
        (HeteroData(), HETERO, "hetero: got y of no node type"),
        (make_hetero(train_mask=torch.ones(40)), HETERO, "hetero: got no val_mask, test_mask"),
    ],
)
def test_anything_else_is_refused_by_name(found: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        OWN[type(config)](found, config)
