"""What is done to an image of the training set, and to a batch of them.

All of it is random by seeds that it is given. Shapes: C channels, S height and width of what models
see, B images of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from gmoe._checks import check
from vision.recipe import Recipe
from vision.sources import ImageSource, View

AugmentKind: TypeAlias = Literal["none", "standard"]
RESIZED_FROM = 64
"""Image size from which the standard augmentation is a random resized crop."""
SCALE = (0.35, 1.0)
"""Share of the area that the standard augmentation crops, from that size on."""
ERASED = (0.02, 1 / 3)
"""Share of the area that random erasing takes, as in timm."""


@dataclass(frozen=True, eq=False)
class Augment:
    """What is done to each image of the training set.

    Call it for each image: torchvision's transforms draw their random numbers once a call, and
    would change all images of a tensor alike.

    Args:
        view: how an image becomes a square, where no crop of the original makes one.
        change: crops, flips and colors; of a tensor, or of PIL's image.
        erase: of the normalized image, (C, S, S) (default ``None``: nothing is erased).
        least: pixels a side of the original that the smallest crop needs; 0: it is not wanted.
        draws_outside_torch: whether Python's and NumPy's generators are drawn from, too.
    """

    view: View
    change: Callable[[Any], Any]
    erase: Callable[[Tensor], Tensor] | None = None
    least: int = 0
    draws_outside_torch: bool = False

    def images(self, source: ImageSource, rows: Tensor) -> Iterator[Tensor | Image.Image]:
        """The images that are changed, one by one."""
        if self.least:
            for number in rows.tolist():
                yield source.original(number, self.least)
        else:
            yield from source.get(rows, self.view)

    def __call__(
        self, source: ImageSource, rows: Tensor, seeds: Tensor, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(B, C, S, S) the images ``rows``, each changed by its seed.

        ``finish`` makes normalized floats of a changed image, before parts of it are erased.
        """
        made = []
        with generators_kept(self.draws_outside_torch):
            for image, seed in zip(self.images(source, rows), seeds.tolist(), strict=True):
                # Torch.manual_seed would seed GPUs as well
                torch.default_generator.manual_seed(seed)
                if self.draws_outside_torch:
                    random.seed(seed)
                    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm draws from it)
                changed = self.change(image)
                if not isinstance(changed, Tensor):
                    changed = v2.functional.pil_to_tensor(changed)
                finished = finish(changed)
                made.append(finished if self.erase is None else self.erase(finished))
        return torch.stack(made)


@contextmanager
def generators_kept(beside_torch: bool) -> Iterator[None]:
    """Leave the global generators as they were: torch's, and perhaps Python's and NumPy's."""
    states = (random.getstate(), np.random.get_state()) if beside_torch else None  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def make_augment(
    kind: AugmentKind, image_size: int, recipe: Recipe, mean: tuple[float, ...]
) -> Augment | None:
    """What is done to each training image; ``None`` for nothing.

    In timm's order: crop, flip, colors; then, of the normalized image, erasing.

    Args:
        kind: ``"none"``; ``"standard"``: a horizontal flip, and a crop after padding by S // 8 or,
            from 64 pixels on, of 35 to 100 % of the area, resized.
        image_size: S.
        recipe: with ``scale``, the crop is of the original image in place of the square; with
            ``aa``, colors and shapes are changed; with ``reprob``, rectangles are erased.
        mean: of the channels, in 0..1, with which what a rotation uncovers is filled.

    Raises:
        ValueError: a policy ``aa`` that timm does not read.
    """
    steps = list[Callable[[Any], Any]]()
    mode = v2.InterpolationMode(recipe.interpolation)
    if recipe.scale is not None:
        steps.append(v2.RandomResizedCrop(image_size, recipe.scale, interpolation=mode))
    elif kind == "standard" and image_size >= RESIZED_FROM:
        steps.append(v2.RandomResizedCrop(image_size, SCALE, interpolation=mode))
    elif kind == "standard":
        steps.append(v2.RandomCrop(image_size, padding=image_size // 8))
    if steps:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.aa is not None:
        steps.append(policy(recipe, image_size, mean))
    erase = None
    if recipe.reprob:
        erase = v2.RandomErasing(recipe.reprob, scale=ERASED, value="random")
    if not steps and erase is None:
        return None
    least = 0
    if recipe.scale is not None:  # a side of the smallest and flattest crop, 3 : 4
        least = round(image_size / (0.75 * recipe.scale[0]) ** 0.5)
    return Augment(
        view=View(image_size, interpolation=recipe.interpolation),
        change=Steps(steps),
        erase=erase,
        least=least,
        draws_outside_torch=recipe.aa is not None,
    )


@dataclass(frozen=True)
class Steps:
    """One transform after the other; as ``v2.Compose``, but of none, too."""

    steps: list[Callable[[Any], Any]]

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


def policy(recipe: Recipe, image_size: int, mean: tuple[float, ...]) -> Callable[[Any], Any]:
    """timm's RandAugment, AutoAugment or AugMix, with the options that timm's ``train.py`` gives.

    Of tensors too, which it knows as PIL's images.
    """
    from timm.data import auto_augment

    assert recipe.aa is not None
    options = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": getattr(Image.Resampling, recipe.interpolation.upper()),
    }
    kinds = {
        "rand": auto_augment.rand_augment_transform,
        "augmix": auto_augment.augment_and_mix_transform,
    }
    make = kinds.get(recipe.aa.partition("-")[0], auto_augment.auto_augment_transform)
    if recipe.aa.startswith("augmix"):
        options["translate_pct"] = 0.3
    try:
        change = make(recipe.aa, options)
    except (AssertionError, ValueError, KeyError) as error:
        legal = "a policy of timm, such as rand-m9-mstd0.5-inc1"
        check(False, "aa", f"{recipe.aa!r} ({error})", legal)
    groups = change.policy if isinstance(change, auto_augment.AutoAugment) else [change.ops]
    for operation in chain.from_iterable(groups):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return OfPil(change)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks Pillow for 0 bits, too: black, which newer ones refuse."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


@dataclass(frozen=True)
class OfPil:
    """A transform of PIL's images, of tensors too."""

    change: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Any) -> Image.Image:
        if isinstance(image, Tensor):
            image = v2.functional.to_pil_image(image)
        return self.change(image)


def make_mix(recipe: Recipe, num_classes: int) -> v2.Transform | None:
    """Mixup, CutMix or at random one of both, of a batch (images, classes); ``None`` for neither.

    Classes become (B, num_classes) probabilities. Each image is mixed with its neighbor in the
    batch, the images of a batch alike.
    """
    mixes: list[v2.Transform] = []
    if recipe.mixup:
        mixes.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
    if recipe.cutmix:
        mixes.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
    if not mixes:
        return None
    return v2.RandomChoice(mixes)
