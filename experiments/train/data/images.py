"""Images as tasks: folders, torchvision's sets, digits, your own function's.

N images, C channels, S x S pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2.functional import to_image

from experiments.train.config import ImageConfig
from experiments.train.data.made import digits_split
from experiments.train.data.task import Batch, Shard, Split, Splits, Task
from gmoe._checks import check
from vision import (
    ImageData,
    ImageSource,
    MemoryImages,
    batches,
    make_augment,
    split_images,
)

VAL_SHARE = 0.1
"""Share of the training images that validate, of each class, where the data have none of their
own."""


def digits(image_size: int | None) -> ImageData:
    """scikit-learn's digits, standardized over the training set.

    See :func:`experiments.train.data.made.digits_graph`.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16.0
    labels = torch.from_numpy(bunch.target).long()
    size = image_size or 8
    parts: dict[str, Any] = {
        part: MemoryImages(images[rows], labels[rows], size)
        for part, rows in digits_split(bunch.target).items()
    }
    train = parts["train"].images
    return ImageData(
        name="digits",
        classes=tuple(map(str, bunch.target_names)),
        mean=(float(train.mean()),),
        std=(float(train.std()),),
        note="scikit-learn's",
        **parts,
    )


def image_task(data: ImageData, config: ImageConfig) -> Task:
    """A part of the training images validates where the data have no others.

    The test images are read once.
    """
    loader = ImageBatches(data, config)
    sizes = " + ".join(str(len(rows)) for rows in loader.split.values())
    print(f"{data.name}: {sizes} images; {data.note}", flush=True)
    for part in loader.split:
        _check_classes(data, part, loader.classes(part))
    tested = {}
    if data.domains:
        tested = {"label": data.test.labels[:, 0], "domain": data.test.labels[:, 1]}
    return Task(
        name=data.name,
        kind="image",
        in_channels=data.train.image_size,
        num_classes=len(data.classes),
        metric_name="accuracy",
        metric=partial(MulticlassAccuracy, num_classes=len(data.classes), average="micro"),
        loader=loader,
        steps=loader.steps,
        loss=partial(F.cross_entropy, label_smoothing=config.label_smoothing),
        classes=data.classes,
        domains=data.domains,
        tested=tested,
        mean=data.mean,
        std=data.std,
    )


