"""The training loop: one plain loop for graphs and images."""

from __future__ import annotations

import copy
import itertools
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch_geometric.data import Data

import gmoe
from experiments.build import build_model, first_flops, init_centroids, matched_ratio, num_parameters
from experiments.checkpoint import Checkpoint, Log
from experiments.config import GraphConfig, HeteroConfig, ImageConfig, RunConfig
from experiments.data import Batch, Split, Task
from experiments.loggers import Logger, make_loggers
from experiments.processes import make_fabric, numbers_of_all, of_all, share
from experiments.progress import Progress
from experiments.routing_stats import routing_rows, routing_summary, save_routings
from experiments.structure import node_properties
from gmoe import Router, Routing, RoutingStats
from gmoe.distributed import world_sum


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A seed whose model has run once: what follows may write.

    Args:
        fabric: device and precision.
        model: as it begins.
        cost: parameters, FLOPs and steps, as the result of a seed holds them.
    """

    fabric: Fabric
    model: nn.Module
    cost: dict[str, Any]


def prepare(config: RunConfig, task: Task, seed: int) -> Prepared:
    """Build the model of a seed and run it once; all processes begin with the same.

    Raises:
        ValueError: it cannot be built, does not run on the data, or not in the way that it will be evaluated.
    """
    fabric = make_fabric(config)
    restart_peak_memory(fabric.device)
    fabric.seed_everything(seed, verbose=False)
    model = build_model(config, task)
    if config.kmeans_init:
        init_centroids(model, next(iter(task.loader("train", config.batch_size, seed))).inputs, seed)
    cost = {
        "flops": first_flops(model, config, task),
        "parameters": num_parameters(model),
        "active_parameters": gmoe.active_parameters(model),
        "matched": matched_ratio(config, task, model),
        "hidden": getattr(model, "mlp_dim", getattr(model, "hidden_channels", None)),
        "steps": task.steps(config.batch_size),
    }
    share(model.state_dict().values())
    if fabric.world_size > 1:  # from here on each draws its own
        torch.manual_seed(seed + (fabric.global_rank << 50))
    return Prepared(fabric=fabric, model=model, cost=cost)


def train_seed(
    config: RunConfig, task: Task, seed: int, folder: Path, prepared: Prepared, progress: Progress | None = None
) -> dict[str, Any]:
    """Train with one seed and evaluate: validation selects the epoch, the test set is read once, at the end.

    Args:
        config: the run.
        task: the data.
        seed: of everything that is drawn.
        folder: ``seed-N`` of the run folder; an unfinished checkpoint in it is resumed.
        prepared: see :func:`prepare`.
        progress: of the whole command (default: of this seed).

    Returns:
        The figures of this seed, as JSON; those of the routing in the first process alone.
    """
    with set_up(prepared.fabric, prepared.model, config, task) as training:
        state = fit(training, seed, folder, progress)
        test, routings = training.evaluate("test")
    save_routings(routings, folder.parent / "routing" / f"{folder.name}.safetensors")  # none but of the first process
    return {
        "seed": seed,
        "epochs": config.epochs,
        "metric": task.metric_name,
        "val": state["best_val"],
        "test": test,
        "best_epoch": state["best_epoch"],
        "seconds": round(state["seconds"], 2),
        "peak_memory": round(peak_memory(prepared.fabric.device)),
        **prepared.cost,
        "routing": routing_summary(routings, *_followed(task, routings)),
        "curve": state["curve"],
    }


def _check_finite(name: str, value: float, seed: int, epoch: int, config: RunConfig) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{name}: got {value} in epoch {epoch} of seed {seed}, expected a number; the training diverged (lr="
            f"{config.lr}, clip_norm={config.clip_norm}), or the data hold values that are not finite"
        )


class Epoch:
    """What the training steps of an epoch have summed so far in this process; it is part of a checkpoint."""

    def __init__(self, lr: float) -> None:
        self.lr = lr  # at its start
        self.batches = 0
        self.count = 0
        self.sums: dict[str, Tensor] = {}  # tensors: a number would have to be waited for at every step
        self.stats: RoutingStats | None = None

    def add(self, values: dict[str, Tensor], routings: list[Routing], rows: int) -> None:
        """One step's losses, and what it routed."""
        if routings:
            if self.stats is None:
                self.stats = RoutingStats([routing.num_experts for routing in routings]).to(values["loss"].device)
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
        found = {"lr": self.lr, "batches": self.batches, "count": self.count, "sums": dict(self.sums)}
        if self.stats is not None:
            found |= {"experts": list(self.stats.num_experts), "stats": dict(self.stats.metric_state)}
        return found

    @staticmethod
    def restored(states: list[dict[str, Any]], fabric: Fabric) -> Epoch:
        """This process's part of an epoch, of every one's :meth:`state`; they may have been more or fewer than now."""
        first, mine = states[0], states[fabric.global_rank :: fabric.world_size]

        def total(part: str) -> dict[str, Tensor]:
            zeros = {name: torch.zeros_like(value, device=fabric.device) for name, value in first[part].items()}
            return {name: sum((state[part][name].to(zero) for state in mine), zero) for name, zero in zeros.items()}

        epoch = Epoch(first["lr"])
        epoch.batches, epoch.count = first["batches"], sum(state["count"] for state in mine)
        epoch.sums = total("sums")
        if "stats" in first:
            epoch.stats = RoutingStats(first["experts"]).to(fabric.device)
            for name, value in total("stats").items():
                setattr(epoch.stats, name, value)
            epoch.stats._update_count = epoch.batches  # torchmetrics would warn of a metric without updates
        return epoch


