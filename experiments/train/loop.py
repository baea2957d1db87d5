"""The training loop of graphs and images: from the seeds of a run to the batches of an epoch."""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from experiments.train.build import build_model, costs_of, init_centroids
from experiments.train.checkpoint import Checkpoint
from experiments.train.command_line import SPARSE
from experiments.train.config import RunConfig
from experiments.train.data.task import Batch, Task
from experiments.train.files import naming
from experiments.train.kinds import kind_of
from experiments.train.logs import Logs
from experiments.train.processes import from_first, make_fabric
from experiments.train.progress import Progress
from experiments.train.results import Result, Summary, commit, write_json
from experiments.train.routing_stats import routing_summary
from experiments.train.run_folder import begin, described, so_far
from experiments.train.summary import summarize
from experiments.train.training import Reached, Training, get_rng, lr_factors, set_rng, set_up


def run(config: RunConfig, progress: Progress | None = None) -> Summary:
    """Train all seeds of a run, write its folder, and return its summary.

    What the folder holds of the same run is continued: a finished run is only read; to one of
    fewer seeds, the others are added. Of several processes the first one writes, and all return
    what it does. What cannot be run is a ``ValueError``; SIGINT and SIGTERM raise
    :class:`InterruptedRunError` when the folder holds what was trained.
    """
    commit()  # read it now: others may commit while this trains
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
            fabric,
            lambda: summarize(
                config.folder(), described(config), [results[seed] for seed in config.seeds]
            ),
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
        warnings.filterwarnings("ignore", SPARSE)
        # A class token's, of one image
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")
        with fabric.rank_zero_first(local=True):  # who downloads what is missing
            task_of = kind_of(config).tasks()
        return {seed: train_seed(fabric, config, task_of(seed), seed, progress) for seed in seeds}


def train_seed(
    fabric: Fabric, config: RunConfig, task: Task, seed: int, progress: Progress
) -> Result:
    """Train with one seed and evaluate: validation selects the epoch, the test set is read once,
    at the end.

    An unfinished checkpoint is resumed. Of several processes the first one's figures of the
    routing are right.
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
    lr_factors(config, model)  # refuses parts that the model does not have
    if fabric.world_size > 1:  # from here on each process draws its own
        torch.manual_seed(seed + (fabric.global_rank << 50))
    with locked(fabric, folder):
        begin(config)
        with set_up(fabric, model, config, task) as training:
            reached = fit(training, seed, folder, progress)
            test, routings = training.evaluate("test")
            val = reached.best_val
        result: Any = {
            "seed": seed,
            "epochs": config.epochs,
            "metric": task.metric_name,
            "val": val,
            "test": test,
            **training.beside,
            "best_epoch": reached.best_epoch,
            "seconds": round(reached.seconds, 2),
            **of_images(task, reached),
            "peak_memory": torch.cuda.max_memory_allocated(fabric.device) // 2**20
            if is_on_gpu
            else None,
            **costs,
            "routing": routing_summary(routings, task),
            "curve": reached.curve,
        }
        write_json(folder / "result.json", result)
    return result


def of_images(task: Task, reached: Reached) -> dict[str, float]:
    """How many images a second are trained on, if the data are images."""
    if task.kind != "image" or not reached.rows_seconds:
        return {}
    return {"images_per_second": round(reached.rows / reached.rows_seconds, 1)}


def locked(fabric: Fabric, folder: Path) -> AbstractContextManager[Any]:
    """Refuse a seed that another process trains."""
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
    """Train for the epochs that are to come.

    Leaves the model with the weights that validation selects.
    """
    config = training.config
    steps = training.task.steps(config.step_size)
    checkpoint = Checkpoint(training.fabric, folder / "checkpoint", training.state)
    loaded = checkpoint.load()
    if loaded is not None:
        with naming(checkpoint.path):  # a state of another model, or of none
            training.load(loaded)
    reached = training.reached
    name = f"{folder.parent.name} seed {seed}"
    progress.skip(reached.epochs + training.epoch.batches / steps)
    logs = Logs(folder, config, keep=reached.epochs)
    training.clock = time.perf_counter()
    with checkpoint:
        while reached.epochs < config.epochs:
            epoch = reached.epochs
            trained = 0
            began = time.perf_counter()
            for batch, rows in batches_left(
                training, checkpoint, shuffle_seed=seed * 100_003 + epoch
            ):
                training.step(batch, rows)
                trained += rows
                if steps > 1:
                    figures = f"step {training.epoch.batches} of {steps}"
                    progress.show(
                        name, epoch + training.epoch.batches / steps, config.epochs, figures
                    )
            reached.rows += trained
            reached.rows_seconds += time.perf_counter() - began
            row, layers = training.end_epoch(seed)
            logs.write(row, layers)
            progress.show(
                name,
                reached.epochs,
                config.epochs,
                f"loss {row['loss']:.3f}, best {reached.best_val:.4f}",
            )
            if reached.epochs == config.epochs:
                checkpoint.save()
            checkpoint.tick()  # a signal may have come while an epoch ended
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
    """What an epoch has left to train on: this process's part of each batch, and how many rows all
    parts have.

    Before each batch, and after the last, all processes agree on saving and stopping.
    """
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
