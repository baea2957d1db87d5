"""What a run keeps on disk while it lasts: its state, and a row an epoch."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


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
        """The state, or ``None`` where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.folder / "state.ckpt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: cannot be read ({reason}); delete it to begin this seed anew") from error
        return state


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
