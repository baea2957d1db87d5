"""Epochs: everything once, reproducible from the seed alone, the same with and without workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.made_images import cut, write_photo
from vision.augment import make_augment
from vision.batches import batches
from vision.recipe import Recipe
from vision.sources import FileImages, ImageSource, MemoryImages, View

MEAN = (0.4, 0.5, 0.6)
CONSTANTS: dict[str, Any] = {"view": View(16), "mean": MEAN, "std": (0.2, 0.3, 0.4)}
RANDOM: dict[str, Any] = {"augment": make_augment("standard", 16, Recipe(), MEAN), "seed": 3}


@pytest.fixture(scope="module", params=["memory", "files"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    root = tmp_path_factory.mktemp("photos")
    paths = [
        str(write_photo(root / f"{number}.png", (16, 16), seed=number)) for number in range(11)
    ]
    files = FileImages(paths, torch.arange(11))
    return (
        files
        if request.param == "files"
        else MemoryImages(files.get(torch.arange(11), View(16)), files.labels)
    )


def epoch(
    source: ImageSource, index: Tensor | None = None, **kwargs: Any
) -> list[tuple[Tensor, Tensor]]:
    return list(
        batches(source, torch.arange(11) if index is None else index, 4, **CONSTANTS, **kwargs)
    )


def assert_whole(found: list[tuple[Tensor, Tensor]], source: ImageSource) -> None:
    """The images that the labels say, normalized."""
    mean, std = (torch.tensor(CONSTANTS[name]).view(3, 1, 1) for name in ("mean", "std"))
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(images, (source.get(labels, View(16)).float() / 255 - mean) / std)


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_seed_in_order_and_unchanged(source: ImageSource, workers: int) -> None:
    found = epoch(
        source, torch.tensor([10, 2, 3, 3, 0]), **RANDOM | {"seed": None}, workers=workers
    )
    assert [labels.tolist() for _, labels in found] == [[10, 2, 3, 3], [0]]
    assert_whole(found, source)


def test_with_a_seed_everything_once_shuffled(source: ImageSource) -> None:
    index = torch.tensor([1, 3, 5, 7, 9])
    found = epoch(source, index, seed=0)
    labels = torch.cat([labels for _, labels in found])
    assert labels.sort()[0].equal(index)
    assert not labels.equal(index)
    assert_whole(found, source)


def test_all_follows_from_the_seed(source: ImageSource) -> None:
    torch.manual_seed(0)
    first = epoch(source, **RANDOM)
    torch.manual_seed(1)
    for again in (epoch(source, **RANDOM), epoch(source, **RANDOM, workers=2)):
        torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not first[0][0].equal(epoch(source, **RANDOM | {"seed": 4})[0][0])


def test_each_image_batch_and_epoch_is_augmented_anew(source: ImageSource) -> None:
    """Of one image only, so that shuffling cannot tell the epochs apart."""
    index = torch.zeros(8, dtype=torch.int64)
    assert epoch(source, index, seed=0)[0][0].equal(epoch(source, index, seed=1)[0][0])
    one, other = (epoch(source, index, **RANDOM | {"seed": seed}) for seed in (0, 1))
    images = torch.cat([images for images, _ in one])
    assert len({tuple(image.flatten().tolist()) for image in images}) > 4
    assert not one[0][0].equal(one[1][0])
    assert not one[0][0].equal(other[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_stay_as_they_were(source: ImageSource, workers: int) -> None:
    def states() -> tuple[list[int], Any, str]:
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002

    before = states()
    for seed in (None, 5):
        for _ in batches(
            source, torch.arange(11), 4, **CONSTANTS, **RANDOM | {"seed": seed}, workers=workers
        ):
            assert states() == before  # what runs between two batches too
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(workers: int, tmp_path: Path) -> None:
    paths = [write_photo(tmp_path / f"{number}.jpg", (16, 16)) for number in range(6)]
    cut(paths[5])
    source = FileImages([str(path) for path in paths], torch.arange(6))
    epochs = batches(source, torch.arange(6), 4, **CONSTANTS, workers=workers)
    assert len(next(epochs)[0]) == 4
    with pytest.raises(ValueError, match=rf"^{paths[5]}: cannot be read"):
        next(epochs)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_slices_of_the_same_batches(source: ImageSource, world: int) -> None:
    shards = [epoch(source, **RANDOM, shard=(rank, world)) for rank in range(world)]
    for whole, *parts in zip(epoch(source, **RANDOM), *shards, strict=True):
        assert torch.cat([images for images, _ in parts]).equal(whole[0])
        assert torch.cat([labels for _, labels in parts]).equal(whole[1])


def test_small_images_are_cropped_and_flipped() -> None:
    augment = make_augment("standard", 32, Recipe(), MEAN)
    assert augment is not None
    assert make_augment("none", 32, Recipe(), MEAN) is None
    torch.manual_seed(0)
    ramp = torch.arange(1, 33, dtype=torch.uint8).expand(3, 32, 32)  # of columns
    rows = torch.stack([augment.change(ramp)[0, 16] for _ in range(300)]).int()
    is_flipped = rows[:, 20] < rows[:, 10]
    shifts = torch.where(is_flipped[:, None], rows.flip(1), rows)[:, 16] - 17
    assert shifts.unique().tolist() == list(range(-4, 5))  # padding 32 // 8
    assert 110 < int(is_flipped.sum()) < 190
