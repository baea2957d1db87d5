"""Write a graph larger than memory as the folder that gmoe.StoredGraph opens.

    python -m experiments.convert ogbn-papers100M --from data --to data/ogbn_papers100M_stored --half
    python -m experiments.convert edges.csv.gz --x x.npy --y y.npy --train a.npy --val b.npy --test c.npy --to DIR

Reads OGB's binary release, or edges from .npy, .csv, .csv.gz or .parquet. DuckDB sorts them in about --memory, and on
10 bytes of disk an edge (20 where its reverse is added); a release is unpacked first: ogbn-papers100M takes 160 GB of
disk in all, 43 GB in the end. The folder appears when it is whole; a conversion that was killed leaves DIR.new, which
the next one replaces.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm

from experiments.config import PAPERS, fail
from experiments.files import read_csv, read_npy, read_npz

Array: TypeAlias = NDArray[Any]

PARTS = ("train", "val", "test")
ARRAYS = ("start", "source", "x", "y", *PARTS)
TABLES = (".csv", ".gz", ".parquet")
CLASSES = 172
"""Of ogbn-papers100M."""
SCRATCH = "scratch"
"""A folder in DIR.new for what is unpacked and sorted; it says whose DIR.new is."""
SPILL = 10
"""Bytes of disk that an edge takes while DuckDB sorts it: 8 and some."""
PIECE = 1 << 22
"""Numbers, or bytes, that are copied at once."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """(2, M) or (M, 2) edges or a table of them, (N, D) features, (N,) classes (-1 or NaN: none), nodes by part."""

    name: str
    edges: Array | Path
    x: Array
    y: Array | None = None
    split: Mapping[str, Array] = field(default_factory=dict)
    num_classes: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        nodes = len(self.x)
        if self.x.ndim != 2 or 0 in self.x.shape:
            raise ValueError(f"x: got shape {self.x.shape}, expected (nodes, features), one of each at least")
        if isinstance(self.edges, np.ndarray):
            shape, dtype = self.edges.shape, self.edges.dtype
            if len(shape) != 2 or 2 not in shape or dtype.kind not in "iu" or not dtype.isnative:
                raise ValueError(f"edges: got shape {shape} of {dtype.str}, expected (2, M) or (M, 2) native integers")
        if self.y is not None and self.y.shape not in ((nodes,), (nodes, 1)):
            raise ValueError(f"y: got shape {self.y.shape}, expected ({nodes},), a label for each row of x")
        seen = np.zeros(nodes, np.int8)
        for part, ids in self.split.items():
            if len(ids) and not 0 <= ids.min() <= ids.max() < nodes:
                raise ValueError(f"{part}: got nodes {ids.min()} to {ids.max()}, expected 0 to {nodes - 1}")
            np.add.at(seen, ids, 1)
            if seen.max() > 1:
                raise ValueError(f"{part}: got node {seen.argmax()} twice, or in an earlier part too, expected it once")


def papers(root: Path, scratch: Path) -> Input:
    """ogbn-papers100M as OGB publishes it, in a folder named by ogb or as in the zip file; arrays are unpacked."""
    folder = root.expanduser() / "ogbn_papers100M"
    folder = folder if folder.exists() else folder.with_name("papers100M-bin")
    data, planted = folder / "raw" / "data.npz", folder / "PLANTED.txt"
    if not data.is_file():
        raise ValueError(f"from: {data} is missing; unzip OGB's papers100M-bin.zip (56 GB) there, or give another")
    names = ("edge_index.npy", "node_feat.npy")
    try:
        with zipfile.ZipFile(data) as archive:
            check_space(scratch, sum(archive.getinfo(name).file_size for name in names))
            edges, x = (read_npy(Path(archive.extract(name, scratch)), memory_map=True) for name in names)
    except (KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{data}: cannot be read ({error})") from error
    split = {part: folder / "split" / "time" / f"{'valid' if part == 'val' else part}.csv.gz" for part in PARTS}
    return Input(
        name=PAPERS,
        edges=edges,
        x=x,
        y=read_npz(folder / "raw" / "node-label.npz")["node_label"],
        split={part: read_ids(path) for part, path in split.items()},
        num_classes=CLASSES,
        source=planted.read_text() if planted.exists() else f"OGB's binary release of {PAPERS}",
    )


def read_ids(path: Path) -> Array:
    """Node numbers from ``.npy``, ``.csv`` or ``.csv.gz`` (one a line, no header)."""
    ids = read_npy(path) if path.suffix == ".npy" else read_csv(path, header=None).to_numpy()
    if ids.dtype.kind not in "iu" or ids.size != len(ids):
        raise ValueError(f"{path}: got shape {ids.shape} of {ids.dtype}, expected a column of node numbers")
    return ids.reshape(-1).astype(np.int64)


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk that is too full."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"to: {folder} may need {needed / 1e9:.2f} GB, expected at most the {free / 1e9:.2f} GB free")


@contextmanager
def building(to: Path) -> Iterator[Path]:
    """A folder ``to.new`` that becomes ``to`` in the end, and goes where there is an error."""
    folder = to.with_name(f"{to.name}.new")
    if to.exists():
        raise ValueError(f"to: {to} is there already; delete it, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if any(folder.iterdir()) and not (folder / SCRATCH).exists():
            raise ValueError(f"to: {folder} is not of a conversion that was cut off; move it away")
        try:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            (folder / SCRATCH).mkdir()
            yield folder
            shutil.rmtree(folder / SCRATCH)
            (folder / SCRATCH).mkdir()  # still says whose it is
            folder.rename(to)
            (to / SCRATCH).rmdir()
        except BaseException:
            shutil.rmtree(folder)
            raise
    except BlockingIOError as error:
        raise ValueError(f"to: another conversion is writing {folder}") from error
    finally:
        os.close(lock)


def convert(
    given: Input, folder: Path, *, half: bool = False, directed: bool = False, memory: float = 2.0
) -> dict[str, Any]:
    """Write the files of a :class:`gmoe.StoredGraph` into a folder of :func:`building`, and return its ``graph.json``.

    The in-edges of a node ascend by source. Undirected, the reverse of every edge is added and an edge that is there
    twice is kept once, as PyG's ``to_undirected`` does (a self-loop has itself as its reverse); directed, edges stay as
    they are, parallel ones too. ``half`` and ``memory`` as in :class:`ConvertConfig`.

    Raises:
        ValueError: something in the data that cannot be, with the place where it is; not enough memory or disk.
    """
    if not memory > 0:
        raise ValueError(f"memory: got {memory}, expected gigabytes, more than 0")
    nodes, x_type = len(given.x), np.dtype(np.float16 if half or given.x.dtype == np.float16 else np.float32)
    num_edges = 0 if isinstance(given.edges, Path) else given.edges.size // (2 if directed else 1)
    check_space(folder, 4 * num_edges + max(SPILL * num_edges, given.x.size * x_type.itemsize))
    keys = sorted_keys(given.edges, folder / SCRATCH, nodes, directed=directed, memory=memory)
    num_edges = write_edges(keys, folder, nodes, directed=directed)
    write_npy(folder / "x.npy", x_type, finite(given.x, x_type), given.x.shape[1:])
    num_classes = write_labels(given, folder)
    for part, ids in given.split.items():
        np.save(folder / f"{part}.npy", ids)
    paths = [folder / f"{name}.npy" for name in ARRAYS]
    graph = {
        "format": 1,
        "name": given.name,
        "source": given.source,
        "num_nodes": nodes,
        "num_edges": num_edges,
        "undirected": not directed,
        "num_classes": num_classes,
        "arrays": {path.stem: described(path) for path in paths if path.exists()},
    }
    (folder / "graph.json").write_text(json.dumps(graph, indent=2) + "\n")
    return graph


def sorted_keys(edges: Array | Path, scratch: Path, nodes: int, *, directed: bool, memory: float) -> Iterator[Array]:
    """Each edge as one number, destination * N + source, in ascending order; sorted by DuckDB."""
    import duckdb

    settings: dict[str, Any] = {"memory_limit": f"{memory}GB", "temp_directory": str(scratch)}
    settings["preserve_insertion_order"] = False
    legal = f"s BETWEEN 0 AND {nodes - 1} AND d BETWEEN 0 AND {nodes - 1}"
    wrong = f"error(concat('got edge (', s, ', ', d, '), expected nodes 0 to {nodes - 1}'))"
    query = f"""
        WITH checked AS (SELECT s, CASE WHEN {legal} THEN d ELSE {wrong} END AS d FROM edges)
        SELECT d * {nodes} + s AS key FROM checked
        {"" if directed else f"UNION ALL SELECT s * {nodes} + d FROM checked"} ORDER BY key"""
    try:
        with duckdb.connect(scratch / "edges.duckdb", config=settings) as connection:
            if isinstance(edges, Path):
                _open_table(connection, edges)
            else:
                ends = edges if len(edges) == 2 else edges.T
                connection.register("given", {"s": ends[0], "d": ends[1]})
                connection.execute("CREATE TEMP VIEW edges AS SELECT s::BIGINT AS s, d::BIGINT AS d FROM given")
            connection.execute(query)
            while len(table := connection.fetch_df_chunk(512)):  # of 2,048 rows each
                yield table["key"].to_numpy()
    except RuntimeError as error:  # DuckDB's Ctrl-C
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        why = " ".join(str(error).split("\n")[:3])  # then comes advice on DuckDB's own settings
        raise ValueError(f"edges: {why} (memory: {memory:g} GB)") from error


def _open_table(connection: Any, path: Path) -> None:
    """Make a table's two columns the view ``edges``. DuckDB guesses nothing: it would skip lines, and round numbers."""
    quoted = str(path).replace("'", "''")
    table = f"read_parquet('{quoted}')"
    if path.suffix == ".gz":  # some versions of DuckDB take one that is cut off for a whole one
        try:
            with gzip.open(path) as file:
                while file.read(PIECE):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"edges: {path} cannot be read ({error})") from error
    if path.suffix != ".parquet":
        options = "auto_detect=false, delim=',', quote='\"', columns={'s': 'VARCHAR', 'd': 'VARCHAR'}"
        names = "TRY_CAST(s AS DOUBLE) IS NULL AND TRY_CAST(d AS DOUBLE) IS NULL"
        first = f"SELECT {names} FROM read_csv('{quoted}', {options}, header=false) LIMIT 1"
        header = connection.execute(first).fetchone()
        if header is None:
            raise ValueError(f"edges: {path} has no rows")
        table = f"read_csv('{quoted}', {options}, header={header[0]})"
    columns = connection.sql(f"SELECT * FROM {table}").columns
    if len(columns) != 2:
        raise ValueError(f"edges: got columns {', '.join(columns)} in {path}, expected two, source and destination")
    whole = "CASE WHEN trim({0}::VARCHAR) SIMILAR TO '[0-9]+' THEN {0}::BIGINT ELSE error(concat('got node ', {0})) END"
    ends = f"{whole.format('s')} AS s, {whole.format('d')} AS d"
    connection.execute(f"CREATE VIEW edges AS SELECT {ends} FROM {table} AS given (s, d)")


