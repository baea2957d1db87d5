"""The training loop: one plain loop for graphs and images, from the seeds of a run down to a step."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from tqdm import tqdm

import gmoe
from experiments.train.build import (
    build_model,
    costs_of,
    from_first,
    init_centroids,
    make_fabric,
    of_all,
    share,
)
from experiments.train.config import ERRORS, GraphConfig, NodeConfig, RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Batch, Split, Task
from experiments.train.predictions import has_predictions, keep_predictions
from experiments.train.routing_stats import routing_rows, routing_summary
from experiments.train.run_folder import (
    Checkpoint,
    Logs,
    Result,
    Summary,
    begin,
    so_far,
    summarize,
    write_json,
)
from gmoe import Router, Routing, RoutingStats
from gmoe.distributed import world_sum

WARMUP = 0.1
"""Share of the steps that warm up, of the cosine schedule."""
SECONDS = 10.0
"""Between two lines of progress, where the output is a file."""


def run(config: RunConfig, progress: Progress | None = None) -> Summary:
    """Train all seeds of a run, write its folder, and return its summary.

    What the folder holds of the same run is continued: a finished run is only read; to one of fewer seeds, the others
    are added. Of several processes the first one writes, and all return what it does. What cannot be run is a
    ``ValueError``; SIGINT and SIGTERM raise :class:`InterruptedRunError` when the folder holds what was trained.
    """
    fabric = make_fabric(config)  # before data are read
    shown = config.progress and fabric.is_global_zero
    if shown:  # what gmoe logs of long work, as k-means of centroids is
        logging.basicConfig(format="%(message)s")
        logging.getLogger("gmoe").setLevel(logging.INFO)
    summary, results = from_first(fabric, lambda: so_far(config))
    progress = progress or Progress(len(config.seeds) * config.epochs, shown)
    for _ in config.seeds if summary is not None else results:
        progress.skip(config.epochs)
        progress.finish(config.epochs)
    if summary is None:
        results |= train_seeds(
            fabric, config, [seed for seed in config.seeds if seed not in results], progress
        )
        summary = from_first(
            fabric, lambda: summarize(config, [results[seed] for seed in config.seeds])
        )
        write_json(config.folder() / "summary.json", summary)
    return summary


def train_seeds(
    fabric: Fabric, config: RunConfig, seeds: list[int], progress: Progress
) -> dict[int, Result]:
    """The results of seeds, which are written too."""
    if not seeds:  # and no data are needed
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
        )
        # A class token's, of one image
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")
        with fabric.rank_zero_first(local=True):  # who downloads what is missing
            task_of = load_tasks(config)
        return {seed: train_seed(fabric, config, task_of(seed), seed, progress) for seed in seeds}


def train_seed(
    fabric: Fabric, config: RunConfig, task: Task, seed: int, progress: Progress
) -> Result:
    """Train with one seed and evaluate: validation selects the epoch, the test set is read once, at the end.

    An unfinished checkpoint is resumed. Of several processes the first one's figures of the routing are right.
    """
    folder = config.folder() / f"seed-{seed}"
    is_on_gpu = fabric.device.type == "cuda"
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats(fabric.device)
    fabric.seed_everything(seed, verbose=False)
    model = build_model(config, task)
    if config.kmeans_init:
        init_centroids(
            model, next(iter(task.loader("train", config.batch_size, seed))).inputs, seed
        )
    # Runs it once, and so refuses what cannot run before anything is written
    costs = costs_of(model, config, task)
    keeps = has_predictions(config, model, task)
    if fabric.world_size > 1:  # from here on each process draws its own
        torch.manual_seed(seed + (fabric.global_rank << 50))
    with locked(fabric, folder):
        begin(config)
        with set_up(fabric, model, config, task) as training:
            reached = fit(training, seed, folder, progress)
            test, routings = training.evaluate("test")
            val = reached.best_val
            if keeps:
                val, test = from_first(
                    fabric, lambda: keep_predictions(training, folder, (val, test))
                )
        result: Result = {
            "seed": seed,
            "epochs": config.epochs,
            "metric": task.metric_name,
            "val": val,
            "test": test,
            "best_epoch": reached.best_epoch,
            "seconds": round(reached.seconds, 2),
            "peak_memory": torch.cuda.max_memory_allocated(fabric.device) // 2**20
            if is_on_gpu
            else None,
            **costs,
            "routing": routing_summary(routings, task),
            "curve": reached.curve,
        }
        write_json(folder / "result.json", result)
    return result


def locked(fabric: Fabric, folder: Path) -> AbstractContextManager[Any]:
    """Refuse a seed that another process trains; several seeds of a run may be trained side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    if not fabric.is_global_zero:
        return nullcontext()
    try:
        return FileLock(folder / "lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"out: {folder} is being trained by another process; wait, or choose another"
        ) from error


