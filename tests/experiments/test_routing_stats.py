"""What nodes are like, and how far an assignment follows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from experiments.routing_stats import alignment, node_properties, quantile_bins


def test_properties_of_a_small_graph() -> None:
    edges = torch.tensor([[1, 2, 0, 3, 3, 1], [0, 0, 1, 1, 3, 2]])  # node 3 hears itself alone
    found = node_properties(Data(edge_index=edges, y=torch.tensor([0, 0, 1, 1]), num_nodes=4))
    assert set(found) == {"label", "degree", "homophily"}
    assert found["degree"].tolist() == [2, 2, 1, 0]
    assert found["homophily"].tolist() == [2, 2, 1, 0]  # shares .5, .5, 0, and none
    several = node_properties(Data(edge_index=edges, y=torch.zeros(4, 3), num_nodes=4))  # labels a node
    assert set(several) == {"degree"}


@given(st.lists(st.integers(-3, 60), min_size=1, max_size=200), st.integers(1, 9))
def test_bins_keep_order_and_equal_values_together(values: list[int], bins: int) -> None:
    found = quantile_bins(torch.tensor(values, dtype=torch.float32), bins).tolist()
    assert len(set(found)) <= bins
    for a, i in zip(values, found, strict=True):
        for b, j in zip(values, found, strict=True):
            assert i <= j if a <= b else i >= j


def test_distinct_values_fill_the_bins_evenly_and_few_are_told_apart_however_rare() -> None:
    counts = quantile_bins(torch.randperm(800).float(), 8).bincount()
    assert [len(counts), int(counts.min()) >= 99, int(counts.max()) <= 101] == [8, True, True]
    degrees = torch.tensor([8.0] * 970 + [3.0] * 4 + [5.0] * 26)  # a grid: corners, edges, and the rest
    assert quantile_bins(degrees).unique().tolist() == [0, 1, 2]
    many = torch.cat([torch.full((900,), 50.0), torch.arange(100).float()])
    assert (quantile_bins(many)[:900] > quantile_bins(many)[900]).all()


def test_alignment_is_one_with_itself_and_none_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(8, (5000,), generator=generator)
    other = torch.randint(4, (5000,), generator=generator)
    found = alignment(experts, {"renamed": 7 - experts, "other": other})
    assert found["renamed"] == pytest.approx(1)
    assert abs(found["other"]) < 0.01
    assert abs(found["shuffled"]) < 0.01
    assert alignment(experts, {"constant": torch.zeros(5000)}) == {"constant": 0.0, "shuffled": 0.0}


def test_unlabeled_nodes_are_left_out() -> None:
    y = torch.tensor([0, 1, -1, 0])
    properties = node_properties(Data(edge_index=torch.tensor([[0, 2, 3], [1, 0, 0]]), y=y, num_nodes=4))
    assert properties["label"].tolist() == [0, 1, -1, 0]
    assert properties["homophily"][2] == -1
    assert alignment(torch.tensor([0, 1, 0, 0]), properties)["label"] == pytest.approx(1)
