"""Votes along edges. Shapes: T tokens, H voting heads, d head width, M edges with one self-loop a token."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmoe._autograd import first_order


class _Graph(NamedTuple):
    """Edges sorted by source (a row a voter), and how they are sorted by destination."""

    ends: Tensor
    """(T + 1,) where a voter's edges end."""
    dst_M: Tensor
    src_M: Tensor
    by_dst_M: Tensor
    """Edges in the order of their destinations, and of those ``dst_ends`` and ``dst_src_M``."""
    dst_ends: Tensor
    dst_src_M: Tensor


@torch.compiler.disable  # which knows no sparse tensors
def neighbour_votes(q_THd: Tensor, k_THd: Tensor, edge_index: Tensor) -> Tensor:
    """(T, H) votes where each node spreads one vote over its out-neighbours and itself; O(edges).

    Every node has itself once, whether or not the graph has self-loops; parallel edges count once each. Scores and
    gradients are sparse products, a head at a time: no (M, d) tensor.

    Args:
        q_THd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_THd: keys.
        edge_index: (2, num_edges) from voters to those they vote for.
    """
    graph = _sorted(edge_index, k_THd.size(0))
    with torch.autocast(k_THd.device.type, enabled=False):
        votes: Tensor = _NeighbourVotes.apply(q_THd, k_THd, graph)
    return votes


class _NeighbourVotes(torch.autograd.Function):
    """votes_j = sum_i p_ij with p_ij the softmax of s_ij = q_i . k_j over the out-neighbours j of i.

    With g_j the gradient of votes_j, that of s_ij is p_ij (g_j - sum_l p_il g_l).
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_THd: Tensor, graph: _Graph) -> Tensor:
        votes_HT, ballots = k_THd.new_empty(k_THd.size(1), k_THd.size(0)), []
        for head in range(k_THd.size(1)):
            p_M = _scores(_head(q_THd, head), _head(k_THd, head), graph)
            p_M -= _reduce(p_M, "max", graph.ends).index_select(0, graph.src_M)
            p_M.exp_()
            p_M /= _reduce(p_M, "sum", graph.ends).index_select(0, graph.src_M)
            votes_HT[head] = _reduce(p_M.index_select(0, graph.by_dst_M), "sum", graph.dst_ends)
            ballots.append(p_M)
        ctx.graph = graph
        ctx.save_for_backward(q_THd, k_THd, *ballots)
        return votes_HT.T

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        q_THd, k_THd, *ballots = ctx.saved_tensors
        graph: _Graph = ctx.graph
        grad_q, grad_k = torch.zeros_like(q_THd), torch.empty_like(k_THd)
        with torch.autocast(k_THd.device.type, enabled=False):
            for head, p_M in enumerate(ballots):
                grad_M = grad_TH[:, head].contiguous().index_select(0, graph.dst_M)
                mean_T = _reduce(p_M * grad_M, "sum", graph.ends)
                grad_M.sub_(mean_T.index_select(0, graph.src_M)).mul_(p_M)
                forth = _matrix(graph.ends, graph.dst_M, grad_M)
                back = _matrix(graph.dst_ends, graph.dst_src_M, grad_M.index_select(0, graph.by_dst_M))
                grad_q[:, min(head, q_THd.size(1) - 1)] += _product(forth, _head(k_THd, head))
                grad_k[:, head] = _product(back, _head(q_THd, head))
        return grad_q, grad_k, None


def _sorted(edge_index: Tensor, num_tokens: int) -> _Graph:
    src_M, dst_M = edge_index
    proper = src_M != dst_M
    itself_T = torch.arange(num_tokens, device=src_M.device)
    src_M, by_src_M = torch.cat([src_M[proper], itself_T]).sort(stable=True)
    dst_M = torch.cat([dst_M[proper], itself_T]).index_select(0, by_src_M)
    sorted_dst_M, by_dst_M = dst_M.sort(stable=True)
    ends, dst_ends = (_ends(index_M, num_tokens) for index_M in (src_M, sorted_dst_M))
    return _Graph(ends, dst_M, src_M, by_dst_M, dst_ends, src_M.index_select(0, by_dst_M))


def _ends(sorted_M: Tensor, num_tokens: int) -> Tensor:
    return torch.searchsorted(sorted_M, torch.arange(num_tokens + 1, device=sorted_M.device))


def _head(value_THd: Tensor, head: int) -> Tensor:
    """(T, d), of the only one where heads share it."""
    return value_THd[:, min(head, value_THd.size(1) - 1)].contiguous()


def _scores(q_Td: Tensor, k_Td: Tensor, graph: _Graph) -> Tensor:
    """(M,) the product of each edge's query and key."""
    if len(graph.dst_M) > len(q_Td) ** 2:  # a small graph with parallel edges, for which sampled_addmm has no room
        return torch.linalg.vecdot(q_Td.index_select(0, graph.src_M), k_Td.index_select(0, graph.dst_M))
    pattern = _matrix(graph.ends, graph.dst_M, torch.zeros_like(graph.dst_M, dtype=k_Td.dtype))
    return torch.sparse.sampled_addmm(pattern, q_Td, k_Td.T, beta=0.0).values()


def _reduce(value_M: Tensor, how: str, ends: Tensor) -> Tensor:
    """(T,) of each token's stretch of edges, which always has its self-loop."""
    return torch.segment_reduce(value_M, how, offsets=ends, unsafe=True)


def _matrix(ends: Tensor, column_M: Tensor, value_M: Tensor) -> Tensor:
    size = (len(ends) - 1, len(ends) - 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(ends, column_M, value_M, size, check_invariants=False)


def _product(matrix: Tensor, dense_Td: Tensor) -> Tensor:
    """On the CPU by a kernel of torch's own, which every build has."""
    return torch.sparse.mm(matrix, dense_Td, "sum") if dense_Td.device.type == "cpu" else matrix @ dense_Td
