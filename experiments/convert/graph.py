"""Write a graph larger than memory as the folder that gmoe.StoredGraph opens.

    python -m experiments.convert ogbn-papers100M --from data \\
        --to data/ogbn_papers100M_stored --half
    python -m experiments.convert edges.csv --x x.npy --y y.npy --to DIR \\
        --train a.npy --val b.npy --test c.npy

Reads OGB's binary release, or edges from .npy, .csv or .parquet. DuckDB sorts them in about
--memory, and on 10 bytes of disk an edge (20 where its reverse is added); a release is unpacked
first: ogbn-papers100M takes 160 GB of disk in all, 43 GB in the end. The folder appears when it
is whole; a conversion that was killed leaves DIR.new, which the next one replaces.

Tables of SMILES become OGB's molecule sets: see python -m experiments.convert molecules --help.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm, trange

from experiments.train.checks import check
from experiments.train.command_line import program
from experiments.train.config import PAPERS
from experiments.train.files import LONGEST, naming, read_csv, read_npy, writing

Array: TypeAlias = NDArray[Any]

PARTS = ("train", "val", "test")
CLASSES = 172  # of ogbn-papers100M
RELEASE = {
    "data.npz": {"edges": "edge_index", "x": "node_feat"},
    "node-label.npz": {"y": "node_label"},
}
"""The arrays of its archives, by what they are here."""
SOURCES = ("source", "src", "from")
TARGETS = ("target", "destination", "dst", "to")
"""Names of columns: where a target's comes first, they stand the other way round."""
SCRATCH = "scratch"
"""A folder in DIR.new for what is unpacked and sorted; it says whose DIR.new is."""
SPILL = 10  # bytes of disk that an edge takes while DuckDB sorts it: 8 and some
PIECE = 1 << 22  # numbers that are copied at once


def papers(root: Path, scratch: Path) -> tuple[str, dict[str, Path]]:
    """Source and files of ogbn-papers100M in a folder named by ogb or as in the zip file.

    Arrays are unpacked.
    """
    folder = root.expanduser() / "ogbn_papers100M"
    folder = folder if folder.exists() else folder.with_name("papers100M-bin")
    planted = folder / "PLANTED.txt"
    files = {
        part: folder / "split" / "time" / f"{'valid' if part == 'val' else part}.csv.gz"
        for part in PARTS
    }
    for archive, arrays in RELEASE.items():
        path = folder / "raw" / archive
        legal = "OGB's papers100M-bin.zip (56 GB) unzipped there"
        check(path.is_file(), "from", f"no {path}", legal)
        with naming(path), zipfile.ZipFile(path) as file:
            unpacked = sum(file.getinfo(f"{array}.npy").file_size for array in arrays.values())
            check_space(scratch, unpacked, str(path))
            for name, array in arrays.items():
                with writing(scratch / f"{array}.npy"):
                    files[name] = Path(file.extract(f"{array}.npy", scratch))
    with naming(planted):
        source = planted.read_text() if planted.exists() else f"OGB's binary release of {PAPERS}"
    return source, files


def check_space(folder: Path, needed: int, what: str = "to") -> None:
    """Refuse a disk that is too full."""
    free = shutil.disk_usage(folder).free
    legal = f"at most the {free / 1e9:.2f} GB free at {folder}"
    check(needed <= free, what, f"{needed / 1e9:.2f} GB to write", legal)


@contextmanager
def building(to: Path, option: str = "to") -> Iterator[Path]:
    """A folder ``to.new`` that becomes ``to`` in the end, and goes where there is an error."""
    folder = to.with_name(f"{to.name}.new")
    check(not to.exists(), option, f"{to}, which is there already", "another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{option}: another process is writing {folder}") from error
        is_ours = not any(folder.iterdir()) or (folder / SCRATCH).exists()
        legal = "none, or those of a run that was cut off"
        check(is_ours, option, f"files of another program in {folder}", legal)
        stack.callback(_remove, folder)
        _empty(folder)
        (folder / SCRATCH).mkdir(exist_ok=True)
        with writing(folder):
            yield folder
        _empty(folder / SCRATCH)
        folder.rename(to)
        (to / SCRATCH).rmdir()


