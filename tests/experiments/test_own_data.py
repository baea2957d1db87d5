"""One's own data from Python: ``--data package.module:function``, of graphs, heterogeneous graphs and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData
from torchvision.datasets import FakeData

from experiments.config import GraphConfig, HeteroConfig, ImageConfig
from experiments.data.images import own_images
from experiments.data.own_graph import own_object
from experiments.train import main
from tests.experiments.user_data import arrays, as_data

GRAPH, HETERO = GraphConfig(dataset="graph"), HeteroConfig(dataset="hetero")
IMAGES = ImageConfig(dataset="images")
SIZES = ["--layers", "2", "--hidden", "8", "--experts", "2", "--epochs", "1", "--seeds", "0", "--no-progress"]


def make_graph() -> Data:
    return as_data(arrays())


def make_hetero(**more: Any) -> HeteroData:
    """40 papers with labels, and 10 authors without features."""
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["paper"].x, data["paper"].y = torch.randn(40, 3, generator=generator), torch.arange(40) % 3
    data["author"].num_nodes = 10
    ends = torch.stack([torch.randint(size, (60,), generator=generator) for size in (10, 40)])
    data["author", "writes", "paper"].edge_index = ends
    for name, value in more.items():
        data["paper"][name] = value
    return data


def make_images(count: int = 24, channels: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 3


def make_parts() -> Any:
    return make_images(), make_images(9)


@pytest.mark.parametrize(
    ("preset", "function", "args"),
    [
        ("graph", "make_graph", []),
        ("hetero", "make_hetero", []),
        ("images", "make_parts", ["--patch", "4", "--dim", "8", "--vit-heads", "2", "--batch-size", "8"]),
    ],
)
def test_command_line(preset: str, function: str, args: list[str], tmp_path: Path) -> None:
    name = f"tests.experiments.test_own_data:{function}"
    main([preset, "--data", name, "--out", str(tmp_path / "run"), *SIZES, *args])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"]["data"] == name
    assert 0 <= summary["test"]["mean"] <= 1


def test_a_heterogeneous_graph() -> None:
    graph = own_object(make_hetero(), HETERO)
    assert (graph.target, graph.num_outputs) == ("paper", 3)
    assert graph.data.node_types == ["paper", "author"]
    assert [len(part) for part in graph.splits(0).values()] == [24, 8, 8]
    part = torch.arange(40) % 3
    masks = {f"{name}_mask": part == i for i, name in enumerate(("train", "val", "test"))}
    graph = own_object(make_hetero(**masks), HETERO)
    assert graph.splits(5)["val"].tolist() == (part == 1).nonzero().view(-1).tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_standardized_over_training(channels: int) -> None:
    task = own_images((make_images(40, channels), make_images(9, channels)), IMAGES)
    sizes = {part: sum(len(batch.target) for batch in task.loader(part, 8, None)) for part in ("train", "val", "test")}
    assert sizes == {"train": 37, "val": 3, "test": 9}
    seen = torch.cat([batch.inputs[0] for part in ("train", "val") for batch in task.loader(part, 8, None)])
    assert seen.shape == (40, channels, 8, 8)
    torch.testing.assert_close(seen.mean(dim=(0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(dim=(0, 2, 3)), torch.ones(channels), atol=1e-2, rtol=0)


def test_floats_are_seen_as_they_are_and_val_is_taken() -> None:
    images, labels = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    parts = [(images[rows].numpy(), labels[rows].numpy()) for rows in (slice(6), slice(6, 9), slice(9, 12))]
    (batch,) = own_images(parts, IMAGES).loader("val", 8, None)
    torch.testing.assert_close(batch.inputs[0], images[6:9].float())


def test_datasets_of_pil_images() -> None:
    fake = FakeData(30, (3, 16, 16), 4)
    fake.classes = list("abcd")
    task = own_images((fake, fake), ImageConfig(dataset="images", image_size=8))
    assert (task.classes, task.in_channels) == (("a", "b", "c", "d"), 8)
    assert next(iter(task.loader("test", 8, None))).inputs[0].shape == (8, 3, 8, 8)


@pytest.mark.parametrize(
    ("found", "config", "message"),
    [
        (3, GRAPH, "data: got a int for graph, expected a Data"),
        (make_hetero(), GRAPH, "data: got a HeteroData for graph"),
        (HeteroData(), HETERO, "hetero: got y of no node type"),
        (make_hetero(train_mask=torch.ones(40)), HETERO, "hetero: got no val_mask, test_mask"),
        (make_graph(), IMAGES, r"data: got a Data for images, expected \(train, test\)"),
        ((make_images(3), make_images(9)), IMAGES, "images: got images of 0 classes in val"),
        (make_images(), IMAGES, "data: train is a Tensor that cannot be taken"),
        ((FakeData(0), FakeData(0)), IMAGES, "data: train is a FakeData that cannot be taken"),
        ((make_images(), make_images(9, size=6)), IMAGES, "data: test: got images of another size"),
        ((make_images(6, 2), make_images(6, 2)), IMAGES, r"data: train: got images .*\(6, 2, 8, 8\)"),
        ((make_images(), (make_images(9)[0], torch.full((9,), 3))), IMAGES, "data: test: got labels that train"),
        (((make_images()[0], np.ones(24)), make_images()), IMAGES, "data: train: got labels torch.float64"),
    ],
)
def test_anything_else_is_refused_by_name(found: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        (own_images if config is IMAGES else own_object)(found, config)
