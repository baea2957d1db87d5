"""Images as tasks. N images, C channels, S x S pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from experiments.train.config import ImageConfig
from experiments.train.data.made import digits_split
from experiments.train.data.task import Batch, Shard, Split, Splits, Task
from gmoe._checks import check
from vision.batches import batches
from vision.data import ImageData, Images, split_images
from vision.transforms import eval_transform, make_mixup, train_transform

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
    parts: dict[str, Any] = {
        part: Images(list(images[rows]), labels[rows], 8)
        for part, rows in digits_split(bunch.target).items()
    }
    train = torch.stack(parts["train"].images)
    return ImageData(
        name="digits",
        image_size=image_size or 8,
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
    if config.recipe.aa is not None:
        is_legal = len(data.mean) == 3 and not isinstance(data.train[0], Tensor)
        check(is_legal, "aa", f"{config.recipe.aa!r} for {data.name}", "uint8 images in color")
    accuracy = partial(MulticlassAccuracy, num_classes=len(data.classes), average="micro")
    return Task(
        name=data.name,
        kind="image",
        in_channels=data.image_size,
        num_classes=len(data.classes),
        metric_name="accuracy",
        metric=accuracy,
        beside={"top5": partial(accuracy, top_k=5)} if len(data.classes) > 5 else {},
        loader=loader,
        steps=loader.steps,
        loss=partial(F.cross_entropy, label_smoothing=config.label_smoothing),
        classes=data.classes,
        mean=data.mean,
        std=data.std,
    )


class ImageBatches:
    """The batches of a set of images."""

    def __init__(self, data: ImageData, config: ImageConfig) -> None:
        self.data = data
        self.config = config
        self.images: dict[Split, Images] = {
            "train": data.train,
            "val": data.val or data.train,
            "test": data.test,
        }
        self.split: Splits = {
            part: torch.arange(len(images.labels)) for part, images in self.images.items()
        }
        if data.val is None:
            train, val = split_images(data.train.labels, VAL_SHARE, seed=0)
            self.split["train"] = train
            self.split["val"] = val
        how = data.image_size, config.recipe, data.mean, data.std
        self.train_transform = train_transform(config.augment, *how)
        self.eval_transform = eval_transform(*how)
        self.mixup = make_mixup(config.recipe, len(data.classes))

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        return -(-len(self.split["train"]) // batch_size)

    def classes(self, part: Split) -> Tensor:
        """(N,) the class of each image of a part."""
        return self.images[part].labels[self.split[part]]

    def __call__(
        self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """The batches of a part."""
        trains = part == "train"
        drawn = batches(
            self.images[part],
            self.split[part],
            batch_size,
            self.train_transform if trains else self.eval_transform,
            mixup=self.mixup if trains else None,
            seed=seed,
            workers=self.config.workers,
            shard=shard,
        )
        for images, labels in drawn:
            yield Batch((images,), labels)


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
