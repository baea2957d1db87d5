"""The throughput of mini-batches is measured as described."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch_geometric.utils import is_undirected

from experiments.throughput import UNTIMED, ThroughputConfig, figures, main, power_law_graph, turn


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "throughput.json"
    sizes = "--nodes 400 --edges 1200 --train-nodes 100 --batch-size 32 --batches 2 --steps 1 --turns 2 --fanout 3 2"
    main([*sizes.split(), "--json", str(path)])
    results = json.loads(path.read_text())
    loaders = ["sampler", "loader", "loader, 1 worker", "RandomNodeLoader"]
    assert list(results["variants"]) == [*loaders, "training", "training, 1 worker", "training, RandomNodeLoader"]
    assert results["batch"]["per_epoch"] == 4
    assert results["num_parts"] == round(400 / results["batch"]["nodes"])
    for name, variant in results["variants"].items():
        per_epoch = results["num_parts"] if "Random" in name else 4
        assert variant["epochs_per_second"] == pytest.approx(1 / (per_epoch * variant["batch_seconds"]))
        assert variant["seeds_per_second"] == pytest.approx(100 * variant["epochs_per_second"])
        assert 0 < variant["waiting"] < 1
    told = capsys.readouterr()
    assert f"RandomNodeLoader makes {results['num_parts']} parts" in told.out
    assert "turn 3 of 3: 00:0" in told.err
    assert multiprocessing.active_children() == []


def test_turn_times_waiting_apart_from_using(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used = [0.0], list[int]()

    def batches() -> Iterator[int]:
        for i in range(100):
            now[0] += 2.0
            yield i

    def use(batch: int) -> None:
        used.append(batch)
        now[0] += 3.0

    monkeypatch.setattr("experiments.throughput.time.perf_counter", lambda: now[0])
    assert turn(batches(), 4, use) == (5.0, 2.0 / 5.0)
    assert used == list(range(UNTIMED - 1, UNTIMED + 3))


def test_figures_are_medians() -> None:
    found = figures([(0.5, 0.5), (2.0, 0.25), (1.0, 0.1)], per_epoch=10, num_seeds=200)
    assert list(found.values()) == [1.0, 0.5, 2.0, 0.1, 20.0, 0.25]


def test_graph_is_undirected_with_hubs() -> None:
    config = ThroughputConfig(nodes=5_000, edges=30_000, train_nodes=1_000)
    data = power_law_graph(config)
    assert is_undirected(data.edge_index, num_nodes=5_000)
    assert 50_000 < data.num_edges <= 60_000  # parallel edges are merged
    assert int(data.train_mask.sum()) == 1_000
    degree = data.edge_index[1].bincount()
    assert degree.max() > 20 * degree.double().median()
    assert torch.equal(power_law_graph(config).edge_index, data.edge_index)
