"""Attention vote.

Shapes: T tokens, D width, E experts, H voting heads, d head width, B groups, S tokens per group, M edges with one
self-loop a token.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._autograd import first_order, untraced
from gmoe.routers.base import Router, Weighting, float_linear, legal, pair_weights
from gmoe.routers.groups import Groups
from gmoe.routing import Routing

Scope: TypeAlias = Literal["group", "neighbors"]

BLOCK_ELEMENTS = 2**22
"""Scores held at once: 16 MiB in float32. Memory for votes is this plus O(T)."""

KEPT = 4
"""The softmax is kept for the backward pass where a group has at most so many tokens a unit of the head width."""


class AttentionVote(Router):
    r"""Each expert picks a group's top-C tokens by votes (a PyG ``Batch`` needs ``batch=``: else its graphs compete).

    A token's votes are the attention that it gets from other tokens.

    .. math::
        \mathrm{votes}_j^e = \sum_i \mathrm{softmax}_j(q_i^e \cdot k_j^e / \sqrt{d})

    Every token has one vote per expert, so votes average 1. Capacity and ties are those of :class:`ExpertChoice`; votes
    that differ only by rounding are ties. Votes run along tokens: with ``weight="score"`` they are divided by the
    detached mean of the group's selected votes and capped at 10.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        shared_queries: ``False`` (default): E queries and E keys. ``True``: one global query and E keys, E + 1
            projections instead of 2E.
        scope: ``"group"`` (default): all tokens of a group vote; exact, O(T^2) time, O(T) memory forward and backward.
            ``"neighbors"``: a node spreads its vote over its out-neighbors and itself, O(edges); needs ``edge_index``.
            Experts choose inside groups either way.
        head_dim: d, the width of queries and keys (default 32).
        init_scale: factor of ``nn.Linear``'s initial weights of the queries (default 0.1): a softmax that is sharp from
            the start, as large features make it, hardly learns.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range, or ``scope="neighbors"`` without ``edge_index``.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        capacity_factor: float = 1.0,
        shared_queries: bool = False,
        scope: Scope = "group",
        head_dim: int = 32,
        init_scale: float = 0.1,
        check_finite: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        self.capacity_factor = legal("capacity_factor", capacity_factor)
        self.scope, self.shared_queries = legal("scope", scope, Scope), shared_queries
        self.head_dim, self.init_scale = legal("head_dim", head_dim), legal("init_scale", init_scale)
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.query = nn.Linear(dim, (1 if shared_queries else num_experts) * head_dim, bias=False)
        self.key = nn.Linear(dim, num_experts * head_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query.reset_parameters()
        self.key.reset_parameters()
        with torch.no_grad():
            self.query.weight.mul_(self.init_scale)

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        groups = Groups.of(group, len(x_TD))
        q_THd = float_linear(x_TD, self.query).unflatten(-1, (-1, self.head_dim)) / math.sqrt(self.head_dim)
        k_TEd = float_linear(x_TD, self.key).unflatten(-1, (self.num_experts, self.head_dim))
        if self.scope == "neighbors":
            if edge_index is None:
                raise ValueError("edge_index: got None with scope='neighbors', expected the (2, num_edges) edges")
            votes_TE = neighbor_votes(q_THd, k_TEd, edge_index)
        else:
            votes_TE = k_TEd.new_zeros(k_TEd.shape[:2])
            for part in groups.batches():
                votes_BES = group_votes(part.take(q_THd).transpose(1, 2), part.take(k_TEd).transpose(1, 2), part.mask)
                votes_TE = part.add(votes_TE, votes_BES.transpose(1, 2))
        capacity = groups.capacity(self.k, self.num_experts, self.capacity_factor)
        log_gate_TE = votes_TE.clamp(min=torch.finfo(votes_TE.dtype).tiny).log()
        # a vote is a sum over voters: equal tokens come out equal up to rounding only
        token_P, offsets_E, log_gate_P = groups.best_pairs(votes_TE, log_gate_TE, capacity, True, rounded=True)
        weight_P = pair_weights(self.weight, log_gate_P, token_P, len(x_TD))
        return Routing(token_P, offsets_E, weight_P, votes_TE, len(x_TD))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shared_queries={self.shared_queries}, scope={self.scope!r}"


def group_votes(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None = None, block: int | None = None) -> Tensor:
    """(B, H, S) how much each token is voted for by the tokens of its group; exact, in O(S) memory.

    A block of voters at a time, whose softmax the backward pass computes again; the softmax of small groups is kept.

    Args:
        q_BHSd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_BHSd: keys.
        mask_BS: which slots hold a token; ``None`` for all.
        block: voters at a time; by default all of a small group, else as many as fit ``BLOCK_ELEMENTS``.
    """
    size = k_BHSd.size(2)
    small = size <= KEPT * k_BHSd.size(3)
    if block is None:
        block = size if small else BLOCK_ELEMENTS // max(k_BHSd.shape[:-1].numel(), 1)
    if small and block >= size:
        return _shares(q_BHSd, k_BHSd, mask_BS, slice(None)).sum(dim=2)
    block = math.ceil(size / math.ceil(size / max(block, 1)))  # as many as fit, of nearly equal length
    votes_BHS: Tensor = _BlockedVotes.apply(q_BHSd, k_BHSd, mask_BS, block)
    return votes_BHS


class _BlockedVotes(torch.autograd.Function):
    """votes_j = sum_i p_ij with p_ij the softmax of s_ij = q_i . k_j, of which a block of voters is held at a time.

    With g_j the gradient of votes_j, that of s_ij is p_ij (g_j - sum_l p_il g_l).
    """

    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, block: int) -> Tensor:
        ctx.save_for_backward(q_BHSd, k_BHSd, mask_BS)
        ctx.blocks = [slice(start, start + block) for start in range(0, k_BHSd.size(2), block)]
        votes_BHS = k_BHSd.new_zeros(k_BHSd.shape[:-1])
        for rows in ctx.blocks:
            votes_BHS += _shares(q_BHSd, k_BHSd, mask_BS, rows).sum(dim=2)
        return votes_BHS

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_BHS: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_BHSd, k_BHSd, mask_BS = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q_BHSd), torch.zeros_like(k_BHSd)
        for rows in ctx.blocks:
            p_BHbS = _shares(q_BHSd, k_BHSd, mask_BS, rows)
            grad_s = (grad_BHS[:, :, None] - p_BHbS @ grad_BHS[..., None]).mul_(p_BHbS)
            grad_q[:, :, rows] = (grad_s @ k_BHSd).sum_to_size(q_BHSd[:, :, rows].shape)
            grad_k += grad_s.transpose(-1, -2) @ q_BHSd[:, :, rows]
        return grad_q, grad_k, None, None


