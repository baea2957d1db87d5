"""Expert choice: each expert picks its top-C tokens.

Shapes: T tokens, D width, A experts with those that were pruned, E without, C capacity, B groups, P
(token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least, check_choice, check_positive
from gmoe.choices import over_experts
from gmoe.routers.base import (
    Gate,
    Router,
    Weighting,
    at_least_float32,
    pair_weights,
    reset_linear,
    scores_of,
)
from gmoe.routers.groups import Groups, gather_pairs, pairs_of_mask
from gmoe.routing import AuxLoss, Routing

Inference: TypeAlias = Literal["group", "threshold"]

MOMENTUM = 0.1
"""Share of a training step in the thresholds; the first ten steps are averaged evenly."""


class ExpertChoice(Router):
    r"""Each expert picks its top-C tokens of a group (Zhou et al., 2022).

    .. math::
        g = \mathrm{softmax}(X W), \quad
        C = \mathrm{clamp}(\lceil \mathrm{cf} \cdot K \cdot T_\mathrm{group} / E \rceil,
            1, T_\mathrm{group})

    The load is even by construction. Call it on a PyG ``Batch`` with ``batch=``: without it, the
    graphs of the batch compete with each other.

    A token may get several experts, or none (then the layer gives it zero). Ties go to the lowest
    token index.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        inference: how experts choose in evaluation. ``"group"`` (default): as in training, so that
            a token's experts depend on its group. ``"threshold"``: an expert takes every token
            whose score reaches a threshold, so that a token's experts depend on that token alone.
            The threshold is a running mean, by a tenth a step, of the lowest score that the expert
            took in training; it needs at least one training step.
        z_coef: coefficient of the router z-loss (default 0, no loss).

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: threshold inference before the first training step.
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
        inference: Inference = "group",
        z_coef: float = 0.0,
    ) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, weight=weight)
        check_at_least(0, z_coef=z_coef)
        self.z_coef = z_coef
        self.gate = Gate(dim, num_experts)
        self.selection = ExpertSelection(num_experts, capacity_factor, inference)
        self.by_token = inference == "threshold"
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.gate)
        self.selection.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        logits_TA = scores_of(self.gate, x_TD)
        losses = {}
        if self.z_coef > 0:
            losses["z"] = AuxLoss(self.z_loss(self.of_alive(logits_TA)), self.z_coef)
        return self.selection(self, logits_TA, group, losses)


class ExpertSelection(nn.Module):
    """Each expert takes its C best tokens of a group, or in evaluation those above a threshold.

    ``C = clamp(ceil(capacity_factor * K * T_group / A), 1, T_group)``: an expert takes as many when
    others are pruned.

    For threshold inference it keeps a running mean for each expert: of the logarithm of the lowest
    score that it took, its *threshold*. In evaluation it stands for the group, so that each token
    is routed by itself.

    Args:
        num_experts: E.
        capacity_factor: scales the number of tokens that an expert takes.
        inference: ``"group"`` or ``"threshold"``.
    """

    threshold_E: Tensor
    steps: Tensor

    def __init__(self, num_experts: int, capacity_factor: float, inference: Inference) -> None:
        super().__init__()
        check_positive("capacity_factor", capacity_factor)
        check_choice("inference", inference, Inference)
        self.capacity_factor = capacity_factor
        self.inference = inference
        if inference == "threshold":
            self.register_buffer("threshold_E", at_least_float32(torch.zeros(num_experts)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        """Forget the thresholds."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(
        self,
        router: Router,
        logits_TA: Tensor,
        group: Tensor | int,
        losses: Mapping[str, AuxLoss],
    ) -> Routing:
        """Select the pairs, and move the thresholds.

        Args:
            router: the router, for its experts, its weighting and its process group.
            logits_TA: the logits.
            group: the tokens that compete, see :meth:`gmoe.routers.Router.route`.
            losses: auxiliary losses, which the routing passes on.
        """
        num_tokens = logits_TA.size(0)
        log_scores_TE = router.of_alive(over_experts(torch.log_softmax, logits_TA))

        if self.inference == "threshold" and not self.training:
            # Each token by itself: the thresholds stand for the group.
            if int(self.steps) == 0:
                raise RuntimeError(
                    "inference: got 'threshold' before there are thresholds, expected a training "
                    "step or a loaded state first"
                )
            token_P, offsets_E = pairs_of_mask((log_scores_TE >= self.threshold_E).T)
        else:
            groups = Groups.of(group, num_tokens)
            share = self.capacity_factor * router.k / router.num_scored
            token_P, offsets_E = groups.best_pairs(log_scores_TE, share)
            if self.inference == "threshold" and router.is_training_step():
                self._update(router, log_scores_TE.detach(), token_P, groups)

        log_gate_P = gather_pairs(log_scores_TE, token_P, offsets_E)
        weight_P = pair_weights(router.weight, log_gate_P, token_P, num_tokens)
        return Routing(
            token_P, offsets_E, weight_P, log_scores_TE.exp(), num_tokens, losses, validate=False
        )

    def _update(
        self, router: Router, log_scores_TE: Tensor, token_P: Tensor, groups: Groups
    ) -> None:
        """Move the thresholds by the mean of a step over the groups of all processes.

        Without groups, or if the mean is NaN or infinite, they stay.

        Args:
            router: for its process group.
            log_scores_TE: what tokens were ranked by.
            token_P: the tokens of the chosen pairs: each expert has as many.
            groups: the groups.
        """
        # 1. The lowest score that each expert took in each group.
        num_groups = groups.num_groups
        token_EC = token_P.view(router.num_experts, -1)
        group_EC = groups.of_tokens(token_P).view_as(token_EC)
        log_score_EC = log_scores_TE.T.gather(1, token_EC)
        last_EB = log_score_EC.new_full((token_EC.size(0), num_groups), torch.inf)
        last_EB = last_EB.scatter_reduce(1, group_EC, log_score_EC, "amin")

        # 2. Move the mean of these: the first ten steps count evenly.
        number = last_EB.new_full((), num_groups)
        number, sum_E = router.summed(number, last_EB.sum(dim=1))
        is_valid = (number > 0) & sum_E.isfinite().all()
        steps = self.steps + is_valid
        share = (1.0 / steps.clamp(min=1)).clamp(min=MOMENTUM)
        before_E = self.threshold_E
        moved_E = before_E + share.to(before_E.dtype) * (sum_E / number - before_E)
        threshold_E = torch.where(is_valid, moved_E, before_E)
        router.update_counters([self.steps, self.threshold_E], [steps, threshold_E])

    def extra_repr(self) -> str:
        return f"inference={self.inference!r}, capacity_factor={self.capacity_factor}"
