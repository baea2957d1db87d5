"""A graph on disk: PyG's stores over memory-mapped ``.npy`` files. N nodes, M edges, D features."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from gmoe._checks import check

SPLITS = ("train", "val", "test")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")

BLOCK = 2**22
"""Values that :meth:`StoredGraph.verify` holds at once."""

CHUNK = 2**20
"""Values of rows that are read and put in their place at once: few enough for a CPU's cache."""


def create_npy(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A new ``.npy`` file, mapped as a tensor: what is written to this is written to the file."""
    name = str(dtype).removeprefix("torch.")
    return torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.dtype(name), shape))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In a loader's worker in shared memory, or it would be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.empty(0, dtype=dtype).untyped_storage()._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


class StoredGraph(FeatureStore, GraphStore):
    """A graph in a folder of ``.npy`` files, opened memory-mapped: it may be larger than memory.

    Give it to :func:`gmoe.neighbor_loader` or :class:`gmoe.NeighborSampler` in place of PyG's ``Data``, or as
    ``(graph, graph)`` to what takes PyG's ``(FeatureStore, GraphStore)``. Opening reads headers, not values. A pickle
    holds the path alone, so that workers of any start method open the files themselves.

    ``graph.json`` lists the arrays with file, dtype, shape and SHA-256; ``python -m experiments.convert`` writes it:

    - ``start`` (N + 1,) int64 and ``source`` (M,) int32 (int64 from 2^31 nodes on): the in-edges of node i come from
      ``source[start[i]:start[i + 1]]``, ascending. The position of an edge is its id.
    - ``x`` (N, D) float16 or float32: handed out as float32.
    - ``y`` (N,) or (N, C), optional: integers (-1: no label), handed out as int64, or floats.
    - ``train``, ``val``, ``test``, optional: node ids, int64.

    Args:
        folder: where ``graph.json`` is.

    Attributes:
        folder: its absolute path.
        info: the content of ``graph.json``.
        start, source: the mapped in-edges; read-only: writing to them ends the process.

    Raises:
        FileNotFoundError: no ``graph.json`` in the folder, or no file of an array.
        ValueError: another format; an array whose file, dtype, shape or size is not as said.

    Example:
        >>> graph = gmoe.StoredGraph("papers100M")
        >>> loader = gmoe.neighbor_loader(graph, [15, 10, 5], graph.train, batch_size=1024, shuffle=True, num_workers=2)
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder).absolute()
        path = self.folder / "graph.json"
        try:
            self.info: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: got {error}, expected JSON") from error
        is_format = isinstance(self.info, dict) and self.info.get("format") == 1
        check(
            is_format,
            str(path),
            f"format {self.info.get('format')!r}" if isinstance(self.info, dict) else "no object",
            1,
        )
        for key in ("num_nodes", "num_edges"):
            value = self.info.get(key)
            check(isinstance(value, int) and value >= 0, str(path), f"{key} {value!r}", "a whole number of at least 0")
        listed = self.info.get("arrays")
        if not isinstance(listed, dict):
            raise ValueError(f"{path}: got arrays {listed!r}, expected an object")
        self.num_nodes: int = self.info["num_nodes"]
        self.num_edges: int = self.info["num_edges"]
        legal = self._legal()
        for name in ("start", "source", "x"):
            check(name in listed, str(path), f"arrays {sorted(listed)}", f"{name!r} among them")
        for name, said in listed.items():
            check(isinstance(said, dict), str(path), f"array {name!r} {said!r}", "an object")
            check(name in legal, str(path), f"array {name!r}", f"one of {', '.join(legal)}")
        self._arrays = {name: self._open(name, *legal[name]) for name in listed}
        self.start, self.source = self._arrays["start"], self._arrays["source"]
        ends = [int(self.start[0]), int(self.start[-1])]
        check(ends == [0, self.num_edges], str(self._file("start")), f"ends {ends}", [0, self.num_edges])

    def _legal(self) -> dict[str, tuple[tuple[str, ...], tuple[int | None, ...], int]]:
        """Of each array the dtypes, the shape (``None``: any length), and how many dimensions may follow it."""
        ids = "int32" if self.num_nodes < 2**31 else "int64"
        found: dict[str, Any] = {
            "start": (("int64",), (self.num_nodes + 1,), 0),
            "source": ((ids,), (self.num_edges,), 0),
            "x": (("float16", "float32"), (self.num_nodes, None), 0),
            "y": ((*INTEGERS, "float16", "float32", "float64"), (self.num_nodes,), 1),
        }
        return found | dict.fromkeys(SPLITS, (("int64",), (None,), 0))

    def _file(self, name: str) -> Path:
        return self.folder / str(self.info["arrays"][name].get("file"))

    def _open(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], more: int) -> Tensor:
        """The array as a mapped tensor, if header and size are as they should be."""
        path, said = self._file(name), self.info["arrays"][name]
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: got {error}, expected a whole .npy file") from error
        check(isinstance(array, np.memmap), str(path), "an archive", "a .npy file")
        check(array.dtype.name in dtypes and array.dtype.isnative, str(path), array.dtype.str, " or ".join(dtypes))
        fits = len(shape) <= array.ndim <= len(shape) + more and array.flags.c_contiguous
        fits = fits and all(want in (None, size) for want, size in zip(shape, array.shape, strict=False))
        legal = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        check(fits, str(path), f"shape {array.shape}", f"{legal} in C order")
        got = {"dtype": array.dtype.name, "shape": list(array.shape)}
        want = {key: said.get(key) for key in got}
        check(got == want, str(path), got, f"{want}, as graph.json says")
        size, expected = path.stat().st_size, array.offset + array.nbytes
        check(size == expected, str(path), f"{size} bytes", f"{expected}")
        if name in ("x", "y") and hasattr(mmap, "MADV_RANDOM"):  # rows are read here and there: no readahead
            array.base.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():  # of memory that must not be written to
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)

    @property
    def x_dim(self) -> int:
        """D."""
        return self._arrays["x"].size(1)

    @property
    def train(self) -> Tensor | None:
        """The training nodes' ids, in memory; ``None`` where there is no such file."""
        return self._split("train")

    @property
    def val(self) -> Tensor | None:
        """The validation nodes' ids."""
        return self._split("val")

    @property
    def test(self) -> Tensor | None:
        """The test nodes' ids."""
        return self._split("test")

    def _split(self, name: str) -> Tensor | None:
        ids = self._arrays.get(name)
        return None if ids is None else ids.clone()

    def rows(self, name: str, index: Tensor | slice) -> Tensor:
        """Rows of ``"x"`` or ``"y"``, in memory; read from disk in ascending order, whatever that of ``index``.

        Args:
            name: of the array.
            index: node ids, or a slice of them.
        """
        if isinstance(index, slice):
            return self._arrays[name][index].to(self._handed(name), copy=True)
        return self._rows_at(name, index, index.sort().values)

    def _handed(self, name: str) -> torch.dtype:
        """The dtype that rows are handed out in."""
        dtype = self._arrays[name].dtype
        if not dtype.is_floating_point:
            return torch.int64
        return torch.float32 if dtype == torch.float16 else dtype

    def _rows_at(self, name: str, ids: Tensor, ascending: Tensor) -> Tensor:
        """The rows of ``ids``; ``ascending`` are the same in order."""
        stored, dtype = self._arrays[name], self._handed(name)
        found = _empty((len(ids), *stored.shape[1:]), dtype)
        if stored.dim() > 1:  # the disk is read here, a value a row, and from then on only memory
            stored[:, 0].index_select(0, ascending)
        step = max(CHUNK // max(math.prod(stored.shape[1:]), 1), 1)
        for part, rows in zip(ids.split(step), found.split(step), strict=True):
            rows.copy_(stored.index_select(0, part))
        return found

    def edges_of(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sources and destinations, int64, of the edges at positions ``first:last``."""
        bounds = torch.tensor([first, last])
        low = int(torch.searchsorted(self.start, bounds[:1], right=True)) - 1
        high = max(int(torch.searchsorted(self.start, bounds[1:])), low)
        degree = self.start[low : high + 1].clamp(first, last).diff()
        return self.source[first:last].long(), torch.arange(low, high).repeat_interleave(degree)

    def verify(self) -> None:
        """Read everything once, in bounded memory: SHA-256, the order of the edges, and that ids are in range.

        Raises:
            ValueError: a file that is not as ``graph.json`` says, or not in the format.
        """
        for name, said in self.info["arrays"].items():
            digest = hashlib.sha256()
            with self._file(name).open("rb") as file:
                while part := file.read(BLOCK):
                    digest.update(part)
            found = digest.hexdigest()
            check(found == said.get("sha256"), str(self._file(name)), f"SHA-256 {found}", said.get("sha256"))
        for part in self._blocks("start", overlap=1):
            check(bool((part.diff() >= 0).all()), str(self._file("start")), "falling values", "values that never fall")
        for name in ("source", *(split for split in SPLITS if split in self._arrays)):
            for part in self._blocks(name):
                low, high = part.aminmax()
                legal = f"node ids in 0..{self.num_nodes - 1}"
                check(low >= 0 and high < self.num_nodes, str(self._file(name)), f"{int(low)}..{int(high)}", legal)
        for first in range(0, self.num_edges, BLOCK):
            source, node = self.edges_of(first, min(first + BLOCK + 1, self.num_edges))
            falls = (source.diff() < 0) & (node.diff() == 0)
            where = f"{self._file('source')}, in-edges of node {int(node[:-1][falls][0])}" if bool(falls.any()) else ""
            check(not where, where, "falling sources", "ascending ones")

    def _blocks(self, name: str, overlap: int = 0) -> Any:
        stored = self._arrays[name]
        return (stored[first : first + BLOCK + overlap] for first in range(0, len(stored), BLOCK))

    # PyG's interfaces

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        if attr.attr_name not in ("x", "y") or attr.attr_name not in self._arrays:
            return None
        index: Any = slice(None) if attr.index is None else attr.index
        if isinstance(index, int):
            return self.rows(attr.attr_name, slice(index, index + 1))
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index.nonzero().view(-1) if index.dtype == torch.bool else index
        return self.rows(attr.attr_name, index)

    def _multi_get_tensor(self, attrs: list[TensorAttr]) -> list[Tensor | None]:
        """Ids that are asked for of several arrays, as loaders do, are sorted once."""
        index = attrs[0].index if attrs else None
        if not isinstance(index, Tensor) or index.dtype == torch.bool or any(a.index is not index for a in attrs):
            return [self._get_tensor(attr) for attr in attrs]
        ascending = index.sort().values
        known = [attr.attr_name if attr.attr_name in ("x", "y") else "" for attr in attrs]
        return [self._rows_at(name, index, ascending) if name in self._arrays else None for name in known]

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        stored = self._arrays.get(attr.attr_name)
        return None if stored is None else tuple(stored.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """``x``, and ``y`` where there is one."""
        return [TensorAttr(None, name) for name in ("x", "y") if name in self._arrays]

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        """(source, start): PyG's samplers want both in int64, so that the sources are copied into memory."""
        if edge_attr.edge_type is not None or edge_attr.layout != EdgeLayout.CSC:
            return None
        return self.source.long(), self.start

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """The in-edges of all nodes, layout CSC."""
        return [EdgeAttr(None, EdgeLayout.CSC, size=(self.num_nodes, self.num_nodes))]

    def _read_only(self, *_: Any) -> bool:
        raise TypeError(f"{type(self).__name__} is read-only")

    _put_tensor = _remove_tensor = _put_edge_index = _remove_edge_index = _read_only

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.folder),)

    def __repr__(self) -> str:
        sizes = f"{self.num_nodes} nodes, {self.num_edges} edges, x {self.x_dim}"
        return f"{type(self).__name__}({str(self.folder)!r}: {sizes})"
