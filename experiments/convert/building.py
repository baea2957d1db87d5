"""A folder that appears when it is whole; one that was cut off is replaced by the next run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from experiments.train.checks import check
from experiments.train.files import writing

SCRATCH = "scratch"
"""A folder in DIR.new for what is unfinished; it says whose DIR.new is."""


@contextmanager
def building(to: Path, option: str = "to") -> Iterator[Path]:
    """A folder ``to.new`` that becomes ``to`` in the end, and goes where there is an error."""
    folder = to.with_name(f"{to.name}.new")
    check(not to.exists(), option, f"{to}, which is there already", "another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{option}: another process is writing {folder}") from error
        is_ours = not any(folder.iterdir()) or (folder / SCRATCH).exists()
        legal = "none, or those of a run that was cut off"
        check(is_ours, option, f"files of another program in {folder}", legal)
        stack.callback(_remove, folder)
        _empty(folder)
        (folder / SCRATCH).mkdir(exist_ok=True)
        with writing(folder):
            yield folder
        _empty(folder / SCRATCH)
        folder.rename(to)
        (to / SCRATCH).rmdir()


def _empty(folder: Path) -> None:
    """Delete what is in a folder; :data:`SCRATCH` goes last, since without it the rest is nobody's.

    A process may be killed in between.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SCRATCH):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(folder: Path) -> None:
    """Delete what an error leaves; nothing is left of a folder that has its final name."""
    with suppress(OSError):  # the one that is on its way says more
        _empty(folder)
        folder.rmdir()
