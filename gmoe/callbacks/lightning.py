"""The health of experts, where Lightning logs."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from gmoe.metrics import HealthMonitor


class LightningHealth(Callback):
    """Log how evenly experts are used, every ``log_every_n_steps`` of Lightning's trainer.

    The figures are those of :func:`gmoe.expert_health`, over all training since the
    last log and over all processes. They go to all loggers and to ``trainer.callback_metrics``. If
    a few experts have nearly all of the load, a warning says once what to do.

    Example:
        >>> trainer = L.Trainer(max_epochs=10, callbacks=[gmoe.LightningHealth()])
        >>> trainer.fit(module, loader)
    """

    def __init__(self) -> None:
        self.monitor = HealthMonitor()
        self.logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; see ``gmoe.metrics.HealthMonitor``."""
        self.monitor.watch(pl_module)
        self.logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the health after every so many steps, each of which may take several batches."""
        step = trainer.global_step
        # Lightning sets it without declaring it, to 0 where it logs nothing.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self.monitor.stats or not every or step < self.logged_step + every:
            return
        self.logged_step = step
        figures = self.monitor.collect(advises=trainer.is_global_zero).figures()
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step - 1)  # as Lightning numbers the step
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in figures.items()}
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no more."""
        self.monitor.remove()
