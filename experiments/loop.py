"""The training loop: one plain loop for graphs and images."""

from __future__ import annotations

import csv
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_geometric.data import Data
from tqdm import tqdm

import gmoe
from experiments.build import build_model, flops, init_centroids, matched_ratio, num_parameters
from experiments.config import TrainConfig
from experiments.data import Split, Task
from experiments.routing_stats import routing_summary, save_routings
from experiments.structure import node_properties
from gmoe import Router, Routing


def train_seed(config: TrainConfig, task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """Train with one seed and evaluate: validation selects the epoch, the test set is read once, at the end.

    Args:
        config: the run.
        task: the data.
        seed: of everything that is drawn.
        folder: ``seed-N`` of the run folder; an unfinished checkpoint in it is resumed.

    Returns:
        The figures of this seed, as JSON.
    """
    fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
    fabric.seed_everything(seed, verbose=False)
    model = build_model(config, task)
    inputs = next(iter(task.loader("train", config.batch_size, None))).inputs
    if config.kmeans_init:
        init_centroids(model, inputs, seed)
    cost = {
        "flops": flops(model, inputs),
        "parameters": num_parameters(model),
        "active_parameters": gmoe.active_parameters(model),
        "matched": matched_ratio(config, task, model),
        "hidden": getattr(model, "mlp_dim", getattr(model, "hidden_channels", None)),
    }
    model, optimizer = fabric.setup(model, make_optimizer(config, model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda epoch: learning_rate(config, epoch))

    checkpoint = Checkpoint(folder / "checkpoint")
    progress: dict[str, Any] = {"epoch": 0, "best_epoch": -1, "best_val": -math.inf, "seconds": 0.0}
    best = _copy(model)
    loaded = checkpoint.load()
    if loaded is not None:
        progress, best = loaded["progress"], loaded["best"]
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
        torch.set_rng_state(loaded["rng"])
        torch.cuda.set_rng_state_all(loaded["cuda_rng"])
    log = Log(folder / "metrics.csv", keep=progress["epoch"])

    bar = tqdm(
        range(progress["epoch"], config.epochs),
        initial=progress["epoch"],
        total=config.epochs,
        desc=f"{task.name} {config.router} seed {seed}",
        disable=None if config.progress else True,
    )
    for epoch in bar:
        started = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
        row |= train_epoch(fabric, model, optimizer, config, task, seed * 100_003 + epoch)
        scheduler.step()
        last = epoch + 1 == config.epochs
        measured = last or (epoch + 1) % config.eval_every == 0
        row["val"] = evaluate(fabric, model, config, task, "val")[0] if measured else None
        progress["seconds"] += time.perf_counter() - started
        progress["epoch"] = epoch + 1
        if measured and row["val"] > progress["best_val"]:
            progress |= {"best_val": row["val"], "best_epoch": epoch}
            best = _copy(model)
        log.write(row | {"seconds": progress["seconds"]})
        bar.set_postfix(loss=f"{row['loss']:.3f}", best=f"{progress['best_val']:.4f}")
        if (epoch + 1) % config.checkpoint_every == 0 or last:
            log.flush()
            checkpoint.save(
                {
                    "progress": progress,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all(),
                },
                best,
            )
    log.close()

    model.load_state_dict(best)
    test, routings = evaluate(fabric, model, config, task, "test")
    save_routings(routings, folder.parent / "routing" / f"{folder.name}.safetensors")
    return {
        "seed": seed,
        "metric": task.metric_name,
        "val": progress["best_val"],
        "test": test,
        "best_epoch": progress["best_epoch"],
        "seconds": round(progress["seconds"], 2),
        "peak_memory": round(peak_memory(fabric.device)),
        **cost,
        "routing": routing_summary(routings, task.planted, _properties(task, routings)),
    }


def _properties(task: Task, routings: list[list[Routing]]) -> dict[str, Tensor]:
    """Of the nodes, where they were routed all at once."""
    graph = task.graph
    if not isinstance(graph, Data) or len(routings) != 1:
        return {}
    whole = {routing.num_tokens for routing in routings[0]} == {graph.num_nodes}
    return node_properties(graph) if whole else {}


def train_epoch(
    fabric: Fabric, model: nn.Module, optimizer: Any, config: TrainConfig, task: Task, shuffle_seed: int
) -> dict[str, float]:
    """One pass over the training set: mean task loss and auxiliary loss."""
    model.train()
    loss_sum, aux_sum, count = 0.0, 0.0, 0
    for batch in task.loader("train", config.batch_size, shuffle_seed):
        batch = fabric.to_device(batch)
        optimizer.zero_grad()
        with routings_of(model) as routings:
            logits = model(*batch.inputs)
        loss = task.loss(batch.counted(logits), batch.target)
        aux = gmoe.aux_loss(routings).to(loss.device)
        fabric.backward(loss + aux)
        optimizer.step()
        loss_sum += float(loss.detach()) * len(batch.target)
        aux_sum += float(aux.detach()) * len(batch.target)
        count += len(batch.target)
    return {"loss": loss_sum / count, "aux": aux_sum / count}


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: nn.Module, config: TrainConfig, task: Task, split: Split
) -> tuple[float, list[list[Routing]]]:
    """The metric over a split, and the routings: a list a batch, in it one a layer."""
    model.eval()
    metric = task.metric().to(fabric.device)
    if config.evaluation == "layerwise":
        assert task.graph is not None
        assert task.split is not None
        gnn: Any = model.module
        logits, routings = gnn.inference(task.graph, fabric.device, batch_size=config.batch_size, return_routing=True)
        rows = task.split[split]
        metric.update(logits[rows].to(fabric.device), task.graph.y[rows].to(fabric.device))
        return float(metric.compute()), [routings]
    kept = []
    for batch in task.loader(split, config.batch_size, None):
        batch = fabric.to_device(batch)
        with routings_of(model) as routings:
            logits = model(*batch.inputs)
        metric.update(batch.counted(logits), batch.target)
        kept.append(list(routings))
    return float(metric.compute()), kept


@contextmanager
def routings_of(model: nn.Module) -> Iterator[list[Routing]]:
    """:func:`gmoe.record` for models that may be dense."""
    if any(isinstance(module, Router) for module in model.modules()):
        with gmoe.record(model) as routings:
            yield routings
    else:
        yield []


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW; no weight decay on biases, norms, temperatures, centroids, class tokens and positions."""
    spared = ("bias", "centroid", "log_temperature", "class_token", "pos_embedding")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spare = parameter.dim() < 2 or name.rsplit(".", 1)[-1] in spared
        (plain if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.optimizer](groups, lr=config.lr)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The factor of the learning rate in an epoch."""
    if config.schedule == "constant":
        return 1.0
    warmup = max(config.epochs // 10, 1)
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(config.epochs - warmup, 1)))


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in MiB: on a GPU what torch allocated, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10  # of the unit that the system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


