"""Balance the load by a bias per expert.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least
from gmoe.routers.base import Router, scores_of

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
            self.update_counters([self.bias_E, self.mean_D], [self.next_bias_E, self.next_mean_D])
        # A copy: the next step may move the mean before this step's backward pass. By a sum, whose
        # result Inductor stores; it would read a clone of the buffer again in the backward pass.
        mean_D = self.mean_D[None].sum(dim=0)
        logits_TA = scores_of(gate, x_TD, mean_D.to(x_TD.dtype))
        if is_step:
            self._store_next(x_TD.detach(), self.of_alive(logits_TA.detach()))
        return logits_TA

    def _store_next(self, x_TD: Tensor, clean_TE: Tensor) -> None:
        """Store the next bias and the next mean.

        Args:
            x_TD: the tokens of this step.
            clean_TE: (T, E) their logits without noise.
        """
        # 1. What each expert lacks of an equal load: its share for each token, less 1 for each that
        # it would take.
        ranked_TE = clean_TE + self.bias_E
        if self.k == 1:
            expert_TK = ranked_TE.argmax(-1, keepdim=True)
        else:
            expert_TK = ranked_TE.topk(self.k, dim=-1).indices
        even = self.k / self.num_experts
        lack_TE = torch.full_like(clean_TE, even).scatter_(1, expert_TK, even - 1)

        # 2. Means over the tokens of all processes; without tokens they are NaN.
        rows = torch.cat([lack_TE, clean_TE, clean_TE.square()], dim=1)
        means, mean_D = self.means(rows, x_TD)
        lack_E, logit_E, square_E = means.view(3, self.num_experts)

        # 3. The spread of the logits: E[l^2] - E[l]^2, and zero if only rounding is left of it.
        rounding = ROUNDED * torch.finfo(square_E.dtype).eps
        var_E = torch.addcmul(square_E, logit_E, logit_E, value=-1 / (1 - rounding))
        spread = var_E.clamp_(min=0).mean().sqrt()

        # 4. Move the bias toward equal load, and the mean toward that of this step.
        step_E = lack_E.clamp(min=-even)
        bias_E = torch.addcmul(self.bias_E, step_E, spread, value=self.bias_rate / even)
        moved_D = self.mean_D.lerp(mean_D.to(self.mean_D), MEAN_RATE)
        mean_D = torch.where(self.mean_D.any(), moved_D, mean_D)  # the first step sets the mean

        # 5. Keep the old values if any token is NaN or infinite, which the spread then is, too.
        is_finite = spread < torch.inf
        found = [
            torch.where(is_finite, new, old)
            for new, old in ((bias_E, self.bias_E), (mean_D, self.mean_D))
        ]
        self.update_counters([self.next_bias_E, self.next_mean_D], found)
