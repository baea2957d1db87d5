"""Baselines: random, uniform and oracle routing.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe._checks import INTEGERS, check, check_range, described
from gmoe.routers.base import Router, Weighting, best_experts
from gmoe.routing import Routing


class RandomRouter(Router):
    r"""Baseline: token choice by a frozen random projection.

    .. math::
        g = \mathrm{softmax}(x R), \qquad R_{de} \sim N(0, 1/D)

    The choice is random but a function of the token, so that it follows permutations and equal
    tokens share experts (hash-like routing, Roller et al., 2021). What a learned router gains over
    it is due to learning.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1).
        weight: see :class:`Router`; default ``"normalized"`` for K >= 2, and at K = 1
            ``"straight_through"``, the value 1: the scores of a frozen projection are no reason to
            scale an output.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
    """

    by_token = True
    projection_DE: Tensor
    """(D, A), also of experts that were pruned."""

    def __init__(
        self, dim: int, *, num_experts: int, k: int = 1, weight: Weighting | None = None
    ) -> None:
        if weight is None:
            weight = "normalized" if k >= 2 else "straight_through"
        super().__init__(dim, num_experts=num_experts, k=k, weight=weight)
        self.sums_to_one = self._picks_sum_to_one
        self.register_buffer("projection_DE", torch.empty(dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.projection_DE.normal_(std=self.dim**-0.5)

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        logits_TA = x_TD @ self.projection_DE.to(x_TD.dtype)
        return self._route_to(best_experts(self.of_alive(logits_TA), self.k), logits_TA)


class UniformRouter(Router):
    """Baseline: average all E experts, each with weight 1 / E. Costs E times one expert.

    Args:
        dim: D, the width of the tokens.
        num_experts: E; also K.

    Shapes:
        See :class:`Router`.
    """

    by_token = True
    sums_to_one = True
    can_shrink = False

    def __init__(self, dim: int, *, num_experts: int) -> None:
        super().__init__(dim, num_experts=num_experts, k=num_experts, weight="score")

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        scores_TE = x_TD.new_full((x_TD.size(0), self.num_experts), 1.0 / self.num_experts)
        return Routing.to_all(scores_TE)


class OracleRouter(Router):
    """Baseline for planted data: send every token to its known expert, with weight 1.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        assignment: (T,) integers in 0..E-1, the expert of each token; each call must pass the same
            T tokens in the same order.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an assignment outside 0..E-1, or a call with another number of tokens.
    """

    sums_to_one = True
    can_shrink = False
    assignment_T: Tensor

    def __init__(self, dim: int, *, num_experts: int, assignment: Tensor) -> None:
        super().__init__(dim, num_experts=num_experts, k=1)
        is_vector = assignment.dim() == 1 and assignment.dtype in INTEGERS
        check(is_vector, "assignment", described(assignment), "(T,) integers")
        check_range("assignment", assignment, num_experts)
        # The buffer loses its values on the meta device; reset_parameters restores them from here.
        self.assignment = assignment.clone()
        self.register_buffer("assignment_T", assignment.to(torch.int64, copy=True))

    def reset_parameters(self) -> None:
        self.assignment_T.copy_(self.assignment)

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        num_assigned = self.assignment_T.size(0)
        is_fitting = x_TD.size(0) == num_assigned
        check(is_fitting, "x", f"{x_TD.size(0)} tokens", f"{num_assigned} assigned ones")
        expert_T1 = self.assignment_T[:, None]
        return Routing.from_choices(
            expert_T1, x_TD.new_ones(expert_T1.shape), num_experts=self.num_experts
        )
