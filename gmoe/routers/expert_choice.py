"""Expert choice. Shapes: T tokens, D width, E experts, C capacity, P pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from gmoe.losses import square_sum
from gmoe.routers.base import Router, Weighting, float_linear, legal, pair_weights
from gmoe.routers.groups import Groups, gather_pairs, pairs_of_mask
from gmoe.routing import AuxLoss, Routing, in_backward

Normalize: TypeAlias = Literal["experts", "tokens"]
Inference: TypeAlias = Literal["group", "threshold"]


class ExpertChoice(Router):
    r"""Each expert picks its top-C tokens of a group (a PyG ``Batch`` needs ``batch=``: else its graphs compete).

    From Zhou et al. (2022); the load is even by construction.

    .. math::
        g = \mathrm{softmax}(X W), \quad
        C = \mathrm{clamp}(\lceil \mathrm{cf} \cdot K \cdot T_\mathrm{group} / E \rceil, 1, T_\mathrm{group})

    A token may get several experts, or none (then the layer gives it zero). Ties go to the lowest token index.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        normalize: ``"experts"`` (default): softmax over experts, as in the paper. ``"tokens"``: softmax along the
            tokens of the group; with ``weight="score"`` the weights are then divided by the detached mean of the
            group's selected ones and capped at 10.
        inference: at evaluation, ``"group"`` (default): as in training, so that a token's experts depend on its group.
            ``"threshold"``: an expert takes every token whose score reaches a running mean of the last scores that
            were taken in training, so that each token decides alone; needs at least one training step before.
        momentum: share of the newest step in those running means (default 0.1).
        z_coef: coefficient of the router z-loss (default 0, no loss).
        init_scale: factor of ``nn.Linear``'s initial weights (default 0.1, as in Switch Transformer): a softmax that is
            sharp from the start hardly learns.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: threshold inference before the first training step.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        capacity_factor: float = 1.0,
        normalize: Normalize = "experts",
        inference: Inference = "group",
        momentum: float = 0.1,
        z_coef: float = 0.0,
        init_scale: float = 0.1,
        check_finite: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        self.z_coef, self.init_scale = legal("z_coef", z_coef), legal("init_scale", init_scale)
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.selection = ExpertSelection(num_experts, k, capacity_factor, normalize, inference, momentum)
        self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        with torch.no_grad():
            self.gate.weight.mul_(self.init_scale)
        self.selection.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        logits_TE = float_linear(x_TD, self.gate)
        routing, sums = self.selection(logits_TE, group, self.weight)
        if self.z_coef > 0:
            sums |= {"tokens": logits_TE.new_tensor(len(logits_TE)), "z": square_sum(logits_TE)}
        sums = self.summed(sums)
        self.selection.move(sums)
        if self.z_coef > 0:
            z = AuxLoss(sums["z"] / sums["tokens"].clamp(min=1), self.z_coef)
            routing = replace(routing, losses={"z": z}, checked=True)
        return cast("Routing", routing)


