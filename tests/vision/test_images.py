"""load_images: each data set in its layout, what is missing or broken, and the split into train and val."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette

from tests.vision.made_images import (
    COUNTS,
    SHADE,
    cut,
    expected,
    shades,
    write_cifar,
    write_folder,
    write_image,
    write_imagenette,
)
from vision import MemoryImages, image_files, load_images, split_train_val
from vision.images import CIFAR10_CLASSES


@pytest.mark.parametrize("memory_limit", [2**31, 12 * 3 * 64, 12 * 3 * 64 - 1, 0])
def test_a_folder_of_images(folder: Path, memory_limit: int) -> None:
    data = load_images("images", folder, memory_limit=memory_limit)
    assert data.classes == ("cat", "dog", "owl")
    assert data.image_size == data.train.image_size == data.test.image_size == 8
    assert isinstance(data.train, MemoryImages) == isinstance(data.test, MemoryImages) == (memory_limit >= 12 * 3 * 64)
    assert shades(data.train) == expected(COUNTS)
    assert shades(data.test) == [[0, 0], [1, SHADE], [2, 2 * SHADE]]
    assert data.note == "a folder of images, test set: test"
    assert data.mean == (0.485, 0.456, 0.406)


def test_val_is_the_test_set_where_there_is_no_other(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert load_images("images", folder).note == "a folder of images, test set: val"
    write_folder(folder / "test", {"owl": 2}, first=2)
    data = load_images("images", str(folder))
    assert len(data.test) == 2
    assert data.note == "a folder of images, test set: test; val is not read; no test images of cat, dog"


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_labels_of_test_are_those_of_train(folder: Path, memory_limit: int) -> None:
    shutil.rmtree(folder / "test" / "cat")  # so that ImageFolder calls the dog 0
    data = load_images("images", folder, memory_limit=memory_limit)
    assert shades(data.test) == [[1, SHADE], [2, 2 * SHADE]]
    assert data.note.endswith("; no test images of cat")


def test_sizes_must_be_given_where_they_differ(folder: Path) -> None:
    write_image(folder / "test" / "cat" / "large.png", size=(16, 12))
    with pytest.raises(ValueError, match=r"^image_size: got None.*large\.png is 16 x 12"):
        load_images("images", folder)
    for memory_limit in (2**31, 0):
        data = load_images("images", folder, image_size=10, memory_limit=memory_limit)
        assert data.image_size == 10
        assert data.test.get(torch.arange(4)).shape == (4, 3, 10, 10)


def test_a_class_of_test_unknown_in_train(folder: Path) -> None:
    write_folder(folder / "test", {"newt": 1, "yak": 1})
    message = rf"^images: {folder}/test has class newt, yak, which .*/train has not; .*cat, dog, owl$"
    with pytest.raises(ValueError, match=message):
        load_images("images", folder)


def test_folders_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^images: no class folders in {tmp_path}, expected"):
        load_images("images", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"no folder {tmp_path}/none/train, nor {tmp_path}/none/test \(or val\)"
    ):
        load_images("images", tmp_path / "none")
    write_folder(tmp_path / "train", COUNTS)
    with pytest.raises(FileNotFoundError, match=rf"^images: no folder {tmp_path}/test \(or val\), expected"):
        load_images("images", tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"^images: no class folders in {tmp_path}/test, expected"):
        load_images("images", tmp_path)


def test_a_folder_of_classes_alone_is_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 5})
    data = load_images("images", tmp_path)
    assert data.classes == ("cat", "dog")
    assert shades(data.train) == expected({"cat": 8, "dog": 4})
    assert shades(data.test) == expected({"cat": 2, "dog": 1})
    assert "20% of each class, drawn by split_seed 0" in data.note
    assert len(image_files("images", tmp_path)) == 15


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_broken_images(folder: Path, memory_limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = cut(folder / "train" / "dog" / "001.png"), cut(folder / "test" / "owl" / "000.png")
    with pytest.raises(ValueError, match=rf"cannot read the image {first} "):
        shades(load_images("images", folder, image_size=8, memory_limit=memory_limit).train)
    capsys.readouterr()
    data = load_images("images", folder, image_size=8, memory_limit=memory_limit, skip_broken=True)
    assert capsys.readouterr().out == f"images: skipped 2 images that cannot be read, first {first}\n"
    assert isinstance(data.train, MemoryImages) == bool(memory_limit)
    assert shades(data.train) == expected(COUNTS | {"dog": 1})
    assert shades(data.test) == [[0, 0], [1, SHADE]]
    assert data.note.endswith("; 2 images left out, for they cannot be read; no test images of owl")
    assert second.exists()


@pytest.mark.parametrize(("part", "what"), [("train/dog/*", "of class dog in .*/train"), ("test/*/*", "in .*/test")])
def test_skipping_may_not_empty_a_class_or_test(part: str, what: str, folder: Path) -> None:
    for path in folder.glob(part):
        cut(path)
    with pytest.raises(ValueError, match=rf"^images: no image {what} can be read"):
        load_images("images", folder, skip_broken=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "mnist"}, r"name: got 'mnist', expected one of cifar10, cifar100, imagenette, images"),
        ({"image_size": 0}, r"image_size: got 0, expected at least 1"),
    ],
)
def test_illegal_arguments(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(**{"name": "images", "root": tmp_path, **kwargs})


@pytest.mark.parametrize(("cls", "num_classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar(cls: type[CIFAR10], num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = write_cifar(tmp_path, cls, num_classes, monkeypatch)
    data = load_images(cls.__name__.lower(), tmp_path, offline=True)
    assert data.classes == tuple(f"class{number}" for number in range(num_classes))
    assert data.image_size == 32
    assert data.train.labels.tolist() == labels
    assert data.train.get(torch.arange(len(labels))).equal(torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert len(data.test) == num_classes
    assert data.note.startswith(f"CIFAR-{num_classes} ")
    assert "JPEG" not in data.note
    larger = load_images(cls.__name__.lower(), tmp_path, offline=True, image_size=64)
    assert larger.image_size == larger.test.image_size == 64
    assert larger.test.get(torch.tensor([0, 1])).shape == (2, 3, 64, 64)
    assert {file.parent for file in image_files(cls.__name__.lower(), tmp_path)} == {tmp_path / cls.base_folder}


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_cifar10_as_jpeg(below: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / below / part, dict.fromkeys(CIFAR10_CLASSES, 2), (32, 32), ".jpg")
    data = load_images("cifar10", tmp_path, offline=True)
    assert data.classes == CIFAR10_CLASSES
    assert data.image_size == 32
    assert data.train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert all(abs(shade - label * SHADE) <= 3 for label, shade in shades(data.train))
    assert "re-encoded as JPEG: accuracies are close to, not the same as, those on the originals" in data.note
    assert data.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize(("name", "what"), [("sheep", "is without ship"), ("ship", "is with unknown yak")])
def test_cifar10_as_jpeg_is_complete(name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / split, dict.fromkeys(CIFAR10_CLASSES, 1), (32, 32), ".jpg")
    write_folder(tmp_path / "test", {"yak": 1})
    (tmp_path / "test" / "ship").rename(tmp_path / "test" / name)
    with pytest.raises(ValueError, match=rf"^cifar10: {tmp_path}/test {what}, expected the class folders"):
        load_images("cifar10", tmp_path, offline=True)
    write_cifar(tmp_path, CIFAR10, 10, monkeypatch)  # which comes first
    assert ".jpg" not in {file.suffix for file in image_files("cifar10", tmp_path)}
    assert load_images("cifar10", tmp_path, offline=True).classes[0] == "class0"


def test_another_folder_of_images_is_not_cifar10(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", {"owl": 1, "yak": 1}).parent
    with pytest.raises(FileNotFoundError, match=rf"^cifar10: .*nor, as JPEG, {folder}/cifar10/train or {folder}/train"):
        load_images("cifar10", folder, offline=True)


def test_imagenette(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    data = load_images("imagenette", tmp_path, offline=True)
    assert data.classes[:3] == ("tench", "English springer", "cassette player")
    assert data.image_size == 160
    assert data.train.get(torch.arange(10)).shape == (10, 3, 160, 160)
    assert all(abs(shade - label * SHADE) <= 3 for label, shade in shades(data.test))
    assert data.note.endswith("; not the published set: 10 + 10 images of 9,469 + 3,925")
    assert load_images("imagenette", tmp_path, image_size=32, memory_limit=0).train.image_size == 32
    assert image_files("imagenette", tmp_path) == image_files("imagenette", tmp_path / "imagenette2-160")
    theirs = Imagenette(tmp_path, "train", size="160px")
    assert data.classes == tuple(names[0] for names in theirs.classes)
    assert data.train.labels.tolist() == [label for _, label in theirs._samples]


@pytest.mark.parametrize("part", ["train", "val"])
def test_half_an_imagenette(part: str, tmp_path: Path) -> None:
    folder = write_imagenette(tmp_path) / part
    wnid = sorted(Imagenette._WNID_TO_CLASS)[4]
    (folder / wnid / "0.JPEG").unlink()
    with pytest.raises(ValueError, match=rf"^imagenette: no image in the class folder {folder}/{wnid}, expected"):
        load_images("imagenette", tmp_path, offline=True)
    (folder / wnid).rmdir()
    with pytest.raises(ValueError, match=rf"^imagenette: {folder} is without {wnid}, expected the class folders"):
        load_images("imagenette", tmp_path, offline=True)


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    val_share=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31),
)
def test_split_is_stratified_disjoint_and_complete(counts: list[int], val_share: float, seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 3  # classes need not be 0..C-1
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    train, val = split_train_val(labels, val_share, seed)
    assert torch.cat([train, val]).sort()[0].tolist() == list(range(len(labels)))
    assert train.equal(train.sort()[0])
    assert val.equal(val.sort()[0])
    for label, count in enumerate(counts):
        in_val = int((labels[val] == 3 * label).sum())
        assert 1 <= in_val <= count - 1
        assert abs(in_val - val_share * count) <= 0.5 or in_val in (1, count - 1)
    again = split_train_val(labels, val_share, seed)
    assert train.equal(again[0])
    assert val.equal(again[1])


@pytest.mark.parametrize(
    ("count", "val_share", "name"), [(4, 0.0, "val_share"), (4, float("nan"), "val_share"), (1, 0.5, "labels")]
)
def test_what_cannot_be_split(count: int, val_share: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        split_train_val(torch.zeros(count, dtype=torch.int64), val_share, 0)


def test_split_of_classes_with_one_image() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2, 5])
    with pytest.raises(ValueError, match=r"^labels: one image only of class 1, 5, expected at least two"):
        split_train_val(labels, 0.5, 0)
    train, val = split_train_val(labels, 0.5, 0, allow_missing=True)
    assert torch.cat([train, val]).sort()[0].tolist() == list(range(6))
    assert labels[val].tolist() == [0, 2]  # classes of one image stay in training
    assert set(labels[train].tolist()) == {0, 1, 2, 5}
    train, val = split_train_val(torch.arange(10), 0.1, 0, allow_missing=True)  # one image a class
    assert (len(train), len(val)) == (9, 1)
    train, val = split_train_val(torch.tensor([0, 0, 1]), 0.9, 0, allow_missing=True)
    assert 2 in train
