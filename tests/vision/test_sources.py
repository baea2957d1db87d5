"""Images from memory and from files: every kind of image, sizes, and what cannot be read."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tests.vision.made_images import cut, write_image, write_photo
from vision.sources import FileImages, MemoryImages, common_size, decode, decode_all

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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(str(tmp_path / f"a{suffix}"), 8)
    assert (found.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2


def test_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    image.save(tmp_path / "a.png", transparency=bytes([100, 128, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(str(tmp_path / "a.png"), 8)[:, 3, 3].tolist() == list(RGB)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    gray = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / f"a{suffix}")
    expected = torch.from_numpy((gray // 256).astype(np.uint8)).expand(3, 8, 8)
    assert decode(str(tmp_path / f"a{suffix}"), 8).equal(expected)


def test_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif .*pixels of mode F have no known range, expected 8 or 16 bits"):
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


BROKEN = ["cut.jpg", "cut.png", "empty.jpg", "text.png"]


def write_broken(path: Path) -> Path:
    if path.name.startswith("cut"):
        return cut(write_photo(path, (32, 32)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("" if path.name.startswith("empty") else "not an image")
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    path = write_broken(tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot read the image .*by skip_broken=True") as caught:
        decode(str(path), 32)
    assert str(path) in str(caught.value)


def test_a_file_that_is_gone_is_not_a_broken_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        decode_all([str(tmp_path / "gone.png")], 8, None, skip_broken=True)


def test_decode_all_finds_every_broken_file(tmp_path: Path) -> None:
    whole = [str(write_image(tmp_path / f"{shade}.png", (shade, 0, 0))) for shade in range(3)]
    paths = [whole[row % 3] for row in range(133)]
    bad = [0, 63, 64, 132]
    for row, name in zip(bad, BROKEN, strict=True):
        paths[row] = str(write_broken(tmp_path / name))
    out = torch.empty(len(paths), 3, 8, 8, dtype=torch.uint8)
    assert decode_all(paths, 8, out, skip_broken=True) == bad
    assert decode_all(paths, 8, None, skip_broken=True) == bad
    rows = [row for row in range(len(paths)) if row not in bad]
    assert out[rows, 0, 0, 0].tolist() == [row % 3 for row in rows]
    with pytest.raises(ValueError, match=BROKEN[0]):
        decode_all(paths, 8, out, skip_broken=False)


def test_common_size(tmp_path: Path) -> None:
    paths = [str(write_image(tmp_path / f"{number}.png", size=(9, 9))) for number in range(3)]
    assert common_size(paths, skip_broken=False) == 9
    oblong = str(write_image(tmp_path / "oblong.png", size=(9, 7)))
    with pytest.raises(ValueError, match=r"^image_size: got None.*oblong\.png is 9 x 7 and .*0\.png is 9 wide"):
        common_size([*paths, oblong], skip_broken=False)
    with pytest.raises(ValueError, match=r"oblong\.png is 9 x 7$"):
        common_size([oblong, *paths], skip_broken=False)
    broken = str(write_broken(tmp_path / "text.png"))
    assert common_size([broken, *paths], skip_broken=True) == 9
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.png"):
        common_size([*paths, broken], skip_broken=False)
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        common_size([broken], skip_broken=True)


def test_memory_and_files_give_the_same(tmp_path: Path) -> None:
    paths = [str(write_photo(tmp_path / f"{number}.png", (8, 8), seed=number)) for number in range(5)]
    labels = torch.tensor([0, 1, 0, 1, 2])
    images = torch.stack([pixels(Path(path)) for path in paths])
    memory, files = MemoryImages(images.clone(), labels), FileImages(paths, labels, 8)
    index = torch.tensor([3, 0, 3])
    memory.get(index).zero_()  # what get returns is the caller's
    for source in (memory, files):
        assert len(source) == 5
        assert source.get(index).equal(images[index])
        assert source.get(index[:0]).shape == (0, 3, 8, 8)


def test_memory_images_resize_when_taken() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    source = MemoryImages(images, torch.arange(4), image_size=16)
    found = source.get(torch.tensor([2, 1]))
    assert found.shape == (2, 3, 16, 16)
    assert found.equal(v2.functional.resize(images[[2, 1]], [16, 16], antialias=True))
    assert source.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8).double(), torch.zeros(2).long(), r"images: got torch.float64 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9).byte(), torch.zeros(2).long(), r"images: .*\(2, 3, 8, 9\)"),
        (torch.zeros(2, 2, 8, 8).byte(), torch.zeros(2).long(), r"expected uint8 or float32 \(N, 1 or 3, S, S\)"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(3).long(), r"labels: .*expected int64 \(2,\)"),
        (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2), r"labels: got torch.float32"),
    ],
)
def test_what_memory_images_refuse(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryImages(images, labels)
