"""What a layer with experts can be folded to: a dense module, and why.

Shapes: E experts, T tokens, I in, H hidden, O out features.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmoe.experts import LinearExperts, MLPExperts
from gmoe.from_base import FromBase
from gmoe.moe import MoE
from gmoe.routers import RandomRouter, TokenChoice


class MLP(nn.Module):
    """One expert of :class:`MLPExperts` by itself, with ``nn.Linear`` layers.

    Args:
        experts: the experts.
        share_E: (E,) sums to 1: the weights are this mean of the experts'.

    Shapes:
        (..., I) to (..., O).
    """

    moefied: dict[str, Any] | None = None
    """The arguments of :func:`gmoe.moefy` that made the layer, for :func:`gmoe.save`."""

    def __init__(self, experts: MLPExperts, share_E: Tensor) -> None:
        super().__init__()
        self.up = linear_of(experts.up, share_E)
        self.down = linear_of(experts.down, share_E)
        self.glu = experts.glu
        self.activation = copy.deepcopy(experts.activation)
        self.input_norm = copy.deepcopy(experts.input_norm)
        self.hidden_norm = copy.deepcopy(experts.hidden_norm)
        self.hidden_dropout = nn.Dropout(experts.hidden_dropout.p)
        self.output_dropout = nn.Dropout(experts.output_dropout.p)
        self.train(experts.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run it; see the class."""
        h = self.up(self.input_norm(x))
        if self.glu:
            gate, value = h.chunk(2, dim=-1)
            # A copy: an activation may overwrite its input.
            h = self.activation(gate.clone()) * value
        else:
            h = self.activation(h)
        return self.output_dropout(self.down(self.hidden_norm(self.hidden_dropout(h))))


@torch.no_grad()
def linear_of(experts: LinearExperts, share_E: Tensor) -> nn.Linear:
    """A mean of stacked linear layers."""
    share_E = share_E.to(experts.weight)
    linear: Any = nn.Linear(experts.in_features, experts.out_features, device="meta")
    weight = torch.einsum("e,eio->oi", share_E, experts.weight).contiguous()
    linear.weight = nn.Parameter(weight)
    linear.bias = None
    if experts.bias is not None:
        linear.bias = nn.Parameter(share_E @ experts.bias)
    return linear.requires_grad_(experts.weight.requires_grad)


@dataclass(frozen=True)
class Candidate:
    """A dense module that may replace a layer.

    Args:
        module: the dense module; ``None`` if there is none.
        reason: why it equals the layer, what it is, or why there is none.
        is_exact: it equals the layer by construction.
    """

    module: nn.Module | None
    reason: str
    is_exact: bool = False


def weights_sum_to_one(router: Any) -> bool:
    """True if a token's weights sum to 1: by construction, or since there is a single expert."""
    if router is None:
        return False
    is_softmax_of_one = type(router) in (TokenChoice, RandomRouter) and router.num_experts == 1
    counts_removed = getattr(router, "removed_DR", router.removed) is not None
    return router.sums_to_one or (is_softmax_of_one and not counts_removed)


def are_equal(experts: nn.Module) -> bool:
    """True if all experts have the same values; their parameters and buffers are stacked."""
    values = [*experts.parameters(), *experts.buffers()]
    return all(bool((value == value[:1]).all()) for value in values)


def mean_share(num_experts: int, load_E: Tensor, are_same: bool) -> Tensor:
    """(E,) how much of each expert goes into the dense layer: by load, or only the first."""
    if are_same or not load_E.any():
        share_E = torch.zeros(num_experts, dtype=torch.float64)
        share_E[0] = 1.0
        return share_E
    return load_E


def candidate_of_tokens(layer: MoE, load_E: Tensor) -> Candidate:
    """The dense module of a layer on tokens."""
    experts: Any = layer.experts
    if isinstance(experts, FromBase):
        experts = copy.deepcopy(experts).folded()
    if type(experts) not in (MLPExperts, LinearExperts):  # a subclass may compute something else
        name = type(experts).__name__
        return Candidate(None, f"{name} is not folded: MLPExperts and LinearExperts are")
    parts = [experts.up, experts.down] if isinstance(experts, MLPExperts) else [experts]
    if not all(type(part) is LinearExperts for part in parts):
        return Candidate(None, "parts of its experts were replaced: gmoe.restack before")

    if layer.shared_expert is not None:
        # Two MLPs side by side are no MLP of their size: the dense module is the shared one.
        is_nothing = not any(bool(value.any()) for value in parts[-1].parameters())
        reason = "routed experts that are zero" if is_nothing else "the shared expert alone"
        return Candidate(layer.shared_expert, reason, is_nothing)

    is_one = experts.num_experts == 1
    are_same = is_one or are_equal(experts)
    share_E = mean_share(experts.num_experts, load_E, are_same)
    dense: Any
    if isinstance(experts, MLPExperts):
        dense = MLP(experts, share_E)
        dense.moefied = layer.moefied
    else:
        dense = linear_of(experts, share_E)
    return Candidate(dense, *reason_of(is_one, are_same, weights_sum_to_one(layer.router)))


def reason_of(is_one: bool, are_same: bool, sums_to_one: bool) -> tuple[str, bool]:
    """What the mean of experts is, and whether it equals their mixture.

    Args:
        is_one: there is a single expert.
        are_same: all experts are equal.
        sums_to_one: a token's weights sum to 1.
    """
    if is_one:
        return "one expert is left", sums_to_one
    if are_same:
        return "equal experts", sums_to_one
    return "the mean of the experts by load", False
