"""Experts choose tokens. Shapes: T tokens, E experts, C capacity, P pairs."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmoe._checks import check_choice, check_positive
from gmoe.routing.pools import Pools
from gmoe.routing.router import gather_pairs
from gmoe.routing.select import pairs_of_experts, pairs_of_mask

Normalize: TypeAlias = Literal["experts", "tokens"]
Inference: TypeAlias = Literal["pool", "threshold"]


class Chosen(NamedTuple):
    """Pairs, the logarithm of their gates, and all scores."""

    token_P: Tensor
    offsets_E: Tensor
    log_gate_P: Tensor
    scores_TE: Tensor


class ExpertSide(nn.Module):
    """Each expert takes its ``C = clamp(ceil(capacity_factor * K * T_pool / E), 1, T_pool)`` best tokens of a pool.

    In threshold inference it keeps, for each expert, a running mean of the logarithm of the score of the last token
    taken (the *cut*) and, where gates run along tokens, of what divides them (the *scale*; the cut is then one of
    logits); at evaluation each token then decides alone.

    Args:
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1``.
        capacity_factor: more (or fewer) tokens than that.
        normalize: softmax of the logits over ``"experts"`` or over the ``"tokens"`` of the pool.
        inference: ``"pool"`` or ``"threshold"``.
        momentum: share of the newest training step in the running means; the first ``1 / momentum`` steps are
            averaged evenly.
    """

    cut_E: Tensor
    log_scale_E: Tensor
    steps: Tensor

    def __init__(
        self,
        num_experts: int,
        k: int,
        capacity_factor: float,
        normalize: Normalize,
        inference: Inference,
        momentum: float,
    ) -> None:
        super().__init__()
        check_positive("capacity_factor", capacity_factor)
        check_choice("normalize", normalize, get_args(Normalize))
        check_choice("inference", inference, get_args(Inference))
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: got {momentum}, expected a number in (0, 1]")
        self.num_experts = num_experts
        self.k = k
        self.capacity_factor = capacity_factor
        self.normalize = normalize
        self.inference = inference
        self.momentum = momentum
        if inference == "threshold":
            self.register_buffer("cut_E", torch.zeros(num_experts))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            if normalize == "tokens":
                self.register_buffer("log_scale_E", torch.zeros(num_experts))

    @property
    def experts_per_token(self) -> float:
        """Average number of experts of a token."""
        return min(self.k * self.capacity_factor, float(self.num_experts))

    def reset_parameters(self) -> None:
        """Forget the running means."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(
        self, logits_TE: Tensor, pools: Pools, advance: bool, tolerance: float = 0.0, scale: Tensor | float = 1.0
    ) -> Chosen:
        """Choose; ``advance`` says whether this is a training step that the running means count.

        Log-scores times ``scale`` that differ by at most ``tolerance`` times their size, or times 1 where they are
        smaller, are ties.
        """
        if self.inference == "threshold" and not self.training:
            return self._by_threshold(logits_TE)
        along_tokens = self.normalize == "tokens"
        # inside a pool the softmax along tokens ranks as the logits do
        ranked_TE = logits_TE if along_tokens else logits_TE.log_softmax(dim=-1)
        log_scores_TE = logits_TE - pools.logsumexp(logits_TE) if along_tokens else ranked_TE
        capacity = pools.capacity(self.k, self.num_experts, self.capacity_factor)
        order_TE = ranked_TE.detach()
        if tolerance > 0:  # which is relative, and a logarithm may be 0
            order_TE = log_scores_TE.detach() * scale - 1
        token_EC = pools.top_tokens(order_TE, capacity, tolerance)
        token_P, offsets_E = pairs_of_experts(token_EC)
        log_gate_P = gather_pairs(log_scores_TE, token_P, offsets_E)
        if advance and self.inference == "threshold" and token_P.numel() > 0:
            self._count(ranked_TE.detach(), log_gate_P.detach(), token_EC, pools)
        return Chosen(token_P, offsets_E, log_gate_P, log_scores_TE.exp())

    def _by_threshold(self, logits_TE: Tensor) -> Chosen:
        if int(self.steps) == 0:
            raise RuntimeError("inference='threshold' has no cut scores yet: run a training step or load a state dict")
        along_tokens = self.normalize == "tokens"
        ranked_TE = logits_TE if along_tokens else logits_TE.log_softmax(dim=-1)
        log_scores_TE = logits_TE - self.log_scale_E if along_tokens else ranked_TE
        token_P, offsets_E = pairs_of_mask(ranked_TE >= self.cut_E)
        return Chosen(token_P, offsets_E, gather_pairs(log_scores_TE, token_P, offsets_E), log_scores_TE.exp())

    @torch.no_grad()
    def _count(self, ranked_TE: Tensor, log_gate_P: Tensor, token_EC: Tensor, pools: Pools) -> None:
        """Advance the running means by this step: the mean over its pools."""
        pool_EC = pools.of(token_EC.reshape(-1)).view_as(token_EC)
        cut_EB = ranked_TE.new_full((self.num_experts, pools.num_pools), torch.inf).scatter_reduce(
            1, pool_EC, ranked_TE.T.gather(1, token_EC), "amin"
        )
        self.steps += 1
        share = (1.0 / self.steps.float()).clamp(min=self.momentum).to(self.cut_E.dtype)
        self.cut_E.lerp_(cut_EB.mean(dim=1).to(self.cut_E.dtype), share)
        if self.normalize == "tokens":
            # gate = exp(logit - log_sum); dividing by the pool's mean gate makes the scale log_sum + log(mean)
            mean_P = pools.mean_of_pairs(log_gate_P.exp(), token_EC.reshape(-1))
            log_sum_P = ranked_TE.T.gather(1, token_EC).reshape(-1) - log_gate_P
            log_scale_EC = (log_sum_P + mean_P.log()).view_as(token_EC)
            log_scale_EB = torch.zeros_like(cut_EB).scatter(1, pool_EC, log_scale_EC)  # the same in all of a pool
            self.log_scale_E.lerp_(log_scale_EB.mean(dim=1).to(self.log_scale_E.dtype), share)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, inference={self.inference!r}, capacity_factor={self.capacity_factor}"
