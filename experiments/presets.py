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

``python -m experiments.train digits --router NAME``, about 15 s a seed on one core (Xeon, AVX-512). Seeds 0 to 2: dense
92.3 ± 1.6, token choice 90.6 ± 0.7, multi-centroid 93.0 ± 1.1 % (results/digits.json).
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

``python -m experiments.train cifar10 --data-root DIR --epochs 22 --precision bf16-mixed``, 93 minutes on one core
(EPYC, AVX-512 with bf16) beside another job, about half as long on two. Seed 0: 75.6 %, on images re-encoded as JPEG
(results/cifar10.json).
"""

CIFAR100 = replace(CIFAR10, dataset="cifar100")
"""CIFAR-100 on CIFAR-10's recipe. It was run on made-up files only."""

IMAGENETTE = replace(CIFAR10, dataset="imagenette", hidden=384, epochs=80, batch_size=64)
"""Imagenette at 160 pixels, random resized crops; a 6-block ViT, 192 wide, 16x16 patches. Run on a sample only."""

IMAGES = replace(CIFAR10, dataset="images")
"""A folder of the user's own, with the library's default shape: ``python -m experiments.train images --data-root DIR``.
"""

DIGITS_GRAPH = GraphConfig(
    dataset="digits-graph",
    undirected=False,
    hidden=32,
    epochs=100,
    seeds=(0, 1, 2),
)
"""The same digits as nodes of a symmetric 10-nearest-neighbor graph; a 2-layer GCN.

``python -m experiments.train digits-graph --router NAME``, about 2 s a seed on one core (Xeon, AVX-512). Seeds 0 to 2:
dense 98.6 ± 0.1, expert choice 97.9 ± 0.3 %; token choice 98.4 ± 0.4 %, but without a balance loss it leaves six or
seven of eight experts idle (results/digits-graph.json).
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

``python -m experiments.sweep mosaic``, about 6 s a seed and variant on one core (Xeon, AVX-512). Seeds 5 to 9: dense
84.6 ± 1.9, k-means centroids with a shared router 94.4 ± 0.7, oracle 93.9 ± 0.2 % (results/mosaic.json).
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

``python -m experiments.train cora --router dense --data-root DIR``, about 4 s a seed on one core (Xeon, AVX-512). Seeds
0 to 9: dense 81.5 ± 0.8 %. With experts this narrow model does worse: token choice at E = 8, K = 1 has 78.9 ± 5.8 %
(results/cora.json).
"""

CITESEER = replace(CORA, dataset="citeseer")
"""CiteSeer, public split; the recipe of Cora.

``python -m experiments.train citeseer --router dense --data-root DIR``. Seeds 0 to 9: dense 70.9 ± 0.8 %.
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
al., 2024) with fewer layers and epochs (300 for 2,000)."""

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
"""ogbn-arxiv, the OGB example's recipe (Hu et al., 2020): 3 layers of 256, batch norm, dropout .5, 500 epochs."""

ARXIV_TUNED = replace(
    ARXIV, hidden=512, layers=5, residual="linear", lr=5e-4, weight_decay=5e-4, input_dropout=0.15, epochs=2000
)
"""ogbn-arxiv, the tuned recipe (Luo et al., 2024): 5 layers of 512, linear residual, lr 5e-4, 2,000 epochs."""

PRODUCTS = replace(
    ARXIV, dataset="ogbn-products", conv=("sage",), norm=None, epochs=300, sampling="neighbor", evaluation="layerwise"
)
"""ogbn-products, the OGB example's recipe for sampled SAGE: 3 layers of 256, no norm, dropout .5, lr .01."""

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
"""ogbn-proteins, the OGB example's recipe: 3 layers of 256, 1,000 epochs; x is the mean of incident edge features."""

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
"""ogbn-mag, the OGB example's recipe for R-GCN: 2 layers of 64, dropout .5, lr .01, 50 epochs, full-batch."""

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
"""facebook: 22,470 pages, mutual likes, 4 classes, 10 stratified splits; a user's own graph."""

GRAPH = replace(FACEBOOK, data_root=Path("data"), eval_every=1)
"""A graph of the user's own, with the library's default shape: ``python -m experiments.train graph --data-root FILE``.

It starts as the dense model. SAGE on facebook with its class swapped has 93.5 %, the dense one 93.3, n = 5
(``python -m experiments.benchmark swap --rows facebook-sage``).
"""

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