def write_edges(keys: Iterable[Array], folder: Path, nodes: int, *, directed: bool) -> int:
    """Write ``source.npy`` and ``start.npy``, and return the number of edges."""
    start = np.zeros(nodes + 1, np.int64)

    def sources() -> Iterator[Array]:
        last = -1
        for piece in keys:
            kept = piece if directed else piece[np.diff(piece, prepend=last) != 0]
            last = piece[-1]
            destination, source = np.divmod(kept, nodes)
            first = int(piece[0]) // nodes
            count = np.bincount(destination - first)
            start[first + 1 : first + 1 + len(count)] += count
            yield source

    num_edges = write_npy(folder / "source.npy", np.int32 if nodes < 2**31 else np.int64, sources())
    np.save(folder / "start.npy", np.cumsum(start, out=start))
    return num_edges


def write_npy(path: Path, dtype: Any, pieces: Iterable[Array], width: tuple[int, ...] = ()) -> int:
    """Write rows as they come, with a bar, and return how many they are."""
    rows, bar = 0, tqdm(desc=path.stem, unit_scale=True, unit=" rows", mininterval=0.1 if sys.stderr.isatty() else 30)
    with path.open("wb") as file, bar:
        file.seek(128)
        for piece in pieces:
            piece.astype(dtype, copy=False).tofile(file)
            rows += len(piece)
            bar.update(len(piece))
        file.seek(0)
        said = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (rows, *width)}
        npy.write_array_header_1_0(file, said)
        assert file.tell() == 128
    return rows


