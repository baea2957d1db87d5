"""Messages along edges: their order, and the sums over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.utils import softmax as pyg_softmax

from gmoe.conv import edges as module
from gmoe.conv.edges import (
    Edges,
    add_ends,
    blocks,
    check_nodes,
    dot,
    renumber,
    softmax,
    spread,
    weighted_sum,
)
from tests.gmoe.conv.masked import features, random_graph


@pytest.mark.parametrize("nodes", [2**16, 2**16 + 1])
def test_edges_are_in_the_order_of_receivers_and_then_as_given(nodes: int) -> None:
    """Up to 65,536 nodes NumPy sorts, of more torch."""
    receiver = torch.tensor([nodes - 1, 256, 1, 0, nodes - 1, 1, 32768, 255, 0])
    found = Edges.sorted(torch.arange(9), receiver, 9, nodes)
    assert found.order.tolist() == found.sender.tolist() == [3, 8, 2, 5, 7, 1, 6, 0, 4]
    assert found.ptr[[0, 1, 2, -2, -1]].tolist() == [0, 2, 4, 7, 9]


def test_operators_keep_torchs_rules() -> None:
    """Schema, fake kernel, tracing: what ``torch.compile`` needs."""
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    ends, weight, value = (
        (edges.ptr, edges.sender, edges.receiver),
        features(30, 2),
        features(7, 2, 3),
    )
    some = torch.tensor([3, 0, 8, 3])
    number = int(edges.degree[some].sum())
    torch.library.opcheck(torch.ops.gmoe.find_messages.default, (edges.ptr, some, number))
    for name, inputs in {
        "sort_edges": (receiver, sender, 9, 7, False),
        "find_messages": (edges.ptr, some, None),
        "add_loops": (*ends, 7),
        "sum_messages": (weight, value, *ends, None),
        "multiply_ends": (features(9, 2, 3), value, *ends),
        "sum_values": (weight, edges.ptr, edges.receiver, None),
    }.items():
        torch.library.opcheck(getattr(torch.ops.gmoe, name).default, inputs)


def test_loops_are_the_last_messages_of_their_receivers() -> None:
    """As if all edges had been sorted anew; the loops there were are marked."""
    sender, receiver = torch.tensor([[4, 0, 1, 1, 2, 4, 0], [0, 0, 1, 2, 2, 2, 3]])
    found, is_replaced = Edges.sorted(sender, receiver, 5, 4).with_loops(3)
    ends = torch.cat([sender, torch.arange(3)]), torch.cat([receiver, torch.arange(3)])
    expected = Edges.sorted(*ends, 5, 4)
    assert sorted(found.order[is_replaced].tolist()) == [1, 2, 4]
    for name in ("ptr", "sender", "receiver", "order"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_low_precision_is_summed_in_float32() -> None:
    """A sum of ones in bfloat16 stops at 256."""
    to_one = torch.zeros(1000, dtype=torch.long)
    ones, edges = torch.ones(1000, 1, dtype=torch.bfloat16), Edges.sorted(to_one, to_one, 1, 1)
    y = weighted_sum(ones, ones[:1, None], edges)
    assert (y.dtype, float(y)) == (torch.bfloat16, 1000.0)


@pytest.mark.parametrize("heads", [1, 2])
def test_sums_and_products_along_edges_and_their_gradients_are_those_of_each_message(
    heads: int,
) -> None:
    """Of senders whose values all heads share (one head), or with a value for each head."""
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    weight, value, query = features(30, 2), features(7, heads, 3), features(9, 2, 3)
    inputs = [part.requires_grad_() for part in (weight, value, query)]

    per_message = weight[:, :, None] * value[edges.sender]
    summed = torch.zeros(9, 2, 3, dtype=value.dtype).index_add(0, edges.receiver, per_message)
    product = (query[edges.receiver] * value[edges.sender]).sum(dim=2)
    actual = weighted_sum(weight, value, edges), dot(query, value, edges)
    for ours, plain in zip(actual, (summed, product), strict=True):
        torch.testing.assert_close(ours, plain)
        gradients = [
            torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (ours, plain)
        ]
        torch.testing.assert_close(*gradients)


def test_the_sum_of_both_ends_and_its_gradients_are_those_of_plain_indexing() -> None:
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    sent, received = features(7, 2).requires_grad_(), features(9, 2).requires_grad_()
    actual = add_ends(sent, received, edges)
    plain = sent[edges.sender] + received[edges.receiver]
    assert torch.equal(actual, plain)
    gradients = [torch.autograd.grad(y.square().sum(), (sent, received)) for y in (actual, plain)]
    torch.testing.assert_close(*gradients)


def test_what_a_receiver_has_is_spread_over_its_messages() -> None:
    """Values of any shape; the gradients are those of plain indexing."""
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    value = features(9, 2, 3).requires_grad_()
    actual, plain = spread(value, edges.ptr, edges.receiver), value[edges.receiver]
    assert torch.equal(actual, plain)
    gradients = [torch.autograd.grad(y.square().sum(), value) for y in (actual, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_edges", [0, 30])
def test_the_softmax_and_its_gradients_are_those_of_pyg(num_edges: int) -> None:
    """Also where a score is minus infinity, and of receivers without messages."""
    sender, receiver = random_graph(7, 9, num_edges)
    edges = Edges.sorted(sender, receiver, 7, 9)
    score = features(num_edges, 2)
    last = (edges.ptr[1:] - 1)[edges.degree > 1]  # of several messages to one receiver
    score[last, 0] = -torch.inf
    score.requires_grad_()
    weight = features(num_edges, 2, seed=1)
    actual, plain = softmax(score, edges), pyg_softmax(score, ptr=edges.ptr)
    torch.testing.assert_close(actual, plain)
    gradients = [torch.autograd.grad((y * weight).sum(), score) for y in (actual, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("order", [None, torch.tensor([3, 0, 4, 1, 2])])
def test_off_the_cpu_values_are_summed_without_bags(
    order: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = Edges.sorted(torch.arange(5), torch.tensor([2, 0, 2, 1, 2]), 5, 4)
    inputs = features(5, 2), edges.ptr, edges.receiver, order
    expected = module._sum_values(*inputs)
    monkeypatch.setattr(module, "SPARSE_DEVICES", ())
    torch.testing.assert_close(module._sum_values(*inputs), expected)


def test_the_messages_of_some_receivers_come_receiver_by_receiver() -> None:
    edges = Edges.sorted(torch.arange(5), torch.tensor([2, 0, 2, 1, 2]), 5, 4)
    for number in (None, 7):  # is the number of messages known?
        message, position, start = edges.of(torch.tensor([2, 3, 0, 2]), number)
        assert edges.sender[message].tolist() == [0, 2, 4, 1, 0, 2, 4]
        assert position.tolist() == [0, 0, 0, 2, 3, 3, 3]
        assert start.tolist() == [0, 3, 3, 4, 7]


def test_the_nodes_of_a_part_are_numbered_with_the_given_ones_first() -> None:
    nodes, place = renumber(torch.tensor([7, 2]), torch.tensor([5, 2, 9, 5, 7]))
    assert nodes[:2].tolist() == [7, 2]
    assert sorted(nodes.tolist()) == [2, 5, 7, 9]
    assert nodes[place].tolist() == [5, 2, 9, 5, 7]


def test_blocks_cover_all_messages_once() -> None:
    cut = list(blocks(3, 20, 2**19, torch.device("cpu")))
    assert len(cut) == 5
    assert [place for part in cut for place in range(part.start, part.stop)] == [*range(3, 20)]


def test_edges_outside_the_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^edge_index: got nodes 0..6, expected values in 0..5"):
        Edges.sorted(torch.tensor([0, 6]), torch.tensor([0, 1]), 6, 6)


class Asserts(TorchDispatchMode):
    """Counts the assertions that run on the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("aten::_assert_async")
        return func(*args, **(kwargs or {}))


