"""Data sets of images: layouts, splits, what is missing or broken. Nothing goes to the network."""

from __future__ import annotations

import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette, utils

from tests.helpers.made_images import (
    SHADE,
    cut,
    expected,
    pack,
    shades,
    write_cifar,
    write_folder,
    write_imagenette,
    write_images,
    write_pacs,
)
from vision import datasets
from vision.datasets import (
    CIFAR10_CLASSES,
    DOMAINS,
    PACS_CLASSES,
    PUBLISHED,
    load_images,
    split_images,
)
from vision.sources import FileImages, MemoryImages, View


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


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder(in_memory: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_memory:
        write_folder(folder / "val", {"dog": 2})
    else:
        (folder / "test").rename(folder / "val")
        monkeypatch.setattr(datasets, "MEMORY", 0)
    (folder / "train" / ".cache").mkdir()
    shutil.copy(folder / "train" / "cat" / "000.png", folder / "train" / "cat" / ".hidden.png")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    data = load_images("images", folder)
    assert data.classes == ("cat", "dog", "owl")
    assert isinstance(data.train, MemoryImages if in_memory else FileImages)
    assert shades(data.train) == expected(3, 2, 4)
    assert shades(data.test) == expected(1, 1, 1)
    assert (data.val and shades(data.val)) == ([[1, 0]] * 2 if in_memory else None)
    assert data.image_size == 8
    assert load_images("images", folder, image_size=4).image_size == 4


def test_a_class_without_test_images_keeps_the_labels_of_train(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "cat")
    assert shades(load_images("images", folder).test) == [[1, SHADE], [2, 2 * SHADE]]


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    data = load_images("images", write_folder(tmp_path, {"a": 10, "b": 5}))
    assert sorted(data.test.labels.tolist()) == [0, 0, 1]
    assert sorted(shades(data.train) + shades(data.test)) == expected(10, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "test"), "got one of"),
        (lambda root: shutil.rmtree(root), "no class folders"),
        (lambda root: (root / "train" / "bat").mkdir(), "no image in the class folder bat"),
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
    for part in ("train", "test"):
        write_folder(tmp_path / below / part, dict.fromkeys(CIFAR10_CLASSES, 2), (32, 32), ".jpg")
    data = load_images("cifar10", tmp_path, offline=True)
    assert data.classes == CIFAR10_CLASSES
    assert all(abs(shade - label * SHADE) <= 3 for label, shade in shades(data.train))
    assert (
        "re-encoded as JPEG: accuracies are close to, not the same as, those on the originals"
        in data.note
    )
    (tmp_path / below / "test" / "ship").rename(tmp_path / below / "test" / "sheep")
    with pytest.raises(ValueError, match=r"test: got class folders .*sheep.*, expected airplane"):
        load_images("cifar10", tmp_path, offline=True)


