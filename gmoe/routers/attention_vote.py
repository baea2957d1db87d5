"""Attention vote: each expert picks the tokens to which the others attend.

Shapes: T tokens, D width, E experts, H voting heads, d head width, B groups, S tokens per group, b
voters of a block, M edges with a self-loop added per token, P (token, expert) pairs.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmoe._checks import check_choice, check_counts, check_positive
from gmoe.edges import Edges
from gmoe.portable import exported_as
from gmoe.routers.base import (
    Gate,
    Router,
    Weighting,
    checked_edge_index,
    pair_weights,
    reset_linear,
    scores_of,
)
from gmoe.routers.groups import Groups, gather_pairs
from gmoe.routing import Routing
from gmoe.sums import dot, softmax

Scope: TypeAlias = Literal["group", "neighbors"]

BLOCK_ELEMENTS = 2**24
"""Scores of a block of voters: 64 MiB in float32. Votes need three times this memory, and O(T).

Blocks of less than 32 MiB would leave holes in the heap, which grows by them.
"""

MAX_WEIGHT = 10.0
"""Cap of a ``"score"`` weight."""

KEPT_PER_WIDTH = 4
"""The softmax is kept for the backward pass if a group has at most this many tokens per unit of the
head width.
"""


class AttentionVote(Router):
    r"""Each expert picks the tokens of a group that get the most votes.

    A token's votes are the attention that it gets from other tokens:

    .. math::
        \mathrm{votes}_j^e = \sum_i \mathrm{softmax}_j(q_i^e \cdot k_j^e / \sqrt{d})

    Every token has one vote per expert, so votes average 1. Capacity and ties are those of
    :class:`ExpertChoice`. Votes are normalized over tokens: with ``weight="score"`` they are
    divided by the detached mean of the group's selected votes and capped at 10. Call it on a PyG
    ``Batch`` with ``batch=``: without it, the graphs of the batch compete with each other.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        scope: ``"group"`` (default): all tokens of a group vote; exact, O(T^2) time, O(T) memory
            forward and backward. ``"neighbors"``: a node spreads its vote over its out-neighbors
            and itself, O(edges); needs ``edge_index``. Experts choose inside groups either way.
        head_dim: d, the width of queries and keys (default 32).

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range, or ``scope="neighbors"`` without ``edge_index``.
    """

    experts_choose = True

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        k: int = 1,
        weight: Weighting | None = None,
        capacity_factor: float = 1.0,
        scope: Scope = "group",
        head_dim: int = 32,
    ) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, weight=weight)
        check_positive("capacity_factor", capacity_factor)
        check_choice("scope", scope, Scope)
        check_counts(head_dim=head_dim)
        self.capacity_factor = capacity_factor
        self.scope = scope
        self.head_dim = head_dim
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.query = Gate(dim, num_experts * head_dim)
        self.key = Gate(dim, num_experts * head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.query)
        self.key.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        num_tokens = x_TD.size(0)
        groups = Groups.of(group, num_tokens)

        # 1. Queries, divided by sqrt(d) here and not in the scores, which are larger; and keys.
        q_TAd = scores_of(self.query, x_TD).unflatten(-1, (-1, self.head_dim))
        q_TEd = self.of_alive(q_TAd / math.sqrt(self.head_dim), dim=1)
        k_TAd = scores_of(self.key, x_TD).unflatten(-1, (-1, self.head_dim))
        k_TEd = self.of_alive(k_TAd, dim=1)

        # 2. Votes among neighbors, or among all tokens of a group.
        if self.scope == "neighbors":
            votes_TE = neighbor_votes(q_TEd, k_TEd, checked_edge_index(edge_index))
        else:
            votes_TE = k_TEd.new_zeros(k_TEd.shape[:2])
            for batch in groups.batches(x_TD.device):
                q_BESd = batch.take(q_TEd).transpose(1, 2)
                k_BESd = batch.take(k_TEd).transpose(1, 2)
                votes_BES = group_votes(q_BESd, k_BESd, batch.mask)
                votes_TE = batch.add(votes_TE, votes_BES.transpose(1, 2))

        # 3. The tokens with the most votes.
        share = self.capacity_factor * self.k / self.num_scored
        token_P, offsets_E = groups.best_pairs(votes_TE, share)

        # 4. Votes depend on the size of the group: divide them by the mean of those that count.
        least = torch.finfo(votes_TE.dtype).tiny
        vote_P = gather_pairs(votes_TE.clamp(min=least), token_P, offsets_E)
        mean_P = groups.means(vote_P.detach(), token_P)
        log_gate_P = vote_P.log() - mean_P.log()
        weight_P = pair_weights(self.weight, log_gate_P, token_P, num_tokens)
        if self.weight == "score":
            weight_P = weight_P.clamp(max=MAX_WEIGHT)
        return Routing(token_P, offsets_E, weight_P, votes_TE, num_tokens, validate=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope={self.scope!r}"


def group_votes(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B, H, S) the votes that each token gets from its group; exact, in O(S) memory.

    Args:
        q_BHSd: queries, already divided by sqrt(d).
        k_BHSd: keys.
        mask_BS: which slots hold a token; ``None`` for all. Padding neither votes nor gets votes.
    """
    if not _is_large(k_BHSd):
        return _votes_of(q_BHSd, k_BHSd, mask_BS, mask_BS)
    # Some voters at a time, whose scores are computed again in the backward pass.
    if mask_BS is None:
        mask_BS = torch.ones_like(k_BHSd[:, 0, :, 0], dtype=torch.bool)
    size = max(BLOCK_ELEMENTS // k_BHSd[..., 0].numel(), 1)
    votes_BHS = torch.zeros_like(k_BHSd[..., 0])
    for q_BHbd, voters_Bb in zip(q_BHSd.split(size, 2), mask_BS.split(size, 1), strict=True):
        votes_BHS = votes_BHS + checkpoint(
            _votes_of,
            q_BHbd,
            k_BHSd,
            mask_BS,
            voters_Bb,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return votes_BHS


@exported_as(lambda _: False)  # how many tokens there are is not known
def _is_large(k_BHSd: Tensor) -> bool:
    """True for groups whose scores of all pairs of tokens would take too much memory."""
    return k_BHSd.size(2) > KEPT_PER_WIDTH * k_BHSd.size(3)


def _votes_of(
    q_BHbd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, voters_Bb: Tensor | None
) -> Tensor:
    """(B, H, S) what some voters give to the tokens of their groups."""
    scores_BHbS = q_BHbd @ k_BHSd.mT
    if mask_BS is None or voters_Bb is None:
        return scores_BHbS.softmax(dim=-1).sum(dim=2)
    scores_BHbS = scores_BHbS.masked_fill(~mask_BS[:, None, None], -torch.inf)
    votes_B11b = voters_Bb[:, None, None].to(scores_BHbS.dtype)
    return (votes_B11b @ scores_BHbS.softmax(dim=-1)).squeeze(2)


def neighbor_votes(q_THd: Tensor, k_THd: Tensor, edge_index: Tensor) -> Tensor:
    """(T, H) votes, if each node spreads one vote over its out-neighbors and itself; O(edges).

    Every node counts itself once, whether or not the graph has self-loops; parallel edges count
    once each. Scores come from :func:`gmoe.sums.dot`, which holds no (M, d) tensor.

    Args:
        q_THd: queries, already divided by sqrt(d).
        k_THd: keys.
        edge_index: (2, num_edges) from voters to the nodes that they vote for.
    """
    num_tokens = k_THd.size(0)
    voter_M, chosen_M = edge_index
    every_T = torch.arange(num_tokens, device=k_THd.device)
    senders, receivers = torch.cat([chosen_M, every_T]), torch.cat([voter_M, every_T])
    edges = Edges.sorted(senders, receivers, num_tokens, num_tokens)
    # Self-loops of the graph itself stay, without a share, since their number depends on the data.
    is_second_M = (edges.sender == edges.receiver) & (edges.order < voter_M.size(0))
    score_MH = dot(q_THd, k_THd, edges)
    score_MH = score_MH.masked_fill(is_second_M[:, None], -torch.inf)
    share_MH = softmax(score_MH, edges)
    return k_THd.new_zeros(k_THd.shape[:2]).index_add(0, edges.sender, share_MH)
