"""Readers: what is whole comes back, and what is broken is one error that names the file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from experiments.files import read_csv, read_json, read_npy, read_npz, read_tensors


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
    "a.pt": read_tensors,
    "a.safetensors": read_tensors,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.json").write_text('{"epochs": 3}')
    np.save(folder / "a.npy", ARRAY)
    np.savez_compressed(folder / "a.npz", x=ARRAY, y=np.arange(3))
    (folder / "a.csv").write_text("a,b\n1,2\n3,4\n")
    torch.save({"x": torch.tensor(ARRAY)}, folder / "a.pt")
    save_file({"x": torch.tensor(ARRAY)}, folder / "a.safetensors")
    return folder


def test_whole_files_come_back(whole: Path) -> None:
    assert read_json(whole / "a.json", Run) == Run(3)
    assert (read_npy(whole / "a.npy") == ARRAY).all()
    assert isinstance(read_npy(whole / "a.npy", memory_map=True), np.memmap)
    assert list(read_npz(whole / "a.npz")) == ["x", "y"]
    assert (read_npz(whole / "a.npz", ["x", "z"])["x"] == ARRAY).all()
    assert read_csv(whole / "a.csv").to_numpy().tolist() == [[1, 2], [3, 4]]
    for name in ("a.pt", "a.safetensors"):
        assert torch.equal(read_tensors(whole / name)["x"], torch.tensor(ARRAY))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_files_are_one_error(name: str, data: st.DataObject, whole: Path, tmp_path: Path) -> None:
    content = bytearray((whole / name).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        READERS[name](path)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{path}: is whole"
    assert said.startswith(f"{path}: ")
    assert "\n" not in said


@pytest.mark.parametrize("name", READERS)
def test_missing_files_are_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    "text",
    ['{"epochs": "3"}', '{"epochs": 3.0}', '{"epochs": true}', '{"epochs": 3, "lr": NaN}', '{"epochs": 3, "k": 1}'],
)
def test_json_is_strict(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json: cannot be read \((epochs|lr|k|a): got "):
        read_json(tmp_path / "a.json", Run)


def claim(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """An array of which the header claims more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize("content", [claim((2_000_000_000_000,)), claim(()), claim((2,), "|O"), claim((4,), "|V0")])
def test_what_is_merely_claimed_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=r"claims 16000000000000 bytes|expected rows of numbers"):
            READERS[name](tmp_path / name)


def test_other_compression_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", bytes(100))
    with pytest.raises(ValueError, match="x is encrypted or compressed"):
        read_npz(tmp_path / "a.npz")


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_csv(tmp_path / "a.csv")
