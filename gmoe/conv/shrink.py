"""Take experts that are convs away from a layer; see :mod:`gmoe.shrink`."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from gmoe.conv.aggregate import FilterExperts
from gmoe.conv.base import MixedExperts, StackedExperts
from gmoe.conv.kinds import Make
from gmoe.conv.separate import SeparateExperts
from gmoe.shrink import Kept, keep_experts
from gmoe.stack import keep


@keep_experts.register
def _stacked(experts: StackedExperts, kept: Kept) -> None:
    keep(experts, kept)
    if isinstance(experts.make, Make):
        experts.make = replace(experts.make, kinds=[experts.make.kinds[expert] for expert in kept])
    if isinstance(experts, FilterExperts):
        # All powers stay: the router may see them.
        experts.filters = [experts.filters[expert] for expert in kept]


@keep_experts.register
def _separate(experts: SeparateExperts, kept: Kept) -> None:
    experts.members = nn.ModuleList(experts.members[expert] for expert in kept)
    experts.is_local = [experts.is_local[expert] for expert in kept]


@keep_experts.register
def _mixed(experts: MixedExperts, kept: Kept) -> None:
    groups = []
    members = []
    for group, indices in zip(experts.groups, experts.members, strict=True):
        places = [place for place, expert in enumerate(indices) if expert in kept]
        if not places:
            continue
        keep_experts(group, places)
        groups.append(group)
        members.append(tuple(kept.index(indices[place]) for place in places))
    experts.groups = nn.ModuleList(groups)
    experts.members = members
