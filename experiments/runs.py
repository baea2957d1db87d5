"""A run: its folder, its summary, and where it was made."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from experiments.build import try_model
from experiments.config import TrainConfig
from experiments.data import Task, load_tasks
from experiments.loop import make_fabric, train_seed
from gmoe.metrics import PER_EXPERT


def run(config: TrainConfig) -> dict[str, Any]:
    """Train all seeds of a run, write its folder, and return its summary. A finished run is only read; to one of fewer
    seeds, the others are added.

    Raises:
        ValueError: the folder is not empty and ``resume`` is off, or it holds a run of another configuration.
    """
    folder = config.folder()
    if folder.exists() and any(folder.iterdir()) and not config.resume:
        raise ValueError(f"out: got {folder}, which is not empty; expected a new folder, or --resume to go on with it")
    fewer_seeds = _same_run(folder / "config.json", config)
    finished = folder / "summary.json"
    if finished.exists() and not fewer_seeds:
        summary: dict[str, Any] = json.loads(finished.read_text())
        return summary
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        task_of = load_tasks(config)
        make_fabric(config)
        task = task_of(config.seeds[0])
        try_model(config, task)  # refuses what cannot be run before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        finished.unlink(missing_ok=True)  # before the configuration says that more seeds belong to it
        write_json(folder / "config.json", config.science())
        if task.kind == "image":
            names = ("in_channels", "num_classes", "classes", "mean", "std")
            write_json(folder / "images.json", {name: getattr(task, name) for name in names})
        results = [_finished(config, task_of, seed, folder / f"seed-{seed}") for seed in config.seeds]
    summary = summarize(config, results)
    write_json(finished, summary)
    return summary


def _finished(config: TrainConfig, task_of: Callable[[int], Task], seed: int, part: Path) -> dict[str, Any]:
    """The result of a seed, which is trained where it has none."""
    result = part / "result.json"
    if not result.exists():
        write_json(result, train_seed(config, task_of(seed), seed, part))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _same_run(path: Path, config: TrainConfig) -> bool:
    """Refuse a folder of another run; whether it holds this run with fewer seeds."""
    if not path.exists():
        return False
    differences = config.differences(json.loads(path.read_text()))
    fewer_seeds = "seeds" in differences and set(differences["seeds"][0]) < set(config.seeds)
    if fewer_seeds:
        del differences["seeds"]
    for name, (there, here) in sorted(differences.items()):
        raise ValueError(
            f"out: {path.parent} holds a run with {name}={there!r}, expected {here!r}; choose another folder"
        )
    return fewer_seeds


def summarize(config: TrainConfig, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and n over the seeds, with all that is needed to repeat the run."""
    first = results[0]
    return {
        "metric": first["metric"],
        "val": spread([result["val"] for result in results]),
        "test": spread([result["test"] for result in results]),
        "best_epoch": spread([result["best_epoch"] for result in results]),
        "seconds": spread([result["seconds"] for result in results]),
        "peak_memory": max(result["peak_memory"] for result in results),
        **{name: first[name] for name in ("flops", "parameters", "active_parameters", "matched", "hidden", "steps")},
        "routing": [
            {
                name: spread([result["routing"][layer][name] for result in results])
                for name in first["routing"][layer]
                if name not in PER_EXPERT
            }
            for layer in range(len(first["routing"]))
        ],
        "curve": {
            "epoch": first["curve"]["epoch"],
            **{name: [result["curve"][name] for result in results] for name in ("loss", "val")},
        },
        "config": config.science(),
        "environment": environment(),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (``None`` at n = 1), n, and the values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": values,
    }


def environment() -> dict[str, Any]:
    """Commit, hardware and versions."""
    root = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    packages = ("torch", "torch-geometric", "torchvision", "lightning-fabric", "scikit-learn", "numpy")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    fresh.replace(path)
