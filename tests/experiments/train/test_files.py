"""Readers: what is whole comes back.

What is broken or merely claimed is one error that names the file.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

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
from experiments.train.results import write_json
from experiments.train.saved import read_options


@dataclass(frozen=True)
class Run:
    epochs: int
    lr: float = 0.1


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


def test_a_file_that_cannot_be_opened_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.npy"
    with pytest.raises(OSError, match=f"^[^:]*: '{path}'$"), writing(path):
        np.save(path, ARRAY)


def test_whole_files_come_back(tmp_path: Path) -> None:
    write_all(tmp_path)
    found: dict[str, Any] = {name: read(tmp_path / name) for name, read in READERS.items()}
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


@pytest.mark.parametrize("array", [np.array(1.0), np.array(["a"]), np.array([None])])
def test_arrays_of_other_than_numbers_are_refused(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(
            ValueError, match=rf"{name}: cannot be read \((x: )?(got|Object arrays)"
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


def test_what_a_long_file_is_said_to_hold_is_cut_off(tmp_path: Path) -> None:
    for name in ("router", "dataset", "start", "x"):
        content = {"dataset": "digits", name: "x" * 2**20}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            read_options(tmp_path / "config.json", tmp_path)
        assert len(str(caught.value)) < 1_000
    long = ValueError("x" * 2**20)
    with pytest.raises(ValueError, match=r"^a: cannot be read \(x{500}\)$"), naming(Path("a")):
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


def test_lists_of_numbers_are_written_on_one_line(tmp_path: Path) -> None:
    """Of all others, whatever they hold, each entry has its own."""
    path = tmp_path / "result.json"
    value = {
        "seeds": [0, -1],
        "values": [1e-05, 0.5, 2.5e20],
        "rows": [[1, 2], [3]],
        "text": "[\n1,\n2]",
        "kinds": ["1", "2"],
        "mixed": [1, None, True],
        "none": [],
    }
    write_json(path, value)
    text = path.read_text()
    assert json.loads(text) == value
    assert '"seeds": [0, -1],' in text
    assert '"values": [1e-05, 0.5, 2.5e+20],' in text
    assert "[1, 2],\n" in text
    assert text.count("\n") == 19
