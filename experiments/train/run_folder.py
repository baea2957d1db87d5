"""The folder of a run: where it lies, what is written in it, and what a finished one says."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from experiments.train.build import build_model, from_first
from experiments.train.config import (
    RECORDS,
    WHERE,
    RunConfig,
    check,
    check_trusted,
    interrupt,
    read_options,
    restore,
)
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Task
from experiments.train.files import check_finished, naming, read_csv, read_json, writing
from gmoe.distributed import world_sum
from gmoe.metrics import PER_EXPERT

SECONDS = 60.0
"""At most so much training is lost where a process is killed."""


class Spread(TypedDict):
    """Mean, sample standard deviation (``None`` at n = 1), n, and the values."""

    mean: float
    std: float | None
    n: int
    values: list[float]


class Summary(TypedDict):
    """``summary.json`` of a run; of older ones some figures are missing."""

    metric: str
    val: Spread
    test: Spread
    best_epoch: Spread
    seconds: Spread
    peak_memory: NotRequired[int | None]  # of the GPU, MiB
    flops: int
    parameters: int
    active_parameters: int
    matched: NotRequired[float | None]
    hidden: int | None
    steps: NotRequired[int]
    routing: list[dict[str, Spread]]
    curve: NotRequired[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]


Result = dict[str, Any]
"""``result.json`` of a seed."""


def place(config: RunConfig) -> Path:
    """The folder of a run: ``out``; else with ``resume`` the last of its name, or the first that is free, by number."""
    base = config.folder()
    if config.out is not None:
        check(
            config.resume or not _is_taken(base),
            "out",
            f"{base}, which holds files",
            "another, or --resume",
        )
        return base
    folders = [base]
    while _is_taken(folders[-1]):
        folders.append(base.with_name(f"{base.name}-{len(folders) + 1}"))
    return folders[-2:][0] if config.resume else folders[-1]


def _is_taken(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


IMAGE_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar10", ""),
    "imagenette": ("imagenette2-160", ""),
    "images": ("",),
}
"""Where files of images lie, which may be any; of other sets the published ones are read, or refused."""


def described(config: RunConfig) -> dict[str, Any]:
    """The configuration as ``config.json`` holds it: what numbers depend on, and a digest of data that may differ."""
    found, root, digest = config.science(), config.data_root, hashlib.sha256()
    if config.data is not None:
        return found
    if features := getattr(config, "features", None):
        digest.update(Path(features).read_bytes())
    if config.dataset == "graph":
        found["file"] = root.name
        for file in (
            sorted([*root.glob("*.csv"), *root.glob("graph.json")]) if root.is_dir() else [root]
        ):
            digest.update(file.read_bytes() if file.exists() else b"")
    elif config.dataset in IMAGE_FOLDERS:
        base = next(
            (root / part for part in IMAGE_FOLDERS[config.dataset] if (root / part).is_dir()), root
        )
        files = map(Path, glob.glob("**/*", root_dir=base, recursive=True))
        for file in sorted(files, key=lambda file: ("train" not in file.parts, file)):
            if (base / file).is_file():
                digest.update(os.fsencode(f"{file.as_posix()} {(base / file).stat().st_size}\n"))
    elif config.dataset.startswith("ogbn-"):
        planted = root / config.dataset.replace("-", "_") / "PLANTED.txt"
        digest.update(planted.read_bytes() if planted.exists() else b"")
    elif config.dataset.startswith("ogbg-"):  # OGB's, or converted, by some version of RDKit
        for file in sorted(root.glob(f"{config.dataset.replace('-', '_')}/RELEASE*.txt")):
            digest.update(file.read_bytes())
    has_data = digest.digest() != hashlib.sha256().digest()
    return found | {"digest": digest.hexdigest()[:16] if has_data else None}


def differences_of(config: RunConfig, there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a run that is :func:`described` by ``there`` is another one: its value and this one's."""
    other, here = vars(restore(there, config.data_root)), described(config)
    pairs = {
        name: (other.get(name), value) for name, value in vars(config).items() if name not in WHERE
    }
    pairs |= {name: (there.get(name), here.get(name)) for name in RECORDS}
    return {name: (theirs, ours) for name, (theirs, ours) in pairs.items() if theirs != ours}


