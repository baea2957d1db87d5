"""Readers: what is whole comes back.

What is broken or merely claimed is one error that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from safetensors.torch import save, save_file

from experiments.show.report_page import Page
from experiments.train.checkpoint import Checkpoint
from experiments.train.data.own_graph import own_graph
from experiments.train.files import (
    load_weights,
    naming,
    read_csv,
    read_json,
    read_npy,
    read_npz,
    read_pickle,
    read_tensors,
    writing,
)
from experiments.train.logs import Log
from experiments.train.results import write_json
from experiments.train.saved import read_options
from tests.helpers.command import full_disk
from tests.helpers.made_images import write_images
from tests.helpers.pyg_data import load, write_raw
from tests.helpers.user_data import FORMS
from vision.data import load_images


@dataclass(frozen=True)
class Run:
    epochs: int
    lr: float = 0.1


CPU = Fabric(accelerator="cpu", devices=1)
ARRAY = np.arange(6.0).reshape(2, 3)
READERS: dict[str, Callable[[Path], Any]] = {
    "a.json": lambda path: read_json(path, Run),
    "a.npy": read_npy,
    "a.npz": read_npz,
    "a.csv": read_csv,
    "a.pickle": read_pickle,
    "a.pt": read_tensors,
}


def write_all(folder: Path) -> None:
    """A whole file of each kind."""
    (folder / "a.json").write_text('{"epochs": 3}')
    np.save(folder / "a.npy", ARRAY)
    np.savez_compressed(folder / "a.npz", x=ARRAY, y=np.arange(3))
    (folder / "a.csv").write_text("a,b\n1,2\n3,4\n")
    (folder / "a.pickle").write_bytes(pickle.dumps(ARRAY, protocol=2))
    torch.save({"x": torch.tensor(ARRAY)}, folder / "a.pt")


def read_all(folder: Path) -> dict[str, Any]:
    return {name: read(folder / name) for name, read in READERS.items()}


RAW = ("citeseer", "amazon-photo", "wikics", "roman-empire", "actor")
FOLDERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "files": (write_all, read_all),
    **{name: (partial(write_raw, name), partial(load, name)) for name in RAW},
    **{
        form: (write, lambda root: own_graph(next(root.iterdir()))) for form, write in FORMS.items()
    },
    "images": (partial(write_images, train=2, test=1), partial(load_images, "images")),
}
"""Of each layout, what writes it in a folder and what reads it."""


@pytest.mark.parametrize("layout", FOLDERS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_broken_file_is_one_error(layout: str, data: st.DataObject, tmp_path: Path) -> None:
    write, read = FOLDERS[layout]
    if not any(tmp_path.iterdir()):
        write(tmp_path)
    path = data.draw(
        st.sampled_from(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    )
    whole = path.read_bytes()
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        read(tmp_path)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{tmp_path}: is whole"
    path.write_bytes(whole)
    assert str(tmp_path) in said
    assert "\n" not in said


LARGE = np.random.default_rng(0).random((500, 4))
STATE = {"best": {"weight": torch.tensor(LARGE)}}
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: write_json(path, LARGE.tolist()),
    "a.csv": lambda path: Log(path, keep=0).write([{"loss": loss} for loss in LARGE[:, 0]]),
    "a.html": Page(["<p>"] * 1_000).write,
    "state.ckpt": lambda path: Checkpoint(CPU, path.parent, lambda: STATE).save(),
    "best.safetensors": lambda path: Checkpoint(CPU, path.parent, lambda: STATE).save(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    if name == "best.safetensors":  # which is written after the state
        monkeypatch.setattr(CPU, "save", lambda *_: None)
    with full_disk(), pytest.raises(OSError, match=rf"^{tmp_path / name}: cannot be written \("):
        WRITERS[name](tmp_path / name)


def test_a_file_that_cannot_be_opened_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.npy"
    with pytest.raises(OSError, match=f"^[^:]*: '{path}'$"), writing(path):
        np.save(path, LARGE)


def test_whole_files_come_back(tmp_path: Path) -> None:
    write_all(tmp_path)
    found = read_all(tmp_path)
    assert found["a.json"] == Run(3)
    assert (found["a.npy"] == ARRAY).all()
    assert (found["a.pickle"] == ARRAY).all()
    assert list(found["a.npz"]) == ["x", "y"]
    assert list(read_npz(tmp_path / "a.npz", ["x", "z"])) == ["x"]
    assert found["a.csv"].to_numpy().tolist() == [[1, 2], [3, 4]]
    assert torch.equal(found["a.pt"]["x"], torch.tensor(ARRAY))


@pytest.mark.parametrize("name", READERS)
def test_missing_files_are_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        READERS[name](tmp_path / name)


def claim(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """An array of which the header claims more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"shape": shape, "fortran_order": False, "descr": dtype}
    )
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize(
    "content", [claim((2_000_000_000_000,)), claim(()), claim((2,), "|O"), claim((4,), "|V0")]
)
def test_what_is_merely_claimed_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(
            ValueError, match=r"claims 16000000000000 bytes|expected rows of numbers"
        ):
            READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(
            ("a.json", f'{{"epochs": {value}}}', "epochs: got ")
            for value in ('"3"', "3.0", "true", "NaN")
        ),
        ("a.json", '{"epochs": 3, "k": 1}', "k: got 1"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.csv", "a,b\n1,2,3\n", "or more fields in a row than in the header"),
    ],
)
def test_text_is_read_strictly(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \(.*{message}"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("cell", [b"1,", b",", b"a", b'"', b"id,"])
def test_a_line_of_megabytes_is_refused_at_once_and_not_repeated(
    cell: bytes, name: str, tmp_path: Path
) -> None:
    """pandas alone takes minutes for a million columns."""
    content, begin = cell * (1 << 20), time.process_time()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \(") as caught:
        read_csv(tmp_path / name)
    assert len(str(caught.value)) < 1_000
    assert time.process_time() - begin < 5


def test_what_a_long_file_is_said_to_hold_is_cut_off(tmp_path: Path) -> None:
    for name in ("router", "dataset", "start", "x"):
        content = {"dataset": "digits", name: "x" * 2**20}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            read_options(tmp_path / "config.json", tmp_path)
        assert len(str(caught.value)) < 1_000
    long = ValueError("x" * 2**20)
    with pytest.raises(ValueError, match=r"^a: cannot be read \(x{500} …\)$"), naming(Path("a")):
        raise long


def test_weights_that_do_not_fit_name_the_file(tmp_path: Path) -> None:
    """In one line, though torch says it in several."""
    path, layer = tmp_path / "best.safetensors", torch.nn.Linear(2, 3)
    save_file(layer.state_dict(), path)
    load_weights(torch.nn.Linear(2, 3), path)
    for content in (save({"weight": layer.weight.detach()}), b"", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: cannot be read \([^\n]+\)$"):
            load_weights(layer, path)


def test_other_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", bytes(100))
    with pytest.raises(ValueError, match="x is encrypted or compressed"):
        read_npz(tmp_path / "a.npz")


def test_a_table_in_a_folder_called_home_is_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, text in (("home", "a\n1\n"), ("here/~", "a\n2\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mine.csv").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert read_csv(Path("~/mine.csv"))["a"].tolist() == [2]
