"""The recipe of a training on images: its options, by timm's names.

Imports nothing, so that the help of a command line comes at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to images, to labels, to weights and to the learning rate.

    By default nothing. An option that timm has does what timm does by that name.
    """

    scale: tuple[float, float] | None = None
    """Train on a random crop of this share of the area of each image, resized; and on flips.
    Of the image as its file has it, of any size and shape. timm's default is 0.08 1."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized."""
    crop_pct: float = 1.0
    """Test: resize the shorter side to image size / crop_pct, and take the center.
    A usual value is 0.9."""
    aa: str | None = None
    """RandAugment and its relatives, by timm's policy: rand-m9-mstd0.5-inc1, augmix-m5."""
    reprob: float = 0.0
    """Random erasing: the probability that a rectangle of an image becomes noise."""
    mixup: float = 0.0
    """Mixup: alpha of the Beta distribution of the two images' weights; 0 mixes none.
    A patch then shows two images, and a router routes their sum."""
    cutmix: float = 0.0
    """CutMix: alpha of the distribution of the area taken from another image; 0 takes none.
    A patch then shows one image, but at the border; a router by image sees two at once.
    With mixup too, each batch takes one of the two, at random."""
    drop_path: float = 0.0
    """Of a model of timm: the probability to drop the last block's branches; less below, from 0.
    Experts of a dropped branch still run and are counted, and learn nothing of that image."""
    warmup_epochs: float | None = None
    """With a cosine schedule: epochs of linear warmup; by default a tenth of all."""
    layer_decay: float | None = None
    """Of a model of timm: multiply the learning rate by this for each block below the head.
    Experts and routers belong to their block."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up for one step of the optimizer."""
    model_ema_decay: float = 0.0
    """Average the weights with this decay a step, and evaluate the average; 0 does without.
    A short training needs a short memory: 0.99 forgets in 100 steps, timm's 0.9998 in 5,000."""

    def mixes(self) -> bool:
        """Whether images of a batch are mixed, and with them their labels."""
        return self.mixup > 0 or self.cutmix > 0