def so_far(config: RunConfig) -> tuple[Summary | None, dict[int, Result]]:
    """The summary of a finished run, or the results of finished seeds; a ``ValueError`` if another run lies there."""
    folder = config.folder()
    path, summary = folder / "config.json", folder / "summary.json"
    if not path.exists():
        return None, {}
    differences = differences_of(config, read_json(path, dict[str, Any]))
    is_more = "seeds" in differences and set(differences["seeds"][0]) < set(config.seeds)
    if is_more:
        del differences["seeds"]
    for name, (other, here) in sorted(differences.items()):
        raise ValueError(
            f"out: {folder} holds a run with {name}={other!r}, expected {here!r}; choose another folder"
        )
    if not is_more and summary.exists():
        return read_json(summary, Summary), {}
    results = {seed: folder / f"seed-{seed}" / "result.json" for seed in config.seeds}
    return None, {
        seed: read_json(result, Result) for seed, result in results.items() if result.exists()
    }


@rank_zero_only
def begin(config: RunConfig) -> None:
    """Write what a run is, before what it gives."""
    folder = config.folder()
    folder.mkdir(parents=True, exist_ok=True)
    # Before the configuration says that there is more to it
    (folder / "summary.json").unlink(missing_ok=True)
    write_json(folder / "config.json", described(config))
    write_json(folder / "where.json", {"data_root": str(config.data_root.absolute())})


def summarize(config: RunConfig, results: list[Result]) -> Summary:
    """Mean, sample standard deviation and n over the seeds, with all that is needed to repeat the run."""
    first = results[0]
    spreads = ("val", "test", "best_epoch", "seconds")
    costs = ("flops", "parameters", "active_parameters", "matched", "hidden", "steps")
    routings = [result["routing"] for result in results]
    found: Any = {
        "metric": first["metric"],
        **{name: spread([result[name] for result in results]) for name in spreads},
        "peak_memory": max(result["peak_memory"] or 0 for result in results) or None,
        **{name: first[name] for name in costs},
        "routing": [_spreads(layers) for layers in zip(*routings, strict=True)],
        "curve": {
            "epoch": first["curve"]["epoch"],
            **{name: [result["curve"][name] for result in results] for name in ("loss", "val")},
        },
        "config": described(config),
        "environment": environment(),
    }
    return found


