"""Arrays and edge lists larger than memory, read in pieces: ``.npy``, members of ``.npz``, CSV and Parquet."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]

SKIPPED = 1 << 20
"""Bytes that are read at once to get past them."""


class ArrayStream:
    """An array in a ``.npy`` file or in a member of a ``.npz`` file, read from front to back.

    Args:
        path: of the file.
        member: name of the array in a ``.npz`` file (default ``None``: the file is a ``.npy``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array of numbers, no such member, or the file is shorter or longer than its header says.
    """

    def __init__(self, path: Path, member: str | None = None) -> None:
        self.path, self.member = path, member
        with self._open() as file:
            try:
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
                self.shape, self.fortran, self.dtype = read(file)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{self}: is no .npy array ({error})") from error
            self._offset = file.tell()
        if self.dtype.kind not in "iuf":
            raise ValueError(f"{self}: got {self.dtype}, expected integers or floats")
        expected = self._offset + prod(self.shape) * self.dtype.itemsize
        if self._size != expected:
            raise ValueError(f"{self}: got {self._size} bytes, expected the {expected} of {self.shape} {self.dtype}")

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """The file from its first byte; what is wrong with it, by name."""
        try:
            if self.member is None:
                self._size = self.path.stat().st_size
                with self.path.open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive:
                    name = f"{self.member}.npy"
                    if name not in archive.namelist():
                        raise ValueError(f"{self}: got only {', '.join(archive.namelist())}")
                    self._size = archive.getinfo(name).file_size
                    with archive.open(name) as member:
                        yield member
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self}: cannot be read ({error})") from error

    def flat(self, size: int, first: int = 0, last: int | None = None) -> Iterator[NDArray[Any]]:
        """The numbers ``first`` to ``last`` in the order of the file, at most ``size`` at once.

        Raises:
            ValueError: the file is cut off, or a member's checksum is wrong (known when its last byte was read).
        """
        last = prod(self.shape) if last is None else last
        with self._open() as file:
            skip = self._offset + first * self.dtype.itemsize
            if self.member is None:
                file.seek(skip)
            else:  # read, not sought, so that zipfile computes the checksum
                while skip:
                    skip -= len(file.read(min(skip, SKIPPED))) or skip
            for begin in range(first, last, size):
                wanted = min(size, last - begin) * self.dtype.itemsize
                content = file.read(wanted)
                if len(content) < wanted:
                    raise ValueError(f"{self}: is cut off, expected {self.shape} {self.dtype}")
                yield np.frombuffer(content, self.dtype)

    def rows(self, size: int) -> Iterator[NDArray[Any]]:
        """At most ``size`` rows at once, of an array that lies row by row.

        Raises:
            ValueError: it lies column by column, or as for :meth:`flat`.
        """
        if self.fortran and len(self.shape) > 1:
            raise ValueError(f"{self}: lies column by column, expected row by row (numpy.ascontiguousarray)")
        width = prod(self.shape[1:])
        for piece in self.flat(size * width):
            yield piece.reshape(-1, *self.shape[1:])


class EdgeList(Protocol):
    """Edges that are read several times, always in the same order."""

    @property
    def num_edges(self) -> int | None:
        """How many, where that is known before they are read."""

    def pieces(self, size: int) -> Iterator[tuple[Ints, Ints]]:
        """Sources and destinations, about ``size`` edges at once."""


class ArrayEdges:
    """Edges of an array, ``(2, M)`` (sources, destinations) or ``(M, 2)``; a ``(2, 2)`` one is read as the former.

    Args:
        array: of integers.

    Raises:
        ValueError: another shape or kind of numbers.
    """

    def __init__(self, array: ArrayStream) -> None:
        shape = array.shape
        if len(shape) != 2 or 2 not in shape or array.dtype.kind not in "iu":
            raise ValueError(f"{array}: got shape {shape} of {array.dtype}, expected (2, M) or (M, 2) integers")
        by_rows = shape[0] == 2
        self.array = array
        self.num_edges = shape[1] if by_rows else shape[0]
        self._interleaved = array.fortran == by_rows
        """The two ends of an edge lie side by side."""

    def pieces(self, size: int) -> Iterator[tuple[Ints, Ints]]:
        """See :class:`EdgeList`."""
        if self._interleaved:
            for piece in self.array.flat(2 * size):
                yield _whole(piece[::2]), _whole(piece[1::2])
            return
        sources = self.array.flat(size, 0, self.num_edges)
        for source, destination in zip(sources, self.array.flat(size, self.num_edges), strict=True):
            yield _whole(source), _whole(destination)


@dataclass
class TableEdges:
    """Edges of a table with two columns, source and destination: ``.csv`` or ``.csv.gz`` with or without a header, or
    ``.parquet``.

    Args:
        path: of the file.

    Raises:
        ImportError: ``.parquet`` without pyarrow.
        ValueError: the file cannot be read.
    """

    path: Path
    num_edges: int | None = None

    def __post_init__(self) -> None:
        if self.path.suffix == ".parquet":
            with self._named():
                self.num_edges = _parquet(self.path).read_metadata(self.path).num_rows

    def pieces(self, size: int) -> Iterator[tuple[Ints, Ints]]:
        """See :class:`EdgeList`."""
        with self._named():
            for table in self._parquet(size) if self.path.suffix == ".parquet" else self._csv(size):
                if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "iu":
                    got = f"{table.shape[1]} columns of {table.dtype}"
                    raise ValueError(f"got {got}, expected two of whole numbers, source and destination")
                yield _whole(table[:, 0]), _whole(table[:, 1])

    def _csv(self, size: int) -> Iterator[NDArray[Any]]:
        import pandas as pd

        with (gzip.open if self.path.suffix == ".gz" else open)(self.path, "rt") as file:
            first = file.readline().strip().split(",")
        header = None if any(_is_number(field.strip('" ')) for field in first) else 0
        with pd.read_csv(self.path, header=header, chunksize=size) as reader:
            for table in reader:
                if not isinstance(table.index, pd.RangeIndex):  # pandas' reading of a short header
                    raise ValueError(f"got more columns than the header's {', '.join(first)}")
                yield table.to_numpy()

    def _parquet(self, size: int) -> Iterator[NDArray[Any]]:
        with _parquet(self.path).ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong, with the name of the file."""
        try:
            yield
        except (MemoryError, FileNotFoundError):
            raise
        except (OSError, ValueError, EOFError, zlib.error) as error:  # pandas' and pyarrow's are ValueErrors
            raise ValueError(f"{self.path}: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(f"{path}: Parquet files need pyarrow; pip install pyarrow") from error


def edges_of(path: Path) -> EdgeList:
    """The edges of a file, by its name.

    Raises:
        FileNotFoundError: there is none.
        ImportError: Parquet without pyarrow.
        ValueError: another kind of file, or one that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected edges as .npy, .csv, .csv.gz or .parquet")
    if path.suffix == ".npy":
        return ArrayEdges(ArrayStream(path))
    if path.suffix in (".csv", ".parquet") or path.suffixes[-2:] == [".csv", ".gz"]:
        return TableEdges(path)
    raise ValueError(f"{path}: expected edges as .npy, .csv, .csv.gz or .parquet")


def _whole(ids: NDArray[Any]) -> Ints:
    return ids.astype(np.int64, copy=False)


class ArrayWriter:
    """Writes a ``.npy`` file of so far unknown length, in pieces.

    Args:
        path: of the file.
        dtype: of the numbers.
        width: the shape of a row (default ``()``).
    """

    def __init__(self, path: Path, dtype: Any, width: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.width, self.length = path, np.dtype(dtype), width, 0

    def __enter__(self) -> ArrayWriter:
        self._file = self.path.open("wb")
        self._header()
        return self

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows at the end; they are cast, unchecked."""
        self.length += len(rows)
        rows.astype(self.dtype, copy=False).tofile(self._file)

    def _header(self) -> None:
        """numpy leaves room in it for the length to grow."""
        shape = (self.length, *self.width)
        npy.write_array_header_1_0(
            self._file, {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )

    def __exit__(self, *_: object) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._header()
        self._file.close()
        assert end == self.path.stat().st_size
