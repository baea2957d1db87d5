"""Archives of data sets: unpacked, or downloaded first."""

from __future__ import annotations

import platform
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchvision.datasets import utils


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ``.zip`` or ``.tgz``: nothing of it comes to lie outside the folder.

    torchvision's ``extract_archive`` follows names such as ``../x`` in a tar file.
    """
    inside: dict[str, Any] = {} if archive.suffix == ".zip" else {"filter": "data"}
    shutil.unpack_archive(archive, folder, **inside)


def unpacked(
    name: str,
    root: Path,
    offline: bool,
    folder: str,
    url: str,
    md5: str | None,
    megabytes: int,
    inside: str = "",
) -> Path:
    """The folder of a data set; if it is missing, the archive beside it is unpacked.

    If the archive is missing too, it is downloaded first. ``inside`` is the folder's name in the
    archive, if it is another one. For errors see :func:`experiments.train.data.ogb.provide`.
    """
    archive = root / Path(url).name
    if (root / folder).is_dir():
        return root / folder
    is_there = archive.exists()
    advice = (
        f"{name}: found neither {root / folder} nor {archive}; put one of them there (from {url})"
    )
    if offline and not is_there:
        raise FileNotFoundError(advice)
    if archive.suffix != ".zip" and not hasattr(tarfile, "data_filter"):
        raise ValueError(
            f"{archive}: got Python {platform.python_version()}, whose tarfile follows names that "
            f"lead outside, expected 3.10.12, 3.11.4, or later; or unpack it to {root / folder}"
        )
    print(
        f"{name}: unpacking {archive}"
        if is_there
        else f"{name}: downloading {megabytes} MB to {root}",
        flush=True,
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        # So that no half of it is taken for the whole
        with TemporaryDirectory(dir=root) as scratch:
            if not is_there:
                utils.download_url(url, scratch, archive.name, md5)
            unpack(archive if is_there else Path(scratch, archive.name), Path(scratch))
            Path(scratch, inside or folder).replace(root / folder)
    except Exception as error:
        if is_there:
            raise ValueError(
                f"{archive}: cannot be unpacked ({error}); delete it, and start again"
            ) from error
        raise FileNotFoundError(f"{advice} (the download failed: {error})") from error
    return root / folder
