"""Balance the load by a bias per expert.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least
from gmoe.routers.base import Router, float_linear

MEAN_RATE = 0.1
"""Share of a step's mean token in the running mean: about the last ten steps count."""

ROUNDED = 16.0
"""A variance below this many roundings of the mean square is taken as zero."""


class BalancedRouter(Router):
    r"""A token-choice router that balances the load by a bias per expert, without a loss.

    The method is that of DeepSeek-V3 (2024): the bias is added to the logits for the selection, not
    for the weights. Each training step moves it toward equal load, by ``bias_rate`` times the
    spread of the logits times :math:`(\bar n - n_e) / \bar n` in [-1, 1], where :math:`n_e` is
    the number of tokens that the expert would take without noise.

    The logits are those of the centered token, :math:`(x_t - \mu) W`, where :math:`\mu` is a
    running mean of the tokens (that of the first step, then a tenth of each new one). Without
    centering, what all tokens have in common would move all of them to one expert in one step,
    faster than the bias can follow.

    A step's load and mean take effect in the next forward in training, so that a checkpoint's
    recomputation selects the same experts, as long as every forward is followed by its own
    backward.

    Args:
        dim, num_experts, k, kwargs: see :class:`gmoe.Router`.
        bias_rate: largest step of the bias, in units of the logits' spread; ``None`` for
            neither bias nor mean.

    Attributes:
        bias_E, mean_D: what the current step uses.
        next_bias_E, next_mean_D: what the next training step starts with.
    """

    bias_E: Tensor
    mean_D: Tensor
    next_bias_E: Tensor
    next_mean_D: Tensor

    def __init__(
        self, dim: int, *, num_experts: int, k: int, bias_rate: float | None, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, **kwargs)
        self.bias_rate = bias_rate or 0.0
        if bias_rate is None:
            return
        check_at_least(0, bias_rate=bias_rate)
        for prefix in ("", "next_"):
            self.register_buffer(f"{prefix}bias_E", torch.zeros(num_experts))
            self.register_buffer(f"{prefix}mean_D", torch.zeros(dim))

    def centered_step(self, x_TD: Tensor, gate: nn.Module) -> Tensor:
        """(T, A) the logits of the centered tokens, to which the selection adds ``bias_E``.

        A training step first applies what the last step counted, then stores what it counts itself.
        A step with a NaN or infinite token changes nothing.
        """
        is_step = self.is_training_step()
        if is_step:
            self.update_counter(self.bias_E, self.next_bias_E)
            self.update_counter(self.mean_D, self.next_mean_D)
        logits_TA = self.centered(x_TD, gate)
        if is_step:
            self._store_next(x_TD.detach(), self.of_alive(logits_TA.detach()))
        return logits_TA

    def centered(self, x_TD: Tensor, gate: nn.Module) -> Tensor:
        """(T, A) a linear layer of the tokens minus their running mean."""
        # Keep this as a sum. Inductor stores the result of a sum for the backward pass, but would
        # read a copy of the buffer again there, when the buffer holds a later step's mean.
        zeros_D = torch.zeros_like(self.mean_D)
        mean_1D = torch.stack((self.mean_D, zeros_D)).sum(dim=0, keepdim=True)
        return float_linear(x_TD, gate) - float_linear(mean_1D.to(x_TD.dtype), gate)

    def _store_next(self, x_TD: Tensor, clean_TE: Tensor) -> None:
        """Store the next bias and the next mean.

        Args:
            x_TD: the tokens of this step.
            clean_TE: (T, E) their logits without noise.
        """
        num_experts = self.num_experts

        # 1. Who would take what: 1 for each chosen pair.
        ranked_TE = clean_TE + self.bias_E
        if self.k == 1:
            expert_TK = ranked_TE.argmax(-1, keepdim=True)
        else:
            expert_TK = ranked_TE.topk(self.k, dim=-1).indices
        load_TE = torch.zeros_like(clean_TE).scatter(1, expert_TK, 1.0)

        # 2. Means over the tokens of all processes, of everything at once: one collective. The sum
        # of the loads is K times the number of tokens; without tokens the means are NaN.
        parts = (load_TE, clean_TE, clean_TE.square(), x_TD)
        (sums,) = self.summed(torch.cat([part.sum(dim=0) for part in parts]))
        means = sums / (sums[:num_experts].sum() / self.k)
        load_E, logit_E, square_E, mean_D = means.split([*[num_experts] * 3, self.dim])

        # 3. The spread of the logits: E[l^2] - E[l]^2, and zero if only rounding is left of it.
        var_E = torch.addcmul(square_E, logit_E, logit_E, value=-1)
        rounding_E = ROUNDED * torch.finfo(var_E.dtype).eps * square_E
        var_E = var_E * (var_E > rounding_E)
        spread = var_E.mean().sqrt()

        # 4. Move the bias toward equal load, and the mean toward that of this step.
        even = self.k / num_experts
        step_E = (even - load_E).clamp(min=-even)
        bias_E = torch.addcmul(self.bias_E, step_E, spread, value=self.bias_rate / even)
        moved_D = self.mean_D.add(mean_D - self.mean_D, alpha=MEAN_RATE)
        mean_D = torch.where(self.mean_D.any(), moved_D, mean_D)  # the first step sets the mean

        # 5. Keep the old values if anything is NaN or infinite.
        finite = torch.linalg.vector_norm(means, torch.inf) < torch.inf
        self.update_counter(self.next_bias_E, torch.where(finite, bias_E, self.bias_E))
        self.update_counter(self.next_mean_D, torch.where(finite, mean_D, self.mean_D))
