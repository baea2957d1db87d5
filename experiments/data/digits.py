"""scikit-learn's 1,797 handwritten digits (8x8, 10 classes; UCI, CC BY 4.0), as images and as a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import kneighbors_graph
from torch import Tensor
from torch_geometric.data import Data

from experiments.config import ImageConfig, RunConfig
from experiments.data.graph_data import GraphData, Split, Splits, make_metric
from experiments.data.task import Batch, Shard, Task, image_task


def _split(labels: np.ndarray) -> Splits:
    """A fixed stratified split, 50 / 25 / 25."""
    everything = np.arange(len(labels))
    train, rest = train_test_split(everything, train_size=0.5, stratify=labels, random_state=0)
    val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=0)
    return {"train": torch.from_numpy(train), "val": torch.from_numpy(val), "test": torch.from_numpy(test)}


@dataclass(frozen=True)
class DigitBatches:
    """The images in batches."""

    images: Tensor
    labels: Tensor
    split: Splits

    def __call__(self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        rank, world = shard
        index = self.split[part]
        if seed is not None:
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
        for whole in index.split(batch_size):
            rows = whole.tensor_split(world)[rank]
            yield Batch((self.images[rows],), self.labels[rows])


def digits(config: ImageConfig) -> Task:
    """The digits as images of one channel, standardized over the training set."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16.0
    split = _split(data.target)
    train = images[split["train"]]
    mean, std = float(train.mean()), float(train.std())
    return image_task(
        config.label_smoothing,
        split,
        tuple(map(str, data.target_names)),
        name="digits",
        in_channels=8,
        loader=DigitBatches((images - mean) / std, torch.from_numpy(data.target).long(), split),
        mean=(mean,),
        std=(std,),
    )


def digits_graph(config: RunConfig) -> GraphData:
    """The digits as nodes: an edge, in both directions, where either is among the other's 10 nearest neighbors."""
    data = load_digits()
    near = kneighbors_graph(data.data, n_neighbors=10, include_self=False)
    source, destination = near.maximum(near.T).nonzero()
    edge_index = torch.from_numpy(np.stack([source, destination])).long()
    x = torch.from_numpy(data.data).float() / 16.0
    split = _split(data.target)
    return GraphData(
        name="digits-graph",
        data=Data(x=x, edge_index=edge_index, y=torch.from_numpy(data.target).long()),
        splits=lambda _: split,
        metric=make_metric("accuracy", 10),
        metric_name="accuracy",
        num_outputs=10,
    )
