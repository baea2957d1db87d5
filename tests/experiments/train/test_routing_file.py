"""A routing in a file, which a run replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gmoe
from experiments.train.build import build_model
from experiments.train.command import parse
from experiments.train.config import dense_of
from experiments.train.kinds import kind_of
from experiments.train.routing_stats import in_words
from experiments.train.run_folder import described
from tests.helpers.command import QUICK, refused

NODES = 1797


def test_each_node_goes_to_the_expert_of_the_file(tmp_path: Path) -> None:
    """In all layers, by --routing alone; another file is another run."""
    expert = np.random.default_rng(0).integers(0, 8, NODES)
    file = tmp_path / "routing.npy"
    np.save(file, expert)
    config = parse(["digits-graph", "--routing", str(file), "--layers", "3"])
    assert config.router == "oracle"
    task = kind_of(config).tasks()(0)
    model: Any = build_model(config, task)
    _, routings = model(*next(iter(task.loader("train", 1, None))).inputs, return_routing=True)
    for routing in routings:
        assert torch.equal(routing.to_dense().argmax(1), torch.from_numpy(expert))
    assert isinstance(
        next(one for one in model.modules() if isinstance(one, gmoe.Router)), gmoe.OracleRouter
    )
    layer = {"dead": [0.0], "coverage": [1.0], "ami_label": [0.9]}
    layer |= {"experts": [8.0], "max_over_mean_load": [1.0]}
    assert in_words([layer], config).endswith(f" times an even share); they follow {file}")
    assert dense_of(config).routing is None  # type: ignore[attr-defined]
    before = described(config)
    np.save(file, expert[::-1])
    assert described(config)["digest"] != before["digest"]


@pytest.mark.parametrize(
    ("expert", "options", "message"),
    [
        (np.zeros(5, int), (), "int64 of shape (5,), expected an expert for each of 1797 nodes"),
        (np.zeros(NODES), (), "float64 of shape (1797,), expected an expert for each"),
        (np.full(NODES, 8), (), "from 8 to 8, expected an expert for each of 1797 nodes, whole"),
        (np.zeros(NODES, int), ("--router", "random"), "routing: got "),
        (np.zeros(NODES, int), ("--sampling", "neighbor"), "expected router='oracle' on the whole"),
    ],
)
def test_what_is_no_routing_is_refused(
    expert: Any, options: tuple[str, ...], message: str, tmp_path: Path, capsys: Any
) -> None:
    np.save(tmp_path / "routing.npy", expert)
    args = ["digits-graph", *QUICK, "--routing", str(tmp_path / "routing.npy"), *options]
    assert message in refused([*args, "--out", str(tmp_path / "run")], capsys)
