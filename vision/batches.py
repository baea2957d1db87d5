"""One epoch of images, augmented, in batches. Shapes: B images, C channels, S height and width."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision.data import Images
from vision.transforms import Transform


@dataclass(frozen=True, eq=False)
class Epoch(Dataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch, by number.

    What is random about an image, and about a batch, follows from its seed alone: neither the
    workers nor where a run was stopped change it.
    """

    images: Images
    transform: Transform
    mixup: Mixup | None
    rows: list[Tensor]
    """Of each batch, those of this process."""
    seeds: list[Tensor]
    """Of each image of them."""
    batch_seeds: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rows, labels = self.rows[number], self.images.labels[self.rows[number]]
        # A process without an image makes one, and drops it: it needs the shape
        drawn = list(zip(rows.tolist(), self.seeds[number].tolist(), strict=True)) or [(0, 0)]
        made = []
        with generators_kept():
            for row, seed in drawn:
                seed_all(seed)
                made.append(self.transform(self.images[row]))
            images = torch.stack(made)[: len(rows)]
            if self.mixup is None:
                return images, labels
            seed_all(self.batch_seeds[number])
            # timm mixes an even number of images, the first with the last
            odd = len(rows) % 2
            images = torch.cat([images, images[:odd]])
            mixed, shares = self.mixup(images, torch.cat([labels, labels[:odd]]))
        return mixed[: len(rows)], shares[: len(rows)]


def seed_all(seed: int) -> None:
    """Seed the three generators that torchvision's and timm's transforms draw from."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave these generators as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def batches(
    images: Images,
    index: Tensor,
    batch_size: int,
    transform: Transform,
    *,
    mixup: Mixup | None = None,
    seed: int | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images ``index`` once, in batches; the last one may be smaller.

    All follows from the seed, whatever ``workers`` and ``shard`` are (but that only images of one
    shard are mixed), and the global generators stay as they were.

    Args:
        images: and their labels.
        index: int64, the images of the epoch.
        batch_size: B.
        transform: changes each image.
        mixup: changes each batch (default: none).
        seed: of the epoch; ``None``, the default, takes the images in order.
        workers: processes that make batches ahead; 0, the default, makes each batch here, when it
            is asked for.
        shard: (r, W) for the r-th of W slices of each batch. Slices are as even as possible, and
            the first ones are larger; those of the last batch may be empty (default: all).

    Returns:
        an iterator over (images (B, C, S, S) float32, labels int64, (B,) or (B, 2)); of mixed
        images, labels are (B, classes) float32.

    Raises:
        ValueError: while iterating, an image that cannot be read, by its name.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    if seed is not None:
        index = index[torch.randperm(len(index), generator=generator)]
    number = -(-len(index) // batch_size)
    seeds = torch.randint(2**62, (number + len(index),), generator=generator)
    batch_seeds, image_seeds = seeds.tensor_split([number])
    rank, world = shard
    rows, row_seeds = (
        [part.tensor_split(world)[rank] for part in each.split(batch_size)]
        for each in (index, image_seeds)
    )
    epoch = Epoch(images, transform, mixup, rows, row_seeds, batch_seeds.tolist())
    # A generator of its own: DataLoader would draw from the global one
    yield from DataLoader(epoch, batch_size=None, num_workers=workers, generator=torch.Generator())
