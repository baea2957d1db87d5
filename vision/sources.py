"""Where images come from: memory, or files decoded on demand.

Shapes: N images, B of them, S height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images in memory.

    Args:
        images: (N, C, H, H), C = 1 or 3, uint8, or float32 that models are to see as it is.
        labels: (N,) int64 classes; (N, 2) classes and domains, where images are of several.
        image_size: S; images of another size are resized when they are taken, not in memory.
    """

    images: Tensor
    labels: Tensor
    image_size: int

    def get(self, index: Tensor) -> Tensor:
        """The images ``index``, (B,) int64: a (B, C, S, S) tensor, new in memory."""
        images = self.images[index]
        if self.image_size != images.size(-1):
            images = F.resize(images, [self.image_size, self.image_size], antialias=True)
        return images


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in N files, decoded each time that they are taken, see :func:`decode`."""

    paths: list[str]
    labels: Tensor
    image_size: int

    def get(self, index: Tensor) -> Tensor:
        """The images ``index``, (B,) int64: a (B, 3, S, S) uint8 tensor.

        Raises:
            ValueError: a file is no image that can be read; names it.
        """
        images = torch.empty(len(index), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, number in enumerate(index.tolist()):
            images[row] = decode(self.paths[number], self.image_size)
        return images


ImageSource: TypeAlias = MemoryImages | FileImages


def decode(path: str, image_size: int) -> Tensor:
    """An image file as (3, S, S) uint8.

    Gray, palette, RGBA and CMYK images become RGB. Alpha channels and orientation tags are ignored,
    as in torchvision. What is not S x S is resized by its shorter side (bilinear, antialiased),
    then center-cropped.

    Raises:
        ValueError: the file is not an image that can be read, or not one of 8 bits a channel.
    """
    side = (image_size, image_size)
    with _opened(path) as file:
        if file.mode[0] in "IF":
            raise ValueError(f"pixels of mode {file.mode}, expected 8 bits a channel")
        # A large JPEG is decoded at a half, a quarter or an eighth
        file.draft(None, (2 * image_size, 2 * image_size))
        image = file.convert("RGB")
        if image.size != side:
            image = ImageOps.fit(image, side, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_all(paths: Sequence[str], image_size: int) -> Tensor:
    """N image files as (N, 3, S, S) uint8, by as many threads as torch has."""
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for row, image in enumerate(pool.map(decode, paths, [image_size] * len(paths))):
            images[row] = image
    return images


def common_size(paths: Sequence[str]) -> int:
    """Height and width of images that are all squares of one size.

    Reads only the heads of the files.

    Raises:
        ValueError: they are not, with the first that differs.
    """
    first = 0
    for path in paths:
        with _opened(path) as file:
            width, height = file.size
        first = first or width
        if (width, height) != (first, first):
            raise ValueError(
                "image_size: got None, expected a number of pixels, for the images are not all "
                f"squares of one size: {path} is {width} x {height}"
            )
    return first


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """PIL's image, whose many errors become one that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as an image ({error}); replace it or delete it"
        ) from error
