"""Merge the experts of layers that mix weights into one dense layer, for one decision.

Shapes: E experts, G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._calls import Batch, outputs_of
from gmoe._checks import check_module
from gmoe.dense import densify
from gmoe.layer_groups import Group, groups_of, named
from gmoe.mixed_weights import mixture
from gmoe.pruning import check_routers
from gmoe.routing import Routing
from gmoe.stack import become, paths_in, stacks_in


def merge(model: nn.Module, graph: Batch) -> nn.Module:
    r"""Return the plain dense model of one graph, composition or image, with the weights mixed.

    .. math:: W = \sum_e w_e W_e

    In layers with ``mix="weights"`` all tokens of a group run the same mixture: where every group
    has the same decision, as in a simulation of one molecule, the mixture is made once, and the
    model has neither experts nor routers, nor their cost. On that graph it equals the model, up to
    rounding; for graphs with other decisions merge again. A conv becomes PyG's conv, a linear layer
    ``nn.Linear``, and an MLP the module that :func:`densify` gives.

    Args:
        model: any model in which all layers with experts mix weights, from :func:`moefy`,
            :class:`GNNMoE`, :class:`ViTMoE` or your own. It stays as it is.
        graph: what the model is called with: a tensor, a tuple of arguments, or a dictionary of
            arguments by name. The model runs on it once, in evaluation.

    Returns:
        A dense copy of the model.

    Raises:
        ValueError: a layer that mixes outputs, or that has no router; a graph whose groups have
            different decisions; a layer that no dense one equals: an MLP beside a shared one,
            weights that need not sum to 1.

    Example:
        >>> water = gmoe.merge(model, {"z": z, "pos": pos})
        >>> energy = water(z, pos)
    """
    check_module("model", model)
    merged = copy.deepcopy(model)
    groups = groups_of(merged)
    if not groups:
        raise ValueError(
            f"model: got {type(model).__name__} without layers of experts, expected some"
        )
    check_routers(groups)
    for group in groups:
        for name, layer in group.layers.items():
            if layer.mix != "weights":
                raise ValueError(
                    f"model: got {named([name])}, which mixes outputs, expected mix='weights'; a "
                    "layer whose experts are equal is folded by gmoe.densify"
                )

    # 1. Run the model, to see what is decided.
    with _recording(groups) as decisions:
        outputs_of(merged, [graph], "graph")

    # 2. Make all experts of a layer their mixture: of equal experts, densify makes one.
    for group, weights in zip(groups, decisions, strict=True):
        weight_1E = _only(weights, group)
        for layer in group.layers.values():
            _become_mixture(layer.experts, weight_1E)
    dense = densify(merged)
    for folded in dense.layers:
        if not folded.is_dense:
            raise ValueError(
                f"model: got {named(folded.names)}, {folded.reason}, expected layers that a dense "
                "one equals"
            )
    return dense.model


@contextmanager
def _recording(groups: Sequence[Group]) -> Iterator[list[list[Tensor]]]:
    """Record the decisions of each router inside the block: (G, E) the weights of each call."""
    decisions: list[list[Tensor]] = [[] for _ in groups]

    def record(found: list[Tensor], router: nn.Module, args: Any, routing: Routing) -> None:
        if routing.by_group is not None:
            found.append(routing.by_group.weight_GE)

    hooks = [
        group.router.register_forward_hook(partial(record, found))
        for group, found in zip(groups, decisions, strict=True)
        if group.router is not None
    ]
    try:
        yield decisions
    finally:
        for hook in hooks:
            hook.remove()


def _only(weights: Sequence[Tensor], group: Group) -> Tensor:
    """(1, E) the one decision of all calls and groups.

    Raises:
        ValueError: none, or several.
    """
    rows_GE = torch.cat([*weights]) if weights else torch.empty(0, group.num_experts)
    if not len(rows_GE) or not torch.allclose(rows_GE, rows_GE[:1], rtol=1e-6, atol=1e-9):
        number = len(rows_GE.unique(dim=0))
        raise ValueError(
            f"graph: got {number} decisions in {named(group.layers)}, expected one for all: a "
            "single graph or image, or several of one composition"
        )
    return rows_GE[:1]


@torch.no_grad()
def _become_mixture(experts: nn.Module, weight_1E: Tensor) -> None:
    """Make each expert the weighted sum of all."""
    values = [
        mixture(getattr(stack, name), weight_1E)[0]
        for _, stack in stacks_in(experts)
        for name in stack.names
    ]
    become(experts, dict(zip(paths_in(experts), values, strict=True)))
