"""Planted OGB graphs: ogb reads them, and neighbors tell the class to who knows a node's regime."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch_geometric.utils import is_undirected, scatter

from experiments.convert.planted import SIZES, main, write_planted
from experiments.train.data.ogb import load_ogb
from tests.helpers.command import refused

NODES, EDGES, CLASSES = 3_000, 24_000, 8


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-products"])
def test_experts_by_regime_learn_more_of_neighbors(tmp_path: Path, name: str) -> None:
    write_planted(name, tmp_path, NODES, EDGES, CLASSES)
    graph = load_ogb(name, tmp_path)
    x, y, edges = graph.data.x, graph.data.y, graph.data.edge_index
    assert edges.unique(dim=1).shape == edges.shape
    assert name == "ogbn-arxiv" or is_undirected(edges)
    both = torch.cat([edges, edges.flip(0)], dim=1)
    near = scatter(x[both[0]], both[1], dim_size=NODES, reduce="mean")
    by_regime = (
        torch.nn.functional.one_hot(x[:, :4].argmax(dim=1), 4).float()[:, :, None] * near[:, None]
    ).flatten(1)
    split = graph.splits(0)

    def score(seen: Any) -> float:
        model = LogisticRegression(C=0.3, max_iter=300).fit(seen[split["train"]], y[split["train"]])
        return float(model.score(seen[split["test"]], y[split["test"]]))

    assert (
        1 / CLASSES < score(x) < score(torch.cat([x, near], dim=1)) + 0.05 < score(by_regime) - 0.1
    )


@pytest.mark.parametrize("name", SIZES)
def test_the_seed_is_the_graph(tmp_path: Path, name: str) -> None:
    def files(folder: str, seed: int) -> dict[str, bytes]:
        made = write_planted(name, tmp_path / folder, 1000, 300, 5, seed=seed)
        assert "Not OGB's" in (made / "PLANTED.txt").read_text()
        return {path.name: gzip.open(path, "rb").read() for path in made.rglob("*.gz")}

    first, again, other = files("first", 1), files("again", 1), files("other", 2)
    assert first == again
    assert first["edge.csv.gz"] != other["edge.csv.gz"]


def test_what_is_there_stays_and_arguments_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ogbn-arxiv", "--root", str(tmp_path), "--edges", "200"]
    assert "nodes: got 30, expected at least 100" in refused([*args, "--nodes", "30"], capsys, main)
    assert "name: got 'ogbn-pubmed'" in refused(["ogbn-pubmed", *args[1:]], capsys, main)
    assert list(tmp_path.iterdir()) == []
    main([*args, "--nodes", "120"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "ogbn_arxiv")
    assert "is there already" in refused([*args, "--nodes", "120"], capsys, main)
    assert list(tmp_path.iterdir()) == [tmp_path / "ogbn_arxiv"]
