"""One epoch of images, augmented, in batches. Shapes: B images, C channels, S height and width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vision.sources import ImageSource

AugmentKind = Literal["none", "standard"]
Augment = Callable[[Tensor], Tensor]
"""Of one image, (C, S, S); random by torch's own generator only."""
RESIZED_FROM = 64
"""Image size from which the standard augmentation is a random resized crop."""


def make_augment(kind: AugmentKind, image_size: int) -> Augment | None:
    """What is done to each training image; ``None`` for ``"none"``.

    Call it for each image: v2 draws its random numbers once a call, and would change all images of
    a tensor alike.

    Args:
        kind: ``"none"``; ``"standard"``: a crop after padding by S // 8 (from 64 pixels on, a crop
            of 35 to 100 % of the area, resized), and a horizontal flip.
        image_size: S.
    """
    if kind == "none":
        return None
    crop: v2.Transform = v2.RandomCrop(image_size, padding=image_size // 8)
    if image_size >= RESIZED_FROM:
        crop = v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


@dataclass(frozen=True, eq=False)
class Epoch(Dataset[tuple[Tensor, Tensor] | Exception]):
    """The batches of one epoch, by number."""

    source: ImageSource
    rows: list[Tensor]
    """Of each batch, those of this process."""
    seeds: list[Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | Exception:
        rows = self.rows[number]
        try:
            images = self.source.get(rows)
        except (
            ValueError
        ) as error:  # as a value: DataLoader would bury it in the text of a worker's traceback
            return error
        if self.augment is not None and len(images):
            changed = []
            with torch.random.fork_rng(devices=[]):
                for image, seed in zip(images, self.seeds[number].tolist(), strict=True):
                    # Torch.manual_seed would seed GPUs as well
                    torch.default_generator.manual_seed(seed)
                    changed.append(self.augment(image))
            images = torch.stack(changed)
        # Floats stay as they are
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
        return v2.functional.normalize(images, list(self.mean), list(self.std)), self.source.labels[
            rows
        ]


def batches(
    source: ImageSource,
    index: Tensor,
    batch_size: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None = None,
    seed: int | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images ``index`` once, in batches; the last one may be smaller.

    With a seed they are shuffled and augmented. All of that follows from the seed, whatever
    ``workers`` and ``shard`` are, and torch's global generator stays as it was. Without a seed they
    come in order, as they are.

    Args:
        source: of images and labels.
        index: int64, the images of the epoch.
        batch_size: B.
        mean, std: a channel; values in 0..1, or floats as they are, less ``mean``, by ``std``.
        augment: changes each image, see :func:`make_augment` (default: none).
        seed: of the epoch (default ``None``).
        workers: processes that make batches ahead; 0, the default, makes each batch here, when it
            is asked for.
        shard: (r, W) for the r-th of W slices of each batch. Slices are as even as possible, and
            the first ones are larger; those of the last batch may be empty (default: all).

    Returns:
        an iterator over (images (B, C, S, S) float32, labels int64, (B,) or (B, 2)).

    Raises:
        ValueError: while iterating, an image that cannot be read, by its name.
    """
    seeds = index
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        index = index[torch.randperm(len(index), generator=generator)]
        # Committed results were drawn after a seed for each batch
        unused = -(-len(index) // batch_size)
        seeds = torch.randint(2**62, (unused + len(index),), generator=generator)[unused:]
    rank, world = shard
    rows, image_seeds = (
        [part.tensor_split(world)[rank] for part in each.split(batch_size)]
        for each in (index, seeds)
    )
    epoch = Epoch(source, rows, image_seeds, mean, std, augment if seed is not None else None)
    # a generator of its own: DataLoader would draw from the global one
    for made in DataLoader(
        epoch, batch_size=None, num_workers=workers, generator=torch.Generator()
    ):
        if isinstance(made, Exception):
            raise made
        images, labels = made
        yield images, labels
