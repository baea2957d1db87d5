"""How the arguments of a graph layer and of its calls are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.nn import GATConv, GCNConv

from gmoe import Graph
from gmoe.conv.arguments import num_destinations, two_widths, with_those_by_position

NOTHING = dict.fromkeys(("edge_weight", "edge_attr", "size"))


def test_one_width_is_that_of_sources_and_destinations() -> None:
    assert two_widths(4) == (4, 4)
    assert two_widths((4, -1)) == (4, -1)


@pytest.mark.parametrize("in_channels", [(1, 2, 3), "4", None, 0, (4, 1.5)], ids=str)
def test_other_widths_are_refused(in_channels: Any) -> None:
    with pytest.raises(ValueError, match="in_channels: got"):
        two_widths(in_channels)


def test_the_number_of_destinations_comes_from_size_or_from_the_edges() -> None:
    edge_index = torch.tensor([[0, 1], [0, 0]])
    assert num_destinations(edge_index, (2, 3)) == 3
    assert num_destinations(Graph(edge_index, (2, 1)), None) == 1
    assert num_destinations(torch.eye(5).to_sparse_csr(), None) == 5
    with pytest.raises(ValueError, match="size: got None"):
        num_destinations(edge_index, None)


def test_arguments_by_position_have_the_order_of_the_conv() -> None:
    edge_attr = torch.ones(2, 1)
    found = with_those_by_position([GATConv(1, 1)], [edge_attr], NOTHING)
    assert found == NOTHING | {"edge_attr": edge_attr}


def test_arguments_by_position_are_refused_where_convs_disagree() -> None:
    with pytest.raises(ValueError, match="by name, since the experts' convs disagree"):
        with_those_by_position([GATConv(1, 1), GCNConv(1, 1)], [torch.ones(2, 1)], NOTHING)
