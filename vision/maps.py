"""Which expert takes which patch: of photos, and expert by expert.

Shapes: B images of C channels, S height and width of what models see, h x w patches, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

from gmoe.plot import expert_maps
from vision.data import read
from vision.recipe import Recipe
from vision.transforms import eval_transform

ROWS = 12
"""Images a page of maps."""
STRIP = 16
"""Patches that are shown of an expert."""


def photos(
    paths: Sequence[Path], size: int, recipe: Recipe, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(B, C, S, S) images of any size and shape, as a model sees them; gray ones for C = 1.

    Raises:
        ValueError: a file that is no image, by its name.
    """
    transform = eval_transform(size, recipe, mean, std)
    mode = "L" if len(mean) == 1 else "RGB"
    return torch.stack([transform(read(str(path), size).convert(mode)) for path in paths])


def pages(
    model: nn.Module,
    images: Tensor,
    titles: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[Figure]:
    """The images, each in a row of the blocks' maps, twelve a page."""
    for begin in range(0, len(images), ROWS):
        rows = slice(begin, begin + ROWS)
        yield expert_maps(model, images[rows], mean=mean, std=std, titles=titles[rows])


def expert_patches(
    images: Tensor,
    weights: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    most: int = STRIP,
) -> list[Figure]:
    """For each MoE layer, patches that each expert takes: a row an expert.

    Of the patches whose largest weight is the expert's, every n-th, so that they are neither the
    best nor the first ones.

    Args:
        images: (B, C, S, S), normalized.
        weights: of each layer, (B, h, w, E), as :func:`gmoe.plot.patch_weights` has them.
        mean, std: of the channels.
        most: patches of an expert.
    """
    shape = (1, -1, 1, 1)
    shown = images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    shown = shown.clamp(0, 1).expand(-1, 3, -1, -1)
    figures = []
    for layer, weight_BhwE in enumerate(weights, start=1):
        _, h, w, num_experts = weight_BhwE.shape
        height, width = images.size(2) // h, images.size(3) // w
        cells = shown[:, :, : h * height, : w * width].unflatten(3, (w, width))
        patch_Bhw = cells.unflatten(2, (h, height)).permute(0, 2, 4, 1, 3, 5)
        top_Bhw = weight_BhwE.argmax(dim=-1).where(weight_BhwE.sum(dim=-1) > 0, num_experts)
        strips = torch.ones(num_experts, most, 3, height, width)
        for expert in range(num_experts):
            taken = (top_Bhw == expert).nonzero()
            number = min(most, len(taken))
            chosen = torch.linspace(0, max(len(taken) - 1, 0), number).round().long()
            strips[expert, :number] = patch_Bhw[taken[chosen].unbind(dim=1)]
        figures.append(_strips(strips, layer))
    return figures


def _strips(strips: Tensor, layer: int) -> Figure:
    """(E, n, 3, height, width) patches, with a gap around them."""
    num_experts, number, _, height, _ = strips.shape
    gap = max(1, height // 8)
    whole = make_grid(strips.flatten(0, 1), nrow=number, padding=gap, pad_value=1)
    figure = Figure(figsize=(0.3 * number + 0.8, 0.3 * num_experts + 0.5), layout="constrained")
    axis = figure.subplots()
    axis.imshow(whole.permute(1, 2, 0).numpy(), interpolation="nearest")
    places = [gap + expert * (height + gap) + height / 2 for expert in range(num_experts)]
    axis.set(xticks=[], yticks=places, yticklabels=[str(expert) for expert in range(num_experts)])
    axis.set_title(f"MoE layer {layer}: patches by expert", fontsize="medium")
    for side in axis.spines.values():
        side.set_visible(False)
    return figure
