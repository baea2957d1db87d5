"""What runs on one of OGB's sets say together: ``python -m experiments.ensemble RUN...``

For each run the line that OGB's leaderboards ask for, then the score of the mean of all their seeds' probabilities, by
OGB's own evaluator. And what a run keeps for it: its predictions for every node, corrected and smoothed if asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import CorrectAndSmooth

from experiments.build import fails_by_layer
from experiments.config import GraphConfig, check, program
from experiments.data import Split, Task
from experiments.files import naming

if TYPE_CHECKING:
    from experiments.loop import Training

SEEDS = 10
"""That OGB's leaderboards ask for."""


def has_predictions(config: Any, model: Any, task: Task) -> bool:
    """Of OGB's sets of one node type that are kept in memory, and where they are corrected.

    A model has them that sees the whole graph, or runs by layers. What cannot be corrected is a ``ValueError``.
    """
    if not isinstance(config, GraphConfig):
        return False
    possible = (config.correct_and_smooth or config.dataset.startswith("ogbn-")) and isinstance(task.graph, Data)
    possible = possible and (config.evaluation == "full" or not fails_by_layer(model, task.graph))
    if config.correct_and_smooth and not (possible and task.graph is not None and task.graph.y.dim() == 1):
        legal = "False: it takes one class a node, a graph in memory, and layer-wise inference or evaluation='full'"
        raise ValueError(f"correct_and_smooth: got True for {task.name}, expected {legal}")
    return possible


@torch.no_grad()
def keep_predictions(training: Training, folder: Path, scores: tuple[float, float]) -> tuple[float, float]:
    """Write ``predictions.safetensors`` in the folder of a seed: (N, classes) probabilities of all nodes.

    Returns what validation and test score: ``scores``, or what they do after correction and smoothing.
    """
    config: Any = training.config
    task = training.task
    assert task.graph is not None
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
    <https://arxiv.org/abs/2010.13993>`_), with the steps and alphas of PyG's example; edges weigh the same."""
    assert task.graph is not None
    assert task.split is not None
    edges, train = task.graph.edge_index.to(y.device), task.split["train"].to(y.device)
    mask = torch.zeros(len(y), dtype=torch.bool, device=y.device).index_fill(0, train, value=True)
    post = CorrectAndSmooth(
        num_correction_layers=50, correction_alpha=1.0, num_smoothing_layers=50, smoothing_alpha=0.8, autoscale=True
    )
    right = post.correct(probability, y[mask], mask, edges)
    right = right.where(right.isfinite(), probability)  # PyG divides 0 by 0 where no training node has an error
    found: Tensor = post.smooth(right, y[mask], mask, edges)
    return found


def score(task: Task, probability: Tensor, part: Split) -> float:
    """The task's metric of probabilities of all nodes."""
    assert task.graph is not None
    assert task.split is not None
    rows, metric = task.split[part], task.metric()
    metric.update(probability.cpu()[rows], task.graph.y[rows])
    return float(metric.compute())


def ensemble(runs: tyro.conf.Positional[tuple[Path, ...]], data_root: Path | None = None) -> None:
    """Print a line of each run, and one of all of them together.

    Args:
        runs: run folders of one data set.
        data_root: root folder of the data; by default where they were trained on them.
    """
    from experiments.run_folder import read_run

    warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
    found = [read_run(folder, data_root) for folder in runs]
    found = [read_run(folder, data_root or found[0].config.data_root) for folder in runs]  # all on the same data
    sets = sorted({run.config.dataset for run in found})
    one = len(sets) == 1 and sets[0].startswith("ogbn-")  # of others, each seed may test where another one trains
    check(one, "runs", f"those of {', '.join(sets) or 'none'}", "runs of one of OGB's data sets")
    for run in found:
        print(f"{run.folder}: {submission(run.summary)}")
    files = [run.folder / f"seed-{seed}" / "predictions.safetensors" for run in found for seed in run.config.seeds]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"{missing[0]}: is missing; runs on OGB's sets of one node type, in memory, can write it")
    for run in reversed(found):  # an error where it was trained on others
        task = run.load_task()
    total = torch.zeros(())
    for file in files:
        with naming(file):
            total = total + load_file(file)["probability"]
    test, val = (f"{100 * score(task, total / len(files), part):.2f}" for part in ("test", "val"))
    print(f"ensemble of {len(files)}: test {test}, validation {val} (one score, without a spread)")


def submission(summary: Any) -> str:
    """Test and validation, mean ± sample standard deviation over seeds, parameters, hardware."""
    from experiments.tables import percent

    where, n = summary["environment"], summary["test"]["n"]
    line = f"test {percent(summary['test'])}, validation {percent(summary['val'])}, {n} seeds"
    line += f"; {summary['parameters']:,} parameters; {where['gpu'] or where['cpu']}"
    return line if n >= SEEDS else f"{line} (a submission takes {SEEDS} seeds)"


main = program("ensemble", ensemble, __doc__)


if __name__ == "__main__":
    main()
