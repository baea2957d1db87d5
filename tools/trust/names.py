"""Files of odd names are read, not what other programs would find under them.

A number is one thing that is read (:data:`SUBJECTS`) under an odd name in an oddly named folder.
Beside it lie decoys: whole files with other content, under the names that a program would go to
which takes the name for a pattern, an address, an escape, a home folder or a list. The reader must
find what it finds under a plain name. The only paths that may be refused are those to which no
checkpoint can be written.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import unquote

import numpy as np
import torch
from torch_geometric.data import Data

import gmoe
from experiments.convert.graph import convert
from experiments.convert.planted import write_planted
from experiments.show.report_page import write_report
from experiments.train.command import main as train
from experiments.train.config import GraphConfig, ImageConfig, MoleculeConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.ogb import load_ogb
from experiments.train.predictions import mean_of
from experiments.train.run_folder import read_run
from experiments.train.user_code import load_object
from tests.helpers.made_images import write_photo
from tests.helpers.molecule_data import write_set
from tests.helpers.stored_files import store
from tests.helpers.user_data import arrays, write_csv, write_npz, write_pt
from tools.trust.file_kinds import EDGES, QUICK, X, dense_model, hub_model, write_pairs
from tools.trust.fuzz import quiet
from tools.trust.numbers import parse

EVERY = 3_000
"""Numbers of a run without arguments; ten minutes of one core."""
TRUE, DECOY = 1, 0
"""Seeds of the content under the odd name, and of that under the names beside it."""
NODES = 50


@dataclass(frozen=True)
class Subject:
    """Something that is read by its path."""

    make: Callable[[Path, int], object]
    """Write it, a file or a folder, to a path, with the content of a seed."""
    read: Callable[[Path], Any]
    """Read it as a user's call or command does; returns what tells seeds apart."""
    suffix: str = ""


# What is read ------------------------------------------------------------------------------------


