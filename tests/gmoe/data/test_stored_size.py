"""A stored graph of some million edges: memory while it is sampled and inferred."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gmoe import GNNMoE, StoredGraph, neighbor_loader
from tests.gmoe.data.stored_files import write

NODES, DEGREE, WIDTH = 500_000, 16, 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 M edges, in-degrees from 0 to thousands."""
    generator = np.random.default_rng(0)
    degree = np.minimum(generator.pareto(1.5, NODES) * DEGREE / 2, 5_000).astype(np.int64)
    node = np.repeat(np.arange(NODES), degree)
    source = generator.integers(NODES, size=len(node))
    source = source[np.lexsort((source, node))].astype(np.int32)
    x = generator.standard_normal((NODES, WIDTH), dtype=np.float32).astype(np.float16)
    start = np.concatenate([[0], degree.cumsum()])
    path = tmp_path_factory.mktemp("size")
    write(path, {"start": start, "source": source, "x": x, "y": np.arange(NODES) % 10})
    return path


def anonymous() -> float:
    """MB of memory that is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.npy")) / 2**20


def test_memory_is_flat_while_sampling(folder: Path) -> None:
    before = anonymous()
    graph = StoredGraph(folder)
    opened, used = anonymous(), list[float]()
    for batch, _ in zip(neighbor_loader(graph, [10, 5], batch_size=256, shuffle=True), range(400), strict=False):
        assert batch.x.dtype == torch.float32
        used.append(anonymous())
    assert opened - before < 1
    assert max(used[100:]) - max(used[:100]) < 8
    assert max(used) - before < size(folder) / 4
    graph.verify()
    assert anonymous() - before < size(folder) / 4


def test_memory_of_inference_is_that_of_a_block(folder: Path, tmp_path: Path) -> None:
    model, peaks = GNNMoE(WIDTH, 64, 10, num_experts=4).eval(), list[float]()
    assert model.convs[0].router is not None
    for module in (*model.convs, model.convs[0].router):
        module.register_forward_hook(lambda *_: peaks.append(anonymous()))
    before = anonymous()
    logits = model.inference(StoredGraph(folder), batch_size=4_096, folder=tmp_path)
    assert logits.shape == (NODES, 10)
    assert max(peaks) - before < size(folder) / 2
