"""Data sets of images: layouts, splits, what is missing or broken. Nothing goes to the network."""

from __future__ import annotations

import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette

from tests.helpers.evil import Evil
from tests.helpers.made_images import (
    SHADE,
    cut,
    expected,
    shades,
    write_cifar,
    write_folder,
    write_imagenette,
    write_images,
    write_photo,
)
from vision import data
from vision.data import load_images, read, split_images

RGB = (204, 102, 51)  # of the web palette


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes in train and in test."""
    write_folder(tmp_path / "train", {"cat": 3, "dog": 2, "owl": 4})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 1, "owl": 1})
    return tmp_path


@pytest.mark.parametrize("in_memory", [0, 5, 100])
def test_a_folder_in_memory_as_far_as_it_fits(
    in_memory: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden folders and files are left out, and what is no image."""
    monkeypatch.setattr(data, "MEMORY", in_memory * 3 * 8 * 8)
    write_folder(folder / "val", {"dog": 2})
    write_folder(folder / "train" / ".cache", {"cat": 1})
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "train" / "cat" / ".hidden.png")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    found = load_images("images", folder)
    assert found.classes == ("cat", "dog", "owl")
    assert sum(not isinstance(image, str) for image in found.train.images) == min(in_memory, 9)
    assert shades(found.train) == expected(3, 2, 4)
    assert shades(found.test) == expected(1, 1, 1)
    assert found.val is not None
    assert shades(found.val) == [[1, 0]] * 2
    assert found.image_size == 8
    assert load_images("images", folder, image_size=4).image_size == 4


def test_classes_of_any_name_keep_the_labels_of_train(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "cat, wild (ü) 50 %")
    shutil.rmtree(folder / "test" / "dog")
    assert load_images("images", folder).classes == ("cat, wild (ü) 50 %", "dog", "owl")
    assert shades(load_images("images", folder).test) == [[0, 0], [2, 2 * SHADE]]


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    found = load_images("images", write_folder(tmp_path, {"a": 10, "b": 5}))
    assert sorted(found.test.labels.tolist()) == [0, 0, 1]
    assert sorted(shades(found.train) + shades(found.test)) == expected(10, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "test"), "with train, expected train and test"),
        (lambda root: shutil.rmtree(root), "expected images in .*/<class>"),
        (lambda root: (root / "train" / "bat").mkdir(), "no valid file for the classes bat"),
        (lambda root: write_folder(root / "test", {"yak": 1}), "got images of yak"),
        (
            lambda root: (root / "train" / "dog" / "000.png").unlink(),
            "train/dog: got 1 image, expected at least 2, for train and validation",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    change: Callable[[Path], Any], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_images("images", folder)


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_cifar10_as_jpeg(below: str, tmp_path: Path) -> None:
    names = tuple(f"class{number}" for number in range(10))
    for part in ("train", "test"):
        write_folder(tmp_path / below / part, dict.fromkeys(names, 2), (32, 32), ".jpg")
    found = load_images("cifar10", tmp_path, offline=True)
    assert (found.classes, found.image_size) == (names, 32)
    assert all(abs(shade - label * SHADE) <= 3 for label, shade in shades(found.train))
    assert "re-encoded as JPEG: accuracies are close to, not the same as" in found.note


def test_imagenette(tmp_path: Path) -> None:
    """The folder itself, or the one that it lies in; its archive is not unpacked."""
    with pytest.raises(FileNotFoundError, match=r"imagenette: .*, expected train .*fastai/imagen"):
        load_images("imagenette", tmp_path)
    write_imagenette(tmp_path)
    for root in (tmp_path, tmp_path / "imagenette2-160"):
        found = load_images("imagenette", root, offline=True)
        assert found.image_size == 160
    theirs = Imagenette(tmp_path, "train", size="160px")
    assert found.classes == tuple(names[0] for names in theirs.classes)
    assert found.train.labels.tolist() == [label for _, label in theirs._samples]


@pytest.mark.parametrize(("cls", "num_classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_is_torchvisions(
    cls: Any, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, whole, and broken."""
    name = cls.__name__.lower()
    with pytest.raises(FileNotFoundError, match=rf"{name}: found no .*; unpack {cls.url} in"):
        load_images(name, tmp_path, offline=True)
    pixels, labels = write_cifar(tmp_path, cls, num_classes, monkeypatch)
    found = load_images(name, tmp_path)
    assert found.classes == tuple(f"class{number}" for number in range(num_classes))
    assert found.train.labels.tolist() == labels
    seen = np.stack([np.asarray(image).transpose(2, 0, 1) for image in found.train.images])
    assert np.array_equal(seen, pixels.reshape(-1, 3, 32, 32))
    cut(tmp_path / cls.base_folder / cls.test_list[0][0])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read .*; delete .*, and unpack"):
        load_images(name, tmp_path)


def test_a_pickle_that_is_not_cifars_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision unpickles its files, whose MD5s it knows."""
    write_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / CIFAR10.train_list[0][0]
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"cifar10: cannot be read .*; delete .*, and unpack"):
        load_images("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.floats(0.001, 0.999),
    st.integers(0, 2**31),
)
def test_split_is_stratified_disjoint_and_complete(
    counts: list[int], share: float, seed: int
) -> None:
    # Classes need not be 0..C-1
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 3
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    train, val = split_images(labels, share, seed)
    assert torch.cat([train, val]).sort()[0].tolist() == list(range(len(labels)))
    assert train.equal(train.sort()[0])
    for label, count in enumerate(counts):
        in_val = int((labels[val] == 3 * label).sum())
        assert in_val <= count - 1
        assert abs(in_val - share * count) <= 0.5 or in_val in (1, count - 1)
    assert val.equal(split_images(labels, share, seed)[1])


def test_images_in_a_folder_called_home_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for root, size in (("home/mine", 8), ("~/mine", 12)):
        write_images(tmp_path / root, train=4, test=1, size=size)
    assert load_images("images", Path("~/mine")).image_size == 12


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
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
    found = np.asarray(read(str(tmp_path / f"a{suffix}"), 8)).astype(int)
    assert abs(found - np.array(expected)).max() <= 2


def test_what_is_no_image_of_8_bits_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.uint16)).save(tmp_path / "a.tif")
    for path, words in (("a.tif", "pixels of mode I;16, expected 8 bits"), ("none.png", "No such")):
        with pytest.raises(ValueError, match=rf"{path}: cannot be read as an image .*{words}"):
            read(str(tmp_path / path), 8)


def test_a_large_jpeg_is_decoded_smaller(tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.jpg", (640, 500))
    assert read(str(path), 80).size == (640, 500)
    assert read(str(path), 60).size == (320, 250)
