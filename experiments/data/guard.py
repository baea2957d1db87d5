"""Downloads that announce themselves; files missing or broken: one error that says which, and what to do."""

from __future__ import annotations

import json
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage

SAFE: list[Any] = [Data, DataEdgeAttr, DataTensorAttr, BaseStorage, GlobalStorage, NodeStorage, EdgeStorage]
"""What a ``Data`` is made of."""

MASKS = ("train_mask", "val_mask", "test_mask")


class Guarded(InMemoryDataset):
    """Put before a PyG data set among the bases: files take their place in one step, when they are whole.

    Attributes:
        called: how the user calls it.
        megabytes: size of the download.
        offline: never download.
    """

    called: str
    megabytes: float
    offline: bool
    _raw: str | None = None
    _processed: str | None = None

    @property
    def raw_dir(self) -> str:
        """Where ``download`` writes, and ``process`` reads."""
        return self._raw or super().raw_dir

    @property
    def processed_dir(self) -> str:
        """Where ``process`` writes."""
        return self._processed or super().processed_dir

    def load(self, path: str, data_cls: type[Data] = Data) -> None:
        """PyG's, which would read a file that it does not know by an unsafe ``torch.load``."""
        try:
            found, self.slices, _ = load_tensors(Path(path))
            self.data = data_cls.from_dict(found)
        except MemoryError:
            raise
        except Exception as error:
            raise self._broken([path], error) from error

    def _download(self) -> None:
        missing = [Path(path) for path in self.raw_paths if not Path(path).exists()]
        if not missing:
            return
        folder, names = Path(self.raw_dir), ", ".join(path.name for path in missing)
        advice = (
            f"{self.called}: {names} missing in {folder}. Put the file{'s' if len(missing) > 1 else ''} there (about "
            f"{self.megabytes:g} MB, see the source in PyG's {type(self).__name__}), or give another --data-root"
        )
        if self.offline:
            raise FileNotFoundError(advice)
        print(f"{self.called}: downloading about {self.megabytes:g} MB to {folder}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix="download-") as self._raw:
                self.download()
                for path in missing:
                    (Path(self._raw) / path.name).replace(path)
        except Exception as error:
            raise FileNotFoundError(f"{advice} (the download failed: {error})") from error
        self._raw = None

    def _process(self) -> None:
        # PyG's own would also read processed/pre_transform.pt, by an unsafe torch.load
        processed = [Path(path) for path in self.processed_paths]
        if all(path.exists() for path in processed):
            return
        broken = [path for path in self.raw_paths if not readable(Path(path))]
        if broken:
            raise self._broken(broken)
        folder = Path(self.processed_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix="processing-") as self._processed:
            try:
                self.process()
            except (MemoryError, OSError):
                raise
            except Exception as error:
                raise self._broken(self.raw_paths, error) from error
            for path in processed:
                (Path(self._processed) / path.name).replace(path)
        self._processed = None

    def _broken(self, paths: Sequence[str], error: Exception | None = None) -> ValueError:
        which = ("one of " if error is not None and len(paths) > 1 else "") + ", ".join(paths)
        why = "not whole" if error is None else f"{type(error).__name__}: {error}"
        return ValueError(
            f"{self.called}: cannot read {which} ({why}); a download or a run that was cut off may have left it. "
            "Delete it, and start again"
        )


def load_guarded(
    cls: type[InMemoryDataset], name: str, root: Path, megabytes: float, offline: bool, kwargs: dict[str, Any]
) -> InMemoryDataset:
    """A PyG data set whose download says what it fetches, or refuses to.

    Args:
        cls: the class of the data set.
        name: how the user calls it.
        root: folder of the data.
        megabytes: size of the download.
        offline: never download.
        kwargs: arguments of the class beside ``root``.

    Raises:
        FileNotFoundError: files are missing and may not or cannot be fetched; says which, how large, and where they go.
        ValueError: a file is broken; says which.
    """
    attributes = {"called": name, "megabytes": megabytes, "offline": offline, "__module__": cls.__module__}
    dataset: InMemoryDataset = type(cls.__name__, (Guarded, cls), attributes)(str(root), **kwargs)
    return dataset


def load_tensors(path: Path) -> Any:
    """``torch.load``, on the CPU, of tensors and PyG's ``Data``; nothing else in the file is run.

    Raises:
        ValueError: the file holds anything else.
    """
    known = torch.serialization.get_safe_globals()  # at its end, safe_globals forgets those of before too
    try:
        with torch.serialization.safe_globals([part for part in SAFE if part not in known]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text is on how to load it all the same
        raise ValueError("not written by torch.save, or not of tensors alone") from error


def readable(path: Path) -> bool:
    """Whether the file is whole, by what its name says it is; text is where it ends with a line. Runs nothing of it."""
    try:
        if path.suffix in (".npz", ".pt"):
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
        if path.suffix == ".json":
            json.loads(path.read_bytes())
            return True
        content = path.read_bytes()
        if path.name.startswith("ind.") and path.suffix != ".index":
            return all(True for _ in pickletools.genops(content))
        return content.decode().endswith("\n")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def check_graph(name: str, data: Data) -> None:
    """Refuse a graph that cannot be what it should.

    Args:
        name: begins the message.
        data: with ``x``, ``edge_index`` and ``y``, and perhaps ``train_mask``, ``val_mask`` and ``test_mask``, (N,) or
            (N, S) for S splits.

    Raises:
        ValueError: shapes that do not fit, edges that point outside, features that are not numbers, splits that are
            empty or overlap, or labels below 0 in them; with the first offender.
    """
    if data.x.dim() != 2 or data.x.size(1) == 0:
        raise ValueError(f"{name}: got features of shape {tuple(data.x.shape)}, expected (nodes, at least one)")
    num_nodes = data.x.size(0)
    masks = {part: data[part] for part in MASKS if part in data}
    for part, value in {"y": data.y, **masks}.items():
        if value.dim() == 0 or value.size(0) != num_nodes:
            got = tuple(value.shape)
            raise ValueError(f"{name}: {part} has shape {got}, expected one row for each of {num_nodes} nodes")
    _check_edges(name, data.edge_index, num_nodes)
    if not data.x.isfinite().all():
        row = int((~data.x.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"{name}: the features of node {row} are not all finite")
    if masks:
        _check_splits(name, masks, data.y)


def _check_edges(name: str, edge_index: Tensor, num_nodes: int) -> None:
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"{name}: edge_index has shape {tuple(edge_index.shape)}, expected (2, edges)")
    if edge_index.numel():
        low, high = (int(value) for value in edge_index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"{name}: an edge names node {low if low < 0 else high}, expected numbers in 0..{num_nodes - 1}"
            )


def _check_splits(name: str, masks: dict[str, Tensor], y: Tensor) -> None:
    counts = {mask.size(1) for mask in masks.values() if mask.dim() == 2} or {1}
    if len(counts) > 1 or any(mask.dim() > 2 for mask in masks.values()):
        shapes = ", ".join(f"{part} {tuple(mask.shape)}" for part, mask in masks.items())
        raise ValueError(f"{name}: got masks of shapes {shapes}, expected as many splits in each")
    count = counts.pop()
    table = torch.stack([mask.view(len(y), -1).expand(-1, count) for mask in masks.values()])  # (parts, N, S)
    for part, mask in zip(masks, table, strict=True):
        if not mask.any(dim=0).all():
            split = int((~mask.any(dim=0)).nonzero()[0])
            where = f" of split {split}" if count > 1 else ""
            raise ValueError(
                f"{name}: {part}{where} is empty, expected nodes to train on, to choose by, and to test on"
            )
        labels = y[mask.any(dim=1)]
        if (labels < 0).any():
            raise ValueError(f"{name}: a node of {part} has label {int(labels.min())}, expected 0 or more")
    overlap = (table.sum(dim=0) > 1).nonzero()
    if len(overlap):
        node, split = overlap[0].tolist()
        both = " and ".join(part for part, mask in zip(masks, table, strict=True) if mask[node, split])
        raise ValueError(f"{name}: node {node} is in {both}, expected each node in one part of a split")
