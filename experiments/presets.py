"""The presets: one frozen configuration a data set. `python -m experiments.train NAME` runs one.

They name data, widths and recipe. Router, balance, weights, shared expert, dense start and what the router sees are
the library's defaults.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.config import GraphConfig, HeteroConfig, ImageConfig, ImageSetConfig, RunConfig

DIGITS = ImageConfig(
    dataset="digits",
    hidden=96,
    layers=4,
    every=2,
    epochs=25,
    batch_size=32,
    optimizer="adamw",
    lr=3e-3,
    schedule="cosine",
    weight_decay=0.05,
    seeds=(0, 1, 2),
)
"""scikit-learn's 1,797 handwritten digits as 8x8 images; a 4-block ViT with 2x2 patches.

``python -m experiments.train digits``, about 28 s a seed on one core. Seeds 0 to 4: 90.9 ± 0.9 % with
experts, 90.7 ± 1.9 % dense, all 8 experts of both layers alive (results/presets.json, as for the others below).
"""

CIFAR10 = ImageSetConfig(
    dataset="cifar10",
    hidden=256,
    layers=6,
    every=2,
    augment="standard",
    label_smoothing=0.1,
    epochs=30,
    batch_size=128,
    optimizer="adamw",
    lr=1e-3,
    schedule="cosine",
    weight_decay=0.05,
    clip_norm=1.0,
    check_finite=False,
)
"""CIFAR-10 with crops and flips; a 6-block ViT, 128 wide, 4x4 patches, MLPs of 256, experts in every second block.

``python -m experiments.train cifar10 --data-root DIR --epochs 5 --precision bf16-mixed``, one seed, on JPEGs:
60.7 % with experts, 61.5 % dense. The plain mixture had 75.6 % after 22 epochs (results/cifar10.json).
"""

CIFAR100 = replace(CIFAR10, dataset="cifar100")
"""CIFAR-100 on CIFAR-10's recipe. It was run on made-up files only."""

IMAGENETTE = replace(CIFAR10, dataset="imagenette", hidden=384, epochs=80, batch_size=64)
"""Imagenette at 160 pixels, random resized crops; a 6-block ViT, 192 wide, 16x16 patches. Run on a sample only."""

IMAGES = replace(CIFAR10, dataset="images")
"""A folder of the user's own: ``python -m experiments.train images --data-root DIR``."""

DIGITS_GRAPH = GraphConfig(
    dataset="digits-graph",
    undirected=False,
    hidden=32,
    epochs=100,
    seeds=(0, 1, 2),
)
"""The same digits as nodes of a symmetric 10-nearest-neighbor graph; a 2-layer GCN.

``python -m experiments.train digits-graph``, about 2 s a seed on one core. Seeds 0 to 4: 98.4 ± 0.3 %
with experts, 98.5 ± 0.2 % dense, all 8 experts alive.
"""

MOSAIC = GraphConfig(
    dataset="mosaic",
    conv=("sage",),
    undirected=False,
    adjacency="edge_index",
    hidden=16,
    jk="last",
    residual="none",
    epochs=150,
    seeds=(0, 1, 2, 3, 4),
)
"""8 planted regions, in each of which a neighbor's class means something else; a 2-layer SAGE, and a linear output.

``python -m experiments.train mosaic``, about 8 s a seed on one core. Seeds 0 to 4: 91.8 ± 0.6 % with
experts, 82.6 ± 0.9 % dense, all 8 experts of both layers alive.
"""

CORA = GraphConfig(
    dataset="cora",
    hidden=16,
    residual="none",
    dropout=0.5,
    epochs=200,
    weight_decay=5e-4,
    seeds=tuple(range(10)),
)
"""Cora, public split; nearly the recipe of the GCN paper (Kipf & Welling, 2017), which decays the first layer only.

``python -m experiments.train cora --data-root DIR``. Seeds 0 to 9: 80.7 ± 0.8 % with experts, 81.3 ± 0.7 %
dense, all 8 experts alive: 140 labels leave them nothing to learn.
"""

CITESEER = replace(CORA, dataset="citeseer")
"""CiteSeer, public split; the recipe of Cora. Seeds 0 to 9: 70.6 ± 0.6 % with experts, 71.2 ± 0.7 % dense, all 8
experts alive.
"""

PUBMED = replace(CORA, dataset="pubmed")
"""PubMed, public split; the recipe of Cora. It was run on made-up files only."""

