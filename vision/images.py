"""Image data sets through torchvision's own classes, and the split of their training images. Shapes: N images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, Imagenette

from vision.augment import Channels
from vision.download import CIFAR, archive_of, check_files, unpacked
from vision.folders import Listing, VisibleFolder, few, listing_of, printable, without
from vision.sources import FileImages, ImageSource, MemoryImages, common_size, decode_all

NAMES = ("cifar10", "cifar100", "imagenette", "images")
"""What :func:`load_images` knows."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CONSTANTS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the channels, of values in 0..1, where they are not ImageNet's."""

NOTES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009), cs.toronto.edu/~kriz/cifar.html, no license stated",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009), cs.toronto.edu/~kriz/cifar.html, no license stated",
    "imagenette": "Imagenette, 160 px, github.com/fastai/imagenette, Apache 2.0; the images are ImageNet's",
}
JPEG_NOTE = "re-encoded as JPEG: accuracies are close to, not the same as, those on the originals"
TEST_SHARE = 0.2
"""Of each class, where a folder of images has no train and test."""
CIFAR10_COUNTS = 50_000, 10_000
IMAGENETTE_COUNTS = 9_469, 3_925


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of images.

    Args:
        name: how the user calls it.
        classes: names of the classes, by label.
        train: the training images; validation is a part of them, see :func:`split_train_val`, where there is no val.
        test: the test images.
        val: the validation images, where the data set has some of its own.
        mean, std: of the channels, for :func:`vision.augment.normalize`.
        image_size: height and width of the images, in pixels.
        note: source and license, and what sets this copy apart from the published data.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    mean: Channels
    std: Channels
    image_size: int
    note: str
    val: ImageSource | None = None


def load_images(
    name: str,
    root: Path | str,
    *,
    image_size: int | None = None,
    offline: bool = False,
    skip_broken: bool = False,
    split_seed: int = 0,
    memory_limit: int = 2 * 2**30,
) -> ImageData:
    """Training and test images, as uint8 in memory where they fit, decoded on demand where they do not.

    - ``"cifar10"``: torchvision's ``root/cifar-10-batches-py``, else images re-encoded as JPEG in
      ``root/cifar10/{train,test}/<class>`` or ``root/{train,test}/<class>``.
    - ``"cifar100"``: torchvision's ``root/cifar-100-python``.
    - ``"imagenette"``: torchvision's ``root/imagenette2-160``, whose ``val`` is the test set here.
    - ``"images"``: any ``root/train/<class>/*``, with ``root/test/<class>/*`` or, without it, ``root/val/<class>/*``.
      Each class of test must be one of train; a class may have no test images, which the note says. Of
      ``root/<class>/*``, without train and test, 20 % of each class are drawn as the test set. Hidden folders and
      files, whose names begin with a dot, are left out.

    What is not square or not of ``image_size`` is resized by the shorter side and center-cropped.

    Args:
        name: one of those.
        root: the folder.
        image_size: height and width in pixels (default: 32 for CIFAR, 160 for Imagenette; for ``"images"`` that of the
            images, if all are squares of one size).
        offline: never download; without it a download says first what it fetches. An archive in ``root`` is unpacked.
        skip_broken: leave out files that cannot be read, and print how many; decodes every file once, also where
            they are decoded on demand.
        split_seed: of the test set that is drawn from ``root/<class>/*``.
        memory_limit: bytes up to which images from files are kept decoded in memory, train and test together (default
            2 GiB). CIFAR's own format always is.

    Raises:
        FileNotFoundError: the data are not there, and may not or cannot be downloaded; says what was looked for.
        ValueError: an argument is not legal; a file is broken, a class folder empty, a class of test unknown in train,
            or no ``image_size`` given and none to be seen; names the first of them.
    """
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1")
    root = Path(root).expanduser()
    read = partial(_read, name, skip_broken=skip_broken, memory_limit=memory_limit)
    if name == "images":
        return read(*_images(root, split_seed), image_size=image_size)
    if name == "imagenette":
        return read(*_imagenette(root, offline), image_size=image_size or 160)
    jpeg = _jpeg_folder(root) if name == "cifar10" else None
    if jpeg is not None:
        return read(*_cifar_jpeg(jpeg), image_size=image_size or 32)
    return _cifar(name, root, offline, image_size or 32)


