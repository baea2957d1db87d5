"""Attention vote.

Shapes: T tokens, D width, E experts, H voting heads, d head width, B groups, S tokens per group, M edges with one
self-loop a token.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmoe._checks import check_choice, check_counts, check_positive
from gmoe.routers.base import Router, Weighting, edges_among, float_linear, pair_weights, reset_linear
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

    Every token has one vote per expert, so votes average 1. Capacity and ties are those of :class:`ExpertChoice`. Votes
    run along tokens: with ``weight="score"`` they are divided by the
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
            ``"neighbors"``: a node spreads its vote over its out-neighbors and itself, O(edges); needs ``edge_index``
            and torch_geometric. Experts choose inside groups either way.
        head_dim: d, the width of queries and keys (default 32).
        init_scale: factor of ``nn.Linear``'s initial weights of the queries (default 0.1): a softmax that is sharp from
            the start, as large features make it, hardly learns.

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
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight)
        check_positive("capacity_factor", capacity_factor)
        check_choice("scope", scope, Scope)
        check_counts(head_dim=head_dim)
        check_positive("init_scale", init_scale)
        self.capacity_factor, self.scope, self.shared_queries = capacity_factor, scope, shared_queries
        self.head_dim, self.init_scale = head_dim, init_scale
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.query = nn.Linear(dim, (1 if shared_queries else num_experts) * head_dim, bias=False)
        self.key = nn.Linear(dim, num_experts * head_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.query, self.init_scale)
        self.key.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        groups = Groups.of(group, len(x_TD))
        q_THd = float_linear(x_TD, self.query).unflatten(-1, (-1, self.head_dim)) / math.sqrt(self.head_dim)
        k_TEd = float_linear(x_TD, self.key).unflatten(-1, (-1, self.head_dim))
        if self.scope == "neighbors":
            votes_TE = neighbor_votes(q_THd, k_TEd, edges_among(edge_index, len(x_TD)))
        else:
            votes_TE = k_TEd.new_zeros(k_TEd.shape[:2])
            for part in groups.batches(x_TD.device):
                votes_BES = group_votes(part.take(q_THd).transpose(1, 2), part.take(k_TEd).transpose(1, 2), part.mask)
                votes_TE = part.add(votes_TE, votes_BES.transpose(1, 2))
        share = self.capacity_factor * self.k / self.num_experts
        log_gate_TE = votes_TE.clamp(min=torch.finfo(votes_TE.dtype).tiny).log()
        token_P, offsets_E, log_gate_P = groups.best_pairs(votes_TE, log_gate_TE, share, along_tokens=True)
        weight_P = pair_weights(self.weight, log_gate_P, token_P, len(x_TD))
        return Routing(token_P, offsets_E, weight_P, votes_TE, len(x_TD), checked=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shared_queries={self.shared_queries}, scope={self.scope!r}"


def group_votes(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B, H, S) how much each token is voted for by the tokens of its group; exact, in O(S) memory.

    A block of voters at a time, whose softmax the backward pass computes again; the softmax of small groups is kept.

    Args:
        q_BHSd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_BHSd: keys.
        mask_BS: which slots hold a token; ``None`` for all.
    """
    size = k_BHSd.size(2)
    if size <= KEPT * k_BHSd.size(3):
        return _votes(q_BHSd, k_BHSd, mask_BS, slice(None))
    at_once = max(BLOCK_ELEMENTS // max(k_BHSd.shape[:-1].numel(), 1), 1)
    block = math.ceil(size / math.ceil(size / at_once))  # as many as fit, of nearly equal length
    votes_BHS = k_BHSd.new_zeros(k_BHSd.shape[:-1])
    for start, q_BHbd in zip(range(0, size, block), q_BHSd.split(block, dim=2), strict=True):
        args = q_BHbd, k_BHSd, mask_BS, slice(start, start + block)
        votes_BHS = votes_BHS + checkpoint(_votes, *args, use_reentrant=False, preserve_rng_state=False)
    return votes_BHS


def _votes(q_BHbd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, voters: slice) -> Tensor:
    """(B, H, S) the votes of some voters; padding neither votes nor is voted for."""
    scores_BHbS = q_BHbd @ k_BHSd.transpose(-1, -2)
    if mask_BS is None:
        return scores_BHbS.softmax(dim=-1).sum(dim=2)
    shares_BHbS = scores_BHbS.masked_fill_(~mask_BS[:, None, None], -torch.inf).softmax(dim=-1)
    return (shares_BHbS * mask_BS[:, None, voters, None]).sum(dim=2)


def neighbor_votes(q_THd: Tensor, k_THd: Tensor, edge_index: Tensor) -> Tensor:
    """(T, H) votes where each node spreads one vote over its out-neighbors and itself; O(edges).

    Every node has itself once, whether or not the graph has self-loops; parallel edges count once each. Scores and
    gradients are those of :func:`gmoe.conv.graph.dot`: no (M, d) tensor.

    Args:
        q_THd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_THd: keys.
        edge_index: (2, num_edges) from voters to those they vote for.
    """
    from torch_geometric.utils import add_remaining_self_loops, softmax  # who has a graph has it

    from gmoe.conv.graph import Edges, dot

    num_tokens = len(k_THd)
    (voter_M, other_M), _ = add_remaining_self_loops(edge_index, num_nodes=num_tokens)
    edges = Edges.sorted(other_M, voter_M, num_tokens, num_tokens)
    share_MH = softmax(dot(q_THd.expand_as(k_THd), k_THd, edges), ptr=edges.ptr)
    return k_THd.new_zeros(k_THd.shape[:2]).index_add(0, edges.sender, share_MH)
