"""Studies of images, fixed before they are run: ``python -m experiments.sweep MODULE:STUDY``.

``MODULE`` is ``experiments.study.images``; ``--price`` says what a study costs, and runs nothing.

``PRETRAINING``  A dense ViT, and
``UPCYCLING``    experts from it, in the middle of training (Komatsuzaki et al., 2023).
``ROUTED_SHARE`` How much of the FLOPs is routed: eight cells, confirmed on other seeds.
``BY_IMAGE``     One decision an image, by a low-level view, on images of four domains.
``HELD_OUT``     The same, tested on a domain that nobody was trained on.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from experiments.study.studies import Row, Study
from experiments.train.presets import PACS, SMALL_VIT
from vision.datasets import DOMAINS

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

# One decision an image

BY_IMAGE_ROWS = {
    "dense": Row(label="dense", changes={"router": "dense"}),
    "dense-view": Row(
        label="dense, the view as a token", changes={"router": "dense", "extra_input": "view"}
    ),
    "dense-domain": Row(
        label="dense, the domain as a token", changes={"router": "dense", "extra_input": "domain"}
    ),
    "patch": Row(
        label="experts by patch, a router a block",
        changes={"router": "token_choice", "start": "copies"},
    ),
    "image": Row(
        label="experts by image, a router a block",
        changes={"router": "token_choice", "start": "copies", "router_input": "image"},
    ),
    "view": Row(
        label="experts by view, once",
        changes={"router": "token_choice", "start": "copies", "router_input": "view"},
    ),
    "random-view": Row(
        label="experts by view, frozen random",
        changes={"router": "random", "start": "copies", "router_input": "view"},
    ),
    "told": Row(label="experts, told the domain", changes={"router": "oracle", "start": "copies"}),
}
"""All cost the FLOPs of the dense model, but for a token or a router."""

OF_PACS = replace(
    PACS, experts=4, dim=24, vit_heads=2, hidden=48, precision="32-true", seeds=(0, 1, 2)
)
"""As in the table of routers."""

BY_IMAGE = Study(
    name="by-image",
    about="Four experts for four domains of PACS: is an image's own decision, by its mean color "
    "and edge energy, worth more than one for each patch? Nothing was tuned for a row.",
    columns={"pacs": OF_PACS},
    rows=BY_IMAGE_ROWS,
    controls=("dense", "dense-view"),
)

HELD_OUT = Study(
    name="held-out-domain",
    about="As by-image, with one domain of PACS left out of training: all of its images are the "
    "test set, and validation is of the others. The expert of the domain that is left out was "
    "never trained. Ten seeds only for a difference above one point.",
    columns={domain: replace(OF_PACS, held_out=domain) for domain in DOMAINS},
    rows={name: BY_IMAGE_ROWS[name] for name in ("dense", "view", "random-view", "told")},
    controls=("dense",),
)
