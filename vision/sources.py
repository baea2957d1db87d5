"""Where images come from: memory, or files decoded on demand.

Shapes: N images, B of them, S height and width of what models see, H x W of an image as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Interpolation: TypeAlias = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class View:
    """How an image of any size and shape becomes one of S x S pixels.

    As timm and torchvision do it at test time: the shorter side is resized to S / crop_pct, rounded
    down, and the center is taken.

    Args:
        image_size: S.
        crop_pct: share of the shorter side that the center takes (default 1).
        interpolation: of the resizing, antialiased (default ``"bilinear"``).
    """

    image_size: int
    crop_pct: float = 1.0
    interpolation: Interpolation = "bilinear"

    @property
    def shorter_side(self) -> int:
        """What the shorter side of an image is resized to."""
        return math.floor(self.image_size / self.crop_pct)

    def of(self, images: Tensor) -> Tensor:
        """(..., C, S, S) of images (..., C, H, W)."""
        if images.shape[-2:] == (self.image_size, self.image_size) and self.crop_pct == 1:
            return images
        mode = InterpolationMode(self.interpolation)
        resized = F.resize(images, [self.shorter_side], interpolation=mode, antialias=True)
        return F.center_crop(resized, [self.image_size, self.image_size])

    def of_file(self, path: str) -> Tensor:
        """An image file as (3, S, S) uint8; for errors see :func:`read`."""
        image = read(path, least=2 * self.shorter_side)
        if image.size != (self.image_size, self.image_size) or self.crop_pct != 1:
            mode = InterpolationMode(self.interpolation)
            image = F.resize(image, [self.shorter_side], interpolation=mode)
            image = F.center_crop(image, [self.image_size, self.image_size])
        return F.pil_to_tensor(image)


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images in memory.

    Args:
        images: (N, C, H, H), C = 1 or 3, uint8, or float32 that models are to see as it is.
        labels: (N,) int64 classes; (N, 2) classes and domains, where images are of several.
    """

    images: Tensor
    labels: Tensor

    def get(self, index: Tensor, view: View) -> Tensor:
        """The images ``index``, (B,) int64, as a view has them: (B, C, S, S), new in memory."""
        return view.of(self.images[index])

    def original(self, number: int, least: int) -> Tensor:
        """One image, (C, H, H), as it is."""
        return self.images[number]


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in N files, decoded each time that they are taken."""

    paths: list[str]
    labels: Tensor

    def get(self, index: Tensor, view: View) -> Tensor:
        """The images ``index``, (B,) int64, as a view has them: (B, 3, S, S) uint8.

        Raises:
            ValueError: a file is no image that can be read; names it.
        """
        images = torch.empty(len(index), 3, view.image_size, view.image_size, dtype=torch.uint8)
        for row, number in enumerate(index.tolist()):
            images[row] = view.of_file(self.paths[number])
        return images

    def original(self, number: int, least: int) -> Image.Image:
        """One image, of any size; of a large JPEG at least ``least`` pixels a side."""
        return read(self.paths[number], least)


ImageSource: TypeAlias = MemoryImages | FileImages


def read(path: str, least: int) -> Image.Image:
    """An image file in RGB, of any size and shape.

    Gray, palette, RGBA and CMYK images become RGB. Alpha channels and orientation tags are ignored,
    as in torchvision.

    Args:
        path: the file.
        least: pixels; a JPEG of twice as many a side or more is decoded at a half, a quarter or an
            eighth.

    Raises:
        ValueError: the file is not an image that can be read, or not one of 8 bits a channel.
    """
    with _opened(path) as file:
        if file.mode[0] in "IF":
            raise ValueError(f"pixels of mode {file.mode}, expected 8 bits a channel")
        file.draft(None, (least, least))
        return file.convert("RGB")


def decode_all(paths: Sequence[str], view: View) -> Tensor:
    """N image files as (N, 3, S, S) uint8, by as many threads as torch has."""
    images = torch.empty(len(paths), 3, view.image_size, view.image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, image in enumerate(pool.map(view.of_file, paths)):
            images[row] = image
    return images


def check_all(paths: Sequence[str]) -> None:
    """Decode every file once, large JPEGs at an eighth, by as many threads as torch has.

    Raises:
        ValueError: the first file that is no image that can be read.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda path: read(path, least=1).size, paths):
            pass


def common_size(paths: Sequence[str]) -> int | None:
    """Height and width of images that are all squares of one size; else ``None``.

    Reads only the heads of the files.
    """
    first = 0
    for path in paths:
        with _opened(path) as file:
            width, height = file.size
        first = first or width
        if (width, height) != (first, first):
            return None
    return first


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """PIL's image, whose many errors become one that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except IsADirectoryError as error:
        raise ValueError(f"{path}: got a folder, expected an image") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: found no such file, expected an image") from error
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}); replace it or delete it"
        ) from error
