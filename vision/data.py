"""Image data sets: torchvision's, and folders of images, a folder a class. Shapes: N images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder, Imagenette
from torchvision.datasets.folder import is_image_file

from gmoe._checks import check

CIFAR: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the channels, of values in 0..1, where they are not ImageNet's."""
FOLDERS = {
    "cifar10": (CIFAR10.base_folder, "cifar10", ""),
    "cifar100": (CIFAR100.base_folder, ""),
    "imagenette": ("imagenette2-160", ""),
    "images": ("",),
}
"""Where a data set lies in the root: the first of these that is there."""
NOTES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009), www.cs.toronto.edu/~kriz/cifar.html, no license",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009), www.cs.toronto.edu/~kriz/cifar.html, no license",
    "imagenette": "Imagenette, 160 px, github.com/fastai/imagenette, Apache 2.0",
    "images": "images of your own",
}
JPEG = "re-encoded as JPEG: accuracies are close to, not the same as, those on the originals"
TEST_SHARE = 0.2
"""Of each class, where a folder of images has no train and test."""
DEFAULT_SIZE = 160
"""Height and width in pixels of what models see of images of many sizes."""
MEMORY = 2 * 2**30
"""Bytes of images from files that are kept decoded, train and test together."""


@dataclass(frozen=True, eq=False)
class Images(Dataset[Any]):
    """Images and their labels.

    Args:
        images: PIL's; paths of files, which are decoded when they are taken; or float tensors
            (C, H, W).
        labels: (N,) int64 classes.
        size: S, what models see of them, see :func:`read`.
    """

    images: Sequence[Any]
    labels: Tensor
    size: int

    def __getitem__(self, number: int) -> Any:
        image = self.images[number]
        return read(image, self.size) if isinstance(image, str) else image


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of images."""

    name: str  # how the user calls it
    image_size: int  # height and width of what models see, in pixels
    classes: tuple[str, ...]  # their names, by label
    # Validation is a part of them, see :func:`split_images`, where there is no val
    train: Images
    test: Images
    val: Images | None = None
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # of the channels, of values in 0..1
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    note: str  # source and license, and what sets this copy apart from the published data


class Listing(NamedTuple):
    """Images in files: the names of their classes, the files, and the labels."""

    classes: tuple[str, ...]
    paths: list[str]
    labels: Tensor

    def part(self, rows: Tensor) -> Listing:
        """Some of them."""
        paths = [self.paths[row] for row in rows.tolist()]
        return Listing(self.classes, paths, self.labels[rows])


def load_images(
    name: str, root: Path, *, image_size: int | None = None, offline: bool = False
) -> ImageData:
    """Training and test images. Files are decoded once, and kept in memory as far as they fit.

    - ``"cifar10"``: torchvision's ``root/cifar-10-batches-py``, else images re-encoded as JPEG in
      ``root/cifar10/{train,test}/<class>`` or ``root/{train,test}/<class>``.
    - ``"cifar100"``: torchvision's ``root/cifar-100-python``.
    - ``"imagenette"``: ``root/imagenette2-160``, whose ``val`` is the test set here.
    - ``"images"``: any ``root/train/<class>/*``, with ``root/test/<class>/*``,
      ``root/val/<class>/*`` or both; one alone is the test set. If there is ``root/<class>/*``
      without train and test, 20 % of each class are the test set. Hidden folders and files, whose
      names begin with a dot, are left out.

    Args:
        name: one of those.
        root: the folder.
        image_size: height and width in pixels (default: 32 for CIFAR, 160 for Imagenette; for
            ``"images"`` that of the images, if all are squares of one size of at most 160, else
            160).
        offline: never download; otherwise torchvision downloads CIFAR. Nothing else is.

    Raises:
        FileNotFoundError: the data are missing; says what was looked for.
        ValueError: a file is broken, a class folder has too few images to be split, or a class of
            test is unknown in train.
    """
    folder = folder_of(name, root)
    if name in CIFAR and not (folder / "train").is_dir():
        return _cifar(name, root, image_size or 32, offline)
    parts = [part for part in ("train", "test", "val") if (folder / part).is_dir()]
    if name == "images" and not parts:
        whole = _listing(name, folder)
        _check_counts(folder, whole, least=3)
        rows = split_images(whole.labels, TEST_SHARE, seed=0)
        note = f"{NOTES[name]}, test set: {TEST_SHARE:.0%} of each class"
        return _data(name, [whole.part(one) for one in rows], image_size, note=note)
    if "train" not in parts or len(parts) == 1:
        legal = "train and test (or val)" + ", or the classes alone" * (name == "images")
        got = f"{folder} with {' and '.join(parts) or 'none of them'}"
        raise FileNotFoundError(f"{name}: got {got}, expected {legal}; {NOTES[name]}")
    listings = [_listing(name, folder / part) for part in parts]
    if name == "images" and len(parts) == 2:  # validation is a part of train
        _check_counts(folder / "train", listings[0], least=2)
    if name == "images":
        return _data(name, listings, image_size, note=f"{NOTES[name]}, test set: {parts[1]}")
    if name == "imagenette":
        classes = tuple(Imagenette._WNID_TO_CLASS[wnid][0] for wnid in listings[0].classes)
        return _data(name, listings, image_size or 160, classes=classes)
    mean, std = CONSTANTS[name]
    note = f"{NOTES[name]}; {JPEG}"
    return _data(name, listings, image_size or 32, note=note, mean=mean, std=std)


def folder_of(name: str, root: Path) -> Path:
    """Where a data set lies."""
    folders = [root / part for part in FOLDERS[name]]
    return next((folder for folder in folders if folder.is_dir()), root)


def split_images(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images at random, class by class, rounded.

    Of two images or more, at least one goes to either side.

    Args:
        labels: (N,) of the images.
        share: of the second part, between 0 and 1.
        seed: the same seed gives the same split.

    Returns:
        both parts, sorted int64 tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        if len(members) > 1:
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            drawn[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~drawn).nonzero()[:, 0], drawn.nonzero()[:, 0]


def read(path: str, size: int) -> Image.Image:
    """An image file in RGB, of any size and shape.

    Gray, palette, RGBA and CMYK images become RGB. Alpha channels and orientation tags are ignored,
    as in torchvision.

    Args:
        path: the file.
        size: what models see; a JPEG that is eight times as large or more is decoded at a half, a
            quarter or an eighth.

    Raises:
        ValueError: the file is not an image that can be read, or not one of 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of mode {image.mode}, expected 8 bits a channel")
            image.draft(None, (4 * size, 4 * size))
            return image.convert("RGB")
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


class VisibleFolder(ImageFolder):
    """torchvision's, but for hidden folders."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the classes, and their numbers."""
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: label for label, name in enumerate(names)}


def _listing(name: str, folder: Path) -> Listing:
    """The images of a folder by class, none of which is empty, in torchvision's order."""
    root = folder.absolute()  # or torchvision takes a folder "~" for the user's home

    def is_visible_image(path: str) -> bool:
        parts = Path(path).relative_to(root).parts
        return is_image_file(path) and not any(part[0] == "." for part in parts)

    try:
        found = VisibleFolder(str(root), is_valid_file=is_visible_image)
    except FileNotFoundError as error:
        legal = f"images in {folder}/<class>; {NOTES[name]}"
        raise FileNotFoundError(f"{folder}: {error}; expected {legal}") from error
    paths = [path for path, _ in found.samples]
    return Listing(tuple(found.classes), paths, torch.tensor(found.targets))


def _check_counts(folder: Path, listing: Listing, least: int) -> None:
    """Refuse a class that has fewer images than parts that it is split into."""
    parts = "train, validation and test" if least == 3 else "train and validation"
    legal = f"at least {least}, for {parts}; add some, or remove the class"
    for name, count in zip(listing.classes, listing.labels.bincount().tolist(), strict=True):
        check(count >= least, str(folder / name), f"{count} image{'s' * (count > 1)}", legal)


def _data(name: str, parts: list[Listing], image_size: int | None, **how: Any) -> ImageData:
    """Of train, test and perhaps val.

    Every file is decoded once, so that one that is broken is refused before the training.
    """
    classes = parts[0].classes
    unknown = sorted({name for part in parts for name in part.classes} - set(classes))
    check(not unknown, name, f"images of {', '.join(unknown)}", "classes of train")
    room = MEMORY
    sizes = set[tuple[int, int]]()
    decoded = list[list[Any]]()
    decode = partial(read, size=image_size or DEFAULT_SIZE)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in parts:
            decoded.append([])
            for path, image in zip(part.paths, pool.map(decode, part.paths), strict=True):
                sizes.add(image.size)
                room -= 3 * image.width * image.height
                decoded[-1].append(image if room >= 0 else path)
    (width, height), *others = sizes
    is_one = width == height <= DEFAULT_SIZE and not others
    size = image_size or (width if is_one else DEFAULT_SIZE)
    made = {}
    for split, part, images in zip(("train", "test", "val"), parts, decoded, strict=False):
        # Each folder has its own numbers
        labels = part.labels
        if part.classes != classes:
            labels = torch.tensor([classes.index(name) for name in part.classes])[labels]
        made[split] = Images(images, labels, size)
    given: Any = {"classes": classes, "note": NOTES[name], **how, **made}
    return ImageData(name=name, image_size=size, **given)


def _cifar(name: str, root: Path, image_size: int, offline: bool) -> ImageData:
    """By torchvision, which downloads what is missing, and compares files with their MD5."""
    published = CIFAR[name]
    folder = root / published.base_folder
    is_there = folder.is_dir()
    if offline and not is_there:
        raise FileNotFoundError(f"{name}: found no {folder}; unpack {published.url} in {root}")
    if not is_there:
        print(f"{name}: downloading 170 MB to {root}", flush=True)
    try:
        parts = [published(root, train, download=not is_there) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        advice = f"delete {folder}, and unpack {published.url} in {root}"
        raise ValueError(f"{name}: cannot be read ({error}); {advice}") from error
    train, test = (
        Images([Image.fromarray(pixels) for pixels in part.data], torch.tensor(part.targets), 32)
        for part in parts
    )
    mean, std = CONSTANTS[name]
    return ImageData(
        name=name,
        image_size=image_size,
        classes=tuple(parts[0].classes),
        train=train,
        test=test,
        mean=mean,
        std=std,
        note=NOTES[name],
    )