def _empty(folder: Path) -> None:
    """Delete what is in a folder; :data:`SCRATCH` goes last, since without it the rest is nobody's.

    A process may be killed in between.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == SCRATCH):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(folder: Path) -> None:
    """Delete what an error leaves; nothing is left of a folder that has its final name."""
    with suppress(OSError):  # the one that is on its way says more
        _empty(folder)
        folder.rmdir()


def convert(
    graph: Annotated[str, tyro.conf.Positional],
    to: Path,
    root: Annotated[Path, tyro.conf.arg(name="from")] = Path("data"),
    x: Path | None = None,
    y: Path | None = None,
    train: Path | None = None,
    val: Path | None = None,
    test: Path | None = None,
    half: bool = False,
    directed: bool = False,
    memory: float = 2.0,
) -> dict[str, Any]:
    """Write the folder of a :class:`gmoe.StoredGraph`, and return its ``graph.json``.

    The in-edges of a node ascend by source. Undirected, edges are what PyG's ``to_undirected``
    makes of them.

    Args:
        graph: ogbn-papers100M, or a file of edges, source and destination by node number from
            0: .npy, (2, M) or (M, 2), or .csv or .parquet with two columns, the source first
            unless they are called target (destination, dst, to) and source (src, from). Of such a
            file are the options --x to --test.
        to: the folder to write, for gmoe.StoredGraph.
        root: where OGB's folder lies, ogbn_papers100M or papers100M-bin.
        x: the features, .npy with (N, D) numbers. Needed: it says how many nodes there are.
        y: the classes, .npy with (N,) whole numbers, -1 or NaN where there is none.
        train: the nodes of train, .npy, or .csv with one a line. Likewise val and test.
        half: features as float16: half the disk and the traffic. Numbers beyond 65504 are refused.
        directed: keep the edges as they are. By default the reverse of each is added, and none
            is kept twice.
        memory: gigabytes to sort edges in, which DuckDB may exceed by half; 8 bytes a node come
            on top.

    Raises:
        ValueError: options that do not fit; something in the data that cannot be, and where;
            not enough memory or disk.
    """
    check(memory > 0, "memory", memory, "gigabytes, more than 0")
    # Or its scratch would lie elsewhere
    is_plain = "\\" not in str(to.absolute())
    check(is_plain, "to", to, "a path without a backslash, which DuckDB takes for a slash")
    given = {"x": x, "y": y, "train": train, "val": val, "test": test}
    files = {name: path for name, path in given.items() if path is not None}
    source = graph
    with building(to) as folder:
        if graph == PAPERS:
            legal = "none; the release has its own"
            check(not files, ", ".join(files), f"arrays for {PAPERS}", legal)
            source, files = papers(root, folder / SCRATCH)
        edges = read_edges(files.get("edges", Path(graph)))
        check("x" in files, "x", None, "a .npy file with a row of features for each node")
        features = read_npy(files["x"], memory_map=True)
        nodes = len(features)
        is_table = features.ndim == 2 and 0 not in features.shape
        legal = "(nodes, features), one of each at least"
        check(is_table, str(files["x"]), f"shape {features.shape}", legal)
        split = write_split(files, folder, nodes)
        num_classes = write_labels(files, split, folder, nodes) if "y" in files else None
        num_edges = 0 if isinstance(edges, Path) else edges.size // (2 if directed else 1)
        x_type = np.dtype(np.float16 if half or features.dtype == np.float16 else np.float32)
        check_space(folder, 4 * num_edges + max(SPILL * num_edges, features.size * x_type.itemsize))
        keys = sorted_keys(edges, folder / SCRATCH, nodes, directed=directed, memory=memory)
        num_edges = write_edges(keys, folder, nodes, directed=directed)
        write_features(folder / "x.npy", features, x_type, str(files["x"]))
        arrays = [folder / f"{name}.npy" for name in ("start", "source", *given)]
        said = {
            "format": 1,
            "name": Path(graph).name.partition(".")[0],
            "source": source,
            "num_nodes": nodes,
            "num_edges": num_edges,
            "undirected": not directed,
            "num_classes": CLASSES if graph == PAPERS else num_classes,
            "arrays": {path.stem: described(path) for path in arrays if path.exists()},
        }
        with writing(folder / "graph.json"):
            (folder / "graph.json").write_text(json.dumps(said, indent=2) + "\n")
    print(f"{said['name']}: {nodes:,} nodes, {num_edges:,} edges")
    return said


def read_edges(path: Path) -> Array | Path:
    """(2, M) edges, mapped; or a table, which DuckDB reads."""
    is_known = path.suffix in (".npy", ".csv", ".parquet") and path.is_file()
    check(is_known, "graph", path, f"{PAPERS}, or a file, .npy, .csv or .parquet")
    if path.suffix != ".npy":
        return path
    edges = read_npy(path, memory_map=True)
    are_pairs = edges.ndim == 2 and 2 in edges.shape
    are_integers = edges.dtype.kind in "iu" and edges.dtype.isnative
    got = f"shape {edges.shape} of {edges.dtype.str}"
    check(are_pairs and are_integers, "edges", got, "(2, M) or (M, 2) native integers")
    return edges if len(edges) == 2 else edges.T


def write_split(files: dict[str, Path], folder: Path, nodes: int) -> dict[str, Array]:
    """Write the nodes of each part, and return them.

    From ``.npy``, ``.csv`` or ``.csv.gz`` (one a line, no header).
    """
    split = {}
    seen = np.zeros(nodes, bool)
    for part, path in ((part, files[part]) for part in PARTS if part in files):
        ids = read_npy(path) if path.suffix == ".npy" else read_csv(path, header=None).to_numpy()
        is_column = ids.dtype.kind in "iu" and ids.size == len(ids)
        check(is_column, str(path), f"shape {ids.shape} of {ids.dtype}", "a column of node numbers")
        split[part] = ids = ids.reshape(-1).astype(np.int64)
        low, high = (ids.min(), ids.max()) if len(ids) else (0, 0)
        legal = f"0 to {nodes - 1}"
        check(0 <= low <= high < nodes, str(path), f"nodes {low} to {high}", legal)
        ascending = np.sort(ids)
        again = np.concatenate([ascending[1:][np.diff(ascending) == 0], ids[seen[ids]]])
        if len(again):
            got = f"node {again.min()} twice, or in an earlier part too"
            raise ValueError(f"{path}: got {got}, expected it once")
        seen[ids] = True
        write_npy(folder / f"{part}.npy", ids)
    return split


def sorted_keys(
    edges: Array | Path, scratch: Path, nodes: int, *, directed: bool, memory: float
) -> Iterator[Array]:
    """Each edge as one number, destination * N + source, in ascending order; sorted by DuckDB."""
    import duckdb

    # Absolute, or DuckDB would take a folder "~" for the user's home
    spilled = str(scratch.absolute())
    settings: dict[str, Any] = {"memory_limit": f"{memory}GB", "temp_directory": spilled}
    settings["preserve_insertion_order"] = False
    legal = f"s BETWEEN 0 AND {nodes - 1} AND d BETWEEN 0 AND {nodes - 1}"
    wrong = f"error(concat('got edge (', s, ', ', d, '), expected nodes 0 to {nodes - 1}'))"
    query = f"""
        WITH checked AS (SELECT s, CASE WHEN {legal} THEN d ELSE {wrong} END AS d FROM edges)
        SELECT d * {nodes} + s AS key FROM checked
        {"" if directed else f"UNION ALL SELECT s * {nodes} + d FROM checked"} ORDER BY key"""
    try:
        with ExitStack() as stack:
            connection = stack.enter_context(duckdb.connect(config=settings))
            if isinstance(edges, Path):
                _open_table(connection, stack.enter_context(edges.open("rb")))
            else:
                connection.register("given", {"s": edges[0], "d": edges[1]})
                connection.execute(
                    "CREATE TEMP VIEW edges AS SELECT s::BIGINT AS s, d::BIGINT AS d FROM given"
                )
            connection.execute(query)
            while len(rows := connection.fetch_df_chunk(512)):  # of 2,048 rows each
                yield rows["key"].to_numpy()
    except RuntimeError as error:  # DuckDB's Ctrl-C
        raise KeyboardInterrupt from error
    except duckdb.Error as error:
        # Then comes advice on DuckDB's own settings; a line that it shows may be the whole file
        why = " ".join(line[:LONGEST] for line in str(error).split("\n")[:3])
        where = edges if isinstance(edges, Path) else "edges"
        of_values = isinstance(error, duckdb.InvalidInputException)
        room = "" if of_values else f" (memory: {memory:g} GB)"
        raise ValueError(f"{where}: {why}{room}") from error


def _open_table(connection: Any, file: Any) -> None:
    """Make the two columns of a table, an open file, the view ``edges``.

    DuckDB guesses nothing: it would skip lines, and round numbers. Nor does it see the file's name,
    which it would take as a pattern, and the folders' as columns (``year=2020``).
    """
    path = Path(file.name)
    opened = f"/dev/fd/{file.fileno()}"
    table = f"read_parquet('{opened}')"
    if path.suffix == ".csv":
        options = (
            "auto_detect=false, delim=',', quote='\"', columns={'s': 'VARCHAR', 'd': 'VARCHAR'}"
        )
        first = f"SELECT s, d FROM read_csv('{opened}', {options}, header=false) LIMIT 2"
        rows = connection.execute(first).fetchall()
        has_names = bool(rows) and not any(map(_is_number, rows[0]))
        check(len(rows) > has_names, "edges", f"no rows in {path}", "one at least")
        table = f"read_csv('{opened}', {options}, header={has_names})"
        names = rows[0] if has_names else ()
    columns = connection.sql(f"SELECT * FROM {table}").columns
    if path.suffix == ".parquet":
        names = columns
    got = f"columns {', '.join(columns)} in {path}"
    check(len(columns) == 2, "edges", got, "two, source and destination")
    whole = (
        "CASE WHEN trim({0}::VARCHAR) SIMILAR TO '[0-9]+' THEN {0}::BIGINT "
        "ELSE error(concat('got node ', {0}, ', expected whole numbers from 0')) END"
    )
    ends = f"{whole.format('s')} AS s, {whole.format('d')} AS d"
    first_name, second_name = [str(name).strip().lower() for name in names] or ("", "")
    is_turned = first_name in TARGETS and second_name in SOURCES
    order = "d, s" if is_turned else "s, d"
    connection.execute(f"CREATE VIEW edges AS SELECT {ends} FROM {table} AS given ({order})")


def _is_number(text: str | None) -> bool:
    """True for what Python reads as a number."""
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def write_edges(keys: Iterable[Array], folder: Path, nodes: int, *, directed: bool) -> int:
    """Write ``source.npy`` and ``start.npy``, and return the number of edges."""
    start = np.zeros(nodes + 1, np.int64)
    last = -1
    dtype = np.dtype(np.int32 if nodes < 2**31 else np.int64)
    path = folder / "source.npy"
    bar = tqdm(desc="edges", unit_scale=True, disable=None)
    with writing(path), path.open("wb") as file, bar:
        write_header(file, dtype, (0,))
        for piece in keys:
            kept = piece if directed else piece[np.diff(piece, prepend=last) != 0]
            last = piece[-1]
            destination, source = np.divmod(kept, nodes)
            np.add.at(start, destination + 1, 1)
            write_numbers(file, source.astype(dtype, copy=False))
            bar.update(len(kept))
        num_edges = int(np.cumsum(start, out=start)[-1])
        file.seek(0)
        write_header(file, dtype, (num_edges,))
    write_npy(folder / "start.npy", start)
    return num_edges


def write_features(path: Path, x: Array, dtype: np.dtype[Any], where: str) -> None:
    """Write features in pieces, cast.

    Refuses NaN, infinity, or a number that is too large for the type; ``where`` names the file.
    """
    size = max(1, PIECE // x.shape[1])
    with writing(path), path.open("wb") as file:
        write_header(file, dtype, x.shape)
        for begin in trange(0, len(x), size, desc="x", disable=None):
            with np.errstate(over="ignore"):
                cast = x[begin : begin + size].astype(dtype)
            good = np.isfinite(cast).all(axis=1)
            row = begin + int(np.argmin(good))
            got = f"{np.abs(x[row]).max():g} in row {row}"
            check(good.all(), where, got, f"finite numbers up to {np.finfo(dtype).max:g}")
            write_numbers(file, cast)


def write_npy(path: Path, array: Array) -> None:
    """Write an array."""
    with writing(path), path.open("wb") as file:
        write_header(file, array.dtype, array.shape)
        write_numbers(file, array)


def write_numbers(file: Any, array: Array) -> None:
    """Write what stands behind a header.

    Numpy's ``tofile`` and ``save`` do not say that the last 4 kB found no room on the disk.
    """
    file.write(np.ascontiguousarray(array).data)


def write_header(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Write what a ``.npy`` file begins with: 128 bytes, however many rows there are."""
    npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    assert file.tell() == 128