def finite(x: Array, dtype: Any) -> Iterator[Array]:
    """The features in pieces, cast; refuses NaN, infinity, or a number that is too large for the type."""
    size = max(1, PIECE // x.shape[1])
    for begin in range(0, len(x), size):
        with np.errstate(over="ignore"):
            cast = x[begin : begin + size].astype(dtype)
        good = np.isfinite(cast).all(axis=1)
        if not good.all():
            row, most = begin + int(good.argmin()), np.finfo(dtype).max
            raise ValueError(f"x: row {row} holds {np.abs(x[row]).max():g}, expected finite numbers up to {most:g}")
        yield cast


def write_labels(given: Input, folder: Path) -> int | None:
    """Write ``y.npy``, with -1 for NaN, and return the number of classes."""
    classes = given.num_classes
    if given.y is None:
        return classes
    y = np.where(np.isnan(given.y), -1, given.y).reshape(-1)
    low, high = y.min(), y.max()
    if low < -1 or high >= (2**31 if classes is None else classes) or (y % 1 != 0).any():
        below = "2^31" if classes is None else classes
        raise ValueError(f"y: got {low:g} to {high:g}, expected whole numbers below {below}, and -1 or NaN for none")
    for part, ids in given.split.items():
        if (y[ids] < 0).any():
            raise ValueError(f"y: node {ids[(y[ids] < 0).argmax()]} of {part} has no label, expected 0 or more")
    np.save(folder / "y.npy", y.astype(np.min_scalar_type(min(-1, -1 - int(high)))))
    return int(high) + 1 if classes is None else classes


def described(path: Path) -> dict[str, Any]:
    """What ``graph.json`` says of an array."""
    digest, array = hashlib.sha256(), np.load(path, mmap_mode="r")
    with path.open("rb") as file:
        while content := file.read(PIECE):
            digest.update(content)
    return {"file": path.name, "dtype": str(array.dtype), "shape": [*array.shape], "sha256": digest.hexdigest()}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A graph, and the folder it goes to."""

    graph: Annotated[str, tyro.conf.Positional]
    """ogbn-papers100M, or a file of edges, source and destination by node number from 0: .npy, (2, M) or (M, 2), or
    .csv, .csv.gz or .parquet with two columns. Of such a file are the options --x to --test."""
    to: Path
    """The folder to write, for gmoe.StoredGraph."""
    root: Annotated[Path, tyro.conf.arg(name="from")] = Path("data")
    """Where OGB's folder lies, ogbn_papers100M or papers100M-bin."""
    x: Path | None = None
    """The features, .npy with (N, D) numbers. Needed: it says how many nodes there are."""
    y: Path | None = None
    """The classes, .npy with (N,) whole numbers, -1 or NaN where there is none."""
    train: Path | None = None
    """The nodes of train, .npy, or .csv with one a line. Likewise val and test."""
    val: Path | None = None
    test: Path | None = None
    half: bool = False
    """Features as float16: half the disk and the traffic. Numbers beyond 65504 are refused."""
    directed: bool = False
    """Keep the edges as they are. By default the reverse of each is added, and none is kept twice."""
    memory: float = 2.0
    """Gigabytes to sort edges in, which DuckDB may exceed by half; 8 bytes a node come on top."""

    def input(self, scratch: Path) -> Input:
        """What is to be converted; refuses options that do not belong together."""
        own = {name: getattr(self, name) for name in ("x", "y", *PARTS) if getattr(self, name) is not None}
        if self.graph == PAPERS:
            if own:
                raise ValueError(f"{', '.join(own)}: got arrays for {PAPERS}, expected none; the release has its own")
            return papers(self.root, scratch)
        edges = Path(self.graph)
        if edges.suffix not in (".npy", *TABLES) or not edges.is_file():
            raise ValueError(f"graph: got {edges}, expected {PAPERS}, or a file, .npy, .csv, .csv.gz or .parquet")
        if self.x is None:
            raise ValueError("x: got none, expected a .npy file with a row of features for each node")
        return Input(
            name=edges.name.partition(".")[0],
            edges=read_npy(edges, memory_map=True) if edges.suffix == ".npy" else edges,
            x=read_npy(self.x, memory_map=True),
            y=None if self.y is None else read_npy(self.y),
            split={part: read_ids(own[part]) for part in PARTS if part in own},
            source=self.graph,
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ConvertConfig, args=args, prog="python -m experiments.convert", description=__doc__)
    try:
        with building(config.to) as folder:
            given = config.input(folder / SCRATCH)
            said = convert(given, folder, half=config.half, directed=config.directed, memory=config.memory)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        fail(ImportError(f"{error}; pip install 'duckdb>=1.4,<3'"))
    except (ValueError, OSError) as error:
        fail(error)
    print(f"{config.to}: {said['num_nodes']:,} nodes, {said['num_edges']:,} edges")


if __name__ == "__main__":
    main()
