"""Recipes of images, composed at random from a number."""

from __future__ import annotations

import importlib.util
import random

OPTIONS: dict[str, tuple[str, ...]] = {
    "scale": ("", "--scale 0.3 1"),
    "standard": ("", "--augment standard"),
    "interpolation": ("", "--interpolation bicubic"),
    "crop_pct": ("", "--crop-pct 0.8"),
    "aa": ("", "--aa rand-m9-mstd0.5-inc1", "--aa augmix-m5"),
    "reprob": ("", "--reprob 0.5"),
    "mixup": ("", "--mixup 0.4"),
    "cutmix": ("", "--cutmix 1"),
    "smoothing": ("", "--label-smoothing 0.1"),
    "drop_path": ("", "--drop-path 0.3"),
    "warmup": ("", "--schedule cosine --warmup-epochs 1", "--schedule constant"),
    "layer_decay": ("", "--layer-decay 0.7"),
    "accumulation": ("", "--grad-accum-steps 2", "--grad-accum-steps 3"),
    "average": ("", "--model-ema-decay 0.8"),
    "clip": ("--clip-norm 0", "--clip-norm 1"),
    "precision": ("", "--precision bf16-mixed", "--precision 64-true"),
}
"""Of each option what a recipe may say, nothing among it."""

OF_VIT = "--patch 4 --dim 8 --vit-heads 2 --hidden 8 --layers 2"
OF_TIMM = (
    "--model timm/vit_tiny_patch16_224 --model-kwargs patch_size=4 embed_dim=8 depth=2 num_heads=2"
)
MODELS: dict[str, tuple[str, ...]] = {
    f"{OF_VIT} --router dense": ("*encoder_layer_0.*=0", "heads.*=3"),
    f"{OF_VIT} --router token_choice --balance bias --noise True": ("*.experts.*=3",),
    f"{OF_VIT} --router expert_choice --every 1": ("*.router.*=0.1", "*pos_embedding=0"),
    f"{OF_TIMM} --router token_choice": ("*.router.*=2",),
    f"{OF_TIMM} --router dense": ("blocks.0.*=0",),
    f"{OF_TIMM} --router token_choice --start copies --k 2": ("head.*=3", "patch_embed.*=0"),
}
"""Models, and parts of each that may have a learning rate of their own."""


def recipe(number: int) -> list[str]:
    """The words of a command, all drawn from the number."""
    draw = random.Random(number)
    has_timm = importlib.util.find_spec("timm") is not None
    model = draw.choice([model for model in MODELS if has_timm or "timm" not in model])
    words = model.split()
    for values in OPTIONS.values():
        words += draw.choice([value for value in values if has_timm or "--aa" not in value]).split()
    if draw.random() < 0.5:
        words += ["--lr-scale", *MODELS[model]]
    return words
