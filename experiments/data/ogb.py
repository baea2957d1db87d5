"""Four of OGB's node data sets (Hu et al., 2020): fetched whole, read from OGB's own files, OGB's own metric.

The fifth, ogbn-papers100M, stays on disk: see :mod:`experiments.convert` and :mod:`experiments.data.stored_task`.

The files are read here, not by ``ogb``'s loader, which asks questions by ``input()`` and unpickles what it finds.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from urllib.request import urlopen

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData, extract_zip
from torch_geometric.utils import scatter
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from tqdm import tqdm

from experiments.convert import PAPERS
from experiments.data.graph_data import GraphData, Split, Splits

OGBName: TypeAlias = Literal["ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-mag"]
Relation: TypeAlias = tuple[str, str, str]

RELATIONS: tuple[Relation, ...] = (
    ("author", "affiliated_with", "institution"),
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has_topic", "field_of_study"),
)
"""Of ogbn-mag: source, relation, destination."""

LABELED = "paper"
"""The one node type of ogbn-mag with features, labels and a split."""

PARTS: Mapping[Split, str] = {"train": "train", "val": "valid", "test": "test"}
"""OGB's names of the parts of a split."""

LARGE = 1.0
"""Gigabytes above which a download needs ``allow_large_downloads``; ogb's own limit."""
TIMEOUT = 30
"""Seconds without an answer after which the network counts as down."""


class Published(NamedTuple):
    """What OGB's table says of a data set."""

    archive: str
    """Name of the zip file, and of the folder in it."""
    version: int
    gigabytes: float
    """Size of the download, in ogb's unit, 2**30 bytes."""
    split: str
    """Folder of the official split."""
    classes: int
    tasks: int
    """Labels of a node."""
    both_ways: bool
    """Each edge is stored once, and stands for both directions."""
    note: str

    @property
    def url(self) -> str:
        """Of the zip file."""
        return f"http://snap.stanford.edu/ogb/data/nodeproppred/{self.archive}.zip"


OGB: dict[OGBName, Published] = {
    "ogbn-arxiv": Published("arxiv", 1, 0.08, "time", 40, 1, False, "ODC-BY; official split by year"),
    "ogbn-products": Published(
        "products", 1, 1.38, "sales_ranking", 47, 1, True, "Amazon license; official split by sales rank"
    ),
    "ogbn-proteins": Published("proteins", 1, 0.21, "species", 2, 112, True, "CC0; official split by species"),
    "ogbn-mag": Published("mag", 2, 0.40, "time", 349, 1, False, "ODC-BY; official split by year"),
}


@dataclass(frozen=True)
class Layout:
    """Where a data set lies and what belongs to it.

    Args:
        name: of the data set.
        root: what ogb calls root.
        folder: the data set's, inside ``root``.
    """

    name: OGBName
    root: Path
    folder: Path

    @property
    def published(self) -> Published:
        """What OGB says of it."""
        return OGB[self.name]

    @property
    def hetero(self) -> bool:
        """Several node types: ogbn-mag."""
        return self.name == "ogbn-mag"

    @property
    def archive(self) -> Path:
        """The download."""
        return self.root / f"{self.published.archive}.zip"

    @property
    def release(self) -> Path:
        """The file whose name says which version the folder is."""
        return self.folder / f"RELEASE_v{self.published.version}.txt"

    @property
    def planted(self) -> Path:
        """The file that says that the folder is not OGB's."""
        return self.folder / "PLANTED.txt"

    @property
    def processed(self) -> Path:
        """The tensors that were made of the files."""
        return self.folder / "processed" / "tensors.pt"

    def raw(self, file: str, of: Relation | None = None) -> Path:
        """A raw file; of ogbn-mag, of the papers or of a relation."""
        inside = f"{file}.csv.gz"
        if of is not None:
            inside = f"relations/{'___'.join(of)}/{inside}"
        elif self.hetero and file in ("node-feat", "node-label"):
            inside = f"{file}/{LABELED}/{inside}"
        return self.folder / "raw" / inside

    def split(self, part: Split) -> Path:
        """The node indices of a part of the official split."""
        inside = LABELED if self.hetero else ""
        return self.folder / "split" / self.published.split / inside / f"{PARTS[part]}.csv.gz"

    @property
    def files(self) -> list[Path]:
        """All that is read."""
        features = "edge-feat" if self.name == "ogbn-proteins" else "node-feat"
        names = (features, "node-label", "num-node-dict" if self.hetero else "num-node-list")
        ends = RELATIONS if self.hetero else (None,)
        edges = [self.raw(file, of) for of in ends for file in ("edge", "num-edge-list")]
        return [*map(self.raw, names), *edges, *map(self.split, PARTS)]

    @property
    def missing(self) -> str:
        """The files that are not there, by their path in the folder."""
        wanted = (self.release, *self.files)
        return ", ".join(str(path.relative_to(self.folder)) for path in wanted if not path.is_file())


