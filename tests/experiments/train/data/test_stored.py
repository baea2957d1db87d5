"""Training on a graph that stays on disk: batches are the graph's, what needs memory is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from experiments.train.config import PAPERS, RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.on_disk import STORED
from experiments.train.presets import PRESETS
from tests.helpers.command import quick, refused
from tests.helpers.converted import run
from tests.helpers.ogb_data import plant_papers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("papers")
    plant_papers(root, nodes=20_000, edges=130_000)
    return root


def config_of(root: Path, **change: Any) -> RunConfig:
    return replace(PRESETS[PAPERS][1], data_root=root, **change)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_training_node_once(root: Path, workers: int, capsys: Any) -> None:
    assert get_worker_info() is None
    task: Any = load_tasks(config_of(root, workers=workers))(0)
    assert "a planted graph, not OGB's" in capsys.readouterr().out
    y = np.load(root / STORED / "y.npy")
    seen = torch.cat([batch.target for batch in task.loader("train", 300, 1)])
    assert sorted(seen.tolist()) == sorted(y[task.split["train"].numpy()].tolist())
    one, other = (
        [batch.target.tolist() for batch in task.loader("train", 300, seed)] for seed in (1, 2)
    )
    assert one != other


def test_what_needs_memory_is_refused_by_name(root: Path) -> None:
    for name, got in (("sampling", "full"), ("evaluation", "layerwise"), ("undirected", False)):
        with pytest.raises(ValueError, match=f"{name}: got {got!r} for .*, expected "):
            load_tasks(config_of(root, **{name: got}))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder converted from arrays: a class a third, which features tell."""
    rng, nodes = np.random.default_rng(0), 300
    y = np.arange(nodes) % 3
    edges, x = (
        rng.integers(nodes, size=(2, 900)),
        rng.standard_normal((nodes, 3)) + 4 * np.eye(3)[y],
    )
    parts: Any = dict(
        zip(("train", "val", "test"), np.split(rng.permutation(nodes), [180, 240]), strict=True)
    )
    return run(tmp_path, edges, x=x, y=y, **parts, directed=True)


def test_the_preset_graph_takes_a_folder_of_ones_own(own: Path, tmp_path: Path) -> None:
    """What it allows is the default: nothing is said of sampling, evaluation and direction."""
    args = ("--data-root", str(own), "--fanout", "5", "5", "--lr", "0.05", "--batch-size", "60")
    summary = quick(tmp_path / "run", *args, preset="graph")
    assert summary["test"]["mean"] > 0.6
    found = {name: summary["config"][name] for name in ("sampling", "evaluation", "undirected")}
    assert found == {"sampling": "neighbor", "evaluation": "sampled", "undirected": False}


def test_another_sampling_or_evaluation_is_refused_by_name(own: Path, capsys: Any) -> None:
    command = ["graph", "--data-root", str(own), "--sampling", "neighbor"]
    error = refused([*command, "--evaluation", "full"], capsys)
    assert f"evaluation: got 'full' for {own}, expected 'sampled'" in error
    error = refused([*command, f"--data_root={own}", "--sampling", "full"], capsys)
    assert f"sampling: got 'full' for {own}, expected 'neighbor'" in error


def test_what_a_folder_lacks_or_has_wrong_is_named(own: Path) -> None:
    how: Any = {
        "data_root": own,
        "sampling": "neighbor",
        "evaluation": "sampled",
        "undirected": False,
    }
    config = replace(PRESETS["graph"][1], **how)
    for name, bad in (("source", 300), ("source", -1), ("train", 300), ("test", -7)):
        ids = np.load(own / f"{name}.npy", mmap_mode="r+")
        ids[1], before = bad, int(ids[1])
        ids.flush()
        with pytest.raises(
            ValueError, match=rf"{name}.npy: got nodes .*{bad}.*, expected 0 to 299"
        ):
            load_tasks(config)
        ids[1] = before
        ids.flush()
    load_tasks(config)
    said = json.loads((own / "graph.json").read_text())
    for change in ({"num_classes": 2**40}, {"num_classes": None}, {"source": 3}, {"name": None}):
        (own / "graph.json").write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=rf"graph\.json: got {next(iter(change))}="):
            load_tasks(config)
    (own / "graph.json").write_text(json.dumps(said | {"num_classes": 2}))
    with pytest.raises(
        ValueError, match=r"y\.npy: got labels of train from 0 to 2, expected 0 to 1"
    ):
        load_tasks(config)
    del said["arrays"]["y"], said["arrays"]["val"]
    (own / "graph.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"data_root: got no y, val in .*; convert again"):
        load_tasks(config)
