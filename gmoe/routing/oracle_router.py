"""The oracle control. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gmoe.routing.pools import Pools
from gmoe.routing.router import Router
from gmoe.routing.routing import Routing
from gmoe.routing.select import pairs_of_choices


class OracleRouter(Router):
    """Control for planted data: every token goes to the one expert that it is known to belong to, with weight 1.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        assignment: (T,) integers in 0..E-1, the expert of each token; calls must bring the same T tokens in order.
        check_finite: see :class:`Router`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an assignment outside 0..E-1, or a call with another number of tokens.
    """

    assignment_T: Tensor

    def __init__(self, dim: int, num_experts: int, assignment: Tensor, *, check_finite: bool = False) -> None:
        super().__init__(dim, num_experts, k=1, check_finite=check_finite)
        if assignment.dim() != 1 or assignment.is_floating_point():
            raise ValueError(
                f"assignment: got shape {tuple(assignment.shape)} of {assignment.dtype}, expected (T,) integers"
            )
        if assignment.numel() and not 0 <= int(assignment.min()) <= int(assignment.max()) < num_experts:
            raise ValueError(
                f"assignment: got values in {int(assignment.min())}..{int(assignment.max())}, "
                f"expected 0..num_experts-1={num_experts - 1}"
            )
        self.register_buffer("assignment_T", assignment.long())

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        if pools.num_tokens != self.assignment_T.numel():
            raise ValueError(
                f"x: got {pools.num_tokens} tokens, expected the {self.assignment_T.numel()} assigned ones"
            )
        token_P, offsets_E = pairs_of_choices(self.assignment_T[:, None], self.num_experts)
        scores_TE = F.one_hot(self.assignment_T, self.num_experts).to(x_TD.dtype)
        return Routing(token_P, offsets_E, x_TD.new_ones(pools.num_tokens), scores_TE, pools.num_tokens)
