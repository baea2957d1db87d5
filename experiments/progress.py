"""How far a command is, for whoever waits: a bar or lines in the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

LINES = 20
"""So many lines a seed, where the output is a file."""
SECONDS = 30.0
"""A line at least so often."""


def show_progress_of(name: str) -> None:
    """Show what a package logs of long work, as k-means of centroids is."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger(name).setLevel(logging.INFO)


class Progress:
    """Epochs over all seeds and variants of a command, with an estimate of the time that is left.

    Args:
        epochs: of all seeds and variants together.
        shown: whether anything is shown (default ``True``): a bar in a terminal, elsewhere a line every few epochs.
    """

    def __init__(self, epochs: float, shown: bool = True) -> None:
        self.total, self.done = epochs, 0.0
        self._begun, self._skipped = time.monotonic(), 0.0
        self._last = (self._begun, 0.0)
        in_terminal = sys.stderr.isatty()
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {postfix}"
        self._bar = tqdm(total=epochs, disable=not (shown and in_terminal), bar_format=form, leave=False)
        self._lines = shown and not in_terminal

    def skip(self, epochs: float) -> None:
        """So many of a seed were done before, and are no part of the estimate."""
        self._skipped += epochs

    def show(self, name: str, epoch: float, epochs: int, figures: str) -> None:
        """Where a seed is; whole epochs, or parts of one."""
        now = time.monotonic()
        done = self.done + epoch
        spent, share = now - self._begun, done - self._skipped
        left = timedelta(seconds=round(spent / share * (self.total - done))) if share > 0 else "?"
        self._bar.n = min(done, self.total)
        self._bar.set_description_str(name, refresh=False)
        self._bar.set_postfix_str(f"{figures}, {left} left", refresh=False)
        self._bar.update(0)
        last_time, last_epoch = self._last
        due = epoch >= epochs or epoch - last_epoch >= max(epochs / LINES, 1) or epoch < last_epoch
        if self._lines and ((due and epoch == int(epoch)) or now - last_time > SECONDS):
            print(f"{name}: epoch {epoch:.3g} of {epochs}, {figures}; about {left} left", file=sys.stderr, flush=True)
            self._last = (now, epoch)

    def finish(self, epochs: int) -> None:
        """A seed is done."""
        self.done += epochs
        self._last = (self._last[0], 0.0)
        if self.done >= self.total:
            self._bar.close()


class WandB:
    """A run of the project ``gmoe`` at Weights & Biases, for which Fabric has no logger."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        name = f"{folder.parent.name}-{folder.name}"
        self._run = wandb.init(project="gmoe", name=name, id=name, resume="allow", dir=str(folder), config=config)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Numbers by name."""
        self._run.log(metrics, step=step)

    def save(self) -> None:
        """It does so itself."""

    def finalize(self, status: str) -> None:
        """End the run."""
        self._run.finish()


def make_loggers(names: Sequence[str], folder: Path, config: dict[str, Any], epoch: int) -> list[Any]:
    """The loggers of a seed, beside its CSV files, in the interface of Fabric's.

    Args:
        names: ``"tensorboard"``, ``"wandb"``.
        folder: ``seed-N`` of the run folder.
        config: the run, as JSON.
        epoch: at which it begins, or goes on; what TensorBoard has behind it is hidden.
    """
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    made: list[Any] = []
    if "tensorboard" in names:
        made.append(TensorBoardLogger(folder, "", "tensorboard", default_hp_metric=False, purge_step=epoch or None))
        made[0].log_hyperparams(config)
    return [*made, WandB(folder, config)] if "wandb" in names else made
