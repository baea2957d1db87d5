"""mosaic: the one data set on which the right routing is known. Frozen: figures in results/ depend on every draw."""

from __future__ import annotations

import numpy as np
import torch
from torch_geometric.data import Data

from experiments.config import RunConfig
from experiments.data.graph_data import GraphData, make_metric

NODES, REGIONS, CLASSES, FEATURES, EDGES = 8_000, 8, 16, 32, 80_000


def mosaic(config: RunConfig) -> GraphData:
    """8,000 nodes in 8 regions; a neighbor's class tells a node's own, by a permutation that each region has.

    Features are class center N(0, 1) + 3 x region center N(0, 1) + 3 x N(0, 1) noise. The 80,000 directed edges lie
    inside a region; the source's class is the region's permutation (the identity in region 0) of the destination's,
    or in 15 % of the edges a random one. Split 50 / 25 / 25. ``planted`` is the region.
    """
    rng = np.random.RandomState(0)  # its streams are frozen, unlike those of numpy's newer generators
    region = rng.permutation(np.arange(NODES) % REGIONS)
    label = rng.randint(CLASSES, size=NODES)
    class_center = rng.standard_normal((CLASSES, FEATURES))
    region_center = rng.standard_normal((REGIONS, FEATURES))
    x = class_center[label] + 3 * region_center[region] + 3 * rng.standard_normal((NODES, FEATURES))

    permutation = np.stack([np.arange(CLASSES), *(rng.permutation(CLASSES) for _ in range(REGIONS - 1))])
    destination = rng.randint(NODES, size=EDGES)
    source_label = permutation[region[destination], label[destination]]
    stray = rng.uniform(size=EDGES) < 0.15
    source_label[stray] = rng.randint(CLASSES, size=int(stray.sum()))
    source = np.empty(EDGES, dtype=np.int64)
    for r in range(REGIONS):
        for c in range(CLASSES):
            wanted = (region[destination] == r) & (source_label == c)
            source[wanted] = rng.choice(np.flatnonzero((region == r) & (label == c)), size=int(wanted.sum()))

    order = torch.from_numpy(rng.permutation(NODES))
    train, val, test = order.split([NODES // 2, NODES // 4, NODES // 4])
    data = Data(
        x=torch.from_numpy(x).float(),
        edge_index=torch.from_numpy(np.stack([source, destination])).long(),
        y=torch.from_numpy(label).long(),
    )
    return GraphData(
        name="mosaic",
        data=data,
        splits=lambda _: {"train": train, "val": val, "test": test},
        metric=make_metric("accuracy", CLASSES),
        metric_name="accuracy",
        num_outputs=CLASSES,
        planted=torch.from_numpy(region).long(),
    )
