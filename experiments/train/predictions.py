"""What a run keeps for ``experiments.ensemble``: its predictions for every node.

They are corrected and smoothed if asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_geometric.nn import CorrectAndSmooth

from experiments.train.checks import check
from experiments.train.data.task import Split, Task
from experiments.train.files import naming, replacing
from experiments.train.kinds.base import Kind
from experiments.train.training import Training


def keep_predictions(
    kind: Kind[Any], training: Training, folder: Path, scores: tuple[float, float]
) -> tuple[float, float]:
    """Write what a seed's model predicts.

    Returns what validation and test score: ``scores``, or what they do after correction and
    smoothing.
    """
    probability = kind.predicted(training)
    write(folder, probability)
    if not kind.corrects():
        return scores
    task = training.task
    return score(task, probability, "val"), score(task, probability, "test")


def write(folder: Path, probability: Tensor) -> None:
    """Write ``predictions.safetensors`` in the folder of a seed."""
    with replacing(folder / "predictions.safetensors") as fresh:
        save_file({"probability": probability.cpu().contiguous()}, fresh)


def corrected(probability: Tensor, y: Tensor, task: Task) -> Tensor:
    """Errors on the training nodes spread to the others, then labels (`Huang et al., 2021
    <https://arxiv.org/abs/2010.13993>`_), with the steps and alphas of PyG's example; edges
    weigh the same."""
    assert task.graph is not None
    assert task.split is not None
    edges = task.graph.edge_index.to(y.device)
    train = task.split["train"].to(y.device)
    mask = torch.zeros(len(y), dtype=torch.bool, device=y.device).index_fill(0, train, value=True)
    post = CorrectAndSmooth(
        num_correction_layers=50,
        correction_alpha=1.0,
        num_smoothing_layers=50,
        smoothing_alpha=0.8,
        autoscale=True,
    )
    right = post.correct(probability, y[mask], mask, edges)
    # PyG divides 0 by 0 where no training node has an error
    right = right.where(right.isfinite(), probability)
    smooth: Tensor = post.smooth(right, y[mask], mask, edges)
    # Its rows do not sum to 1, of which an ensemble would take the mean.
    return smooth / smooth.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(smooth.dtype).tiny)


def score(task: Task, probability: Tensor, part: Split) -> float:
    """The task's metric of probabilities of all nodes or molecules."""
    assert task.split is not None
    rows = task.split[part]
    y: Any = task.labels if task.graph is None else task.graph.y
    metric = task.metric()
    metric.update(probability.cpu()[rows], y[rows])
    return float(metric.compute())


def mean_of(files: Sequence[Path]) -> Tensor:
    """(N, classes) the mean of the probabilities in some files."""
    members: list[Tensor] = []
    for file in files:
        with naming(file):
            members.append(load_file(file)["probability"])
            shape = tuple(members[-1].shape)
            expected = tuple(members[0].shape)
            legal = f"{expected}, as in the first"
            check(shape == expected, "probability", f"shape {shape}", legal)
            check(bool(members[-1].isfinite().all()), "probability", "NaN or infinity", "numbers")
    return torch.stack(members).mean(dim=0)
