"""The layers with experts of a model, by the router that serves them.

Several layers may share a router, and several names a layer: who takes experts away, or folds
layers, has to see them together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gmoe.experts import Experts, LinearExperts, MLPExperts
from gmoe.moe import MoELayer
from gmoe.recorded import AsBuilt
from gmoe.routers import ROUTERS, OracleRouter, Router

OF_GMOE = (*ROUTERS.values(), OracleRouter, LinearExperts, MLPExperts)
"""The routers and experts of which an expert can be taken away."""


@dataclass
class Group:
    """The layers that one router serves.

    Args:
        router: of the layers; ``None`` if each call passes a routing.
        layers: by their names in the model.
        owner: the model whose router it is, if it is not the layers' own.
    """

    router: Router | None
    layers: dict[str, MoELayer] = field(default_factory=dict)
    owner: Any = None

    @property
    def num_experts(self) -> int:
        return next(iter(self.layers.values())).num_experts

    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away from the router and its layers.

        Raises:
            ValueError: a part of a class that cannot be shrunk, or experts that are not there.
                Nothing was changed then.
        """
        if not kept or list(kept) != sorted(set(kept) & set(range(self.num_experts))):
            raise ValueError(
                f"kept: got {list(kept)}, expected some of 0 to {self.num_experts - 1}, ascending"
            )
        parts = [layer.experts for layer in self.layers.values()]
        if self.router is not None:
            parts.append(self.router)
        # First on copies: an error in the middle would leave half a model. A group of processes
        # cannot be copied.
        processes = getattr(self.router, "process_group", None)
        for part in copy.deepcopy(list(dict.fromkeys(parts)), {id(processes): processes}):
            _keep(part, kept)
        for layer in self.layers.values():
            if hasattr(layer, "edge_names_before"):
                layer.edge_names_before = layer.edge_names
        for part in dict.fromkeys(parts):
            _keep(part, kept)
        for layer in dict.fromkeys(self.layers.values()):
            before = layer.kept or range(layer.num_experts)
            layer.kept = tuple(before[expert] for expert in kept)
            layer.num_experts = len(kept)
            layer.k = min(layer.k, len(kept))
            layer.experts_per_token = min(layer.experts_per_token, float(len(kept)))
            if self.router is not None:
                layer.take_costs(self.router)
            if layer.as_built is not None:
                layer.as_built = AsBuilt.of(layer)


def _keep(part: Any, kept: Sequence[int]) -> None:
    """Take experts away from a router or from experts.

    A subclass of either may compute something else, of weights that its base does not have: it
    needs a ``keep`` of its own.
    """
    is_own = isinstance(part, Router | Experts) and not is_parametrized(part)
    if is_own and type(part) not in OF_GMOE and "keep" not in vars(type(part)):
        raise ValueError(
            f"model: got {type(part).__name__}, of which no expert can be taken away, expected "
            "routers and experts of gmoe, or a class with a method keep(kept) of its own (a router "
            "that calls Router.keep chooses among self.of_alive(scores)); call gmoe.restack "
            "before, if parts are nn.Linears"
        )
    part.keep(kept)


def named(names: Iterable[str]) -> str:
    """The names of layers for a message; the model itself has none."""
    return ", ".join(name or "the model itself" for name in names)


def groups_of(model: nn.Module) -> list[Group]:
    """All layers with experts, those under one router together, in the model's order."""
    shared: dict[nn.Module, Any] = {}
    for part in model.modules():
        if isinstance(getattr(part, "shared_router", None), Router):
            shared |= {layer: part for layer in part.modules() if isinstance(layer, MoELayer)}
    groups: dict[Any, Group] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, MoELayer):
            continue
        router = getattr(layer, "router", None)
        owner = shared.get(layer) if router is None else None
        if owner is not None:
            router = owner.shared_router
        key = layer if router is None else router
        group = groups.setdefault(key, Group(router, owner=owner))
        group.layers[name] = layer
    return list(groups.values())
