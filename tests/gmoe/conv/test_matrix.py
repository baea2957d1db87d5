"""Matrices of sums: their precision, and whether their weights learn.

``tests/compose`` compares them within whole layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe import Graph
from gmoe.conv.adjacency import Adjacency, read_edge_index
from gmoe.conv.matrix import FEW_NUMBERS, Matrix, looped_matrix, sum_matrix
from tests.helpers.masked import features, random_graph

N = 9
OPTIONS: dict[str, Any] = {
    "loop_weight": None,
    "replace_loops": False,
    "keep_loop_weights": False,
}


def adjacency(edge_index: Tensor, nodes: int = N) -> Adjacency:
    return read_edge_index(edge_index, nodes, nodes, "source_to_target")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16])
def test_norms_of_low_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum of ones in bfloat16 stops at 256."""
    star = adjacency(torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.long)]), 1000)
    matrix = normalized_matrix(star, torch.ones(1000, dtype=dtype), **OPTIONS, dtype=dtype)
    assert matrix.right is not None
    assert float(matrix.right[0]) == pytest.approx(1000**-0.5)


def test_a_matrix_knows_whether_its_weights_learn() -> None:
    """Also where no gradient is recorded, since they may change all the same."""
    edges, weight = adjacency(random_graph(N, N, 30)), torch.ones(30)
    for learns in (False, True):
        factor = weight.clone().requires_grad_(learns)
        with torch.no_grad():
            summing = sum_matrix(edges, factor, mean=True, dtype=torch.float)
            norms = normalized_matrix(edges, factor, **OPTIONS, dtype=torch.float)
        assert summing.learns is norms.learns is learns
    assert not sum_matrix(edges, None, mean=True, dtype=torch.float).learns


def normalized_matrix(edges: Adjacency, factor: Tensor | None, **options: Any) -> Matrix:
    plain = looped_matrix(edges, factor, **options)
    return plain.scaled(plain.inverse_root(options["dtype"]))


def by_definition(matrix: Matrix, x: Tensor, mask: Tensor | None) -> Tensor:
    """L (W + I) R x, by a dense matrix."""
    ones = torch.ones(30, dtype=x.dtype)
    weight = (ones if matrix.weight is None else matrix.weight) * (ones if mask is None else mask)
    dense = torch.zeros(N, N, dtype=x.dtype)
    ends = matrix.adjacency.receiver, matrix.adjacency.sender
    dense = dense.index_put(ends, weight, accumulate=True)
    loops = torch.zeros(N, dtype=x.dtype) + (0.0 if matrix.loops is None else matrix.loops)
    left = torch.ones(N, dtype=x.dtype) if matrix.left is None else matrix.left
    right = torch.ones(N, dtype=x.dtype) if matrix.right is None else matrix.right
    return left[:, None] * ((dense + loops.diag()) @ (right[:, None] * x))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("loop_weight", [None, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["sum", "mean", "norm", "norm, weighted", "norm, kept weights"])
def test_both_orders_of_messages_give_the_product(
    kind: str, loop_weight: float | None, learns: bool, is_masked: bool
) -> None:
    """In the order given and sorted; their gradients and second gradients, too."""
    edges, x = random_graph(N, N, 30), features(N, 3).requires_grad_()
    factor = features(30, seed=1).abs().requires_grad_(learns)
    mask = features(30, seed=2).sigmoid() if is_masked else None
    found = []
    for order in ("definition", "given", "sorted"):
        given = adjacency(edges)
        if kind in ("sum", "mean"):
            weight = factor if learns else None
            matrix = sum_matrix(given, weight, mean=kind == "mean", dtype=x.dtype)
        else:
            options = OPTIONS | {"loop_weight": loop_weight, "replace_loops": True}
            options["keep_loop_weights"] = "kept" in kind
            weight = factor if kind != "norm" else None
            matrix = normalized_matrix(given, weight, **options, dtype=x.dtype)
        if order == "sorted":
            assert given.edges.sender.numel() == 30
        if order == "definition":
            y = by_definition(matrix, x, mask)
        else:
            y = (matrix if mask is None else matrix.masked(mask)).times(x)
        leaves = [x, factor] if matrix.learns else [x]
        grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        found.append([y, *grads, *torch.autograd.grad(penalty, leaves)])
    assert FEW_NUMBERS >= 30 * 3
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-10, atol=1e-10)


def test_few_edges_of_a_call_are_not_sorted() -> None:
    """On a CPU; many are, and those of a graph that somebody made were."""
    edges = random_graph(N, N, 30)
    for width in (3, 1 + FEW_NUMBERS // 30):
        given = adjacency(edges)
        sum_matrix(given, None, mean=True, dtype=torch.float).times(torch.rand(N, width))
        assert given.is_sorted is (width > 3)
    assert Graph(edges, N).adjacency.is_sorted
