"""What result files hold: figures over seeds, and where they were measured."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired

import torch
from lightning_fabric.utilities import rank_zero_only
from typing_extensions import TypedDict

from experiments.train.files import replacing

NUMBERS = re.compile(r"\[\n([-+.\deE,\s]+)\]")
"""A list of numbers in indented JSON, one a line; no string of JSON holds a line break."""


class Spread(TypedDict):
    """Mean, sample standard deviation (``None`` at n = 1), n, and the values."""

    mean: float
    std: float | None
    n: int
    values: list[float]


class Costs(TypedDict):
    """What results and summaries share: the metric, and what the model costs."""

    metric: str
    flops: int  # before training; of a summary the mean over seeds
    images: int | None  # in the batch that these are of
    parameters: int
    active_parameters: int
    matched: float | None
    hidden: int | None
    steps: int
    peak_memory: int | None  # of the GPU, MiB


class Summary(Costs):
    """``summary.json`` of a run."""

    val: Spread
    test: Spread
    top5: NotRequired[Spread]  # of images of more than five classes, on the test set
    best_epoch: Spread
    seconds: Spread
    images_per_second: NotRequired[Spread]  # in training
    routing: list[dict[str, Spread]]
    curve: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]


class Result(Costs):
    """``result.json`` of a seed."""

    seed: int
    epochs: int
    val: float
    test: float
    top5: NotRequired[float]
    best_epoch: int
    seconds: float
    images_per_second: NotRequired[float]
    routing: list[dict[str, Any]]
    curve: dict[str, list[float]]


def flops_of(summary: Summary) -> tuple[float, str]:
    """Active FLOPs per image, or of anything else per forward pass."""
    images = summary["images"]
    if images is None:
        return summary["flops"], "per forward pass"
    return summary["flops"] / images, "per image"


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation of some values."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


@cache
def commit() -> str:
    """The commit of the code, with ``-dirty`` if files differ from it; empty if there is none.

    It is read once: a run that asks when it begins states the code that it has loaded, whatever
    is committed meanwhile.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.strip()


def environment() -> dict[str, Any]:
    """Commit, hardware and versions."""
    state = commit()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    packages = (
        "torch",
        "torch-geometric",
        "torchvision",
        "lightning-fabric",
        "scikit-learn",
        "numpy",
    )
    return {
        "commit": state.removesuffix("-dirty") or None,
        "dirty": state.endswith("-dirty"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@rank_zero_only
def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step, a list of numbers on one line; of several processes the first one
    does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, allow_nan=False)
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with replacing(path) as fresh:
        fresh.write_text(text + "\n")
