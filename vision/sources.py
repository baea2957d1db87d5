"""Where images come from: memory, or files decoded on demand. Shapes: N images, B of them, S height and width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
"""PIL's modes of 16-bit gray, whose ``convert("RGB")`` would clip nearly all to white."""


class ImageSource(ABC):
    """Square images of one split, and their labels.

    Args:
        labels: (N,) int64.
        image_size: S, height and width of what :meth:`get` returns.
    """

    def __init__(self, labels: Tensor, count: int, image_size: int) -> None:
        if labels.shape != (count,) or labels.dtype != torch.int64:
            raise ValueError(f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected int64 ({count},)")
        self.labels, self.image_size = labels, image_size

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def get(self, index: Tensor) -> Tensor:
        """The images ``index``, (B,) int64: a (B, C, S, S) tensor, new in memory; of files uint8 and C = 3.

        Raises:
            ValueError: a file is no image that can be read; names it.
        """


@final
class MemoryImages(ImageSource):
    """Images in memory.

    Args:
        images: (N, C, H, H), C = 1 or 3, uint8, or float32 that models are to see as it is.
        labels: (N,) int64.
        image_size: S; images of another size are resized when they are taken, the memory stays as it is (default H).
    """

    def __init__(self, images: Tensor, labels: Tensor, image_size: int | None = None) -> None:
        square = images.dim() == 4 and images.size(1) in (1, 3) and images.size(2) == images.size(3)
        if not square or images.dtype not in (torch.uint8, torch.float32):
            got = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images: got {got}, expected uint8 or float32 (N, 1 or 3, S, S)")
        super().__init__(labels, len(images), image_size or images.size(-1))
        self.images = images

    def get(self, index: Tensor) -> Tensor:
        images = self.images[index]
        if self.image_size != images.size(-1):
            images = F.resize(images, [self.image_size, self.image_size], antialias=True)
        return images


@final
class FileImages(ImageSource):
    """Images in files, decoded each time that they are taken, see :func:`decode`.

    Args:
        paths: N files.
        labels: (N,) int64.
        image_size: S.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, image_size: int) -> None:
        super().__init__(labels, len(paths), image_size)
        self.paths = list(paths)

    def get(self, index: Tensor) -> Tensor:
        images = torch.empty(len(index), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, number in enumerate(index.tolist()):
            images[row] = decode(self.paths[number], self.image_size)
        return images


def decode(path: str, image_size: int) -> Tensor:
    """An image file as (3, S, S) uint8.

    Gray, palette, RGBA, CMYK and 16-bit images become RGB; alpha channels and orientation tags are ignored, as in
    torchvision. What is not S x S is resized by its shorter side (bilinear, antialiased), then center-cropped.

    Args:
        path: of the file.
        image_size: S.

    Raises:
        ValueError: the file is no image that can be read: cut off, corrupt, or numbers without a known range.
    """
    side = (image_size, image_size)
    with _opened(path) as file:
        file.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG is decoded at a half, a quarter or an eighth
        image = _rgb(file)
        if image.size != side:
            image = ImageOps.fit(image, side, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_all(paths: Sequence[str], image_size: int, out: Tensor | None, skip_broken: bool) -> list[int]:
    """Decodes every file, with as many threads as torch has.

    Args:
        paths: N files.
        image_size: S.
        out: (N, 3, S, S) uint8, to write to; ``None`` only tries.
        skip_broken: go on after a file that cannot be read.

    Returns:
        the positions of the files that cannot be read.

    Raises:
        ValueError: a file cannot be read, unless ``skip_broken``; names it.
    """

    def is_broken(row: int) -> bool:
        try:
            image = decode(paths[row], image_size)
        except ValueError:
            if not skip_broken:
                raise
            return True
        if out is not None:
            out[row] = image
        return False

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [row for row, broken in enumerate(pool.map(is_broken, range(len(paths)))) if broken]


def common_size(paths: Sequence[str], skip_broken: bool) -> int:
    """Height and width of images that are all squares of one size; reads the heads of the files only.

    Raises:
        ValueError: they are not, with the first that differs; or a file cannot be read, unless ``skip_broken``.
    """
    first: tuple[str, int] | None = None
    for path in paths:
        try:
            with _opened(path) as file:
                width, height = file.size
        except ValueError:
            if skip_broken:
                continue
            raise
        if first is None:
            first = path, width
        if (width, height) != (first[1], first[1]):
            other = "" if path == first[0] else f" and {first[0]} is {first[1]} wide"
            raise ValueError(
                f"image_size: got None, expected a number of pixels, for the images are not all squares of one size: "
                f"{path} is {width} x {height}{other}"
            )
    if first is None:
        raise ValueError(f"image_size: got None, expected a number of pixels: none of {len(paths)} images can be read")
    return first[1]


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """PIL's image, whose many errors become one that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:
        dangling = isinstance(error, FileNotFoundError) and Path(path).is_symlink()
        if isinstance(error, OSError) and error.errno is not None and not dangling:  # the disk's, not the image's
            raise
        raise ValueError(
            f"cannot read the image {path} ({type(error).__name__}: {error}); a copy that was cut off may have left it "
            "so. Replace it or delete it; in training such images can be skipped by skip_broken=True (--skip-broken)"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range, expected 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
