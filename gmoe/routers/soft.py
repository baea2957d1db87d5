"""Soft MoE: experts see slots, which are mixtures of tokens.

Shapes: T tokens, D width, E experts, S slots per expert, N = E * S slots of a group, B groups, R =
B * N slots in all, I in and O out features of the experts. In a batch of padded groups, B is the
number of its groups and T the number of tokens in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gmoe._autograd import row_norms
from gmoe._checks import check_counts
from gmoe.routers.base import Router
from gmoe.routers.groups import Groups
from gmoe.routing import Routing

EPS = 1e-6
"""Added to the norms that tokens and slots are divided by, as in the paper's code."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SoftRouting(Routing):
    """The result of :class:`gmoe.SoftSlots`: how slots mix tokens, and how tokens mix slots.

    As a :class:`gmoe.Routing` it records all T * E pairs, each with the summed combine weights of
    the expert's slots.

    Args:
        dispatch_TES: (T, E, S) the share of each token in each slot of its group; sums to 1 over a
            group's tokens.
        combine_TES: (T, E, S) the share of each slot in each token; sums to 1 over the slots.
        groups: the tokens that share slots.
    """

    dispatch_TES: Tensor
    combine_TES: Tensor
    groups: Groups

    mixes_tokens: ClassVar[bool] = True

    @property
    def slot_offsets(self) -> Tensor:
        """(E,) int32 cumulative ends of the rows of each expert's slots."""
        rows = self.groups.num_groups * self.dispatch_TES.size(2)
        return torch.full_like(self.offsets, rows).cumsum(0, dtype=torch.int32)

    def dispatch(self, x_TI: Tensor) -> Tensor:
        """(R, I) the slots: weighted means of a group's tokens, sorted by expert, then by group."""
        shares_TN = self.dispatch_TES.flatten(1).to(x_TI.dtype)
        slots_BNI = x_TI.new_zeros(self.groups.num_groups, shares_TN.size(1), x_TI.size(1))
        for batch in self.groups.batches(x_TI.device):
            share_BTN = batch.take(shares_TN, padding=0.0)
            mixed_BNI = share_BTN.transpose(1, 2) @ batch.take(x_TI)
            mixed_BNI = mixed_BNI.to(x_TI.dtype)  # autocast has made it bfloat16
            slots_BNI = slots_BNI.index_copy(0, batch.group, mixed_BNI)
        # (B, E, S, I) to rows by expert.
        return slots_BNI.unflatten(1, (self.num_experts, -1)).transpose(0, 1).flatten(0, 2)

    def combine(self, y_RO: Tensor) -> Tensor:
        """(T, O) each token's weighted mean of the experts' outputs for its group's slots."""
        shares_TN = self.combine_TES.flatten(1).to(y_RO.dtype)
        shape = (self.num_experts, self.groups.num_groups, self.dispatch_TES.size(2), y_RO.size(1))
        y_BNO = y_RO.view(shape).transpose(0, 1).flatten(1, 2)
        y_TO = y_RO.new_zeros(self.num_tokens, y_RO.size(1))
        for batch in self.groups.batches(y_RO.device):
            share_BTN = batch.take(shares_TN, padding=0.0)
            out_BTO = share_BTN @ y_BNO.index_select(0, batch.group)
            y_TO = batch.add(y_TO, out_BTO.to(y_TO.dtype))
        return y_TO


class SoftSlots(Router):
    r"""Slots that are mixtures of a group's tokens, for :class:`gmoe.SoftMoE`.

    .. math::
        l = X \Phi, \quad D = \mathrm{softmax}_t(l), \quad C = \mathrm{softmax}_{es}(l), \quad
        y = C f(D^\top X)

    This is `Soft MoE <https://arxiv.org/abs/2308.00951>`_ (Puigcerver et al., 2024).

    Every slot is a weighted mean of all tokens and every token one of all slots: nothing is
    dropped, and everything has a gradient. Compute scales with the slots, not with the tokens. In
    the logits, tokens and slots have norm 1, the slots times a learned scale that starts at 1
    (section 2.3 of the paper); slots mix the tokens as they are.

    Args:
        dim: D, the width of the tokens.
        num_experts: E; also K, since every token takes part in every expert.
        slots: S, slots per expert and group (default 1).

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
    """

    can_shrink = False

    def __init__(self, dim: int, *, num_experts: int, slots: int = 1) -> None:
        super().__init__(dim, num_experts=num_experts, k=num_experts, weight="score")
        check_counts(slots=slots)
        self.slots = slots
        self.phi = nn.Parameter(torch.empty(num_experts, slots, dim))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.phi, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> SoftRouting:
        groups = Groups.of(group, x_TD.size(0))
        unit_TD = _normalized(x_TD)
        unit_ND = _normalized(self.phi.flatten(0, 1).to(x_TD.dtype))
        logits_TN = unit_TD @ (unit_ND * self.scale.to(x_TD.dtype)).T
        combine_TES = logits_TN.softmax(dim=-1).unflatten(-1, (self.num_experts, self.slots))
        dispatch_TN = (logits_TN - groups.logsumexp(logits_TN)).exp()
        dispatch_TES = dispatch_TN.view_as(combine_TES)

        # As a routing: each token goes to all experts.
        num_tokens = x_TD.size(0)
        weight_TE = combine_TES.sum(dim=-1)
        experts_E = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=x_TD.device)
        return SoftRouting(
            token=torch.arange(num_tokens, device=x_TD.device).repeat(self.num_experts),
            offsets=experts_E * num_tokens,
            weight=weight_TE.T.reshape(-1),
            scores=weight_TE,
            num_tokens=num_tokens,
            validate=False,
            dispatch_TES=dispatch_TES,
            combine_TES=combine_TES,
            groups=groups,
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, slots={self.slots}"


def _normalized(x: Tensor) -> Tensor:
    """(..., D) vectors divided by their norms."""
    return x / (row_norms(x) + EPS)
