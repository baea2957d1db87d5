"""A graph on disk: PyG's stores over memory-mapped ``.npy`` files.

Shapes: N nodes, M edges, D features, C columns of labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import operator
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from gmoe._checks import INTEGERS, check, check_choice, check_range, described, in_short
from gmoe._torch import shared_storage

SPLITS = ("train", "val", "test")
FEATURES = ("float16", "float32")
LABELS = ("int8", "uint8", "int16", "int32", "int64", *FEATURES, "float64")

BLOCK = 2**22
"""Values that :meth:`StoredGraph.verify` holds at once."""

CHUNK = 2**20
"""Values of rows that :meth:`StoredGraph.rows` moves at once: few enough for a CPU's cache."""


class Layout(NamedTuple):
    """What ``graph.json`` may say of an array."""

    dtypes: tuple[str, ...]
    rows: int | None
    """``None`` for any number."""
    dims: tuple[int, ...]
    """Legal numbers of dimensions."""


def create_npy(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Create a ``.npy`` file, mapped as a tensor: writing to the tensor writes to the file."""
    numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(np.lib.format.open_memmap(path, "w+", numpy_dtype, shape))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a loader's worker in shared memory, which saves a copy to the loader."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = shared_storage(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


class StoredGraph(FeatureStore, GraphStore):
    """A graph in a folder of ``.npy`` files, opened memory-mapped: it may be larger than memory.

    Give it to :func:`gmoe.neighbor_loader` or :class:`gmoe.NeighborSampler` in place of PyG's
    ``Data``, or as ``(graph, graph)`` to what takes PyG's ``(FeatureStore, GraphStore)``. Opening
    reads headers and splits. A pickle holds the path only: workers, however they are started, open
    the files themselves.

    ``graph.json`` lists the arrays with file, dtype, shape and SHA-256;
    ``python -m experiments.convert`` writes it:

    - ``start`` (N + 1,) int64 and ``source`` (M,) int32 (int64 from 2^31 nodes on): the in-edges of
      node i come from ``source[start[i]:start[i + 1]]``, ascending. The position of an edge is its
      id.
    - ``x`` (N, D) float16 or float32: handed out as float32.
    - ``y`` (N,) or (N, C), optional: integers (-1: no label), handed out as int64, or floats.
    - ``train``, ``val``, ``test``, optional: node ids, int64.

    Args:
        folder: where ``graph.json`` is.

    Attributes:
        folder: its absolute path.
        info: the content of ``graph.json``.
        num_nodes, num_edges, x_dim: N, M and D.
        start, source: the mapped in-edges; read-only: writing to them ends the process.
        train, val, test: the ids of the nodes of each split, in memory; ``None`` if there is no
            such file.

    Raises:
        FileNotFoundError: no ``graph.json`` in the folder, or no file of an array.
        ValueError: another format; an array whose file, dtype, shape or size is not as listed.

    Example:
        >>> graph = gmoe.StoredGraph("papers100M")
        >>> loader = gmoe.neighbor_loader(
        ...     graph, [15, 10, 5], graph.train, batch_size=1024, shuffle=True, num_workers=2
        ... )
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        check(isinstance(folder, str | Path), "folder", described(folder), "a path")
        self.folder = Path(folder).absolute()
        path = self.folder / "graph.json"
        try:
            self.info: dict[str, Any] = json.loads(path.read_bytes())
            version, listed = self.info["format"], self.info["arrays"]
            self.num_nodes = operator.index(self.info["num_nodes"])  # whole numbers only
            self.num_edges = operator.index(self.info["num_edges"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # any damage to the file
            raise ValueError(
                f"{path}: got {type(error).__name__}: {in_short(error)}, expected JSON with "
                "format, arrays, and whole num_nodes and num_edges"
            ) from error
        if version != 1:
            raise ValueError(f"{path}: got format {version!r:.80}, expected 1")

        layouts = self._layouts()
        is_listed = isinstance(listed, dict) and all(
            isinstance(entry, dict) for entry in listed.values()
        )
        if not is_listed or not {"start", "source", "x"} <= listed.keys() <= layouts.keys():
            raise ValueError(
                f"{path}: got arrays {listed!s:.500}, expected objects of {', '.join(layouts)}, "
                "the first three always"
            )
        self._arrays = {name: self._open(name, layouts[name]) for name in listed}
        self.start = self._arrays["start"]
        self.source = self._arrays["source"]
        self.x_dim = self._arrays["x"].size(1)
        self.train = self._split("train")
        self.val = self._split("val")
        self.test = self._split("test")
        ends = self.start[[0, -1]].tolist()
        if ends != [0, self.num_edges]:
            raise ValueError(
                f"{self._file('start')}: got ends {ends}, expected {[0, self.num_edges]}"
            )

    def _layouts(self) -> dict[str, Layout]:
        """What the format says of each array."""
        source_dtype = "int32" if self.num_nodes < 2**31 else "int64"
        return {
            "start": Layout(("int64",), self.num_nodes + 1, (1,)),
            "source": Layout((source_dtype,), self.num_edges, (1,)),
            "x": Layout(FEATURES, self.num_nodes, (2,)),
            "y": Layout(LABELS, self.num_nodes, (1, 2)),
            **dict.fromkeys(SPLITS, Layout(("int64",), None, (1,))),
        }

    def _split(self, name: str) -> Tensor | None:
        """The nodes of a split, in memory; ``None`` if it has no file."""
        stored = self._arrays.get(name)
        return None if stored is None else stored.clone()

    def _file(self, name: str) -> Path:
        """Where an array is: never outside the folder, whoever wrote ``graph.json``."""
        file = self.info["arrays"][name].get("file")
        path = PurePath(file) if isinstance(file, str) else None
        if path is None or path.anchor or ".." in path.parts:
            raise ValueError(
                f"{self.folder / 'graph.json'}: got file {file!r:.200} of array {name!r}, "
                "expected a path inside the folder, without '..'"
            )
        return self.folder / file

    def _open(self, name: str, layout: Layout) -> Tensor:
        """Map an array as a tensor, if its header and its size are as they should be."""
        path = self._file(name)
        listed = self.info["arrays"][name]
        try:
            array: np.memmap = np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            raise
        except Exception as error:  # NumPy raises many kinds
            raise ValueError(
                f"{path}: got {in_short(error)}, expected a whole .npy file"
            ) from error
        is_native = array.dtype.isnative and array.flags.c_contiguous
        is_typed = array.dtype.name in layout.dtypes and is_native
        is_shaped = array.ndim in layout.dims and layout.rows in (None, len(array))
        header = {"dtype": array.dtype.name, "shape": list(array.shape)}
        is_as_listed = listed | header == listed
        if not (is_typed and is_shaped and is_as_listed):
            rows = "any number of" if layout.rows is None else layout.rows
            raise ValueError(
                f"{path}: got {header}, expected native {' or '.join(layout.dtypes)} in C order, "
                f"{rows} rows, as graph.json says: {listed!s:.500}"
            )
        # Rows are read at random places, so reading ahead would waste the disk's time.
        if name in ("x", "y") and hasattr(mmap, "MADV_RANDOM"):
            assert isinstance(array.base, mmap.mmap)
            array.base.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():  # torch warns of memory that cannot be written to
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)

    def rows(self, name: str, index: object) -> Tensor:
        """Rows of ``"x"`` or ``"y"``, in memory.

        The disk is read in ascending order, whatever the order of ``index``.

        Args:
            name: of the array.
            index: node ids, a boolean mask of all nodes, or a slice.

        Raises:
            ValueError: an array that the graph lacks; ids outside the nodes; a mask of another
                shape; an index that is neither a vector of ids nor a mask.
        """
        check_choice("name", name, self._arrays)
        stored = self._arrays[name]
        at_least = torch.float32 if stored.is_floating_point() else torch.int64
        dtype = torch.promote_types(stored.dtype, at_least)
        if isinstance(index, slice):
            return stored[index].to(dtype, copy=True)

        is_one = isinstance(index, int) or getattr(index, "ndim", 1) == 0  # as PyG's stores take it
        index = node_index("index", [index] if is_one else index, len(stored))
        index = index.nonzero().view(-1) if index.dtype == torch.bool else index.long()
        # Touch one value of each row in ascending order: this reads the disk, and what follows
        # finds the rows in memory.
        if stored.dim() > 1:
            stored[:, 0].index_select(0, index.sort().values)
        rows = _empty((len(index), *stored.shape[1:]), dtype)
        rows_at_once = max(CHUNK // max(math.prod(stored.shape[1:]), 1), 1)
        for some, out in zip(index.split(rows_at_once), rows.split(rows_at_once), strict=True):
            out.copy_(stored.index_select(0, some))
        return rows

    def in_edges(self, nodes: slice) -> tuple[Tensor, Tensor]:
        """Sources and destinations, int64, of all in-edges of a range of nodes.

        Raises:
            ValueError: a slice of another step than 1.
        """
        first, last, step = nodes.indices(self.num_nodes)
        check(step == 1, "nodes", nodes, "a slice of step 1")
        last = max(first, last)  # an empty slice, as Python has it
        start = self.start[first : last + 1]
        source = self.source[int(start[0]) : int(start[-1])].long()
        return source, torch.arange(first, last).repeat_interleave(start.diff())

    def verify(self) -> None:
        """Read everything once, in bounded memory: SHA-256, the order of the edges, and all ids.

        Raises:
            ValueError: a file that is not as ``graph.json`` says, or does not follow the format.
        """
        for name, listed in self.info["arrays"].items():
            digest = hashlib.sha256()
            with self._file(name).open("rb") as file:
                while content := file.read(BLOCK):
                    digest.update(content)
            if digest.hexdigest() != listed.get("sha256"):
                raise ValueError(
                    f"{self._file(name)}: got SHA-256 {digest.hexdigest()}, expected "
                    f"{listed.get('sha256')!s:.80}"
                )
        for _, block in self._blocks("start"):
            if not (block.diff() >= 0).all():
                raise ValueError(
                    f"{self._file('start')}: got falling values, expected values that never fall"
                )
        for name in ("source", *SPLITS):
            for _, block in self._blocks(name):
                low, high = map(int, block.aminmax())
                if low < 0 or high >= self.num_nodes:
                    raise ValueError(
                        f"{self._file(name)}: got {low}..{high}, expected node ids in "
                        f"0..{self.num_nodes - 1}"
                    )
        for first, block in self._blocks("source"):
            # Sources may fall only from one node to the next: where some node's in-edges start.
            falls_at = (block.diff() < 0).nonzero().view(-1) + first + 1
            node = torch.searchsorted(self.start, falls_at)
            wrong = falls_at[self.start[node] != falls_at].tolist()
            if wrong:
                raise ValueError(
                    f"{self._file('source')}: got falling sources at {wrong[:1]}, expected each "
                    "node's in ascending order"
                )

    def _blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Where each block of an array begins, and its values and the first of the next block."""
        stored = self._arrays.get(name, torch.empty(0))
        for first in range(0, len(stored), BLOCK):
            yield first, stored[first : first + BLOCK + 1]

    # PyG's interfaces

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        if attr.attr_name not in self._arrays:
            return None
        index = slice(None) if attr.index is None else attr.index
        return self.rows(attr.attr_name, index)

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        stored = self._arrays.get(attr.attr_name)
        return None if stored is None else tuple(stored.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """``x``, and ``y`` if there are labels."""
        return [TensorAttr(None, name) for name in ("x", "y") if name in self._arrays]

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        """(source, start), both in int64 for PyG's samplers, which copies the sources."""
        if edge_attr.edge_type is not None or edge_attr.layout != EdgeLayout.CSC:
            return None
        return self.source.long(), self.start

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """The in-edges of all nodes, layout CSC."""
        return [EdgeAttr(None, EdgeLayout.CSC, size=(self.num_nodes, self.num_nodes))]

    def _read_only(self, *_: object) -> bool:
        raise TypeError(f"{type(self).__name__} is read-only")

    _put_tensor = _remove_tensor = _put_edge_index = _remove_edge_index = _read_only

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self.folder),)

    def __repr__(self) -> str:
        return (
            f"StoredGraph({str(self.folder)!r}: {self.num_nodes} nodes, {self.num_edges} edges, "
            f"x {self.x_dim})"
        )


def node_index(name: str, nodes: object, num_nodes: int) -> Tensor:
    """Convert node ids, or a mask of all nodes, to a tensor.

    A list of booleans is a mask, not the ids 0 and 1.
    """
    try:
        nodes = torch.as_tensor(nodes)
    except (RuntimeError, TypeError, ValueError) as error:  # text, None, or lists of several sizes
        got = f"{type(nodes).__name__} ({error})"
        raise ValueError(f"{name}: got {got}, expected node ids or a mask") from error
    if nodes.dtype == torch.bool:
        if nodes.shape != (num_nodes,):
            raise ValueError(
                f"{name}: got a mask of shape {tuple(nodes.shape)}, expected ({num_nodes},)"
            )
        return nodes
    if not nodes.numel():  # an empty list became floats
        nodes = nodes.long()
    check_nodes(name, nodes, num_nodes)
    return nodes


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse anything but a vector of node ids."""
    if nodes.dim() != 1 or nodes.dtype not in INTEGERS:
        raise ValueError(f"{name}: got {described(nodes)}, expected a vector of node ids")
    check_range(name, nodes, num_nodes)
