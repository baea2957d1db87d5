"""Independent experts, as the definition of those that share a base."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from gmoe.stack import BASE, DIFFERENCE, stacks_in

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold(model: Model) -> Model:
    """Add each base to its differences, in place: nothing is shared any more."""
    stack: Any
    for _, stack in stacks_in(model):
        for name in stack.names_with_base:
            tensors = getattr(stack, name)
            delattr(stack, name + BASE)
            delattr(stack, name + DIFFERENCE)
            stack.register_parameter(name, nn.Parameter(tensors))
        stack.names_with_base = []
    return model
