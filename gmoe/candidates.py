"""What a layer with experts can be folded to: a dense module, and whether it equals the layer.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmoe.experts import LinearExperts, MLPExperts
from gmoe.merging import dense_of
from gmoe.moe import MoE
from gmoe.routers import RandomRouter, TokenChoice
from gmoe.stack import are_equal


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

    first_1E = torch.eye(1, experts.num_experts)
    dense = dense_of(experts, first_1E.to(next(experts.parameters()).device))
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
