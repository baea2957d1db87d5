"""OGB's files: fetched whole or not at all, and named when they are broken. Nothing here asks the user anything."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
from torch_geometric.data import extract_zip
from tqdm import tqdm

from experiments.data.ogb_layout import GIGABYTES, Layout

TIMEOUT = 30
"""Seconds without an answer after which the network counts as down."""
LARGE = 1.0
"""Gigabytes above which a download needs ``allow_large_downloads``; ogb's own limit."""


class BrokenFileError(ValueError):
    """A file that is no use, with what to do about it."""

    def __init__(self, path: Path, problem: str, delete: Path) -> None:
        super().__init__(f"{path}: {problem}; delete {'it' if delete == path else delete} and load again")


def provide(layout: Layout, *, offline: bool = False, allow_large_downloads: bool = False) -> None:
    """See to it that the data set's folder is there, in ogb's version and with all its files.

    What is downloaded is moved to its place when all of it has arrived. A zip file that the user has put into
    ``layout.root`` is taken instead of a download.

    Args:
        layout: of the data set.
        offline: leave the network alone.
        allow_large_downloads: download more than 1 GB; replace a folder of another version.

    Raises:
        FileNotFoundError: files are missing, and may not or cannot be downloaded.
        ValueError: the download needs ``allow_large_downloads``, the folder is of another version, or the zip file is
            broken.
    """
    name, folder, archive = layout.name, layout.folder, layout.archive
    if layout.raw("species").exists():  # so the file was called in an early ogbn-proteins; ogb renames it as well
        layout.raw("species").rename(layout.raw("node_species"))
    occupied = folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))
    if occupied and layout.release.exists():
        if layout.missing:
            raise FileNotFoundError(
                f"{name}: {', '.join(layout.missing)} missing in {folder}; put what is missing there, or delete the "
                "folder and load again"
            )
        return
    if offline and not archive.exists():
        raise FileNotFoundError(
            f"{name}: offline, and {', '.join(layout.missing)} missing in {folder}; put them there, or OGB's "
            f"{archive.name} into {layout.root}"
        )
    if occupied and not allow_large_downloads:
        raise ValueError(
            f"{name}: {folder} is of another version, since {layout.release.name} is not there; pass "
            "--allow-large-downloads to replace it, or move it away"
        )
    layout.root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=layout.root, prefix=f"{name}-") as scratch:
        if not archive.exists():
            archive = Path(scratch) / archive.name
            _download(layout, archive, allow_large_downloads=allow_large_downloads)
        fresh = replace(layout, folder=Path(scratch) / archive.stem)
        try:
            extract_zip(str(archive), scratch, log=False)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise BrokenFileError(archive, f"not a whole zip file ({error})", archive) from error
        if fresh.missing:
            raise BrokenFileError(archive, f"holds no {', '.join(fresh.missing)}", archive)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.folder.rename(folder)


def _download(layout: Layout, target: Path, *, allow_large_downloads: bool) -> None:
    """Print the size of the download, then fetch it."""
    size = download_size(layout.meta["url"]) or GIGABYTES[layout.name]
    about = f"{layout.name}: a download of {size:.2f} GB to {layout.folder}"
    print(about, flush=True)
    if size > LARGE and not allow_large_downloads:
        raise ValueError(f"{about}, more than {LARGE:.0f} GB; pass --allow-large-downloads to start it")
    try:
        fetch(layout.meta["url"], target)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"{about} failed ({error}); try again, or put OGB's {layout.archive.name} into {layout.root}"
        ) from error


def download_size(url: str) -> float | None:
    """Gigabytes (2**30 bytes) behind an address, or ``None`` where its server does not say."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            length = response.headers["Content-Length"]
    except (OSError, HTTPException):
        return None
    return None if length is None else int(length) / 2**30


def fetch(url: str, target: Path) -> None:
    """Download a file, with a progress bar.

    Raises:
        OSError: the network failed, or broke off.
    """
    with urlopen(url, timeout=TIMEOUT) as response, target.open("wb") as file:
        total = int(response.headers["Content-Length"] or 0)
        with tqdm.wrapattr(response, "read", total=total, desc=target.name) as body:
            shutil.copyfileobj(body, file, 1 << 20)
    if total not in (0, target.stat().st_size):  # a connection that is closed early looks like the end of the file
        raise OSError(f"{target.stat().st_size} of {total} bytes have arrived")


def find_broken(tables: Iterable[Path], headed: Iterable[Path] = ()) -> tuple[Path, str] | None:
    """The first file that cannot be read, and why; ``None`` if all can. Slow: it reads them all.

    Args:
        tables: compressed CSV files of nothing but numbers.
        headed: compressed CSV files of text.
    """
    for path in headed:
        try:
            pd.read_csv(path)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            return path, f"cannot be read ({error!r:.200})"
    for path in tables:
        try:
            table = pd.read_csv(path, header=None, dtype=np.float64)
        except (OSError, ValueError, EOFError, zlib.error) as error:
            return path, f"cannot be read ({error!r:.200})"
        if table.isna().to_numpy().any():
            return path, "a number is missing"
    return None
