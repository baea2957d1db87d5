"""One epoch of images, augmented, in batches. Shapes: B images, C channels, S height and width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vision.augment import Augment
from vision.sources import ImageSource, View

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a batch of images and their classes, which become probabilities of classes."""


@dataclass(frozen=True, eq=False)
class Epoch(Dataset[tuple[Tensor, Tensor] | Exception]):
    """The batches of one epoch, by number."""

    source: ImageSource
    view: View
    rows: list[Tensor]
    """Of each batch, those of this process."""
    seeds: list[Tensor]
    """Of each image of them."""
    batch_seeds: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None
    mix: Mix | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | Exception:
        rows = self.rows[number]
        labels = self.source.labels[rows]
        try:
            if self.augment is not None and len(rows):
                images = self.augment(self.source, rows, self.seeds[number], self.normalized)
            else:
                images = self.normalized(self.source.get(rows, self.view))
        except (
            ValueError
        ) as error:  # as a value: DataLoader would bury it in the text of a worker's traceback
            return error
        if self.mix is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.batch_seeds[number])
                images, labels = self.mix(images, labels if labels.dim() == 1 else labels[:, 0])
        return images, labels

    def normalized(self, images: Tensor) -> Tensor:
        """Floats; those that are floats stay as they are before."""
        images = v2.functional.to_dtype(images, torch.float32, scale=True)
        return v2.functional.normalize(images, list(self.mean), list(self.std))


def batches(
    source: ImageSource,
    index: Tensor,
    batch_size: int,
    *,
    view: View,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None = None,
    mix: Mix | None = None,
    seed: int | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images ``index`` once, in batches; the last one may be smaller.

    With a seed they are shuffled, augmented and mixed. All of that follows from the seed, whatever
    ``workers`` and ``shard`` are (but that only images of one shard are mixed), and torch's global
    generator stays as it was. Without a seed they come in order, as they are.

    Args:
        source: of images and labels.
        index: int64, the images of the epoch.
        batch_size: B.
        view: how images become squares, where ``augment`` does not do it.
        mean, std: a channel; values in 0..1, or floats as they are, less ``mean``, by ``std``.
        augment: changes each image, see :func:`vision.augment.make_augment` (default: none).
        mix: changes each batch, see :func:`vision.augment.make_mix` (default: none).
        seed: of the epoch (default ``None``).
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
    seeds = index
    batch_seeds = index[:0]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        index = index[torch.randperm(len(index), generator=generator)]
        number = -(-len(index) // batch_size)
        seeds = torch.randint(2**62, (number + len(index),), generator=generator)
        batch_seeds, seeds = seeds.tensor_split([number])
    rank, world = shard
    rows, image_seeds = (
        [part.tensor_split(world)[rank] for part in each.split(batch_size)]
        for each in (index, seeds)
    )
    epoch = Epoch(
        source,
        view,
        rows,
        image_seeds,
        batch_seeds.tolist(),
        mean,
        std,
        augment if seed is not None else None,
        mix if seed is not None else None,
    )
    # a generator of its own: DataLoader would draw from the global one
    for made in DataLoader(
        epoch, batch_size=None, num_workers=workers, generator=torch.Generator()
    ):
        if isinstance(made, Exception):
            raise made
        images, labels = made
        yield images, labels
