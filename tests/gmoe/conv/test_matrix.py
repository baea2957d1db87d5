"""Matrices of sums: their precision, and whether their weights learn.

``tests/compose`` compares them within whole layers.
"""

from __future__ import annotations

import pytest
import torch

from gmoe.conv.matrix import normalized_matrix, sum_matrix
from gmoe.edges import Edges
from tests.helpers.masked import random_graph

N = 9
EDGE_INDEX = random_graph(N, N, 30)
EDGES = Edges.sorted(EDGE_INDEX[0], EDGE_INDEX[1], N, N)


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