def write_labels(files: dict[str, Path], split: dict[str, Array], folder: Path, nodes: int) -> int:
    """Write ``y.npy``, with -1 for NaN, and return the number of classes."""
    where = str(files["y"])
    below = CLASSES if "edges" in files else 2**31
    y = read_npy(files["y"])
    legal = f"({nodes},), a label for each row of x"
    check(y.shape in ((nodes,), (nodes, 1)), where, f"shape {y.shape}", legal)
    y = np.where(np.isnan(y), -1, y).reshape(-1)
    low = y.min()
    high = y.max()
    are_labels = low >= -1 and high < below and (y % 1 == 0).all()
    legal = f"whole numbers below {below}, and -1 or NaN for none"
    check(are_labels, where, f"{low:g} to {high:g}", legal)
    for part, ids in split.items():
        check((y[ids] >= 0).all(), where, f"a node of {part} without a label", "0 or more")
    write_npy(folder / "y.npy", y.astype(np.min_scalar_type(min(-1, -1 - int(high)))))
    return int(high) + 1


def described(path: Path) -> dict[str, Any]:
    """What ``graph.json`` says of an array."""
    array = np.load(path, mmap_mode="r")
    digest = hashlib.sha256(np.memmap(path, mode="r").data)
    return {
        "file": path.name,
        "dtype": str(array.dtype),
        "shape": [*array.shape],
        "sha256": digest.hexdigest(),
    }


main = program("convert", convert, __doc__)