def image_files(name: str, root: Path | str) -> list[Path]:
    """The files that :func:`load_images` reads, by split and class; none where the data are not there.

    Args:
        name, root: see :func:`load_images`.
    """
    root = Path(root).expanduser()
    jpeg = _jpeg_folder(root) if name == "cifar10" else None
    if jpeg is None and name in CIFAR:
        folder = root / CIFAR[name][0].base_folder
        return sorted(folder.iterdir()) if folder.is_dir() else []
    base = jpeg or (_imagenette_folder(root) if name == "imagenette" else root)
    parts = [base / part for part in ("train", "test", "val") if (base / part).is_dir()][:2]
    found: list[Path] = []
    for folder in parts or [base]:
        try:
            found += [Path(path) for path, _ in VisibleFolder(folder).samples]
        except FileNotFoundError:  # of no classes
            continue
    return found


def _jpeg_folder(root: Path) -> Path | None:
    """Where CIFAR-10 lies as JPEG; ``None`` also where torchvision's own files are, which come first."""
    if (root / CIFAR10.base_folder).is_dir():
        return None
    known = (
        folder for folder in (root / "cifar10", root) for name in CIFAR10_CLASSES if (folder / "train" / name).is_dir()
    )
    return next(known, None)


def _imagenette_folder(root: Path) -> Path:
    """Imagenette's folder: in the root, or the root itself."""
    itself = (root / "train" / next(iter(Imagenette._WNID_TO_CLASS))).is_dir()
    return root if itself else root / archive_of("imagenette").folder


