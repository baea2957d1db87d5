"""What a finished run left behind, read back and checked; and its model."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from experiments.build import build_model
from experiments.config import RunConfig, restore
from experiments.data import Split, Task, load_tasks
from experiments.routing_stats import load_routings
from experiments.runs import described
from gmoe import Routing

Rows = list[dict[str, float | None]]
SUMMARY = ("metric", "val", "test", "flops", "parameters", "active_parameters", "seconds", "peak_memory", "curve")
"""What a summary holds, of that which is read here."""


@dataclass(frozen=True, kw_only=True)
class SeedLog:
    """What one seed left.

    Args:
        metrics: a row an epoch.
        routing: a row an epoch and layer, of the training steps; none of a dense model.
        routings: of the test split (of a graph: of all nodes), one a layer.
    """

    metrics: Rows
    routing: Rows
    routings: list[Routing]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A finished run.

    Args:
        folder: where it lies.
        name: by which people know it, at first that of the folder.
        config: the run; its data root is that of :func:`read_run`.
        science: config.json.
        summary: summary.json.
        seeds: by seed.
    """

    folder: Path
    name: str
    config: RunConfig
    science: dict[str, Any]
    summary: dict[str, Any]
    seeds: dict[int, SeedLog]

    def load_task(self, seed: int) -> Task:
        """The data, as that seed saw them.

        Raises:
            ValueError: they are not those that the run was trained on, or broken.
            FileNotFoundError: they are not there.
        """
        here = described(self.config).get("digest")
        there = self.science.get("digest")
        if here is None and there is not None:
            raise FileNotFoundError(f"{self.config.data_root}: has no data of {self.config.dataset}; give --data-root")
        if here != there:
            raise ValueError(f"{self.config.data_root}: holds other data than {self.folder} was trained on")
        return load_tasks(self.config)(seed)


def load_model(folder: Path, config: RunConfig, task: Task, seed: int) -> nn.Module:
    """The model of a run with the weights that validation selected, ready to evaluate.

    Raises:
        ValueError: the weights cannot be read, or are not those of the model.
    """
    path = folder / f"seed-{seed}" / "checkpoint" / "best.safetensors"
    model = build_model(config, task)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    return model.eval()


def image_task_of(folder: Path) -> Task:
    """The task of an image run without its data.

    Raises:
        ValueError: the run is not one of images, or its images.json is broken.
    """
    path = folder / "images.json"
    if (folder / "config.json").exists() and not path.exists():
        raise ValueError(f"{path}: is missing, expected the run of an image model")
    found = _json(path)
    try:
        return Task(
            name=folder.name,
            kind="image",
            in_channels=int(found["in_channels"]),
            num_classes=int(found["num_classes"]),
            metric_name="",
            metric=MulticlassAccuracy,
            loader=_no_data,
            classes=tuple(found["classes"]),
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not what a run of images writes ({type(error).__name__}: {error})") from error


def _no_data(split: Split, batch_size: int, seed: int | None) -> NoReturn:
    raise RuntimeError("the data of this run were not loaded")


def read_config(folder: Path, data_root: Path) -> RunConfig:
    """config.json of a run.

    Raises:
        ValueError: there is none, or it is broken; names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder, expected that of a run")
    path = folder / "config.json"
    try:
        return restore(_json(path), data_root)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_run(folder: Path, data_root: Path | None = None) -> RunFolder:
    """Read a run folder.

    Args:
        folder: what ``experiments.train --out`` wrote.
        data_root: where the data of the run are here (default: where it was trained on them, or ``data``).

    Raises:
        ValueError: the run is not finished, or a file is broken; names the file.
    """
    config = read_config(folder, data_root or _trained_on(folder))
    science = _json(folder / "config.json")
    summary = _json(folder / "summary.json", "the run is not finished: go on with --resume")
    missing = [name for name in (*SUMMARY, "config") if name not in summary]
    if missing:
        raise ValueError(f"{folder / 'summary.json'}: has no {', '.join(missing)}")
    seeds = {}
    for seed in config.seeds:
        part = folder / f"seed-{seed}"
        saved = folder / "routing" / f"seed-{seed}.safetensors"
        dense = not saved.exists() and (config.router == "dense" or config.model is not None)
        routings = [] if dense else load_routings(saved)
        seeds[seed] = SeedLog(
            metrics=_rows(part / "metrics.csv", config.epochs),
            routing=[] if dense else _rows(part / "routing.csv", config.epochs * len(routings)),
            routings=routings,
        )
    return RunFolder(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        science=science,
        summary=summary,
        seeds=seeds,
    )


def _trained_on(folder: Path) -> Path:
    """The data root of a run, if it is there."""
    path = folder / "where.json"
    root = Path(str(_json(path).get("data_root"))) if path.exists() else Path("data")
    return root if root.exists() else Path("data")


def _json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing{'; ' if hint else ''}{hint}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected an object")
    return found


def _rows(path: Path, expected: int) -> Rows:
    try:
        with path.open(newline="") as file:
            rows: Rows = [
                {name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)
            ]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: is no table of numbers ({error})") from error
    if not rows or any(None in row for row in rows):  # a row longer than the header
        raise ValueError(f"{path}: is empty or has rows that are longer than its header")
    if len(rows) != expected:
        raise ValueError(f"{path}: got {len(rows)} rows, expected {expected}: one an epoch, or an epoch and layer")
    return rows
