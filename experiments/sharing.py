"""What copies of one layer may have in common while they train: pooled gradients, or a base and differences from it.

Parts of a study, not of the library. Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gmoe


def stacked_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The (E, ...) parameters of a model's experts, each with the module that holds it and its name there."""
    for layer in list(model.modules()):
        if isinstance(layer, gmoe.MoELayer):
            experts = layer.get_submodule("experts")
            for module in list(experts.modules()):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    yield module, name, parameter


def share_among_copies(model: nn.Module, sharing: Literal["pooled", "difference"]) -> None:
    """Let the experts of all layers, which are copies of one, learn from each other's tokens.

    ``pooled``: an expert's gradient is its own plus the sum of all experts'. ``difference``: its weights are a base,
    which the tokens of all experts train, and a difference that starts at zero. Under plain gradient descent the two
    are the same; under Adam they are not.
    """
    for module, name, parameter in stacked_parameters(model):
        if sharing == "pooled":
            parameter.register_hook(pooled)
            continue
        base = parameter.detach()[:1].clone()
        with torch.no_grad():
            parameter.zero_()
        parametrize.register_parametrization(module, name, FromBase(base), unsafe=True)


def pooled(gradient: Tensor) -> Tensor:
    """Each expert's gradient and the sum of all."""
    return gradient + gradient.sum(dim=0, keepdim=True)


class FromBase(nn.Module):
    """(E, ...) weights as a base (1, ...) and differences (E, ...)."""

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(base)

    def forward(self, difference: Tensor) -> Tensor:
        return self.base + difference