def split_train_val(
    labels: Tensor, val_share: float, seed: int, *, allow_missing: bool = False
) -> tuple[Tensor, Tensor]:
    """Splits training images at random, class by class.

    Of each class ``val_share`` go to validation, rounded, but at least one, and all but one at most.

    Args:
        labels: (N,) of the images.
        val_share: share of validation, between 0 and 1.
        seed: the same seed gives the same split.
        allow_missing: what of classes with a single image, which cannot be on both sides: an error (default), or they
            stay in training; where all classes have just one, some of them validate, and training has none of those.

    Returns:
        the training and the validation images, two sorted int64 tensors that share none and leave out none.

    Raises:
        ValueError: a share that is not between 0 and 1, fewer than two images, or a class with one (names it).
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share: got {val_share}, expected a number between 0 and 1")
    if labels.dim() != 1 or len(labels) < 2:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected (N,), of at least two images")
    _, group, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    single = (counts == 1)[group]
    if single.any():
        if not allow_missing:
            raise ValueError(
                f"labels: one image only of class {few(labels[single].tolist())}, expected at least two, one to train "
                "on and one to validate on; or split them all the same by allow_missing=True"
            )
        group = torch.zeros_like(group) if single.all() else torch.where(single, -1, group)
    generator = torch.Generator().manual_seed(seed)
    val = []
    for number in group[group >= 0].unique():
        members = (group == number).nonzero()[:, 0]
        count = min(max(round(val_share * len(members)), 1), len(members) - 1)
        val.append(members[torch.randperm(len(members), generator=generator)[:count]])
    in_val = torch.zeros(len(labels), dtype=torch.bool)
    in_val[torch.cat(val)] = True
    return (~in_val).nonzero()[:, 0], in_val.nonzero()[:, 0]


def _cifar(name: str, root: Path, offline: bool, image_size: int) -> ImageData:
    cls, _ = CIFAR[name]
    jpeg = f" nor, as JPEG, {root / name / 'train'} or {root / 'train'} with its classes" if name == "cifar10" else ""
    check_files(name, unpacked(name, root, offline, instead=jpeg))
    parts = [cls(root, train=train) for train in (True, False)]
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (MemoryImages(x, torch.tensor(y.targets), image_size) for x, y in zip(pixels, parts, strict=True))
    mean, std = CONSTANTS.get(name, IMAGENET)
    return ImageData(
        name=name,
        classes=tuple(parts[0].classes),
        train=train,
        test=test,
        mean=mean,
        std=std,
        image_size=image_size,
        note=NOTES[name],
    )


def _cifar_jpeg(folder: Path) -> tuple[Listing, Listing, str]:
    train, test = (listing_of("cifar10", folder / part) for part in ("train", "test"))
    for split in (train, test):
        _same_classes("cifar10", split, CIFAR10_CLASSES)
    return train, test, f"{NOTES['cifar10']}; {JPEG_NOTE}{_not_all(train, test, CIFAR10_COUNTS)}"


def _imagenette(root: Path, offline: bool) -> tuple[Listing, Listing, str]:
    folder = _imagenette_folder(root)
    if folder != root:
        folder = unpacked("imagenette", root, offline)
    listings = []
    for split in ("train", "val"):
        found = listing_of("imagenette", folder / split)
        _same_classes("imagenette", found, tuple(Imagenette._WNID_TO_CLASS))
        classes = tuple(Imagenette._WNID_TO_CLASS[wnid][0] for wnid in found.classes)
        listings.append(replace(found, classes=classes))
    train, val = listings
    return train, val, NOTES["imagenette"] + _not_all(train, val, IMAGENETTE_COUNTS)


def _images(root: Path, split_seed: int) -> tuple[Listing, Listing, str]:
    tests = [root / part for part in ("test", "val") if (root / part).is_dir()]
    if tests and (root / "train").is_dir():
        note = f"a folder of images, test set: {tests[0].name}" + ("; val is not read" if len(tests) > 1 else "")
        return listing_of("images", root / "train"), listing_of("images", tests[0]), note
    if tests or (root / "train").is_dir() or not root.is_dir():
        missing = ([] if (root / "train").is_dir() else ["train"]) + ([] if tests else ["test (or val)"])
        raise FileNotFoundError(
            f"images: no folder {', nor '.join(f'{root}/{part}' for part in missing)}, expected "
            f"{root}/train/<class>/<image> and {root}/test/<class>/<image>, or {root}/<class>/<image>"
        )
    whole = listing_of("images", root)
    train, test = (
        replace(whole, paths=[whole.paths[row] for row in rows.tolist()], labels=whole.labels[rows])
        for rows in split_train_val(whole.labels, TEST_SHARE, split_seed, allow_missing=True)
    )
    share = f"{TEST_SHARE:.0%} of each class, drawn by split_seed {split_seed}"
    return train, test, f"a folder of images without train and test: test set is {share}"


def _not_all(train: Listing, test: Listing, whole: tuple[int, int]) -> str:
    """What a note says of a copy with other numbers of images than were published."""
    counts = len(train.paths), len(test.paths)
    if counts == whole:
        return ""
    return f"; not the published set: {counts[0]:,} + {counts[1]:,} images of {whole[0]:,} + {whole[1]:,}"


def _same_classes(name: str, listing: Listing, expected: Sequence[str]) -> None:
    for what, odd in (
        ("without", set(expected) - set(listing.classes)),
        ("with unknown", set(listing.classes) - set(expected)),
    ):
        if odd:
            raise ValueError(
                f"{name}: {listing.folder} is {what} {few(sorted(odd))}, expected the class folders "
                f"{', '.join(sorted(expected))}; a copy that was cut off may have left it so"
            )


def _read(
    name: str,
    train: Listing,
    test: Listing,
    note: str,
    *,
    image_size: int | None,
    skip_broken: bool,
    memory_limit: int,
) -> ImageData:
    classes = train.classes
    unknown = [known for known in test.classes if known not in classes]
    if unknown:
        raise ValueError(
            f"{name}: {test.folder} has class {few(unknown)}, which {train.folder} has not; expected classes of "
            f"train: {few(list(classes), 20)}"
        )
    # ImageFolder numbers the classes of each folder by itself
    numbers = torch.tensor([classes.index(known) for known in test.classes])
    size = image_size or common_size(train.paths + test.paths, skip_broken)
    in_memory = 3 * size * size * (len(train.paths) + len(test.paths)) <= memory_limit
    sources: list[ImageSource] = []
    skipped: list[str] = []
    for paths, labels in ((train.paths, train.labels), (test.paths, numbers[test.labels])):
        out = torch.empty(len(paths), 3, size, size, dtype=torch.uint8) if in_memory else None
        keep = torch.ones(len(paths), dtype=torch.bool)
        if in_memory or skip_broken:
            broken = decode_all(paths, size, out, skip_broken)
            skipped += [paths[row] for row in broken]
            keep[broken] = False
        if out is not None:
            sources.append(MemoryImages(out if keep.all() else out[keep], labels[keep]))
        else:
            sources.append(FileImages([paths[row] for row in keep.nonzero()[:, 0]], labels[keep], size))
    if skipped:
        print(f"{name}: skipped {len(skipped)} images that cannot be read, first {printable(skipped[0])}", flush=True)
        note += f"; {len(skipped)} images left out, for they cannot be read"
    lost, untested = ([classes[label] for label in without(part.labels, len(classes))] for part in sources)
    if lost or not len(sources[1]):
        what = f"of class {few(lost)} in {train.folder}" if lost else f"in {test.folder}"
        raise ValueError(f"{name}: no image {what} can be read, expected at least one")
    if untested:
        note += f"; no test images of {few(untested)}"
    mean, std = CONSTANTS.get(name, IMAGENET)
    return ImageData(
        name=name, classes=classes, train=sources[0], test=sources[1], mean=mean, std=std, image_size=size, note=note
    )
