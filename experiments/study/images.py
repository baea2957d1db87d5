"""Studies of images, fixed before they are run: ``python -m experiments.sweep MODULE:STUDY``.

``MODULE`` is ``experiments.study.images``; ``--price`` says what a study costs, and runs nothing.

``PRETRAINING``  A dense ViT, and
``UPCYCLING``    experts from it, in the middle of training (Komatsuzaki et al., 2023).
``ROUTED_SHARE`` How much of the FLOPs is routed: eight cells, confirmed on other seeds.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from experiments.study.studies import Row, Study
from experiments.train.presets import SMALL_VIT

# Experts in the middle of training

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
    seeds=(1, 2, 3),
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

# The routed share

IMAGENETTE = replace(
    SMALL_VIT, dataset="imagenette", image_size=64, patch=8, epochs=15, seeds=(0, 1, 2)
)


def share_cells() -> dict[str, Row]:
    """Every block or every second, copies or beside a shared expert, K = 1 or 2.

    Behind each cell, the dense model of its FLOPs.
    """
    rows = {}
    for every, start, k in product((1, 2), ("copies", "shared"), (1, 2)):
        own = {"every": every, "start": start, "k": k}
        blocks = "every block" if every == 1 else "every second block"
        name = f"{'all' if every == 1 else 'half'}-{start}-k{k}"
        label = f"{blocks}, {start}, K = {k}"
        rows[name] = Row(label=label, changes={"router": "token_choice", **own})
        matched = {"router": "dense", "equal": "flops", "equal_to": "token_choice", **own}
        rows[f"dense-{name}"] = Row(label=f"dense, FLOPs of {label}", changes=matched)
    return rows


ROUTED_SHARE = Study(
    name="routed-share",
    about="Does it pay to route a large share of the FLOPs? Eight cells on imagenette; the best by "
    "validation, the dense model and that of its FLOPs run on imagenette-others, on "
    "imagenette-wide, whose experts are twice as wide, and on cifar10. Nothing was tuned for a "
    "row.",
    columns={
        "imagenette": IMAGENETTE,
        "imagenette-others": replace(IMAGENETTE, seeds=(3, 4, 5, 6, 7)),
        "imagenette-wide": replace(IMAGENETTE, hidden=2 * IMAGENETTE.hidden),
        "cifar10": replace(SMALL_VIT, epochs=5),
    },
    rows={"dense": Row(label="dense", changes={"router": "dense"}), **share_cells()},
    controls=("dense",),
)
