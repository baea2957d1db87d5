"""Sums over messages along edges, and products of their ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.utils import softmax as pyg_softmax

from gmoe import sums as module
from gmoe.edges import Edges
from gmoe.sums import add_ends, blocks, dot, softmax, to_messages, weighted_sum
from tests.helpers.kernels import check_second_and_third_gradients
from tests.helpers.masked import features, random_graph


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


@pytest.mark.parametrize("num_edges", [0, 30])
def test_the_softmax_and_its_gradients_are_those_of_pyg(num_edges: int) -> None:
    """Also where a score is minus infinity, and of receivers without messages."""
    sender, receiver = random_graph(7, 9, num_edges)
    edges = Edges.sorted(sender, receiver, 7, 9)
    score = features(num_edges, 2)
    last = (edges.ptr[1:] - 1)[edges.ptr.diff() > 1]  # of several messages to one receiver
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


class Gathered(TorchDispatchMode):
    """The most numbers that were gathered at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == "aten::index_select":
            self.most = max(self.most, result.numel())
        return result


def test_blocks_cover_all_messages_once() -> None:
    cut = list(blocks(3, 20, 2**19, torch.device("cpu")))
    assert len(cut) == 5
    assert [place for part in cut for place in range(part.start, part.stop)] == [*range(3, 20)]


@pytest.mark.parametrize("heads", [1, 2])
def test_off_the_cpu_sums_and_products_along_edges_are_those_on_it(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of messages, of which the last is shorter, and none holds more than it may."""
    sender, receiver = random_graph(7, 9, 30)
    edges = Edges.sorted(sender, receiver, 7, 9)
    weight, value, query = features(30, 2), features(7, heads, 16), features(9, 2, 16)
    expected = weighted_sum(weight, value, edges), dot(query, value, edges)
    monkeypatch.setattr(module, "SPARSE_DEVICES", ())
    monkeypatch.setattr(module, "NUMBERS", 6 * 2 * 16 + 1)  # six messages of two heads
    with Gathered() as gathered:
        actual = weighted_sum(weight, value, edges), dot(query, value, edges)
    torch.testing.assert_close(actual, expected)
    assert gathered.most == 6 * 2 * 16


@pytest.mark.parametrize(("device", "number"), [("cpu", 64), ("cuda", 2)])
def test_blocks_on_a_gpu_are_larger_than_the_caches_of_a_cpu(device: str, number: int) -> None:
    assert len(list(blocks(0, 2**20, 128, torch.device(device)))) == number


@pytest.mark.parametrize(
    ("compute", "shapes"),
    [
        (weighted_sum, [(5, 2), (6, 2, 3)]),
        (weighted_sum, [(5, 2), (6, 1, 3)]),
        (dot, [(4, 2, 3), (6, 2, 3)]),
        (dot, [(4, 2, 3), (6, 1, 3)]),
        (add_ends, [(6, 2), (4, 2)]),
        (lambda x, edges: to_messages(x, edges.ptr, edges.receiver), [(4, 2, 3)]),
        (softmax, [(5, 2)]),
    ],
    ids=["sum", "shared sum", "dot", "shared dot", "ends", "messages", "softmax"],
)
def test_second_and_third_gradients_are_those_of_the_sums(
    compute: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    """Receiver 3 has no messages; sender 4 sends two, and sender 5 none."""
    edges = Edges.sorted(torch.tensor([4, 0, 4, 1, 2]), torch.tensor([2, 0, 2, 1, 2]), 6, 4)
    leaves = [features(*shape).requires_grad_() for shape in shapes]

    def run(*leaves: Tensor) -> Tensor:
        return compute(*(leaf.sin() for leaf in leaves), edges).square()

    check_second_and_third_gradients(run, leaves)