def layout_of(name: str, root: Path) -> Layout:
    """The layout of a data set under ``root``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in OGB:
        hint = "; it stays on disk, see experiments.convert" if name == PAPERS else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(OGBName))}{hint}")
    root = root.expanduser()
    folder = root / name.replace("-", "_")
    other = folder.with_name(f"{folder.name}_pyg")  # ogb prefers it
    return Layout(name, root, other if other.exists() else folder)


def load_ogb(name: str, root: Path, *, offline: bool = False, allow_large_downloads: bool = False) -> GraphData:
    """One of OGB's node data sets, with its official split and metric.

    - ``"ogbn-arxiv"``: directed citations; ``x`` (N, 128), ``y`` (N,) long.
    - ``"ogbn-products"``: ``x`` (N, 100), ``y`` (N,) long; each edge in both directions.
    - ``"ogbn-proteins"``: ``edge_attr`` (M, 8), ``y`` (N, 112) float; each edge in both directions. There are no node
      features: ``x`` (N, 8) is the mean of ``edge_attr`` over the edges of a node, zero without any.
    - ``"ogbn-mag"``: a ``HeteroData`` of ``paper``, ``author``, ``institution`` and ``field_of_study``, with the four
      relations as they are stored, none reversed. Papers alone have ``x`` (N, 128) and ``y`` (N,) long.

    What the files hold is kept as tensors in ``processed/``, which the next run reads.

    Args:
        name: of the data set.
        root: what ogb calls root: the folder ``ogbn_arxiv`` lies inside.
        offline: leave the network alone (default ``False``).
        allow_large_downloads: download more than 1 GB, and replace a folder of another version (default ``False``).

    Raises:
        FileNotFoundError: files are missing, and may not or cannot be downloaded.
        ValueError: an unknown name, a download that needs ``allow_large_downloads``, a folder of another version, or
            a broken file, which the message names.
    """
    layout = layout_of(name, root)
    provide(layout, offline=offline, allow_large_downloads=allow_large_downloads)
    if layout.planted.exists():
        print(f"{name}: a planted graph, not OGB's ({layout.planted})", flush=True)
    found = _tensors(layout)
    data = HeteroData(found["graph"]) if layout.hetero else Data.from_dict(found["graph"])
    published, split = layout.published, found["split"]
    return GraphData(
        name=name,
        data=data,
        splits=lambda _: split,
        metric=partial(OGBMetric, name),
        metric_name="accuracy" if published.tasks == 1 else "roc_auc",
        num_outputs=published.classes if published.tasks == 1 else published.tasks,
        target=LABELED if layout.hetero else None,
    )


def provide(layout: Layout, *, offline: bool = False, allow_large_downloads: bool = False) -> None:
    """See to it that the data set's folder is there, in ogb's version and with all its files.

    What is downloaded is moved to its place when all of it has arrived. A zip file that the user has put into
    ``layout.root`` is taken instead of a download.

    Args:
        layout: of the data set.
        offline: leave the network alone.
        allow_large_downloads: download more than 1 GB; replace a folder of another version.

    Raises:
        FileNotFoundError: files are missing, and may not or cannot be downloaded.
        ValueError: the download needs ``allow_large_downloads``, the folder is of another version, or the zip file is
            broken.
    """
    name, folder, archive = layout.name, layout.folder, layout.archive
    occupied = folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))
    if occupied and layout.release.exists():
        if layout.missing:
            raise FileNotFoundError(
                f"{name}: {layout.missing} missing in {folder}; put what is missing there, or delete the folder and "
                "load again"
            )
        return
    if offline and not archive.exists():
        raise FileNotFoundError(
            f"{name}: offline, and {layout.missing} missing in {folder}; put them there, or OGB's {archive.name} into "
            f"{layout.root}"
        )
    if occupied and not allow_large_downloads:
        raise ValueError(
            f"{name}: {folder} is of another version, since {layout.release.name} is not there; pass "
            "--allow-large-downloads to replace it, or move it away"
        )
    layout.root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=layout.root, prefix=f"{name}-") as scratch:
        if not archive.exists():
            archive = Path(scratch) / archive.name
            _download(layout, archive, allow_large_downloads=allow_large_downloads)
        fresh = replace(layout, folder=Path(scratch) / archive.stem)
        try:
            extract_zip(str(archive), scratch, log=False)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _broken(archive, f"not a whole zip file ({error})", archive) from error
        if fresh.missing:
            raise _broken(archive, f"holds no {fresh.missing}", archive)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.folder.rename(folder)


def _download(layout: Layout, target: Path, *, allow_large_downloads: bool) -> None:
    """Print the size of the download, then fetch it."""
    size, url = layout.published.gigabytes, layout.published.url
    about = f"{layout.name}: a download of {size:.2f} GB to {layout.folder}"
    if size > LARGE and not allow_large_downloads:
        raise ValueError(f"{about}, more than {LARGE:.0f} GB; pass --allow-large-downloads to start it")
    print(about, flush=True)
    try:
        with urlopen(url, timeout=TIMEOUT) as response, target.open("wb") as file:
            total = int(response.headers["Content-Length"] or 0)
            with tqdm.wrapattr(response, "read", total=total, desc=target.name) as body:
                shutil.copyfileobj(body, file, 1 << 20)
        arrived = target.stat().st_size
        if total not in (0, arrived):  # a connection that is closed early looks like the end of the file
            raise OSError(f"{arrived} of {total} bytes have arrived")
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"{about} failed ({error}); try again, or put OGB's {layout.archive.name} into {layout.root}"
        ) from error


def _broken(path: Path, problem: str, delete: Path) -> ValueError:
    """A file that is no use, with what to do about it."""
    return ValueError(f"{path}: {problem}; delete {'it' if delete == path else delete} and load again")


def _tensors(layout: Layout) -> dict[str, Any]:
    """``graph`` and ``split``: those of the last run where the files have the same sizes, else read from them."""
    path, sizes = layout.processed, {str(file.relative_to(layout.folder)): file.stat().st_size for file in layout.files}
    if path.exists():
        try:
            known: dict[str, Any] = torch.load(path, weights_only=True)
            if known["sizes"] == sizes:
                return known
        except MemoryError:
            raise
        except Exception as error:
            raise _broken(path, f"cannot be read ({error!r:.200})", path) from error
    print(f"{layout.name}: reading the files in {layout.folder}", flush=True)
    graph, nodes = _mag(layout) if layout.hetero else _plain(layout)
    found = {"sizes": sizes, "graph": graph, "split": _split(layout, nodes)}
    path.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        torch.save(found, fresh)
        fresh.replace(path)
    return found


def _plain(layout: Layout) -> tuple[dict[str, Tensor], int]:
    """A graph with one node type, and the number of its nodes."""
    nodes, published = _count(layout, layout.raw("num-node-list")), layout.published
    edge_index, edges = _edges(layout, (nodes, nodes))
    y = _table(layout, layout.raw("node-label"), nodes, (published.classes,) * published.tasks)
    graph = {"edge_index": edge_index, "y": y.view(-1) if published.tasks == 1 else y.float()}
    if published.both_ways:  # each edge is followed by its reverse, as ogb has it
        graph["edge_index"] = torch.stack([edge_index, edge_index.flip(0)], dim=-1).view(2, -1)
    if layout.name == "ogbn-proteins":
        attr = _table(layout, layout.raw("edge-feat"), edges).repeat_interleave(2, dim=0)
        x = scatter(attr, graph["edge_index"][1], dim_size=nodes, reduce="mean")
        return {"x": x, **graph, "edge_attr": attr}, nodes
    return {"x": _table(layout, layout.raw("node-feat"), nodes), **graph}, nodes


def _mag(layout: Layout) -> tuple[dict[Any, dict[str, Any]], int]:
    """ogbn-mag by node type and relation, and the number of its papers."""
    path = layout.raw("num-node-dict")
    counts = {str(kind): int(column[0]) for kind, column in _csv(layout, path, header=0).items()}
    graph: dict[Any, dict[str, Any]] = {kind: {"num_nodes": counts[kind]} for kind in sorted(counts)}
    nodes = counts[LABELED]
    graph[LABELED]["x"] = _table(layout, layout.raw("node-feat"), nodes)
    graph[LABELED]["y"] = _table(layout, layout.raw("node-label"), nodes, (layout.published.classes,)).view(-1)
    for relation in RELATIONS:
        graph[relation] = {"edge_index": _edges(layout, (counts[relation[0]], counts[relation[2]]), relation)[0]}
    return graph, nodes


def _edges(layout: Layout, below: tuple[int, int], of: Relation | None = None) -> tuple[Tensor, int]:
    """(2, edges) as stored, and how many they are."""
    edges = _count(layout, layout.raw("num-edge-list", of))
    return _table(layout, layout.raw("edge", of), edges, below).t().contiguous(), edges


def _count(layout: Layout, path: Path) -> int:
    return int(_table(layout, path, 1, (sys.maxsize,)))


def _table(layout: Layout, path: Path, rows: int | None, below: tuple[int, ...] | None = None) -> Tensor:
    """(rows, columns) float32; or int64 from 0 to what each column stays ``below``."""
    values = _csv(layout, path).to_numpy()
    problem = None
    if rows not in (None, len(values)):
        problem = f"got {len(values)} rows, expected {rows}"
    elif values.dtype.kind not in "if" or not np.isfinite(values.sum()):
        problem = "got NaN, infinity or text, expected numbers"
    elif below is not None and values.shape[1] != len(below):
        problem = f"got {values.shape[1]} columns, expected {len(below)}"
    elif below is not None and ((values < 0) | (values >= np.array(below)) | (values % 1 != 0)).any():
        problem = f"got {values.min()} to {values.max()}, expected whole numbers from 0 to {max(below) - 1}"
    if problem is not None:
        raise _broken(path, problem, layout.folder)
    return torch.from_numpy(values.astype(np.float32 if below is None else np.int64))


def _csv(layout: Layout, path: Path, header: int | None = None) -> pd.DataFrame:
    try:
        return pd.read_csv(path, header=header)
    except MemoryError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise _broken(path, f"cannot be read ({error!r:.200})", layout.folder) from error


def _split(layout: Layout, nodes: int) -> Splits:
    """The official split: each (labeled) node in one part at most."""
    split: Splits = {}
    seen = torch.zeros(nodes, dtype=torch.long)
    for part in PARTS:
        path = layout.split(part)
        index = _table(layout, path, None, (nodes,)).view(-1)
        seen += index.bincount(minlength=nodes)
        if seen.max() > 1:
            problem = f"got node {int(seen.argmax())} twice, or in an earlier part as well, expected each node once"
            raise _broken(path, problem, layout.folder)
        split[part] = index
    return split


def import_ogb(module: str) -> Any:
    """A module of ogb, imported without ogb's look into the network for a newer ogb."""
    sys.modules["outdated"] = None  # type: ignore[assignment]  # what it would look with; it does without
    try:
        return import_module(module)
    finally:
        del sys.modules["outdated"]


