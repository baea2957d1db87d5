"""Messages along edges: their order, and those of some receivers."""

from __future__ import annotations

import pytest
import torch

from gmoe.edges import Edges, check_ends, check_nodes, renumber
from tests.helpers.kernels import Noted


@pytest.mark.parametrize("nodes", [2**16, 2**16 + 1])
def test_edges_are_in_the_order_of_receivers_and_then_as_given(nodes: int) -> None:
    """Up to 65,536 nodes NumPy sorts, of more torch."""
    receiver = torch.tensor([nodes - 1, 256, 1, 0, nodes - 1, 1, 32768, 255, 0])
    found = Edges.sorted(torch.arange(9), receiver, 9, nodes)
    assert found.order.tolist() == found.sender.tolist() == [3, 8, 2, 5, 7, 1, 6, 0, 4]
    assert found.ptr[[0, 1, 2, -2, -1]].tolist() == [0, 2, 4, 7, 9]
    # Among few, torch's sort keeps the order of equals without being asked to.
    many = torch.arange(300) * 7 % 3
    expected = sorted(range(300), key=many.tolist().__getitem__)
    assert Edges.sorted(torch.arange(300), many, 300, nodes).order.tolist() == expected


def test_the_messages_of_some_receivers_come_receiver_by_receiver() -> None:
    edges = Edges.sorted(torch.arange(5), torch.tensor([2, 0, 2, 1, 2]), 5, 4)
    for number in (None, 7):  # is the number of messages known?
        found = edges.of(torch.tensor([2, 3, 0, 2]), number)
        assert found.sender.tolist() == [0, 2, 4, 1, 0, 2, 4]
        assert edges.sender[found.order].tolist() == found.sender.tolist()
        assert found.receiver.tolist() == [0, 0, 0, 2, 3, 3, 3]
        assert found.ptr.tolist() == [0, 3, 3, 4, 7]


def test_the_nodes_of_a_part_are_numbered_with_the_given_ones_first() -> None:
    nodes, place = renumber(torch.tensor([7, 2]), torch.tensor([5, 2, 9, 5, 7]))
    assert nodes[:2].tolist() == [7, 2]
    assert sorted(nodes.tolist()) == [2, 5, 7, 9]
    assert nodes[place].tolist() == [5, 2, 9, 5, 7]


def test_edges_outside_the_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^edge_index: got nodes 0..6, expected values in 0..5"):
        Edges.sorted(torch.tensor([0, 6]), torch.tensor([0, 1]), 6, 6)


def test_off_the_cpu_edges_are_checked_on_the_device_without_a_wait() -> None:
    """The device of no values stands for a GPU."""
    with Noted() as noted:
        check_nodes(torch.randint(6, (20,)).to("meta"), 6)
    assert "_assert_async" in noted.names


@pytest.mark.parametrize("num_edges", [0, 1, 2, 7])
@pytest.mark.parametrize("num_senders", [6, 5])
def test_whichever_edge_is_outside_is_found(num_senders: int, num_edges: int) -> None:
    ends = torch.randint(5, (2, num_edges))
    check_ends(ends, num_senders, 6)
    for edge in range(num_edges):
        for end, wrong in ((0, -1), (0, num_senders), (1, -1), (1, 6)):
            changed = ends.clone()
            changed[end, edge] = wrong
            with pytest.raises(ValueError, match=rf"^edge_index: got nodes .*{wrong}"):
                check_ends(changed, num_senders, 6)


@pytest.mark.parametrize(("nodes", "by_torch"), [(2**16, False), (2**16 + 1, True)])
def test_receivers_that_fit_sixteen_bits_are_sorted_by_numpy(nodes: int, by_torch: bool) -> None:
    with Noted() as noted:
        Edges.sorted(torch.tensor([0, 1]), torch.tensor([1, 0]), nodes, nodes)
    assert bool({"argsort", "sort"} & noted.names) == by_torch
