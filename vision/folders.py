"""Folders of images, a folder a class, without what is hidden."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


@dataclass(frozen=True)
class Listing:
    """The files of one split."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: Tensor


class VisibleFolder(ImageFolder):
    """torchvision's, without the folders and files whose names begin with a dot, which systems and editors leave.

    A class may be empty.

    Attributes:
        files: all that is not hidden, images or not.

    Raises:
        OSError: a folder in it cannot be read, which torchvision would pass over.
        ValueError: a folder in it holds itself by a link.
    """

    def __init__(self, root: Path) -> None:
        self.files = list(walk(root))

        def valid(path: str) -> bool:
            inside = Path(path).relative_to(root)
            return inside.suffix.lower() in IMG_EXTENSIONS and not is_hidden(inside)

        super().__init__(root, is_valid_file=valid, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(Path(name))]
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: label for label, name in enumerate(classes)}


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, links followed, but hidden ones.

    Raises:
        OSError: a folder cannot be read.
        ValueError: a folder holds itself by a link.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for link in (here / name for name in folders if (here / name).is_symlink()):
            end = link.resolve()
            above = (folder / part for part in (here.relative_to(folder), *here.relative_to(folder).parents))
            if any(part.resolve().is_relative_to(end) for part in above):
                raise ValueError(f"{printable(link)} links to {printable(end)}, in which it lies; remove the link")
        yield from (here / name for name in sorted(files) if not name.startswith("."))


def is_hidden(path: Path) -> bool:
    """Whether some part of a path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def listing_of(name: str, folder: Path) -> Listing:
    """The files of a folder by class, none of which is empty."""
    try:
        found = VisibleFolder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no class folders in {folder}, expected {folder}/<class>/<image>") from error
    labels = torch.tensor(found.targets, dtype=torch.int64)
    empty = [found.classes[label] for label in without(labels, len(found.classes))]
    if empty:
        raise ValueError(
            f"{name}: no image in the class folder {few([folder / part for part in empty])}, expected at least one; "
            "fill it, or remove it"
        )
    others = [file for file in found.files if not _is_image(file) and file.parent != folder]
    _tell(name, folder, f"are no {', '.join(IMG_EXTENSIONS)}", others)
    loose = [file for file in found.files if _is_image(file) and file.parent == folder]
    _tell(name, folder, "lie in no class folder", loose)
    return Listing(folder, tuple(map(printable, found.classes)), [path for path, _ in found.samples], labels)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMG_EXTENSIONS


def _tell(name: str, folder: Path, why: str, files: list[Path]) -> None:
    """Print what is left out."""
    shown = [file for file in files if file.is_file()]
    if shown:
        first = printable(shown[0])
        print(f"{name}: {len(shown)} files in {folder} are left out, for they {why}; the first is {first}", flush=True)


def without(labels: Tensor, num_classes: int) -> list[int]:
    """The classes that no image has."""
    return (torch.bincount(labels, minlength=num_classes) == 0).nonzero()[:, 0].tolist()


def printable(path: Path | str) -> str:
    """A path whose bytes need not be UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def few(names: Sequence[object], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