def _spreads(layers: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """The figures of a MoE layer over its seeds.

    Of the loads of its experts, their number and how much the largest is above the mean.
    """
    loads = [layer["load"] for layer in layers]
    names = [name for name in layers[0] if name not in PER_EXPERT]
    return {
        "experts": spread([len(load) for load in loads]),
        **{name: spread([layer[name] for layer in layers]) for name in names},
        "max_over_mean_load": spread([round(max(load) * len(load), 4) for load in loads]),
    }


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation of some values."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def environment() -> dict[str, Any]:
    """Commit, hardware and versions."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        found = ""
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    packages = (
        "torch",
        "torch-geometric",
        "torchvision",
        "lightning-fabric",
        "scikit-learn",
        "numpy",
    )
    return {
        "commit": found.strip().removesuffix("-dirty") or None,
        "dirty": found.strip().endswith("-dirty"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@rank_zero_only
def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; of several processes the first one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")  # seeds of a sweep may be trained side by side
    with writing(path):
        fresh.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        fresh.replace(path)


class Log:
    """A CSV file of one row or several an epoch, on disk at once; rows behind ``keep`` epochs, the checkpoint's, go."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        if not keep:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        # The last may be half a row
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, on_bad_lines="skip")
        fresh = path.with_suffix(".new")
        epoch = pd.to_numeric(rows["epoch"], errors="coerce")
        kept = rows[(epoch < keep) & (epoch >= epoch.cummax())]  # 12 cut off after a digit is no 1
        with writing(path):
            kept.to_csv(fresh, index=False)
            fresh.replace(path)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows, if there are any; a new file gets their names first."""
        if rows:
            is_new = not self.path.exists()
            with writing(self.path):
                pd.DataFrame(rows).to_csv(self.path, mode="a", index=False, header=is_new)


class Logs:
    """What a seed logs each epoch: metrics.csv, routing.csv, and in TensorBoard and Weights & Biases where asked for.

    ``folder`` is ``seed-N`` of the run folder; what is logged behind ``keep`` epochs goes.
    """

    @rank_zero_only
    def __init__(self, folder: Path, config: RunConfig, keep: int) -> None:
        self.metrics, self.routing = (
            Log(folder / "metrics.csv", keep),
            Log(folder / "routing.csv", keep),
        )
        self.tensorboard = self.wandb = None
        name, options = f"{folder.parent.name}-{folder.name}", config.science()
        if "tensorboard" in config.logger:
            purge = keep or None
            self.tensorboard = TensorBoardLogger(
                folder, "", "tensorboard", default_hp_metric=False, purge_step=purge
            )
            self.tensorboard.log_hyperparams(options)
        if "wandb" in config.logger:
            import wandb

            own = f"{name}-{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]}"  # not another folder's
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


class Checkpoint:
    """What ``state`` gives, on disk, replaced in one step; its ``"best"`` weights also in safetensors.

    The first process writes, all read, and all have to call every method. Several machines need the same folder. As a
    context, it lets SIGINT and SIGTERM wait for the next :meth:`tick`; the second of them does not.
    """

    def __init__(self, fabric: Fabric, folder: Path, state: Callable[[], dict[str, Any]]) -> None:
        self.fabric, self.folder, self.state = fabric, folder, state
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state, or ``None`` where there is none."""
        path = self.folder / "state.ckpt"
        if not from_first(self.fabric, path.exists):
            return None
        with naming(path):
            return self.fabric.load(path, weights_only=True)

    def save(self) -> None:
        """Write the state to a new file that then takes the old one's place."""
        state = self.state()
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder / "state.ckpt"):
            self.fabric.save(self.folder / "state.new", state)
        if self.fabric.is_global_zero:
            best = {name: value.contiguous() for name, value in state["best"].items()}
            with writing(self.folder / "best.safetensors"):
                save_file(best, self.folder / "best.new")
            (self.folder / "state.new").replace(self.folder / "state.ckpt")
            (self.folder / "best.new").replace(self.folder / "best.safetensors")
        self.fabric.barrier()  # or a process might be ended by another that has ended, before it has written
        self._last = time.monotonic()

    def tick(self, rows: int = 0) -> int:
        """Call it where the state is whole: saves what is older than a minute, or if a signal arrived, which it raises.

        Returns the sum over processes of ``rows``, of the next batch: another collective would be one more to wait for.
        """
        is_due = time.monotonic() - self._last > SECONDS
        signals, due, total = world_sum(
            torch.tensor([self.signal is not None, is_due, rows])
        ).tolist()
        if signals or due:
            self.save()
        if signals:
            interrupt(self.signal or signal.SIGTERM)
        return int(total)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A finished run, as :func:`read_run` finds it."""

    folder: Path
    name: str  # by which the report calls it
    config: RunConfig  # with the data root that the data have here
    science: dict[str, Any]  # config.json
    summary: Summary
    # Of the first seed, by epoch and MoE layer: the load of each expert
    history: list[list[dict[str, Tensor]]]

    def load_task(self) -> Task:
        """The data, as the first seed saw them; an error where others or none are there."""
        if described(self.config).get("digest") != self.science.get("digest"):
            where = f"{self.config.data_root}: has not the data that {self.folder} was trained on"
            raise ValueError(f"{where}; give another --data-root")
        return load_tasks(self.config)(self.config.seeds[0])

    def load_model(self, task: Task) -> nn.Module:
        """The first seed's model, as validation selected it; a ``ValueError`` where the weights are broken."""
        path = self.folder / f"seed-{self.config.seeds[0]}" / "checkpoint" / "best.safetensors"
        model = build_model(self.config, task)
        with naming(path):
            model.load_state_dict(load_file(path))
        return model.eval()


def read_run(folder: Path, data_root: Path | None = None, trust: bool = False) -> RunFolder:
    """Read a run folder; a ``ValueError`` names the file that is missing or broken.

    ``data_root`` is where the data of the run are here (default: where it was trained on them, or ``data``).
    Without ``trust``, a run whose router, model or data are code in the folder itself is refused.
    """
    check_finished(folder)
    path, where = folder / "config.json", folder / "where.json"
    try:
        summary, science = (
            read_json(folder / "summary.json", Summary),
            read_json(path, dict[str, Any]),
        )
        if data_root is None:
            data_root = (
                Path(read_json(where, dict[str, str]).get("data_root", "data"))
                if where.exists()
                else Path()
            )
            data_root = data_root if data_root.exists() else Path("data")
        config, layers = read_options(path, data_root), len(summary["routing"])
        if not trust:
            check_trusted(config, folder)
        history = (
            _history(folder / f"seed-{config.seeds[0]}" / "routing.csv", config.epochs, layers)
            if layers
            else []
        )
    except FileNotFoundError as error:
        legal = "the folder of a finished run"
        raise ValueError(f"{error.filename}: is missing, expected {legal}") from error
    name = folder.resolve().name
    return RunFolder(
        folder=folder, name=name, config=config, science=science, summary=summary, history=history
    )


def _history(path: Path, epochs: int, layers: int) -> list[list[dict[str, Tensor]]]:
    table = read_csv(path, dtype=float, index_col=False).filter(like="load_")
    check(
        len(table) == epochs * layers,
        str(path),
        f"{len(table)} rows",
        f"{epochs} an MoE layer, one an epoch",
    )
    loads = [{"load": torch.tensor(row.dropna().to_numpy())} for _, row in table.iterrows()]
    return [loads[row : row + layers] for row in range(0, len(loads), layers)]
