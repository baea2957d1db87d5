"""Expert choice. Shapes: T tokens, D width, E experts, C capacity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least, check_positive
from gmoe.routing.expert_side import ExpertSide, Inference, Normalize
from gmoe.routing.losses import z_loss
from gmoe.routing.pools import Pools
from gmoe.routing.router import MAX_WEIGHT, Router, Weighting, float_linear
from gmoe.routing.routing import AuxLoss, Routing


class ExpertChoice(Router):
    r"""Each expert takes its top-C tokens of a pool (Zhou et al., 2022), so that the load is even by construction.

    .. math::
        g = \mathrm{softmax}(X W), \quad
        C = \mathrm{clamp}(\lceil \mathrm{cf} \cdot K \cdot T_\mathrm{pool} / E \rceil, 1, T_\mathrm{pool})

    A token may get several experts, or none (then the layer gives it zero). Ties go to the lowest token index.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, the average number of experts of a token at ``capacity_factor=1`` (default 1).
        weight: see :class:`Router`; default ``"score"``.
        capacity_factor: scales the number of tokens that an expert takes (default 1).
        normalize: ``"experts"`` (default): softmax over experts, as in the paper. ``"tokens"``: softmax along the
            tokens of the pool; with ``weight="score"`` the weights are then divided by the detached mean of the pool's
            selected ones and capped at 10.
        inference: at evaluation, ``"pool"`` (default): as in training, so that a token's experts depend on its pool.
            ``"threshold"``: an expert takes every token whose score reaches a running mean of the training cut, so
            that each token decides alone; needs at least one training step before.
        momentum: share of the newest step in those running means (default 0.1).
        z_coef: coefficient of the router z-loss (default 0, no loss).
        init_scale: factor of ``nn.Linear``'s initial weights (default 0.1, as Switch Transformer's): a softmax that is
            sharp from the start, as large features make it, hardly learns.
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
        inference: Inference = "pool",
        momentum: float = 0.1,
        z_coef: float = 0.0,
        init_scale: float = 0.1,
        check_finite: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        check_at_least("z_coef", z_coef, 0)
        check_positive("init_scale", init_scale)
        self.z_coef = z_coef
        self.init_scale = init_scale
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.side = ExpertSide(num_experts, k, capacity_factor, normalize, inference, momentum)
        self.reset_parameters()

    @property
    def experts_per_token(self) -> float:
        return self.side.experts_per_token

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        with torch.no_grad():
            self.gate.weight.mul_(self.init_scale)
        self.side.reset_parameters()

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        logits_TE = float_linear(x_TD, self.gate)
        token_P, offsets_E, log_gate_P, scores_TE = self.side(logits_TE, pools, self._counters_advance())
        weight_P = expert_side_weights(self, self.side, log_gate_P, token_P, pools)
        losses = {"z": AuxLoss(z_loss(logits_TE), self.z_coef)} if self.z_coef > 0 else {}
        return Routing(token_P, offsets_E, weight_P, scores_TE, pools.num_tokens, losses)


def expert_side_weights(router: Router, side: ExpertSide, log_gate_P: Tensor, token_P: Tensor, pools: Pools) -> Tensor:
    """(P,) weights of the pairs that ``side`` chose."""
    if side.normalize == "experts":
        return router._weights(log_gate_P, token_P, pools.num_tokens)
    if side.inference == "threshold" and not side.training:  # the running scale has divided the gates already
        weight_P = router._weights(log_gate_P, token_P, pools.num_tokens)
        return weight_P.clamp(max=MAX_WEIGHT) if router.weight == "score" else weight_P
    return router._weights_along_tokens(log_gate_P, token_P, pools)
