"""Write the folder that gmoe.data.StoredGraph opens, of a graph larger than memory: edges are sorted in pieces."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.streams import ArrayStream, ArrayWriter, EdgeList, Ints

PARTS = ("train", "val", "test")
UNFINISHED = "unfinished"
"""A file in DIR.new that says whose folder it is."""
EDGE_BYTES = 20
"""Memory an edge of a bucket takes while it is sorted: key, unique key, mask, and some for the allocator."""
PIECE_BYTES = 64
"""Memory an edge takes while it goes into its bucket: as read, as found in a zip file, keys both ways."""
PIECE = 1 << 23
"""Edges that are read at once, at most; and numbers of other arrays."""
BLOCK = 1 << 17
"""The same where there is nothing to gain by more."""
SECONDS = 30.0
"""A line of progress at least so often, where the output is a file."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What is converted.

    Args:
        name: of the graph.
        edges: source and destination, by node number.
        x: (N, D) features.
        y: (N,) or (N, 1) classes, -1 or NaN where there is none.
        split: nodes of train, val and test.
        num_classes: ``None`` (default): the largest label, plus 1.
        source: what it came from.
    """

    name: str
    edges: EdgeList
    x: ArrayStream
    y: ArrayStream | None = None
    split: Mapping[str, Ints] = field(default_factory=dict)
    num_classes: int | None = None
    source: str = ""


def convert(
    given: Input, to: Path, *, half: bool = False, directed: bool = False, memory: float = 2.0, shown: bool = True
) -> dict[str, Any]:
    """Write a folder for :class:`gmoe.data.StoredGraph`.

    The in-edges of a node ascend by source. Undirected, the reverse of every edge is added and an edge that is there
    twice is kept once, as PyG's ``to_undirected`` does (a self-loop has itself as its reverse); directed, edges stay as
    they are, parallel ones too.

    Args:
        given: the graph.
        to: the folder.
        half: features as float16 (default: float32, and float16 where they were).
        directed: add no reverse edges (default ``False``).
        memory: gigabytes to sort edges in (default 2); an array of 8 bytes a node comes on top.
        shown: report progress (default ``True``).

    Returns:
        The content of ``graph.json``.

    Raises:
        ValueError: something in the data that cannot be, with the place where it is; a folder that is there; too little
            memory for the node with the most in-edges; not enough space on the disk.
    """
    if not memory > 0:
        raise ValueError(f"memory: got {memory}, expected gigabytes, more than 0")
    check_shapes(given)
    progress = Progress(shown)
    converter = Converter(given=given, half=half, directed=directed, memory=round(memory * 1e9), progress=progress)
    with building(to) as folder:
        if given.edges.num_edges is not None:
            converter.check_space(folder, given.edges.num_edges)
        return converter.write(folder)


def check_shapes(given: Input) -> None:
    """Refuse arrays and splits that do not belong to one graph, as far as it can be told without reading them.

    Raises:
        ValueError: as it says.
    """
    x, y = given.x, given.y
    if len(x.shape) != 2 or 0 in x.shape:
        raise ValueError(f"{x}: got shape {x.shape}, expected (nodes, features), one of each at least")
    nodes = x.shape[0]
    if nodes > math.isqrt(2**63 - 1):  # an edge is one int64
        raise ValueError(f"{x}: got {nodes} nodes, expected at most {math.isqrt(2**63 - 1)}")
    if y is not None and y.shape not in ((nodes,), (nodes, 1)):
        raise ValueError(f"{y}: got shape {y.shape}, expected ({nodes},), a label for each row of {x}")
    seen: Ints = np.empty(0, np.int64)
    for part, index in given.split.items():
        if len(index) and not 0 <= index.min() <= index.max() < nodes:
            raise ValueError(f"{part}: got nodes {index.min()} to {index.max()}, expected 0 to {nodes - 1}")
        seen, counts = np.unique(np.concatenate([seen, index]), return_counts=True)
        if len(counts) and counts.max() > 1:
            node = seen[counts.argmax()]
            raise ValueError(f"{part}: got node {node} twice, or in an earlier part as well, expected each node once")


@contextmanager
def building(to: Path) -> Iterator[Path]:
    """A folder ``to.new`` that becomes ``to`` in the end, and goes where there is an error.

    Raises:
        ValueError: ``to`` is there, another conversion writes it, or ``to.new`` is somebody's own.
    """
    folder = to.with_name(f"{to.name}.new")
    if to.exists():
        raise ValueError(f"to: {to} is there already; delete it, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"to: another conversion is writing {folder}") from error
        before = {path.name for path in folder.iterdir()}
        if before and before.isdisjoint({UNFINISHED, "graph.json"}):
            raise ValueError(f"to: {folder} is not of a conversion that was cut off; move it away")
        try:
            _empty(folder)
            (folder / UNFINISHED).touch()
            yield folder
            folder.rename(to)
        except BaseException:
            _empty(folder)
            folder.rmdir()
            raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Delete what is in a folder, the mark of whose it is last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (UNFINISHED, "graph.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Progress:
    """How far a stage is: a bar in a terminal; elsewhere a line at its end, and every 30 seconds.

    Args:
        shown: whether anything is shown (default ``True``).
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown

    def follow(self, what: str, total: float | None) -> Progress:
        """Begin a stage of ``total`` units; ``None``: it is not known how many."""
        in_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what, total=total, unit_scale=True, unit=" ", disable=not (self._shown and in_terminal), leave=False
        )
        self._lines = self._shown and not in_terminal
        self._what, self._total, self._done = what, total, 0.0
        self._begun = self._last = time.monotonic()
        return self

    def add(self, amount: float) -> None:
        """So much more is done."""
        self._done += amount
        self._bar.update(amount)
        now = time.monotonic()
        if self._lines and now - self._last > SECONDS:
            spent = now - self._begun
            left = "" if self._total is None else _left(spent / max(self._done, 1) * (self._total - self._done))
            self._say(f"{self._done:.4g}{'' if self._total is None else f' of {self._total:.4g}'}{left}")
            self._last = now

    def finish(self) -> None:
        """The stage is done."""
        self._bar.close()
        spent = timedelta(seconds=round(time.monotonic() - self._begun))
        if self._lines:
            self._say(f"{self._done:.4g}, done in {spent}")

    def _say(self, figures: str) -> None:
        print(f"{self._what}: {figures}", file=sys.stderr, flush=True)


