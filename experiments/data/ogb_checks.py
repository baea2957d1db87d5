"""Whether what ogb made of its files can be: counts, ranges of labels and indices, and parts of a split apart."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data

from experiments.data.ogb_files import BrokenFileError
from experiments.data.ogb_layout import LABELED, RELATIONS, Layout

OGB_PARTS: Mapping[str, str] = {"train": "train", "val": "valid", "test": "test"}
"""ogb's names of the parts of a split."""


class _Part(NamedTuple):
    """A tensor of ogb's, the raw file that it comes from, and what must hold."""

    file: Path
    value: Tensor
    rows: int
    below: tuple[int, ...] | None = None
    """Of integers: what the columns stay below."""

    def problem(self) -> str | None:
        """What does not hold."""
        value = self.value
        if len(value) != self.rows:
            return f"got {len(value)} rows, expected {self.rows}"
        if not value.sum().isfinite():
            return "got NaN or infinity, expected numbers"
        if self.below is not None and len(value) > 0:
            low, high = value.amin(dim=0), value.amax(dim=0)
            if (low < 0).any() or (high >= value.new_tensor(self.below)).any():
                return f"got {int(low.min())} to {int(high.max())}, expected 0 to {max(self.below) - 1}"
        return None


def check_graph(data: Data, layout: Layout, loaded: Path | None = None) -> Data:
    """Compare ogb's graph with what the raw files say of it, and return it.

    Args:
        data: as ogb makes it.
        layout: of the data set.
        loaded: the processed file that it was read from; ``None`` (default): it was just made of the raw files.

    Raises:
        ValueError: something does not hold; the message names ``loaded``, or the raw file.
    """
    for part in _hetero_parts(data, layout) if layout.hetero else _plain_parts(data, layout):
        problem = part.problem()
        if problem is None:
            continue
        if loaded is None:
            raise BrokenFileError(part.file, problem, layout.folder)
        raise BrokenFileError(loaded, f"does not fit {part.file.name}: {problem}", loaded.parent)
    return data


def _plain_parts(data: Data, layout: Layout) -> Iterator[_Part]:
    (nodes,) = _numbers(layout.raw("num-node-list"), layout)
    (edges,) = _numbers(layout.raw("num-edge-list"), layout)
    edges *= layout.directions
    names = {"node-feat": "x", "edge-feat": "edge_attr"}
    yield _Part(layout.raw("edge"), data.edge_index.t(), edges, (nodes, nodes))
    yield _Part(layout.raw("node-label"), data.y, nodes, (layout.num_classes,) * layout.num_tasks)
    for file in layout.node_files:
        yield _Part(layout.raw(file), data[names.get(file, file)], nodes)
    for file in layout.edge_files:
        yield _Part(layout.raw(file), data[names[file]], edges)


def _hetero_parts(data: Data, layout: Layout) -> Iterator[_Part]:
    dictionary = layout.raw("num-node-dict")
    kinds = _lines(dictionary, layout)[0].split(",")
    counts = dict(zip(kinds, _numbers(dictionary, layout, line=1), strict=True))
    for kind, count in counts.items():
        yield _Part(dictionary, torch.empty(data.num_nodes_dict[kind], 0), count)
    for relation in RELATIONS:
        (edges,) = _numbers(layout.raw("num-edge-list", relation), layout)
        ends = (counts[relation[0]], counts[relation[2]])
        yield _Part(layout.raw("edge", relation), data.edge_index_dict[relation].t(), edges, ends)
    nodes = counts[LABELED]
    yield _Part(layout.raw("node-label", LABELED), data.y_dict[LABELED], nodes, (layout.num_classes,))
    for file in layout.node_files:
        value = data.x_dict if file == "node-feat" else data[file]
        yield _Part(layout.raw(file, LABELED), value[LABELED], nodes)


def _lines(path: Path, layout: Layout) -> list[str]:
    """Of a small file."""
    try:
        with gzip.open(path, "rt") as file:
            return file.read().split()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BrokenFileError(path, f"cannot be read ({error})", layout.folder) from error


def _numbers(path: Path, layout: Layout, line: int = 0) -> list[int]:
    """The integers in a line of a small file."""
    lines = _lines(path, layout)
    try:
        return [int(number) for number in lines[line].split(",")]
    except (ValueError, IndexError) as error:
        raise BrokenFileError(path, f"got {lines}, expected counts", layout.folder) from error


def check_split(found: Mapping[str, Any], nodes: int, layout: Layout) -> dict[str, Tensor]:
    """The node indices of each part, under our names.

    Args:
        found: ogb's ``get_idx_split()``.
        nodes: how many (labeled) nodes there are.
        layout: of the data set.

    Raises:
        ValueError: a part is empty, an index is out of range, or a node is there twice; the message names the file.
    """
    split: dict[str, Tensor] = {}
    seen = torch.zeros(nodes, dtype=torch.long)
    for part, ogb_name in OGB_PARTS.items():
        file = layout.split_dict if layout.split_dict.exists() else layout.split(ogb_name)
        index = torch.as_tensor(found[ogb_name][LABELED] if layout.hetero else found[ogb_name])
        if index.dim() != 1 or index.numel() == 0 or index.is_floating_point():
            raise BrokenFileError(
                file, f"got shape {tuple(index.shape)} of {index.dtype}, expected node indices", layout.folder
            )
        if index.min() < 0 or index.max() >= nodes:
            problem = f"got nodes {int(index.min())} to {int(index.max())}, expected 0 to {nodes - 1}"
            raise BrokenFileError(file, problem, layout.folder)
        seen += index.bincount(minlength=nodes)
        if seen.max() > 1:
            problem = f"got node {int(seen.argmax())} twice, or in an earlier part as well, expected each node once"
            raise BrokenFileError(file, problem, layout.folder)
        split[part] = index.to(torch.long, copy=True)  # ogb's may be pandas' own memory
    return split
