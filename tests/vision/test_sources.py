"""Images from memory and from files: every kind of image, sizes, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tests.vision.made_images import write_photo
from vision.sources import FileImages, MemoryImages, decode, decode_all

RGB = (204, 102, 51)  # of the web palette


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("RGB", ".png", RGB),
        ("L", ".png", (127,) * 3),
        ("L", ".jpg", (127,) * 3),
        ("LA", ".png", (127,) * 3),
        ("1", ".png", (0,) * 3),
        ("P", ".png", RGB),
        ("RGBA", ".png", RGB),
        ("CMYK", ".jpg", RGB),
        ("CMYK", ".tif", RGB),
    ],
)
def test_every_mode_becomes_rgb(mode: str, suffix: str, expected: tuple[int, int, int], tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), RGB)
    image = image.convert("L").point(lambda _: 0).convert("1") if mode == "1" else image.convert(mode)
    image.save(tmp_path / f"a{suffix}")
    found = decode(str(tmp_path / f"a{suffix}"), 8)
    assert (found.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_more_than_8_bits_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: cannot be read as an image .pixels of mode .*, expected 8 bits"):
        decode(str(tmp_path / "a.tif"), 8)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_centre_is_kept(wide: bool, side: int, tmp_path: Path) -> None:
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, :8], image[:, 8:16], image[:, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(image if wide else image.transpose(1, 0, 2)).save(tmp_path / "a.png")
    found = decode(str(tmp_path / "a.png"), side)
    inner = found if side == 4 else found[:, 1:-1, 1:-1]  # enlarging mixes colors at the seam
    assert found.shape == (3, side, side)
    assert inner[1].min() >= 200
    assert inner[[0, 2]].max() <= 60


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (640, 500)])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_resize_is_torchvisions(size: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    path = write_photo(tmp_path / f"a{suffix}", size)
    reference = v2.Compose([v2.PILToTensor(), v2.Resize(24, antialias=True), v2.CenterCrop(24)])
    difference = decode(str(path), 24).int() - reference(Image.open(path)).int()
    assert difference.abs().float().mean() < 3


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_file_is_one_error(suffix: str, data: st.DataObject, tmp_path: Path) -> None:
    path = write_photo(tmp_path / f"a{suffix}", (32, 32))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        assert decode_all([str(path)], 32).shape == (1, 3, 32, 32)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{path}: cannot be read as an image, or it can"
    assert said.startswith(f"{path}: cannot be read as an image")


def test_memory_and_files_give_the_same(tmp_path: Path) -> None:
    paths = [str(write_photo(tmp_path / f"{number}.png", (8, 8), seed=number)) for number in range(5)]
    labels = torch.tensor([0, 1, 0, 1, 2])
    images = torch.stack([pixels(Path(path)) for path in paths])
    memory, files = MemoryImages(images.clone(), labels, 8), FileImages(paths, labels, 8)
    index = torch.tensor([3, 0, 3])
    memory.get(index).zero_()  # what get returns is the caller's
    for source in (memory, files):
        assert source.get(index).equal(images[index])
        assert source.get(index[:0]).shape == (0, 3, 8, 8)


def test_memory_images_resize_when_taken() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    source = MemoryImages(images, torch.arange(4), image_size=16)
    found = source.get(torch.tensor([2, 1]))
    assert found.shape == (2, 3, 16, 16)
    assert found.equal(v2.functional.resize(images[[2, 1]], [16, 16], antialias=True))
    assert source.images.shape == (4, 3, 8, 8)
