"""The presets: one frozen configuration a data set. `python -m experiments.train NAME` runs one.

They name data, widths and recipe. Router, balance, weights, how layers start and what the
router sees are the library's defaults. Accuracies are those of results/presets.json, with
experts and dense.
"""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from typing import Any

from experiments.train.config import (
    WHERE,
    GraphConfig,
    ImageConfig,
    MoleculeConfig,
    RunConfig,
    TypedConfig,
)
from vision.recipe import Recipe

THREE = (0, 1, 2)
TEN = tuple(range(10))
VIT: dict[str, Any] = {"every": 2, "optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.05}

DIGITS = ImageConfig(
    dataset="digits", hidden=96, layers=4, epochs=25, batch_size=32, lr=3e-3, seeds=THREE, **VIT
)
"""scikit-learn's 1,797 digits, 8x8; 2x2 patches; 28 s a seed on one core. 90.9 ± 0.9 %, dense
90.7 ± 1.9 %."""

CIFAR10 = ImageConfig(
    dataset="cifar10",
    hidden=256,
    layers=6,
    epochs=30,
    lr=1e-3,
    augment="standard",
    label_smoothing=0.1,
    clip_norm=1.0,
    **VIT,
)
"""128 wide, 4x4 patches. 5 epochs in bf16 on JPEGs: 60.7 %, dense 61.5 %; the plain mixture
75.6 % after 22 (results/cifar10.json)."""

IMAGE_FOLDER = replace(CIFAR10, dataset="images", augment="none", recipe=Recipe(scale=(0.35, 1.0)))
"""Of any size and shape: crops are of the images as they are."""

DIGITS_GRAPH = GraphConfig(
    dataset="digits-graph", undirected=False, hidden=32, residual="linear", epochs=100, seeds=THREE
)
"""1 s a seed on an idle core. 98.7 ± 0.3 %, dense 98.5 ± 0.2 %."""

MOSAIC = GraphConfig(
    dataset="mosaic",
    conv=("sage",),
    undirected=False,
    hidden=16,
    jk="last",
    residual="none",
    epochs=150,
    seeds=(0, 1, 2, 3, 4),
)
"""3 s a seed on an idle core. 94.1 ± 1.1 %, dense 82.6 ± 0.8 %."""

SMALL = GraphConfig(
    dataset="amazon-photo", hidden=64, dropout=0.5, weight_decay=5e-4, epochs=200, seeds=TEN
)
"""Graphs without a recipe of their own. Not tuned."""

CORA = replace(SMALL, dataset="cora", hidden=16, residual="none")
"""Nearly the recipe of the GCN paper (Kipf & Welling, 2017), which decays the first layer only.
81.2 ± 0.7 %, dense 81.3 ± 0.7 %: 140 labels leave experts nothing to learn. CiteSeer: 70.8 ±
0.7 %, dense 71.3 ± 0.7 %."""

GRAPH = replace(
    SMALL,
    dataset="graph",
    conv=("sage",),
    residual="linear",
    dropout=0.2,
    weight_decay=0.0,
    seeds=THREE,
)
"""Of facebook.npz (22,470 pages, 4 classes, 5 of its 10 stratified splits): 93.0 ± 0.4 %, dense
92.6 ± 0.4 %."""

DEEP: dict[str, Any] = {"conv": ("sage",), "residual": "linear", "dropout": 0.2, "eval_every": 5}

CRITICAL_LOOK = GraphConfig(
    dataset="roman-empire",
    conv=("bare_sage",),
    ffn="experts",
    act="gelu",
    hidden=512,
    layers=5,
    dropout=0.2,
    lr=3e-5,
    optimizer="adamw",
    epochs=1000,
    seeds=TEN,
)
"""The SAGE of Platonov et al. (2023), as their code has it.

They choose 1 to 5 layers by validation. Its dense model (``--router dense``) is theirs; experts
are in the feed-forward parts.
"""

MINESWEEPER = GraphConfig(
    dataset="minesweeper",
    hidden=64,
    layers=8,
    norm="batch_norm",
    lr=0.01,
    epochs=300,
    seeds=THREE,
    **DEEP,
)
"""The tuned recipe (Luo et al., 2024) with fewer layers, and 300 epochs for 2,000; seed s takes
split s. 95.2 ± 0.5 % AUC, dense 95.2 ± 0.5 %."""

OGB: dict[str, Any] = {
    "dropout": 0.5,
    "lr": 0.01,
    "batch_size": 1024,
    "seeds": TEN,
}
"""What the OGB examples' recipes (Hu et al., 2020) share. OGB's graphs were planted here: see
results/presets.json."""

ARXIV = GraphConfig(
    dataset="ogbn-arxiv",
    hidden=256,
    layers=3,
    norm="batch_norm",
    residual="none",
    epochs=500,
    **OGB,
)

PRODUCTS = replace(
    ARXIV,
    dataset="ogbn-products",
    conv=("sage",),
    norm=None,
    epochs=300,
    sampling="neighbor",
    evaluation="layerwise",
)
"""For sampled SAGE."""

PROTEINS = replace(
    ARXIV, dataset="ogbn-proteins", norm=None, dropout=0.0, epochs=1000, eval_every=5
)
"""x is the mean of incident edge features."""

MAG = TypedConfig(dataset="ogbn-mag", hidden=64, epochs=50, **OGB)
"""Of its R-GCN, full-batch."""

MOLECULES = MoleculeConfig(
    dataset="ogbg-molhiv",
    hidden=300,
    layers=5,
    dropout=0.5,
    epochs=100,
    batch_size=32,
    lr=0.001,
    seeds=TEN,
)
"""The GCN of the OGB examples (Hu et al., 2020).

Dense, published on molhiv: 76.06 ± 0.97 % ROC-AUC.
"""

OWN_GRAPH = """

FILE.npz, and FILE.pt of a PyG Data (or what your function returns), hold x (N, D), y (N,) with
classes from 0 (below 0 for none), edge_index (2, M), and perhaps edge_weight (M,), train_mask,
val_mask and test_mask, each (N,), or (N, S) for S splits, of which seed s takes s % S.

A folder has nodes.csv with a column label, perhaps id (else nodes are numbered from 0) and split
(train, val, test or none), all others features; and edges.csv with source, target, perhaps
weight. Labels and features may be names.

Without masks each seed draws a split, 60/20/20 by class. Nothing in a file is run."""
"""What a graph of your own holds, as the help of the preset ``graph`` says it."""

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "digits": ("Handwritten digits (8x8) as images; a 4-block ViT.", DIGITS),
    "cifar10": ("CIFAR-10, from torchvision or as folders of JPEG; a 6-block ViT.", CIFAR10),
    "cifar100": ("CIFAR-100; a 6-block ViT.", replace(CIFAR10, dataset="cifar100")),
    "imagenette": (
        "Imagenette at 160 pixels; a 6-block ViT.",
        replace(IMAGE_FOLDER, dataset="imagenette", hidden=384, epochs=80, batch_size=64),
    ),
    "images": (
        "Images of your own: --data-root DIR with CLASS/*, or train/CLASS/* and test/CLASS/*.",
        IMAGE_FOLDER,
    ),
    "digits-graph": (
        "The same digits as nodes of a 10-nearest-neighbor graph; a 2-layer GCN.",
        DIGITS_GRAPH,
    ),
    "mosaic": (
        "8 planted regions, in each of which a neighbor's class means something else; a 2-layer "
        "SAGE.",
        MOSAIC,
    ),
    "graph": (
        "A graph of your own: --data-root FILE.npz, FILE.pt, or a folder of CSV; or --data "
        "FILE.py:function.",
        GRAPH,
    ),
    "cora": ("Cora, public split; a 2-layer GCN.", CORA),
    "citeseer": ("CiteSeer, public split; a 2-layer GCN.", replace(CORA, dataset="citeseer")),
    "pubmed": ("PubMed, public split; a 2-layer GCN.", replace(CORA, dataset="pubmed")),
    "minesweeper": (
        "minesweeper, 10 splits; an 8-layer SAGE, tuned recipe with fewer epochs.",
        MINESWEEPER,
    ),
    "ogbn-arxiv": ("ogbn-arxiv, the OGB example's GCN.", ARXIV),
    "ogbn-products": ("ogbn-products, the OGB example's sampled SAGE.", PRODUCTS),
    "ogbn-proteins": ("ogbn-proteins, the OGB example's GCN.", PROTEINS),
    "ogbn-mag": ("ogbn-mag, a SAGE a relation on the OGB example's recipe.", MAG),
}
"""What the command line offers: a line of help, and the configuration."""
for name in (
    "hiv",
    "tox21",
    "bbbp",
    "bace",
    "sider",
    "clintox",
    "toxcast",
    "muv",
    "esol",
    "freesolv",
    "lipo",
):
    PRESETS[f"ogbg-mol{name}"] = (
        f"ogbg-mol{name}, molecules; the OGB example's GCN.",
        replace(MOLECULES, dataset=f"ogbg-mol{name}"),
    )
