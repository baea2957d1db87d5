"""Attention vote. Shapes: T tokens, D width, E experts, d head width, B pools, S tokens a pool."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmoe._checks import check_choice, check_count, check_positive
from gmoe.routing.neighbour_votes import neighbour_votes
from gmoe.routing.pools import Pools
from gmoe.routing.router import Router, Weighting, float_linear, gather_pairs
from gmoe.routing.routing import Routing
from gmoe.routing.select import pairs_of_experts
from gmoe.routing.votes import pool_votes

Queries: TypeAlias = Literal["per_expert", "shared"]
Scope: TypeAlias = Literal["pool", "neighbours"]


class AttentionVote(Router):
    r"""Each expert takes the top-C tokens of a pool that the other tokens vote for.

    .. math::
        \mathrm{votes}_j^e = \sum_i \mathrm{softmax}_j(q_i^e \cdot k_j^e / \sqrt{d})

    Every token has one vote an expert, so that votes average 1 over all tokens. Capacity and ties are those of
    :class:`ExpertChoice`; votes that differ by rounding only are ties. Votes run
    along tokens: with ``weight="score"`` they are divided by the detached mean of the pool's selected votes and capped
    at 10.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        queries: ``"per_expert"`` (default): E queries and E keys. ``"shared"``: one global query and E keys, E + 1
            projections in place of 2E.
        scope: ``"pool"`` (default): all tokens of a pool vote; exact, O(T^2) time, O(T) memory forward and backward.
            ``"neighbours"``: a node spreads its vote over its out-neighbours and itself, O(edges); needs
            ``edge_index``. Experts choose inside pools either way.
        head_dim: d, the width of queries and keys (default 32).
        init_scale: factor of ``nn.Linear``'s initial weights of the queries (default 0.1): a softmax that is sharp from
            the start, as large features make it, hardly learns.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range, or ``scope="neighbours"`` without ``edge_index``.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        capacity_factor: float = 1.0,
        queries: Queries = "per_expert",
        scope: Scope = "pool",
        head_dim: int = 32,
        init_scale: float = 0.1,
        check_finite: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        check_positive("capacity_factor", capacity_factor)
        check_choice("queries", queries, get_args(Queries))
        check_choice("scope", scope, get_args(Scope))
        check_count("head_dim", head_dim)
        check_positive("init_scale", init_scale)
        self.capacity_factor = capacity_factor
        self.queries = queries
        self.scope = scope
        self.head_dim = head_dim
        self.init_scale = init_scale
        self.query = nn.Linear(dim, (num_experts if queries == "per_expert" else 1) * head_dim, bias=False)
        self.key = nn.Linear(dim, num_experts * head_dim, bias=False)
        self.reset_parameters()

    @property
    def experts_per_token(self) -> float:
        return min(self.k * self.capacity_factor, float(self.num_experts))

    def reset_parameters(self) -> None:
        self.query.reset_parameters()
        self.key.reset_parameters()
        with torch.no_grad():
            self.query.weight.mul_(self.init_scale)

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        q_THd = float_linear(x_TD, self.query).unflatten(-1, (-1, self.head_dim)) / math.sqrt(self.head_dim)
        k_TEd = float_linear(x_TD, self.key).unflatten(-1, (self.num_experts, self.head_dim))
        if self.scope == "neighbours":
            if edge_index is None:
                raise ValueError("edge_index: got None with scope='neighbours', expected the (2, num_edges) edges")
            votes_TE = neighbour_votes(q_THd, k_TEd, edge_index)
        else:
            votes_TE = self._pool_votes(q_THd, k_TEd, pools)
        capacity = pools.capacity(self.k, self.num_experts, self.capacity_factor)
        # a vote is a sum over voters: equal tokens come out equal up to rounding only
        tolerance = 8 * torch.finfo(votes_TE.dtype).eps
        token_P, offsets_E = pairs_of_experts(pools.top_tokens(votes_TE.detach(), capacity, tolerance))
        gate_P = gather_pairs(votes_TE, token_P, offsets_E)
        log_gate_P = gate_P.clamp(min=torch.finfo(gate_P.dtype).tiny).log()
        weight_P = self._weights_along_tokens(log_gate_P, token_P, pools)
        return Routing(token_P, offsets_E, weight_P, votes_TE, pools.num_tokens)

    def _pool_votes(self, q_THd: Tensor, k_TEd: Tensor, pools: Pools) -> Tensor:
        batches = pools.padded()
        if not batches:
            shape = (pools.num_pools, pools.size or 0)
            votes_BES = pool_votes(*(v.unflatten(0, shape).transpose(1, 2) for v in (q_THd, k_TEd)))
            return votes_BES.transpose(1, 2).reshape(-1, self.num_experts)
        votes_TE = k_TEd.new_zeros(k_TEd.shape[:2])
        for token_BS, mask_BS in batches:
            q_BHSd, k_BESd = (
                v.index_select(0, token_BS.reshape(-1)).unflatten(0, token_BS.shape).transpose(1, 2)
                for v in (q_THd, k_TEd)
            )
            votes_BSE = pool_votes(q_BHSd, k_BESd, mask_BS).transpose(1, 2)
            votes_TE = votes_TE.index_add(0, token_BS.reshape(-1), votes_BSE.flatten(0, 1))  # padding has no votes
        return votes_TE

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, queries={self.queries!r}, scope={self.scope!r}"
