"""Fold a MoEConv back to a dense conv; see :mod:`gmoe.dense`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gmoe.candidates import Candidate, verdict_of
from gmoe.conv.aggregate import LinearAggregation
from gmoe.conv.base import GAIN_SCALE, MixedExperts, StackedExperts
from gmoe.conv.moe_conv import MoEConv
from gmoe.stack import are_equal
from gmoe.unstacked import UnstackedLinears


def candidate_of(layer: MoEConv, router: Any) -> Candidate:
    """The dense conv that a layer can be folded to."""
    experts: Any = layer.experts
    if experts is None:
        return Candidate(None, "its widths are open: call it once before")
    if layer.transform is not None and layer.shared_expert is None:
        return Candidate(None, "its experts see a shared transform of the nodes")
    if any(isinstance(part, UnstackedLinears) for part in layer.modules()):
        return Candidate(None, "parts of its experts were replaced: gmoe.restack before")
    kinds = [layer._make.kinds[expert] for expert in layer.kept or range(layer.num_experts)]
    is_one_kind = kinds.count(kinds[0]) == len(kinds)
    are_same = layer.num_experts == 1 or (is_one_kind and _have_same_values(experts))
    reason, is_exact = verdict_of(layer.num_experts, are_same, router)
    part = experts if layer.shared_expert is None else layer.shared_expert
    learns = any(parameter.requires_grad for parameter in part.parameters())

    if layer.shared_expert is None:
        if not is_one_kind:
            return Candidate(None, "convs of several kinds")
        return Candidate(experts.expert(0).requires_grad_(learns), reason, is_exact)

    shared = layer.shared_expert.expert(0).requires_grad_(learns)
    if not layer.gain.any():
        return Candidate(shared, "a gain of zero", is_exact=True)
    # What is linear in its weights can be added to the shared conv.
    is_of_kind = is_one_kind and kinds[0] == layer._make.kinds[0]
    if not (_are_linear(experts) and is_of_kind and layer.transform is None):
        return Candidate(shared, "experts beside a shared one")
    if not is_exact:
        return Candidate(shared, reason)
    added = experts.expert(0)
    with torch.no_grad():
        for place, value in zip(shared.parameters(), added.parameters(), strict=True):
            place.add_(value, alpha=float(GAIN_SCALE * layer.gain))
    return Candidate(shared, f"{reason}, added to the shared expert", is_exact)


def _are_linear(experts: Any) -> bool:
    """True if the experts' outputs are linear in their weights."""
    return isinstance(experts, LinearAggregation) and not experts.normalize


def _have_same_values(experts: Any) -> bool:
    """True if all experts, which are of one kind, have the same values."""
    if isinstance(experts, StackedExperts):
        return are_equal(experts)
    if isinstance(experts, MixedExperts):
        return False
    states: Sequence[Any] = [list(member.state_dict().values()) for member in experts.members]
    return all(
        torch.equal(one, other)
        for state in states[1:]
        for one, other in zip(states[0], state, strict=True)
    )
