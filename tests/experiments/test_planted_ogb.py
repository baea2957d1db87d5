"""Planted OGB graphs: the layout is complete, the structure is as described, and there is something to learn."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch_geometric.utils import contains_self_loops, degree, is_undirected, scatter

import experiments.planted_ogb
from experiments.data.graph_data import GraphData
from experiments.data.ogb import OGBName, load_ogb
from experiments.planted_ogb import SHARES, main, write_planted
from tests.experiments.ogb_data import NAMES

NODES, EDGES, FEATURES, CLASSES = 1_500, 12_000, 16, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    for name in NAMES:
        size = () if name == "ogbn-proteins" else (FEATURES, CLASSES)
        write_planted(name, root, NODES, EDGES, *size)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """The files, unpacked."""
    return {
        str(path.relative_to(folder)): gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def accuracy(x: Tensor, y: Tensor, graph: GraphData) -> float:
    """Of a linear model, on the test nodes."""
    train, test = graph.splits(0)["train"].numpy(), graph.splits(0)["test"].numpy()
    model = LogisticRegression(C=0.1, max_iter=200).fit(x[train], y[train])
    return float(model.score(x[test], y[test]))


def mean_over(x: Tensor, edge_index: Tensor, size: int) -> Tensor:
    return scatter(x[edge_index[0]], edge_index[1], dim_size=size, reduce="mean")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_is_the_graph(tmp_path: Path, name: OGBName) -> None:
    classes = 112 if name == "ogbn-proteins" else 5
    first, again, other = (
        contents(write_planted(name, tmp_path / str(i), 150, 300, None, classes, seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert [path for path in first if "edge.csv" in path and first[path] == other[path]] == []
    assert b"Not OGB's" in first["PLANTED.txt"]


def test_arxiv_is_a_directed_citation_graph(root: Path) -> None:
    graph = load_ogb("ogbn-arxiv", root)
    data, split = graph.data, graph.splits(0)
    assert [len(index) / NODES for index in split.values()] == pytest.approx(SHARES["ogbn-arxiv"], abs=1e-3)
    assert data.x.shape == (NODES, FEATURES)
    assert data.edge_index.unique(dim=1).shape == data.edge_index.shape == (2, EDGES)
    assert not contains_self_loops(data.edge_index)
    assert data.y.unique().tolist() == list(range(CLASSES))
    same = (data.y[data.edge_index[0]] == data.y[data.edge_index[1]]).double().mean()
    assert 0.42 < float(same) < 0.60  # 0.65 of the edges stay, 0.85² of which keep both labels
    count = degree(data.edge_index.view(-1), NODES)
    assert float(count.max()) > 10 * float(count.median())


@pytest.mark.parametrize(("name", "low"), [("ogbn-arxiv", 0.4), ("ogbn-products", 0.3)])
def test_the_graph_tells_more_than_features(root: Path, name: Any, low: float) -> None:
    graph = load_ogb(name, root)
    x, y, edges = graph.data.x, graph.data.y, graph.data.edge_index
    near = mean_over(x, torch.cat([edges, edges.flip(0)], dim=1), NODES)
    assert low < accuracy(x, y, graph) < accuracy(torch.cat([x, near], dim=1), y, graph) - 0.1


def test_products_and_proteins_are_undirected(root: Path) -> None:
    for name in ("ogbn-products", "ogbn-proteins"):
        data = load_ogb(name, root).data
        assert data.edge_index.unique(dim=1).shape == (2, 2 * EDGES)
        assert is_undirected(data.edge_index, data.edge_attr)
        assert not contains_self_loops(data.edge_index)


def test_proteins_labels_follow_from_their_edges(root: Path) -> None:
    graph = load_ogb("ogbn-proteins", root)
    data = graph.data
    assert data.edge_attr.shape == (2 * EDGES, 8)
    assert 0 <= float(data.edge_attr.min()) < float(data.edge_attr.max()) <= 1
    assert data.y.unique().tolist() == [0, 1]
    assert 0.04 < float(data.y.mean(dim=0).min()) < float(data.y.mean(dim=0).max()) < 0.41
    x = (data.x - data.x.mean(dim=0)) / data.x.std(dim=0)
    majority = max(float(data.y[:, 16].mean()), 1 - float(data.y[:, 16].mean()))
    assert accuracy(x, data.y[:, 16], graph) > majority


def test_mag_has_the_real_proportions(root: Path) -> None:
    graph = load_ogb("ogbn-mag", root)
    data, paper = graph.data, graph.data["paper"]
    counts = {"author": 2310, "field_of_study": 125, "institution": 17, "paper": NODES}
    assert data.num_nodes_dict == counts
    edges = {relation[1]: data[relation].edge_index for relation in data.edge_types}
    assert {name: edge.size(1) for name, edge in edges.items()} == {
        "cites": EDGES, "writes": 15_840, "has_topic": 16_680, "affiliated_with": 2280,
    }  # fmt: skip
    assert all(edge.unique(dim=1).shape == edge.shape for edge in edges.values())
    by_author = mean_over(paper.x, edges["writes"].flip(0), counts["author"])
    seen = torch.cat([paper.x, mean_over(by_author, edges["writes"], NODES)], dim=1)
    assert 0.3 < accuracy(paper.x, paper.y, graph) < accuracy(seen, paper.y, graph) - 0.05


@pytest.mark.parametrize(
    ("homophily", "label_noise", "low", "high"), [(0.0, 0.0, 0.05, 0.25), (1.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.15)]
)
def test_label_noise_and_homophily(
    homophily: float, label_noise: float, low: float, high: float, tmp_path: Path
) -> None:
    write_planted("ogbn-products", tmp_path, NODES, 6_000, 2, 10, homophily=homophily, label_noise=label_noise)
    data = load_ogb("ogbn-products", tmp_path).data
    assert low <= float((data.y[data.edge_index[0]] == data.y[data.edge_index[1]]).double().mean()) <= high


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ogbn-arxiv", {"classes": 41}, "classes: got 41, expected 2 to 40"),
        ("ogbn-proteins", {"classes": 100}, "classes: got 100, expected 112"),
        ("ogbn-mag", {"nodes": 300}, "nodes: got 300, expected at least 349"),
        ("ogbn-arxiv", {"edges": 0}, "edges: got 0, expected at least 1"),
        ("ogbn-arxiv", {"homophily": 1.2}, "homophily: got 1.2"),
        ("ogbn-arxiv", {"nodes": 100, "edges": 5_000}, "edges: got 5000"),
        ("ogbn-pubmed", {}, "name: got 'ogbn-pubmed'"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_planted(name, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_writing_that_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = experiments.planted_ogb._write

    def stop(path: Path, content: Any) -> None:
        if "node-feat" in path.name:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(experiments.planted_ogb, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        write_planted("ogbn-arxiv", tmp_path, 100, 100)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["ogbn-arxiv", "--root", str(tmp_path), "--nodes", "120", "--edges", "200", "--features", "3", "--seed", "4"]
    main(args)
    assert capsys.readouterr().out.strip() == str(tmp_path / "ogbn_arxiv")
    data = load_ogb("ogbn-arxiv", tmp_path).data
    assert (data.x.shape, data.num_edges) == ((120, 3), 200)
    with pytest.raises(SystemExit) as caught:
        main(args)  # what is there is never written over
    assert caught.value.code == 2
    assert "is there already" in capsys.readouterr().err
