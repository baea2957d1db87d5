"""Balance by a bias per expert. Shapes: T tokens, D width, E experts, K experts per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least
from gmoe.routers.base import Router, float_linear

MEAN_RATE = 0.1
"""Share of a step's mean token in the running mean."""

ROUNDED = 16.0
"""A variance below so many roundings of the mean square is none."""


class BalancedRouter(Router):
    r"""A token-choice router whose load is kept even by a bias per expert, without a loss
    (DeepSeek-V3, 2024).

    The bias is added to the logits for the selection, not for the weights. Each training step moves
    it toward equal load, by ``bias_rate`` times the spread of the logits times
    :math:`(\bar n - n_e) / \bar n` in [-1, 1], with :math:`n_e` what the expert would take without
    noise. The logits are those of the centered token, :math:`(x_t - \mu) W`, with :math:`\mu` a
    running mean of the tokens (that of the first step, then a tenth of each new one): what all
    tokens have in common would move all of them to one expert at a step, faster than the bias can
    follow. A step's load and mean take effect with the next forward in training, so that a
    checkpoint's recomputation selects the same, as long as every forward is followed by its own
    backward.

    Args:
        dim, num_experts, k, kwargs: see :class:`gmoe.Router`.
        bias_rate: largest step of the bias, in units of the logits' spread; ``None`` for no bias
            and no mean.

    Attributes:
        bias_E, mean_D: what the current step uses.
        next_bias_E, next_mean_D: what the next training step starts with.
    """

    bias_E: Tensor
    mean_D: Tensor
    next_bias_E: Tensor
    next_mean_D: Tensor

    def __init__(
        self, dim: int, num_experts: int, k: int, *, bias_rate: float | None, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_experts, k, **kwargs)
        self.bias_rate = bias_rate or 0.0
        if bias_rate is None:
            return
        check_at_least(0, bias_rate=bias_rate)
        for when in ("", "next_"):
            self.register_buffer(f"{when}bias_E", torch.zeros(num_experts))
            self.register_buffer(f"{when}mean_D", torch.zeros(dim))

    def balanced(self, x_TD: Tensor, gate: nn.Module) -> Tensor:
        """(T, E) the logits of the centered tokens, to which the selection adds ``bias_E``.

        A training step first applies what the last one counted, then stores what this one counts;
        one whose sums are not finite (a NaN token) changes nothing.
        """
        is_step = self.is_training_step()
        if is_step:
            self.bias_E.copy_(self.next_bias_E)
            self.mean_D.copy_(self.next_mean_D)
        # A sum, since inductor keeps sums: a copy it would read again in the backward, where it is
        # a later step's.
        mean_1D = torch.stack((self.mean_D, torch.zeros_like(self.mean_D))).sum(dim=0, keepdim=True)
        logits_TE = float_linear(x_TD, gate) - float_linear(mean_1D.to(x_TD.dtype), gate)
        if is_step:
            self._count(x_TD.detach(), logits_TE.detach())
        return logits_TE

    def _count(self, x_TD: Tensor, clean_TE: Tensor) -> None:
        """Store the bias and the mean that follow from a step's tokens and their logits without
        noise.
        """
        num_experts, ranked_TE = self.num_experts, clean_TE + self.bias_E
        expert_TK = (
            ranked_TE.argmax(-1, keepdim=True)
            if self.k == 1
            else ranked_TE.topk(self.k, dim=-1).indices
        )
        load_TE = torch.zeros_like(clean_TE).scatter(1, expert_TK, 1.0)
        parts = (load_TE, clean_TE, clean_TE.square(), x_TD)
        (sums,) = self.summed(torch.cat([part.sum(dim=0) for part in parts]))
        means = sums / (sums[:num_experts].sum() / self.k)  # NaN where there are no tokens
        load_E, logit_E, square_E, mean_D = means.split([*[num_experts] * 3, self.dim])
        var_E = torch.addcmul(square_E, logit_E, logit_E, value=-1)
        var_E = var_E * (
            var_E > ROUNDED * torch.finfo(var_E.dtype).eps * square_E
        )  # equal logits have no spread
        even = self.k / num_experts
        step_E = (even - load_E).clamp(min=-even)
        bias_E = torch.addcmul(
            self.bias_E, step_E, var_E.mean().sqrt(), value=self.bias_rate / even
        )
        mean_D = torch.where(
            self.mean_D.any(), self.mean_D.add(mean_D - self.mean_D, alpha=MEAN_RATE), mean_D
        )
        finite = torch.linalg.vector_norm(means, torch.inf) < torch.inf
        self.next_bias_E.copy_(torch.where(finite, bias_E, self.bias_E))
        self.next_mean_D.copy_(torch.where(finite, mean_D, self.mean_D))