HETEROPHILOUS = GraphConfig(
    dataset="roman-empire",
    conv=("sage",),
    hidden=512,
    layers=5,
    norm="layer_norm",
    residual="linear",
    dropout=0.2,
    lr=3e-5,
    optimizer="adamw",
    epochs=1000,
    eval_every=5,
    seeds=tuple(range(10)),
)
"""The heterophilous graphs, after the recipe of their paper (Platonov et al., 2023): 512 wide, layer norm, lr 3e-5,
1,000 steps; 10 fixed splits. The paper chooses 1 to 5 layers by validation and has GELU and feed-forward blocks; here
are 5 layers, ReLU and linear residuals. They were run on made-up files only."""

MINESWEEPER = GraphConfig(
    dataset="minesweeper",
    conv=("sage",),
    hidden=64,
    layers=8,
    norm="batch_norm",
    residual="linear",
    dropout=0.2,
    lr=0.01,
    epochs=300,
    eval_every=5,
    seeds=(0, 1, 2),
)
"""minesweeper, 10 fixed splits (seed s takes split s): 8 layers of 64, batch norm, residual; the tuned recipe (Luo et
al., 2024) with fewer layers and epochs (300 for 2,000). Splits 0 to 4: 95.0 ± 0.6 % AUC with experts, 95.2 ± 0.5 %
dense. All 8 experts of six layers are alive, 5.2 of the first one, since all nodes have one of 7 feature rows."""

SMALL = GraphConfig(
    dataset="amazon-photo",
    hidden=64,
    dropout=0.5,
    weight_decay=5e-4,
    epochs=200,
    seeds=tuple(range(10)),
)
"""Graphs without a recipe of their own: 2 layers of 64, dropout .5, lr .01, weight decay 5e-4. Not tuned."""

ARXIV = GraphConfig(
    dataset="ogbn-arxiv",
    hidden=256,
    layers=3,
    norm="batch_norm",
    residual="none",
    dropout=0.5,
    lr=0.01,
    epochs=500,
    batch_size=1024,
    seeds=tuple(range(10)),
)
"""ogbn-arxiv, the OGB example's recipe (Hu et al., 2020): 3 layers of 256, batch norm, dropout .5, 500 epochs.

On a planted graph of 20,000 nodes, 60 epochs, seeds 0 to 2: 84.5 ± 0.1 % with experts, 84.4 ± 0.1 % dense, all 8
experts alive.
"""

ARXIV_TUNED = replace(
    ARXIV, hidden=512, layers=5, residual="linear", lr=5e-4, weight_decay=5e-4, input_dropout=0.15, epochs=2000
)
"""ogbn-arxiv, the tuned recipe (Luo et al., 2024): 5 layers of 512, linear residual, lr 5e-4, 2,000 epochs."""

PRODUCTS = replace(
    ARXIV, dataset="ogbn-products", conv=("sage",), norm=None, epochs=300, sampling="neighbor", evaluation="layerwise"
)
"""ogbn-products, the OGB example's recipe for sampled SAGE: 3 layers of 256, no norm, dropout .5, lr .01.

On a planted graph of 20,000 nodes, 10 epochs, seeds 0 to 2: 81.1 ± 1.2 % with experts, 78.8 ± 2.7 % dense, all 8
experts alive.
"""

PRODUCTS_TUNED = replace(
    PRODUCTS,
    hidden=200,
    layers=5,
    norm="layer_norm",
    residual="linear",
    lr=0.003,
    sampling="random_node",
    batch_size=244_903,
    epochs=1000,
)
"""ogbn-products, the tuned recipe (Luo et al., 2024): 5 layers of 200, layer norm, lr .003, 10 random parts."""

PAPERS100M = replace(
    PRODUCTS,
    dataset="ogbn-papers100M",
    norm="layer_norm",
    residual="linear",
    lr=0.003,
    epochs=20,
    evaluation="sampled",
    seeds=(0, 1, 2),
)
"""ogbn-papers100M on disk, sampled SAGE: 3 layers of 256, fan-out 15 10 5, batches of 1,024; evaluated as in training,
on the labeled nodes. The library's default shape (dense start, balanced by a bias). Not tuned, run on planted graphs
only; ``experiments.convert`` makes the folder."""

PROTEINS = replace(ARXIV, dataset="ogbn-proteins", norm=None, dropout=0.0, epochs=1000, eval_every=5)
"""ogbn-proteins, the OGB example's recipe: 3 layers of 256, 1,000 epochs; x is the mean of incident edge features.

On a planted graph of 2,000 nodes, 300 epochs, seeds 0 to 2: 68.3 ± 2.6 % AUC with experts, 60.8 ± 1.7 % dense; 8 and 7
of 8 experts alive.
"""

