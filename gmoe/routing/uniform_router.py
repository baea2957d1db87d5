"""The uniform control. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe.routing.pools import Pools
from gmoe.routing.router import Router
from gmoe.routing.routing import Routing
from gmoe.routing.select import pairs_of_experts


class UniformRouter(Router):
    """Control: every token goes to all E experts with weight 1 / E, a plain average. It costs E times one expert.

    Args:
        dim: D, the width of the tokens.
        num_experts: E; also K.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.
    """

    def __init__(self, dim: int, num_experts: int, *, check_finite: bool = False) -> None:
        super().__init__(dim, num_experts, k=num_experts, weight="score", check_finite=check_finite)

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        scores_TE = x_TD.new_full((pools.num_tokens, self.num_experts), 1.0 / self.num_experts)
        tokens = torch.arange(pools.num_tokens, device=x_TD.device)
        token_P, offsets_E = pairs_of_experts(tokens.expand(self.num_experts, -1))
        weight_P = scores_TE.new_full(token_P.shape, 1.0 / self.num_experts)
        return Routing(token_P, offsets_E, weight_P, scores_TE, pools.num_tokens)
