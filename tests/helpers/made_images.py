"""Tiny images and data sets in the layouts that loaders read."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, Imagenette

from vision.data import Images

SHADE = 20
"""Images of the n-th class are of the color (n * SHADE, n * SHADE + 1, n * SHADE + 2)."""


def write_photo(path: Path, size: tuple[int, int], seed: int = 0, **kwargs: Any) -> Path:
    """Smooth and random: a few random pixels, enlarged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **kwargs)
    return path


def write_folder(
    root: Path, counts: Mapping[str, int], size: tuple[int, int] = (8, 8), suffix: str = ".png"
) -> Path:
    """``root/<class>/<number>``, of the colors of the classes in the order given."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            color = (label * SHADE, label * SHADE + 1, label * SHADE + 2)
            Image.new("RGB", size, color).save(root / name / f"{number:03}{suffix}")
    return root


def write_images(
    root: Path, train: int = 8, test: int = 3, size: int = 8, classes: str = "abc"
) -> Path:
    """Classes that differ in color, each image random."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
                pixels[..., label % 3] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def write_imagenette(root: Path, count: int = 1) -> Path:
    """The folder that torchvision's ``Imagenette`` reads."""
    for split in ("train", "val"):
        counts = dict.fromkeys(sorted(Imagenette._WNID_TO_CLASS), count)
        write_folder(root / "imagenette2-160" / split, counts, (12, 9), ".JPEG")
    return root / "imagenette2-160"


def write_cifar(
    root: Path, cls: type[CIFAR10], num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, list[int]]:
    """The files of ``CIFAR10`` or ``CIFAR100`` with random pixels.

    From then on, torchvision knows their MD5s.

    Returns:
        pixels (N, 3072) and labels of all training files.
    """
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels, labels = [], []

    def write(name: str, content: Mapping[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(dict(content)))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(cls, attribute):
            data = rng.integers(0, 256, (2 * num_classes, 3072), dtype=np.uint8)
            target = (rng.permutation(2 * num_classes) % num_classes).tolist()
            key = "labels" if num_classes == 10 else "fine_labels"
            sums.append([name, write(name, {"data": data, key: target})])
            if attribute == "train_list":
                pixels.append(data)
                labels.extend(target)
        monkeypatch.setattr(cls, attribute, sums)
    names = [f"class{number}" for number in range(num_classes)]
    meta = dict(cls.meta)
    monkeypatch.setattr(cls, "meta", meta | {"md5": write(meta["filename"], {meta["key"]: names})})
    return np.concatenate(pixels), labels


def cut(path: Path) -> Path:
    """Leave the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def shades(images: Images) -> list[list[int]]:
    """(label, red) of each image."""
    return [
        [label, images[number].getpixel((0, 0))[0]]
        for number, label in enumerate(images.labels.tolist())
    ]


def expected(*counts: int) -> list[list[int]]:
    return [[label, label * SHADE] for label, count in enumerate(counts) for _ in range(count)]
