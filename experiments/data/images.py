"""Images as tasks: torchvision's sets, folders, and your own function's. Shapes: N images, C channels, S x S pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from experiments.config import ImageSetConfig
from experiments.data.graph_data import Split, Splits
from experiments.data.task import Batch, Shard, Task, image_task
from vision import ImageData, ImageSource, MemoryImages, batches, load_images, make_augment, split_images

VAL_SHARE = 0.1
"""Share of the training images that validate, of each class, where the data have none of their own."""


def image_set(config: ImageSetConfig) -> Task:
    """``cifar10``, ``cifar100``, ``imagenette``, or ``images``, a folder of your own: :func:`vision.load_images`."""
    data = load_images(config.dataset, config.data_root, image_size=config.image_size, offline=config.offline)
    return _task(data, config)


@dataclass(frozen=True)
class ImageBatches:
    """The batches of a data set of images."""

    data: ImageData
    parts: dict[Split, tuple[ImageSource, Tensor]]
    config: ImageSetConfig

    def __call__(self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        source, index = self.parts[part]
        augment = make_augment(self.config.augment, source.image_size) if part == "train" else None
        drawn = batches(
            source, index, batch_size, mean=self.data.mean, std=self.data.std, augment=augment, seed=seed,
            workers=self.config.workers, shard=shard,
        )  # fmt: skip
        for images, labels in drawn:
            yield Batch((images,), labels)


def _task(data: ImageData, config: ImageSetConfig) -> Task:
    """A part of the training images validates where the data have no others; the test images are read once."""
    train, val = torch.arange(len(data.train.labels)), data.val
    if val is None:
        train, held_out = split_images(data.train.labels, VAL_SHARE, seed=0)
    else:
        held_out = torch.arange(len(val.labels))
    split: Splits = {"train": train, "val": held_out, "test": torch.arange(len(data.test.labels))}
    sources: dict[Split, ImageSource] = {"train": data.train, "val": val or data.train, "test": data.test}
    print(f"{data.name}: {' + '.join(str(len(rows)) for rows in split.values())} images; {data.note}", flush=True)
    for part, rows in split.items():
        seen = set(sources[part].labels[rows].tolist())
        if not seen or (part == "train" and len(seen) < 2):
            raise ValueError(f"{data.name}: {part} has images of {len(seen)} classes, expected two or more")
        missing = [name for label, name in enumerate(data.classes) if label not in seen]
        if missing:
            print(f"{data.name}: {part} has no image of {len(missing)} classes: {', '.join(missing[:5])}", flush=True)
    return image_task(
        config.label_smoothing,
        split,
        data.classes,
        name=data.name,
        in_channels=data.train.image_size,
        loader=ImageBatches(data, {part: (sources[part], rows) for part, rows in split.items()}, config),
        mean=data.mean,
        std=data.std,
    )


def own_images(found: Any, name: str, config: ImageSetConfig) -> Task:
    """A task of images that a user's function made.

    It gives ``(train, test)`` or ``(train, val, test)``, each a torch ``Dataset`` of (image, class), or a pair of
    images (N, C, S, S), C = 1 or 3, and classes (N,). Images are uint8 or PIL's, which are standardized over the
    training images, or floats, which the model sees as they are. All are kept in memory.
    """
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise ValueError(
            f"data: got a {type(found).__name__} for {config.dataset}, expected (train, test) or (train, val, test), "
            "each a Dataset of (image, class), or (images, labels)"
        )
    names = ("train", "test") if len(found) == 2 else ("train", "val", "test")
    parts = {part: _images(f"data: {part}", value) for part, value in zip(names, found, strict=True)}
    images, labels = parts["train"]
    channels, classes = images.size(1), int(labels.max()) + 1
    for part, (others, numbers) in parts.items():
        if others.shape[1:] != images.shape[1:] or others.dtype != images.dtype:
            raise ValueError(f"data: {part} has images of another size or type than train, expected one")
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
            raise ValueError(f"data: {part} has labels that train has not, expected 0 to {classes - 1}")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if images.dtype == torch.uint8:
        flat = images.transpose(0, 1).reshape(channels, -1).double() / 255
        mean, std = tuple(flat.mean(dim=1).tolist()), tuple(flat.std(dim=1).clamp(min=1e-6).tolist())
    elif config.augment == "randaugment":
        raise ValueError("augment: got 'randaugment' for images of floats, expected 'standard', or uint8 images")
    size = config.image_size or images.size(-1)
    sources: dict[str, Any] = {part: MemoryImages(*pair, size) for part, pair in parts.items()}
    shown = tuple(map(str, getattr(found[0], "classes", range(classes))))[:classes]
    return _task(ImageData(name=name, classes=shown, mean=mean, std=std, note="by your function", **sources), config)


def _images(where: str, found: Any) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) images, uint8 or float32, and (N,) classes."""
    if isinstance(found, Sequence) and len(found) == 2 and isinstance(found[0], Tensor | np.ndarray):
        images, labels = (torch.as_tensor(value) for value in found)
    elif isinstance(found, Dataset | Sequence):
        data: Any = found
        pairs = [data[row] for row in range(len(data))]
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"{where} has other items than (image, class)")
        tensors = [_tensor(image) for image, _ in pairs]
        if len({image.shape for image in tensors}) != 1:
            raise ValueError(f"{where} has no images, or images of several sizes, expected one size")
        images, labels = torch.stack(tensors), torch.tensor([int(label) for _, label in pairs])
    else:
        raise ValueError(
            f"{where} is a {type(found).__name__}, expected a Dataset of (image, class) or (images, labels)"
        )
    images = images.float() if images.is_floating_point() else images
    square = images.dim() == 4 and len(images) > 0 and images.size(1) in (1, 3) and images.size(2) == images.size(3)
    if not square or images.dtype not in (torch.uint8, torch.float32) or not images.isfinite().all():
        raise ValueError(
            f"{where} has images {images.dtype} {tuple(images.shape)}, expected uint8 or finite float (N, 1 or 3, S, S)"
        )
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{where} has labels {labels.dtype} {tuple(labels.shape)}, expected an integer an image")
    return images, labels.long()


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Image):
        return F.pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return torch.as_tensor(image)
