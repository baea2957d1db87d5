"""Tiny planted OGB sets, their files, and a watch over what loading them does."""

from __future__ import annotations

import builtins
import gzip
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from experiments.data.ogb_layout import OGBName
from experiments.planted_ogb import write_planted

NAMES: tuple[OGBName, ...] = get_args(OGBName)
NODES, EDGES, FEATURES, CLASSES = 200, 600, 4, 7


def plant(root: Path) -> Path:
    """All four sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, FEATURES, 112 if name == "ogbn-proteins" else CLASSES)
    return root


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fail where a question is asked or torch.load is unsafe; gives the names of the files that torch.load reads."""
    read: list[str] = []
    load = torch.load

    def ask(*args: Any) -> str:
        raise AssertionError("input() was called")

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("weights_only", True) is True
        read.append(Path(file).name)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(torch, "load", watched)
    return read


def numbers(path: Path) -> NDArray[np.float64]:
    """A compressed table."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", ndmin=2)


def write(path: Path, content: str | NDArray[Any]) -> None:
    """Text or a table, compressed."""
    with gzip.open(path, "wt") as file:
        if isinstance(content, str):
            file.write(content)
        else:
            np.savetxt(file, content, fmt="%.6g", delimiter=",")


def truncate(path: Path) -> None:
    """Leave the first half."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def assert_same(a: Any, b: Any) -> None:
    """Two graphs, or two splits."""
    first, second = (value if isinstance(value, dict) else value.to_dict() for value in (a, b))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