def test_off_the_cpu_edges_are_checked_on_the_device_without_a_wait() -> None:
    """The device of no values stands for a GPU."""
    with Asserts() as asserts:
        check_nodes(torch.randint(6, (20,)).to("meta"), 6)
    assert asserts.count == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_off_the_cpu_sums_and_products_along_edges_are_those_on_it(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of messages, of which the last is shorter."""
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    weight, value, query = features(30, 2), features(7, heads, 3), features(9, 2, 3)
    expected = weighted_sum(weight, value, edges), dot(query, value, edges)
    monkeypatch.setattr(module, "SPARSE_DEVICES", ())
    monkeypatch.setattr(module, "NUMBERS", 40)
    actual = weighted_sum(weight, value, edges), dot(query, value, edges)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("device", "number"), [("cpu", 64), ("cuda", 2)])
def test_blocks_on_a_gpu_are_larger_than_the_caches_of_a_cpu(device: str, number: int) -> None:
    assert len(list(blocks(0, 2**20, 128, torch.device(device)))) == number


class Sorted(TorchDispatchMode):
    """Counts torch's sorts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("aten::argsort") or func.name() == "aten::sort.stable"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("nodes", "by_torch"), [(2**16, False), (2**16 + 1, True)])
def test_receivers_that_fit_sixteen_bits_are_sorted_by_numpy(nodes: int, by_torch: bool) -> None:
    with Sorted() as sorts:
        Edges.sorted(torch.tensor([0, 1]), torch.tensor([1, 0]), nodes, nodes)
    assert bool(sorts.count) == by_torch
