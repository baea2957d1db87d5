"""Matrices of sums: their entries against dense ones.

``tests/compose`` compares them within whole layers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmoe.conv.matrix import normalized_matrix, sum_matrix
from gmoe.edges import Edges
from tests.helpers.masked import features, mean_of_in_edges, random_graph

N = 9
EDGE_INDEX = random_graph(N, N, 30)
EDGES = Edges.sorted(EDGE_INDEX[0], EDGE_INDEX[1], N, N)


def dense(weight: Tensor, edge_index: Tensor = EDGE_INDEX) -> Tensor:
    """(N, N) the matrix A of some edges: a row for each destination."""
    matrix = torch.zeros(N, N, dtype=torch.double)
    return matrix.index_put((edge_index[1], edge_index[0]), weight.double(), accumulate=True)


def test_a_mean_is_the_mean_over_in_edges() -> None:
    x = features(N, 4)
    matrix = sum_matrix(EDGES, None, mean=True, dtype=x.dtype)
    torch.testing.assert_close(matrix.times(x), mean_of_in_edges(x, EDGE_INDEX))


def test_a_sum_weighs_each_message_by_its_factor() -> None:
    x = features(N, 4)
    factor = features(30, seed=1)
    matrix = sum_matrix(EDGES, factor, mean=False, dtype=x.dtype)
    torch.testing.assert_close(matrix.times(x), dense(factor) @ x)


def test_rows_of_several_numbers_are_features_and_not_factors() -> None:
    x = features(N, 4)
    matrix = sum_matrix(EDGES, features(30, 2), mean=False, dtype=x.dtype)
    torch.testing.assert_close(matrix.times(x), dense(torch.ones(30)) @ x)


def test_a_mask_scales_the_messages_in_the_order_of_the_edges_as_given() -> None:
    x = features(N, 4)
    mask = features(30, seed=1)
    matrix = sum_matrix(EDGES, None, mean=False, dtype=x.dtype)
    torch.testing.assert_close(matrix.times(x, mask), dense(mask) @ x)


@pytest.mark.parametrize("replace_loops", [True, False])
def test_loops_are_added_or_take_the_place_of_the_others(replace_loops: bool) -> None:
    x = features(N, 4)
    adjacency = dense(torch.ones(30))
    if replace_loops:
        adjacency.fill_diagonal_(0)
    adjacency += torch.eye(N)
    scale = adjacency.sum(dim=1).pow(-0.5)
    matrix = normalized_matrix(
        EDGES,
        None,
        loop_weight=1.0,
        replace_loops=replace_loops,
        keep_loop_weights=False,
        scale=None,
        dtype=x.dtype,
    )
    torch.testing.assert_close(matrix.scale, scale)
    torch.testing.assert_close(matrix.times(x), scale[:, None] * adjacency * scale @ x)


def test_a_loop_that_is_replaced_may_keep_its_weight() -> None:
    edges = Edges.sorted(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 2, 2)
    weight = torch.tensor([0.5, 1.0, 1.0])
    matrix = normalized_matrix(
        edges,
        weight,
        loop_weight=2.0,
        replace_loops=True,
        keep_loop_weights=True,
        scale=torch.ones(2),
        dtype=torch.float32,
    )
    assert matrix.diagonal is not None
    assert matrix.diagonal.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16])
def test_norms_of_low_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum of ones in bfloat16 stops at 256."""
    star = Edges.sorted(torch.arange(1000), torch.zeros(1000, dtype=torch.long), 1000, 1000)
    matrix = normalized_matrix(
        star,
        torch.ones(1000, dtype=dtype),
        loop_weight=None,
        replace_loops=False,
        keep_loop_weights=False,
        scale=None,
        dtype=dtype,
    )
    assert matrix.scale is not None
    assert float(matrix.scale[0]) == pytest.approx(1000**-0.5)


def test_a_matrix_knows_whether_its_weights_learn() -> None:
    """Also where no gradient is recorded, since they may change all the same."""
    weight = torch.ones(30)
    for learns in (False, True):
        factor = weight.clone().requires_grad_(learns)
        with torch.no_grad():
            summing = sum_matrix(EDGES, factor, mean=True, dtype=torch.float)
            norms = normalized_matrix(
                EDGES,
                factor,
                loop_weight=None,
                replace_loops=False,
                keep_loop_weights=False,
                scale=None,
                dtype=torch.float,
            )
        assert summing.learns is norms.learns is learns
    assert not sum_matrix(EDGES, None, mean=True, dtype=torch.float).learns
