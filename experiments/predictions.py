"""What runs on OGB's sets predict for every node: corrected, smoothed, and kept for ``experiments.ensemble``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import CorrectAndSmooth

from experiments.config import GraphConfig
from experiments.data import Split, Task

if TYPE_CHECKING:
    from experiments.loop import Training


def has_predictions(config: Any) -> bool:
    """Of OGB's sets of one node type that are kept in memory, and where they are corrected."""
    is_graph = isinstance(config, GraphConfig) and config.data is None
    return is_graph and (config.dataset.startswith("ogbn-") or config.correct_and_smooth)


@torch.no_grad()
def keep_predictions(training: Training, folder: Path, scores: tuple[float, float]) -> tuple[float, float]:
    """Write ``predictions.safetensors`` in the folder of a seed: (N, classes) probabilities of all nodes.

    Returns what validation and test score: ``scores``, or what they do after correction and smoothing.
    """
    config: Any = training.config
    task = training.task
    if not isinstance(task.graph, Data):  # on disk
        return scores
    training.model.eval()
    if config.evaluation == "full":
        (batch,) = training.fabric.to_device(list(task.loader("test", config.batch_size, None)))
        logits = training.forward(batch.inputs)
    else:
        logits, _ = training.inference()
    y = task.graph.y.to(logits.device)
    probability = logits.float().softmax(dim=-1) if y.dim() == 1 else logits.float().sigmoid()
    if config.correct_and_smooth:
        probability = corrected(probability, y, task)
        scores = score(task, probability, "val"), score(task, probability, "test")
    save_file({"probability": probability.cpu().contiguous()}, folder / "predictions.safetensors")
    return scores


def corrected(probability: Tensor, y: Tensor, task: Task) -> Tensor:
    """Errors on the training nodes spread to the others, then labels (`Huang et al., 2021
    <https://arxiv.org/abs/2010.13993>`_), as in PyG's example."""
    if y.dim() != 1:
        raise ValueError(f"correct_and_smooth: got True for {task.name}, expected False: it takes one class a node")
    assert task.graph is not None
    assert task.split is not None
    edges, train = task.graph.edge_index.to(y.device), task.split["train"].to(y.device)
    mask = torch.zeros(len(y), dtype=torch.bool, device=y.device).index_fill(0, train, value=True)
    post = CorrectAndSmooth(
        num_correction_layers=50, correction_alpha=1.0, num_smoothing_layers=50, smoothing_alpha=0.8, autoscale=True
    )
    found: Tensor = post.smooth(post.correct(probability, y[mask], mask, edges), y[mask], mask, edges)
    return found


def score(task: Task, probability: Tensor, part: Split) -> float:
    """The task's metric of probabilities of all nodes."""
    assert task.graph is not None
    assert task.split is not None
    rows, metric = task.split[part], task.metric()
    metric.update(probability.cpu()[rows], task.graph.y[rows])
    return float(metric.compute())