class OGBMetric(Metric):
    """What ``ogb.nodeproppred.Evaluator`` says: accuracy of the argmax, or the mean ROC-AUC over the tasks.

    All predictions are kept, and evaluated at once over all processes: the ROC-AUC does not follow from its parts. ogb
    leaves out a task that has one class only.

    Args:
        name: of the OGB data set.
        **kwargs: :class:`torchmetrics.Metric`'s.

    Shapes:
        - **logits:** (n, classes), or (n, tasks) for the ROC-AUC.
        - **target:** (n,) or (n, 1), or (n, tasks) for the ROC-AUC.
        - **output:** a scalar, higher is better.

    Raises:
        ValueError: an unknown name, or shapes that do not fit.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    prediction: list[Tensor] | Tensor
    target: list[Tensor] | Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._evaluator = import_ogb("ogb.nodeproppred").Evaluator(name)
        self.add_state("prediction", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    @property
    def metric_name(self) -> str:
        """``"acc"`` or ``"rocauc"``."""
        return self._evaluator.eval_metric

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in the logits of some nodes."""
        by_rank = self.metric_name == "rocauc"
        target = target if by_rank else target.view(-1, 1)
        width = self._evaluator.num_tasks if by_rank else "classes"
        fits = logits.dim() == 2 and logits.size(0) == target.size(0)
        if not fits or (by_rank and logits.shape != target.shape) or (by_rank and logits.size(1) != width):
            raise ValueError(
                f"logits: got {tuple(logits.shape)} for a target of {tuple(target.shape)}, expected (n, {width})"
            )
        logits = logits.detach()
        assert isinstance(self.prediction, list)
        assert isinstance(self.target, list)
        self.prediction.append(logits.float() if by_rank else logits.argmax(dim=1, keepdim=True))
        self.target.append(target)

    def compute(self) -> Tensor:
        """The metric over everything since the last reset."""
        result = self._evaluator.eval({"y_true": dim_zero_cat(self.target), "y_pred": dim_zero_cat(self.prediction)})
        return torch.tensor(result[self.metric_name], device=self.device)
