"""A run: its folder, its summary, and where it was made."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric
from lightning_fabric.utilities import rank_zero_only

from experiments.config import PROCESSES, RunConfig
from experiments.data import Task, load_tasks
from experiments.digest import file_digest, images_digest
from experiments.loggers import check_loggers
from experiments.loop import prepare, train_seed
from experiments.processes import from_first, make_fabric
from experiments.progress import Progress
from gmoe.metrics import PER_EXPERT


def place(config: RunConfig) -> Path:
    """The folder of a run: ``out``; else with ``resume`` the last of its name, or the first that is free, by number.

    Raises:
        ValueError: ``out`` holds something, and is not to be resumed.
    """
    base = config.folder()
    if config.out is not None:
        if _holds_something(base) and not config.resume:
            raise ValueError(f"out: got {base}, which holds files; choose another folder, or continue it with --resume")
        return base
    folders = (base if number == 1 else base.parent / f"{base.name}-{number}" for number in itertools.count(1))
    taken = list(itertools.takewhile(_holds_something, folders))
    if config.resume and taken:
        return taken[-1]
    return base.parent / f"{base.name}-{len(taken) + 1}" if taken else base


def _holds_something(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


IMAGE_FOLDERS = ("cifar10", "imagenette", "images")
"""Image data that may be any files in folders; the others are the published ones, or refused."""


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train all seeds of a run, write its folder, and return its summary.

    What the folder holds of the same run is continued: a finished run is only read; to one of fewer seeds, the others
    are added; one of fewer epochs goes on, which its configuration records as ``extended``, since the schedule is
    recomputed and the run is not what it would have been in one go; so is another number of processes, as ``moved``.

    Of several processes the first one writes, and all return what it does.

    Raises:
        ValueError: the folder holds a run of another configuration, or what is asked for cannot be run.
        InterruptedRunError: SIGINT or SIGTERM in training; the folder holds what was trained.
    """
    folder = config.folder()
    fabric = make_fabric(config)  # before data are read
    found, summary, results = from_first(fabric, lambda: so_far(config))
    progress = progress or Progress(len(config.seeds) * config.epochs, config.progress and fabric.is_global_zero)
    if summary is not None:
        progress.skip(len(config.seeds) * config.epochs)
        progress.finish(len(config.seeds) * config.epochs)
        return summary
    for _ in results:
        progress.skip(config.epochs)
        progress.finish(config.epochs)
    results |= _train(fabric, config, found, [seed for seed in config.seeds if seed not in results], progress)
    made: dict[str, Any] = from_first(fabric, lambda: summarize(found, [results[seed] for seed in config.seeds]))
    write_json(folder / "summary.json", made)
    return made


def train_one(config: RunConfig, seed: int) -> None:
    """Train a seed of a run, if its folder lacks it; :func:`run` then makes the summary.

    Raises:
        ValueError, InterruptedRunError: as :func:`run`.
    """
    found, summary, results = so_far(config)
    if summary is None and seed not in results:
        _train(make_fabric(config), config, found, [seed], Progress(config.epochs, shown=False))


def _train(
    fabric: Fabric, config: RunConfig, found: dict[str, Any], seeds: list[int], progress: Progress
) -> dict[int, dict[str, Any]]:
    """The results of seeds, which are written too."""
    results: dict[int, dict[str, Any]] = {}
    if not seeds:
        return results
    check_loggers(config.logger)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # a class token's, of one image
        with fabric.rank_zero_first(local=True):  # who downloads what is missing
            task_of = load_tasks(config)
        for seed in seeds:
            task = task_of(seed)
            prepared = prepare(config, task, seed)  # refuses what cannot be run before anything is written
            part = config.folder() / f"seed-{seed}"
            with _locked(fabric, part):
                _begin(config, found, task)
                results[seed] = train_seed(config, task, seed, part, prepared, progress)
                write_json(part / "result.json", results[seed])
    return results


@contextmanager
def _locked(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Refuse a seed that others are training: seeds of one run may be trained side by side, one seed may not."""
    lock = FileLock(folder / "lock", timeout=0)

    def is_taken() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            return True
        return False

    if from_first(fabric, is_taken):
        raise ValueError(f"out: {folder} is being trained by another process; wait for it, or choose another folder")
    try:
        yield
    finally:
        lock.release()


def so_far(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """What config.json is to hold; the summary of a finished run; and the results of finished seeds."""
    folder = config.folder()
    found = described(config)
    before = _same_run(folder / "config.json", config)
    if before is None:
        return found, json.loads((folder / "summary.json").read_text()), {}
    results = {}
    for seed in config.seeds:
        path = folder / f"seed-{seed}" / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if result and result.get("epochs", config.epochs) == config.epochs:
            results[seed] = result
    return found | before, None, results


def described(config: RunConfig) -> dict[str, Any]:
    """The configuration as ``config.json`` holds it: what numbers depend on, and digests of files of the user's own."""
    found = config.science()
    if config.data is None and config.dataset == "graph":
        found |= {"file": config.data_root.name, "digest": file_digest(config.data_root)}
    if config.data is None and config.dataset in IMAGE_FOLDERS:
        found["digest"] = images_digest(config.dataset, config.data_root)
    return found


def differences_of(config: RunConfig, there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a run that is :func:`described` by ``there`` is another one: its value and this one's."""
    here = described(config)
    own = {name: (there.get(name), here.get(name)) for name in ("file", "digest")}
    return config.differences(there) | {name: pair for name, pair in own.items() if pair[0] != pair[1]}


@rank_zero_only
def _begin(config: RunConfig, found: dict[str, Any], task: Task) -> None:
    """Write what a run is, before what it gives."""
    folder = config.folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # before the configuration says that there is more to it
    write_json(folder / "config.json", found)
    write_json(folder / "where.json", {"data_root": str(config.data_root.absolute())})
    if task.kind == "image":
        names = ("in_channels", "num_classes", "classes", "mean", "std")
        write_json(folder / "images.json", {name: getattr(task, name) for name in names})


def _same_run(path: Path, config: RunConfig) -> dict[str, list[dict[str, int]]] | None:
    """Refuse a folder of another run. Where there is something to do: how often it was given more epochs, as
    ``extended``, or went on with another number of processes, as ``moved``."""
    if not path.exists():
        return {}
    there = json.loads(path.read_text())
    differences = differences_of(config, there)
    found = {name: list(there[name]) for name in ("extended", "moved") if name in there}
    before, world = there.get("devices", 1) * there.get("nodes", 1), config.devices * config.nodes
    if before != world:
        found.setdefault("moved", []).append({"from": before, "to": world})
    for name in PROCESSES:
        differences.pop(name, None)
    more = False
    if "seeds" in differences and set(differences["seeds"][0]) < set(config.seeds):
        del differences["seeds"]
        more = True
    if "epochs" in differences and differences["epochs"][0] < config.epochs:
        found.setdefault("extended", []).append({"from": differences.pop("epochs")[0], "to": config.epochs})
        more = True
    for name, (other, here) in sorted(differences.items()):
        raise ValueError(
            f"out: {path.parent} holds a run with {name}={other!r}, expected {here!r}; choose another folder"
        )
    if more or not (path.parent / "summary.json").exists():
        return found
    return None


def summarize(config: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
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
        "config": config,
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


@rank_zero_only
def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; of several processes the first one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")  # seeds of a sweep may be trained side by side
    fresh.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    fresh.replace(path)
