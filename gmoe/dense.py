"""Fold layers of experts back into dense ones that equal them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from gmoe._checks import check_module
from gmoe.candidates import Candidate, candidate_of_tokens
from gmoe.layer_groups import Group, groups_of, named
from gmoe.moe import MoE, MoELayer
from gmoe.routers.by_type import detach


@dataclass(frozen=True)
class DensifiedLayer:
    """What :func:`densify` did to a layer.

    Args:
        names: of the layer in the model.
        is_dense: it was folded.
        reason: why, or why not.
    """

    names: tuple[str, ...]
    is_dense: bool
    reason: str

    def __str__(self) -> str:
        verdict = "dense" if self.is_dense else "stays"
        return f"{named(self.names)}: {verdict} ({self.reason})"


class Densified(NamedTuple):
    """The result of :func:`densify`.

    Args:
        model: the model; what replaces it, if the model itself was folded.
        layers: what was done to each layer.
    """

    model: nn.Module
    layers: list[DensifiedLayer]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def densify(model: nn.Module) -> Densified:
    r"""Fold layers of experts back to dense ones where that changes nothing, up to rounding.

    A layer is folded where a dense module equals it:

    - one expert is left, or all experts are equal; and a token's weights sum to 1. Beside a shared
      expert only for convs that are linear in their weights (GCN, SAGE, GraphConv): their
      weights are added;
    - the routed part is zero: the gain of a conv, or the last map of all experts of an MLP.

    A dense module takes what the one that :func:`moefy` replaced took: no ``batch=``, and no
    ``return_routing=``.

    Args:
        model: any model with :class:`MoE` or :class:`MoEConv` layers. It is changed in place.

    Returns:
        The model, and for each layer whether it was folded and why. Printed, it is a table.

    Raises:
        ValueError: no layer with experts.

    Example:
        >>> folded = gmoe.densify(vit)
        >>> print(folded)
    """
    check_module("model", model)
    groups = groups_of(model)
    if not groups:
        raise ValueError(
            f"model: got {type(model).__name__} without layers of experts, expected some"
        )
    layers = []
    for group in groups:
        for layer, names in _names_of(group).items():
            candidate = _candidate(layer, group.router)
            if candidate.is_exact and candidate.module is not None:
                model = _put(model, names, candidate.module)
            layers.append(DensifiedLayer(names, candidate.is_exact, candidate.reason))
        _drop_unused_router(group)
    if not groups_of(model):
        detach(model)
    return Densified(model, layers)


def densify_like(model: nn.Module, group: Group, names: Sequence[str]) -> nn.Module:
    """Replace layers by dense modules as :func:`densify` does, with any values.

    Raises:
        ValueError: a layer that has no dense module.
    """
    for layer, places in _names_of(group).items():
        dense_places = [name for name in places if name in names]
        if not dense_places:
            continue
        candidate = _candidate(layer, group.router)
        if candidate.module is None:
            raise ValueError(f"model: got {dense_places[0]}: {candidate.reason}")
        model = _put(model, dense_places, candidate.module)
    _drop_unused_router(group)
    return model


def _candidate(layer: MoELayer, router: Any) -> Candidate:
    """The dense module that a layer can be folded to."""
    if isinstance(layer, MoE):
        return candidate_of_tokens(layer, router)
    if "gmoe.conv.moe_conv" in sys.modules:
        from gmoe.conv.dense import candidate_of
        from gmoe.conv.moe_conv import MoEConv

        if isinstance(layer, MoEConv):
            return candidate_of(layer, router)
    return Candidate(None, f"{type(layer).__name__} is not folded: MoE and MoEConv are")


def _drop_unused_router(group: Group) -> None:
    """Take the router from a model that has no layers of experts anymore."""
    owner = group.owner
    if owner is not None and not any(isinstance(part, MoELayer) for part in owner.modules()):
        owner.shared_router = None


def _names_of(group: Group) -> dict[MoELayer, tuple[str, ...]]:
    """The names of each layer of a group: it may stand in several places."""
    names: dict[MoELayer, tuple[str, ...]] = {}
    for name, layer in group.layers.items():
        names[layer] = (*names.get(layer, ()), name)
    return names


def _put(model: nn.Module, names: Sequence[str], module: nn.Module) -> nn.Module:
    """Put a module in all places of a layer; return the model, which may be the layer itself."""
    for name in names:
        if name == "":
            return module
        model.set_submodule(name, module)
    return model