def moved(write: Callable[..., Path], path: Path, seed: int) -> None:
    """A graph of the user's own, which is written as ``mine``."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.move(write(Path(folder), arrays(seed=seed)), path)


def read_own(path: Path) -> Any:
    graph: Any = load_tasks(GraphConfig(dataset="graph", data_root=path))(0).graph
    return graph.x.tolist()


def make_edges(path: Path, seed: int) -> None:
    write_pairs(path, np.random.default_rng(seed), NODES)


def make_numbers(path: Path, seed: int) -> None:
    np.save(path, np.random.default_rng(seed).normal(size=(NODES, 4)))


def make_rows(path: Path, seed: int) -> None:
    rows = np.random.default_rng(seed).permutation(NODES)[:9]
    path.write_text("".join(f"{row}\n" for row in rows))


def read_converted(option: str, path: Path) -> Any:
    """What a conversion writes, of which one file has the odd name, and the folder, too."""
    with tempfile.TemporaryDirectory() as folder:
        plain = {"edges": Path(folder, "edges.csv"), "x": Path(folder, "x.npy")}
        make_edges(plain["edges"], 2)
        make_numbers(plain["x"], 2)
        files: dict[str, Any] = plain | {option: path}
        out = Path(f"{path}.out".replace("\\", ""))  # which is refused of this folder
        convert(str(files.pop("edges")), out, memory=0.2, **files)
        found = read_stored(out)
        shutil.rmtree(out)
        return found


def read_features(path: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        data = write_npz(Path(folder), arrays(seed=2))
        config = GraphConfig(dataset="digits-graph", data_root=data, features=str(path))
        graph: Any = load_tasks(config)(0).graph
        return graph.x.tolist()


def make_features(path: Path, seed: int) -> None:
    np.save(path, np.random.default_rng(seed).normal(size=(1797, 2)))


def make_stored(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(NODES, (2, 90), generator=generator)
    store(path, Data(x=torch.randn(NODES, 3, generator=generator), edge_index=edges))


def read_stored(path: Path) -> Any:
    graph = gmoe.StoredGraph(path)
    graph.verify()
    arrays = [graph.start, graph.source, graph.rows("x", torch.arange(NODES)), graph.train]
    return [None if array is None else array.tolist() for array in arrays]


def make_images(path: Path, seed: int) -> None:
    """Names of classes and of images are odd, too."""
    classes, names = ("a[1]", "a%31", "a*"), ("*", "?", "[0-9]", "{0,1}", "a=1", "\\0", "%30", "::")
    for number, (part, name, file) in enumerate(product(("train", "test"), classes, names)):
        write_photo(path / part / name / f"{file}.png", (8, 8), seed=100 * seed + number)


def read_images(path: Path) -> Any:
    config = ImageConfig(dataset="images", data_root=path, offline=True)
    batches = list(load_tasks(config)(0).loader("test", 8, None))
    return [batch.inputs[0].tolist() for batch in batches]


def make_data(path: Path, seed: int) -> None:
    path.mkdir()
    write_npz(path, arrays(seed=seed))


def train_in(path: Path) -> Any:
    """Train in a folder that holds the data, and draw the page there."""
    args = ["graph", "--data-root", str(path / "mine.npz"), "--epochs", "1", "--seeds", "0", *QUICK]
    train([*args, "--conv", "sage", "--out", str(path / "run")])
    assert write_report([path / "run"], path / "page" / "index.html", None) == []
    return weights_of(path / "run", path / "mine.npz")


def make_run(path: Path, seed: int) -> None:
    make_data(path, seed)
    train_in(path)


def weights_of(run: Path, data: Path) -> Any:
    found = read_run(run, data)
    return [value.tolist() for value in found.load_model(found.load_task()).parameters()]


def read_hub(path: Path) -> Any:
    model: Any = gmoe.GNNMoE.from_pretrained(path)
    return model(X, EDGES).tolist()


def make_hub(path: Path, seed: int) -> None:
    model = hub_model()
    torch.nn.init.constant_(next(model.parameters()), seed)
    model.save_pretrained(path)


def make_moefied(path: Path, seed: int) -> None:
    model = dense_model()
    torch.nn.init.constant_(next(model.parameters()), seed)
    gmoe.save(gmoe.moefy(model, num_experts=2), path, (X, EDGES))


def read_moefied(path: Path) -> Any:
    return gmoe.load(path, dense_model())(X, EDGES).tolist()


def make_code(path: Path, seed: int) -> None:
    path.write_text(f"made = {seed}\n")


def make_predictions(path: Path, seed: int) -> None:
    from safetensors.torch import save_file

    save_file({"probability": torch.full((4, 2), float(seed))}, path)


def make_ogb(path: Path, seed: int) -> None:
    write_planted("ogbn-arxiv", path, 200, 600, 7, seed=seed)


def read_ogb(path: Path) -> Any:
    return load_ogb("ogbn-arxiv", path, offline=True).data.edge_index.tolist()


def make_molecules(path: Path, seed: int) -> None:
    write_set(path, seed=seed)


def read_molecules(path: Path) -> Any:
    config = MoleculeConfig(dataset="ogbg-molhiv", data_root=path, offline=True)
    batch = next(iter(load_tasks(config)(0).loader("train", 8, None)))
    return batch.inputs[0].tolist()


SUBJECTS: dict[str, Subject] = {
    "edges .csv": Subject(make_edges, partial(read_converted, "edges"), ".csv"),
    "edges .parquet": Subject(make_edges, partial(read_converted, "edges"), ".parquet"),
    "edges .npy": Subject(make_edges, partial(read_converted, "edges"), ".npy"),
    "x of edges": Subject(make_numbers, partial(read_converted, "x"), ".npy"),
    "train of edges": Subject(make_rows, partial(read_converted, "train"), ".csv"),
    "npz": Subject(partial(moved, write_npz), read_own, ".npz"),
    "pt": Subject(partial(moved, write_pt), read_own, ".pt"),
    "csv": Subject(partial(moved, write_csv), read_own),
    "features": Subject(make_features, read_features, ".npy"),
    "stored graph": Subject(make_stored, read_stored),
    "images": Subject(make_images, read_images),
    "run": Subject(make_run, lambda path: weights_of(path / "run", path / "mine.npz")),
    "run, trained": Subject(make_data, train_in),
    "hub, GNN": Subject(make_hub, read_hub),
    "moefied": Subject(make_moefied, read_moefied),
    "code": Subject(make_code, lambda path: load_object("router", f"{path}:made"), ".py"),
    "predictions": Subject(make_predictions, lambda path: mean_of([path]).tolist(), ".safetensors"),
    "OGB": Subject(make_ogb, read_ogb),
    "molecules": Subject(make_molecules, read_molecules),
}

EXPANDED = ("OGB", "molecules")
"""What goes to the home folder for ``~``, as the shell does."""


# Names -------------------------------------------------------------------------------------------

ODD = (
    *("[1]", "[!a]", "[a-c]", "[", "]", "*", "?", "**", "{a,b}", "{1..3}", "%31", "%2e", "%"),
    *("\\1", "\\", "'", '"', "`", " ", "\t", "\n", "#1", "&", ";1", ",1", "|", "$HOME", "${HOME}"),
    *("::", "s3:", "file:", "md:", "http:", "a=1", "e\N{COMBINING ACUTE ACCENT}", "é", "İ", "-"),
    *("--out", "!", "^", "(1)", "@", "+", ".", "~", "\u202e", "K", "ß"),
)
"""What odd names are made of."""


def odd_name(drawn: random.Random) -> str:
    """A name of one to three odd parts and plain ones between them."""
    parts = [drawn.choice(ODD) for _ in range(drawn.choice([1, 1, 2, 3]))]
    plain = [drawn.choice(["", "", "e", "1", "x"]) for _ in parts]
    name = "".join(a + b for a, b in zip(plain, parts, strict=True)) + drawn.choice(["", "e"])
    return "e" if name in (".", "..") else name


def expanded(name: str) -> str:
    """What a shell makes of braces, the first of each."""
    return re.sub(r"\{(\w)[^}]*\}", r"\1", name)


READINGS: tuple[Callable[[str], str], ...] = (
    lambda name: re.sub(r"\[!?(\w)[^\]]*\]", r"\1", name),
    lambda name: re.sub(r"\[![^\]]*\]", "x", name),
    lambda name: re.sub(r"\*+|\?", "", name),
    lambda name: re.sub(r"\*+|\?", "x", name),
    expanded,
    unquote,
    lambda name: re.sub(r"\\(.)", r"\1", name),
    lambda name: re.sub(r"['\"`]", "", name),
    str.strip,
    str.lower,
    str.upper,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: unicodedata.normalize("NFKC", name),
    lambda name: re.split(r"[#?&;,|\n]", name)[0],
    lambda name: name.split("::")[-1],
    lambda name: re.sub(r"^(s3|file|md|http):", "", name),
    lambda name: re.sub(r"\$\{?HOME\}?", "", name),
    lambda name: re.sub(r"\w=", "", name),
    lambda name: name.lstrip("-~."),
)
"""What other programs make of a name."""


def decoys(name: str) -> list[str]:
    """The names that other programs would go to instead of this one."""
    found = dict.fromkeys(reading(name) for reading in READINGS)
    return [one for one in found if one not in ("", ".", "..", name) and "/" not in one]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Relative paths are of this folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Cases -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a number draws."""

    subject: str
    folder: str
    name: str  # with its suffix
    is_absolute: bool