def _shares(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, rows: slice) -> Tensor:
    """(B, H, b, S) how the voters in ``rows`` spread their votes; padding neither votes nor is voted for."""
    scores_BHbS = q_BHSd[:, :, rows] @ k_BHSd.transpose(-1, -2)
    if mask_BS is None:
        return scores_BHbS.softmax(dim=-1)
    shares_BHbS = scores_BHbS.masked_fill_(~mask_BS[:, None, None], -torch.inf).softmax(dim=-1)
    return shares_BHbS * mask_BS[:, None, rows, None]


@untraced  # which knows no sparse tensors
def neighbor_votes(q_THd: Tensor, k_THd: Tensor, edge_index: Tensor) -> Tensor:
    """(T, H) votes where each node spreads one vote over its out-neighbors and itself; O(edges).

    Every node has itself once, whether or not the graph has self-loops; parallel edges count once each. Scores and
    gradients are sparse products, a head at a time: no (M, d) tensor.

    Args:
        q_THd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_THd: keys.
        edge_index: (2, num_edges) from voters to those they vote for.
    """
    graph = _sorted(edge_index, k_THd.size(0))
    with torch.autocast(k_THd.device.type, enabled=False):
        votes: Tensor = _NeighborVotes.apply(q_THd, k_THd, graph)
    return votes