class ExpertSelection(nn.Module):
    """Each expert takes its ``C = clamp(ceil(capacity_factor * K * T_group / E), 1, T_group)`` best tokens of a group.

    In threshold inference it keeps, for each expert, a running mean of the logarithm of the score of the last token
    taken (the *threshold*) and, where gates run along tokens, of what divides them (the *scale*; the threshold is then
    one of logits); at evaluation each token then decides alone.

    Args:
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1``.
        capacity_factor: more (or fewer) tokens than that.
        normalize: softmax of the logits over ``"experts"`` or over the ``"tokens"`` of the group.
        inference: ``"group"`` or ``"threshold"``.
        momentum: share of the newest training step in the running means; the first ``1 / momentum`` steps are
            averaged evenly.
    """

    threshold_E: Tensor
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
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: got {momentum}, expected a number in (0, 1]")
        self.num_experts, self.k, self.momentum = num_experts, k, momentum
        self.capacity_factor = legal("capacity_factor", capacity_factor)
        self.normalize = legal("normalize", normalize, Normalize)
        self.inference = legal("inference", inference, Inference)
        if inference == "threshold":
            self.register_buffer("threshold_E", torch.zeros(num_experts))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            if normalize == "tokens":
                self.register_buffer("log_scale_E", torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        """Forget the running means."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(
        self, logits_TE: Tensor, group: Tensor | int, weight: Weighting, scale: Tensor | None = None
    ) -> tuple[Routing, dict[str, Tensor]]:
        """Select the pairs; and, in training, what the running means follow from, as sums over groups.

        Args:
            logits_TE: the logits.
            group: which tokens compete, see :meth:`gmoe.routers.Router.route`.
            weight: how a pair's weight follows from its gate, see :class:`gmoe.routers.Router`.
            scale: log-scores times ``scale`` that differ by rounding only, relative to their size or to 1 where they
                are smaller, are ties; ``None`` (default): only equal ones are.
        """
        along_tokens = self.normalize == "tokens"
        sums: dict[str, Tensor] = {}
        # inside a group the softmax along tokens ranks as the logits do
        ranked_TE = log_scores_TE = logits_TE if along_tokens else logits_TE.log_softmax(dim=-1)
        if self.inference == "threshold" and not self.training:
            if int(self.steps) == 0:
                raise RuntimeError(
                    "inference='threshold' has no thresholds yet: run a training step or load a state dict"
                )
            if along_tokens:
                log_scores_TE = logits_TE - self.log_scale_E
            token_P, offsets_E = pairs_of_mask(ranked_TE >= self.threshold_E)
            log_gate_P = gather_pairs(log_scores_TE, token_P, offsets_E)
        else:
            groups = Groups.of(group, len(logits_TE))
            if along_tokens:
                log_scores_TE = logits_TE - groups.logsumexp(logits_TE)
            # rounding is relative, and a logarithm may be 0
            order_TE = ranked_TE if scale is None else log_scores_TE.detach() * scale - 1
            capacity = groups.capacity(self.k, self.num_experts, self.capacity_factor)
            pairs = groups.best_pairs(order_TE, log_scores_TE, capacity, along_tokens, rounded=scale is not None)
            token_P, offsets_E, log_gate_P = pairs
            if self.inference == "threshold" and not in_backward():
                sums = self._sums(ranked_TE, log_gate_P, token_P.view(self.num_experts, -1), groups)
        weight_P = pair_weights(weight, log_gate_P, token_P, len(logits_TE))
        return Routing(token_P, offsets_E, weight_P, log_scores_TE.exp(), len(logits_TE)), sums

    @torch.no_grad()
    def _sums(self, ranked_TE: Tensor, log_gate_P: Tensor, token_EC: Tensor, groups: Groups) -> dict[str, Tensor]:
        """Sums over the groups of the score of the last token taken and of the scale, and the number of groups."""
        num_groups = groups.num_groups if token_EC.numel() else 0
        group_EC, ranked_EC = groups.of_tokens(token_EC.flatten()).view_as(token_EC), ranked_TE.T.gather(1, token_EC)
        last_EB = ranked_EC.new_full((self.num_experts, num_groups), torch.inf)
        last_EB = last_EB.scatter_reduce(1, group_EC, ranked_EC, "amin")
        sums = {"groups": last_EB.new_tensor(num_groups), "last": last_EB.sum(dim=1)}
        if self.normalize == "tokens":  # gate = exp(logit) / scale, the same scale in all of a group
            log_scale_EC = ranked_EC - log_gate_P.view_as(token_EC)
            sums["log_scale"] = last_EB.scatter(1, group_EC, log_scale_EC).sum(dim=1)
        return sums

    @torch.no_grad()
    def move(self, sums: dict[str, Tensor]) -> None:
        """Move the running means by the mean over the groups of a step; without groups, or where that is not finite,
        they rest."""
        if "groups" not in sums:
            return
        some = (sums["groups"] > 0) & torch.stack([sum_E.isfinite().all() for sum_E in sums.values()]).all()
        self.steps += some
        share = (1.0 / self.steps.float().clamp(min=1)).clamp(min=self.momentum)
        for mean_E, sum_E in ((self.threshold_E, "last"), (getattr(self, "log_scale_E", None), "log_scale")):
            if mean_E is not None:
                step_E = sums[sum_E] / sums["groups"].clamp(min=1)
                moved_E = mean_E.lerp(step_E.to(mean_E.dtype), share.to(mean_E.dtype))
                mean_E.copy_(torch.where(some, moved_E, mean_E))

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, inference={self.inference!r}, capacity_factor={self.capacity_factor}"
