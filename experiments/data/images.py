"""Image folders and torchvision's image data sets as tasks. Shapes: B images, C classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from experiments.config import ImageSetConfig
from experiments.data.graph_data import Split, Splits
from experiments.data.task import Batch, Shard, Task, image_task
from vision.augment import make_augment
from vision.batches import batches
from vision.images import ImageData, load_images, split_train_val

VAL_SHARE = 0.1
"""Of the training images, where data have none for validation."""


def images(config: ImageSetConfig) -> Task:
    """``cifar10``, ``cifar100``, ``imagenette``, or ``images``, a folder of the user's own; see ``load_images``.

    Raises:
        ValueError: a broken file, or options out of range.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    data = load_images(
        config.dataset,
        config.data_root,
        image_size=config.image_size,
        offline=config.offline,
    )
    return image_set_task(data, config)


def image_set_task(data: ImageData, config: ImageSetConfig) -> Task:
    """The batches of a data set of images.

    Validation is a part of the training images, stratified, where the data have none of their
    own; the test images are read once.

    Raises:
        ValueError: one class alone, or options out of range.
    """
    print(f"{data.name}: {len(data.train):,} + {len(data.test):,} images; {data.note}", flush=True)
    if len(data.classes) < 2:
        raise ValueError(f"{data.name}: got one class, {data.classes[0]}, expected at least two")
    train = torch.arange(len(data.train))
    if data.val is None:
        train, val = split_train_val(data.train.labels, VAL_SHARE, 0, allow_missing=True)
        held_out = data.train
    else:
        val, held_out = torch.arange(len(data.val)), data.val
    parts = {"train": (data.train, train), "val": (held_out, val), "test": (data.test, torch.arange(len(data.test)))}
    classes = len(data.classes)
    for part, what in (("train", "training"), ("val", "validation")):
        source, index = parts[part]
        missing = (source.labels[index].bincount(minlength=classes) == 0).nonzero().view(-1).tolist()
        if missing:
            names = ", ".join(data.classes[label] for label in missing[:5])
            print(f"{data.name}: {len(missing)} of {classes} classes have no image in {what}: {names}", flush=True)
    augment = make_augment(config.augment, data.image_size)

    def loader(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        source, index = parts[part]
        training = part == "train"
        for pictures, labels in batches(
            source,
            index,
            batch_size,
            mean=data.mean,
            std=data.std,
            augment=augment if training else None,
            seed=seed,
            workers=config.workers,
            shard=shard,
        ):
            yield Batch((pictures,), labels)

    split: Splits = {"train": train, "val": val, "test": parts["test"][1]}
    return image_task(
        data.name, data.image_size, data.classes, loader, split, config.label_smoothing, data.mean, data.std
    )
