"""Archives of data sets that are unpacked."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from experiments.train.data.archives import unpack


def test_nothing_of_an_archive_comes_to_lie_outside_its_folder(tmp_path: Path) -> None:
    """Neither by a name nor by a link; torchvision would follow both."""
    outside, archive = tmp_path / "outside", tmp_path / "a.tgz"
    outside.mkdir()
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    for name, first in (("../outside/new", []), ("link/new", [link])):
        with tarfile.open(archive, "w:gz") as file:
            for member in (*first, tarfile.TarInfo(name)):
                file.addfile(member)
        with pytest.raises(tarfile.FilterError):
            unpack(archive, tmp_path / "root")
        assert not any(outside.iterdir())
