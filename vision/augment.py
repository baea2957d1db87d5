"""Augmentation by torchvision.transforms.v2, and normalization. Shapes: B images, C classes, S height and width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms import v2

Channels = tuple[float, ...]
"""A number a channel."""

AugmentKind = Literal["none", "standard", "randaugment"]

Augment = Callable[[Tensor], Tensor]
"""Of one image, (3, S, S) uint8; random by torch's own generator only."""

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a batch: (images, labels) to (images, soft labels)."""

RESIZED_FROM = 64
"""Image size from which the standard augmentation is a random resized crop."""


def make_augment(kind: AugmentKind, image_size: int) -> Augment | None:
    """What is done to each training image.

    v2 draws its random numbers once a call, so that images of one tensor would all be changed alike: call it per image.

    Args:
        kind: ``"none"``; ``"standard"``: a crop after padding by S // 8 (from 64 pixels on a crop of 35 to 100 % of the
            area, resized), and a horizontal flip; ``"randaugment"``: the same, then RandAugment (Cubuk et al., 2020;
            two operations of magnitude 9, torchvision's defaults).
        image_size: S.

    Returns:
        (3, S, S) uint8 to the same, picklable; ``None`` for ``"none"``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(AugmentKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(get_args(AugmentKind))}")
    if kind == "none":
        return None
    crop: v2.Transform
    if image_size >= RESIZED_FROM:
        crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True)
    else:
        crop = v2.RandomCrop(image_size, padding=image_size // 8)
    steps = [crop, v2.RandomHorizontalFlip()]
    if kind == "randaugment":
        steps.append(v2.RandAugment())
    return v2.Compose(steps)


def make_mix(mixup: float, cutmix: float, num_classes: int) -> Mix | None:
    """Mixup (Zhang et al., 2018), CutMix (Yun et al., 2019), or for each batch one of the two by a fair coin.

    Args:
        mixup: alpha of mixup's Beta(alpha, alpha); 0 leaves it out.
        cutmix: the same of CutMix.
        num_classes: C.

    Returns:
        of (images (B, 3, S, S) float, labels (B,) int64): the mixed images, and (B, C) float labels whose rows sum
        to 1; ``None`` where both are 0.

    Raises:
        ValueError: an alpha below 0.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"{name}: got {alpha}, expected a number of at least 0")
    mixes: list[Mix] = []
    if mixup:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0] if mixes else None


def normalize(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """(B, C, S, S) to float32: uint8 scaled to 0..1, floats as they are; less ``mean``, by ``std``, per channel."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
