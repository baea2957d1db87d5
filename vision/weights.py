"""Weights in training: how fast each part learns, and their average."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check
from vision.recipe import Recipe

BLOCK = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.")
EMBEDDING = re.compile(r"class_token|conv_proj\.|encoder\.pos_embedding")
"""Names of torchvision's ViT, and so of ``gmoe.ViTMoE``."""


def lr_factors(
    model: nn.Module, recipe: Recipe, *, are_all_needed: bool = True
) -> dict[str, float]:
    r"""By what the learning rate of each parameter is multiplied; 0 freezes it.

    With decay by layer :math:`d`, parameters of layer :math:`l` of :math:`0 \ldots L` have
    :math:`d^{L - l}` (Bao et al., 2022, https://arxiv.org/abs/2106.08254): 0 are the embeddings, 1
    to L - 1 the blocks with their experts and routers, L the head. As timm has it, the norm before
    the head belongs to the last block.

    Args:
        model: timm's, whose own layers count; or torchvision's ViT.
        recipe: ``layer_decay`` and ``lr_scale``.
        are_all_needed: whether a pattern of ``lr_scale`` that no parameter has is refused; a dense
            model has no experts, of which a pattern may be (default ``True``).

    Returns:
        factors by name of the parameter; empty if all are 1.

    Raises:
        ValueError: another model with ``layer_decay``, a pattern that no parameter has, or patterns
            that freeze all.
    """
    names = [name for name, _ in model.named_parameters()]
    factors = dict.fromkeys(names, 1.0)
    if recipe.layer_decay is not None:
        layers = layers_of(model)
        last = max(layers.values())
        factors = {name: recipe.layer_decay ** (last - layers[name]) for name in names}
    for pattern, factor in recipe.factors():
        found = [name for name in names if fnmatchcase(name, pattern)]
        legal = f"a pattern of names of parameters, such as {names[-1]}"
        check(found or not are_all_needed, "lr_scale", repr(pattern), legal)
        factors |= {name: factor * factors[name] for name in found}
    check(any(factors.values()), "lr_scale", " ".join(recipe.lr_scale), "parameters that train")
    return {} if set(factors.values()) == {1.0} else factors


def layers_of(model: Any) -> dict[str, int]:
    """The number of the layer of each parameter of a model, the embeddings' first."""
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        layers: dict[str, int] = group_parameters(
            model, model.group_matcher(coarse=False), reverse=True
        )
        return layers
    names = [name for name, _ in model.named_parameters()]
    layers = {name: int(found[1]) + 1 for name in names if (found := BLOCK.match(name))}
    legal = "a ViT of torchvision, or a model of timm"
    check(layers, "layer_decay", f"a {type(model).__name__}", legal)
    last = max(layers.values())
    for name in names:
        if EMBEDDING.match(name):
            layers[name] = 0
        elif name not in layers:
            layers[name] = last if name.startswith("encoder.ln.") else last + 1
    return layers


class WeightAverage:
    r"""The exponential moving average of a model's weights and buffers.

    :math:`a \leftarrow d \, a + (1 - d) \, w` after each step, from the initial weights on; whole
    numbers, such as counters, are copied.

    Args:
        model: whose weights these are.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = weights_of(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average toward the weights."""
        state = model.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in floats],
            [state[name] for name in floats],
            weight=1 - self.decay,
        )
        for name in state.keys() - set(floats):
            self.weights[name].copy_(state[name])

    @contextmanager
    def given_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the average for a while."""
        own = weights_of(model)
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(own)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