def fit(training: Training, seed: int, folder: Path, progress: Progress) -> Reached:
    """Train for as many epochs as there are to come, and leave the model with the weights that validation selects."""
    config, steps = training.config, training.task.steps(training.config.batch_size)
    checkpoint = Checkpoint(training.fabric, folder / "checkpoint", training.state)
    loaded = checkpoint.load()
    if loaded is not None:
        training.load(loaded)
    reached, name = training.reached, f"{folder.parent.name} seed {seed}"
    progress.skip(reached.epochs + training.epoch.batches / steps)
    logs = Logs(folder, config, keep=reached.epochs)
    training.clock = time.perf_counter()
    with checkpoint:
        while reached.epochs < config.epochs:
            epoch = reached.epochs
            for batch, rows in batches_left(
                training, checkpoint, shuffle_seed=seed * 100_003 + epoch
            ):
                training.step(batch, rows)
                if steps > 1:
                    figures = f"step {training.epoch.batches} of {steps}"
                    progress.show(
                        name, epoch + training.epoch.batches / steps, config.epochs, figures
                    )
            row, layers = training.end_epoch(seed)
            logs.write(row, layers)
            progress.show(
                name,
                reached.epochs,
                config.epochs,
                f"loss {row['loss']:.3f}, best {reached.best_val:.4f}",
            )
            checkpoint.save() if reached.epochs == config.epochs else checkpoint.tick()
    logs.close()
    progress.finish(config.epochs)
    if len(reached.curve["val"]) > 1 and len(set(reached.curve["val"])) == 1:
        print(
            f"{training.task.name}: validation never changed, so that the first epoch is selected",
            flush=True,
        )
    training.model.load_state_dict(training.best)
    return reached


def batches_left(
    training: Training, checkpoint: Checkpoint, shuffle_seed: int
) -> Iterator[tuple[Batch, int]]:
    """What an epoch has left to train on: this process's part of each batch, and how many rows all parts have.

    Before each batch, and after the last, all processes agree on saving and stopping.
    """
    training.model.train()
    batches = iter(training.batches("train", shuffle_seed))
    # Cut off inside this epoch: its batches are drawn again, and not trained on again
    if training.epoch.batches:
        kept = training.rng
        for _ in itertools.islice(batches, training.epoch.batches):
            pass
        set_rng(kept)
    while True:
        training.rng = get_rng()  # before the batch is drawn, which a checkpoint would draw again
        try:
            batch = next(batches, None)
        except RuntimeError:  # Ctrl-C ends the processes that load batches too
            if checkpoint.signal is None:
                raise
            batch = None
        rows = checkpoint.tick(0 if batch is None else len(batch.target))
        if batch is None:
            return
        yield batch, rows