def test_imagenette(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    for root in (tmp_path, tmp_path / "imagenette2-160"):
        data = load_images("imagenette", root, offline=True)
        assert data.image_size == 160
        assert data.train.get(torch.arange(10), View(160)).shape == (10, 3, 160, 160)
    theirs = Imagenette(tmp_path, "train", size="160px")
    assert data.classes == tuple(names[0] for names in theirs.classes)
    assert data.train.labels.tolist() == [label for _, label in theirs._samples]


@pytest.mark.parametrize(("cls", "num_classes"), [(CIFAR10, 10), (CIFAR100, 100), (Imagenette, 10)])
def test_published_sets(
    cls: Any, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading; a download that is refused, cut off or whole; an archive; what is broken."""
    name = cls.__name__.lower()
    folder, url, _, megabytes = PUBLISHED[name]
    file, elsewhere, root = Path(url).name, tmp_path / "elsewhere", tmp_path / "data"
    if cls is Imagenette:
        write_imagenette(elsewhere)
    else:
        pixels, labels = write_cifar(elsewhere, cls, num_classes, monkeypatch)
        data = load_images(name, elsewhere, offline=True)
        assert data.classes == tuple(f"class{number}" for number in range(num_classes))
        assert data.train.labels.tolist() == labels
        found = data.train.get(torch.arange(len(labels)), View(32))
        assert np.array_equal(found.numpy(), pixels.reshape(-1, 3, 32, 32))
    md5 = pack(elsewhere / folder, elsewhere / file)
    monkeypatch.setitem(PUBLISHED, name, (folder, url, md5, megabytes))
    fails = True

    def download(url: str, where: str, filename: str, md5: str) -> None:
        shutil.copy(elsewhere / file, Path(where) / file)
        if fails:
            cut(Path(where) / file)
            raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", download)
    with pytest.raises(
        FileNotFoundError, match=rf"{name}: found neither {root}/{folder} nor {root}/{file}"
    ):
        load_images(name, root, offline=True)
    assert not root.exists()  # a mistyped root is not made
    with pytest.raises(FileNotFoundError, match="no route to host"):
        load_images(name, root)
    fails = False
    load_images(name, root)
    assert [path.name for path in root.iterdir()] == [folder]  # and nothing beside it
    shutil.rmtree(root / folder)
    shutil.copy(elsewhere / file, root)
    load_images(name, root, offline=True)
    if cls is not Imagenette:
        cut(root / folder / cls.test_list[0][0])
        with pytest.raises(ValueError, match=f"{root}/{folder}: not the published files"):
            load_images(name, root, offline=True)
    shutil.rmtree(root / folder)
    cut(root / file)
    with pytest.raises(ValueError, match=f"{root}/{file}: cannot be unpacked"):
        load_images(name, root)


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


@pytest.mark.parametrize("folder", ["", "PACS", "pacs-64"])
def test_pacs_is_split_by_domain_and_class(folder: str, tmp_path: Path) -> None:
    """Each part has the same share of each, whatever the folder; no image is in two parts."""
    write_pacs(tmp_path / folder, count=20)
    data = load_images("pacs", tmp_path, image_size=8)
    assert (data.classes, data.domains) == (PACS_CLASSES, DOMAINS)
    assert data.val is not None
    seen = set[bytes]()
    for source, count in ((data.train, 14), (data.val, 2), (data.test, 4)):
        cells, counts = source.labels.unique(dim=0, return_counts=True)
        assert len(cells) == len(PACS_CLASSES) * len(DOMAINS)
        assert set(counts.tolist()) == {count}
        images = source.get(torch.arange(len(source.labels)), View(8))
        # Domains differ in brightness.
        brightness = images.float().mean(dim=(1, 2, 3)).sub(30).div(60).round().long()
        assert torch.equal(brightness, source.labels[:, 1])
        seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 20 * len(PACS_CLASSES) * len(DOMAINS)
    again = load_images("pacs", tmp_path, image_size=8)
    rows = (torch.arange(9), View(8))
    assert torch.equal(again.test.get(*rows), data.test.get(*rows))


def test_nothing_of_an_archive_comes_to_lie_outside_its_folder(tmp_path: Path) -> None:
    """Neither by a name nor by a link; torchvision would follow both."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    archive, image = root / "imagenette2-160.tgz", tarfile.TarInfo()
    link = tarfile.TarInfo("imagenette2-160/link")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    for name, first in (("../../outside/new", []), ("imagenette2-160/link/new", [link])):
        image.name = name
        with tarfile.open(archive, "w:gz") as file:
            for member in (*first, image):
                file.addfile(member)
        with pytest.raises(ValueError, match=rf"^{archive}: cannot be unpacked"):
            load_images("imagenette", root, offline=True)
        assert not any(outside.iterdir())


def test_a_python_that_would_follow_such_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the archive is left alone."""
    archive = tmp_path / "imagenette2-160.tgz"
    archive.write_bytes(b"whole")
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ValueError, match=r"got Python .*, expected 3\.10\.12, 3\.11\.4"):
        load_images("imagenette", tmp_path, offline=True)
    assert archive.exists()


def test_pacs_that_is_not_whole_is_named(tmp_path: Path) -> None:
    shutil.rmtree(write_pacs(tmp_path, count=1) / "sketch")
    with pytest.raises(FileNotFoundError, match=r"photo, sketch in none of .*pacs-64"):
        load_images("pacs", tmp_path)
    shutil.rmtree(tmp_path / "photo" / "dog")
    (tmp_path / "sketch").mkdir()
    with pytest.raises(ValueError, match=r"photo: got class folders elephant, .* expected dog"):
        load_images("pacs", tmp_path)


def test_images_in_a_folder_called_home_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for root, size in (("home/mine", 8), ("~/mine", 12)):
        write_images(tmp_path / root, train=4, test=1, size=size)
    data = load_images("images", Path("~/mine"))
    assert data.image_size == 12
