"""Folders of images, a folder a class, without what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    def __init__(self, root: Path) -> None:
        def valid(path: str) -> bool:
            inside = Path(path).relative_to(root)
            return inside.suffix.lower() in IMG_EXTENSIONS and not is_hidden(inside)

        super().__init__(root, is_valid_file=valid, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(Path(name))]
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: label for label, name in enumerate(classes)}


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
    inside = (file for part in found.classes for file in sorted((folder / part).rglob("*")))
    _tell(name, folder, f"are no {', '.join(IMG_EXTENSIONS)}", [file for file in inside if not _is_image(file)])
    loose = [file for file in sorted(folder.iterdir()) if _is_image(file)]
    _tell(name, folder, "lie in no class folder", loose)
    return Listing(folder, tuple(found.classes), [path for path, _ in found.samples], labels)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMG_EXTENSIONS


def _tell(name: str, folder: Path, why: str, files: list[Path]) -> None:
    """Print what is left out; hidden files need no word."""
    shown = [file for file in files if file.is_file() and not is_hidden(file.relative_to(folder))]
    if shown:
        print(
            f"{name}: {len(shown)} files in {folder} are left out, for they {why}; the first is {shown[0]}", flush=True
        )


def without(labels: Tensor, num_classes: int) -> list[int]:
    """The classes that no image has."""
    return (torch.bincount(labels, minlength=num_classes) == 0).nonzero()[:, 0].tolist()


def few(names: Sequence[object], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
