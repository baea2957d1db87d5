"""Token choice: each token picks its top-K experts.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token, P
(token, expert) pairs.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gmoe._checks import check, check_at_least, check_choice, check_positive
from gmoe.choices import over_experts
from gmoe.losses import switch_loss
from gmoe.routers.balance import BalancedRouter
from gmoe.routers.base import (
    Gate,
    Weighting,
    best_experts,
    pair_weights,
    reset_linear,
)
from gmoe.routers.groups import Groups, drop_over_capacity, gather_pairs
from gmoe.routing import AuxLoss, Routing

Balance: TypeAlias = Literal["bias", "switch", None]


class TokenChoice(BalancedRouter):
    r"""Each token picks its top-K experts.

    .. math::
        g_{te} = \mathrm{softmax}_e(x_t W)_e, \qquad
        y_t = \sum_{e \in \mathrm{topK}(g_t)} w_{te} f_e(x_t)

    See Shazeer et al. (2017), and Switch Transformer (Fedus et al., 2021).

    No pair is dropped, unless ``capacity_factor`` is given. Ties go to the lowest expert index.

    A layer whose experts start as copies gives it other defaults: ``weight="straight_through"`` at
    K = 1, and unless balance or noise are given ``balance=None`` with noise.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1).
        weight: see :class:`Router`; default ``"normalized"`` for K >= 2, ``"score"`` at K = 1.
        noise: in training, adds N(0, 1) times the logits' own standard deviation over the tokens,
            so that the choice explores. ``None`` (default): with ``balance="bias"``.
        balance: what keeps the load of the experts equal:

            - ``"bias"`` (default): no loss. A bias per expert is added to the logits of the
              centered tokens for the selection, not for the weights, as in DeepSeek-V3 (2024); see
              :class:`gmoe.routers.balance.BalancedRouter`.
            - ``"switch"``: adds ``balance_coef * E * sum_e f_e P_e`` to the losses.
            - ``None``: nothing.
        balance_coef: coefficient of that loss (default 0.01).
        bias_rate: largest step of the bias, in units of the logits' spread (default 0.1).
        z_coef: coefficient of the router z-loss (default 0, no loss).
        capacity_factor: in training, an expert takes at most
            ``clamp(ceil(capacity_factor * K * T_group / E), 1, T_group)`` tokens of a group. Pairs
            are dropped by priority (V-MoE's batch-prioritized routing: first choices before second
            ones, and among them tokens with the highest probability first), never by position.
            ``None`` (default) drops nothing.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range; the message names it, its value and the legal ones.
    """

    by_token = True

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        k: int = 1,
        weight: Weighting | None = None,
        noise: bool | None = None,
        balance: Balance = "bias",
        balance_coef: float = 0.01,
        bias_rate: float = 0.1,
        z_coef: float = 0.0,
        capacity_factor: float | None = None,
    ) -> None:
        weight = weight or ("normalized" if k >= 2 else "score")
        biased = balance == "bias"
        super().__init__(
            dim,
            num_experts=num_experts,
            k=k,
            noise=biased if noise is None else noise,
            bias_rate=bias_rate if biased else None,
            weight=weight,
        )
        check_choice("balance", balance, Balance)
        check(isinstance(noise, bool | None), "noise", repr(noise), "True, False or None")
        check_at_least(0, balance_coef=balance_coef, bias_rate=bias_rate, z_coef=z_coef)
        if capacity_factor is not None:
            check_positive("capacity_factor", capacity_factor)
        self.balance = balance
        self.balance_coef = balance_coef
        self.z_coef = z_coef
        self.capacity_factor = capacity_factor
        # A capacity drops pairs, and what is left of a token's weights need not sum to 1.
        self.sums_to_one = capacity_factor is None and self._picks_sum_to_one
        self.gate = Gate(dim, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.gate)
        for name, counter in self.named_buffers(recurse=False):
            if name != "alive_E":
                counter.zero_()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        # Choose by logits, which do not tie where probabilities underflow; the bias counts for the
        # choice, not for the weights.
        logits_TA = self.logits(x_TD, self.gate)
        logits_TE = self.of_alive(logits_TA)
        ranked_TE = logits_TE + self.bias_E if self.balance == "bias" else logits_TE
        expert_TK = best_experts(ranked_TE, self.k)

        losses = self._losses(logits_TE, expert_TK)
        if self.training and self.capacity_factor is not None:
            groups = Groups.of(group, x_TD.size(0))
            return self._within_capacity(expert_TK, logits_TA, groups, losses)
        return self._route_to(expert_TK, logits_TA, losses)

    def _within_capacity(
        self, expert_TK: Tensor, logits_TA: Tensor, groups: Groups, losses: dict[str, AuxLoss]
    ) -> Routing:
        """Route without the pairs over capacity; the weights are those of the remaining pairs."""
        log_probs_TE = self.of_alive(over_experts(torch.log_softmax, logits_TA))
        probs_TE = log_probs_TE.exp()
        num_tokens = log_probs_TE.size(0)
        share = (self.capacity_factor or 1.0) * self.k / self.num_scored
        token_P, offsets_E = drop_over_capacity(expert_TK, probs_TE.detach(), groups, share)
        # Not by bincount, for which the host waits.
        kept_T = token_P.new_zeros(num_tokens).index_add(0, token_P, torch.ones_like(token_P))
        dropped_T = self.k - kept_T
        log_gate_P = gather_pairs(log_probs_TE, token_P, offsets_E)
        weight_P = pair_weights(self.weight, log_gate_P, token_P, num_tokens)
        return Routing(
            token_P,
            offsets_E,
            weight_P,
            probs_TE,
            num_tokens,
            losses,
            dropped_T,
            validate=False,
        )

    def _losses(self, logits_TE: Tensor, expert_TK: Tensor) -> dict[str, AuxLoss]:
        """Compute the losses from sums over the tokens of all processes."""
        losses: dict[str, AuxLoss] = {}
        if self.balance == "switch":
            importance_E = over_experts(torch.softmax, logits_TE).sum(dim=0)
            load_E = torch.zeros_like(logits_TE).scatter(1, expert_TK, 1.0).sum(dim=0)
            num_tokens = importance_E.new_full((), logits_TE.size(0))
            sums = self.summed(importance_E, load_E, num_tokens)
            losses["switch"] = AuxLoss(switch_loss(*sums), self.balance_coef)
        if self.z_coef > 0:
            losses["z"] = AuxLoss(self.z_loss(logits_TE), self.z_coef)
        return losses

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, balance={self.balance!r}"
        if self.capacity_factor is not None:
            text += f", capacity_factor={self.capacity_factor!r}"
        return text
