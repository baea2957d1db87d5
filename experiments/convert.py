"""A graph larger than memory, as the folder that gmoe.data.StoredGraph opens.

    python -m experiments.convert ogbn-papers100M --from data --to data/ogbn_papers100M_stored --half
    python -m experiments.convert edges.csv.gz --x x.npy --y y.npy --train a.npy --val b.npy --test c.npy --to DIR

Reads OGB's binary release, or edges from .npy, .csv, .csv.gz or .parquet, in pieces. Memory is --memory, plus 8 bytes a
node, plus about 0.1 GB. Disk is 16 bytes an edge while edges are sorted (8 with --directed); what is needed at most is
checked first. The folder appears when it is whole: a conversion that was killed leaves DIR.new, which the next one
replaces.
"""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape

from experiments.stored import PARTS, Input, convert
from experiments.streams import ArrayEdges, ArrayStream, Ints, edges_of

PAPERS: Literal["ogbn-papers100M"] = "ogbn-papers100M"
STORED = "ogbn_papers100M_stored"
"""The converted folder, by the name under which the preset looks for it in the data root."""
CLASSES = 172
"""Of ogbn-papers100M."""


@dataclass(frozen=True)
class PapersFiles:
    """OGB's binary release of ogbn-papers100M.

    Args:
        root: what ogb calls root.
    """

    root: Path

    @property
    def folder(self) -> Path:
        """Named by ogb, or as in the zip file."""
        found = self.root.expanduser() / "ogbn_papers100M"
        unzipped = found.with_name("papers100M-bin")
        return unzipped if unzipped.exists() and not found.exists() else found

    @property
    def data(self) -> Path:
        """Edges and features."""
        return self.folder / "raw" / "data.npz"

    @property
    def label(self) -> Path:
        """Labels."""
        return self.folder / "raw" / "node-label.npz"

    def split(self, part: str) -> Path:
        """Nodes of train, val or test."""
        return self.folder / "split" / "time" / f"{'valid' if part == 'val' else part}.csv.gz"


def papers(root: Path) -> Input:
    """ogbn-papers100M as OGB publishes it.

    Args:
        root: what ogb calls root.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a broken file, or files that do not fit together.
    """
    files = PapersFiles(root)
    missing = [path for path in (files.data, files.label, *map(files.split, PARTS)) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{PAPERS}: {', '.join(str(path.relative_to(files.folder)) for path in missing)} missing in "
            f"{files.folder}; unzip OGB's papers100M-bin.zip (56 GB) there, or give another --from"
        )
    x, edges = ArrayStream(files.data, "node_feat"), ArrayEdges(ArrayStream(files.data, "edge_index"))
    for member, expected in (("num_nodes_list", x.shape[0]), ("num_edges_list", edges.num_edges)):
        counts = next(ArrayStream(files.data, member).flat(2), np.empty(0))
        if counts.tolist() != [expected]:
            raise ValueError(f"{files.data}: {member} is {counts.tolist()}, expected [{expected}], as in its arrays")
    planted = files.folder / "PLANTED.txt"
    return Input(
        name=PAPERS,
        edges=edges,
        x=x,
        y=ArrayStream(files.label, "node_label"),
        split={part: read_ids(files.split(part)) for part in PARTS},
        num_classes=CLASSES,
        source=planted.read_text() if planted.exists() else f"OGB's binary release of {PAPERS}",
    )


def read_ids(path: Path) -> Ints:
    """Node numbers from ``.npy``, ``.csv`` or ``.csv.gz`` (one a line, no header).

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else.
    """
    try:
        if path.suffix == ".npy":
            ids = np.load(path)
        else:
            import pandas as pd

            ids = pd.read_csv(path, header=None).to_numpy()
    except (MemoryError, FileNotFoundError):
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if ids.dtype.kind not in "iu" or ids.size != len(ids):
        raise ValueError(f"{path}: got shape {ids.shape} of {ids.dtype}, expected a column of node numbers")
    return ids.reshape(-1).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A graph, and the folder it goes to."""

    graph: Annotated[str, tyro.conf.Positional]
    """ogbn-papers100M, or a file of edges, source and destination by node number from 0: .npy with (2, M) or (M, 2)
    integers, .csv, .csv.gz or .parquet with two columns."""
    to: Path
    """The folder to write, for gmoe.data.StoredGraph."""
    root: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Of ogbn-papers100M: the data root, as in ogb, in which ogbn_papers100M or papers100M-bin lies (default data)."""
    x: Path | None = None
    """Of a file of edges: the features, .npy with (N, D) numbers. Needed: it says how many nodes there are."""
    y: Path | None = None
    """Of a file of edges: the classes, .npy with (N,) whole numbers, -1 or NaN where there is none."""
    train: Path | None = None
    """Of a file of edges: the nodes of train, .npy, or .csv with one a line. Likewise val and test."""
    val: Path | None = None
    """See --train."""
    test: Path | None = None
    """See --train."""
    half: bool = False
    """Features as float16: half the disk and the traffic. Numbers beyond 65504 are refused."""
    directed: bool = False
    """Keep the edges as they are. By default the reverse of each is added, and none is kept twice."""
    memory: float = 2.0
    """Gigabytes to sort edges in; 8 bytes a node come on top."""

    def input(self) -> Input:
        """What is to be converted.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: a package is missing.
            ValueError: options that do not belong together, or a broken file.
        """
        own = {name: getattr(self, name) for name in ("x", "y", *PARTS)}
        if self.graph == PAPERS:
            for name, value in own.items():
                if value is not None:
                    raise ValueError(f"{name}: got {value} for {PAPERS}, expected none; the release has its own")
            return papers(self.root or Path("data"))
        if self.root is not None:
            raise ValueError(f"from: got {self.root} for edges of a file, expected none, or {PAPERS}")
        edges = edges_of(Path(self.graph))
        if self.x is None:
            raise ValueError("x: got none, expected a .npy file with a row of features for each node")
        return Input(
            name=Path(self.graph).name.partition(".")[0],
            edges=edges,
            x=ArrayStream(self.x),
            y=None if self.y is None else ArrayStream(self.y),
            split={part: read_ids(own[part]) for part in PARTS if own[part] is not None},
            source=str(self.graph),
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ConvertConfig, args=args, prog="python -m experiments.convert", description=__doc__)
    begun = time.monotonic()
    try:
        graph = convert(config.input(), config.to, half=config.half, directed=config.directed, memory=config.memory)
    except KeyboardInterrupt:
        print("stopped; nothing is left of it", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = ValueError(f"to: the disk of {config.to} is full")
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    spent = timedelta(seconds=round(time.monotonic() - begun))
    print(f"{config.to}: {graph['num_nodes']:,} nodes, {graph['num_edges']:,} edges, in {spent}")


if __name__ == "__main__":
    main()
