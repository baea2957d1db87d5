"""Fold layers of experts back into dense ones.

Shapes: E experts, T tokens, I in, H hidden, O out features.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe._calls import Data, outputs_of, relative_change
from gmoe._checks import check_at_least
from gmoe.experts import LinearExperts, MLPExperts
from gmoe.from_base import FromBase
from gmoe.moe import MoE, MoELayer
from gmoe.pruning import counting, share
from gmoe.routers import RandomRouter, TokenChoice
from gmoe.shrink import Group, groups_of, named


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


# what a layer can be folded to --------------------------------------------------------------------


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


def is_always_one(router: Any) -> bool:
    """True if a token's weights sum to 1: by construction, or since there is a single expert."""
    if router is None:
        return False
    is_softmax_of_one = isinstance(router, TokenChoice | RandomRouter) and router.num_experts == 1
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


def _candidate(layer: MoELayer, router: Any, load_E: Tensor) -> Candidate:
    """The dense module that a layer can be folded to."""
    if isinstance(layer, MoE):
        return _of_tokens(layer, load_E)
    if "gmoe.conv.moe_conv" in sys.modules:
        from gmoe.conv.dense import candidate_of
        from gmoe.conv.moe_conv import MoEConv

        if isinstance(layer, MoEConv):
            return candidate_of(layer, router, load_E)
    return Candidate(None, f"{type(layer).__name__} is not folded: MoE and MoEConv are")


def _of_tokens(layer: MoE, load_E: Tensor) -> Candidate:
    """The dense module of a layer on tokens."""
    experts: Any = layer.experts
    if isinstance(experts, FromBase):
        experts = copy.deepcopy(experts).folded()
    if not isinstance(experts, MLPExperts | LinearExperts):
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
    return Candidate(dense, *reason_of(is_one, are_same, is_always_one(layer.router)))


def reason_of(is_one: bool, are_same: bool, is_constant: bool) -> tuple[str, bool]:
    """What the mean of experts is, and whether it equals their mixture.

    Args:
        is_one: there is a single expert.
        are_same: all experts are equal.
        is_constant: a token's weights sum to 1.
    """
    if is_one:
        return "one expert is left", is_constant
    if are_same:
        return "equal experts", is_constant
    return "the mean of the experts by load", False


# folding ------------------------------------------------------------------------------------------


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
    check_at_least(0, tolerance=tolerance)
    groups = groups_of(model)
    if not groups:
        raise ValueError(f"model: got {type(model).__name__} without layers of experts")
    before: Sequence[Tensor] = []
    with counting(groups) as counts:
        if data is not None:
            before = outputs_of(model, data)

    def change_of_outputs(changed: nn.Module) -> float | None:
        return None if data is None else relative_change(before, outputs_of(changed, data))

    layers = []
    for group, count in zip(groups, counts, strict=True):
        for layer, names in _names_of(group).items():
            candidate = _candidate(layer, group.router, share(count.pairs_E))
            dense = candidate.module
            reason = candidate.reason
            change = None
            stays = dense is None
            if dense is not None:
                model = _put(model, names, dense)
                try:
                    change = change_of_outputs(model)
                except (TypeError, ValueError, RuntimeError) as error:
                    # The model passes what a layer of experts takes, such as batch=.
                    change = math.inf
                    reason = f"{reason}, with which the model fails: {error}"
                is_small = change is not None and change <= tolerance
                stays = change == math.inf or not (candidate.is_exact or is_small)
                if stays:
                    model = _put(model, names, layer)
            layers.append(DensifiedLayer(names, not stays, reason, change))
        _drop_unused_router(group)
    return Densified(model, layers)


def densify_like(model: nn.Module, group: Group, names: Sequence[str]) -> nn.Module:
    """Replace layers by dense modules as :func:`densify` does, with any values.

    Raises:
        ValueError: a layer that has no dense module.
    """
    for name in names:
        layer = group.layers[name]
        candidate = _candidate(layer, group.router, torch.zeros(layer.num_experts))
        if candidate.module is None:
            raise ValueError(f"model: got {name}: {candidate.reason}")
        model = _put(model, [name], candidate.module)
    _drop_unused_router(group)
    return model


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
