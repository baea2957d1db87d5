"""What exported models compute along edges is what the kernels compute."""

from __future__ import annotations

import pytest
import torch

from gmoe.conv import edges, exported, sums

EDGES, SENDERS, RECEIVERS, HEADS, WIDTH = 40, 12, 9, 3, 5


def drawn() -> edges.Edges:
    torch.manual_seed(0)
    sender, receiver = torch.randint(SENDERS, (EDGES,)), torch.randint(RECEIVERS, (EDGES,))
    return edges.Edges.sorted(sender, receiver, SENDERS, RECEIVERS)


def test_edges_are_sorted_by_receiver_and_equals_stay_in_order() -> None:
    torch.manual_seed(0)
    sender, receiver = torch.randint(SENDERS, (EDGES,)), torch.randint(RECEIVERS, (EDGES,))
    ptr, by_sender, by_receiver, order = exported.sort_edges(sender, receiver, RECEIVERS)
    assert torch.equal(order, receiver.argsort(stable=True))
    assert torch.equal(by_receiver, receiver[order])
    assert torch.equal(by_sender, sender[order])
    assert torch.equal(ptr, drawn().ptr)


def test_positions_skip_parts_that_are_empty() -> None:
    ends = torch.tensor([0, 2, 2, 5, 5])
    assert exported.positions(ends, 5).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("for_onnx", [False, True])
def test_sums_products_and_the_largest_are_those_of_the_kernels(
    for_onnx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: for_onnx)
    graph = drawn()
    weight_MH = torch.randn(EDGES, HEADS)
    ends = graph.sender, graph.receiver
    for heads in (1, HEADS):
        value_UGC = torch.randn(SENDERS, heads, WIDTH)
        query_RHC = torch.randn(RECEIVERS, HEADS, WIDTH)
        torch.testing.assert_close(
            exported.sum_messages(weight_MH, value_UGC, graph.ptr, *ends),
            sums.weighted_sum(weight_MH, value_UGC, graph),
        )
        torch.testing.assert_close(
            exported.multiply_ends(query_RHC, value_UGC, *ends),
            sums.dot(query_RHC, value_UGC, graph),
        )
    largest_RH = exported.largest(weight_MH, graph.receiver, RECEIVERS)
    for receiver in graph.receiver.unique():
        expected = weight_MH[graph.receiver == receiver].amax(dim=0)
        assert torch.equal(largest_RH[receiver], expected)
