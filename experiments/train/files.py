"""The one way to read each kind of file, and to name one that cannot be written.

What is broken is one ``ValueError`` that begins with the path. A missing file is a
``FileNotFoundError``.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
RESULTS = Path(__file__).parents[2] / "results"
"""Result files that are committed."""
LONGEST = 500
"""Characters of what is said of a file, whose content may be in it."""


def read_json(path: Path, kind: type[T]) -> T:
    """Read JSON as :func:`parse_json` does."""
    with naming(path):
        return parse_json(path.read_bytes(), kind)


def parse_json(text: str | bytes, kind: type[T]) -> T:
    """JSON as a dataclass or plain types; ``"32"``, ``3.0`` and ``true`` are no integers, NaN is
    no number.

    Raises:
        ValueError: names the key, what it got and what is legal.
    """
    from pydantic import ValidationError  # not before it is needed: half a second

    given = text.encode() if isinstance(text, str) else text
    try:
        value: T = _adapter(tuple[kind]).validate_json(b"[%b]" % given)[0]  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if "error" in first.get("ctx", {}):  # a check of the dataclass itself
            raise ValueError(str(first["ctx"]["error"])[:LONGEST]) from error
        where = ".".join(map(str, first["loc"][1:]))
        got = f"{where:.100}: got {first['input']!r:.80}, " if where else ""
        raise ValueError(f"{got}{first['msg'][0].lower()}{first['msg'][1:]}") from error
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks JSON of this kind: not a bare dataclass, which takes no configuration."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def read_npy(path: Path) -> NDArray[Any]:
    """Read an array of numbers."""
    with naming(path):
        return _of_numbers(np.load(path, allow_pickle=False))


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of numbers by name; of ``names`` those that are there (default: all)."""
    with naming(path), np.load(path, allow_pickle=False) as archive:
        wanted = [name for name in archive.files if names is None or name in names]
        arrays = {}
        for name in wanted:
            try:
                arrays[name] = _of_numbers(archive[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return arrays


def _of_numbers(array: NDArray[Any]) -> NDArray[Any]:
    if not array.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"got {array.dtype} of shape {array.shape}, expected rows of numbers")
    return array


def read_csv(path: Path, **options: Any) -> Any:
    """Read a table of at least one row by ``pandas.read_csv`` and its options."""
    import pandas as pd

    with naming(path):
        table = pd.read_csv(path, **options)
        if table.empty or not isinstance(table.index, pd.RangeIndex):
            raise ValueError("has no rows, or more fields in a row than in the header")
        return table


def read_tensors(path: Path, classes: Collection[Any] = ()) -> Any:
    """Read what ``torch.save`` wrote: tensors, plain containers, and objects of ``classes``."""
    import torch

    with naming(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at checksums
                raise ValueError(f"{damaged} is not as its checksum says")
        with allowing(classes):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # its text tells how to load it all the same
                raise ValueError("holds other objects than tensors") from error


@contextmanager
def allowing(classes: Collection[Any]) -> Iterator[None]:
    """Let ``torch.load`` make objects of these classes, and of no others that it does not know."""
    import torch

    known = torch.serialization.get_safe_globals()  # safe_globals forgets them at its end
    with torch.serialization.safe_globals([part for part in classes if part not in known]):
        yield


def load_weights(model: Any, path: Path) -> None:
    """Give a model the weights in a safetensors file."""
    from safetensors.torch import load_file

    with naming(path):
        model.load_state_dict(load_file(path))


def read_pickle(path: Path) -> Any:
    """Read arrays and sparse matrices as Python 2 pickled them.

    Nothing else in the file is made or run.
    """
    with naming(path):
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = ("_reconstruct", "ndarray", "dtype", "csr_matrix", "defaultdict", "list", "encode")
        if (
            module.partition(".")[0] in ("numpy", "scipy", "collections", "__builtin__", "_codecs")
            and name in known
        ):
            return super().find_class(module, name)
        raise ValueError(f"holds {module}.{name}, expected arrays")


def check_finished(*runs: Path) -> None:
    """Refuse run folders of which none holds a finished run.

    Takes no time, so that commands ask before they import torch.
    """
    if not runs:
        raise ValueError("runs: got none, expected at least one folder")
    missing = [path for path in (run / "summary.json" for run in runs) if not path.exists()]
    if len(missing) == len(runs):
        expected = "the folder of a finished run; an unfinished one continues by --resume"
        raise ValueError(f"{', '.join(map(str, missing))}: is missing, expected {expected}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, in one line that begins with its path."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if str(error).startswith(f"{path}: "):
            raise
        # As gmoe does it, whose function would import torch: commands err before they do.
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({why[:LONGEST]})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written: the error of a full disk does not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:  # as where it cannot be opened
            raise
        raise OSError(f"{path}: cannot be written ({error})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside ``path``, which takes its place in one step when it is whole.

    A process that is killed, or a disk that is full, leaves the file that was there before.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # two may write it at once
    with writing(path):
        try:
            yield fresh
            fresh.replace(path)
        finally:
            with suppress(OSError):  # the one that is on its way says more
                fresh.unlink(missing_ok=True)
