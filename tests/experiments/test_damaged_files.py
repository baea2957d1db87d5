"""Files with damaged bytes: each reader names the file, or reads it; nothing else happens.

One property a reader: some bytes of one of its files are overwritten, or its end is cut off.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch_geometric.nn import GCN

import gmoe
from experiments.train.command import main as train
from experiments.train.data.own_graph import own_graph
from experiments.train.run_folder import read_run

NODES = 12


def model_of_gmoe(folder: Path) -> Callable[[Path], object]:
    gmoe.save(gmoe.GNNMoE(4, 4, 2, num_experts=2), folder)
    return gmoe.load


def moefied_model(folder: Path) -> Callable[[Path], object]:
    gmoe.save(gmoe.moefy(GCN(4, 4, 2), num_experts=2), folder)
    return lambda path: gmoe.load(path, base=GCN(4, 4, 2))


def graph_in_npz(folder: Path) -> Callable[[Path], object]:
    rng = np.random.default_rng(0)
    folder.mkdir()
    np.savez(
        folder / "graph.npz",
        x=rng.normal(size=(NODES, 3)).astype(np.float32),
        y=np.arange(NODES) % 2,
        edge_index=rng.integers(NODES, size=(2, 30)),
    )
    return lambda path: own_graph(path / "graph.npz")


def graph_in_pt(folder: Path) -> Callable[[Path], object]:
    from torch_geometric.data import Data

    folder.mkdir()
    y = torch.arange(NODES) % 2
    data = Data(x=torch.randn(NODES, 3), y=y, edge_index=torch.randint(NODES, (2, 30)))
    torch.save(data, folder / "graph.pt")
    return lambda path: own_graph(path / "graph.pt")


def graph_in_csv(folder: Path) -> Callable[[Path], object]:
    folder.mkdir()
    nodes = [f"n{node},{node / 7},{'ab'[node % 2]}" for node in range(NODES)]
    edges = [f"n{node},n{(node + 1) % NODES}" for node in range(NODES)]
    (folder / "nodes.csv").write_text("\n".join(["id,size,label", *nodes]) + "\n")
    (folder / "edges.csv").write_text("\n".join(["source,target", *edges]) + "\n")
    return own_graph


def run_folder(folder: Path) -> Callable[[Path], object]:
    train(["digits-graph", "--epochs", "1", "--seeds", "0", "--out", str(folder)])
    return read_run


def image_folder(folder: Path) -> Callable[[Path], object]:
    from experiments.train.config import ImageConfig
    from experiments.train.kinds import kind_of
    from experiments.train.presets import PRESETS

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(256, size=(12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    preset: Any = PRESETS["images"][1]
    assert isinstance(preset, ImageConfig)

    def read(path: Path) -> object:
        return kind_of(preset.__class__(**{**vars(preset), "data_root": path})).tasks()(0)

    return read


READERS = {
    "GNNMoE": model_of_gmoe,
    "moefied": moefied_model,
    "npz": graph_in_npz,
    "pt": graph_in_pt,
    "csv": graph_in_csv,
    "run": run_folder,
    "images": image_folder,
}


@pytest.fixture(scope="module", params=READERS)
def whole(request: Any, tmp_path_factory: Any) -> tuple[Path, Callable[[Path], object]]:
    """A folder that a reader reads, and the reader."""
    folder: Path = tmp_path_factory.mktemp("whole") / "folder"
    read = READERS[request.param](folder)
    read(folder)
    return folder, read


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_damaged_bytes_are_named_or_read(whole: Any, tmp_path_factory: Any, draw: Any) -> None:
    folder, read = whole
    damaged = tmp_path_factory.mktemp("damaged") / "folder"
    shutil.copytree(folder, damaged)
    files = sorted(path for path in damaged.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.draw(st.sampled_from(files), "file")
    content = bytearray(path.read_bytes())
    place = draw.draw(st.integers(0, len(content) - 1), "place")
    if draw.draw(st.booleans(), "cut off"):
        content = content[:place]
    else:
        bytes_there = draw.draw(st.binary(min_size=1, max_size=8), "bytes")
        content[place : place + len(bytes_there)] = bytes_there
    path.write_bytes(content)
    said = ""
    try:
        read(damaged)
    except (ValueError, OSError) as error:
        said = str(error)
    assert not said or str(damaged) in said or path.name in said
    shutil.rmtree(damaged)
