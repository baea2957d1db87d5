"""One mixture of the experts' weights for each group of tokens, such as a molecule.

Shapes: E experts, G groups of tokens, T tokens, I in and O out features, P pairs.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._autograd import autocasts
from gmoe._torch import shallow_copy
from gmoe.experts import Experts
from gmoe.portable import refuse_in_export
from gmoe.routing import Routing
from gmoe.stack import Stack, check_part, check_stacked

Mix: TypeAlias = Literal["outputs", "weights"]
"""What layers mix: the outputs of K experts, or the weights of all."""


class MixedWeights(Experts):
    r"""Run each group of tokens, such as a molecule, through one mixture of the experts' weights.

    .. math:: y_t = f(x_t; W_{g(t)}), \qquad W_g = \sum_e w_{ge} W_e

    This is the mixture of linear experts of `UMA <https://arxiv.org/abs/2506.23971>`_ (Wood et al.,
    2025). It costs what one expert costs, all experts learn from every token, and nothing has to be
    balanced. The decision has to be one for each group: from :class:`gmoe.routers.ByType` or
    :class:`gmoe.routers.FromInput`, with ``batch=`` or of images (B, ..., I), or by
    :meth:`gmoe.Routing.expand`.

    Args:
        experts: :class:`gmoe.LinearExperts` or :class:`gmoe.MLPExperts`, as they were built.

    Shapes:
        (T, I) and a :class:`gmoe.Routing` to (T, O).

    Raises:
        ValueError: experts that hold anything but stacked linear layers; in a call, a decision for
            each token.

    Example:
        >>> layer = MoE(None, MixedWeights(LinearExperts(16, 16, num_experts=4)))
        >>> sources = router(embedding(source))  # a decision for each molecule
        >>> out = layer(x, routing=sources.expand(batch))
    """

    can_shrink = False

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts.in_features, experts.out_features, num_experts=experts.num_experts)
        check_stacked(experts)
        self.stacked = experts

    def reset_parameters(self) -> None:
        self.stacked.reset_parameters()

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        raise ValueError("routing: got rows of each expert, expected a Routing: weights are mixed")

    def forward(self, x: Tensor, routing: Routing | Tensor) -> Tensor:
        """Mix the weights of each group, and run its tokens; see the class."""
        if isinstance(routing, Tensor):
            return self.rows(x, routing)
        refuse_in_export(
            "mix='weights'",
            "mix='outputs', or the dense model that gmoe.merge gives: how many weights there are "
            "follows the data",
        )
        if routing.by_group is None:
            raise ValueError(
                "routing: got a decision for each token, expected one for each group to mix "
                "weights by: from ByType or FromInput with batch=, or by Routing.expand"
            )
        weight_GE, rows = routing.by_group.routing.to_dense(), routing.by_group.rows
        if not weight_GE.size(0):  # no tokens: a stack is of one at least
            weight_GE = nn.functional.pad(weight_GE, (0, 0, 0, 1))
        # The rows of each group, by the one expert that its mixture is.
        mixed = _mixed(self.stacked, weight_GE)
        return rows.taken(mixed(rows.filled(x), rows.offsets_G))


def _mixed(part: nn.Module, weight_GE: Tensor) -> Any:
    """Experts in which each stack holds G mixtures in place of E tensors.

    They are a shallow copy, with the hooks and options of the experts, which do not change: another
    thread may be running them.
    """
    check_part(part)
    copied = shallow_copy(part, partial(_mixed, weight_GE=weight_GE))
    if isinstance(part, Stack):
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
    return sum_G.view(weight_GE.size(0), *value_E.shape[1:])
