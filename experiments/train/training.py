"""A seed in training: its step, its evaluation, and its state."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

import gmoe
from experiments.train.config import ERRORS, RunConfig
from experiments.train.data.task import Batch, Split, Task
from experiments.train.epoch import Epoch
from experiments.train.processes import of_all, share
from experiments.train.routing_stats import routing_rows
from gmoe import Router, Routing

WARMUP = 0.1
"""Share of the steps that warm up, of the cosine schedule, where no epochs are given."""


@dataclass
class Reached:
    """How far a seed is.

    The epochs done, what validation selects, the time taken and how fast it is, and the curve
    where it was measured.
    """

    epochs: int = 0
    best_epoch: int = -1
    best_val: float = math.nan
    seconds: float = 0.0
    # Trained on by one process without a stop, and how long that took; evaluations apart
    rows: int = 0
    rows_seconds: float = 0.0
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
        self.reached = Reached()
        self.epoch = Epoch(self.lr)
        self.best = weights_of(self.model)
        decay = self.config.of_images.model_ema_decay
        self.average = weight_average(self.model.module, decay) if decay else None
        # Of the last evaluation: further figures by name, of the task's ``beside``
        self.beside: dict[str, float] = {}
        self.rng = get_rng()
        # When ``reached.seconds`` was counted last
        self.clock = time.perf_counter()

    def batches(self, split: Split, seed: int | None) -> Iterable[Batch]:
        """This process's slices of the batches of an epoch; of training, all of a step at once."""
        size = self.config.step_size if split == "train" else self.config.batch_size
        return self.task.loader(
            split, size, seed, (self.fabric.global_rank, self.fabric.world_size)
        )

    def forward(self, inputs: tuple[Any, ...]) -> Tensor:
        """Logits.

        ``routings`` are those of this call. At evaluation processes do not wait for each other.
        """
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
        """Of the step to come, where no factor of a part changes it."""
        (factor, *_) = self.scheduler.lr_lambdas
        return self.config.lr * float(factor(self.scheduler.last_epoch))

    def step(self, batch: Batch, total: int) -> None:
        """Train on this process's part of a batch, and add to what the epoch has summed.

        All parts of the batch have ``total`` rows.
        """
        for losses, routings, rows in self.update(batch, total):
            self.epoch.add(losses, routings, rows)
        self.epoch.batches += 1

    def update(
        self, batch: Batch, total: int
    ) -> list[tuple[dict[str, Tensor], list[Routing], int]]:
        """Take one step of the optimizer, as :meth:`step` does.

        Everything that times a training step calls this.

        Returns:
            for each part of the batch whose gradients are added up: the losses by name, what was
            routed, and the rows.
        """
        if not self.model.training:  # an evaluation came before
            self.model.train()
        batch = self.fabric.to_device(batch)
        self.optimizer.zero_grad()
        parts = batch.parts(self.config.step_size // self.config.batch_size)
        if self.fabric.world_size == 1:  # several processes wait for each other in each part
            parts = [part for part in parts if len(part.target)] or parts[:1]
        done = []
        for number, part in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts)):
                losses = self._gradients(part, len(batch.target), total)
            done.append((losses, list(self.routings), len(part.target)))
        if norm := self.config.clip_norm:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.model.module)
        return done

    def _gradients(self, part: Batch, rows: int, total: int) -> dict[str, Tensor]:
        """Add the gradients of a part to what is there, and return the losses by name.

        ``rows`` are those of the whole batch in this process, and ``total`` in all of them.
        """
        own = len(part.target)
        logits = part.counted(self.forward(part.inputs))
        loss = self.task.loss(logits, part.target) if own else logits.sum()
        aux = gmoe.aux_loss(self.routings).to(loss.device)
        # DDP takes the mean of the processes' gradients
        share_of_mean = own * self.fabric.world_size / total
        share_of_batch = own / rows if own != rows else 1
        self.fabric.backward(share_of_mean * loss + share_of_batch * aux)
        named = {
            f"{name}_{layer}": value.value
            for layer, routing in enumerate(self.routings)
            for name, value in routing.losses.items()
        }
        return {"loss": loss, "aux": aux} | named

    def end_epoch(self, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluate where it is due, and count the epoch as done.

        The rows of metrics.csv and routing.csv.
        """
        config = self.config
        reached = self.reached
        epoch = reached.epochs
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": self.epoch.lr,
            **self.epoch.means(),
            "val": None,
        }
        self._check_finite("loss", row["loss"], epoch, seed)
        reached.epochs += 1
        if reached.epochs == config.epochs or reached.epochs % config.eval_every == 0:
            averaged: AbstractContextManager[None] = nullcontext()
            if self.average is not None:
                share(self.model.module.buffers())
                averaged = lent(self.model.module, self.average.module)
            with averaged:
                row["val"] = self.evaluate("val")[0]
                self._check_finite(self.task.metric_name, row["val"], epoch, seed)
                if is_better(self.task.metric_name, row["val"], reached.best_val):
                    reached.best_val = row["val"]
                    reached.best_epoch = epoch
                    self.best = weights_of(self.model)
            measured = {"epoch": reached.epochs, "loss": row["loss"], "val": row["val"]}
            for figure, value in measured.items():
                reached.curve[figure].append(round(value, 5))
        self.count_seconds()
        layers = routing_rows(self.epoch.stats)
        self.epoch = Epoch(self.lr)
        self.rng = get_rng()
        return row | {"seconds": reached.seconds}, layers

    def _check_finite(self, name: str, value: float, epoch: int, seed: int) -> None:
        """Refuse a loss or a score that is no number."""
        if not math.isfinite(value):
            raise ValueError(
                f"{name}: got {value} in epoch {epoch} of seed {seed}, expected a number; the "
                f"training diverged (lr={self.config.lr}, clip_norm={self.config.clip_norm}), or "
                "the data hold values that are not finite"
            )

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, list[list[Routing]]]:
        """The metric over a split, and the routings: a list a batch, in it one a layer.

        Of several processes the first one evaluates whole graphs and the test set, whose
        routings it alone returns; the batches of validation are shared out, and have none.
        """
        alone = split == "test" or self.config.evaluates_whole()
        share(self.model.module.buffers())  # batch norms have counted what each process saw
        value = 0.0
        routings: list[list[Routing]] = []
        if self.fabric.is_global_zero or not alone:
            self.model.eval()
            metric = self.task.metric().to(self.fabric.device)
            further = self.task.beside if split == "test" else {}
            beside = {name: make().to(self.fabric.device) for name, make in further.items()}
            for each in (metric, *beside.values()) if alone else ():
                each.distributed_available_fn = lambda: False
            if self.config.evaluates_by_layer():
                routings.append(self._by_layer(split, metric))
            else:
                self._by_batch(split, [metric, *beside.values()], routings if alone else None)
            value = float(metric.compute())
            self.beside = {name: float(other.compute()) for name, other in beside.items()}
        return self.fabric.broadcast(value), routings

    def _by_batch(
        self, split: Split, metrics: list[Metric], routings: list[list[Routing]] | None
    ) -> None:
        """Update the metrics batch by batch.

        Where ``routings`` are noted, the process is alone and takes whole batches; nobody reads
        those of validation, of which there may be millions.
        """
        if routings is None:
            batches = self.batches(split, None)
        else:
            batches = self.task.loader(split, self.config.batch_size, None)
        for batch in batches:
            batch = self.fabric.to_device(batch)
            logits = batch.counted(self.forward(batch.inputs))
            for metric in metrics if len(logits) else ():
                metric.update(logits, batch.target)
            if routings is not None:
                routings.append(list(self.routings))

    def _by_layer(self, split: Split, metric: Metric) -> list[Routing]:
        """The same logits, layer by layer in pieces."""
        assert self.task.graph is not None
        assert self.task.split is not None
        logits, routings = self.inference()
        rows = self.task.split[split]
        device = self.fabric.device
        metric.update(logits[rows].to(device), self.task.graph.y[rows].to(device))
        return routings

    def inference(self) -> tuple[Tensor, list[Routing]]:
        """The logits of all nodes, layer by layer, and the routings."""
        graph: Any = self.task.graph
        if self.config.precision == "64-true":
            graph = copy.copy(graph).apply(
                lambda value: value.double() if value.is_floating_point() else value
            )
        with self.fabric.autocast():
            logits, routings = self.model.module.inference(
                graph, self.fabric.device, batch_size=self.config.batch_size, return_routing=True
            )
        return logits, routings

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
            "average": None if self.average is None else self.average.state_dict(),
            "processes": of_all({"rng": self.rng, "epoch": self.epoch.state()}),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.reached = Reached(**state["reached"])
        self.best = state["best"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        own = state["processes"][self.fabric.global_rank]
        self.epoch.load(own["epoch"], self.fabric.device)
        self.rng = own["rng"]
        set_rng(self.rng)


@contextmanager
def set_up(fabric: Fabric, model: nn.Module, config: RunConfig, task: Task) -> Iterator[Training]:
    """Model, optimizer and schedule, ready to train.

    The routings are recorded as long as it lasts.
    """
    has_experts = any(isinstance(module, Router) for module in model.modules())
    recording: AbstractContextManager[list[Routing]] = (
        _recorded(fabric, model) if has_experts else nullcontext([])
    )
    with recording as routings, attention_kernel(fabric.device, config.precision):
        ready, optimizer = fabric.setup(model, make_optimizer(config, model))
        epoch = task.steps(config.step_size)
        steps = config.epochs * epoch
        epochs = config.of_images.warmup_epochs
        warmup = round(WARMUP * steps if epochs is None else epochs * epoch)
        scheduler = LambdaLR(
            optimizer.optimizer, lambda step: learning_rate(config.schedule, step, steps, warmup)
        )
        yield Training(fabric, ready, optimizer, scheduler, routings, config, task)


@contextmanager
def _recorded(fabric: Fabric, model: nn.Module) -> Iterator[list[Routing]]:
    """The routings; other processes than the first have none where all epochs were done before."""
    try:
        with gmoe.record_routing(model) as routings:
            yield routings
    except RuntimeError as error:
        if fabric.is_global_zero or not str(error).startswith("record_routing: "):
            raise


def attention_kernel(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """torch's choice of kernel for attention, but plain products in bf16 on the CPU.

    There the backward of the fused kernel takes three times what it takes in fp32: 40 % of a
    step of a ViT on CIFAR-10.
    """
    if device.type == "cpu" and precision == "bf16-mixed":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW, in the fused form: experts have many parameters, each updated in each step.

    A part may have a learning rate of its own.

    No weight decay on biases, norms, temperatures, centroids, class tokens, positions and the
    embedding that a conv of molecules adds for the node itself, of one conv or of many.
    """
    spared = {"bias", "centroid", "log_temperature", "class_token", "pos_embedding", "root"}
    # What timm's models name, such as the class token
    spared |= {name.rsplit(".", 1)[-1] for name in getattr(model, "no_weight_decay", set)()}
    factors = lr_factors(config, model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, False): [], (1.0, True): []}
    for name, parameter in model.named_parameters():
        # A gain is decayed, toward the dense model: it scales weights that are
        leaf = name.rsplit(".", 1)[-1]
        spare = (parameter.dim() < 2 and leaf != "gain") or leaf in spared
        factor = factors.get(name, 1.0)
        groups.setdefault((factor, spare), []).append(parameter)
    options = [
        {
            "params": parameters,
            "lr": factor * config.lr,
            "weight_decay": 0.0 if spare else config.weight_decay,
        }
        for (factor, spare), parameters in groups.items()
    ]
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        options, lr=config.lr, fused=True
    )


def lr_factors(config: RunConfig, model: nn.Module) -> dict[str, float]:
    """By what the learning rate of some parameters is multiplied, by name."""
    decay = config.of_images.layer_decay
    if decay is None:
        return {}
    from vision.models import layer_factors  # timm, which graphs do without

    return layer_factors(model, decay)


def weight_average(model: nn.Module, decay: float) -> Any:
    """timm's exponential moving average of weights and buffers, from the initial ones on."""
    from timm.utils import ModelEmaV3  # which graphs do without

    return ModelEmaV3(model, decay=decay)


@contextmanager
def lent(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let a model have the weights of another one for a while."""
    own = weights_of(model)
    model.load_state_dict(other.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(own)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def learning_rate(
    schedule: Literal["constant", "cosine"], step: int, steps: int, warmup: int
) -> float:
    """The factor of the learning rate at a step of ``steps``, the first ``warmup`` of them."""
    if schedule == "constant":
        return 1.0
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
    if math.isnan(best):
        return True
    return value < best if metric in ERRORS else value > best
