"""The presets: one frozen configuration a data set. `python -m experiments.train NAME` runs one."""

from __future__ import annotations

from dataclasses import replace

from experiments.config import TrainConfig

DIGITS = TrainConfig(
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

DIGITS_GRAPH = TrainConfig(dataset="digits-graph", hidden=32, layers=2, epochs=100, seeds=(0, 1, 2))
"""The same digits as nodes of a symmetric 10-nearest-neighbour graph; a 2-layer GCN.

``python -m experiments.train digits-graph --router NAME``, about 2 s a seed on one core (Xeon, AVX-512). Seeds 0 to 2:
dense 98.6 ± 0.1, token choice 98.4 ± 0.4 % (results/digits-graph.json).
"""

MOSAIC = TrainConfig(
    dataset="mosaic",
    conv="sage",
    hidden=16,
    layers=2,
    jk="last",
    residual="none",
    epochs=150,
    seeds=(0, 1, 2, 3, 4),
)
"""8 planted regions, in each of which a neighbour's class means something else; a 2-layer SAGE, and a linear output.

``python -m experiments.sweep mosaic``, about 6 s a seed and arm on one core (Xeon, AVX-512). Seeds 5 to 9: dense
84.6 ± 1.9, k-means centroids with shared routing 94.4 ± 0.7, oracle 93.9 ± 0.2 % (results/mosaic.json).
"""

CORA = TrainConfig(
    dataset="cora",
    route_on="input",
    hidden=16,
    layers=2,
    residual="none",
    dropout=0.5,
    epochs=200,
    weight_decay=5e-4,
    seeds=tuple(range(10)),
)
"""Cora, public split; nearly the recipe of the GCN paper (Kipf & Welling, 2017), which decays the first layer only.

``python -m experiments.train cora --router dense --data-root DIR``, about 4 s a seed on one core (Xeon, AVX-512). Seeds
0 to 9: dense 81.5 ± 0.8 %. With experts this narrow model does worse: token choice at E = 8, K = 1 has 78 % (2 seeds).
"""

CITESEER = replace(CORA, dataset="citeseer")
"""CiteSeer, public split; the recipe of Cora.

``python -m experiments.train citeseer --router dense --data-root DIR``. Seeds 0 to 9: dense 70.9 ± 0.8 %.
"""

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": ("Handwritten digits (8x8) as images; a 4-block ViT.", DIGITS),
    "digits-graph": ("The same digits as nodes of a 10-nearest-neighbour graph; a 2-layer GCN.", DIGITS_GRAPH),
    "mosaic": ("8 planted regions, in each of which a neighbour's class means something else; a 2-layer SAGE.", MOSAIC),
    "cora": ("Cora, public split; a 2-layer GCN.", CORA),
    "citeseer": ("CiteSeer, public split; a 2-layer GCN.", CITESEER),
}
"""What the command line offers: a line of help, and the configuration."""
