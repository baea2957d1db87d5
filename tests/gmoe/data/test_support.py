"""The table of mini-batches in docs/support.md: every cell is tried."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Data, HeteroData

from gmoe import StoredGraph, link_neighbor_loader, neighbor_loader
from tests.helpers.sampled import graph, hetero_graph
from tests.helpers.stored_files import store

PAGE = (Path(__file__).parents[3] / "docs" / "support.md").read_text()
TABLE = PAGE.split("## Mini-batches without pyg-lib")[1].split("\n## ")[0]
HEADER, _, *ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|")
]
CITES = ("paper", "cites", "paper")


def graph_of(kind: str, folder: Path) -> Any:
    """With times of nodes and of edges."""
    if kind == "`HeteroData`":
        hetero = hetero_graph()
        hetero["paper"].node_time = torch.arange(hetero["paper"].num_nodes)
        hetero[CITES].edge_time = torch.arange(hetero[CITES].num_edges)
        return hetero
    data = graph(30, 200)
    if kind == "`StoredGraph`":
        store(folder, data)
        return StoredGraph(folder)
    data.node_time, data.edge_time = torch.arange(30), torch.arange(200)
    return data


def options_of(row: str) -> list[dict[str, Any]]:
    """What a row asks of the loader of nodes."""
    times: dict[str, Any] = {"time_attr": "node_time", "input_time": torch.tensor([9, 9])}
    asked: dict[str, list[dict[str, Any]]] = {
        "neighborhoods of nodes": [{}],
        "disjoint subgraphs": [{"disjoint": True}],
        "times of nodes": [times],
        "times of edges": [times | {"time_attr": "edge_time"}],
        "weighted sampling": [{"weight_attr": "edge_weight"}],
        "induced and bidirectional subgraphs": [
            {"subgraph_type": "induced"},
            {"subgraph_type": "bidirectional"},
        ],
    }
    return asked[row]


def batch_of(data: Any, row: str, options: dict[str, Any]) -> Any:
    """The batch of two seeds, or of two links."""
    is_typed = isinstance(data, HeteroData)
    if "links" in row:
        links: Any = torch.tensor([[0, 1], [2, 3]])
        loader: Any = link_neighbor_loader(
            data, [2], (CITES, links) if is_typed else links, None, 2, neg_sampling="binary",
            backend="gmoe",
        )  # fmt: skip
    else:
        seeds: Any = ("paper", [0, 1]) if is_typed else [0, 1]
        loader = neighbor_loader(data, [2], seeds, 2, backend="gmoe", **options)
    (batch,) = loader
    return batch


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@pytest.mark.parametrize("column", range(1, len(HEADER)), ids=lambda column: HEADER[column])
def test_every_cell_holds(row: list[str], column: int, tmp_path: Path) -> None:
    data = graph_of(HEADER[column], tmp_path)
    for options in [{}] if "links" in row[0] else options_of(row[0]):
        if row[column] == "refused":
            with pytest.raises(ValueError, match=rf"^({'|'.join(options)}): got"):
                batch_of(data, row[0], options)
            continue
        assert row[column] == "yes"
        batch = batch_of(data, row[0], options)
        store_of_seeds = batch if isinstance(batch, Data) else batch["paper"]
        assert len(store_of_seeds.n_id) >= 2
        is_disjoint = bool(re.search("times|disjoint", row[0]))
        assert (store_of_seeds.get("batch") is not None) == is_disjoint