def draw(number: int, subjects: Iterable[str] = tuple(SUBJECTS)) -> Case:
    drawn = random.Random(number)
    subject = drawn.choice(list(subjects))
    alone = drawn.choice(ODD)  # what means something as a whole, such as "~"
    folder = drawn.choice([odd_name(drawn), "folder", "folder" if alone == "." else alone])
    name = odd_name(drawn) + SUBJECTS[subject].suffix
    is_absolute = drawn.random() < 0.3 or (subject in EXPANDED and folder == "~")
    is_absolute |= folder.startswith("-")  # or it is an option
    return Case(subject, folder, name, is_absolute)


@dataclass(frozen=True)
class Workshop:
    """A folder of whole contents, made once, and of one case at a time."""

    base: Path
    made: dict[tuple[str, int], tuple[Path, Any]] = field(default_factory=dict)

    def whole(self, subject: str, seed: int) -> tuple[Path, Any]:
        """The content of a seed under a plain name, and what is read there."""
        if (subject, seed) not in self.made:
            self.made[subject, seed] = self.make(subject, seed)
        return self.made[subject, seed]

    def make(self, subject: str, seed: int) -> tuple[Path, Any]:
        """Make and read it; a reader may write beside the content, so that a copy is kept."""
        path = (
            self.base / f"whole-{len(list(self.base.iterdir()))}" / f"it{SUBJECTS[subject].suffix}"
        )
        path.parent.mkdir()
        with quiet(self.base / "said"):
            SUBJECTS[subject].make(path, seed)
            kept = path.with_name("kept") / path.name
            shutil.copytree(path.parent, kept.parent)
            return kept, SUBJECTS[subject].read(path)

    def put(self, path: Path, subject: str, seed: int) -> None:
        """A copy of the content of a seed, where nothing is yet."""
        whole, _ = self.whole(subject, seed)
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)

    def outcome(self, case: Case) -> str:
        """``"read"``, ``"refused: why"`` or ``"failed: how"``."""
        found, expected = (self.whole(case.subject, seed)[1] for seed in (DECOY, TRUE))
        assert found != expected, f"{case.subject}: a decoy has the same content"
        input_, home = self.base / "input", self.base / "home"
        for place in (input_, home):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        suffix = SUBJECTS[case.subject].suffix
        stem = case.name.removesuffix(suffix)
        self.put(input_ / case.folder / case.name, case.subject, TRUE)
        for folder in (case.folder, *decoys(case.folder)):
            for name in (case.name, *(f"{name}{suffix}" for name in decoys(stem))):
                self.put(input_ / folder / name, case.subject, DECOY)
        self.put(home / case.name, case.subject, DECOY)  # of the folder "~"
        path = Path(case.folder, case.name)
        try:
            with (
                working_in(input_),
                mock.patch.dict(os.environ, {"HOME": str(home)}),
                quiet(self.base / "said"),
            ):
                found = SUBJECTS[case.subject].read(input_ / path if case.is_absolute else path)
        except SystemExit:
            return f"refused: {(self.base / 'said').read_text().splitlines()[-1]}"
        except (ValueError, OSError) as error:
            return f"refused: {error}"
        except Exception as error:
            return f"failed: {type(error).__name__}: {error}"
        return "read" if found == expected else "failed: read something else"