MAG = HeteroConfig(
    dataset="ogbn-mag",
    hidden=64,
    residual="none",
    dropout=0.5,
    lr=0.01,
    epochs=50,
    batch_size=1024,
    seeds=tuple(range(10)),
)
"""ogbn-mag, the OGB example's recipe for R-GCN: 2 layers of 64, dropout .5, lr .01, 50 epochs, full-batch.

On a planted graph of 5,000 papers, seeds 0 to 2: 73.6 ± 2.8 % with experts, 73.1 ± 3.2 % dense, all 8 experts of each
node type alive.
"""

HETERO = replace(MAG, dataset="hetero", lr=0.01, epochs=100, seeds=(0, 1, 2))
"""A heterogeneous graph of your own: ``python -m experiments.train hetero --data package.module:function``."""

FACEBOOK = replace(
    SMALL,
    dataset="graph",
    data_root=Path("facebook.npz"),
    conv=("sage",),
    dropout=0.2,
    weight_decay=0.0,
    eval_every=5,
    seeds=(0, 1, 2),
)
"""facebook: 22,470 pages, mutual likes, 4 classes, 10 stratified splits; a user's own graph.

``python -m experiments.train graph --data-root facebook.npz``. Splits 0 to 4: 93.0 ± 0.4 % with experts, 92.6 ± 0.4 %
dense, all 8 experts alive.
"""

GRAPH = replace(FACEBOOK, data_root=Path("data"), eval_every=1)
"""A graph of the user's own: ``python -m experiments.train graph --data-root FILE``. It starts as the dense model."""

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "digits": ("Handwritten digits (8x8) as images; a 4-block ViT.", DIGITS),
    "cifar10": ("CIFAR-10, from torchvision or as folders of JPEG; a 6-block ViT.", CIFAR10),
    "cifar100": ("CIFAR-100; a 6-block ViT.", CIFAR100),
    "imagenette": ("Imagenette at 160 pixels; a 6-block ViT.", IMAGENETTE),
    "images": (
        "Images of your own: --data-root DIR with CLASS/*, or train/CLASS/* and test/CLASS/*.",
        IMAGES,
    ),
    "digits-graph": ("The same digits as nodes of a 10-nearest-neighbor graph; a 2-layer GCN.", DIGITS_GRAPH),
    "mosaic": ("8 planted regions, in each of which a neighbor's class means something else; a 2-layer SAGE.", MOSAIC),
    "graph": ("A graph of your own: --data-root FILE.npz, FILE.pt, or a folder with nodes.csv and edges.csv.", GRAPH),
    "hetero": ("A heterogeneous graph of your own: --data package.module:function.", HETERO),
    "cora": ("Cora, public split; a 2-layer GCN.", CORA),
    "citeseer": ("CiteSeer, public split; a 2-layer GCN.", CITESEER),
    "pubmed": ("PubMed, public split; a 2-layer GCN.", PUBMED),
    "minesweeper": ("minesweeper, 10 splits; an 8-layer SAGE, tuned recipe with fewer epochs.", MINESWEEPER),
    "ogbn-arxiv": ("ogbn-arxiv, the OGB example's GCN.", ARXIV),
    "ogbn-arxiv-tuned": ("ogbn-arxiv, the tuned GCN: 5 layers of 512, 2,000 epochs.", ARXIV_TUNED),
    "ogbn-products": ("ogbn-products, the OGB example's sampled SAGE.", PRODUCTS),
    "ogbn-products-tuned": ("ogbn-products, the tuned SAGE on random parts.", PRODUCTS_TUNED),
    "ogbn-papers100M": ("ogbn-papers100M on disk, sampled SAGE; see experiments.convert.", PAPERS100M),
    "ogbn-proteins": ("ogbn-proteins, the OGB example's GCN.", PROTEINS),
    "ogbn-mag": ("ogbn-mag, a relational GNN on the OGB example's recipe.", MAG),
    **{
        name: (f"{name}, 10 splits; a 5-layer SAGE after its paper.", replace(HETEROPHILOUS, dataset=name))
        for name in ("roman-empire", "amazon-ratings", "tolokers", "questions")
    },
    **{
        name: (f"{name}; a 2-layer GCN, not tuned.", replace(SMALL, dataset=name))
        for name in (
            "amazon-computers",
            "amazon-photo",
            "coauthor-cs",
            "coauthor-physics",
            "wikics",
            "actor",
            "chameleon",
            "chameleon-filtered",
            "squirrel",
            "squirrel-filtered",
        )
    },
}
"""What the command line offers: a line of help, and the configuration."""
