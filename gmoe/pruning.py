"""Take away the experts that nobody chose.

Shapes: E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gmoe._checks import check, check_module
from gmoe.moe import MoELayer, check_built, check_can_keep, keep_experts
from gmoe.routers import Router
from gmoe.routing import Routing, as_list


@dataclass
class Group:
    """The layers that one router serves, which lose their experts together.

    Args:
        router: of the layers; ``None`` if each call passes a routing.
        layers: by their names in the model.
        calls: the places of its routings among those of a forward of the model.
    """

    router: Any
    layers: dict[str, MoELayer] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        return next(iter(self.layers.values())).num_experts

    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away; see :meth:`gmoe.MoE.keep`."""
        keep_experts(self.layers.values(), self.router, kept)


def prune(
    model: nn.Module, routings: Routing | Sequence[Routing | Sequence[Routing]]
) -> dict[str, tuple[int, ...]]:
    """Remove the experts that nobody chose from all layers of a model, in place.

    On the data of the routings, the outputs in evaluation stay the same, up to rounding: the router
    scores all experts as before, and chooses among those that stay. At least K of them stay in each
    layer. To choose the experts yourself, call ``layer.keep(ids)``.

    Layers that share a router are pruned together. Parameters of experts are new ones: make a new
    optimizer.

    Args:
        model: any model with layers of experts, which calls its routers in the order of its
            modules.
        routings: of one forward pass of the model in evaluation, as :func:`record_routing` and
            ``return_routing=True`` give them; or a list of these, one for each batch.

    Returns:
        The experts that stayed, by the name of the layer; their numbers are those before. The
        model itself, as a layer, is named ``""``.

    Raises:
        ValueError: no layer with experts; a router or experts of which none can be taken away, such
            as :class:`SoftSlots`, a router by type, or a class of your own without
            ``keep``; routings that are not those of the model; a layer in which no expert was
            chosen at all, of which the data say nothing. The model stays as it is then.

    Example:
        >>> routings = []
        >>> for images, _ in loader:
        ...     with torch.no_grad(), gmoe.record_routing(model.eval()) as routing:
        ...         model(images)
        ...     routings.append(routing)
        >>> gmoe.prune(model, routings)
        {'blocks.1.mlp': (0, 2, 3), 'blocks.3.mlp': (1, 3)}
    """
    check_module("model", model)
    groups = checked_groups(model)
    batches = _batches(routings, sum(len(group.calls) for group in groups))

    # 1. Check all, before anything changes.
    kept_by_group = []
    for group in groups:
        of_group = [batch[place] for batch in batches for place in group.calls]
        kept = _kept(group, of_group)
        check_can_keep(group.layers.values(), group.router, kept)
        kept_by_group.append(kept)

    # 2. Take the others away.
    kept_by_name: dict[str, tuple[int, ...]] = {}
    for group, kept in zip(groups, kept_by_group, strict=True):
        if len(kept) < group.num_experts:
            group.keep(kept)
        kept_by_name |= dict.fromkeys(group.layers, kept)
    return kept_by_name


def _batches(routings: Any, num_calls: int) -> list[list[Routing]]:
    """The routings of each forward pass of a model that calls its routers so many times."""
    is_list = isinstance(routings, Sequence)
    are_several = is_list and all(isinstance(one, Sequence) for one in routings)
    batches = [as_list(batch) for batch in (routings if are_several else [routings])]
    check(batches, "routings", "none", "those of at least one forward pass")
    for batch in batches:
        legal = (
            f"{num_calls}, one for each call of a router of the model; of several forward passes, "
            "a list of their lists"
        )
        check(len(batch) == num_calls, "routings", f"{len(batch)} of a forward pass", legal)
    return batches


def _kept(group: Group, routings: Sequence[Routing]) -> tuple[int, ...]:
    """The experts that were chosen, and the first of the others if the router needs more.

    Raises:
        ValueError: routings that are not the router's; none in which an expert was chosen.
    """
    names = named(group.layers)
    for routing in routings:
        is_fitting = routing.num_experts == group.num_experts
        legal = f"one of {group.num_experts} experts"
        check(is_fitting, "routings", f"{routing!r} for {names}", legal)
    load_E = torch.stack([routing.load.cpu() for routing in routings]).sum(dim=0)
    got = f"some in which no expert of {names} was chosen"
    check(load_E.any(), "routings", got, "those of data that reach every layer")
    by_use = (load_E == 0).int().argsort(stable=True).tolist()
    number = max(int((load_E > 0).sum()), group.router.k)
    return tuple(sorted(by_use[:number]))


def named(names: Iterable[str]) -> str:
    """The names of layers for a message; the model itself has none."""
    return ", ".join(name or "the model itself" for name in names)


def groups_of(model: nn.Module) -> list[Group]:
    """All layers with experts, those under one router together, in the model's order."""
    shared: dict[nn.Module, Router] = {}
    for part in model.modules():
        router = getattr(part, "shared_router", None)
        if isinstance(router, Router):
            shared |= {layer: router for layer in part.modules() if isinstance(layer, MoELayer)}

    groups: dict[nn.Module, Group] = {}
    num_calls = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        own = layer.router
        router = shared.get(layer) if own is None else own
        group = groups.setdefault(layer if router is None else router, Group(router))
        group.layers[name] = layer
        # A router of the model's own is called once for all layers.
        if own is not None or len(group.layers) == 1:
            group.calls.append(num_calls)
            num_calls += 1
    return list(groups.values())


def checked_groups(model: nn.Module) -> list[Group]:
    """All layers with experts by router, each with one.

    Raises:
        ValueError: no layer with experts; one of open widths, without a router of its own or of its
            model, or with the experts of a layer under another router.
    """
    groups = groups_of(model)
    check(groups, "model", f"{type(model).__name__} without layers of experts", "some")
    owners: dict[nn.Module, Group] = {}
    for group in groups:
        for name, layer in group.layers.items():
            check_built(named([name]), layer)
            got = f"{named([name])}, a {type(layer).__name__} without one router of its own"
            check(group.router is not None, "model", got, "layers with a router")
            owner = owners.setdefault(layer.experts, group)
            got = f"{named([name])}, whose experts are those of a layer under another router"
            check(owner is group, "model", got, "experts of its own")
    return groups
