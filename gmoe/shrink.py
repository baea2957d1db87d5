"""Take experts away from a layer: from its experts and from what its router knows of each.

:func:`gmoe.prune` says which ones, :func:`gmoe.load` repeats it. For a class of your own, register
what it has to do: ``@gmoe.shrink.keep_experts.register`` on ``def _(part: YourClass, kept)``.

Shapes: T tokens, E experts, D width, M centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gmoe._checks import change_of
from gmoe.experts import Experts, LinearExperts, MLPExperts
from gmoe.from_base import ExpertsFromBase
from gmoe.routers import (
    AttentionVote,
    ExpertChoice,
    MultiCentroid,
    OracleRouter,
    RandomRouter,
    Router,
    TokenChoice,
    UniformRouter,
)

Kept = Sequence[int]
"""The numbers of the experts that stay, ascending; they are numbered anew."""


@singledispatch
def keep_experts(part: Any, kept: Kept) -> None:
    """Take all other experts away from a router or from experts, in place.

    Raises:
        ValueError: a class for which nobody registered what to do.
    """
    raise _refused(part)


def _refused(part: Any) -> ValueError:
    return ValueError(
        f"model: got {type(part).__name__}, of which no expert can be taken away, expected routers "
        "and experts of gmoe; of a class of your own, register "
        "gmoe.shrink.keep_experts; call gmoe.restack before, if parts are nn.Linears"
    )


def shrink(part: Any, kept: Kept) -> None:
    """:func:`keep_experts`, but nothing is known of a subclass of a router or of experts.

    It may compute something else, of weights that its base does not have.

    Raises:
        ValueError: see :func:`keep_experts`.
    """
    is_own = isinstance(part, Router | Experts) and type(part) not in keep_experts.registry
    if is_own and not is_parametrized(part):  # of which take() says more
        raise _refused(part)
    keep_experts(part, kept)


def take(module: nn.Module, name: str, kept: Kept, dim: int = 0) -> None:
    """Keep some rows of a parameter or a buffer, one for each expert; ``None`` stays.

    Raises:
        ValueError: a parametrized module, whose values are computed from others.
    """
    old = getattr(module, name)
    if old is None:
        return
    if is_parametrized(module):
        raise ValueError(
            f"model: got {type(module).__name__} with a parametrized {name}, expected a plain one: "
            "remove the parametrization before"
        )
    new = old.detach().index_select(dim, torch.tensor(kept, device=old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)


# experts ------------------------------------------------------------------------------------------


@keep_experts.register
def _linear_experts(experts: LinearExperts, kept: Kept) -> None:
    take(experts, "weight", kept)
    take(experts, "bias", kept)
    experts.num_experts = len(kept)


@keep_experts.register
def _mlp_experts(experts: MLPExperts, kept: Kept) -> None:
    shrink(experts.up, kept)
    shrink(experts.down, kept)
    experts.num_experts = len(kept)


@keep_experts.register
def _experts_from_base(experts: ExpertsFromBase, kept: Kept) -> None:
    shrink(experts.differences, kept)
    experts.num_experts = len(kept)


# routers ------------------------------------------------------------------------------------------


def _removed(num_experts: int, kept: Kept) -> list[int]:
    """The experts that are not kept."""
    return [expert for expert in range(num_experts) if expert not in kept]


def _keep_rows(linear: Any, kept: Kept) -> None:
    """Keep some outputs of a linear layer."""
    change = change_of(linear)
    if change is not None:
        raise ValueError(f"model: got a router's gate with {change}, expected a plain linear layer")
    take(linear, "weight", kept)
    linear.out_features = len(kept)


def _keep_gate(router: Any, kept: Kept, counts_removed: bool) -> None:
    """Keep the columns of a gate; those that go stay in the softmax, if it is one over experts."""
    if counts_removed:
        rows = router.gate.weight.detach()[_removed(router.num_experts, kept)]
        before = [] if router.removed is None else [router.removed.weight.detach()]
        weight = torch.cat([*before, rows])
        if len(weight):
            linear = nn.Linear(router.dim, len(weight), bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=router.gate.weight.requires_grad)
            router.removed = linear.train(router.training)
    _keep_rows(router.gate, kept)


def _keep_capacity(router: Router, owner: Any, kept: Kept) -> None:
    """Let each expert take as many tokens as before: its capacity is a share of K T / E."""
    owner.capacity_factor *= len(kept) / router.num_experts
    router.experts_per_token = min(router.k * owner.capacity_factor, float(len(kept)))


def _keep_buffers(module: nn.Module, kept: Kept) -> None:
    """Keep the counters of some experts; by their names, those end in E."""
    for name, _ in list(module.named_buffers(recurse=False)):
        if name.endswith("_E"):
            take(module, name, kept)


@keep_experts.register
def _token_choice(router: TokenChoice, kept: Kept) -> None:
    # Other weights are relative to the chosen experts', or constant. How many experts a token takes
    # follows from the probabilities, if it takes them by top_p.
    is_among_experts = router.weight == "score" or router.top_p is not None
    _keep_gate(router, kept, counts_removed=is_among_experts)
    router.experts_per_token = min(router.experts_per_token, float(len(kept)))
    if router.noise is not None:
        _keep_rows(router.noise, kept)
    _keep_buffers(router, kept)
    router.num_experts = len(kept)


@keep_experts.register
def _expert_choice(router: ExpertChoice, kept: Kept) -> None:
    _keep_gate(router, kept, counts_removed=router.selection.normalize == "experts")
    _keep_buffers(router.selection, kept)
    _keep_capacity(router, router.selection, kept)
    router.num_experts = len(kept)


@keep_experts.register
def _attention_vote(router: AttentionVote, kept: Kept) -> None:
    rows = [expert * router.head_dim + row for expert in kept for row in range(router.head_dim)]
    _keep_rows(router.key, rows)
    if not router.shared_queries:
        _keep_rows(router.query, rows)
    _keep_capacity(router, router, kept)
    router.num_experts = len(kept)


@keep_experts.register
def _multi_centroid(router: MultiCentroid, kept: Kept) -> None:
    selection = router.selection
    is_among_experts = (
        router.weight == "score" if selection is None else selection.normalize == "experts"
    )
    if is_among_experts:
        centroids = router.centroid.detach()[_removed(router.num_experts, kept)]
        before = [] if router.removed is None else [router.removed.detach()]
        removed = torch.cat([*before, centroids])
        if len(removed):
            router.removed = nn.Parameter(removed, requires_grad=router.centroid.requires_grad)
    take(router, "centroid", kept)
    if selection is not None:
        _keep_buffers(selection, kept)
        _keep_capacity(router, selection, kept)
    router.num_experts = len(kept)


@keep_experts.register
def _random(router: RandomRouter, kept: Kept) -> None:
    if router.weight == "score":
        columns = router.projection_DE[:, _removed(router.num_experts, kept)]
        before = [] if router.removed_DR is None else [router.removed_DR]
        removed = torch.cat([*before, columns], dim=1)
        router.removed_DR = removed if removed.size(1) else None
    take(router, "projection_DE", kept, dim=1)
    router.num_experts = len(kept)


@keep_experts.register
def _uniform(router: UniformRouter, kept: Kept) -> None:
    router.num_experts = router.k = len(kept)
    router.experts_per_token = float(len(kept))


@keep_experts.register
def _oracle(router: OracleRouter, kept: Kept) -> None:
    number = torch.full((router.num_experts,), -1, device=router.assignment_T.device)
    number[list(kept)] = torch.arange(len(kept), device=number.device)
    assignment_T = number[router.assignment_T]
    if (assignment_T < 0).any():
        raise ValueError(
            "keep: got experts to remove to which the oracle assigns tokens, expected only experts "
            "without a token"
        )
    router.assignment = assignment_T.cpu()
    router.assignment_T = assignment_T
    router.num_experts = len(kept)
