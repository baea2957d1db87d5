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
from vision.batches import batches
from vision.data import Images
from vision.recipe import Recipe
from vision.transforms import eval_transform, make_mixup, train_transform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
PLAIN = eval_transform(16, Recipe(), MEAN, STD)
RECIPE = Recipe(scale=(0.3, 1.0), aa="rand-m9-mstd0.5-inc1", reprob=0.5, mixup=0.4, cutmix=1.0)
RANDOM: dict[str, Any] = {
    "transform": train_transform("none", 16, RECIPE, MEAN, STD),
    "mixup": make_mixup(RECIPE, 11),
    "seed": 3,
}


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """Eleven, each of its own class."""
    paths = [write_photo(tmp_path / f"{number}.png", (16, 16), seed=number) for number in range(11)]
    return Images(list(map(str, paths)), torch.arange(11), 16)


def epoch(
    images: Images, index: Tensor | None = None, transform: Any = PLAIN, **kwargs: Any
) -> list[tuple[Tensor, Tensor]]:
    index = torch.arange(11) if index is None else index
    return list(batches(images, index, 4, transform, **kwargs))


def test_without_a_seed_in_order_and_unchanged(images: Images) -> None:
    for workers in (0, 2):
        found = epoch(images, torch.tensor([10, 2, 3, 3, 0]), workers=workers)
        assert [labels.tolist() for _, labels in found] == [[10, 2, 3, 3], [0]]
        for seen, number in zip(torch.cat([x for x, _ in found]), (10, 2, 3, 3, 0), strict=True):
            assert seen.equal(PLAIN(images[number]))


def test_with_a_seed_everything_once_shuffled(images: Images) -> None:
    index = torch.tensor([1, 3, 5, 7, 9])
    labels = torch.cat([labels for _, labels in epoch(images, index, seed=0)])
    assert labels.sort()[0].equal(index)
    assert not labels.equal(index)


def test_all_follows_from_the_seed_whatever_the_workers(images: Images) -> None:
    """With RandAugment, mixup and CutMix; the last batch is odd, which timm does not mix."""
    first = epoch(images, **RANDOM)
    assert [tuple(labels.shape) for _, labels in first] == [(4, 11), (4, 11), (3, 11)]
    for workers in (0, 2):
        torch.manual_seed(1)
        again = epoch(images, **RANDOM, workers=workers)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not first[0][0].equal(epoch(images, **RANDOM | {"seed": 4})[0][0])


def test_each_image_and_epoch_is_augmented_anew(images: Images) -> None:
    """Of one image only, so that shuffling cannot tell the epochs apart."""
    one = torch.zeros(8, dtype=torch.int64)
    how = RANDOM | {"mixup": None}
    first, second = epoch(images, one, **how)
    drawn = [*first[0], *second[0], *epoch(images, one, **how | {"seed": 4})[0][0]]
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == len(drawn)


def test_slices_of_processes_are_those_of_one(images: Images) -> None:
    """All that is random of an image, too; a process may have none of a batch."""
    how = RANDOM | {"mixup": None}
    slices = [epoch(images, **how, shard=(rank, 4)) for rank in range(4)]
    for number, (whole, labels) in enumerate(epoch(images, **how)):
        parts = [one[number] for one in slices]
        assert whole.equal(torch.cat([part for part, _ in parts]))
        assert labels.equal(torch.cat([part for _, part in parts]))
    assert slices[3][2][0].shape == (0, 3, 16, 16)


def test_the_global_generators_stay(images: Images) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    epoch(images, **RANDOM)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == str(states[2])  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_meanwhile_is_named(workers: int, images: Images) -> None:
    cut(Path(images.images[7]))
    with pytest.raises(ValueError, match=r"7\.png: cannot be read as an image"):
        epoch(images, workers=workers)
