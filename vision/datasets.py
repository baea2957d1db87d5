"""Image data sets: torchvision's, and folders of images, a folder a class. Shapes: N images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette
from torchvision.datasets.folder import is_image_file, make_dataset

from gmoe._checks import check
from vision.archives import unpacked
from vision.recipe import Recipe
from vision.sources import (
    FileImages,
    ImageSource,
    MemoryImages,
    View,
    check_all,
    common_size,
    decode_all,
)

CIFAR: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
WNIDS: dict[str, tuple[str, ...]] = dict(sorted(Imagenette._WNID_TO_CLASS.items()))

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PACS_FOLDERS = ("PACS", "pacs-64", "")
"""Where the four domain folders lie in the root."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the channels, of values in 0..1, where they are not ImageNet's."""

NOTES = {
    "cifar10": (
        "CIFAR-10 (Krizhevsky, 2009; 50,000 + 10,000), "
        "cs.toronto.edu/~kriz/cifar.html, no license stated"
    ),
    "cifar100": (
        "CIFAR-100 (Krizhevsky, 2009; 50,000 + 10,000), "
        "cs.toronto.edu/~kriz/cifar.html, no license stated"
    ),
    "imagenette": (
        "Imagenette, 160 px (9,469 + 3,925), github.com/fastai/imagenette, "
        "Apache 2.0; images of ImageNet"
    ),
    "pacs": (
        "PACS (Li et al., 2017; 4 domains x 7 classes, 9,991), for research, no license stated; "
        "split 70/10/20 by domain and class"
    ),
}
PUBLISHED: dict[str, tuple[str, str, str, int]] = {
    "cifar10": (CIFAR10.base_folder, CIFAR10.url, CIFAR10.tgz_md5, 170),
    "cifar100": (CIFAR100.base_folder, CIFAR100.url, CIFAR100.tgz_md5, 169),
    "imagenette": ("imagenette2-160", *Imagenette._ARCHIVES["160px"], 99),
}
"""Folder in the root, the archive's address, its MD5 and its megabytes."""
TEST_SHARE = 0.2
"""Of each class, where a folder of images has no train and test."""
PACS_VAL_SHARE = 0.125
"""Of what the test images leave of each domain and class: a tenth of all."""
DEFAULT_SIZE = 160
"""Height and width in pixels of what models see of images of many sizes."""
MEMORY = 2 * 2**30
"""Bytes up to which images from files are kept decoded in memory, train and test together."""


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of images."""

    name: str  # how the user calls it
    image_size: int  # height and width of what models see, in pixels
    classes: tuple[str, ...]  # their names, by label
    # Validation is a part of them, see :func:`split_images`, where there is no val
    train: ImageSource
    test: ImageSource
    mean: tuple[float, ...]  # of the channels, see :func:`vision.batches.batches`
    std: tuple[float, ...]
    note: str  # source and license, and what sets this copy apart from the published data
    val: ImageSource | None = None
    domains: tuple[str, ...] = ()  # their names, by number, where images are of several

    @property
    def labels(self) -> Tensor:
        """(N,) the class of each training image."""
        return self.train.labels[:, 0] if self.domains else self.train.labels


def load_images(
    name: str,
    root: Path,
    *,
    image_size: int | None = None,
    recipe: Recipe | None = None,
    held_out: str | None = None,
    offline: bool = False,
) -> ImageData:
    """Training and test images: uint8 in memory if they fit, else decoded on demand.

    - ``"cifar10"``: torchvision's ``root/cifar-10-batches-py``, else images re-encoded as JPEG in
      ``root/cifar10/{train,test}/<class>`` or ``root/{train,test}/<class>``.
    - ``"cifar100"``: torchvision's ``root/cifar-100-python``.
    - ``"imagenette"``: torchvision's ``root/imagenette2-160``, whose ``val`` is the test set here.
    - ``"pacs"``: ``DOMAIN/CLASS/*`` in ``root``, ``root/PACS`` or ``root/pacs-64``. PACS has no
      one address to download it from.
    - ``"images"``: any ``root/train/<class>/*``, with ``root/test/<class>/*``,
      ``root/val/<class>/*`` or both; one alone is the test set. If there is ``root/<class>/*``
      without train and test, 20 % of each class are the test set. Hidden folders and files, whose
      names begin with a dot, are left out.

    Args:
        name: one of those.
        root: the folder.
        image_size: height and width in pixels (default: 32 for CIFAR, 160 for Imagenette, 64 for
            PACS; for ``"images"`` that of the images, if all are squares of one size, else 160).
        recipe: one that wants images as their files have them, for crops, has these decoded on
            demand (default: squares of ``image_size``).
        held_out: of PACS, the domain that is the test set, and in no other part (default: a part
            of each).
        offline: never download; otherwise a download first says what it fetches. An archive in
            ``root`` is unpacked.

    Raises:
        FileNotFoundError: the data are missing, and may not or cannot be downloaded; says what was
            looked for.
        ValueError: a file is broken, a class folder is empty or has too few images to be split, a
            class of test is unknown in train, or ``held_out`` is no domain.
    """
    recipe = recipe or Recipe()
    check(held_out is None or name == "pacs", "held_out", f"{held_out!r} for {name}", "pacs")
    if name == "images":
        return _own(root, image_size, recipe)
    if name == "pacs":
        return _pacs(root, image_size or 64, recipe, held_out)
    if name == "imagenette":
        itself = (root / "train" / next(iter(WNIDS))).is_dir()
        folder = root if itself else unpacked(name, root, offline, *PUBLISHED[name])
        parts = [_listing(folder / part, tuple(WNIDS)) for part in ("train", "val")]
        names = tuple(names[0] for names in WNIDS.values())
        return _read(name, parts, image_size or 160, recipe, NOTES[name], names)
    if name == "cifar10" and not (root / CIFAR10.base_folder).is_dir():
        for folder in (root / "cifar10", root):
            if (folder / "train").is_dir():
                note = (
                    "re-encoded as JPEG: accuracies are close to, not the same as, those on the "
                    "originals"
                )
                parts = [_listing(folder / part, CIFAR10_CLASSES) for part in ("train", "test")]
                return _read(name, parts, image_size or 32, recipe, f"{NOTES[name]}; {note}")
    return _cifar(name, root, image_size or 32, offline)


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


Listing = tuple[tuple[str, ...], list[str], Tensor]
"""Names of the classes, files, and their labels."""


def _listing(folder: Path, expected: tuple[str, ...] = ()) -> Listing:
    """The images of a folder by class, none of which is empty, in torchvision's order."""
    folder = folder.absolute()  # or torchvision takes a folder "~" for the user's home
    visible = (
        [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    )
    classes = tuple(sorted(name for name in visible if (folder / name).is_dir()))
    if not classes:
        raise FileNotFoundError(f"{folder}: no class folders, expected {folder}/<class>/<image>")
    if expected and set(classes) != set(expected):
        raise ValueError(
            f"{folder}: got class folders {', '.join(classes)}, expected {', '.join(expected)}"
        )

    def is_visible_image(path: str) -> bool:
        return is_image_file(path) and not any(
            part[0] == "." for part in Path(path).relative_to(folder).parts
        )

    numbers = {name: label for label, name in enumerate(classes)}
    found = make_dataset(str(folder), numbers, is_valid_file=is_visible_image, allow_empty=True)
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    empty = [name for name, label in numbers.items() if not (labels == label).any()]
    if empty:
        raise ValueError(
            f"{folder}: no image in the class folder {', '.join(empty)}; fill it, or remove it"
        )
    return classes, [path for path, _ in found], labels


def _own(root: Path, image_size: int | None, recipe: Recipe) -> ImageData:
    tests = [root / part for part in ("test", "val") if (root / part).is_dir()]
    if tests and (root / "train").is_dir():
        found = [_listing(folder) for folder in (root / "train", *tests)]
        if len(tests) == 1:  # validation is a part of train
            _check_counts(root / "train", found[0], least=2)
        note = f"a folder of images, test set: {tests[0].name}"
        return _read("images", found, image_size, recipe, note)
    if tests or (root / "train").is_dir():
        raise FileNotFoundError(
            f"images: got one of {root}/train and {root}/test (or val), expected both, or "
            f"{root}/<class>/<image>"
        )
    classes, paths, labels = listing = _listing(root)
    _check_counts(root, listing, least=3)
    parts = split_images(labels, TEST_SHARE, seed=0)
    drawn = [(classes, [paths[row] for row in rows.tolist()], labels[rows]) for rows in parts]
    note = f"a folder of images, test set: {TEST_SHARE:.0%} of each class"
    return _read("images", drawn, image_size, recipe, note)


def _check_counts(folder: Path, listing: Listing, least: int) -> None:
    """Refuse a class that has fewer images than parts that it is split into."""
    classes, _, labels = listing
    for name, count in zip(classes, labels.bincount().tolist(), strict=True):
        parts = "train, validation and test" if least == 3 else "train and validation"
        legal = f"at least {least}, for {parts}; add some, or remove the class"
        check(count >= least, str(folder / name), f"{count} image{'s' * (count > 1)}", legal)


def _pacs(root: Path, image_size: int, recipe: Recipe, held_out: str | None) -> ImageData:
    """A random split that has the same share of each domain and class in each part.

    With a domain held out, all of its images are the test set.
    """
    legal = f"one of {', '.join(DOMAINS)}"
    check(held_out is None or held_out in DOMAINS, "held_out", repr(held_out), legal)
    folders = [root / part for part in PACS_FOLDERS]
    folder = next((one for one in folders if all((one / name).is_dir() for name in DOMAINS)), None)
    if folder is None:
        looked = ", ".join(map(str, folders))
        raise FileNotFoundError(
            f"pacs: found the folders {', '.join(DOMAINS)} in none of {looked}; put PACS (Li et "
            "al., 2017) there, as DOMAIN/CLASS/*.jpg"
        )
    listings = [_listing(folder / name, PACS_CLASSES) for name in DOMAINS]
    paths = [path for _, found, _ in listings for path in found]
    domain = torch.repeat_interleave(torch.tensor([len(found) for _, found, _ in listings]))
    labels = torch.stack([torch.cat([found for _, _, found in listings]), domain], dim=1)
    cell = labels[:, 1] * len(PACS_CLASSES) + labels[:, 0]
    rest, test = split_images(cell, TEST_SHARE, seed=0)
    if held_out is not None:
        is_held = domain == DOMAINS.index(held_out)
        rest, test = (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]
    train, val = (rest[rows] for rows in split_images(cell[rest], PACS_VAL_SHARE, seed=0))
    sources = _sources(
        [([paths[row] for row in rows.tolist()], labels[rows]) for rows in (train, val, test)],
        image_size,
        recipe,
    )
    mean, std = IMAGENET
    note = NOTES["pacs"]
    if held_out is not None:
        note = f"{note.partition(';')[0]}), test set: all of {held_out}, the rest split 87.5/12.5"
    return ImageData(
        name="pacs",
        image_size=image_size,
        classes=PACS_CLASSES,
        domains=DOMAINS,
        train=sources[0],
        val=sources[1],
        test=sources[2],
        mean=mean,
        std=std,
        note=note,
    )


def _sources(
    parts: Sequence[tuple[list[str], Tensor]], size: int, recipe: Recipe
) -> list[ImageSource]:
    """Images of files, by part: in memory, if all fit and none is wanted as its file has it.

    Every file is decoded once, so that one that is broken is refused before the training.
    """
    total = sum(len(paths) for paths, _ in parts)
    if not recipe.keeps_originals() and 3 * size * size * total <= MEMORY:
        view = View(size, interpolation=recipe.interpolation)
        return [MemoryImages(decode_all(paths, view), labels) for paths, labels in parts]
    for paths, _ in parts:
        check_all(paths)
    return [FileImages(paths, labels) for paths, labels in parts]


def _read(
    name: str,
    parts: list[Listing],
    image_size: int | None,
    recipe: Recipe,
    note: str,
    names: tuple[str, ...] = (),
) -> ImageData:
    """Of train, test and perhaps val."""
    classes, files = parts[0][0], [path for _, paths, _ in parts for path in paths]
    unknown = {name for known, _, _ in parts for name in known} - set(classes)
    if unknown:
        raise ValueError(
            f"{name}: got images of {', '.join(sorted(unknown))}, expected classes of train"
        )
    size = image_size or common_size(files) or DEFAULT_SIZE
    labeled = [  # each folder has its own numbers
        (paths, torch.tensor([classes.index(name) for name in known])[rows])
        for known, paths, rows in parts
    ]
    train, test, *others = _sources(labeled, size, recipe)
    mean, std = CONSTANTS.get(name, IMAGENET)
    return ImageData(
        name=name,
        image_size=size,
        classes=names or classes,
        train=train,
        test=test,
        val=others[0] if others else None,
        mean=mean,
        std=std,
        note=note,
    )


def _cifar(name: str, root: Path, image_size: int, offline: bool) -> ImageData:
    folder = unpacked(name, root, offline, *PUBLISHED[name])
    try:
        parts = [CIFAR[name](root, train=train) for train in (True, False)]
    except RuntimeError as error:  # by MD5
        raise ValueError(
            f"{folder}: not the published files; delete the folder, and start again"
        ) from error
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (
        MemoryImages(x, torch.tensor(y.targets)) for x, y in zip(pixels, parts, strict=True)
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
