"""The random control. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe.routing.pools import Pools
from gmoe.routing.router import Router, Weighting, gather_pairs
from gmoe.routing.routing import Routing
from gmoe.routing.select import pairs_of_choices, top_experts


class RandomRouter(Router):
    r"""Control: token choice by a frozen random projection, ``softmax(x R)`` with :math:`R_{de} \sim N(0, 1/D)`.

    Random but a function of the token, so that it follows permutations and equal tokens share experts (hash-like
    routing, Roller et al., 2021). It has nothing to learn; what a learned router gains over it, routing gains.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1).
        weight: see :class:`Router`; default ``"normalized"`` for K >= 2, ``"straight_through"``, the value 1, at
            K = 1: scores of a frozen projection say nothing that an output should be scaled by.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
    """

    projection_DE: Tensor

    def __init__(
        self, dim: int, num_experts: int, k: int = 1, *, weight: Weighting | None = None, check_finite: bool = False
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        self.register_buffer("projection_DE", torch.empty(dim, num_experts))
        self.reset_parameters()

    @staticmethod
    def default_weight(k: int) -> Weighting:
        return "normalized" if k >= 2 else "straight_through"

    def reset_parameters(self) -> None:
        self.projection_DE.normal_(std=self.dim**-0.5)

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        log_scores_TE = (x_TD @ self.projection_DE.to(x_TD.dtype)).log_softmax(dim=-1)
        token_P, offsets_E = pairs_of_choices(top_experts(log_scores_TE.detach(), self.k), self.num_experts)
        weight_P = self._weights(gather_pairs(log_scores_TE, token_P, offsets_E), token_P, pools.num_tokens)
        return Routing(token_P, offsets_E, weight_P, log_scores_TE.exp(), pools.num_tokens)
