"""Neighbor sampling from a graph on disk, beside the same graph in memory; files are cached by the first round."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch_geometric.data import Data

from experiments.benchmark.measure import Benchmark, take_turns, told
from gmoe import StoredGraph, neighbor_loader


@dataclass(frozen=True, kw_only=True)
class StoredBenchmark(Benchmark):
    """Some batches of a loader; variants are by place and number of worker processes."""

    folder: Path = Path("data/stored")
    """Folder that `experiments.convert` wrote, of a graph that fits in memory."""
    fanout: tuple[int, ...] = (15, 10, 5)
    """Neighbors a hop."""
    batch_size: int = 1024
    """Seeds a batch."""
    batches: int = 5
    """Batches a run."""
    workers: tuple[int, ...] = (0, 2)
    """Worker processes."""

    SMALL: ClassVar = {"repeats": 2, "batches": 2}

    def measured(self) -> dict[str, Any]:
        """By variant ``wall`` and ``cpu`` (of this process), their ratios to memory, and ``seeds`` a second.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        stored = StoredGraph(self.folder)
        x, edges = stored.rows("x", slice(None)), torch.stack(stored.in_edges(slice(None)))
        memory = Data(x=x, edge_index=edges)
        seeds = torch.randint(stored.num_nodes, (self.batches * self.batch_size,))
        steps: dict[str, Any] = {}
        for workers in self.workers:
            for place, data in (("memory", memory), ("disk", stored)):
                options: dict[str, Any] = {"batch_size": self.batch_size, "is_sorted": True, "num_workers": workers}
                loader = neighbor_loader(data, list(self.fanout), seeds, backend="gmoe", **options)
                steps[f"{place}, {workers} workers"] = partial(deque, loader, maxlen=0)
        found = take_turns(steps, self.repeats, torch.device("cpu"), tell=partial(told, unit="round"))
        for name, figures in found.items():
            base = found[name.replace("disk", "memory")]
            figures["ratio"] = {clock: figures[clock]["median"] / base[clock]["median"] for clock in ("wall", "cpu")}
            figures["seeds"] = len(seeds) / figures["wall"]["median"]
        return found
