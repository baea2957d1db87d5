"""Planted OGB graphs: the layout is complete, the structure is as described, and there is something to learn."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch_geometric.utils import contains_self_loops, degree, is_undirected, scatter

import experiments.planted_ogb
from experiments.data.ogb_layout import RELATIONS, OGBName, layout_of
from experiments.data.ogb_nodes import load_ogb
from experiments.planted_ogb import SHARES, SIZES, main, write_planted

NAMES: tuple[OGBName, ...] = get_args(OGBName)
NODES, EDGES, FEATURES, CLASSES = 1_500, 12_000, 16, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    for name in NAMES:
        if name == "ogbn-proteins":
            write_planted(name, root, NODES, EDGES)
        else:
            write_planted(name, root, NODES, EDGES, FEATURES, CLASSES)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """The files, unpacked."""
    return {
        str(path.relative_to(folder)): gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def accuracy(x: Tensor, y: Tensor, split: dict[str, Tensor]) -> float:
    """Of a linear model, on the test nodes."""
    model = LogisticRegression(C=0.1, max_iter=200).fit(x[split["train"]].numpy(), y[split["train"]].numpy())
    return float(model.score(x[split["test"]].numpy(), y[split["test"]].numpy()))


def mean_over(x: Tensor, edge_index: Tensor, size: int) -> Tensor:
    return scatter(x[edge_index[0]], edge_index[1], dim_size=size, reduce="mean")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_ogb_is_there(root: Path, name: OGBName) -> None:
    layout = layout_of(name, root)
    written = {layout.folder / path for path in contents(layout.folder) if not path.startswith("processed")}
    not_needed = {layout.planted}
    if name == "ogbn-mag":
        not_needed |= {layout.raw("nodetype-has-feat"), *(layout.raw("edge_reltype", r) for r in RELATIONS)}
    assert written == {layout.release, *layout.tables, *layout.headed, *not_needed}
    assert "Not OGB's" in layout.planted.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_seed_is_the_graph(tmp_path: Path, name: OGBName) -> None:
    classes = 112 if name == "ogbn-proteins" else 5
    folders = [
        write_planted(name, tmp_path / str(i), 150, 300, None, classes, seed) for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = map(contents, folders)
    assert first == again
    assert [path for path in first if "edge.csv" in path and first[path] == other[path]] == []


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_the_real_shares(root: Path, name: OGBName) -> None:
    _, split = load_ogb(name, root)
    assert [len(index) / NODES for index in split.values()] == pytest.approx(SHARES[name], abs=1e-3)


def test_arxiv_is_a_directed_citation_graph(root: Path) -> None:
    graph, split = load_ogb("ogbn-arxiv", root)
    assert graph.x.shape == (NODES, FEATURES)
    assert graph.edge_index.shape == (2, EDGES)
    assert len(graph.edge_index.unique(dim=1).T) == EDGES
    assert not contains_self_loops(graph.edge_index)
    year = graph.node_year
    assert (year[graph.edge_index[0]] >= year[graph.edge_index[1]]).all()
    assert int(year[split["train"]].max()) == 2017
    assert int(year[split["train"]].min()) >= 1971
    assert year[split["val"]].unique().tolist() == [2018]
    assert year[split["test"]].unique().tolist() == [2019]
    assert graph.y.unique().tolist() == list(range(CLASSES))
    same = (graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]).double().mean()
    assert 0.42 < float(same) < 0.60  # 0.65 of the edges stay, 0.85² of which keep both labels
    count = degree(graph.edge_index.view(-1), NODES)
    assert float(count.max()) > 10 * float(count.median())


@pytest.mark.parametrize(("name", "low", "gain"), [("ogbn-arxiv", 0.4, 0.1), ("ogbn-products", 0.3, 0.1)])
def test_graph_tells_more_than_features(root: Path, name: Any, low: float, gain: float) -> None:
    graph, split = load_ogb(name, root)
    both_ways = torch.cat([graph.edge_index, graph.edge_index.flip(0)], dim=1)
    alone = accuracy(graph.x, graph.y, split)
    assert alone > low
    assert accuracy(torch.cat([graph.x, mean_over(graph.x, both_ways, NODES)], dim=1), graph.y, split) > alone + gain


def test_products_and_proteins_are_undirected(root: Path) -> None:
    for name in ("ogbn-products", "ogbn-proteins"):
        graph, _ = load_ogb(name, root)
        assert graph.edge_index.shape == (2, 2 * EDGES)
        assert len(graph.edge_index.unique(dim=1).T) == 2 * EDGES
        assert is_undirected(graph.edge_index, graph.edge_attr)
        assert not contains_self_loops(graph.edge_index)


def test_proteins(root: Path) -> None:
    graph, split = load_ogb("ogbn-proteins", root)
    assert graph.edge_attr.shape == (2 * EDGES, 8)
    assert 0 <= float(graph.edge_attr.min()) < float(graph.edge_attr.max()) <= 1
    species = graph.node_species
    assert torch.equal(species[graph.edge_index[0]], species[graph.edge_index[1]])
    parts = [species[index].unique().tolist() for index in split.values()]
    assert [len(part) for part in parts] == [6, 1, 1]
    assert len({s for part in parts for s in part}) == 8
    assert graph.y.shape == (NODES, 112)
    assert graph.y.unique().tolist() == [0, 1]
    rate = graph.y.mean(dim=0)
    assert 0.04 < float(rate.min()) < float(rate.max()) < 0.41

    train, test = split["train"].numpy(), split["test"].numpy()
    x: NDArray[Any] = ((graph.x - graph.x.mean(dim=0)) / graph.x.std(dim=0)).numpy()
    scores = []
    for task in range(0, 112, 16):
        y = graph.y[:, task].numpy()
        model = LogisticRegression().fit(x[train], y[train])
        scores.append(roc_auc_score(y[test], model.decision_function(x[test])))
    assert np.mean(scores) > 0.8


def test_mag(root: Path) -> None:
    graph, split = load_ogb("ogbn-mag", root)
    assert {kind: graph[kind].num_nodes for kind in graph.node_types} == {
        "author": 2310,
        "field_of_study": 125,
        "institution": 17,
        "paper": NODES,
    }
    count = {relation[1]: graph[relation].num_edges for relation in graph.edge_types}
    assert count == {"cites": EDGES, "writes": 15_840, "has_topic": 16_680, "affiliated_with": 2280}
    for relation in graph.edge_types:
        assert len(graph[relation].edge_index.unique(dim=1).T) == graph[relation].num_edges
    paper = graph["paper"]
    source, destination = graph["paper", "cites", "paper"].edge_index
    assert (paper.node_year[source] >= paper.node_year[destination]).all()
    assert (source != destination).all()
    assert int(paper.node_year.min()) >= 2010

    alone = accuracy(paper.x, paper.y, split)
    seen = [paper.x]
    for relation in [("author", "writes", "paper"), ("paper", "has_topic", "field_of_study")]:
        edge = graph[relation].edge_index
        to_paper, other = (edge, relation[0]) if relation[2] == "paper" else (edge.flip(0), relation[2])
        there = mean_over(paper.x, to_paper.flip(0), graph[other].num_nodes)
        seen.append(mean_over(there, to_paper, NODES))
        assert accuracy(torch.cat([paper.x, seen[-1]], dim=1), paper.y, split) > alone + 0.05
    assert alone > 0.3


def test_label_noise_and_homophily(tmp_path: Path) -> None:
    size = (NODES, 6_000, 2, 10)
    for homophily, low, high in ((0.0, 0.05, 0.25), (1.0, 1.0, 1.0)):
        root = tmp_path / str(homophily)
        write_planted("ogbn-products", root, *size, homophily=homophily, label_noise=0.0)
        graph, _ = load_ogb("ogbn-products", root)
        same = float((graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]).double().mean())
        assert low <= same <= high
    write_planted("ogbn-products", tmp_path / "noise", *size, homophily=1.0, label_noise=1.0)
    graph, _ = load_ogb("ogbn-products", tmp_path / "noise")
    assert float((graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]).double().mean()) < 0.15


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ogbn-arxiv", {"classes": 41}, "classes: got 41, expected 2 to 40"),
        ("ogbn-arxiv", {"classes": 1}, "classes: got 1, expected 2 to 40"),
        ("ogbn-proteins", {"classes": 100}, "classes: got 100, expected 112"),
        ("ogbn-mag", {"nodes": 300}, "nodes: got 300, expected at least 349"),
        ("ogbn-proteins", {"nodes": 50}, "nodes: got 50, expected at least 100"),
        ("ogbn-arxiv", {"edges": 0}, "edges: got 0, expected at least 1"),
        ("ogbn-arxiv", {"features": 0}, "features: got 0, expected at least 1"),
        ("ogbn-arxiv", {"homophily": 1.2}, "homophily: got 1.2, expected between 0 and 1"),
        ("ogbn-arxiv", {"label_noise": -0.1}, "label_noise: got -0.1, expected between 0 and 1"),
        ("ogbn-arxiv", {"nodes": 100, "edges": 5_000}, "edges: got 5000 between 100 and 100 nodes, expected fewer"),
        ("ogbn-pubmed", {}, "name: got 'ogbn-pubmed', expected one of ogbn-arxiv"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_planted(name, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ogbn_arxiv").mkdir()
    with pytest.raises(ValueError, match="ogbn_arxiv is there already; delete it, or give another root"):
        write_planted("ogbn-arxiv", tmp_path, 100, 100)
    assert list((tmp_path / "ogbn_arxiv").iterdir()) == []


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    graph, _ = load_ogb("ogbn-arxiv", tmp_path)
    assert graph.x.shape == (120, 3)
    assert graph.num_edges == 200
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_arxiv_of_real_size(tmp_path: Path) -> None:
    start = time.perf_counter()
    write_planted("ogbn-arxiv", tmp_path)
    assert time.perf_counter() - start < 120
    graph, _ = load_ogb("ogbn-arxiv", tmp_path)
    assert (graph.num_nodes, graph.num_edges, graph.num_features, int(graph.y.max()) + 1) == SIZES["ogbn-arxiv"]
