"""Merge the experts of layers into one dense layer, for one decision.

Shapes: E experts, G groups, I in and O out features.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._calls import evaluating, with_modules
from gmoe._checks import change_of, check, check_module
from gmoe.experts import LinearExperts, MLPExperts, run_mlp
from gmoe.mixed import MixedWeights, mixture
from gmoe.moe import MoE, MoELayer, SoftMoE
from gmoe.recorded import AsBuilt
from gmoe.routers.from_call import decided_from, detach
from gmoe.routing import Routing


def merge(model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    r"""Return the plain dense model of one molecule, composition, or source.

    .. math:: W = \sum_e w_e W_e

    In layers that mix weights (:class:`gmoe.mixed.MixedWeights`) all tokens of a group run the
    same mixture: where every group has the same decision, as in a simulation of one molecule, the
    mixture is made once, and the model has neither experts nor routers, nor their cost. So it is in
    layers by type where all tokens have one type. For what has that decision it equals the model,
    up to rounding; for others merge again. A linear layer becomes ``nn.Linear``, an MLP a module of
    two of them, and a :class:`MoEConv` the conv of its expert.

    Args:
        model: any model whose layers with experts all have one decision, from :func:`moefy` or your
            own. It stays as it is.
        *args: a call of the model, which is made once, in evaluation.
        **kwargs: likewise; or by themselves the arguments that its routers read, for one group:
            nothing is called then.

    Returns:
        A dense copy of the model.

    Raises:
        ValueError: a layer that has no router, or that runs beside a shared expert; tokens of
            different decisions, or outputs of several experts; neither a whole call nor one value
            of each argument that routers read.

    Example:
        >>> water = gmoe.merge(model, z, pos)
        >>> energy = water(z, pos)
        >>> one_theory = gmoe.merge(model, system=system[:1])
    """
    check_module("model", model)
    merged = copy.deepcopy(model)
    layers: dict[MoELayer, str] = {}
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
        with _recorded(layers) as decisions, evaluating(merged):
            merged(*args, **kwargs)

    # 2. Put the mixture in the place of each layer.
    new: dict[MoELayer, nn.Module] = {}
    for layer, name in layers.items():
        weight_1E = _only(decisions.get(layer, []), name)
        is_mixed = isinstance(layer.experts, MixedWeights)
        # A conv has no weight of its own that could be scaled.
        is_conv = not isinstance(layer, MoE)
        got = f"{name}, which mixes or scales the outputs of experts"
        is_one = is_mixed or int(weight_1E.count_nonzero()) == 1
        is_one = is_one and (not is_conv or float(weight_1E.sum()) == 1)
        check(is_one, "model", got, "one expert, or mix='weights'")
        stacked: Any = layer.experts.stacked if is_mixed else layer.experts
        expert = int(weight_1E.argmax())
        new[layer] = stacked.expert(expert) if is_conv else dense_of(stacked, weight_1E)
    dense: nn.Module = with_modules(merged, new)
    detach(dense)
    return dense


def _check_mergeable(name: str, layer: MoELayer) -> None:
    """Refuse a layer that no dense one equals, or whose router is not its own."""
    experts = layer.experts
    is_mergeable = isinstance(experts, MixedWeights | LinearExperts | MLPExperts)
    is_mergeable = (is_mergeable or hasattr(experts, "expert")) and not isinstance(layer, SoftMoE)
    got = f"{name}, a {type(layer).__name__} with {type(experts).__name__}"
    check(is_mergeable, "model", got, "a MoE or MoEConv of linear layers, MLPs or convs")
    got = f"{name}, a {type(layer).__name__} without a router of its own"
    check(layer.router is not None, "model", got, "one: a dense layer takes no routing=")
    is_beside = getattr(layer, "shared_expert", None) is not None
    check(not is_beside, "model", f"{name}, experts beside a shared one", "start='copies'")
    legal = "a layer as it was built, since the dense one is made of its weights alone"
    is_same = layer.as_built is None or AsBuilt.of(layer).parts == layer.as_built.parts
    check(is_same, "model", f"{name} with another part in place of one", legal)
    for part in [layer, layer.router, *experts.modules()]:
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


@contextmanager
def _recorded(layers: Collection[MoELayer]) -> Iterator[dict[MoELayer, list[Tensor]]]:
    """For each layer, (G, E) the weights of each of its calls inside the block."""
    found: dict[MoELayer, list[Tensor]] = {layer: [] for layer in layers}

    def record(layer: MoELayer, routing: Routing) -> None:
        decided = routing if routing.by_group is None else routing.by_group.routing
        found[layer].append(decided.to_dense())

    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args, of=layer: record(of, args[1]))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


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


# the dense modules --------------------------------------------------------------------------------


def dense_of(experts: Any, weight_1E: Tensor) -> nn.Module:
    """The dense module that the mixture of stacked experts is."""
    is_linear = isinstance(experts, LinearExperts)
    return linear_of(experts, weight_1E) if is_linear else MLP(experts, weight_1E)


@torch.no_grad()
def linear_of(experts: LinearExperts, weight_1E: Tensor) -> nn.Linear:
    """The mixture of stacked linear layers."""
    linear: Any = nn.Linear(experts.in_features, experts.out_features, device="meta")
    linear.weight = nn.Parameter(mixture(experts.weight, weight_1E)[0])
    bias = experts.bias
    linear.bias = None if bias is None else nn.Parameter(mixture(bias, weight_1E)[0])
    linear.train(experts.training)
    return linear.requires_grad_(any(value.requires_grad for value in experts.parameters()))


class MLP(nn.Module):
    """The mixture of :class:`MLPExperts`, with ``nn.Linear`` layers.

    Args:
        experts: the experts.
        weight_1E: (1, E) the weight of each.

    Shapes:
        (..., I) to (..., O).
    """

    def __init__(self, experts: MLPExperts, weight_1E: Tensor) -> None:
        super().__init__()
        self.up = linear_of(experts.up, weight_1E)
        self.down = linear_of(experts.down, weight_1E)
        self.glu = experts.glu
        self.activation = copy.deepcopy(experts.activation)
        self.input_norm = copy.deepcopy(experts.input_norm)
        self.hidden_norm = copy.deepcopy(experts.hidden_norm)
        self.hidden_dropout = nn.Dropout(experts.hidden_dropout.p)
        self.output_dropout = nn.Dropout(experts.output_dropout.p)
        self.train(experts.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run it; see the class."""
        return run_mlp(self, x)
