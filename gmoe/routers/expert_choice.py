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

Normalize: TypeAlias = Literal["experts", "tokens"]
Inference: TypeAlias = Literal["group", "threshold"]

MOMENTUM = 0.1
"""Share of a training step in the running means; the first ten steps are averaged evenly."""


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
        normalize: ``"experts"`` (default): softmax over experts, as in the paper. ``"tokens"``:
            softmax over the tokens of the group; with ``weight="score"`` the weights are then
            divided by the detached mean of the group's selected ones and capped at 10.
        inference: how experts choose in evaluation. ``"group"`` (default): as in training, so that
            a token's experts depend on its group. ``"threshold"``: an expert takes every token
            whose score reaches a threshold, so that a token's experts depend on that token alone.
            The threshold is a running mean, by a tenth a step, of the lowest score that the expert
            took in training; it needs at least one training step.
        z_coef: coefficient of the router z-loss (default 0, no loss).
        init_scale: factor of ``nn.Linear``'s initial weights (default 0.1, as in Switch
            Transformer): a softmax that is sharp from the start hardly learns.

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
        normalize: Normalize = "experts",
        inference: Inference = "group",
        z_coef: float = 0.0,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, weight=weight)
        check_at_least(0, z_coef=z_coef, init_scale=init_scale)
        self.z_coef = z_coef
        self.init_scale = init_scale
        self.gate = Gate(dim, num_experts)
        self.selection = ExpertSelection(num_experts, capacity_factor, normalize, inference)
        self.by_token = inference == "threshold"
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.gate, self.init_scale)
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

    For threshold inference it keeps running means for each expert: of the logarithm of the lowest
    score that it took (the *threshold*), and, if gates are normalized over tokens, of the logarithm
    of what divides them (the *scale*; the threshold is then one of logits). In evaluation they
    stand for the group, so that each token is routed by itself.

    Args:
        num_experts: E.
        capacity_factor: scales the number of tokens that an expert takes.
        normalize: softmax of the logits over ``"experts"`` or over the ``"tokens"`` of the group.
        inference: ``"group"`` or ``"threshold"``.
    """

    threshold_E: Tensor
    log_scale_E: Tensor
    steps: Tensor

    def __init__(
        self, num_experts: int, capacity_factor: float, normalize: Normalize, inference: Inference
    ) -> None:
        super().__init__()
        check_positive("capacity_factor", capacity_factor)
        check_choice("normalize", normalize, Normalize)
        check_choice("inference", inference, Inference)
        self.capacity_factor = capacity_factor
        self.normalize = normalize
        self.inference = inference
        if inference == "threshold":
            self.register_buffer("threshold_E", at_least_float32(torch.zeros(num_experts)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            if normalize == "tokens":
                self.register_buffer("log_scale_E", at_least_float32(torch.zeros(num_experts)))

    def reset_parameters(self) -> None:
        """Forget the running means."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(
        self,
        router: Router,
        logits_TA: Tensor,
        group: Tensor | int,
        losses: Mapping[str, AuxLoss],
    ) -> Routing:
        """Select the pairs, and move the running means.

        Args:
            router: the router, for its experts, its weighting and its process group.
            logits_TA: the logits.
            group: the tokens that compete, see :meth:`gmoe.routers.Router.route`.
            losses: auxiliary losses, which the routing passes on.
        """
        num_tokens = logits_TA.size(0)
        along_tokens = self.normalize == "tokens"
        # Inside a group, the softmax over tokens ranks them as the logits do.
        ranked_TA = logits_TA if along_tokens else logits_TA.log_softmax(dim=-1)
        ranked_TE = router.of_alive(ranked_TA)
        log_scores_TE = ranked_TE

        if self.inference == "threshold" and not self.training:
            # Each token by itself: the running means stand for the group.
            if int(self.steps) == 0:
                raise RuntimeError(
                    "inference: got 'threshold' before there are thresholds, expected a training "
                    "step or a loaded state first"
                )
            if along_tokens:
                log_scores_TE = ranked_TE - self.log_scale_E
            token_P, offsets_E = pairs_of_mask((ranked_TE >= self.threshold_E).T)
            log_gate_P = gather_pairs(log_scores_TE, token_P, offsets_E)
        else:
            groups = Groups.of(group, num_tokens)
            if along_tokens:
                log_scores_TE = ranked_TE - groups.logsumexp(ranked_TE)
            share = self.capacity_factor * router.k / router.num_scored
            token_P, offsets_E, log_gate_P = groups.best_pairs(
                ranked_TE, log_scores_TE, share, along_tokens
            )
            if self.inference == "threshold" and router.is_training_step():
                self._update(router, ranked_TE.detach(), log_gate_P.detach(), token_P, groups)

        weight_P = pair_weights(router.weight, log_gate_P, token_P, num_tokens)
        return Routing(
            token_P, offsets_E, weight_P, log_scores_TE.exp(), num_tokens, losses, validate=False
        )

    def _update(
        self, router: Router, ranked_TE: Tensor, log_gate_P: Tensor, token_P: Tensor, groups: Groups
    ) -> None:
        """Move the running means by the mean of a step over the groups of all processes.

        Without groups, or if the mean is NaN or infinite, they stay.

        Args:
            router: for its process group.
            ranked_TE: what tokens were ranked by.
            log_gate_P: logarithms of the gates of the chosen pairs.
            token_P: their tokens: each expert has as many.
            groups: the groups.
        """
        # 1. The lowest score that each expert took in each group.
        num_groups = groups.num_groups
        token_EC = token_P.view(router.num_experts, -1)
        group_EC = groups.of_tokens(token_P).view_as(token_EC)
        ranked_EC = ranked_TE.T.gather(1, token_EC)
        last_EB = ranked_EC.new_full((token_EC.size(0), num_groups), torch.inf)
        last_EB = last_EB.scatter_reduce(1, group_EC, ranked_EC, "amin")
        means = [self.threshold_E]
        sums = [last_EB.sum(dim=1)]

        # 2. The scale of each group: gate = exp(logit) / scale, the same for all its tokens.
        if self.normalize == "tokens":
            log_scale_EC = ranked_EC - log_gate_P.view_as(token_EC)
            means.append(self.log_scale_E)
            sums.append(last_EB.scatter(1, group_EC, log_scale_EC).sum(dim=1))

        # 3. Move the means: the first ten steps count evenly.
        num_groups_all, *sums = router.summed(last_EB.new_full((), num_groups), *sums)
        is_valid = (num_groups_all > 0) & torch.cat(sums).isfinite().all()
        router.update_counter(self.steps, self.steps + is_valid)
        share = (1.0 / self.steps.clamp(min=1)).clamp(min=MOMENTUM)
        for mean_E, sum_E in zip(means, sums, strict=True):
            step_E = sum_E / num_groups_all
            moved_E = mean_E + share.to(mean_E.dtype) * (step_E - mean_E)
            router.update_counter(mean_E, torch.where(is_valid, moved_E, mean_E))

    def extra_repr(self) -> str:
        return (
            f"normalize={self.normalize!r}, inference={self.inference!r}, "
            f"capacity_factor={self.capacity_factor}"
        )
