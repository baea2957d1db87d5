"""OGB's node data sets (Hu et al., 2020) through ``ogb``'s own loader, without its traps.

ogb 1.3.6 cannot read its own processed file under torch's safe default, asks questions by ``input()``, and trusts
what it finds on disk. Here nothing is asked, ``torch.load`` stays safe, and a broken file is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor
from torch.serialization import get_safe_globals, safe_globals
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage
from torch_geometric.utils import scatter

from experiments.data.ogb_checks import check_graph, check_split
from experiments.data.ogb_files import BrokenFileError, find_broken, provide
from experiments.data.ogb_import import PygNodePropPredDataset
from experiments.data.ogb_layout import LABELED, Layout, layout_of

SAFE = [
    Data,
    DataEdgeAttr,
    DataTensorAttr,
    GlobalStorage,
    np.ndarray,
    np.dtype,
    np.dtypes.Int64DType,
    np.empty(0).__reduce__()[0],  # numpy's _reconstruct, wherever this numpy has it
]
"""What ogb's processed file (PyG's) and a split_dict.pt (numpy's, at times) are made of."""


def load_ogb(
    name: str, root: Path, *, offline: bool = False, allow_large_downloads: bool = False
) -> tuple[Data | HeteroData, dict[str, Tensor]]:
    """One of OGB's node data sets, and its official split.

    - ``"ogbn-arxiv"`` (ODC-BY): directed citations; ``x`` (N, 128), ``y`` (N,) long, ``node_year`` (N,).
    - ``"ogbn-products"`` (Amazon's license): ``x`` (N, 100), ``y`` (N,) long; each edge in both directions.
    - ``"ogbn-proteins"`` (CC-0): ``edge_attr`` (M, 8), ``y`` (N, 112) float, ``node_species`` (N,); each edge in both
      directions. There are no node features: ``x`` (N, 8) is the mean of ``edge_attr`` over the edges of a node, zero
      without any.
    - ``"ogbn-mag"`` (ODC-BY): a ``HeteroData`` of ``paper``, ``author``, ``institution`` and ``field_of_study``, with
      the four relations as they are stored, none reversed. Papers alone have ``x`` (N, 128), ``y`` (N,) long and
      ``node_year`` (N,). ``edge_reltype``, which numbers the relations, is left out.

    Args:
        name: of the data set.
        root: what ogb calls root: the folder ``ogbn_arxiv`` lies inside.
        offline: leave the network alone (default ``False``).
        allow_large_downloads: download more than 1 GB, and replace a folder of another version (default ``False``).

    Returns:
        The graph, and the node indices of ``"train"``, ``"val"`` and ``"test"`` (of ogbn-mag: of papers).

    Raises:
        FileNotFoundError: files are missing, and may not or cannot be downloaded.
        ValueError: an unknown name, a download that needs ``allow_large_downloads``, a folder of another version, or
            a broken file, which the message names.
    """
    layout = layout_of(name, root)
    provide(layout, offline=offline, allow_large_downloads=allow_large_downloads)
    if layout.planted.exists():
        print(f"{name}: a planted graph, not OGB's ({layout.planted})")
    dataset = _open(layout)
    graph = _hetero(dataset[0]) if layout.hetero else _plain(dataset[0], layout)
    labeled = graph[LABELED] if layout.hetero else graph
    return graph, _split(dataset, labeled.num_nodes, layout)


class _Dataset(PygNodePropPredDataset):
    """ogb's loader, except that the processed file is there only when it is whole and the raw files fit together."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._scratch: str | None = None
        super().__init__(layout.name, str(layout.root), pre_transform=partial(check_graph, layout=layout))

    @property
    def processed_dir(self) -> str:
        """Where ``process`` writes."""
        return self._scratch or super().processed_dir

    def _process(self) -> None:
        # PyG's own would also read processed/pre_transform.pt, by an unsafe torch.load
        layout = self._layout
        if layout.processed.exists():
            return
        layout.processed.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=layout.folder, prefix="processing-") as self._scratch:
            try:
                self.process()
            except (BrokenFileError, MemoryError):
                raise
            except Exception as error:
                broken = find_broken(layout.tables, layout.headed)
                if broken is None:
                    raise
                raise BrokenFileError(*broken, layout.folder) from error
            (Path(self._scratch) / layout.processed.name).replace(layout.processed)
        self._scratch = None


@contextmanager
def _ogb_reads() -> Iterator[None]:
    """torch.load knows what ogb saves; what ogb borrows from pandas is never given out, so that torch need not warn."""
    known = get_safe_globals()  # at its end, safe_globals forgets those of before too
    with safe_globals([part for part in SAFE if part not in known]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        yield


def _open(layout: Layout) -> _Dataset:
    """ogb's data set, with the processed file checked."""
    try:
        with _ogb_reads():
            dataset = _Dataset(layout)
        check_graph(dataset[0], layout, loaded=layout.processed)
    except (BrokenFileError, MemoryError):
        raise
    except Exception as error:
        if not layout.processed.exists():
            raise
        raise BrokenFileError(layout.processed, f"not ogb's ({error!r:.200})", layout.processed.parent) from error
    return dataset


def _split(dataset: _Dataset, nodes: int, layout: Layout) -> dict[str, Tensor]:
    """The official split, checked."""
    try:
        with _ogb_reads():
            found = dataset.get_idx_split()
    except MemoryError:
        raise
    except Exception as error:
        if layout.split_dict.exists():
            raise BrokenFileError(layout.split_dict, f"not ogb's ({error!r:.200})", layout.split_dict) from error
        broken = find_broken(layout.tables[-3:], layout.headed[-1:])
        if broken is None:
            raise
        raise BrokenFileError(*broken, layout.folder) from error
    return check_split(found, nodes, layout)


def _plain(data: Data, layout: Layout) -> Data:
    """A graph with one node type, with flat labels."""
    one_label = layout.num_tasks == 1
    graph = Data(x=data.x, edge_index=data.edge_index.contiguous(), y=data.y.view(-1) if one_label else data.y.float())
    if data.edge_attr is not None:
        graph.edge_attr = data.edge_attr
    if data.x is None:
        graph.x = scatter(data.edge_attr, data.edge_index[1], dim_size=data.num_nodes, reduce="mean")
    for file in layout.node_files:
        if file != "node-feat":
            graph[file] = data[file].view(-1)
    return graph


def _hetero(data: Any) -> HeteroData:
    """The dictionaries that ogb makes, as PyG's graph of several node types."""
    graph = HeteroData()
    for kind, count in data.num_nodes_dict.items():
        graph[kind].num_nodes = count
    for kind, x in data.x_dict.items():
        graph[kind].x = x
    graph[LABELED].y = data.y_dict[LABELED].view(-1)
    graph[LABELED].node_year = data.node_year[LABELED].view(-1)
    for relation, edge_index in data.edge_index_dict.items():
        graph[relation].edge_index = edge_index.contiguous()
    return graph
