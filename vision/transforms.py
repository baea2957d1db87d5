"""timm's transforms and its mixup, as a recipe says. S is the height and width that models see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

from PIL import Image, ImageOps
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torchvision import transforms

from vision.recipe import Recipe

AugmentKind: TypeAlias = Literal["none", "standard"]
Transform: TypeAlias = Callable[[Any], Tensor]
"""Of a PIL image, or of a float tensor (C, H, W): a normalized tensor (C, S, S)."""


def train_transform(
    kind: AugmentKind, size: int, recipe: Recipe, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """timm's for training; without ``scale``, images are resized to S, and their center is taken.

    Args:
        kind: ``"standard"``: without ``scale``, a crop after padding by S // 8, and a flip.
        size: S.
        recipe: what else is done.
        mean, std: of the channels, of values in 0..1.

    Raises:
        ValueError: a policy ``aa`` that timm does not read.
    """
    try:
        crop, color, finish = create_transform(
            size,
            is_training=True,
            scale=recipe.scale,
            color_jitter=None,  # type: ignore[arg-type]
            auto_augment=recipe.aa,
            interpolation=recipe.interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=recipe.reprob,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as error:
        legal = "a policy of timm, such as rand-m9-mstd0.5-inc1"
        raise ValueError(f"aa: got {recipe.aa!r} ({error}), expected {legal}") from error
    for policy in color.transforms:
        mend_posterize(policy)
    if recipe.scale is None:
        mode = transforms.InterpolationMode(recipe.interpolation)
        steps = [transforms.Resize(size, mode), transforms.CenterCrop(size)]
        if kind == "standard":
            steps += [
                transforms.RandomCrop(size, padding=size // 8),
                transforms.RandomHorizontalFlip(),
            ]
        crop = transforms.Compose(steps)
    whole: Transform = transforms.Compose([crop, color, finish])
    return whole


def eval_transform(
    size: int, recipe: Recipe, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """timm's for evaluation."""
    made: Transform = create_transform(
        size,
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        mean=tuple(mean),
        std=tuple(std),
    )
    return made


def mend_posterize(policy: Any) -> None:
    """Have a policy of timm posterize to 0 bits, which is black: newer Pillows refuse it."""
    is_auto = isinstance(policy, auto_augment.AutoAugment)
    for operation in chain.from_iterable(policy.policy if is_auto else [policy.ops]):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, of 0 bits too."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix of a batch, whose classes become probabilities.

    Labels are smoothed by the loss.
    """
    if not recipe.mixes():
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes)
