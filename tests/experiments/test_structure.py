"""What nodes are like, and how far an assignment follows it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from experiments.structure import alignment, node_properties, quantile_bins


def test_properties_of_a_small_graph() -> None:
    edges = torch.tensor([[1, 2, 0, 3, 3, 1], [0, 0, 1, 1, 3, 2]])  # node 3 hears itself alone
    found = node_properties(Data(edge_index=edges, y=torch.tensor([0, 0, 1, 1]), num_nodes=4))
    in_degree, share = [2, 2, 1, 0], [0.5, 0.5, 0.0, -1.0]
    assert set(found) == {"label", "degree", "homophily"}
    for name, values in (("degree", in_degree), ("homophily", share)):
        bins = found[name].tolist()
        assert all(
            (a < b) == (i < j) for a, i in zip(values, bins, strict=True) for b, j in zip(values, bins, strict=True)
        )


def test_several_labels_a_node_leave_the_degree() -> None:
    assert set(node_properties(Data(edge_index=torch.tensor([[0], [1]]), y=torch.zeros(2, 3), num_nodes=2))) == {
        "degree"
    }


@given(st.lists(st.integers(-3, 60), min_size=1, max_size=200), st.integers(1, 9))
def test_bins_keep_order_and_equal_values_together(values: list[int], bins: int) -> None:
    found = quantile_bins(torch.tensor(values, dtype=torch.float32), bins).tolist()
    assert len(set(found)) <= bins
    for a, i in zip(values, found, strict=True):
        for b, j in zip(values, found, strict=True):
            assert i <= j if a <= b else i >= j


def test_distinct_values_fill_the_bins_evenly() -> None:
    counts = quantile_bins(torch.randperm(800).float(), 8).bincount()
    assert len(counts) == 8
    assert counts.min() >= 99
    assert counts.max() <= 101


def test_alignment_is_one_with_itself_and_none_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(8, (5000,), generator=generator)
    other = torch.randint(4, (5000,), generator=generator)
    found = alignment(experts, {"renamed": 7 - experts, "other": other})
    assert found["renamed"] == pytest.approx(1)
    assert abs(found["other"]) < 0.01
    assert abs(found["shuffled"]) < 0.01
    assert alignment(experts, {}) == {}