def fit(training: Training, seed: int, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train for as many epochs as there are to come, and leave the model with the weights that validation selects.

    Returns:
        ``best_val``, ``best_epoch``, ``seconds``, and the ``curve``: epochs done, loss and validation metric.

    Raises:
        InterruptedRunError: SIGINT or SIGTERM; what was trained is in the checkpoint.
        ValueError: a loss or a metric that is not finite, or a checkpoint that cannot be read.
    """
    config, task = training.config, training.task
    done: dict[str, Any] = {
        "epoch": 0,
        "best_epoch": -1,
        "best_val": -math.inf,
        "seconds": 0.0,
        "curve": {"epoch": [], "loss": [], "val": []},
    }
    best = training.weights()
    summed = Epoch(training.lr)
    mark = time.perf_counter()

    def state() -> dict[str, Any]:
        nonlocal mark
        now = time.perf_counter()
        done["seconds"] += now - mark
        mark = now
        whole = training.state()
        own = {name: whole[name] for name in ("rng", "cuda_rng")} | {"epoch": summed.state()}
        others = of_all(own)[1:]
        return {"progress": done, "training": whole, "epoch": own["epoch"], "best": best, "others": others}

    checkpoint = Checkpoint(training.fabric, folder / "checkpoint", state)
    loaded = checkpoint.load()
    if loaded is not None:
        done, best = loaded["progress"], loaded["best"]
        draws = _draws(loaded, training.fabric)
        summed = Epoch.restored([loaded["epoch"], *(other["epoch"] for other in loaded["others"])], training.fabric)
        training.load(loaded["training"], draws)
    steps = task.steps(config.batch_size)
    progress = progress or Progress(config.epochs, config.progress)
    progress.skip(done["epoch"] + summed.batches / steps)
    log, routing_log = Log(folder / "metrics.csv", done["epoch"]), Log(folder / "routing.csv", done["epoch"])
    loggers = []
    if training.fabric.is_global_zero:
        loggers = make_loggers(config.logger, folder, config.science(), done["epoch"])
    name = f"{folder.parent.name} seed {seed}"
    mark = time.perf_counter()
    with checkpoint.watch():
        for epoch in range(done["epoch"], config.epochs):
            training.model.train()
            batches = iter(training.batches("train", seed * 100_003 + epoch))
            if summed.batches:  # cut off inside this epoch: its batches are drawn again, and not trained on again
                for _ in itertools.islice(batches, summed.batches):
                    pass
                assert loaded is not None
                training.load_rng(draws)
            for batch, rows in _drawn(batches, training, checkpoint):
                training.step(batch, summed, rows)
                if steps > 1:
                    figures = f"step {summed.batches} of {steps}"
                    progress.show(name, epoch + summed.batches / steps, config.epochs, figures)
            row: dict[str, Any] = {"epoch": epoch, "lr": summed.lr, **summed.means()}
            _check_finite("loss", row["loss"], seed, epoch, config)
            last = epoch + 1 == config.epochs
            measured = last or (epoch + 1) % config.eval_every == 0
            row["val"] = training.evaluate("val")[0] if measured else None
            now = time.perf_counter()
            done["seconds"] += now - mark
            mark = now
            done["epoch"] = epoch + 1
            better = False
            if measured:
                _check_finite(task.metric_name, row["val"], seed, epoch, config)
                for figure, value in (("epoch", epoch + 1), ("loss", row["loss"]), ("val", row["val"])):
                    done["curve"][figure].append(round(value, 5))
                better = row["val"] > done["best_val"]
            if better:
                done |= {"best_val": row["val"], "best_epoch": epoch}
                best = training.weights()
            routed = routing_rows(summed.stats)
            log.write([row | {"seconds": done["seconds"]}])
            routing_log.write([{"epoch": epoch} | one for one in routed])
            _report(loggers, training, row, routed, epoch, better)
            summed = Epoch(training.lr)
            progress.show(name, epoch + 1, config.epochs, f"loss {row['loss']:.3f}, best {done['best_val']:.4f}")
            training.keep_rng()
            checkpoint.save() if last else checkpoint.tick()
    for logger in loggers:
        logger.close()
    progress.finish(config.epochs)
    if len(done["curve"]["val"]) > 1 and len(set(done["curve"]["val"])) == 1:
        print(f"{task.name}: validation never changed, so that the first epoch is selected", flush=True)
    training.use(best)
    return done


def _draws(loaded: dict[str, Any], fabric: Fabric) -> dict[str, Any] | None:
    """This process's generators of a checkpoint, or ``None`` where that is of another number of processes."""
    every = [loaded["training"], *loaded["others"]]
    return every[fabric.global_rank] if len(every) == fabric.world_size else None


def _drawn(batches: Iterator[Batch], training: Training, checkpoint: Checkpoint) -> Iterator[tuple[Batch, int]]:
    """The batches, and how many rows all processes' parts have; before each, and after the last, all processes agree
    on saving and stopping.

    Ctrl-C ends the processes that load them too, which is then no error.
    """
    while True:
        training.keep_rng()  # before the batch is drawn, which will be drawn again
        try:
            batch = next(batches, None)
        except RuntimeError:
            if checkpoint.signal is None:
                raise
            batch = None
        rows = checkpoint.tick(0 if batch is None else len(batch.target))
        if batch is None:
            return
        yield batch, rows


def _report(
    loggers: list[Logger], training: Training, row: dict[str, Any], routed: list[dict[str, Any]], epoch: int, draw: bool
) -> None:
    """Figures of an epoch for TensorBoard and the like; where validation is the best so far, expert maps too."""
    if not loggers:
        return
    values = {name: value for name, value in row.items() if name != "epoch" and value is not None}
    for layer in routed:
        values |= {
            f"layer_{layer['layer']}/{name}": value
            for name, value in layer.items()
            if name != "layer" and value is not None
        }
    maps = None
    if isinstance(training.config, ImageConfig) and training.config.model is None and draw and routed:  # a ViTMoE
        task = training.task
        pictures = next(iter(task.loader("val", 4, None))).inputs[0]
        maps = gmoe.plot.expert_maps(training.model.module, pictures, mean=task.mean, std=task.std)
    for logger in loggers:
        logger.log(values, epoch)
        if maps is not None:
            logger.draw("experts", maps, epoch)


@dataclass
class Training:
    """What is trained, and by what.

    Args:
        fabric: device and precision.
        model: set up by ``fabric``.
        optimizer: set up by ``fabric``.
        scheduler: steps with the optimizer.
        averaged: the moving average of the weights, if there is one.
        routings: what the last forward of the model routed, a list one a layer.
        config: the run.
        task: the data.
    """

    fabric: Fabric
    model: Any
    optimizer: Any
    scheduler: LambdaLR
    averaged: AveragedModel | None
    routings: list[Routing]
    config: RunConfig
    task: Task

    def __post_init__(self) -> None:
        self.keep_rng()

    def batches(self, split: Split, seed: int | None) -> Iterable[Batch]:
        """This process's slices of the batches of an epoch."""
        shard = (self.fabric.global_rank, self.fabric.world_size)
        return self.task.loader(split, self.config.batch_size, seed, shard)

    def forward(self, inputs: tuple[Any, ...]) -> Tensor:
        """Logits; ``routings`` are those of this call. At evaluation processes do not wait for each other."""
        self.routings.clear()
        if self.model.training:
            return self.model(*inputs)
        precision = self.fabric.strategy.precision
        with precision.forward_context():
            logits: Tensor = precision.convert_output(self.model.module(*precision.convert_input(inputs)))
        return logits

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self, batch: Batch, summed: Epoch, total: int) -> None:
        """One step of the optimizer, whose losses and routings are added to the epoch.

        Args:
            batch: this process's part.
            summed: the epoch so far.
            total: the rows of all processes' parts.
        """
        rows = len(batch.target)
        share_of_mean = rows * self.fabric.world_size / total
        batch = self.fabric.to_device(batch)
        self.optimizer.zero_grad()
        logits = batch.counted(self.forward(batch.inputs))
        loss = self.task.loss(logits, batch.target) if rows else logits.sum()
        aux = gmoe.aux_loss(self.routings).to(loss.device)
        self.fabric.backward(share_of_mean * loss + aux)  # DDP takes the mean of the processes' gradients
        if self.config.clip_norm:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model.module)
        losses = {
            f"{name}_{layer}": value.value
            for layer, routing in enumerate(self.routings)
            for name, value in routing.losses.items()
        }
        summed.add({"loss": loss, "aux": aux} | losses, self.routings, rows)

    def train_epoch(self, shuffle_seed: int) -> dict[str, float]:
        """One pass over the training set; see :meth:`Epoch.means`."""
        self.model.train()
        summed = Epoch(self.lr)
        for batch in self.batches("train", shuffle_seed):
            self.step(batch, summed, sum(*numbers_of_all(len(batch.target))))
        return summed.means()

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, list[list[Routing]]]:
        """The metric over a split, and the routings: a list a batch, in it one a layer; none of validation's batches.

        Of several processes the first one evaluates whole graphs and the test set, whose routings it alone returns; the
        batches of validation are shared out.
        """
        config, fabric = self.config, self.fabric
        whole_graph = isinstance(config, GraphConfig | HeteroConfig) and config.evaluation != "sampled"
        alone = whole_graph or split == "test"
        with self._averaged():
            share(self.model.module.buffers())  # batch norms have counted what each process saw
            value, routings = 0.0, list[list[Routing]]()
            if fabric.is_global_zero or not alone:
                value, routings = self._evaluate(split, alone)
        return fabric.broadcast(value), routings

    def _evaluate(self, split: Split, alone: bool) -> tuple[float, list[list[Routing]]]:
        task, config, device = self.task, self.config, self.fabric.device
        self.model.eval()
        metric = task.metric().to(device)
        if alone:
            metric.distributed_available_fn = lambda: False
        if isinstance(config, GraphConfig) and config.evaluation == "layerwise":
            assert task.graph is not None
            assert task.split is not None
            gnn: Any = self.model.module
            graph = task.graph
            if config.precision == "64-true":
                graph = copy.copy(graph).apply(lambda value: value.double() if value.is_floating_point() else value)
            with self.fabric.autocast():
                logits, routings = gnn.inference(graph, device, batch_size=config.batch_size, return_routing=True)
            rows = task.split[split]
            metric.update(logits[rows].to(device), task.graph.y[rows].to(device))
            return float(metric.compute()), [routings]
        kept = []
        for batch in task.loader(split, config.batch_size, None) if alone else self.batches(split, None):
            batch = self.fabric.to_device(batch)
            logits = batch.counted(self.forward(batch.inputs))
            if len(logits):
                metric.update(logits, batch.target)
            if alone:  # nobody reads those of validation, of which there may be millions
                kept.append(list(self.routings))
        return float(metric.compute()), kept

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has the averaged weights, where there are any."""
        if self.averaged is None:
            yield
            return
        own = _copy(self.model)
        self.model.load_state_dict(self.averaged.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights that are evaluated."""
        return _copy(self.model if self.averaged is None else self.averaged.module)

    def use(self, weights: dict[str, Tensor]) -> None:
        """Evaluate these weights."""
        self.model.load_state_dict(weights)
        if self.averaged is not None:
            self.averaged.module.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on; the generators are this process's at :meth:`keep_rng`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.scheduler.last_epoch,
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            **self._rng,
        }

    def load(self, state: dict[str, Any], draws: dict[str, Any] | None) -> None:
        """Go on from :meth:`state`, and with the generators of ``draws``; without, they stay as they are."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # anew, since a run that goes on for more epochs has another schedule
        self.scheduler = LambdaLR(self.optimizer.optimizer, self.scheduler.lr_lambdas[0], last_epoch=state["step"] - 1)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.load_rng(draws)

    def keep_rng(self) -> None:
        """Remember the generators for :meth:`state`."""
        self._rng = {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}

    @staticmethod
    def load_rng(draws: dict[str, Any] | None) -> None:
        """Draw on as :meth:`state` would have."""
        if draws is not None:
            torch.set_rng_state(draws["rng"])
            torch.cuda.set_rng_state_all(draws["cuda_rng"])


@contextmanager
def set_up(fabric: Fabric, model: nn.Module, config: RunConfig, task: Task) -> Iterator[Training]:
    """Model, optimizer, schedule and average, ready to train; the routings are recorded as long as it lasts."""
    average = None
    if config.ema:
        dtype = torch.float64 if config.precision == "64-true" else None
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)).to(fabric.device, dtype)
    with routings_of(model) as routings:  # before compilation, which would not see hooks that come later
        if config.compile:
            model.compile()
        ready, optimizer = fabric.setup(model, make_optimizer(config, model))
        steps = config.epochs * task.steps(config.batch_size)
        scheduler = LambdaLR(optimizer.optimizer, lambda step: learning_rate(config, step, steps))
        with attention_kernel(fabric.device, config):
            yield Training(fabric, ready, optimizer, scheduler, average, routings, config, task)


def attention_kernel(device: torch.device, config: RunConfig) -> AbstractContextManager[None]:
    """torch's choice of kernel for attention, but plain products in bf16 on the CPU.

    There the backward of the fused kernel takes three times what it takes in fp32: 40 % of a step of a ViT on CIFAR-10.
    """
    if device.type == "cpu" and config.precision == "bf16-mixed":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _followed(task: Task, routings: list[list[Routing]]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The planted experts and the properties of the nodes, where they were routed all at once."""
    graph = task.graph
    if not isinstance(graph, Data) or len(routings) != 1:
        return None, {}
    whole = {routing.num_tokens for routing in routings[0]} == {graph.num_nodes}
    return (task.planted, node_properties(graph)) if whole else (None, {})


@contextmanager
def routings_of(model: nn.Module) -> Iterator[list[Routing]]:
    """:func:`gmoe.record_routing` for models that may be dense."""
    if any(isinstance(module, Router) for module in model.modules()):
        with gmoe.record_routing(model) as routings:
            yield routings
    else:
        yield []


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW; no weight decay on biases, norms, temperatures, centroids, class tokens and positions."""
    spared = ("bias", "centroid", "log_temperature", "class_token", "pos_embedding")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]  # a gain is decayed, towards the dense model: it scales weights that are
        spare = (parameter.dim() < 2 and leaf != "gain") or leaf in spared
        (plain if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizers[config.optimizer](groups, lr=config.lr)


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """The factor of the learning rate at a step of ``steps``."""
    if config.schedule == "constant":
        return 1.0
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def restart_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from here on: on a GPU, and where the system is Linux; elsewhere it cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory in use since :func:`restart_peak_memory`, in MiB: on a GPU what torch allocated, else the whole
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10  # of the unit that the system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
