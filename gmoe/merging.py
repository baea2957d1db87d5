"""Merge the experts of layers into one dense layer, for one decision.

Shapes: E experts, G groups, I in and O out features.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._calls import evaluating, with_modules
from gmoe._checks import change_of, check, check_module
from gmoe.experts import LinearExperts
from gmoe.mixed import MixedWeights, mixture
from gmoe.mlps import form_of_class
from gmoe.moe import MoE, MoELayer, SoftMoE
from gmoe.routers.from_call import decided_from, detach
from gmoe.routing import Routing
from gmoe.split_mlps import take_apart
from gmoe.stack import stacks_in


def merge(model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    r"""Return the plain dense model of one molecule, composition, or source.

    .. math:: W = \sum_e w_e W_e

    In layers that mix weights (:class:`gmoe.mixed.MixedWeights`) all tokens of a group run the
    same mixture: where every group has the same decision, as in a simulation of one molecule, the
    mixture is made once, and the model has neither experts nor routers, nor their cost. So it is in
    layers by type where all tokens have one type. For what has that decision it equals the model,
    up to rounding; for others merge again. What :func:`moefy` gave experts is of its class again:
    ``dense.load_state_dict(merged.state_dict())`` fills the model that it was made of. Save it as
    you save that one.

    Args:
        model: any model whose layers with experts all have one decision, from :func:`moefy` or your
            own. It stays as it is.
        *args: a call of the model, which is made once, in evaluation.
        **kwargs: likewise; or by themselves the arguments that its routers read, for one group:
            nothing is called then.

    Returns:
        A dense copy of the model.

    Raises:
        ValueError: a layer that has no router, or that runs beside a shared expert; MLPs of experts
            that you built, or changed; tokens of different decisions, or outputs of several
            experts; neither a whole call nor one value of each argument that routers read.

    Example:
        >>> water = gmoe.merge(model, z, pos)
        >>> energy = water(z, pos)
        >>> one_theory = gmoe.merge(model, system=system[:1])
    """
    check_module("model", model)
    merged = copy.deepcopy(model)
    layers: dict[Any, str] = {}
    for name, layer in merged.named_modules():
        if isinstance(layer, MoELayer):
            layers[layer] = name or "the model itself"
            _check_mergeable(layers[layer], layer)
    check(layers, "model", f"{type(model).__name__} without layers of experts", "some")

    # 1. See what is decided.
    told = {} if args else decided_from(merged, kwargs)
    if told:
        decisions = {layer: [told[layer.router]] for layer in layers if layer.router in told}
    else:
        _check_call(merged, args, kwargs)
        decisions = {layer: [] for layer in layers}
        for layer, found in decisions.items():
            layer.router.register_forward_hook(partial(_record, found))
        # A model may differentiate itself, for forces.
        with evaluating(merged), torch.enable_grad():
            merged(*args, **kwargs)

    # 2. Put the mixture in the place of each layer.
    new: dict[MoELayer, nn.Module] = {}
    for layer, name in layers.items():
        weight_1E = _only(decisions.get(layer, []), name)
        is_one = int(weight_1E.count_nonzero()) == 1 and float(weight_1E.sum()) == 1
        is_mixed = isinstance(layer.experts, MixedWeights)
        got = f"{name}, which mixes or scales the outputs of experts"
        check(is_one or is_mixed, "model", got, "one expert, or mix='weights'")
        is_conv = not isinstance(layer, MoE)
        expert = int(weight_1E.argmax())
        new[layer] = layer.experts.expert(expert) if is_conv else _dense_of(name, layer, weight_1E)
    dense: nn.Module = with_modules(merged, new)
    take_apart(dense)
    detach(dense)
    return dense


def _check_mergeable(name: str, layer: MoELayer) -> None:
    """Refuse a layer that no dense one equals, or whose router is not its own."""
    is_beside = getattr(layer, "shared_expert", None) is not None
    check(not is_beside, "model", f"{name}, experts beside a shared one", "start='copies'")
    is_known = layer.replaced or isinstance(_stacked(layer), LinearExperts)
    is_known = is_known or hasattr(layer.experts, "expert")
    got = f"{name}, a {type(layer).__name__} with {type(layer.experts).__name__}"
    legal = "a layer that gmoe.moefy made, whose dense class is known, or LinearExperts"
    check(is_known and not isinstance(layer, SoftMoE), "model", got, legal)
    got = f"{name}, a {type(layer).__name__} without a router of its own"
    check(layer.router is not None, "model", got, "one: a dense layer takes no routing=")
    if layer.as_built is not None:
        layer.as_built.check(layer, name, "change the dense model that merge gives")
    legal = "a layer as it was built, since the dense one is made of its weights alone"
    for part in [layer, layer.router, *layer.experts.modules()]:
        change = change_of(part)
        check(change is None, "model", f"{name}, a {type(part).__name__} with {change}", legal)


def _check_call(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Refuse a call that is neither whole nor what the routers read."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        got = f"a call of {type(model).__name__} with {', '.join(kwargs) or 'nothing'} ({error})"
        raise ValueError(
            f"model: got {got}, expected a whole one, or by name what its routers read"
        ) from error


def _record(found: list[Tensor], _: nn.Module, __: object, routing: Routing) -> None:
    """Add (G, E) the weights of a decision, as a hook of a router."""
    decided = routing if routing.by_group is None else routing.by_group.routing
    found.append(decided.to_dense().detach())


def _only(weights: list[Tensor], name: str) -> Tensor:
    """(1, E) the one decision of all calls and groups.

    Raises:
        ValueError: none, or several.
    """
    rows_GE = torch.cat(weights) if weights else torch.empty(0, 1)
    legal = "one: give the arguments of a call that runs it"
    check(len(rows_GE), "model", f"no decision in {name}", legal)
    got = f"{len(rows_GE.unique(dim=0))} decisions in {name}"
    legal = "one for all: call it with a single graph, or with several of one composition"
    check(torch.allclose(rows_GE, rows_GE[:1], rtol=1e-6, atol=1e-9), "model", got, legal)
    return rows_GE[:1]


@torch.no_grad()
def _dense_of(name: str, layer: MoELayer, weight_1E: Tensor) -> nn.Module:
    """The dense module that experts replaced, with their mixture as its weights."""
    experts = _stacked(layer)
    if layer.replaced:
        (dense,) = copy.deepcopy(layer.replaced)
    else:
        has_bias = experts.bias is not None
        dense = nn.Linear(experts.in_features, experts.out_features, has_bias, device="meta")
    mixed = {
        path: {key: mixture(getattr(stack, key), weight_1E)[0] for key in stack.names}
        for path, stack in stacks_in(experts)
    }
    form: Any = form_of_class(dense)
    form.take(name, mixed)
    dense.train(experts.training)
    return dense.requires_grad_(any(value.requires_grad for value in experts.parameters()))


def _stacked(layer: MoELayer) -> Any:
    """The experts of a layer, which may mix their weights."""
    is_mixed = isinstance(layer.experts, MixedWeights)
    return layer.experts.stacked if is_mixed else layer.experts
