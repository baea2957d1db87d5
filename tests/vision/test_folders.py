"""Folders of images: what is read, what is left out, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

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


def test_images_in_no_class_folder_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = write_image(folder / "train" / "loose.png")
    assert shades(load_images("images", folder).train) == expected(COUNTS)
    assert capsys.readouterr().out == (
        f"images: 1 files in {folder / 'train'} are left out, for they lie in no class folder; the first is {loose}\n"
    )


@pytest.mark.parametrize(("link", "end"), [("cat/loop", "cat"), ("cat/up", "."), ("cat/a/b", "cat"), ("cat/out", "..")])
def test_a_folder_that_holds_itself(folder: Path, link: str, end: str) -> None:
    train = folder / "train"
    (train / link).parent.mkdir(exist_ok=True)
    (train / link).symlink_to(train / end)
    with pytest.raises(ValueError, match=rf"{train / link} links to .*, in which it lies; remove the link"):
        load_images("images", folder)


def test_two_folders_that_hold_each_other(folder: Path, tmp_path: Path) -> None:
    there = write_image(tmp_path / "there" / "1.png").parent
    (there / "back").symlink_to(folder / "train" / "cat")
    (folder / "train" / "cat" / "there").symlink_to(there)
    with pytest.raises(ValueError, match=r"back links to .*cat, in which it lies"):
        load_images("images", folder)
    (there / "back").unlink()
    assert len(load_images("images", folder, image_size=8).train) == sum(COUNTS.values()) + 1


@pytest.mark.parametrize("name", ["cat", "cat/inner"])
def test_a_folder_that_cannot_be_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = folder / "train" / name
    write_image(closed / "1.png")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=str(closed)):
        load_images("images", folder)


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


def test_the_files_that_are_read(folder: Path, tmp_path: Path) -> None:
    assert len(image_files("images", folder)) == sum(COUNTS.values()) + 3
    write_folder(folder / "val", COUNTS)  # beside test, it is not read
    assert not [file for file in image_files("images", folder) if "val" in file.parts]
    assert image_files("cifar100", folder) == image_files("imagenette", folder) == []
    shutil.copytree(folder, tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "train" / "cat")
    (tmp_path / "linked" / "train" / "cat").symlink_to(folder / "train" / "cat")
    assert len(image_files("images", tmp_path / "linked")) == len(image_files("images", folder))
