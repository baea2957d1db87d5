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
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images ``index`` once, in batches; the last one may be smaller.

    With a seed they are shuffled and augmented, and all of that follows from the seed, whatever ``workers`` and torch's
    global generator, which stays as it was. Without, they come in order, neither augmented nor mixed.

    Args:
        source: of images and labels.
        index: int64, the images of the epoch.
        batch_size: B.
        mean, std: see :func:`vision.augment.normalize`.
        augment: changes each image, see :func:`vision.augment.make_augment` (default: none).
        mix: mixes the images of a batch, see :func:`vision.augment.make_mix` (default: none).
        seed: of the epoch (default ``None``).
        workers: processes that make batches ahead; 0, the default, makes them here, when they are asked for.

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
    seeds = None
    if seed is None:
        augment = mix = None
    else:
        generator = torch.Generator().manual_seed(seed)
        index = index[torch.randperm(len(index), generator=generator)]
        seeds = torch.randint(2**62, (-(-len(index) // batch_size),), generator=generator).tolist()
    epoch = _Epoch(source, index, batch_size, mean, std, augment, mix, seeds)
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
    seeds: list[int] | None

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
        rows = self.index[number * self.batch_size : (number + 1) * self.batch_size]
        images, labels = self.source.get(rows), self.source.labels[rows]
        with torch.random.fork_rng(devices=[]):
            if self.seeds is not None:
                torch.default_generator.manual_seed(self.seeds[number])  # torch.manual_seed would seed GPUs as well
            if self.augment is not None:
                images = torch.stack([self.augment(image) for image in images])
            images = normalize(images, self.mean, self.std)
            return (images, labels) if self.mix is None else self.mix(images, labels)


def _ahead(epoch: _Epoch, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    # a generator of its own: DataLoader would draw from the global one
    loader = DataLoader(epoch, batch_size=None, num_workers=workers, generator=torch.Generator())
    for made in loader:
        if isinstance(made, ValueError | OSError):
            raise made
        images, labels = made
        yield images, labels
