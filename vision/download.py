"""Data sets that torchvision downloads: announced, in place only when whole; what is missing or broken is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torchvision.datasets import CIFAR10, CIFAR100, Imagenette
from torchvision.datasets.utils import check_integrity

CIFAR = {"cifar10": (CIFAR10, 170), "cifar100": (CIFAR100, 169)}
"""Class, and megabytes of the archive."""


class Archive(NamedTuple):
    """A data set as it is published."""

    folder: str
    """What it unpacks to, inside the root."""
    url: str
    """Where it is from; the end of it is the name of the archive."""
    md5: str
    megabytes: int
    fetch: Callable[[Path], object]
    """Given a folder, downloads the archive to it, unless it is there, and unpacks it."""


def archive_of(name: str) -> Archive:
    """Of ``cifar10`` or ``cifar100``, or of ``imagenette`` with 160 pixels on the shorter side."""
    if name == "imagenette":
        url, md5 = Imagenette._ARCHIVES["160px"]
        return Archive(Path(url).stem, url, md5, 99, lambda root: Imagenette(root, size="160px", download=True))
    cls, megabytes = CIFAR[name]
    return Archive(cls.base_folder, cls.url, cls.tgz_md5, megabytes, lambda root: cls(root, download=True))


def unpacked(name: str, root: Path, offline: bool, *, instead: str = "") -> Path:
    """The folder of a data set, after unpacking its archive, or downloading it, where it is not there yet.

    Args:
        name: how the user calls it.
        root: where its folder is, or its archive, or where they go to.
        offline: never download.
        instead: a further form in which it could have been there; for the message.

    Raises:
        FileNotFoundError: it is not there, and may not or cannot be downloaded; says what was looked for, and where.
        ValueError: the archive is there, but is not whole.
    """
    archive = archive_of(name)
    folder, file = root / archive.folder, root / Path(archive.url).name
    if folder.is_dir():
        return folder
    if file.exists():
        if not check_integrity(file, archive.md5):
            raise broken(name, file)
        print(f"{name}: unpacking {file}", flush=True)
        _in_place(file, folder, archive)
        return folder
    advice = (
        f"{name}: found neither the folder {folder} nor the archive {file}{instead}. Put one of them there (about "
        f"{archive.megabytes} MB, from {archive.url}), or give another root"
    )
    if offline:
        raise FileNotFoundError(advice)
    print(f"{name}: downloading about {archive.megabytes} MB to {root}", flush=True)
    try:
        _in_place(file, folder, archive)
    except Exception as error:
        raise FileNotFoundError(f"{advice} (the download failed: {error})") from error
    return folder


def check_files(name: str, folder: Path) -> None:
    """The files of ``cifar10`` or ``cifar100`` against their MD5s.

    Raises:
        FileNotFoundError: files are missing; names them.
        ValueError: a file is not what it should be; names it.
    """
    cls, _ = CIFAR[name]
    sums = dict([*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]])
    missing = [file for file in sums if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(
            f"{name}: {', '.join(missing)} missing in {folder}; unpacking that was cut off may have left it so. "
            "Delete the folder, and start again"
        )
    for file, md5 in sums.items():
        if not check_integrity(folder / file, md5):
            raise broken(name, folder / file)


def broken(name: str, file: Path) -> ValueError:
    """The error for a file that has not the MD5 of the published one."""
    return ValueError(
        f"{name}: {file} is not whole, or not the published file (its MD5 differs); a download that was cut off may "
        "have left it. Delete it, and start again"
    )


def _in_place(file: Path, folder: Path, archive: Archive) -> None:
    """Unpacks beside ``folder`` first, so that no half of it is ever taken for the whole."""
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=folder.parent, prefix="download-") as scratch:
            if file.exists():
                (Path(scratch) / file.name).symlink_to(file.resolve())
            archive.fetch(Path(scratch))
            (Path(scratch) / folder.name).replace(folder)
    except BaseException:
        for parent in new:  # of a root that was mistyped, nothing stays
            parent.rmdir()
        raise