class Checkpoint:
    """The state of a run on disk, replaced in one step: weights in safetensors, the rest beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: dict[str, Any], best: dict[str, Tensor]) -> None:
        """Write the state, and the best weights so far, each to a new file that then takes the old one's place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / "state.new"
        torch.save({**state, "best": best}, fresh)
        fresh.replace(self.folder / "state.ckpt")
        fresh = self.folder / "best.new"
        save_file({name: value.contiguous() for name, value in best.items()}, fresh)
        fresh.replace(self.folder / "best.safetensors")

    def load(self) -> dict[str, Any] | None:
        """The state, or ``None`` where there is none."""
        path = self.folder / "state.ckpt"
        return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


class Log:
    """metrics.csv: one row an epoch; rows behind the checkpoint are cut when a run goes on."""

    def __init__(self, path: Path, keep: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        if keep > 0 and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < keep]
        self._writer: csv.DictWriter[str] | None = None
        fresh = path.with_suffix(".new")  # takes the old one's place when it is whole
        self._file = fresh.open("w", newline="")
        for row in rows:
            self.write(row)
        self.flush()
        fresh.replace(path)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, fieldnames=list(row))
            self._writer.writeheader()
        self._writer.writerow(row)

    def flush(self) -> None:
        """Bring the rows to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
