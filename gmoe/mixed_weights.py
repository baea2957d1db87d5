r"""Experts whose weights are mixed, not their outputs: a single product, by W_g of a group.

.. math:: y_t = f(x_t; W_{g(t)}), \qquad W_g = \sum_e w_{ge} W_e

Shapes: T tokens, E experts, G groups.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._autograd import autocasts
from gmoe._torch import shallow_copy
from gmoe.portable import refuse_in_export
from gmoe.routing import Routing
from gmoe.stack import Stack

Mix: TypeAlias = Literal["outputs", "weights"]
"""What a layer mixes: the outputs of K experts, or the weights of all."""


def mixed_by_group(experts: nn.Module, routing: Routing) -> tuple[Any, Routing]:
    """Mix the weights of experts for each group.

    Args:
        experts: E of them.
        routing: with a decision for each group.

    Returns:
        Experts of the same kind, one for each of G groups; and a routing of each token to the one
        of its group, with weight 1.

    Raises:
        ValueError: a decision for each token; experts with parts that cannot be mixed.
    """
    refuse_in_export(
        "mix='weights'",
        "mix='outputs', or the dense model that gmoe.merge gives: how many weights there are "
        "follows the data",
    )
    if routing.by_group is None:
        raise ValueError(
            "routing: got a decision for each token, expected one for each group with "
            "mix='weights': by router_input='graph', of images 'image', or by ByType with batch="
        )
    weight_GE, group_T = routing.by_group
    if not len(weight_GE):  # no tokens: a stack is of one at least
        weight_GE = nn.functional.pad(weight_GE, (0, 0, 0, 1))
    one_TK = weight_GE.new_ones(len(group_T), 1)
    of_group = Routing.from_choices(
        group_T[:, None], one_TK, num_experts=len(weight_GE), validate=False
    )
    return mixed(experts, weight_GE), of_group


def mixed(part: nn.Module, weight_GE: Tensor) -> Any:
    """Experts in which each stack holds G mixtures in place of E tensors.

    They are a shallow copy, with the hooks and options of the experts, which do not change: another
    thread may be running them.

    Raises:
        ValueError: as :func:`check_mixable`.
    """
    _check_part(part)
    copied = shallow_copy(part, partial(mixed, weight_GE=weight_GE))
    if isinstance(part, Stack):
        copied.num_experts = len(weight_GE)
        # Plain attributes are found before parameters and buffers are looked for.
        for name in part.names:
            copied.__dict__[name] = mixture(getattr(part, name), weight_GE)
    return copied


def mixture(value_E: Tensor, weight_GE: Tensor) -> Tensor:
    """(G, ...) the weighted sums of (E, ...) the experts' values, in their dtype."""
    # Under autocast, the values would be rounded before they are added.
    has_autocast = autocasts(value_E.device)
    with torch.autocast(value_E.device.type, enabled=False) if has_autocast else nullcontext():
        sum_G = weight_GE.to(value_E.dtype) @ value_E.flatten(1)
    return sum_G.view(len(weight_GE), *value_E.shape[1:])


def check_mixable(experts: nn.Module) -> None:
    """Refuse experts whose weights cannot be mixed: all have to be in stacks, as they were built.

    Raises:
        ValueError: the part of another kind, by its class.
    """
    for part in experts.modules():
        _check_part(part)


def _check_part(part: nn.Module) -> None:
    """Refuse a part whose own tensors cannot be mixed; see :func:`check_mixable`."""
    if isinstance(part, Stack):
        part.check_stored()
        if part.can_be_mixed:
            return
    elif next(part.parameters(recurse=False), None) is None:
        return
    raise ValueError(
        f"mix: got 'weights' with experts that hold a {type(part).__name__}, expected stacked "
        "linear layers as they were built, or mix='outputs'"
    )
