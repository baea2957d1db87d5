"""What a seed logs each epoch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pandas as pd
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.utilities import rank_zero_only

from experiments.train.checks import check
from experiments.train.config import RunConfig
from experiments.train.files import read_csv, replacing, writing


class Log:
    """A CSV file of one row or several an epoch, on disk at once.

    Rows behind ``keep`` epochs, the checkpoint's, go.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        if not keep:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        # The last may be half a row
        rows = read_csv(path, dtype=str, keep_default_na=False, on_bad_lines="skip")
        check("epoch" in rows, str(path), f"columns {', '.join(rows)[:99]}", "epoch among them")
        epoch = pd.to_numeric(rows["epoch"], errors="coerce")
        kept = rows[(epoch < keep) & (epoch >= epoch.cummax())]  # 12 cut off after a digit is no 1
        with replacing(path) as fresh:
            kept.to_csv(fresh, index=False)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows, if there are any; a new file gets their names first."""
        if rows:
            is_new = not self.path.exists()
            with writing(self.path):
                pd.DataFrame(rows).to_csv(self.path, mode="a", index=False, header=is_new)


class Logs:
    """What a seed logs each epoch: metrics.csv, routing.csv, and in TensorBoard and Weights &
    Biases where asked for.

    ``folder`` is ``seed-N`` of the run folder; what is logged behind ``keep`` epochs goes.
    """

    @rank_zero_only
    def __init__(self, folder: Path, config: RunConfig, keep: int) -> None:
        self.metrics = Log(folder / "metrics.csv", keep)
        self.routing = Log(folder / "routing.csv", keep)
        self.tensorboard = self.wandb = None
        name = f"{folder.parent.name}-{folder.name}"
        options = config.science()
        if "tensorboard" in config.logger:
            purge = keep or None
            self.tensorboard = TensorBoardLogger(
                folder, "", "tensorboard", default_hp_metric=False, purge_step=purge
            )
            self.tensorboard.log_hyperparams(options)
        if "wandb" in config.logger:
            import wandb

            # Not that of another folder
            own = f"{name}-{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]}"
            self.wandb = wandb.init(
                project="gmoe", name=name, id=own, resume="allow", dir=str(folder), config=options
            )

    @rank_zero_only
    def write(self, row: dict[str, Any], layers: list[dict[str, Any]]) -> None:
        """The figures of an epoch, and of each of its MoE layers."""
        epoch = row["epoch"]
        self.metrics.write([row])
        self.routing.write([{"epoch": epoch} | layer for layer in layers])
        for layer in layers:
            row = row | {
                f"layer_{layer['layer']}/{name}": value
                for name, value in layer.items()
                if name != "layer"
            }
        figures = {
            name: value for name, value in row.items() if value is not None and name != "epoch"
        }
        if self.tensorboard is not None:
            self.tensorboard.log_metrics(figures, epoch)
            self.tensorboard.save()
        if self.wandb is not None:
            self.wandb.log(figures, step=epoch)

    @rank_zero_only
    def close(self) -> None:
        """End the logs of other programs."""
        if self.tensorboard is not None:
            self.tensorboard.finalize("success")
        if self.wandb is not None:
            self.wandb.finish()
