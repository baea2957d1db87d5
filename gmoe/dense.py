"""Fold layers of experts back into dense ones.

Shapes: E experts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe._calls import Data, batches_of, outputs_of, relative_change
from gmoe._checks import check_at_least, check_module, says_what_misfits
from gmoe.candidates import Candidate, candidate_of_tokens
from gmoe.layer_groups import Group, groups_of, named
from gmoe.moe import MoE, MoELayer
from gmoe.pruning import counting, refuse_unseen, share


@dataclass(frozen=True)
class DensifiedLayer:
    """What :func:`densify` did to a layer.

    Args:
        names: of the layer in the model.
        is_dense: it was folded.
        reason: why, or why not.
        change: the relative change of the model's outputs on the data, with this layer folded and
            those before it that were; ``None`` if nothing was run.
    """

    names: tuple[str, ...]
    is_dense: bool
    reason: str
    change: float | None

    def __str__(self) -> str:
        verdict = "dense" if self.is_dense else "stays"
        change = "" if self.change is None else f", relative change {self.change:.2g}"
        return f"{named(self.names)}: {verdict} ({self.reason}{change})"


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


@says_what_misfits
def densify(model: nn.Module, data: Data | None = None, *, tolerance: float = 0.01) -> Densified:
    r"""Fold layers of experts back to dense ones where that changes nothing, or little.

    Without data, a layer is folded where its dense module equals it:

    - one expert is left whose weight is 1, or all experts are equal and a token's weights sum to
      1. Beside a shared expert only for convs that are linear in their weights (GCN, SAGE,
      GraphConv, filters): their weights are added;
    - the routed part is zero: the gain of a conv, or the last map of all experts of an MLP.

    With data, other layers are folded too, one after the other in the model's order, as long as
    the outputs y of the model change little:

    .. math::
        \|y_{\mathrm{folded}} - y\| \le \mathrm{tolerance} \cdot \|y\|

    where y are all outputs on the data, in evaluation, before any layer was folded. A layer with a
    shared expert is folded to that expert (plus the routed ones' mean by load for convs that are
    linear in their weights), one without to the mean of its experts by load.

    A dense module takes what the one that :func:`moefy` replaced took: no ``batch=``, and no
    ``return_routing=``.

    Args:
        model: any model with :class:`MoE` or :class:`MoEConv` layers. It is changed in place.
        data: what the model is called with; see :func:`gmoe.prune` (default ``None``).
        tolerance: see above (default 0.01).

    Returns:
        The model, and for each layer whether it was folded and why. Printed, it is a table.

    Raises:
        ValueError: no layer with experts; data of which the model gives no floats.

    Example:
        >>> folded = gmoe.densify(vit, images)
        >>> print(folded)
    """
    check_module("model", model)
    check_at_least(0, tolerance=tolerance)
    groups = groups_of(model)
    if not groups:
        raise ValueError(
            f"model: got {type(model).__name__} without layers of experts, expected some"
        )
    batches = None if data is None else batches_of(data)
    before: Sequence[Tensor] = []
    with counting(groups) as counts:
        if batches is not None:
            before = outputs_of(model, batches)
    if batches is not None:
        refuse_unseen(groups, counts)

    def change_of_outputs(changed: nn.Module) -> float | None:
        return None if batches is None else relative_change(before, outputs_of(changed, batches))

    layers = []
    for group, count in zip(groups, counts, strict=True):
        for layer, names in _names_of(group).items():
            candidate = _candidate(layer, group.router, share(count.pairs_E))
            reason = candidate.reason
            if candidate.module is None:
                layers.append(DensifiedLayer(names, is_dense=False, reason=reason, change=None))
                continue
            model = _put(model, names, candidate.module)
            try:
                change = change_of_outputs(model)
            except Exception as error:  # of the user's model, which may be any
                # It may pass what a layer of experts takes, such as batch=, or read its attributes.
                change = math.inf
                reason = f"{reason}, with which the model fails: {error}"
            is_small = change is not None and change <= tolerance
            is_dense = change != math.inf and (candidate.is_exact or is_small)
            if not is_dense:
                model = _put(model, names, layer)
            layers.append(DensifiedLayer(names, is_dense, reason, change))
        _drop_unused_router(group)
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
        candidate = _candidate(layer, group.router, torch.zeros(layer.num_experts))
        if candidate.module is None:
            raise ValueError(f"model: got {dense_places[0]}: {candidate.reason}")
        model = _put(model, dense_places, candidate.module)
    _drop_unused_router(group)
    return model


def _candidate(layer: MoELayer, router: Any, load_E: Tensor) -> Candidate:
    """The dense module that a layer can be folded to."""
    if isinstance(layer, MoE):
        return candidate_of_tokens(layer, load_E)
    if "gmoe.conv.moe_conv" in sys.modules:
        from gmoe.conv.dense import candidate_of
        from gmoe.conv.moe_conv import MoEConv

        if isinstance(layer, MoEConv):
            return candidate_of(layer, router, load_E)
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