for name in ("roman-empire", "amazon-ratings", "tolokers", "questions"):
    PRESETS[name] = (
        f"{name}, 10 splits; the 5-layer SAGE of its paper.",
        replace(CRITICAL_LOOK, dataset=name),
    )
for name in ("packages", "synsets", "definitions"):
    PRESETS[name] = (
        f"{name}, a graph of texts that `experiments.convert {name}` writes; a 2-layer SAGE.",
        replace(GRAPH, dataset=name, epochs=150, seeds=TEN),
    )
for name in (
    "amazon-computers",
    "amazon-photo",
    "coauthor-cs",
    "coauthor-physics",
    "wikics",
    "actor",
    "chameleon-filtered",
    "squirrel-filtered",
):
    PRESETS[name] = (f"{name}; a 2-layer GCN, not tuned.", replace(SMALL, dataset=name))


def command(config: RunConfig) -> str:
    """The command line of a run: the preset that is most like it, and what differs from it.

    Where it is written, and how fast it goes, is left to whoever runs it.
    """
    lines = [
        [name, *differing_options(config, preset)]
        for name, (_, preset) in PRESETS.items()
        if preset.dataset == config.dataset
    ]
    shortest = sorted(lines, key=len)[0]
    return f"{config.launcher} -m experiments.train {shlex.join(shortest)}"


def differing_options(config: RunConfig, preset: RunConfig) -> list[str]:
    """The words on a command line that make a preset a configuration of the same data set."""
    words = list[str]()
    for option in fields(config):
        name = option.name
        value = getattr(config, name)
        usual = getattr(preset, name)
        flag = f"--{name.replace('_', '-')}"
        if value == usual or (name in WHERE and name not in ("data_root", "offline")):
            continue
        if name == "router" and getattr(config, "routing", None) is not None:
            continue  # a routing of a file has one router
        if name in ("options", "recipe"):
            for own, given in vars(value).items():
                if given != getattr(usual, own):
                    words += [f"--{own.replace('_', '-')}", *_words(given)]
        elif option.type == "bool":
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, *_words(value)]
    return words


def _words(value: Any) -> list[str]:
    """A value as the words after an option."""
    return list(map(str, value if isinstance(value, tuple) else [value]))
