"""What tells data apart: digests of files, and of folders of images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_digest(path: Path) -> str | None:
    """Of the content of a file, or of a folder's CSV files or ``graph.json``; ``None`` where there is none."""
    files = (
        sorted([*path.glob("*.csv"), *path.glob("graph.json")]) if path.is_dir() else [path] if path.exists() else []
    )
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16] if files else None


def images_digest(name: str, root: Path) -> str | None:
    """Of the names and sizes of the files that a data set of images is read from; ``None`` where there are none."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    found = hashlib.sha256()
    base = os.path.commonpath(files) if files else root
    for file in files:
        size = file.stat().st_size if file.exists() else None  # a link to nowhere
        found.update(os.fsencode(f"{file.relative_to(base).as_posix()} {size}\n"))
    return found.hexdigest()[:16] if files else None
