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
    """8 M edges: half of them planted inside of communities of 1,000 nodes, in-degrees from 0 to thousands."""
    generator = np.random.default_rng(0)
    degree = np.minimum(generator.pareto(1.5, NODES) * DEGREE / 2, 5_000).astype(np.int64)
    node = np.repeat(np.arange(NODES), degree)
    near = node // 1_000 * 1_000 + generator.integers(1_000, size=len(node))
    source = np.where(generator.random(len(node)) < 0.5, near, generator.integers(NODES, size=len(node)))
    source = source[np.lexsort((source, node))]
    y = np.arange(NODES) // 1_000 % 10
    x = generator.standard_normal((NODES, WIDTH), dtype=np.float32)
    x[:, 0] += y
    start = np.concatenate([[0], degree.cumsum()])
    path = tmp_path_factory.mktemp("size")
    write(path, {"start": start, "source": source.astype(np.int32), "x": x.astype(np.float16), "y": y})
    return path


def anonymous() -> float:
    """MB of memory that is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def test_memory_is_flat_while_sampling(folder: Path) -> None:
    before = anonymous()
    graph = StoredGraph(folder)
    opened = anonymous()
    loader = neighbor_loader(graph, [10, 5], batch_size=256, shuffle=True)
    seen = []
    for batch in loader:
        assert batch.x.dtype == torch.float32
        seen.append(anonymous())
        if len(seen) == 400:
            break
    files = sum(path.stat().st_size for path in folder.glob("*.npy")) / 2**20
    print(
        f"\n{graph}: files {files:.0f} MB; anonymous memory {before:.0f} MB before, {opened:.0f} MB opened, "
        f"{max(seen[:100]):.0f} MB at most in 100 batches, {max(seen[100:]):.0f} MB in the next 300"
    )
    assert opened - before < 1
    assert max(seen[100:]) - max(seen[:100]) < 8
    assert max(seen) - before < files / 4


def test_memory_of_inference_is_that_of_a_block(folder: Path, tmp_path: Path) -> None:
    graph = StoredGraph(folder)
    model = GNNMoE(WIDTH, 64, 10, num_experts=4).eval()
    peaks: list[float] = []
    for conv in model.convs:
        conv.register_forward_hook(lambda *_: peaks.append(anonymous()))
    assert model.convs[0].router is not None
    model.convs[0].router.register_forward_hook(lambda *_: peaks.append(anonymous()))
    before = anonymous()
    logits = model.inference(graph, batch_size=4_096, folder=tmp_path)
    after = anonymous()
    files = sum(path.stat().st_size for path in folder.glob("*.npy")) / 2**20
    print(f"\nanonymous memory: {before:.0f} MB before, {max(peaks):.0f} MB at most, {after:.0f} MB after")
    assert logits.shape == (NODES, 10)
    assert max(peaks) - before < files / 2