class ImageBatches:
    """The batches of a set of images."""

    def __init__(self, data: ImageData, config: ImageConfig) -> None:
        self.data = data
        self.config = config
        self.sources: dict[Split, ImageSource] = {
            "train": data.train,
            "val": data.val or data.train,
            "test": data.test,
        }
        self.split: Splits = {
            part: torch.arange(len(source.labels)) for part, source in self.sources.items()
        }
        if data.val is None:
            train, val = split_images(data.train.labels, VAL_SHARE, seed=0)
            self.split["train"] = train
            self.split["val"] = val

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        return -(-len(self.split["train"]) // batch_size)

    def classes(self, part: Split) -> Tensor:
        """(N,) the class of each image of a part; labels may hold their domains, too."""
        labels = self.sources[part].labels[self.split[part]]
        return labels[:, 0] if self.data.domains else labels

    def __call__(
        self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """The batches of a part; the router that is told the domain gets it as an input."""
        augment = None
        if part == "train":
            augment = make_augment(self.config.augment, self.data.train.image_size)
        drawn = batches(
            self.sources[part],
            self.split[part],
            batch_size,
            mean=self.data.mean,
            std=self.data.std,
            augment=augment,
            seed=seed,
            workers=self.config.workers,
            shard=shard,
        )
        for images, labels in drawn:
            if not self.data.domains:
                yield Batch((images,), labels)
                continue
            target, domain = labels.unbind(dim=1)
            inputs = (images, domain) if self.config.router == "oracle" else (images,)
            yield Batch(inputs, target, domain=domain)


def _check_classes(data: ImageData, part: Split, classes: Tensor) -> None:
    """Refuse a part without images, or training images of one class; say which classes lack."""
    seen = set(classes.tolist())
    least = 2 if part == "train" else 1
    got = f"images of {len(seen)} classes in {part}"
    check(len(seen) >= least, data.name, got, f"at least {least}")
    missing = [name for label, name in enumerate(data.classes) if label not in seen]
    if missing:
        names = ", ".join(missing[:5])
        print(f"{data.name}: {part} has no image of {len(missing)} classes: {names}", flush=True)


def own_images(made: Any, preset: str, name: str, image_size: int | None) -> ImageData:
    """Images that a user's function made for a preset; ``name`` is the function's.

    It gives ``(train, test)`` or ``(train, val, test)``, each a torch ``Dataset`` of (image,
    class), or a pair of images (N, C, S, S), C = 1 or 3, and classes (N,). Images are uint8 or
    PIL's, which are standardized over the training images, or floats, which the model sees as
    they are. All are kept in memory.
    """
    legal = (
        "(train, test) or (train, val, test), each a Dataset of (image, class), or (images, labels)"
    )
    is_parts = isinstance(made, tuple | list) and len(made) in (2, 3)
    check(is_parts, "data", f"a {type(made).__name__} for {preset}", legal)
    names = ("train", "test") if len(made) == 2 else ("train", "val", "test")
    parts = {part: _images(f"data: {part}", value) for part, value in zip(names, made, strict=True)}
    images, labels = parts["train"]
    channels = images.size(1)
    classes = int(labels.max()) + 1
    for part, (others, numbers) in parts.items():
        is_alike = others.shape[1:] == images.shape[1:] and others.dtype == images.dtype
        check(is_alike, f"data: {part}", "images of another size or type than train", "one")
        is_known = 0 <= int(numbers.min()) <= int(numbers.max()) < classes
        check(is_known, f"data: {part}", "labels that train has not", f"0 to {classes - 1}")
    mean = (0.0,) * channels
    std = (1.0,) * channels
    if images.dtype == torch.uint8:
        flat = images.transpose(0, 1).reshape(channels, -1).double() / 255
        mean = tuple(flat.mean(dim=1).tolist())
        std = tuple(flat.std(dim=1).clamp(min=1e-6).tolist())
    size = image_size or images.size(-1)
    sources: dict[str, Any] = {part: MemoryImages(*pair, size) for part, pair in parts.items()}
    shown = tuple(map(str, getattr(made[0], "classes", range(classes))))[:classes]
    return ImageData(
        name=name, classes=shown, mean=mean, std=std, note="by your function", **sources
    )


def _images(where: str, part: Any) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) images, uint8 or float32, and (N,) classes."""
    try:
        if isinstance(part, Dataset):
            data: Any = part
            rows = [data[row] for row in range(len(data))]
            images = torch.stack([to_image(image) for image, _ in rows])
            labels = torch.tensor([int(label) for _, label in rows])
        else:
            images, labels = map(torch.as_tensor, part)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} is a {type(part).__name__} that cannot be taken as images of one size and "
            f"classes ({error}), expected a Dataset of (image, class) or (images, labels)"
        ) from error
    images = images.float() if images.is_floating_point() else images
    are_squares = (
        images.dim() == 4
        and len(images) > 0
        and images.size(1) in (1, 3)
        and images.size(2) == images.size(3)
    )
    are_numbers = images.dtype in (torch.uint8, torch.float32) and bool(images.isfinite().all())
    got = f"images {images.dtype} {tuple(images.shape)}"
    legal = "uint8 or finite float (N, 1 or 3, S, S)"
    check(are_squares and are_numbers, where, got, legal)
    are_integers = not labels.is_floating_point() and labels.dtype != torch.bool
    got = f"labels {labels.dtype} {tuple(labels.shape)}"
    check(are_integers and labels.shape == (len(images),), where, got, "an integer an image")
    return images, labels.long()
