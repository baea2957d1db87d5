"""Folders of images: what is read, what is left out, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.vision.made_images import COUNTS, expected, shades, write_folder, write_image
from vision import image_files, load_images


def test_hidden_folders_and_files_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_images("images", folder), image_files("images", folder)
    write_image(folder / "train" / ".ipynb_checkpoints" / "000.png")
    write_image(folder / "train" / "cat" / ".ipynb_checkpoints" / "000.png")
    (folder / "train" / "dog" / "._000.png").write_bytes(b"no image")
    (folder / "test" / ".DS_Store").write_bytes(b"no image")
    after = load_images("images", folder), image_files("images", folder)
    assert after[0].classes == before[0].classes
    assert shades(after[0].train) == shades(before[0].train)
    assert after[1] == before[1]
    assert capsys.readouterr().out == ""


def test_files_that_are_left_out_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = write_image(folder / "train" / "loose.png")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    assert shades(load_images("images", folder).train) == expected(COUNTS)
    out = capsys.readouterr().out
    assert (
        f"images: 1 files in {folder / 'train'} lie in no class folder and are left out; the first is {loose}\n" in out
    )
    assert f"are no images and are left out; the first is {folder / 'train' / 'cat' / 'notes.txt'}\n" in out


@pytest.mark.parametrize("litter", [False, True])
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_folder_is_named(folder: Path, part: str, litter: bool) -> None:
    (folder / part / "newt").mkdir()
    if litter:
        (folder / part / "newt" / "readme.txt").write_text("none yet")
    with pytest.raises(ValueError, match=rf"^images: no image in the class folder {folder}/{part}/newt, expected"):
        load_images("images", folder)


def test_links_are_followed_and_val_beside_test_is_not_read(folder: Path, tmp_path: Path) -> None:
    write_folder(folder / "val", COUNTS)
    found = image_files("images", folder)
    assert len(found) == sum(COUNTS.values()) + 3
    assert not [file for file in found if "val" in file.parts]
    shutil.copytree(folder, tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "train" / "cat")
    (tmp_path / "linked" / "train" / "cat").symlink_to(folder / "train" / "cat")
    assert len(image_files("images", tmp_path / "linked")) == len(found)
    assert image_files("cifar100", folder) == image_files("imagenette", folder) == []


def test_names_that_are_not_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = folder / "train"
    (train / "cat" / "000.png").rename(train / "cat" / os.fsdecode(b"caf\xe9.png"))
    (train / "cat" / os.fsdecode(b"caf\xe9.txt")).write_text("no image")
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / part / os.fsdecode(b"d\xf8g"))
    data = load_images("images", folder)
    assert data.classes == ("cat", "d\\xf8g", "owl")
    assert sorted(shades(data.train)) == sorted(expected(COUNTS))
    assert "the first is" in capsys.readouterr().out
    assert len(image_files("images", folder)) == sum(COUNTS.values()) + 3


@pytest.mark.parametrize("memory_limit", [2**31, 0])
def test_a_link_to_nowhere(folder: Path, memory_limit: int) -> None:
    link = folder / "train" / "cat" / "gone.png"
    link.symlink_to(folder / "nowhere.png")
    with pytest.raises(ValueError, match=rf"cannot read the image {link} \(FileNotFoundError"):
        shades(load_images("images", folder, image_size=8, memory_limit=memory_limit).train)
    data = load_images("images", folder, image_size=8, memory_limit=memory_limit, skip_broken=True)
    assert shades(data.train) == expected(COUNTS)