class Progress(tqdm):
    """Epochs over all seeds and variants of a command, with an estimate of the time that is left.

    A bar in a terminal, elsewhere a line now and then.
    """

    def __init__(self, epochs: float, shown: bool = True) -> None:
        self.epochs, self.done, self.initial = epochs, 0.0, 0.0
        self.in_terminal = sys.stderr.isatty()
        super().__init__(
            total=epochs,
            disable=not shown,
            leave=False,
            delay=1e-9,
            miniters=0,
            mininterval=0.1 if self.in_terminal else SECONDS,
            bar_format="{percentage:3.0f}%|{bar}| " * self.in_terminal
            + "{desc}; about {remaining} left",
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print a line."""
        if self.in_terminal:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

    def skip(self, epochs: float) -> None:
        """So many of a seed were done before, and are no part of the estimate."""
        self.initial += epochs

    def show(self, name: str, epoch: float, epochs: int, figures: str) -> None:
        """Where a seed is; whole epochs, or parts of one."""
        self.n = min(self.done + epoch, self.epochs)
        self.set_description_str(
            f"{name}: epoch {epoch:.3g} of {epochs}, {figures}", refresh=epoch >= epochs
        )
        self.update(0)

    def finish(self, epochs: int) -> None:
        """A seed is done."""
        self.done += epochs
        if self.done >= self.epochs:
            self.close()


class Epoch:
    """What the training steps of an epoch have summed so far in this process."""

    def __init__(self, lr: float) -> None:
        self.lr = lr  # at its start
        self.batches = self.count = 0
        # Tensors: a number would have to be waited for at every step
        self.sums: dict[str, Tensor] = {}
        self.stats: RoutingStats | None = None

    def add(self, values: dict[str, Tensor], routings: list[Routing], rows: int) -> None:
        """One step's losses, and what it routed."""
        if routings:
            if self.stats is None:
                self.stats = RoutingStats([routing.num_experts for routing in routings]).to(
                    values["loss"].device
                )
            self.stats.update(routings)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() * rows
        self.count += rows
        self.batches += 1

    def means(self) -> dict[str, float]:
        """Means of the task loss, of all auxiliary losses, and of each of them, over all processes."""
        sums = torch.tensor([self.count, *map(float, self.sums.values())], dtype=torch.float64)
        count, *totals = world_sum(sums).tolist()
        return {name: total / count for name, total in zip(self.sums, totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """As tensors and numbers."""
        stats = (
            None
            if self.stats is None
            else (list(self.stats.num_experts), dict(self.stats.metric_state))
        )
        return vars(self) | {"stats": stats}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        vars(self).update(
            state,
            sums={name: value.to(device) for name, value in state["sums"].items()},
            stats=None,
        )
        if state["stats"] is not None:
            experts, values = state["stats"]
            self.stats = RoutingStats(experts).to(device)
            for name, value in values.items():
                setattr(self.stats, name, value.to(device))
            # Torchmetrics would warn of a metric without updates
            self.stats._update_count = self.batches


@dataclass
class Reached:
    """How far a seed is: epochs done, what validation selects, the time taken, and the curve where it was measured."""

    epochs: int = 0
    best_epoch: int = -1
    best_val: float = math.nan
    seconds: float = 0.0
    curve: dict[str, list[float]] = field(
        default_factory=lambda: {"epoch": [], "loss": [], "val": []}
    )


@dataclass
class Training:
    """A seed in training; :meth:`state` is all that the rest of it depends on.

    ``routings`` is what the last forward of the model routed, one a layer.
    """

    fabric: Fabric
    model: Any
    optimizer: Any
    scheduler: LambdaLR
    routings: list[Routing]
    config: RunConfig
    task: Task

    def __post_init__(self) -> None:
        self.reached, self.epoch, self.best = Reached(), Epoch(self.lr), self.weights()
        # When ``reached.seconds`` was counted last
        self.rng, self.clock = (
            get_rng(),
            time.perf_counter(),
        )

    def batches(self, split: Split, seed: int | None) -> Iterable[Batch]:
        """This process's slices of the batches of an epoch."""
        return self.task.loader(
            split, self.config.batch_size, seed, (self.fabric.global_rank, self.fabric.world_size)
        )

    def forward(self, inputs: tuple[Any, ...]) -> Tensor:
        """Logits; ``routings`` are those of this call. At evaluation processes do not wait for each other."""
        self.routings.clear()
        if self.model.training:
            return self.model(*inputs)
        precision = self.fabric.strategy.precision
        with precision.forward_context():
            logits: Tensor = precision.convert_output(
                self.model.module(*precision.convert_input(inputs))
            )
        return logits

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self, batch: Batch, total: int) -> None:
        """One step of the optimizer on this process's part of a batch, of which all parts have ``total`` rows."""
        rows = len(batch.target)
        share_of_mean = rows * self.fabric.world_size / total
        batch = self.fabric.to_device(batch)
        self.optimizer.zero_grad()
        logits = batch.counted(self.forward(batch.inputs))
        loss = self.task.loss(logits, batch.target) if rows else logits.sum()
        aux = gmoe.aux_loss(self.routings).to(loss.device)
        # DDP takes the mean of the processes' gradients
        self.fabric.backward(share_of_mean * loss + aux)
        if norm := self.config.clip_norm:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.scheduler.step()
        losses = {
            f"{name}_{layer}": value.value
            for layer, routing in enumerate(self.routings)
            for name, value in routing.losses.items()
        }
        self.epoch.add({"loss": loss, "aux": aux} | losses, self.routings, rows)

    def end_epoch(self, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluate where it is due, and count the epoch as done; the rows of metrics.csv and routing.csv."""
        config, reached, epoch = self.config, self.reached, self.reached.epochs
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": self.epoch.lr,
            **self.epoch.means(),
            "val": None,
        }
        _check_finite("loss", row["loss"], seed, epoch, config)
        reached.epochs += 1
        if reached.epochs == config.epochs or reached.epochs % config.eval_every == 0:
            row["val"] = self.evaluate("val")[0]
            _check_finite(self.task.metric_name, row["val"], seed, epoch, config)
            for figure, value in (
                ("epoch", reached.epochs),
                ("loss", row["loss"]),
                ("val", row["val"]),
            ):
                reached.curve[figure].append(round(value, 5))
            if is_better(self.task.metric_name, row["val"], reached.best_val):
                reached.best_val, reached.best_epoch, self.best = row["val"], epoch, self.weights()
        self.count_seconds()
        layers = routing_rows(self.epoch.stats)
        self.epoch, self.rng = Epoch(self.lr), get_rng()
        return row | {"seconds": reached.seconds}, layers

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, list[list[Routing]]]:
        """The metric over a split, and the routings: a list a batch, in it one a layer.

        Of several processes the first one evaluates whole graphs and the test set, whose routings it alone returns; the
        batches of validation are shared out, and have none.
        """
        task, config = self.task, self.config
        alone = split == "test" or (
            isinstance(config, NodeConfig) and config.evaluation != "sampled"
        )
        share(self.model.module.buffers())  # batch norms have counted what each process saw
        value, routings = 0.0, list[list[Routing]]()
        if self.fabric.is_global_zero or not alone:
            self.model.eval()
            metric = task.metric().to(self.fabric.device)
            if alone:
                metric.distributed_available_fn = lambda: False
            if isinstance(config, GraphConfig) and config.evaluation == "layerwise":
                routings.append(self._by_layer(split, metric))
            else:
                for batch in (
                    task.loader(split, config.batch_size, None)
                    if alone
                    else self.batches(split, None)
                ):
                    batch = self.fabric.to_device(batch)
                    logits = batch.counted(self.forward(batch.inputs))
                    if len(logits):
                        metric.update(logits, batch.target)
                    if alone:  # nobody reads those of validation, of which there may be millions
                        routings.append(list(self.routings))
            value = float(metric.compute())
        return self.fabric.broadcast(value), routings

    def _by_layer(self, split: Split, metric: Metric) -> list[Routing]:
        """The same logits, layer by layer in pieces."""
        graph, device = self.task.graph, self.fabric.device
        assert graph is not None
        assert self.task.split is not None
        logits, routings = self.inference()
        rows = self.task.split[split]
        metric.update(logits[rows].to(device), graph.y[rows].to(device))
        return routings

    def inference(self) -> tuple[Tensor, list[Routing]]:
        """The logits of all nodes, layer by layer, and the routings."""
        graph: Any = self.task.graph
        device, size = self.fabric.device, self.config.batch_size
        if self.config.precision == "64-true":
            graph = copy.copy(graph).apply(
                lambda value: value.double() if value.is_floating_point() else value
            )
        with self.fabric.autocast():
            found: tuple[Tensor, list[Routing]] = self.model.module.inference(
                graph, device, batch_size=size, return_routing=True
            )
        return found

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def count_seconds(self) -> None:
        """Add what has passed."""
        now = time.perf_counter()
        self.reached.seconds += now - self.clock
        self.clock = now

    def state(self) -> dict[str, Any]:
        """For a checkpoint; ``"processes"`` holds what each has of its own."""
        self.count_seconds()
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "reached": asdict(self.reached),
            "best": self.best,
            "processes": of_all({"rng": self.rng, "epoch": self.epoch.state()}),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.reached, self.best = Reached(**state["reached"]), state["best"]
        own = state["processes"][self.fabric.global_rank]
        self.epoch.load(own["epoch"], self.fabric.device)
        self.rng = own["rng"]
        set_rng(self.rng)


@contextmanager
def set_up(fabric: Fabric, model: nn.Module, config: RunConfig, task: Task) -> Iterator[Training]:
    """Model, optimizer and schedule, ready to train; the routings are recorded as long as it lasts."""
    has_experts = any(isinstance(module, Router) for module in model.modules())
    recording: AbstractContextManager[list[Routing]] = (
        gmoe.record_routing(model) if has_experts else nullcontext([])
    )
    with recording as routings, attention_kernel(fabric.device, config):
        ready, optimizer = fabric.setup(model, make_optimizer(config, model))
        steps = config.epochs * task.steps(config.batch_size)
        scheduler = LambdaLR(optimizer.optimizer, lambda step: learning_rate(config, step, steps))
        yield Training(fabric, ready, optimizer, scheduler, routings, config, task)


def attention_kernel(device: torch.device, config: RunConfig) -> AbstractContextManager[None]:
    """torch's choice of kernel for attention, but plain products in bf16 on the CPU.

    There the backward of the fused kernel takes three times what it takes in fp32: 40 % of a step of a ViT on CIFAR-10.
    """
    if device.type == "cpu" and config.precision == "bf16-mixed":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW; no weight decay on biases, norms, temperatures, centroids, class tokens and positions."""
    spared = ("bias", "centroid", "log_temperature", "class_token", "pos_embedding")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # A gain is decayed, toward the dense model: it scales weights that are
        leaf = name.rsplit(".", 1)[-1]
        spare = (parameter.dim() < 2 and leaf != "gain") or leaf in spared
        (plain if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        groups, lr=config.lr
    )


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """The factor of the learning rate at a step of ``steps``."""
    if config.schedule == "constant":
        return 1.0
    warmup = round(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def get_rng() -> dict[str, Any]:
    """The states of torch's generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng(states: dict[str, Any]) -> None:
    """Draw on from :func:`get_rng`."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state_all(states["cuda"])


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether a score is better than the best before it, which is NaN if there was none."""
    return math.isnan(best) or (value < best if metric in ERRORS else value > best)


def _check_finite(name: str, value: float, seed: int, epoch: int, config: RunConfig) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{name}: got {value} in epoch {epoch} of seed {seed}, expected a number; the training diverged (lr="
            f"{config.lr}, clip_norm={config.clip_norm}), or the data hold values that are not finite"
        )
