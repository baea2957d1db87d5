"""Token choice: each token picks its top-K experts.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token, P
(token, expert) pairs.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check, check_at_least, check_choice, check_positive
from gmoe.losses import cv_squared, expected_load, switch_of
from gmoe.routers.balance import BalancedRouter
from gmoe.routers.base import (
    Weighting,
    float_linear,
    log_softmax,
    pair_weights,
    reset_linear,
)
from gmoe.routers.groups import Groups, drop_over_capacity, gather_pairs, pairs_of_mask
from gmoe.routing import AuxLoss, Routing

Balance: TypeAlias = Literal["bias", "importance_load", "switch", None]

NOISE_FLOOR = 0.01
"""Least standard deviation of the learned noise: at zero the load would have no gradient."""


class TokenChoice(BalancedRouter):
    r"""Each token picks its top-K experts.

    .. math::
        g_{te} = \mathrm{softmax}_e(x_t W)_e, \qquad
        y_t = \sum_{e \in \mathrm{topK}(g_t)} w_{te} f_e(x_t)

    See Shazeer et al. (2017), and Switch Transformer (Fedus et al., 2021).

    No pair is dropped, unless ``capacity_factor`` is given. Ties go to the lowest expert index.

    With ``top_p``, a token decides how many experts it takes, as in `Harder Tasks Need More Experts
    <https://arxiv.org/abs/2403.07652>`_ (Huang et al., 2024): as few as have that probability
    together, its best ones first. Sure tokens take one, others more.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1).
        weight: see :class:`Router`; default ``"normalized"`` for K >= 2, ``"score"`` at K = 1.
        noise: adds noise to the logits in training, so that the choice explores. ``"spread"``:
            N(0, 1) times the logits' own standard deviation over the tokens. ``True``: the noisy
            top-K gating of Shazeer et al. (2017), ``N(0, 1) * (softplus(x W_noise) + 0.01)`` with
            a learned ``W_noise`` that starts at zero. ``None`` (default) follows ``balance``:
            ``"spread"`` with ``"bias"``, ``True`` with ``"importance_load"``, else ``False``.
        balance: what keeps the load of the experts equal:

            - ``"bias"`` (default): no loss. A bias per expert is added to the logits of the
              centered tokens for the selection, not for the weights, as in DeepSeek-V3 (2024); see
              :class:`gmoe.routers.balance.BalancedRouter`.
            - ``"importance_load"``: adds ``balance_coef * (CV^2(importance) + CV^2(load))``. The
              load has a gradient through the learned noise only, so ``noise=False`` and
              ``"spread"`` are refused. Importance is summed over the noisy probabilities, as in
              Shazeer et al. (2017), but before selection, as in V-MoE.
            - ``"switch"``: adds ``balance_coef * E * sum_e f_e P_e``.
            - ``None``: nothing.
        balance_coef: coefficient of the balance loss (default 0.01).
        bias_rate: largest step of the bias, in units of the logits' spread (default 0.1).
        z_coef: coefficient of the router z-loss (default 0, no loss).
        init_scale: factor of ``nn.Linear``'s initial weights (default 0.1, as in Switch
            Transformer): a softmax that is sharp from the start hardly learns.
        capacity_factor: in training, an expert takes at most
            ``clamp(ceil(capacity_factor * K * T_group / E), 1, T_group)`` tokens of a group. Pairs
            are dropped by priority (V-MoE's batch-prioritized routing: first choices before second
            ones, and among them tokens with the highest probability first), never by position.
            ``None`` (default) drops nothing.
        top_p: in place of K, take experts until their probabilities sum to at least p, 0 < p <= 1,
            and at least K (default ``None``). Without a bias that is at most ``ceil(p E)`` experts,
            or K, as many as a router takes that is sure of nothing; that is what
            ``experts_per_token`` says. ``weight="normalized"`` is then legal at K = 1. Refused
            beside ``capacity_factor`` and ``"importance_load"``.
        entropy_coef: coefficient of a loss, the mean entropy of the tokens' probabilities (default
            0, no loss). Beside ``top_p``, it keeps a router from taking all experts (Huang et al.:
            1e-4).

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
        noise: bool | Literal["spread"] | None = None,
        balance: Balance = "bias",
        balance_coef: float = 0.01,
        bias_rate: float = 0.1,
        z_coef: float = 0.0,
        init_scale: float = 0.1,
        capacity_factor: float | None = None,
        top_p: float | None = None,
        entropy_coef: float = 0.0,
    ) -> None:
        weight = weight or ("normalized" if k >= 2 else "score")
        biased = balance == "bias"
        if bias_rate is None:
            raise ValueError("bias_rate: got None, expected a number; balance=None has no bias")
        super().__init__(
            dim,
            num_experts=num_experts,
            k=k,
            bias_rate=bias_rate if biased else None,
            # With p, normalized weights are no constant at K = 1.
            weight="score" if top_p is not None and weight == "normalized" else weight,
        )
        self.weight = weight
        check_choice("balance", balance, Balance)
        if noise is None:
            noise = "spread" if biased else balance == "importance_load"
        if not isinstance(noise, bool) and noise != "spread":
            raise ValueError(f"noise: got {noise!r}, expected True, False, 'spread' or None")
        if balance == "importance_load" and noise is not True:
            raise ValueError(f"noise: got {noise}, expected True with balance='importance_load'")
        check_at_least(0, balance_coef=balance_coef, z_coef=z_coef, init_scale=init_scale)
        check_at_least(0, entropy_coef=entropy_coef)
        if capacity_factor is not None:
            check_positive("capacity_factor", capacity_factor)
        if top_p is not None:
            is_legal = isinstance(top_p, Real) and 0 < top_p <= 1
            check(is_legal, "top_p", repr(top_p), "a number above 0, at most 1")
            is_alone = capacity_factor is None and balance != "importance_load"
            check(is_alone, "top_p", top_p, "None beside capacity_factor and importance_load")
            self.experts_per_token = float(max(k, math.ceil(top_p * num_experts)))
        self.balance = balance
        self.by_spread = noise == "spread"
        self.balance_coef = balance_coef
        self.z_coef = z_coef
        self.init_scale = init_scale
        self.capacity_factor = capacity_factor
        self.top_p = top_p
        self.entropy_coef = entropy_coef
        # A capacity drops pairs, and what is left of a token's weights need not sum to 1.
        self.sums_to_one = capacity_factor is None and (
            self._picks_sum_to_one if top_p is None else weight == "normalized"
        )
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.noise = nn.Linear(dim, num_experts, bias=False) if noise is True else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_linear(self.gate, self.init_scale)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)
        for name, counter in self.named_buffers(recurse=False):
            if name != "alive_E":
                counter.zero_()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        biased = self.balance == "bias"

        # 1. Score the experts; with a bias, from centered tokens.
        clean_TA = self.centered_step(x_TD, self.gate) if biased else float_linear(x_TD, self.gate)

        # 2. In training, add noise, so that experts which nobody chooses get a chance.
        std_TA = self._noise_std(x_TD, clean_TA)
        logits_TA = clean_TA
        if self.training and std_TA is not None:
            logits_TA = torch.addcmul(clean_TA, _normal_like(clean_TA), std_TA)

        # 3. Choose by logits, which do not tie where probabilities underflow; the bias counts for
        # the choice, not for the weights.
        log_probs_TE = self.of_alive(log_softmax(logits_TA))
        clean_TE, logits_TE = self.of_alive(clean_TA), self.of_alive(logits_TA)
        ranked_TE = logits_TE + self.bias_E if biased else logits_TE
        if self.top_p is not None:
            expert_TE, is_taken_TE = self._until_probable(ranked_TE, log_probs_TE, self.top_p)
            losses = self._losses(clean_TE, logits_TE, std_TA, expert_TE, is_taken_TE)
            chosen_TE = torch.zeros_like(is_taken_TE).scatter(1, expert_TE, is_taken_TE)
            return self._of_pairs(*pairs_of_mask(chosen_TE.T), log_probs_TE, losses)
        expert_TK, weight_TK = self._top_k(ranked_TE, log_probs_TE)

        losses = self._losses(clean_TE, logits_TE, std_TA, expert_TK)
        if self.training and self.capacity_factor is not None:
            groups = Groups.of(group, len(x_TD))
            return self._within_capacity(expert_TK, log_probs_TE, groups, losses)
        return Routing.from_choices(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            scores=log_probs_TE.exp(),
            losses=losses,
            validate=False,
        )

    def _noise_std(self, x_TD: Tensor, clean_TA: Tensor) -> Tensor | None:
        """(T, A), or a scalar for all pairs: the standard deviation of the noise; or ``None``."""
        if self.noise is not None:
            return F.softplus(float_linear(x_TD, self.noise)) + NOISE_FLOOR
        if not (self.by_spread and self.training and len(x_TD)):
            return None
        # The spread over the tokens, all experts together; four times as fast as var(dim=0).
        clean_TA = clean_TA.detach()
        centered_TA = clean_TA - clean_TA.mean(dim=0)
        std = torch.linalg.vector_norm(centered_TA) * centered_TA.numel() ** -0.5
        # A NaN or infinite token must not become the noise of all others.
        return std.nan_to_num(posinf=0.0)

    def _within_capacity(
        self, expert_TK: Tensor, log_probs_TE: Tensor, groups: Groups, losses: dict[str, AuxLoss]
    ) -> Routing:
        """Route without the pairs over capacity; the weights are those of the remaining pairs."""
        probs_TE = log_probs_TE.exp()
        num_tokens = len(log_probs_TE)
        share = (self.capacity_factor or 1.0) * self.k / self.num_scored
        token_P, offsets_E = drop_over_capacity(expert_TK, probs_TE.detach(), groups, share)
        # Not by bincount, for which the host waits.
        kept_T = token_P.new_zeros(num_tokens).index_add(0, token_P, torch.ones_like(token_P))
        dropped_T = self.k - kept_T
        return self._of_pairs(token_P, offsets_E, log_probs_TE, losses, dropped_T)

    def _until_probable(
        self, ranked_TE: Tensor, log_probs_TE: Tensor, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """(T, E) the experts of each token, best first, and which of them it takes."""
        expert_TE = ranked_TE.argsort(dim=-1, descending=True, stable=True)
        prob_TE = log_probs_TE.detach().exp().gather(1, expert_TE)
        # An expert is taken unless those before it are probable enough.
        before_TE = F.pad(prob_TE[:, :-1].cumsum(dim=-1), (1, 0))
        rank_E = torch.arange(self.num_experts, device=before_TE.device)
        return expert_TE, (before_TE < top_p) | (rank_E < self.k)

    def _of_pairs(
        self,
        token_P: Tensor,
        offsets_E: Tensor,
        log_probs_TE: Tensor,
        losses: dict[str, AuxLoss],
        dropped_T: Tensor | None = None,
    ) -> Routing:
        """Route to these pairs, of which a token may have any number."""
        num_tokens = len(log_probs_TE)
        log_gate_P = gather_pairs(log_probs_TE, token_P, offsets_E)
        weight_P = pair_weights(self.weight, log_gate_P, token_P, num_tokens)
        return Routing(
            token_P,
            offsets_E,
            weight_P,
            log_probs_TE.exp(),
            num_tokens,
            losses,
            dropped_T,
            validate=False,
        )

    def _losses(
        self,
        clean_TE: Tensor,
        logits_TE: Tensor,
        std_TA: Tensor | None,
        expert_TK: Tensor,
        is_taken_TK: Tensor | None = None,
    ) -> dict[str, AuxLoss]:
        """Compute the losses from sums over the tokens of all processes.

        Args:
            clean_TE: the logits without noise.
            logits_TE: the logits.
            std_TA: the standard deviation of the noise.
            expert_TK: experts of each token.
            is_taken_TK: which of them it takes; all by default.
        """
        losses: dict[str, AuxLoss] = {}
        if self.balance == "importance_load" and std_TA is not None:
            importance_E = logits_TE.softmax(dim=-1).sum(dim=0)
            load_E = expected_load(clean_TE, logits_TE, self.of_alive(std_TA), self.k)
            importance_E, load_E = self.summed(importance_E, load_E)
            losses["importance"] = AuxLoss(cv_squared(importance_E), self.balance_coef)
            losses["load"] = AuxLoss(cv_squared(load_E), self.balance_coef)
        elif self.balance == "switch":
            importance_E = logits_TE.softmax(dim=-1).sum(dim=0)
            taken: Any = 1.0 if is_taken_TK is None else is_taken_TK.to(logits_TE.dtype)
            load_E = torch.zeros_like(logits_TE).scatter(1, expert_TK, taken).sum(dim=0)
            num_tokens = importance_E.new_full((), len(logits_TE))
            sums = self.summed(importance_E, load_E, num_tokens)
            losses["switch"] = AuxLoss(switch_of(*sums), self.balance_coef)
        if self.z_coef > 0:
            losses["z"] = AuxLoss(self.z_loss(logits_TE), self.z_coef)
        if self.entropy_coef > 0:
            log_probs_TE = logits_TE.log_softmax(dim=-1)
            entropy = -(log_probs_TE.exp() * log_probs_TE).sum()
            sums = self.summed(entropy, logits_TE.new_full((), len(logits_TE)))
            losses["entropy"] = AuxLoss(sums[0] / sums[1].clamp(min=1), self.entropy_coef)
        return losses

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, balance={self.balance!r}"
        if self.capacity_factor is not None:
            text += f", capacity_factor={self.capacity_factor!r}"
        if self.top_p is not None:
            text += f", top_p={self.top_p!r}"
        return text


def _normal_like(x: Tensor) -> Tensor:
    """Numbers of the standard normal distribution, in the shape and type of ``x``.

    Not ``randn_like``: for it, the compiler writes a kernel that takes 20 times as long on a CPU,
    and draws other numbers.
    """
    return torch.empty_like(x).normal_()
