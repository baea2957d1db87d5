"""Edges in each form: what is read, given back and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric import EdgeIndex
from torch_geometric.typing import WITH_TORCH_SPARSE, SparseTensor

from gmoe import Graph, MoEConv
from gmoe.conv.adjacency import adjacency_like
from tests.helpers.masked import csr, features

PLAIN = torch.tensor([[0, 1, 2, 0], [1, 0, 1, 2]])
"""Edges among three nodes."""


SPARSE_TENSOR = pytest.param(
    "SparseTensor",
    marks=pytest.mark.skipif(not WITH_TORCH_SPARSE, reason="needs torch-sparse"),
)


def in_form(form: str) -> Any:
    """The plain edges in one of the forms."""
    if form == "SparseTensor":
        return SparseTensor(row=PLAIN[1], col=PLAIN[0], sparse_sizes=(3, 3))
    matrix = csr(PLAIN, (3, 3))
    forms = {"edge_index": PLAIN, "csr": matrix, "coo": matrix.to_sparse_coo()}
    return forms[form]


@pytest.mark.parametrize("form", ["edge_index", "csr", SPARSE_TENSOR])
def test_other_edges_take_the_form_of_a_graphs_own(form: str) -> None:
    graph_edges = in_form(form)
    other = torch.tensor([[1, 0], [0, 1]])
    ptr = torch.tensor([0, 1, 2])
    values = features(2)
    adj: Any = adjacency_like(graph_edges, "source_to_target", other, ptr, values, 2)
    assert type(adj) is type(graph_edges)
    if form == "edge_index":
        assert torch.equal(adj, other)
    else:
        expected = torch.zeros(2, 2).double()
        expected[other[1], other[0]] = values
        assert torch.equal(adj.to_dense(), expected)


TURNED = {"flow": "target_to_source"}


@pytest.mark.parametrize(
    ("edges", "sizes", "kwargs", "message"),
    [
        (
            torch.tensor([[0, 1], [1, 12]]),
            9,
            {},
            r"edge_index: got nodes 0\.\.12, expected values in 0\.\.8",
        ),
        (torch.tensor([[0, -1], [1, 0]]), 9, {}, "edge_index: got nodes -1"),
        (torch.tensor([[8], [3]]), (9, 3), {}, "edge_index: got nodes 3"),
        (torch.tensor([[8], [2]]), (9, 3), TURNED, "edge_index: got nodes 8"),
        (torch.tensor([[0, 1, 2]]), 9, {}, "edge_index: got shape"),
        (PLAIN.float(), 9, {}, r"edge_index: got .* of torch.float32"),
        ([[0], [1]], 3, {}, "edge_index: got list"),
        (
            EdgeIndex(PLAIN, sparse_size=(3, 3)),
            9,
            {},
            r"edge_index: got an EdgeIndex of sparse_size \(3, 3\), expected \(9, 9\)",
        ),
        (csr(PLAIN, (9, 9)), (9, 8), {}, "edge_index: got a sparse matrix of shape"),
        (csr(PLAIN, (9, 9)), 9, TURNED, "edge_index: got a sparse matrix .*target_to_source"),
        (
            csr(PLAIN, (9, 9)),
            9,
            {"edge_weight": torch.ones(4)},
            r"edge_weight: got a tensor, .* a sparse matrix",
        ),
        *(
            (PLAIN, 9, {"edge_weight": wrong}, "edge_weight: got")
            for wrong in (torch.ones(3), torch.ones(2, 2), [1.0])
        ),
        (PLAIN, 9, {"edge_attr": torch.ones(1, 2)}, "edge_attr: got shape"),
    ],
)
def test_edges_that_do_not_fit_the_nodes_or_their_arguments_are_refused(
    edges: Any, sizes: Any, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(edges, sizes, **kwargs)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_second_gradients_of_a_matrix_that_learns_are_refused(layout: str) -> None:
    """torch's sparse matrices lose them without a word."""
    values = torch.rand(4, dtype=torch.double, requires_grad=True)
    matrix = torch.sparse_coo_tensor(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 2]]), values, (3, 3))
    x = torch.rand(3, 2, dtype=torch.double, requires_grad=True)
    layer = MoEConv("sage", 2, 2, num_experts=2).double()
    y = layer(x, matrix if layout == "coo" else matrix.coalesce().to_sparse_csr())
    (grad,) = torch.autograd.grad(y.sum(), values, retain_graph=True)
    assert grad.any()
    with pytest.raises(RuntimeError, match="create_graph: got True with a sparse matrix"):
        torch.autograd.grad(y.sum(), [x, values], create_graph=True)
