"""Folders of images, a folder a class, without what is hidden."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file


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
        others: files that are not hidden, and no images.
    """

    def __init__(self, root: Path) -> None:
        self.others: list[str] = []

        def valid(path: str) -> bool:
            if any(part.startswith(".") for part in Path(path).relative_to(root).parts):
                return False
            if not is_image_file(path):
                self.others.append(path)
                return False
            return True

        super().__init__(root, is_valid_file=valid, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = sorted(path.name for path in Path(directory).iterdir() if path.is_dir() and path.name[0] != ".")
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: label for label, name in enumerate(classes)}


def listing_of(name: str, folder: Path) -> Listing:
    """The files of a folder by class, none of which is empty; prints how many files are left out.

    Raises:
        FileNotFoundError: there are no class folders.
        ValueError: a class folder is empty.
    """
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
    loose = [str(path) for path in sorted(folder.iterdir()) if is_image_file(path.name) and path.name[0] != "."]
    for why, files in (("are no images", found.others), ("lie in no class folder", loose)):
        if files:
            first = printable(files[0])
            print(f"{name}: {len(files)} files in {folder} {why} and are left out; the first is {first}", flush=True)
    return Listing(folder, tuple(map(printable, found.classes)), [path for path, _ in found.samples], labels)


def without(labels: Tensor, num_classes: int) -> list[int]:
    """The classes that no image has."""
    return (torch.bincount(labels, minlength=num_classes) == 0).nonzero()[:, 0].tolist()


def printable(path: Path | str) -> str:
    """A path whose bytes need not be UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def few(names: Sequence[object], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
