"""Planted OGB graphs: the layout is complete, the structure is as described, and there is something to learn."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch_geometric.utils import contains_self_loops, degree, is_undirected, scatter

import experiments.planted_ogb
import experiments.planted_papers
from experiments.convert import PAPERS, PapersFiles
from experiments.data.graph_data import GraphData
from experiments.data.ogb import OGBName, import_ogb, load_ogb
from experiments.planted_ogb import SHARES, main, write_planted
from experiments.planted_papers import PapersPlanter
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


PLANTER: dict[str, Any] = {
    "nodes": 4_000, "edges": 40_000, "features": 16, "classes": 10, "labeled": 0.5, "seed": 0, "homophily": 0.65,
    "label_noise": 0.15,
}  # fmt: skip


def papers_of(root: Path) -> tuple[dict[str, Any], NDArray[Any], dict[str, Any]]:
    """What ogb reads of the release: graph, labels and split."""
    files = PapersFiles(root)
    (graph,) = import_ogb("ogb.io.read_graph_raw").read_binary_graph_raw(str(files.data.parent))
    label = np.load(files.label)["node_label"]
    return graph, label, {part: np.loadtxt(files.split(part), dtype=int) for part in ("train", "val", "test")}


def test_papers_is_ogbs_binary_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.planted_papers, "PIECE", 1_000)
    folder = PapersPlanter(**PLANTER).write(tmp_path)
    assert folder == tmp_path / "ogbn_papers100M"
    graph, y, split = papers_of(tmp_path)
    edges, x = graph["edge_index"], graph["node_feat"]
    assert (edges.shape, str(edges.dtype), x.shape, str(x.dtype)) == ((2, 40_000), "int64", (4_000, 16), "float32")
    assert (graph["num_nodes"], graph["node_year"].shape, y.shape) == (4_000, (4_000, 1), (4_000, 1))
    assert 0 <= edges.min() < edges.max() < 4_000
    nodes = np.concatenate(list(split.values()))
    assert len(np.unique(nodes)) == len(nodes) == np.isfinite(y).sum()
    assert len(nodes) / 4_000 == pytest.approx(0.5, abs=0.03)
    assert len(split["train"]) / len(nodes) == pytest.approx(0.78, abs=0.03)
    known = np.isfinite(y[edges[0]] + y[edges[1]]).ravel()
    same = (y[edges[0]] == y[edges[1]]).ravel()[known].mean()
    assert 0.42 < same < 0.62
    degree_of = np.bincount(edges[1], minlength=4_000)
    assert degree_of.max() > 10 * np.median(degree_of)


def test_papers_labels_follow_from_features_and_neighbors(tmp_path: Path) -> None:
    PapersPlanter(**PLANTER).write(tmp_path)
    graph, y, split = papers_of(tmp_path)
    x, edges = torch.from_numpy(graph["node_feat"]), torch.from_numpy(graph["edge_index"])
    near = mean_over(x, torch.cat([edges, edges.flip(0)], dim=1), len(x))

    def score(x: Tensor) -> float:
        model = LogisticRegression(C=0.1, max_iter=200).fit(x[split["train"]], y[split["train"], 0])
        return float(model.score(x[split["test"]], y[split["test"], 0]))

    assert 0.4 < score(x) < score(torch.cat([x, near], dim=1)) - 0.05


def test_papers_is_drawn_by_its_seed(tmp_path: Path) -> None:
    first, again, other = (
        contents(PapersPlanter(**PLANTER | {"seed": seed}).write(tmp_path / str(i))) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first["raw/data.npz"] != other["raw/data.npz"]
    assert b"Not OGB's ogbn-papers100M" in first["PLANTED.txt"]


def test_papers_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.planted_papers, "PIECE", 5_000)
    tracemalloc.start()
    folder = PapersPlanter(**PLANTER | {"nodes": 50_000, "edges": 500_000}).write(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 < (folder / "raw" / "data.npz").stat().st_size / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 173}, "classes: got 173, expected 2 to 172"),
        ({"edges": 0}, "edges: got 0"),
        ({"labeled": 1.5}, "labeled: got 1.5, expected between"),
        ({"labeled": 0.01}, "labeled: got 0.01 of 4000 nodes, expected at least 0.013"),
    ],
)
def test_papers_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PapersPlanter(**PLANTER | change)


def test_papers_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [PAPERS, "--root", str(tmp_path), "--nodes", "300", "--edges", "900", "--features", "3", "--labeled", "0.4"]
    main(args)
    assert capsys.readouterr().out.strip() == str(tmp_path / "ogbn_papers100M")
    with pytest.raises(SystemExit):
        main(args)
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ogbn-arxiv", "--root", str(tmp_path / "other"), "--labeled", "0.4"])
    assert "labeled: got 0.4 for ogbn-arxiv" in capsys.readouterr().err