def _left(seconds: float) -> str:
    return f"; about {timedelta(seconds=round(max(seconds, 0)))} left"


@dataclass(frozen=True, kw_only=True)
class Converter:
    """Writes the arrays of a graph, in pieces. The arguments are :func:`convert`'s, memory in bytes."""

    given: Input
    half: bool
    directed: bool
    memory: int
    progress: Progress

    @property
    def nodes(self) -> int:
        """How many."""
        return self.given.x.shape[0]

    @property
    def x_type(self) -> np.dtype:
        """Of the features."""
        return np.dtype(np.float16 if self.half or self.given.x.dtype == np.float16 else np.float32)

    @property
    def id_type(self) -> np.dtype:
        """Of node numbers."""
        return np.dtype(np.int32 if self.nodes < 2**31 else np.int64)

    def check_space(self, folder: Path, edges: int) -> None:
        """Refuse a disk that is too full.

        Raises:
            ValueError: it is; says what is needed at most and what is free.
        """
        both = edges if self.directed else 2 * edges
        rows, columns = self.given.x.shape
        rest = 16 * rows + 8 * sum(map(len, self.given.split.values()))
        stored = both * self.id_type.itemsize + rows * columns * self.x_type.itemsize
        needed, free = rest + max(8 * both, stored), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"to: {needed / 1e9:.2f} GB may be needed in {folder.parent}, expected no more than the "
                f"{free / 1e9:.2f} GB that are free"
            )

    def write(self, folder: Path) -> dict[str, Any]:
        """All of it, and then ``graph.json``."""
        start = self.count()
        self.check_space(folder, int(start[-1]) if self.directed else int(start[-1]) // 2)
        bounds = self.bounds(start)
        self.distribute(folder, bounds)
        num_edges = self.sort(folder, bounds, start)
        with ArrayWriter(folder / "start.npy", np.int64) as file:
            file.write(start)
        del start
        self.features(folder)
        num_classes = self.labels(folder)
        for part, index in self.given.split.items():
            np.save(folder / f"{part}.npy", index)
        graph: dict[str, Any] = {
            "format": 1,
            "name": self.given.name,
            "source": self.given.source,
            "num_nodes": self.nodes,
            "num_edges": num_edges,
            "undirected": not self.directed,
            "num_classes": num_classes,
            "arrays": self.described(folder),
        }
        (folder / UNFINISHED).write_text(json.dumps(graph, indent=2) + "\n")
        (folder / UNFINISHED).rename(folder / "graph.json")
        return graph

    def edges(self, what: str) -> Iterator[tuple[Ints, Ints]]:
        """The edges in pieces, checked."""
        begun, edges = 0, self.given.edges
        progress = self.progress.follow(what, edges.num_edges)
        for source, destination in edges.pieces(max(1, min(self.memory // PIECE_BYTES, PIECE))):
            for ids in (source, destination):
                if len(ids) and not 0 <= ids.min() <= ids.max() < self.nodes:
                    place = int(((ids < 0) | (ids >= self.nodes)).argmax())
                    raise ValueError(
                        f"edges: edge {begun + place} is ({source[place]}, {destination[place]}), expected nodes "
                        f"0 to {self.nodes - 1}"
                    )
            yield source, destination
            begun += len(source)
            progress.add(len(source))
        progress.finish()
        if edges.num_edges not in (None, begun):
            raise ValueError(f"edges: got {begun}, expected {edges.num_edges}")

    def count(self) -> Ints:
        """(N + 1,) where the in-edges of each node would begin, were none left out."""
        start = np.zeros(self.nodes + 1, np.int64)
        for source, destination in self.edges("1/5 edges, counting"):
            np.add.at(start[1:], destination, 1)
            if not self.directed:
                np.add.at(start[1:], source, 1)
        return np.cumsum(start, out=start)

    def bounds(self, start: Ints) -> Ints:
        """The first nodes of buckets that can be sorted in memory, and N.

        Raises:
            ValueError: the in-edges of one node cannot.
        """
        room = self.memory // EDGE_BYTES
        for first in range(0, self.nodes, PIECE):
            degrees = np.diff(start[first : first + PIECE + 1])
            if (degree := int(degrees.max())) > room:
                least = math.ceil(degree * EDGE_BYTES / 1e3) / 1e6
                raise ValueError(
                    f"memory: got {self.memory / 1e9:g}, expected at least {least:g} GB, since node "
                    f"{first + degrees.argmax()} has {degree} in-edges"
                )
        bounds = [0]
        while bounds[-1] < self.nodes:
            bounds.append(int(np.searchsorted(start, start[bounds[-1]] + room, side="right")) - 1)
        return np.array(bounds)

    def distribute(self, folder: Path, bounds: Ints) -> None:
        """Write each edge as one number, destination * N + source, to the file of its destination's bucket."""
        (folder / "buckets").mkdir()
        for source, destination in self.edges("2/5 edges, into buckets"):
            keys = np.empty(len(source) * (1 if self.directed else 2), np.int64)
            _keys(destination, source, self.nodes, keys[: len(source)])
            if not self.directed:
                _keys(source, destination, self.nodes, keys[len(source) :])
            keys.sort()
            cuts = np.searchsorted(keys, bounds * self.nodes)
            for bucket, (begin, end) in enumerate(itertools.pairwise(cuts)):
                if begin < end:
                    with _bucket(folder, bucket).open("ab") as file:
                        keys[begin:end].tofile(file)

    def sort(self, folder: Path, bounds: Ints, start: Ints) -> int:
        """Write the sources bucket by bucket, put into ``start`` where each node's begin, and return how many they are.

        Raises:
            ValueError: the edges are not those that were counted.
        """
        progress = self.progress.follow("3/5 edges, sorting", int(start[-1]))
        expected = np.diff(start[bounds])
        with ArrayWriter(folder / "source.npy", self.id_type) as file:
            for bucket, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
                path = _bucket(folder, bucket)
                keys = np.fromfile(path, np.int64) if path.exists() else np.empty(0, np.int64)
                path.unlink(missing_ok=True)
                if len(keys) != expected[bucket]:
                    raise ValueError(f"edges: got {len(keys)} of {expected[bucket]} in a bucket; did the input change?")
                keys.sort()
                if not self.directed and len(keys):
                    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
                for node in range(first, last, BLOCK):
                    nodes = np.arange(node, min(node + BLOCK, last))
                    start[nodes] = file.length + np.searchsorted(keys, nodes * self.nodes)
                written = file.length
                for begin in range(0, len(keys), BLOCK):
                    file.write(keys[begin : begin + BLOCK] % self.nodes)
                assert file.length == written + len(keys)
                progress.add(int(expected[bucket]))
            start[-1] = file.length
        (folder / "buckets").rmdir()
        progress.finish()
        return file.length

    def features(self, folder: Path) -> None:
        """Write ``x``.

        Raises:
            ValueError: NaN, infinity, or a number that is too large for the type; with its row.
        """
        x = self.given.x
        size = max(1, min(self.memory // (32 * x.shape[1]), PIECE // x.shape[1]))
        progress, row = self.progress.follow("4/5 features", self.nodes), 0
        with ArrayWriter(folder / "x.npy", self.x_type, x.shape[1:]) as file:
            for rows in x.rows(size):
                with np.errstate(over="ignore"):
                    cast = rows.astype(self.x_type, copy=False)
                finite = np.isfinite(cast).all(axis=1)
                if not finite.all():
                    place = int(finite.argmin())
                    largest = np.abs(rows[place]).max()
                    got = f"{largest:g}" if np.isfinite(largest) else "NaN or infinity"
                    most = np.finfo(self.x_type).max
                    raise ValueError(f"{x}: row {row + place} holds {got}, expected at most {most:g} for {self.x_type}")
                file.write(cast)
                row += len(rows)
                progress.add(len(rows))
        progress.finish()

    def labels(self, folder: Path) -> int | None:
        """Write ``y``, with -1 for NaN, and return the number of classes.

        Raises:
            ValueError: labels that are no classes, or none in a part of the split.
        """
        y, classes = self.given.y, self.given.num_classes
        if y is None:
            return classes
        size = max(1, min(self.memory // 64, PIECE))
        highest = max((int(piece.max(initial=-1)) for piece in self._classes(y, size)), default=-1)
        if classes is not None and highest >= classes:
            raise ValueError(f"{y}: got label {highest}, expected 0 to {classes - 1}, and NaN or -1 for none")
        with ArrayWriter(folder / "y.npy", np.min_scalar_type(min(-1, -1 - highest))) as file:
            for piece in self._classes(y, size):
                file.write(piece)
        stored = np.load(folder / "y.npy", mmap_mode="r")
        for part, index in self.given.split.items():
            bare = stored[index] < 0
            if bare.any():
                raise ValueError(f"{y}: node {index[bare.argmax()]} of {part} has no label, expected 0 or more")
        return highest + 1 if classes is None else classes

    @staticmethod
    def _classes(y: ArrayStream, size: int) -> Iterator[Ints]:
        for piece in y.flat(size):
            known = np.where(np.isnan(piece), -1, piece)
            low, high = known.min(), known.max()
            if low < -1 or high >= 2**31 or (known % 1 != 0).any():
                raise ValueError(f"{y}: got {low:g} to {high:g}, expected whole numbers, and NaN or -1 for none")
            yield known.astype(np.int64)

    def described(self, folder: Path) -> dict[str, dict[str, Any]]:
        """The arrays of the folder, with their checksums."""
        files = [folder / f"{name}.npy" for name in ("start", "source", "x", "y", *PARTS)]
        files = [file for file in files if file.exists()]
        progress = self.progress.follow("5/5 bytes, checksums", sum(file.stat().st_size for file in files))
        found = {}
        for path in files:
            digest, array = hashlib.sha256(), np.load(path, mmap_mode="r")
            with path.open("rb") as file:
                while content := file.read(8 * BLOCK):
                    digest.update(content)
                    progress.add(len(content))
            found[path.stem] = {
                "file": path.name, "dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest.hexdigest(),
            }  # fmt: skip
        progress.finish()
        return found


def _keys(destination: Ints, source: Ints, nodes: int, out: Ints) -> None:
    np.multiply(destination, nodes, out=out)
    out += source


def _bucket(folder: Path, number: int) -> Path:
    return folder / "buckets" / f"{number}.int64"
