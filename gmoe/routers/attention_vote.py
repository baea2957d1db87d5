"""Attention vote: each expert picks the tokens to which the others attend.

Shapes: T tokens, D width, E experts, H voting heads, d head width, B groups, S tokens per group, b
voters of a block, c columns, M edges with a self-loop added per token, P (token, expert) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gmoe import portable
from gmoe._autograd import gradients_of, operator, unbatched
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

BLOCK_ELEMENTS = 2**22
"""Scores held at once: 16 MiB in float32. Votes need this much memory, and O(T)."""

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
        return Routing(token_P, offsets_E, weight_P, votes_TE, num_tokens, validate=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope={self.scope!r}"


@exported_as(portable.group_votes)
def group_votes(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B, H, S) the votes that each token gets from its group; exact, in O(S) memory.

    Args:
        q_BHSd: queries, already divided by sqrt(d).
        k_BHSd: keys.
        mask_BS: which slots hold a token; ``None`` for all. Padding neither votes nor gets votes.
    """
    is_large = k_BHSd.size(2) > KEPT_PER_WIDTH * k_BHSd.size(3)
    vote = _Votes.apply if is_large else portable.group_votes
    return vote(q_BHSd, k_BHSd, mask_BS)


def _empty_votes(_: Tensor, k_BHSd: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
    """The shapes of :func:`_vote_by_blocks`, for compilers."""
    return k_BHSd.new_empty(k_BHSd.shape[:-1]), k_BHSd.new_empty(k_BHSd.shape[:-1])


@operator(fake=_empty_votes)
def _vote_by_blocks(
    q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, H, S) votes, and (B, H, S) each voter's log-sum-exp, a block of voters at a time.

    All blocks share one buffer: a new tensor for each block would leave the allocator with holes
    too small for the next block.
    """
    votes_BHS = k_BHSd.new_zeros(k_BHSd.shape[:-1])
    log_sum_BHS = torch.empty_like(votes_BHS)  # of each voter's exponentials, for the backward
    for voters, share_BHbS in _blocks(q_BHSd, k_BHSd, mask_BS):
        log_sum_BHb = share_BHbS.logsumexp(dim=-1)
        log_sum_BHS[:, :, voters] = log_sum_BHb
        share_BHbS.sub_(log_sum_BHb[..., None]).exp_()  # a softmax in place
        vote_BHb = torch.ones_like(log_sum_BHb)
        if mask_BS is not None:
            vote_BHb *= mask_BS[:, None, voters]
        votes_BHS += (vote_BHb[:, :, None] @ share_BHbS).squeeze(2)
    return votes_BHS, log_sum_BHS


def _empty_like_keys(_: Tensor, __: Tensor, k_BHSd: Tensor, *___: Any) -> tuple[Tensor, Tensor]:
    """The shapes of :func:`_vote_by_blocks_backward`, for compilers."""
    return k_BHSd.new_empty(k_BHSd.shape), k_BHSd.new_empty(k_BHSd.shape)


@operator(fake=_empty_like_keys)
def _vote_by_blocks_backward(
    grad_BHS: Tensor, q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, log_sum_BHS: Tensor
) -> tuple[Tensor, Tensor]:
    r"""(B, H, S, d) the gradients of the queries, and of the keys.

    The shares are computed again, block by block. With shares P of the voters' votes and gradients
    g of the votes, the gradient of a voter's scores is P (g - P g). Both factors go into the small
    matrices, so that no second matrix of scores is needed: :math:`dQ = P (g K) - (P g) (P K)` and
    :math:`dK = g (P^T Q) - P^T ((P g) Q)`.
    """
    grad_q_BHSd = k_BHSd.new_zeros(k_BHSd.shape)
    grad_k_BHSd = k_BHSd.new_zeros(k_BHSd.shape)
    grad_BHS1 = grad_BHS[..., None]
    width = k_BHSd.size(-1)
    # Columns side by side, so that the large matrix is read once for all of them.
    columns_BHSc = torch.cat([k_BHSd, grad_BHS1 * k_BHSd, grad_BHS1], dim=-1)
    for voters, share_BHbS in _blocks(q_BHSd, k_BHSd, mask_BS):
        share_BHbS.sub_(log_sum_BHS[:, :, voters, None]).exp_()
        if mask_BS is not None:
            share_BHbS *= mask_BS[:, None, voters, None]
        means_BHbc = share_BHbS @ columns_BHSc
        mean_k, mean_grad_k, mean_grad = means_BHbc.split([width, width, 1], dim=-1)
        grad_q_BHSd[:, :, voters] = mean_grad_k - mean_grad * mean_k
        q_BHbd = q_BHSd[:, :, voters]
        voters_BHbc = torch.cat([q_BHbd, mean_grad * q_BHbd], dim=-1)
        received_BHSc = share_BHbS.transpose(-1, -2) @ voters_BHbc
        of_all, of_mean = received_BHSc.split(width, dim=-1)
        grad_k_BHSd += grad_BHS1 * of_all - of_mean
    return grad_q_BHSd, grad_k_BHSd


class _Votes(torch.autograd.Function):
    """Votes by blocks, with a gradient."""

    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None) -> Tensor:
        votes_BHS, log_sum_BHS = _vote_by_blocks(q_BHSd, k_BHSd, mask_BS)
        ctx.save_for_backward(q_BHSd, k_BHSd, mask_BS, log_sum_BHS)
        return votes_BHS

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_BHS: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        q_BHSd, k_BHSd, mask_BS, log_sum_BHS = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass is differentiated itself

            def plain(q_BHSd: Tensor, k_BHSd: Tensor) -> Tensor:
                return portable.group_votes(q_BHSd, k_BHSd, mask_BS)

            needs = ctx.needs_input_grad[:2]
            grad_q, grad_k = gradients_of(plain, (q_BHSd, k_BHSd), needs, grad_BHS)
            return grad_q, grad_k, None
        grad_q, grad_k = _vote_by_blocks_backward(grad_BHS, q_BHSd, k_BHSd, mask_BS, log_sum_BHS)
        return grad_q, grad_k, None


def _blocks(
    q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Some voters at a time as a slice, and (B, H, b, S) their scores of all tokens.

    The scores are in a buffer that the next ones overwrite.
    """
    batch, heads, size, _ = k_BHSd.shape
    at_once = max(BLOCK_ELEMENTS // max(batch * heads * size, 1), 1)
    # As many voters as fit, in blocks of nearly equal length.
    block = math.ceil(size / math.ceil(size / at_once))
    buffer = k_BHSd.new_empty(batch * heads * block * size)
    for start in range(0, size, block):
        voters = slice(start, min(start + block, size))
        number = voters.stop - voters.start
        used = buffer[: batch * heads * number * size]
        scores_BHbS = used.view(batch, heads, number, size)
        torch.matmul(q_BHSd[:, :, voters], k_BHSd.transpose(-1, -2), out=scores_BHbS)
        if mask_BS is not None:
            scores_BHbS.masked_fill_(~mask_BS[:, None, None], -torch.inf)
        yield voters, scores_BHbS


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
