"""Token choice. Shapes: T tokens, D width, E experts, K experts per token, P pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe.losses import cv_squared, expected_load, square_sum, switch_of
from gmoe.routers.base import Router, Weighting, float_linear, legal, pair_weights
from gmoe.routers.groups import Groups, drop_over_capacity, gather_pairs
from gmoe.routing import AuxLoss, Routing

Balance: TypeAlias = Literal["bias", "importance_load", "switch"]

NOISE_FLOOR = 0.01
"""Least standard deviation of the learned noise: at zero the load would have no gradient."""

MEAN_RATE = 0.1
"""Share of a step's mean token in the running mean."""

ROUNDED = 16.0
"""A variance below so many roundings of the mean square is none."""


class TokenChoice(Router):
    r"""Each token picks its top-K experts (Shazeer et al., 2017; Switch Transformer, Fedus et al., 2021).

    .. math::
        g_{te} = \mathrm{softmax}_e(x_t W)_e, \qquad y_t = \sum_{e \in \mathrm{topK}(g_t)} w_{te} f_e(x_t)

    Dropless, unless ``capacity_factor`` is given. Ties go to the lowest expert index.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1).
        weight: see :class:`Router`; default ``"normalized"`` for K >= 2, ``"score"`` at K = 1.
        noise: in training, adds noise to the logits, so that the choice explores. ``"spread"``: N(0, 1) times the
            logits' own standard deviation over the tokens. ``True``: the noisy top-K gating of Shazeer et al. (2017),
            ``N(0, 1) * (softplus(x W_noise) + 0.01)`` with learned ``W_noise``, which starts at zero. ``None``
            (default) is what ``balance`` needs: ``"spread"`` with the bias, ``True`` with importance and load, else
            ``False``.
        balance: how experts are kept equally loaded:

            - ``"bias"`` (default): no loss to add. A bias per expert is added to the logits for the selection, not for
              the weights, as in DeepSeek-V3 (2024). Each training step moves it towards equal load, by ``bias_rate``
              times the spread of the logits times :math:`(\bar n - n_e) / \bar n` in [-1, 1], with :math:`n_e` what the
              expert would take without noise. The logits are those of the centered token, :math:`(x_t - \mu) W`, with
              :math:`\mu` a running mean of the tokens (that of the first step, then a tenth of each new one): what all
              tokens have in common would move all of them to one expert at each step, faster than the bias follows.
              A step's load and mean take effect with the next forward in training, so that a checkpoint's
              recomputation selects the same, as long as every forward is followed by its own backward.
            - ``"importance_load"``: adds ``balance_coef * (CV^2(importance) + CV^2(load))``; the load has a gradient
              through the learned noise only, so that ``noise=False`` and ``"spread"`` are refused. Importance is
              summed over the noisy probabilities, as by Shazeer et al. (2017), but before selection, as by V-MoE.
            - ``"switch"``: adds ``balance_coef * E * sum_e f_e P_e``.
            - ``None``: nothing.
        balance_coef: coefficient of the balance loss (default 0.01).
        bias_rate: largest step of the bias, in units of the logits' spread (default 0.1).
        z_coef: coefficient of the router z-loss (default 0, no loss).
        init_scale: factor of ``nn.Linear``'s initial weights (default 0.1, as in Switch Transformer): a softmax that is
            sharp from the start hardly learns.
        capacity_factor: in training, an expert takes at most ``clamp(ceil(capacity_factor * K * T_group / E), 1,
            T_group)`` tokens of a group. Pairs are dropped by priority (V-MoE's batch-prioritized routing: first
            choices before second ones, and among them tokens with the highest probability first), never by position.
            ``None`` (default) drops nothing.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range; the message names it, its value and the legal ones.
    """

    bias_E: Tensor
    mean_D: Tensor
    next_bias_E: Tensor
    next_mean_D: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        noise: bool | Literal["spread"] | None = None,
        balance: Balance | None = "bias",
        balance_coef: float = 0.01,
        bias_rate: float = 0.1,
        z_coef: float = 0.0,
        init_scale: float = 0.1,
        capacity_factor: float | None = None,
        check_finite: bool = False,
    ) -> None:
        weight = weight or ("normalized" if k >= 2 else "score")
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        self.balance = None if balance is None else legal("balance", balance, Balance)
        if noise is None:
            noise = "spread" if balance == "bias" else balance == "importance_load"
        if not isinstance(noise, bool) and noise != "spread":
            raise ValueError(f"noise: got {noise!r}, expected True, False, 'spread' or None")
        if balance == "importance_load" and noise is not True:
            raise ValueError(f"noise: got {noise!r} with balance='importance_load', whose load term needs noise=True")
        self.by_spread = noise == "spread"
        self.balance_coef, self.bias_rate = legal("balance_coef", balance_coef), legal("bias_rate", bias_rate)
        self.z_coef, self.init_scale = legal("z_coef", z_coef), legal("init_scale", init_scale)
        self.capacity_factor = None if capacity_factor is None else legal("capacity_factor", capacity_factor)
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.noise = nn.Linear(dim, num_experts, bias=False) if noise is True else None
        if balance == "bias":
            for when in ("", "next_"):
                self.register_buffer(f"{when}bias_E", torch.zeros(num_experts))
                self.register_buffer(f"{when}mean_D", torch.zeros(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        with torch.no_grad():
            self.gate.weight.mul_(self.init_scale)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        counts = self.balance == "bias" and self.is_training_step()
        if counts:
            self.bias_E.copy_(self.next_bias_E)
            self.mean_D.copy_(self.next_mean_D)
        clean_TE = float_linear(x_TD, self.gate)
        if self.balance == "bias":  # (x - mean) W, without a copy of the tokens; the next forward moves the mean
            # A sum, since inductor keeps sums: a copy it would read again in the backward, where it is a later step's.
            mean_1D = torch.stack((self.mean_D, torch.zeros_like(self.mean_D))).sum(dim=0, keepdim=True)
            clean_TE = clean_TE - float_linear(mean_1D.to(x_TD.dtype), self.gate)
        logits_TE, std_TE = clean_TE, None
        if self.noise is not None:
            std_TE = F.softplus(float_linear(x_TD, self.noise)) + NOISE_FLOOR
        std = std_TE
        if self.training and self.by_spread and len(x_TD) > 0:
            std = clean_TE.detach().var(dim=0, unbiased=False).mean().sqrt()
            std = torch.where(std.isfinite(), std, 0)  # a NaN token is no other token's noise
        if self.training and std is not None:
            logits_TE = clean_TE + torch.randn_like(clean_TE) * std
        log_probs_TE = logits_TE.log_softmax(dim=-1)
        # not by probabilities, which may underflow to ties
        ranked_TE = logits_TE + self.bias_E if self.balance == "bias" else logits_TE
        expert_TK, weight_TK = self._top_k(ranked_TE, log_probs_TE)
        routing = Routing.from_choices(expert_TK, weight_TK, self.num_experts, log_probs_TE.exp())
        with_losses = self.balance in ("importance_load", "switch") or self.z_coef > 0
        sums = self._sums(clean_TE, logits_TE, std_TE, routing) if with_losses else {}
        if counts:
            sums |= self._counts(x_TD.detach(), clean_TE.detach())
        if sums:
            sums = self.summed(sums | {"tokens": clean_TE.new_tensor(len(clean_TE))})
        if counts:
            self._plan(sums)
        if with_losses:
            routing = replace(routing, losses=self._losses(sums), checked=True)
        if self.training and self.capacity_factor is not None:
            routing = self._within_capacity(routing, expert_TK, log_probs_TE, Groups.of(group, len(x_TD)))
        return routing

    def _counts(self, x_TD: Tensor, clean_TE: Tensor) -> dict[str, Tensor]:
        """What the next bias and the next mean follow from, as sums over tokens."""
        chosen_TK = (clean_TE + self.bias_E).topk(self.k, dim=-1).indices
        taken_E = clean_TE.new_zeros(self.num_experts)
        taken_E.index_add_(0, chosen_TK.view(-1), clean_TE.new_ones(chosen_TK.numel()))
        squares_E = clean_TE.square().sum(dim=0)
        return {"taken": taken_E, "x": x_TD.sum(dim=0), "logits": clean_TE.sum(dim=0), "squares": squares_E}

    @torch.no_grad()
    def _plan(self, sums: dict[str, Tensor]) -> None:
        """Set what the next training step starts with; one whose sums are not finite (a NaN token) changes nothing."""
        finite = torch.cat((sums["x"], sums["squares"])).isfinite().all()
        tokens, taken_E = sums["tokens"].clamp(min=1), sums["taken"]
        square_E = sums["squares"] / tokens
        var_E = square_E - (sums["logits"] / tokens).square()
        var_E = var_E.where(var_E > ROUNDED * torch.finfo(var_E.dtype).eps * square_E, 0)  # equal logits have no spread
        mean = taken_E.mean()
        step_E = self.bias_rate * var_E.mean().sqrt() * ((mean - taken_E) / mean.clamp(min=1)).clamp(-1, 1)
        self.next_bias_E.copy_(torch.where(finite, self.bias_E + step_E, self.bias_E))
        first = ~self.mean_D.any()
        rate = (MEAN_RATE + (1 - MEAN_RATE) * first.to(tokens.dtype)) * (sums["tokens"] > 0)
        mean_D = self.mean_D + rate * (sums["x"] / tokens - self.mean_D)
        self.next_mean_D.copy_(torch.where(finite, mean_D, self.mean_D))

    def _sums(self, clean_TE: Tensor, logits_TE: Tensor, std_TE: Tensor | None, routing: Routing) -> dict[str, Tensor]:
        """What the losses follow from, as sums over tokens."""
        sums = {}
        if self.balance in ("importance_load", "switch"):
            sums["importance"] = routing.scores.sum(dim=0)
        if self.balance == "importance_load" and std_TE is not None:
            sums["load"] = expected_load(clean_TE, logits_TE, std_TE, self.k)
        if self.balance == "switch":
            sums["load"] = routing.load.to(clean_TE.dtype)
        if self.z_coef > 0:
            sums["z"] = square_sum(logits_TE)
        return sums

    def _losses(self, sums: dict[str, Tensor]) -> dict[str, AuxLoss]:
        losses = {}
        if self.balance == "importance_load":
            losses["importance"] = AuxLoss(cv_squared(sums["importance"]), self.balance_coef)
            losses["load"] = AuxLoss(cv_squared(sums["load"]), self.balance_coef)
        if self.balance == "switch":
            switch = switch_of(sums["importance"], sums["load"], sums["tokens"])
            losses["switch"] = AuxLoss(switch, self.balance_coef)
        if self.z_coef > 0:
            losses["z"] = AuxLoss(sums["z"] / sums["tokens"].clamp(min=1), self.z_coef)
        return losses

    def _within_capacity(self, routing: Routing, expert_TK: Tensor, log_probs_TE: Tensor, groups: Groups) -> Routing:
        """The routing without the pairs that experts have no room for; the weights are those of what is left."""
        assert self.capacity_factor is not None
        capacity = groups.capacity(self.k, self.num_experts, self.capacity_factor)
        token_P, offsets_E = drop_over_capacity(expert_TK, routing.scores.detach(), groups, capacity)
        log_gate_P = gather_pairs(log_probs_TE, token_P, offsets_E)
        weight_P = pair_weights(self.weight, log_gate_P, token_P, routing.num_tokens)
        dropped_T = self.k - token_P.bincount(minlength=routing.num_tokens)
        return replace(routing, token=token_P, offsets=offsets_E, weight=weight_P, dropped_T=dropped_T)

    def extra_repr(self) -> str:
        capacity = [] if self.capacity_factor is None else [f"capacity_factor={self.capacity_factor!r}"]
        return ", ".join([super().extra_repr(), f"balance={self.balance!r}", *capacity])
