"""Which expert takes which patch of an image. Shapes: B images, C channels, G patches a side, E experts."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

from gmoe.routing import Routing

DISTINCT = (
    "1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf",
)  # fmt: skip
"""Colors that are easy to tell apart, as six hexadecimal digits each (Tableau's ten)."""


def palette(num_experts: int) -> Tensor:
    """(E, 3) a color an expert, in 0..1: ten that are easy to tell apart, or hues at equal distances."""
    if num_experts <= len(DISTINCT):
        rows = [[int(code[place : place + 2], 16) / 255 for place in (0, 2, 4)] for code in DISTINCT[:num_experts]]
    else:
        rows = [list(colorsys.hsv_to_rgb(number / num_experts, 0.9, 0.9)) for number in range(num_experts)]
    return torch.tensor(rows).view(num_experts, 3)


def patch_weights(routing: Routing, num_images: int) -> Tensor:
    """(B, G, G, E) the weight of every expert on every patch; 0 where it did not take it.

    Args:
        routing: of one layer of a ViT, whose tokens are image by image the class token and the patches, row by row.
        num_images: B.

    Raises:
        ValueError: the tokens are not those of so many images with square grids of patches.
    """
    tokens, rest = divmod(routing.num_tokens, max(num_images, 1))
    side = round(max(tokens - 1, 0) ** 0.5)
    if num_images < 1 or rest or side < 1 or side * side + 1 != tokens:
        raise ValueError(
            f"routing: got {routing.num_tokens} tokens of {num_images} images, expected for each a class token and a "
            "square grid of patches"
        )
    dense_TE = routing.to_dense().detach().float()
    return dense_TE.view(num_images, tokens, -1)[:, 1:].reshape(num_images, side, side, routing.num_experts)


def tint(images: Tensor, weight_BGGE: Tensor, colors_E3: Tensor, strength: float = 0.6) -> Tensor:
    """(B, 3, H, W) the images with every patch tinted by its experts.

    A patch of several experts has the mean of their colors, by weight; one that no expert took is darkened.

    Args:
        images: (B, 3 or 1, H, W) in 0..1.
        weight_BGGE: see :func:`patch_weights`; G divides H and W.
        colors_E3: see :func:`palette`.
        strength: share of the color, in [0, 1] (default 0.6).

    Raises:
        ValueError: a strength out of range, or a grid that does not divide the images.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength}, expected a number in [0, 1]")
    grid = weight_BGGE.size(1)
    if images.size(2) % grid or images.size(3) % grid:
        raise ValueError(f"weight_BGGE: got {grid} patches a side, expected a divisor of {tuple(images.shape[2:])}")
    total = weight_BGGE.sum(dim=-1, keepdim=True)
    share = weight_BGGE / total.clamp(min=torch.finfo(total.dtype).tiny)
    color = (share @ colors_E3.to(share)).permute(0, 3, 1, 2)
    color = color.repeat_interleave(images.size(2) // grid, dim=2).repeat_interleave(images.size(3) // grid, dim=3)
    return (1 - strength) * images.expand(-1, 3, -1, -1) + strength * color


def crop_patches(images: Tensor, image: Tensor, patch: Tensor, grid: int) -> Tensor:
    """(n, C, h, w) some patches.

    Args:
        images: (B, C, H, W).
        image: (n,) of which image.
        patch: (n,) which patch of it, row by row.
        grid: G, patches a side.
    """
    height, width = images.size(2) // grid, images.size(3) // grid
    cut = images.unfold(2, height, height).unfold(3, width, width)  # (B, C, G, G, h, w)
    return cut[image, :, patch // grid, patch % grid]
