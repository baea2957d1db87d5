"""Votes between the tokens of a pool. Shapes: B pools, H voting heads, S tokens a pool, d head width."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmoe._autograd import first_order

BLOCK_ELEMENTS = 2**22
"""Scores held at once: 16 MiB in float32. Memory for votes is this plus O(T)."""

KEPT = 4
"""The softmax is kept for the backward pass where pools hold at most so many tokens for each unit of the head width."""


class _AttentionVotes(torch.autograd.Function):
    """votes_j = sum_i softmax_j(q_i . k_j), a block of voters i at a time.

    With p_ij the softmax and g_j the gradient of votes_j, that of the score s_ij is p_ij (g_j - sum_l p_il g_l). The
    backward pass computes the softmax again, but where one block is all of it and at most twice as large as queries and
    keys are (the patches of an image), it is kept.
    """

    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, block: int) -> Tensor:
        ctx.block = block
        if q_BHSd.size(2) <= min(block, KEPT * q_BHSd.size(3)):
            kept = _ballot(q_BHSd, k_BHSd, mask_BS, slice(None))
            ctx.save_for_backward(q_BHSd, k_BHSd, mask_BS, kept)
            return kept.sum(dim=2)
        ctx.save_for_backward(q_BHSd, k_BHSd, mask_BS, None)
        votes_BHS = k_BHSd.new_zeros(k_BHSd.shape[:-1])
        for rows in _blocks(q_BHSd.size(2), block):
            votes_BHS += _ballot(q_BHSd, k_BHSd, mask_BS, rows).sum(dim=2)
        return votes_BHS

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_BHS: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_BHSd, k_BHSd, mask_BS, kept = ctx.saved_tensors
        grad_q = torch.empty_like(q_BHSd)
        grad_k = torch.zeros_like(k_BHSd)
        for rows in _blocks(q_BHSd.size(2), ctx.block):
            p_BHbS = _ballot(q_BHSd, k_BHSd, mask_BS, rows) if kept is None else kept
            mean_BHb1 = p_BHbS @ grad_BHS[..., None]
            grad_s = (grad_BHS[:, :, None, :] - mean_BHb1).mul_(p_BHbS)
            part = grad_s @ k_BHSd
            grad_q[:, :, rows] = part if q_BHSd.size(1) == part.size(1) else part.sum(dim=1, keepdim=True)
            grad_k += grad_s.transpose(-1, -2) @ q_BHSd[:, :, rows]
        return grad_q, grad_k, None, None


def _blocks(length: int, block: int) -> list[slice]:
    """As many as fit, of nearly equal length."""
    each = math.ceil(length / max(math.ceil(length / block), 1))
    return [slice(start, min(start + each, length)) for start in range(0, length, max(each, 1))]


def _ballot(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None, rows: slice) -> Tensor:
    """(B, H, b, S) how the voters in ``rows`` spread their votes; padding neither votes nor is voted for."""
    scores = q_BHSd[:, :, rows] @ k_BHSd.transpose(-1, -2)
    if mask_BS is None:
        return scores.softmax(dim=-1)
    ballot = scores.masked_fill_(~mask_BS[:, None, None, :], -torch.inf).softmax(dim=-1)
    return ballot.mul_(mask_BS[:, None, rows, None])


def pool_votes(q_BHSd: Tensor, k_BHSd: Tensor, mask_BS: Tensor | None = None, block: int | None = None) -> Tensor:
    """(B, H, S) how much each token is voted for by the tokens of its pool; exact, in O(S) memory.

    Args:
        q_BHSd: queries, already divided by sqrt(d); H may be 1 where all heads share them.
        k_BHSd: keys.
        mask_BS: which slots hold a token; ``None`` for all.
        block: voters at a time; by default as many as fit ``BLOCK_ELEMENTS``.
    """
    if block is None:
        small = k_BHSd.size(2) <= KEPT * k_BHSd.size(3)
        block = max(k_BHSd.size(2) if small else BLOCK_ELEMENTS // max(k_BHSd.shape[:-1].numel(), 1), 1)
    votes: Tensor = _AttentionVotes.apply(q_BHSd, k_BHSd, mask_BS, block)
    return votes
