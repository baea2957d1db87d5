"""Studies of images, fixed before they are run: ``python -m experiments.sweep MODULE:STUDY``.

``MODULE`` is ``experiments.study.images``; ``--price`` says what a study costs, and runs nothing.

``PRETRAINING``  A dense ViT, and
``UPCYCLING``    experts from it, in the middle of training (Komatsuzaki et al., 2023).
"""

from __future__ import annotations

from dataclasses import replace

from experiments.study.studies import Row, Study
from experiments.train.presets import SMALL_VIT

THREE = (1, 2, 3)
"""Seeds of what goes on from one trained model, whose own seed is 0."""

PRETRAINED = replace(
    SMALL_VIT,
    dataset="imagenette",
    model="timm/vit_tiny_patch16_224",
    model_kwargs=("patch_size=8", "embed_dim=64", "depth=4", "num_heads=2"),
    router="dense",
    image_size=64,
    label_smoothing=0.1,
    precision="32-true",
    epochs=15,
    seeds=(0,),
)

PRETRAINING = Study(
    name="upcycling-from",
    about="The dense ViT from which UPCYCLING goes on; nothing was tuned.",
    columns={"imagenette": PRETRAINED},
    rows={"dense": Row(label="dense, 15 epochs")},
)

UPCYCLED = replace(
    PRETRAINED,
    checkpoint="runs/upcycling-from/imagenette/dense/seed-0/checkpoint/best.safetensors",
    epochs=4,
    lr=5e-4,
    seeds=THREE,
)

UPCYCLING = Study(
    name="upcycling",
    about="A small ViT, trained for 15 epochs, goes on for 4 more, dense or with experts that "
    "start as copies of its MLPs, at equal FLOPs: the same recipe and half the learning rate for "
    "all; nothing was tuned for a row.",
    columns={"imagenette": UPCYCLED},
    rows={
        "dense": Row(label="dense goes on", changes={"router": "dense"}),
        "copies": Row(
            label="8 experts, copies, K = 1, every second block",
            changes={"router": "token_choice", "start": "copies"},
        ),
    },
    controls=("dense",),
)
