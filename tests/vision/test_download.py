"""Downloads: announced or refused; archives that are there, cut off, or half unpacked. Nothing goes to the network."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette, utils

from tests.vision.made_images import cut, pack, write_cifar, write_imagenette
from vision import load_images

ARCHIVES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", 170),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", 169),
    "imagenette": ("imagenette2-160", "imagenette2-160.tgz", 99),
}
Serve = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Makes the archive of a data set, of the MD5 that torchvision expects, and returns where it is."""

    def make(name: str) -> Path:
        elsewhere = tmp_path / "elsewhere"
        archive = elsewhere / ARCHIVES[name][1]
        if name == "imagenette":
            md5 = pack(write_imagenette(elsewhere), archive)
            monkeypatch.setitem(Imagenette._ARCHIVES, "160px", (Imagenette._ARCHIVES["160px"][0], md5))
        else:
            cls = CIFAR10 if name == "cifar10" else CIFAR100
            write_cifar(elsewhere, cls, 10 if name == "cifar10" else 100, monkeypatch)
            monkeypatch.setattr(cls, "tgz_md5", pack(elsewhere / cls.base_folder, archive))
        return archive

    return make


def server(archive: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """What torchvision downloads is a copy of the archive, or half of one and an error."""

    def download(url: str, root: str | Path, filename: str | None = None, md5: str | None = None) -> None:
        assert url.endswith(archive.name)
        target = Path(root) / archive.name
        shutil.copy(archive, target)
        if error is not None:
            cut(target)
            raise error

    monkeypatch.setattr(utils, "download_url", download)


@pytest.mark.parametrize("name", ARCHIVES)
def test_offline_says_what_was_looked_for(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder, archive, megabytes = ARCHIVES[name]
    message = rf"^{name}: found neither the folder {root}/{folder} nor the archive {root}/{archive}.*{megabytes} MB"
    with pytest.raises(FileNotFoundError, match=message):
        load_images(name, root, offline=True)
    assert not root.exists()  # a mistyped root is not made


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_download_is_announced(
    name: str, publish: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server(publish(name), monkeypatch)
    data = load_images(name, tmp_path / "data")
    folder, _, megabytes = ARCHIVES[name]
    assert f"{name}: downloading about {megabytes} MB to {tmp_path}/data\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data").iterdir()] == [folder]  # and nothing beside it
    server(tmp_path, monkeypatch, AssertionError("downloaded twice"))
    assert load_images(name, tmp_path / "data").classes == data.classes
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_a_download_that_fails_leaves_nothing(
    name: str, error: Exception, publish: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server(publish(name), monkeypatch, error)
    with pytest.raises(FileNotFoundError) as offline:
        load_images(name, tmp_path / "data", offline=True)
    with pytest.raises(FileNotFoundError) as online:
        load_images(name, tmp_path / "data")
    assert str(online.value) == f"{offline.value} (the download failed: {error})"
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError):
        load_images(name, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_there_is_unpacked(
    name: str, publish: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = publish(name)
    (tmp_path / "data").mkdir()
    shutil.copy(archive, tmp_path / "data")
    load_images(name, tmp_path / "data", offline=True)
    assert f"{name}: unpacking {tmp_path}/data/{archive.name}\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(ARCHIVES[name][:2])


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("offline", [True, False])
def test_half_an_archive_is_named(name: str, offline: bool, publish: Serve, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    archive = cut(Path(shutil.copy(publish(name), tmp_path / "data")))
    with pytest.raises(ValueError, match=rf"^{name}: {archive} is not whole.*Delete it, and start again"):
        load_images(name, tmp_path / "data", offline=offline)
    assert list((tmp_path / "data").iterdir()) == [archive]


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_files_of_cifar_missing_or_cut_off(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    path = cut(tmp_path / "cifar-10-batches-py" / file)
    with pytest.raises(ValueError, match=rf"^cifar10: {path} is not whole"):
        load_images("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^cifar10: {file} missing in {path.parent}"):
        load_images("cifar10", tmp_path)
