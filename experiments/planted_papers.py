"""A planted graph in the layout of OGB's binary release of ogbn-papers100M, of any size: written in pieces."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from experiments.convert import CLASSES, PAPERS, PapersFiles
from experiments.streams import Ints

SHARES = {"train": 0.7804, "val": 0.0810, "test": 0.1386}
"""Of the labeled nodes, in OGB's own split."""
SEPARATION = 4.5
"""As in :mod:`experiments.planted_ogb`."""
LEAST_LABELED = 50
"""So that no part of the split is empty."""
PIECE = 1 << 20
"""Nodes or edges at once."""


@dataclass(frozen=True, kw_only=True)
class PapersPlanter:
    """Draws the graph.

    Every node belongs to a community, its class. The source of an edge is any node; the destination is of the same
    community with probability ``homophily``, else of that of any node, and few nodes of a community get most of its
    edges. Features are the class center plus N(0, 1). Edges may be there twice, or be self-loops.

    Memory is 14 bytes a node while nodes are put in order, then 5, and about 0.2 GB for pieces.

    Args:
        nodes, edges: how many.
        features: of a node.
        classes: at most 172.
        labeled: share of nodes with a label.
        seed: the same one draws the same graph.
        homophily: see above.
        label_noise: share of labels that are random.

    Raises:
        ValueError: an argument out of range.
    """

    nodes: int
    edges: int
    features: int
    classes: int
    labeled: float
    seed: int
    homophily: float
    label_noise: float

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= CLASSES:
            raise ValueError(f"classes: got {self.classes}, expected 2 to {CLASSES}")
        for name in ("nodes", "edges", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("labeled", "homophily", "label_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected between 0 and 1")
        if self.nodes * self.labeled < LEAST_LABELED:
            raise ValueError(
                f"labeled: got {self.labeled} of {self.nodes} nodes, expected at least {LEAST_LABELED / self.nodes:.2g}"
            )

    def write(self, root: Path) -> Path:
        """Write the release into ``root``, and return its folder.

        Raises:
            ValueError: it is there already.
        """
        folder = PapersFiles(root).folder
        if folder.exists():
            raise ValueError(f"root: {folder} is there already; delete it, or give another root")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix="planted-") as scratch:
            files = PapersFiles(Path(scratch))
            files.data.parent.mkdir(parents=True)
            with zipfile.ZipFile(files.data, "w") as archive:
                self._data(archive)
            with zipfile.ZipFile(files.label, "w") as archive:
                split = self._labels(archive)
            for part, index in split.items():
                files.split(part).parent.mkdir(parents=True, exist_ok=True)
                with gzip.open(files.split(part), "wb", compresslevel=1) as file:
                    np.savetxt(file, index, fmt="%d")
            (files.folder / "RELEASE_v1.txt").write_text("planted\n")
            (files.folder / "PLANTED.txt").write_text(
                f"Not OGB's {PAPERS}, but a graph that experiments.planted_ogb wrote:\n{asdict(self)}\n"
            )
            files.folder.rename(folder)
        return folder

    def _data(self, archive: zipfile.ZipFile) -> None:
        with _member(archive, "edge_index", (2, self.edges), np.int64) as file:
            for end in (0, 1):  # each piece is drawn twice: all sources come first
                for begin in range(0, self.edges, PIECE):
                    file.write(self._links(begin)[end].tobytes())
        center = np.random.default_rng([self.seed, 1]).standard_normal((self.classes, self.features))
        center *= SEPARATION / np.sqrt(2 * self.features)
        rows = max(1, 8 * PIECE // self.features)
        with _member(archive, "node_feat", (self.nodes, self.features), np.float32) as file:
            for begin in range(0, self.nodes, rows):
                community = self._community[begin : begin + rows]
                x = self._rng(2, begin).standard_normal((len(community), self.features), dtype=np.float32)
                x += center.astype(np.float32)[community]
                file.write(x.tobytes())
        with _member(archive, "node_year", (self.nodes, 1), np.int64) as file:
            for begin in range(0, self.nodes, PIECE):
                year = 2019 - self._rng(3, begin).geometric(0.1, size=min(PIECE, self.nodes - begin)).clip(max=100)
                file.write(year.astype(np.int64).tobytes())
        for name, count in (("num_nodes_list", self.nodes), ("num_edges_list", self.edges)):
            with _member(archive, name, (1,), np.int64) as file:
                file.write(np.array([count]).tobytes())

    def _labels(self, archive: zipfile.ZipFile) -> dict[str, Ints]:
        """Write the labels, NaN for most nodes, and return the split of the others."""
        cuts, split = self.labeled * np.cumsum(list(SHARES.values())), dict[str, list[Ints]]()
        with _member(archive, "node_label", (self.nodes, 1), np.float32) as file:
            for begin in range(0, self.nodes, PIECE):
                community, rng = self._community[begin : begin + PIECE], self._rng(4, begin)
                part = np.searchsorted(cuts, rng.random(len(community)), side="right")
                noisy = rng.random(len(community)) < self.label_noise
                label = np.where(noisy, rng.integers(self.classes, size=len(community)), community).astype(np.float32)
                label[part == len(SHARES)] = np.nan
                file.write(label.tobytes())
                for number, name in enumerate(SHARES):
                    split.setdefault(name, []).append(begin + np.flatnonzero(part == number))
        return {name: np.concatenate(pieces) for name, pieces in split.items()}

    def _links(self, begin: int) -> tuple[Ints, Ints]:
        """Sources and destinations of a piece of the edges."""
        count, rng = min(PIECE, self.edges - begin), self._rng(5, begin)
        source = rng.integers(self.nodes, size=count)
        stays = rng.random(count) < self.homophily
        community = self._community[np.where(stays, source, rng.integers(self.nodes, size=count))]
        first, size = self._first[community], np.diff(self._first)[community]
        return source, self._order[first + (rng.random(count) ** 2 * size).astype(np.int64)].astype(np.int64)

    @cached_property
    def _community(self) -> NDArray[np.uint8]:
        """(N,) of each node; later ones have fewer."""
        popularity = np.cumsum(np.arange(1, self.classes + 1) ** -0.5)
        found = np.empty(self.nodes, np.uint8)
        for begin in range(0, self.nodes, PIECE):
            draws = self._rng(0, begin).random(min(PIECE, self.nodes - begin)) * popularity[-1]
            found[begin : begin + PIECE] = np.searchsorted(popularity, draws, side="right").clip(max=self.classes - 1)
        return found

    @cached_property
    def _order(self) -> NDArray[Any]:
        """(N,) nodes by community."""
        return np.argsort(self._community, kind="stable").astype(np.int32 if self.nodes < 2**31 else np.int64)

    @cached_property
    def _first(self) -> Ints:
        """(classes + 1,) where each community begins in the order."""
        return np.concatenate([[0], np.cumsum(np.bincount(self._community, minlength=self.classes))])

    def _rng(self, what: int, begin: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, begin])


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: Any) -> Iterator[IO[bytes]]:
    """A member of a ``.npz`` file, whose numbers are to be written."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        descr = npy.dtype_to_descr(np.dtype(dtype))
        npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        yield file