def run(
    numbers: Iterable[int], subjects: Iterable[str] = tuple(SUBJECTS)
) -> Iterator[tuple[int, Case, str]]:
    """Each number with its case, and what became of it."""
    with tempfile.TemporaryDirectory(prefix="names-") as base:
        shop = Workshop(Path(base))
        for number in numbers:
            case = draw(number, subjects)
            yield number, case, shop.outcome(case)


def is_wrong(case: Case, found: str) -> bool:
    """All is read but a run whose path fsspec would take for several."""
    if case.subject == "run, trained" and "::" in f"{case.folder}{case.name}":
        return "expected a path without '::', which fsspec takes" not in found
    return found != "read"


def main(arguments: Sequence[str]) -> int:
    """Print what is not read, and a count; 1 if some case is wrong."""
    torch.set_num_threads(1)
    given = parse("names", __doc__, EVERY, SUBJECTS, arguments)
    counts = Counter[tuple[str, str]]()
    failures = list[int]()
    for number, case, found in run(given.numbers, given.only or tuple(SUBJECTS)):
        kind = found.partition(":")[0]
        counts[case.subject, kind] += 1
        if kind != "read" or given.is_alone:
            print(f"{number} {case}: {found}", flush=True)
        failures += [number] if is_wrong(case, found) else []
    for (subject, kind), count in sorted(counts.items()):
        print(f"{subject:16} {kind:8} {count:5}")
    print(f"{counts.total()} names; failed: {failures or 'none'}")
    return int(bool(failures))
