"""A graph on disk: PyG's stores over memory-mapped ``.npy`` files. N nodes, M edges, D features."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterator
from operator import index
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from gmoe._checks import check, check_choice
from gmoe.routing import INTEGERS, check_range, described

SPLITS = ("train", "val", "test")
FEATURES = ("float16", "float32")
LABELS = ("int8", "uint8", "int16", "int32", "int64", *FEATURES, "float64")

BLOCK = 2**22
"""Values that :meth:`StoredGraph.verify` holds at once."""

CHUNK = 2**20
"""Values of rows that are read and put in their place at once: few enough for a CPU's cache."""


def create_npy(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Create a ``.npy`` file, mapped as a tensor: writing to the tensor writes to the file."""
    return torch.from_numpy(
        np.lib.format.open_memmap(path, "w+", np.dtype(str(dtype).removeprefix("torch.")), shape)
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a loader's worker in shared memory, or it would be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


class StoredGraph(FeatureStore, GraphStore):
    """A graph in a folder of ``.npy`` files, opened memory-mapped: it may be larger than memory.

    Give it to :func:`gmoe.neighbor_loader` or :class:`gmoe.NeighborSampler` in place of PyG's
    ``Data``, or as ``(graph, graph)`` to what takes PyG's ``(FeatureStore, GraphStore)``. Opening
    reads headers and splits. A pickle holds the path alone, so that workers of any start method
    open the files themselves.

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
        train, val, test: the ids of the nodes of each split, in memory; ``None`` where there is no
            such file.

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
        try:  # whatever is wrong with the file
            self.info: dict[str, Any] = json.loads(path.read_bytes())
            version, listed = self.info["format"], self.info["arrays"]
            self.num_nodes, self.num_edges = (
                index(self.info["num_nodes"]),
                index(self.info["num_edges"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            legal_text = "JSON with format, arrays, and whole num_nodes and num_edges"
            raise ValueError(f"{path}: got {got}, expected {legal_text}") from error
        check(version == 1, str(path), f"format {version!r}", 1)
        legal: dict[str, Any] = {
            # dtypes, rows (None: any number), numbers of dimensions
            "start": (("int64",), self.num_nodes + 1, (1,)),
            "source": (("int32" if self.num_nodes < 2**31 else "int64",), self.num_edges, (1,)),
            "x": (FEATURES, self.num_nodes, (2,)),
            "y": (LABELS, self.num_nodes, (1, 2)),
            **dict.fromkeys(SPLITS, (("int64",), None, (1,))),
        }
        are_objects = isinstance(listed, dict) and all(
            isinstance(said, dict) for said in listed.values()
        )
        fits = are_objects and {"start", "source", "x"} <= listed.keys() <= legal.keys()
        check(
            fits,
            str(path),
            f"arrays {listed}",
            f"objects of {', '.join(legal)}, the first three always",
        )
        self._arrays = {name: self._open(name, *legal[name]) for name in listed}
        self.start, self.source, self.x_dim = (
            self._arrays["start"],
            self._arrays["source"],
            self._arrays["x"].size(1),
        )
        ids = (self._arrays.get(name) for name in SPLITS)
        self.train, self.val, self.test = (
            None if split is None else split.clone() for split in ids
        )
        ends = self.start[[0, -1]].tolist()
        check(
            ends == [0, self.num_edges],
            str(self._file("start")),
            f"ends {ends}",
            [0, self.num_edges],
        )

    def _file(self, name: str) -> Path:
        """Where an array is; never outside the folder, whoever wrote graph.json."""
        file = self.info["arrays"][name].get("file")
        path = PurePath(file) if isinstance(file, str) else None
        inside = path is not None and not path.anchor and ".." not in path.parts
        got = f"file {file!r} of array {name!r}"
        check(
            inside, str(self.folder / "graph.json"), got, "a path inside the folder, without '..'"
        )
        return self.folder / file

    def _open(
        self, name: str, dtypes: tuple[str, ...], rows: int | None, dims: tuple[int, ...]
    ) -> Tensor:
        """The array as a mapped tensor, if header and size are as they should be."""
        path, said = self._file(name), self.info["arrays"][name]
        try:
            array: Any = np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            raise
        except Exception as error:  # NumPy's are many
            raise ValueError(f"{path}: got {error}, expected a whole .npy file") from error
        is_typed = array.dtype.name in dtypes and array.dtype.isnative and array.flags.c_contiguous
        is_shaped = array.ndim in dims and rows in (None, len(array))
        legal = f"native {' or '.join(dtypes)} in C order, {'any number of' if rows is None else rows} rows"
        got = {"dtype": array.dtype.name, "shape": list(array.shape)}
        check(
            is_typed and is_shaped and said | got == said,
            str(path),
            got,
            f"{legal}, as graph.json says: {said}",
        )
        if name in ("x", "y") and hasattr(
            mmap, "MADV_RANDOM"
        ):  # rows are read here and there: no readahead
            array.base.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():  # of memory that must not be written to
            warnings.simplefilter("ignore")
            return torch.from_numpy(array)

    def rows(self, name: str, index: Any) -> Tensor:
        """Rows of ``"x"`` or ``"y"``, in memory; read from disk in ascending order, whatever that
        of ``index``.

        Args:
            name: of the array.
            index: node ids, a boolean mask of all nodes, or a slice.

        Raises:
            ValueError: an array that the graph lacks; ids outside the nodes; a mask of another
                shape; what is neither a vector of ids nor a mask.
        """
        check_choice("name", name, self._arrays)
        stored = self._arrays[name]
        dtype = torch.promote_types(
            stored.dtype, torch.float32 if stored.is_floating_point() else torch.int64
        )
        if isinstance(index, slice):
            return stored[index].to(dtype, copy=True)
        is_one = isinstance(index, int) or getattr(index, "ndim", 1) == 0  # as PyG's stores take it
        index = node_index("index", [index] if is_one else index, len(stored))
        index = index.nonzero().view(-1) if index.dtype == torch.bool else index.long()
        if stored.dim() > 1:  # the disk is read here, a value a row, and from then on only memory
            stored[:, 0].index_select(0, index.sort().values)
        found = _empty((len(index), *stored.shape[1:]), dtype)
        step = max(CHUNK // max(math.prod(stored.shape[1:]), 1), 1)
        for part, rows in zip(index.split(step), found.split(step), strict=True):
            rows.copy_(stored.index_select(0, part))
        return found

    def in_edges(self, nodes: slice) -> tuple[Tensor, Tensor]:
        """Sources and destinations, int64, of all in-edges of a range of nodes."""
        first, last, _ = nodes.indices(self.num_nodes)
        start = self.start[first : last + 1]
        source = self.source[int(start[0]) : int(start[-1])].long()
        return source, torch.arange(first, last).repeat_interleave(start.diff())

    def verify(self) -> None:
        """Read everything once, in bounded memory: SHA-256, the order of the edges, and that ids
        are in range.

        Raises:
            ValueError: a file that is not as ``graph.json`` says, or not in the format.
        """
        for name, said in self.info["arrays"].items():
            digest = hashlib.sha256()
            with self._file(name).open("rb") as file:
                while read := file.read(BLOCK):
                    digest.update(read)
            found = digest.hexdigest()
            check(
                found == said.get("sha256"),
                str(self._file(name)),
                f"SHA-256 {found}",
                said.get("sha256"),
            )
        for _, part in self._blocks("start"):
            check(
                (part.diff() >= 0).all(),
                str(self._file("start")),
                "falling values",
                "values that never fall",
            )
        for name in ("source", *SPLITS):
            for _, part in self._blocks(name):
                low, high = map(int, part.aminmax())
                legal = f"node ids in 0..{self.num_nodes - 1}"
                check(
                    low >= 0 and high < self.num_nodes,
                    str(self._file(name)),
                    f"{low}..{high}",
                    legal,
                )
        for first, part in self._blocks("source"):
            fall = (
                (part.diff() < 0).nonzero().view(-1) + first + 1
            )  # legal where the next node's in-edges begin
            bad = fall[self.start[torch.searchsorted(self.start, fall)] != fall].tolist()
            check(
                not bad,
                str(self._file("source")),
                f"falling sources at {bad[:1]}",
                "each node's in ascending order",
            )

    def _blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Some values of an array at a time, the next block's first value among them, and where
        they begin.
        """
        stored = self._arrays.get(name, torch.empty(0))
        return (
            (first, stored[first : first + BLOCK + 1]) for first in range(0, len(stored), BLOCK)
        )

    # PyG's interfaces

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        if attr.attr_name not in self._arrays:
            return None
        return self.rows(attr.attr_name, slice(None) if attr.index is None else attr.index)

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        stored = self._arrays.get(attr.attr_name)
        return None if stored is None else tuple(stored.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """``x``, and ``y`` where there is one."""
        return [TensorAttr(None, name) for name in ("x", "y") if name in self._arrays]

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        """(source, start): PyG's samplers want both in int64, so that the sources are copied into
        memory.
        """
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
        return f"StoredGraph({str(self.folder)!r}: {self.num_nodes} nodes, {self.num_edges} edges, x {self.x_dim})"


def node_index(name: str, nodes: Any, num_nodes: int) -> Tensor:
    """Node ids or a mask of all nodes as a tensor; a list of booleans is a mask, not 0 and 1."""
    try:
        nodes = torch.as_tensor(nodes)
    except (RuntimeError, TypeError, ValueError) as error:  # of text, None, or lists that differ
        got = f"{type(nodes).__name__} ({error})"
        raise ValueError(f"{name}: got {got}, expected node ids or a mask") from error
    if nodes.dtype == torch.bool:
        got = f"a mask of shape {tuple(nodes.shape)}"
        check(nodes.shape == (num_nodes,), name, got, f"({num_nodes},)")
        return nodes
    nodes = nodes if nodes.numel() else nodes.long()  # an empty list makes floats
    check_nodes(name, nodes, num_nodes)
    return nodes


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse anything but a vector of node ids."""
    is_vector = nodes.dim() == 1 and nodes.dtype in INTEGERS
    check(is_vector, name, described(nodes), "a vector of node ids")
    check_range(name, nodes, num_nodes)
