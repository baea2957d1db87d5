"""The throughput of mini-batches is measured as described."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_geometric.utils import is_undirected

from experiments.throughput import UNTIMED, ThroughputConfig, Turn, figures, main, power_law_graph, turn

VARIANTS = ["sampler", "loader", "loader, 1 worker", "RandomNodeLoader"]
TRAINING = ["training", "training, 1 worker", "training, RandomNodeLoader"]


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "throughput.json"
    sizes = {"nodes": 400, "edges": 1_200, "features": 4, "classes": 3, "train-nodes": 100, "batch-size": 32}
    lengths = {"hidden": 8, "experts": 2, "batches": 2, "steps": 1, "turns": 2}
    args = [text for name, value in {**sizes, **lengths}.items() for text in (f"--{name}", str(value))]
    main([*args, "--fanout", "3", "2", "--json", str(path)])
    results = json.loads(path.read_text())
    assert list(results["variants"]) == VARIANTS + TRAINING
    assert results["config"]["fanout"] == [3, 2]
    assert results["batch"]["per_epoch"] == 4
    assert results["num_parts"] == round(400 / results["batch"]["nodes"])
    for name, variant in results["variants"].items():
        per_epoch = results["num_parts"] if "Random" in name else 4
        assert 0 < variant["batch_seconds_min"] <= variant["batch_seconds"] <= variant["batch_seconds_max"]
        assert variant["epochs_per_second"] == pytest.approx(1 / (per_epoch * variant["batch_seconds"]))
        assert variant["seeds_per_second"] == pytest.approx(100 * variant["epochs_per_second"])
        assert 0 < variant["waiting"] < 1
    assert {"torch", "torch-geometric"} <= set(results["environment"]["versions"])
    assert results["environment"]["threads"] == torch.get_num_threads()
    assert f"RandomNodeLoader makes {results['num_parts']} parts" in " ".join(capsys.readouterr().out.split())
    assert multiprocessing.active_children() == []


def test_turn_times_waiting_apart_from_using(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def batches() -> Iterator[int]:
        for i in range(100):
            pass_time(2.0)
            yield i

    used: list[int] = []

    def use(batch: int) -> None:
        used.append(batch)
        pass_time(3.0)

    monkeypatch.setattr("experiments.throughput.time.perf_counter", lambda: now[0])
    assert turn(batches(), 4, use) == Turn(seconds=4 * 5.0, waited=4 * 2.0, batches=4)
    assert used == list(range(UNTIMED - 1, UNTIMED + 3))


def test_figures_are_medians() -> None:
    turns = [Turn(2.0, 1.0, 4), Turn(8.0, 2.0, 4), Turn(4.0, 0.4, 4)]
    assert figures(turns, per_epoch=10, num_seeds=200) == {
        "batch_seconds": 1.0,
        "batch_seconds_min": 0.5,
        "batch_seconds_max": 2.0,
        "epochs_per_second": 0.1,
        "seeds_per_second": 20.0,
        "waiting": 0.25,
    }


def test_graph_is_undirected_with_hubs() -> None:
    config = ThroughputConfig(nodes=5_000, edges=30_000, train_nodes=1_000, features=3)
    data = power_law_graph(config)
    assert is_undirected(data.edge_index, num_nodes=5_000)
    assert 50_000 < data.num_edges <= 60_000  # parallel edges are merged
    assert int(data.train_mask.sum()) == 1_000
    degree = data.edge_index[1].bincount()
    assert degree.max() > 20 * degree.double().median()
    assert torch.equal(power_law_graph(config).edge_index, data.edge_index)
