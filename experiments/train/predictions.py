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
from torch_geometric.data import Data
from torch_geometric.nn import CorrectAndSmooth

from experiments.train.build import fails_by_layer
from experiments.train.checks import check
from experiments.train.config import ERRORS, GraphConfig, MoleculeConfig
from experiments.train.data.task import Split, Task
from experiments.train.files import naming, replacing
from experiments.train.training import Training


def has_predictions(config: Any, model: Any, task: Task) -> bool:
    """Of OGB's molecules; of its sets of one node type in memory; and where they are corrected.

    A model has them that sees the whole graph, or runs by layers. What cannot be corrected is a
    ``ValueError``.
    """
    if isinstance(config, MoleculeConfig):
        return True
    if not isinstance(config, GraphConfig):
        return False
    possible = (config.correct_and_smooth or config.dataset.startswith("ogbn-")) and isinstance(
        task.graph, Data
    )
    possible = possible and (config.evaluation == "full" or not fails_by_layer(model, task.graph))
    if config.correct_and_smooth and not (
        possible and task.graph is not None and task.graph.y.dim() == 1
    ):
        raise ValueError(
            f"correct_and_smooth: got True for {task.name}, expected False: it takes one class a "
            "node, a graph in memory, and layer-wise inference or evaluation='full'"
        )
    return possible


@torch.no_grad()
def keep_predictions(
    training: Training, folder: Path, scores: tuple[float, float]
) -> tuple[float, float]:
    """Write ``predictions.safetensors`` in the folder of a seed.

    It has the (N, classes) probabilities of all nodes or molecules; where numbers are predicted,
    these.

    Returns what validation and test score: ``scores``, or what they do after correction and
    smoothing.
    """
    config: Any = training.config
    task = training.task
    training.model.eval()
    if isinstance(config, MoleculeConfig):
        _keep(folder, _of_molecules(training))
        return scores
    assert task.graph is not None
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
    _keep(folder, probability)
    return scores


def _keep(folder: Path, probability: Tensor) -> None:
    path = folder / "predictions.safetensors"
    with replacing(path) as fresh:
        save_file({"probability": probability.cpu().contiguous()}, fresh)


def _of_molecules(training: Training) -> Tensor:
    """(G, labels) of all molecules, NaN of those in no part of the split."""
    task = training.task
    assert task.labels is not None
    assert task.split is not None
    found = torch.full_like(task.labels, torch.nan)
    for part, rows in task.split.items():
        batches = task.loader(part, training.config.batch_size, None)
        logits = [training.forward(training.fabric.to_device(b).inputs).cpu() for b in batches]
        found[rows] = torch.cat(logits).float()
    return found if task.metric_name in ERRORS else found.sigmoid()


def corrected(probability: Tensor, y: Tensor, task: Task) -> Tensor:
    """Errors on the training nodes spread to the others, then labels (`Huang et al., 2021
    <https://arxiv.org/abs/2010.13993>`_), with the steps and alphas of PyG's example; edges
    weigh the same."""
    assert task.graph is not None
    assert task.split is not None
    edges, train = task.graph.edge_index.to(y.device), task.split["train"].to(y.device)
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
    found: Tensor = post.smooth(right, y[mask], mask, edges)
    # Its rows do not sum to 1, of which an ensemble would take the mean.
    return found / found.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def score(task: Task, probability: Tensor, part: Split) -> float:
    """The task's metric of probabilities of all nodes or molecules."""
    assert task.split is not None
    rows, metric = task.split[part], task.metric()
    y: Any = task.labels if task.graph is None else task.graph.y
    metric.update(probability.cpu()[rows], y[rows])
    return float(metric.compute())


def mean_of(files: Sequence[Path]) -> Tensor:
    """(N, classes) the mean of the probabilities in some files."""
    found: list[Tensor] = []
    for file in files:
        with naming(file):
            found.append(load_file(file)["probability"])
            shape, expected = tuple(found[-1].shape), tuple(found[0].shape)
            check(
                shape == expected, "probability", f"shape {shape}", f"{expected}, as in the first"
            )
            check(bool(found[-1].isfinite().all()), "probability", "NaN or infinity", "numbers")
    return torch.stack(found).mean(dim=0)
