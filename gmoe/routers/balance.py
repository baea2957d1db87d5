"""Balance the load by a bias per expert.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least
from gmoe.distributed import world_size
from gmoe.routers.base import Router, scores_of

MEAN_RATE = 0.1
"""Share of a step's mean token in the running mean: about the last ten steps count."""


class BalancedRouter(Router):
    r"""A token-choice router that explores by noise, and balances the load without a loss.

    The noise is N(0, 1) times the logits' own standard deviation over the tokens, their spread.

    The balance is that of DeepSeek-V3 (2024): a bias per expert is added to the logits for the
    selection, not for the weights. Each training step moves it toward equal load, by ``bias_rate``
    times the spread times :math:`(\bar n - n_e) / \bar n` in [-1, 1], where :math:`n_e` is the
    number of tokens that the expert would take without noise.

    The logits are those of the centered token, :math:`(x_t - \mu) W`, where :math:`\mu` is a
    running mean of the tokens (that of the first step, then a tenth of each new one). Without
    centering, what all tokens have in common would move all of them to one expert in one step,
    faster than the bias can follow.

    A step's load and mean take effect in the next forward in training, so that a checkpoint's
    recomputation selects the same experts, as long as every forward is followed by its own
    backward.

    Args:
        dim, num_experts, k, kwargs: see :class:`gmoe.Router`.
        noise: add noise in training.
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
        self,
        dim: int,
        *,
        num_experts: int,
        k: int,
        noise: bool,
        bias_rate: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, **kwargs)
        self.noise = noise
        self.bias_rate = bias_rate
        if bias_rate is None:
            return
        check_at_least(0, bias_rate=bias_rate)
        for prefix in ("", "next_"):
            self.register_buffer(f"{prefix}bias_E", torch.zeros(num_experts))
            self.register_buffer(f"{prefix}mean_D", torch.zeros(dim))

    def logits(self, x_TD: Tensor, gate: nn.Module) -> Tensor:
        """(T, A) the logits of the tokens, with noise in training; the selection adds ``bias_E``.

        A training step first applies what the last step counted, then stores what it counts itself.
        A step with a NaN or infinite token changes nothing.
        """
        is_balanced = self.bias_rate is not None
        is_step = is_balanced and self.is_training_step()
        if is_step:
            self.update_counters([self.bias_E, self.mean_D], [self.next_bias_E, self.next_mean_D])
        mean_D = None
        if is_balanced:
            # A copy: the next step may move the mean before this step's backward pass. By a sum,
            # whose result Inductor stores; it would read a clone of the buffer again in the
            # backward pass.
            mean_D = self.mean_D[None].sum(dim=0).to(x_TD.dtype)
        clean_TA = scores_of(gate, x_TD, mean_D)

        has_noise = self.noise and self.training and x_TD.size(0) > 0
        if not (is_step or has_noise):
            return clean_TA
        # The spread of all experts together, times a known number. Not by std(dim=0), which takes
        # eight times as long on a CPU.
        clean_TE = self.of_alive(clean_TA.detach())
        norm = torch.linalg.vector_norm(clean_TE - clean_TE.mean(dim=0))
        # A NaN or infinite token must not become the noise of all others.
        finite_norm = norm.nan_to_num(posinf=0.0)
        if is_step:
            self._store_next(x_TD.detach(), clean_TE, norm, finite_norm)
        if not has_noise:
            return clean_TA
        drawn_TA = _drawn_like(clean_TA)
        return torch.addcmul(clean_TA, drawn_TA, finite_norm, value=clean_TE.numel() ** -0.5)

    def _store_next(
        self, x_TD: Tensor, clean_TE: Tensor, norm: Tensor, finite_norm: Tensor
    ) -> None:
        """Store the next bias and the next mean.

        Args:
            x_TD: the tokens of this step.
            clean_TE: (T, E) their logits without noise.
            norm: of the logits beyond their means.
            finite_norm: the same, or 0 if it is NaN or infinite.
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

        # 2. Means over the tokens of all processes, and what the norm is to be multiplied by.
        if world_size(self.process_group) > 1:
            parts = lack_TE, x_TD, clean_TE, clean_TE.square()
            lack_E, mean_D, logit_E, square_E = self.means(*parts)
            lack_E = lack_E.nan_to_num()  # no process has a token
            norm = (square_E - logit_E.square()).clamp(min=0).mean().sqrt()
            finite_norm, scale = norm.nan_to_num(posinf=0.0), 1.0
        elif x_TD.size(0):
            lack_E, mean_D = lack_TE.mean(dim=0), x_TD.mean(dim=0)
            scale = clean_TE.numel() ** -0.5
        else:
            return

        # 3. Move the bias toward equal load, and the mean toward that of this step.
        step_E = lack_E.clamp(min=-even)
        rate = (self.bias_rate or 0.0) / even * scale
        bias_E = torch.addcmul(self.bias_E, step_E, finite_norm, value=rate)
        moved_D = self.mean_D.lerp(mean_D.to(self.mean_D), MEAN_RATE)
        mean_D = torch.where(self.mean_D.any(), moved_D, mean_D)  # the first step sets the mean
        mean_D = torch.where(norm < torch.inf, mean_D, self.mean_D)
        self.update_counters([self.next_bias_E, self.next_mean_D], [bias_E, mean_D])


def _drawn_like(clean_TA: Tensor) -> Tensor:
    """(T, A) numbers from N(0, 1).

    Not by randn_like: for it, the compiler writes a kernel that takes 20 times as long on a CPU,
    and draws other numbers.
    """
    return torch.empty_like(clean_TA).normal_()
