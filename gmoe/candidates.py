"""What a layer with experts can be folded to: a dense module, and whether it equals the layer.

Shapes: I in, O out features.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmoe.experts import LinearExperts, MLPExperts
from gmoe.moe import MoE
from gmoe.recorded import Recorded
from gmoe.routers import RandomRouter, TokenChoice
from gmoe.stack import are_equal


class MLP(nn.Module):
    """The first expert of :class:`MLPExperts` by itself, with ``nn.Linear`` layers.

    Args:
        experts: the experts.

    Shapes:
        (..., I) to (..., O).
    """

    moefied: Recorded | None = None
    """The arguments of :func:`gmoe.moefy` that made the layer, for :func:`gmoe.save`."""

    def __init__(self, experts: MLPExperts) -> None:
        super().__init__()
        self.up = linear_of(experts.up)
        self.down = linear_of(experts.down)
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
def linear_of(experts: LinearExperts) -> nn.Linear:
    """The first of stacked linear layers."""
    weight, bias = experts.weight[0], None if experts.bias is None else experts.bias[0]
    linear: Any = nn.Linear(experts.in_features, experts.out_features, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    linear.bias = None if bias is None else nn.Parameter(bias.clone())
    return linear.requires_grad_(any(value.requires_grad for value in experts.parameters()))


@dataclass(frozen=True)
class Candidate:
    """A dense module of the form that may replace a layer.

    Args:
        module: the dense module; ``None`` if there is none.
        reason: why it equals the layer, or why it does not.
        is_exact: it equals the layer.
    """

    module: nn.Module | None
    reason: str
    is_exact: bool = False


def weights_sum_to_one(router: Any) -> bool:
    """True if a token's weights sum to 1: by construction, or as the softmax of one score."""
    if router is None:
        return False
    is_softmax_of_one = type(router) in (TokenChoice, RandomRouter) and router.num_scored == 1
    return router.sums_to_one or is_softmax_of_one


def candidate_of_tokens(layer: MoE, router: Any) -> Candidate:
    """The dense module of a layer on tokens, which a router serves that may not be its own."""
    experts: Any = layer.experts
    if type(experts) not in (MLPExperts, LinearExperts):  # a subclass may compute something else
        name = type(experts).__name__
        return Candidate(None, f"{name} is not folded: MLPExperts and LinearExperts are")
    parts = [experts.up, experts.down] if isinstance(experts, MLPExperts) else [experts]
    if not all(type(part) is LinearExperts for part in parts):
        return Candidate(None, "parts of its experts were replaced: gmoe.restack before")

    if layer.shared_expert is not None:
        # Two MLPs side by side are no MLP of their size: the dense module is the shared one.
        is_nothing = not any(bool(value.any()) for value in parts[-1].parameters())
        reason = "routed experts that are zero" if is_nothing else "experts beside a shared one"
        return Candidate(layer.shared_expert, reason, is_nothing)

    dense: Any
    if isinstance(experts, MLPExperts):
        dense = MLP(experts)
        dense.moefied = layer.moefied
    else:
        dense = linear_of(experts)
    are_same = experts.num_experts == 1 or are_equal(experts)
    return Candidate(dense, *verdict_of(experts.num_experts, are_same, router))


def verdict_of(num_experts: int, are_same: bool, router: Any) -> tuple[str, bool]:
    """What the experts of a layer are, and whether the first of them equals their mixture.

    Args:
        num_experts: E.
        are_same: all experts are equal.
        router: of the layer; ``None`` if each call passes a routing.
    """
    if not are_same:
        return "experts that differ", False
    reason = "one expert is left" if num_experts == 1 else "equal experts"
    if weights_sum_to_one(router):
        return reason, True
    return f"{reason}, whose weights do not always sum to 1", False