class _Edges(NamedTuple):
    """Edges sorted by source (a row a voter), and how they are sorted by destination.

    ``ends`` (T + 1,) are the ends of the voters' rows, ``by_dst_M`` the edges in the order of their destinations, and
    ``dst_ends`` and ``dst_src_M`` the ends of those rows and their sources.
    """

    ends: Tensor
    src_M: Tensor
    dst_M: Tensor
    by_dst_M: Tensor
    dst_ends: Tensor
    dst_src_M: Tensor


class _NeighborVotes(torch.autograd.Function):
    """votes_j = sum_i p_ij with p_ij the softmax of s_ij = q_i . k_j over the out-neighbors j of i.

    With g_j the gradient of votes_j, that of s_ij is p_ij (g_j - sum_l p_il g_l).
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_THd: Tensor, graph: _Edges) -> Tensor:
        votes_HT, shares = k_THd.new_empty(k_THd.size(1), k_THd.size(0)), []
        for head in range(k_THd.size(1)):
            p_M = _scores(_head(q_THd, head), _head(k_THd, head), graph)
            p_M -= _reduce(p_M, "max", graph.ends).index_select(0, graph.src_M)
            p_M.exp_()
            p_M /= _reduce(p_M, "sum", graph.ends).index_select(0, graph.src_M)
            votes_HT[head] = _reduce(p_M.index_select(0, graph.by_dst_M), "sum", graph.dst_ends)
            shares.append(p_M)
        ctx.graph = graph
        ctx.save_for_backward(q_THd, k_THd, *shares)
        return votes_HT.T

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        q_THd, k_THd, *shares = ctx.saved_tensors
        graph: _Edges = ctx.graph
        grad_q, grad_k = torch.zeros_like(q_THd), torch.empty_like(k_THd)
        with torch.autocast(k_THd.device.type, enabled=False):
            for head, p_M in enumerate(shares):
                grad_M = grad_TH[:, head].contiguous().index_select(0, graph.dst_M)
                mean_T = _reduce(p_M * grad_M, "sum", graph.ends)
                grad_M.sub_(mean_T.index_select(0, graph.src_M)).mul_(p_M)
                forth = _matrix(graph.ends, graph.dst_M, grad_M)
                back = _matrix(graph.dst_ends, graph.dst_src_M, grad_M.index_select(0, graph.by_dst_M))
                grad_q[:, min(head, q_THd.size(1) - 1)] += _product(forth, _head(k_THd, head))
                grad_k[:, head] = _product(back, _head(q_THd, head))
        return grad_q, grad_k, None


def _sorted(edge_index: Tensor, num_tokens: int) -> _Edges:
    itself_T = torch.arange(num_tokens, device=edge_index.device)
    proper = edge_index[:, edge_index[0] != edge_index[1]]
    src_M, dst_M = torch.cat([proper, itself_T.expand(2, -1)], dim=1)
    src_M, by_src_M = src_M.sort(stable=True)
    dst_M = dst_M.index_select(0, by_src_M)
    sorted_dst_M, by_dst_M = dst_M.sort(stable=True)
    starts = torch.arange(num_tokens + 1, device=src_M.device)
    ends, dst_ends = torch.searchsorted(src_M, starts), torch.searchsorted(sorted_dst_M, starts)
    return _Edges(ends, src_M, dst_M, by_dst_M, dst_ends, src_M.index_select(0, by_dst_M))


def _head(value_THd: Tensor, head: int) -> Tensor:
    """(T, d), of the only one where heads share it."""
    return value_THd[:, min(head, value_THd.size(1) - 1)].contiguous()


def _scores(q_Td: Tensor, k_Td: Tensor, graph: _Edges) -> Tensor:
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
