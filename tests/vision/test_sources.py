"""Images from memory and from files: every kind of image, and sizes.

``tests/experiments/train/test_files.py`` has broken files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.helpers.made_images import write_photo
from vision.sources import FileImages, MemoryImages, View

RGB = (204, 102, 51)  # of the web palette


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", ".jpg", (127,) * 3),
        ("LA", ".png", (127,) * 3),
        ("1", ".png", (0,) * 3),
        ("P", ".png", RGB),
        ("RGBA", ".png", RGB),
        ("CMYK", ".tif", RGB),
    ],
)
def test_every_mode_becomes_rgb(
    mode: str, suffix: str, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    image = Image.new("RGB", (8, 8), RGB)
    image = Image.new("1", (8, 8)) if mode == "1" else image.convert(mode)
    image.save(tmp_path / f"a{suffix}")
    assert (
        View(8).of_file(str(tmp_path / f"a{suffix}")).int() - torch.tensor(expected).view(3, 1, 1)
    ).abs().max() <= 2


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_more_than_8_bits_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(
        ValueError, match=r"a\.tif: cannot be read as an image .pixels of mode .*, expected 8 bits"
    ):
        View(8).of_file(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (640, 500)])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_resize_is_torchvisions(size: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    path = write_photo(tmp_path / f"a{suffix}", size)
    reference = v2.Compose([v2.Resize(24), v2.CenterCrop(24), v2.PILToTensor()])
    difference = View(24).of_file(str(path)).int() - reference(Image.open(path)).int()
    # A large JPEG is decoded at half its size
    assert difference.abs().float().mean() < (3 if suffix == ".jpg" else 1e-9)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "got a folder"), (tmp_path / "a.png", "found no such file")):
        with pytest.raises(ValueError, match=f"{path}: {words}, expected an image"):
            View(8).of_file(str(path))


def test_memory_and_files_give_the_same(tmp_path: Path) -> None:
    paths = [
        str(write_photo(tmp_path / f"{number}.png", (8, 8), seed=number)) for number in range(5)
    ]
    labels = torch.tensor([0, 1, 0, 1, 2])
    images = torch.stack([v2.functional.pil_to_tensor(Image.open(path)) for path in paths])
    memory, files = MemoryImages(images.clone(), labels), FileImages(paths, labels)
    index = torch.tensor([3, 0, 3])
    memory.get(index, View(8)).zero_()  # what get returns is the caller's
    for source in (memory, files):
        assert source.get(index, View(8)).equal(images[index])
        assert source.get(index[:0], View(8)).shape == (0, 3, 8, 8)
    larger = memory.get(index, View(16))
    assert larger.equal(v2.functional.resize(images[index], [16, 16], antialias=True))
