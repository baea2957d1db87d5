"""One epoch of a source, in batches. Shapes: B images, C classes, S height and width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision.augment import Augment, Channels, Mix, normalize
from vision.sources import ImageSource


def batches(
    source: ImageSource,
    index: Tensor,
    batch_size: int,
    *,
    mean: Channels,
    std: Channels,
    augment: Augment | None = None,
    mix: Mix | None = None,
    seed: int | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images ``index`` once, in batches; the last one may be smaller.

    With a seed they are shuffled and augmented, and all of that follows from the seed, whatever ``workers``, ``shard``
    and torch's global generator, which stays as it was. Without, they come in order, neither augmented nor mixed.

    Args:
        source: of images and labels.
        index: int64, the images of the epoch.
        batch_size: B.
        mean, std: see :func:`vision.augment.normalize`.
        augment: changes each image, see :func:`vision.augment.make_augment` (default: none).
        mix: mixes the images of a batch, see :func:`vision.augment.make_mix` (default: none).
        seed: of the epoch (default ``None``).
        workers: processes that make batches ahead; 0, the default, makes them here, when they are asked for.
        shard: (r, W): of each batch the r-th of W slices, as even as can be, the first ones larger; the last batch's
            may be empty (default: all).

    Returns:
        an iterator over (images (B, C, S, S) float32, labels (B,) int64, or (B, C) float32 where they are mixed).

    Raises:
        ValueError: a batch size below 1, workers below 0, or an index that is not (n,) int64 within the source; while
            iterating, an image that cannot be read, by its name.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if workers < 0:
        raise ValueError(f"workers: got {workers}, expected at least 0")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index: got {index.dtype} of shape {tuple(index.shape)}, expected int64 (n,)")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(source):
        got = f"{int(index.min())}..{int(index.max())}"
        raise ValueError(f"index: got numbers in {got}, expected them in 0..{len(source) - 1}")
    image_seeds = batch_seeds = []
    if seed is None:
        augment = mix = None
    else:
        generator = torch.Generator().manual_seed(seed)
        index = index[torch.randperm(len(index), generator=generator)]
        batch_seeds = torch.randint(2**62, (-(-len(index) // batch_size),), generator=generator).tolist()
        image_seeds = torch.randint(2**62, (len(index),), generator=generator).tolist()
    epoch = _Epoch(source, index, batch_size, mean, std, augment, mix, image_seeds, batch_seeds, shard)
    return _ahead(epoch, workers) if workers else (epoch.batch(number) for number in range(len(epoch)))


@dataclass(frozen=True, eq=False)
class _Epoch(Dataset[tuple[Tensor, Tensor] | ValueError | OSError]):
    source: ImageSource
    index: Tensor
    batch_size: int
    mean: Channels
    std: Channels
    augment: Augment | None
    mix: Mix | None
    image_seeds: list[int]
    batch_seeds: list[int]
    shard: tuple[int, int]

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | ValueError | OSError:
        try:
            return self.batch(number)
        except (
            ValueError,
            OSError,
        ) as error:  # as a value: DataLoader would bury it in the text of a worker's traceback
            return error

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        whole = torch.arange(len(self.index))[number * self.batch_size : (number + 1) * self.batch_size]
        rank, world = self.shard
        places = whole.tensor_split(world)[rank]
        halo = self.mix is not None and world > 1
        if halo:  # an image is mixed with the one before it, the first with the last
            before = int(places[0] - whole[0]) - 1 if len(places) else -1
            places = torch.cat([whole[before].view(1), places])
        rows = self.index[places]
        images, labels = self.source.get(rows), self.source.labels[rows]
        seed = torch.default_generator.manual_seed  # torch.manual_seed would seed GPUs as well
        with torch.random.fork_rng(devices=[]):
            if self.augment is not None and len(images):
                changed = []
                for place, image in zip(places.tolist(), images, strict=True):
                    seed(self.image_seeds[place])
                    changed.append(self.augment(image))
                images = torch.stack(changed)
            images = normalize(images, self.mean, self.std)
            if self.mix is not None:
                seed(self.batch_seeds[number])
                images, labels = self.mix(images, labels)
        return (images[1:], labels[1:]) if halo else (images, labels)


def _ahead(epoch: _Epoch, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # a generator of its own: DataLoader would draw from the global one
    loader = DataLoader(epoch, batch_size=None, num_workers=workers, generator=torch.Generator())
    for made in loader:
        if isinstance(made, ValueError | OSError):
            raise made
        images, labels = made
        yield images, labels
