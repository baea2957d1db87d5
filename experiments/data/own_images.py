"""Images of a user's own function: ``--data package.module:function``. Shapes: N images, C channels, S x S pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from experiments.config import ImageSetConfig
from experiments.data.images import image_set_task
from experiments.data.task import Task
from vision.images import ImageData
from vision.sources import MemoryImages


def own_images(found: Any, name: str, config: ImageSetConfig) -> Task:
    """A task of images that a user's function made.

    Args:
        found: ``(train, test)`` or ``(train, val, test)``, each a torch ``Dataset`` of (image, class), or a pair of
            images (N, C, S, S), C = 1 or 3, and classes (N,). Images are uint8 or PIL's, which are standardized over
            the training images, or floats, which the model sees as they are. All are kept in memory.
        name: of the data set.
        config: of the run.

    Raises:
        ValueError: anything else; or images and labels that do not fit.
    """
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise ValueError(
            f"data: got {_kind(found)} for {config.dataset}, expected (train, test) or (train, val, test), each a "
            "Dataset of (image, class), or (images, labels)"
        )
    names = ("train", "test") if len(found) == 2 else ("train", "val", "test")
    parts = {part: _images(part, value) for part, value in zip(names, found, strict=True)}
    train = parts["train"]
    for part, (images, _) in parts.items():
        if images.shape[1:] != train[0].shape[1:] or images.dtype != train[0].dtype:
            mine, other = (f"{value.dtype} {tuple(value.shape)}" for value in (images, train[0]))
            raise ValueError(f"data: {part} has images {mine}, train {other}, expected one type and size")
    classes = int(train[1].max()) + 1
    for part, (_, labels) in parts.items():
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            got = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"data: {part} has labels {got}, expected those of train, 0 to {classes - 1}")
    channels = train[0].size(1)
    mean, std = (0.0,) * channels, (1.0,) * channels
    if train[0].dtype == torch.uint8:
        flat = train[0].transpose(0, 1).reshape(channels, -1).double() / 255
        mean, std = tuple(flat.mean(dim=1).tolist()), tuple(flat.std(dim=1).clamp(min=1e-6).tolist())
    elif config.augment == "randaugment":
        raise ValueError(
            "augment: got 'randaugment' for images of floats, expected 'none', 'standard', or uint8 images"
        )
    size = config.image_size or train[0].size(-1)
    sources = {part: MemoryImages(*value, size) for part, value in parts.items()}
    data = ImageData(
        name=name,
        classes=tuple(map(str, getattr(found[0], "classes", range(classes))))[:classes],
        train=sources["train"],
        val=sources.get("val"),
        test=sources["test"],
        mean=mean,
        std=std,
        image_size=size,
        note="made by your function",
    )
    return image_set_task(data, config)


def _kind(found: Any) -> str:
    """What it is, for the message."""
    length = f" of {len(found)}" if isinstance(found, tuple | list) else ""
    return f"a {type(found).__qualname__}{length}"


def _images(part: str, found: Any) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) images, uint8 or float32, and (N,) classes."""
    if isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], Tensor | np.ndarray):
        images, labels = (torch.as_tensor(value) for value in found)
    elif isinstance(found, Dataset | list | tuple):
        data: Any = found
        images, labels = _read(part, (data[row] for row in range(len(data))))
    else:
        raise ValueError(f"data: {part} is {_kind(found)}, expected a Dataset of (image, class), or (images, labels)")
    if images.is_floating_point():
        images = images.float()
        if not images.isfinite().all():
            raise ValueError(f"data: {part} has images with NaN or infinity, expected numbers")
    square = images.dim() == 4 and len(images) > 0 and images.size(1) in (1, 3) and images.size(2) == images.size(3)
    if not square or images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            f"data: {part} has images {images.dtype} {tuple(images.shape)}, expected uint8 or float (N, 1 or 3, S, S)"
        )
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"data: {part} has labels {labels.dtype} {tuple(labels.shape)}, expected whole numbers ({len(images)},)"
        )
    return images, labels.long()


def _read(part: str, items: Iterable[Any]) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    for row, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(f"data: item {row} of {part} is {_kind(item)}, expected (image, class)")
        image, label = item
        if isinstance(image, Image):
            image = F.pil_to_tensor(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        image = torch.as_tensor(np.asarray(image) if not isinstance(image, Tensor) else image)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"data: image {row} of {part} is {tuple(image.shape)}, the first {tuple(images[0].shape)}, expected "
                "one size; resize them in your Dataset"
            )
        images.append(image)
        labels.append(int(label))
    if not images:
        raise ValueError(f"data: {part} is empty, expected images")
    return torch.stack(images), torch.tensor(labels)
