"""The folder of a run: where it is, whose it is, and what a finished one says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities import rank_zero_only
from torch import Tensor, nn

from experiments.train.build import build_model
from experiments.train.checks import check
from experiments.train.config import DATA_RECORDS, RECORDS, WHERE, RunConfig
from experiments.train.data.task import Task
from experiments.train.files import check_finished, load_weights, read_csv, read_json
from experiments.train.kinds import kind_of
from experiments.train.results import Result, Summary, write_json
from experiments.train.saved import read_options, restore
from experiments.train.user_code import check_trusted


def place(config: RunConfig) -> Path:
    """The folder of a run: ``out``.

    Else with ``resume`` the last of its name, or the first that is free, by number.
    """
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


def described(config: RunConfig) -> dict[str, Any]:
    """The configuration as ``config.json`` holds it.

    That is what numbers depend on, and a digest of data that may differ.
    """
    science = config.science()
    if config.data is not None:
        return science
    digest = hashlib.sha256()
    noted = kind_of(config).note_data(digest)
    has_data = digest.digest() != hashlib.sha256().digest()
    return science | noted | {"digest": digest.hexdigest()[:16] if has_data else None}


def differences_of(config: RunConfig, there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a run that ``there`` describes differs: by option its value and this run's.

    ``there`` is what :func:`described` returned.
    """
    other = vars(restore(there, config.data_root))
    here = described(config)
    pairs = {
        name: (other.get(name), value) for name, value in vars(config).items() if name not in WHERE
    }
    pairs |= {
        name: (there.get(name), here.get(name))
        for name in (*RECORDS, "workers")
        if name != "contents" or name in there  # which older runs lack
    }
    return {name: (theirs, ours) for name, (theirs, ours) in pairs.items() if theirs != ours}


def so_far(config: RunConfig) -> tuple[Summary | None, dict[int, Result]]:
    """The summary of a finished run, or the results of finished seeds.

    A ``ValueError`` if another run lies there.
    """
    folder = config.folder()
    path = folder / "config.json"
    summary = folder / "summary.json"
    if not path.exists():
        return None, {}
    differences = differences_of(config, read_json(path, dict[str, Any]))
    is_more = "seeds" in differences and set(differences["seeds"][0]) < set(config.seeds)
    if is_more:
        del differences["seeds"]
    for name, (other, here) in sorted(differences.items()):
        remedy = "choose another folder"
        if name in (*DATA_RECORDS, "weights"):
            remedy = f"give the files of that run (--data-root, --checkpoint), or {remedy}"
        raise ValueError(
            f"out: {folder} holds a run with {name}={other!r}, expected {here!r}; {remedy}"
        )
    if not is_more and summary.exists():
        finished = read_json(summary, Summary)
        # One of fewer seeds may have ended since, in another process
        if set(finished["config"]["seeds"]) == set(config.seeds):
            return finished, {}
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
        if {*DATA_RECORDS} & differences_of(self.config, self.science).keys():
            where = f"{self.config.data_root}: has not the data that {self.folder} was trained on"
            raise ValueError(f"{where}; give another --data-root")
        return kind_of(self.config).tasks()(self.config.seeds[0])

    def load_model(self, task: Task) -> nn.Module:
        """The first seed's model, as validation selected it.

        A ``ValueError`` where the weights are broken.
        """
        path = self.folder / f"seed-{self.config.seeds[0]}" / "checkpoint" / "best.safetensors"
        config: Any = self.config
        if getattr(config, "checkpoint", None) is not None:
            config = replace(config, checkpoint=None)  # what it started from is not needed
        model = build_model(config, task)
        load_weights(model, path)
        return model.eval()


def read_run(folder: Path, data_root: Path | None = None, trust: bool = False) -> RunFolder:
    """Read a run folder; a ``ValueError`` names the file that is missing or broken.

    ``data_root`` is where the data of the run are here (default: where it was trained on them,
    or ``data``). Without ``trust``, a run is refused whose ``config.json`` names code.
    """
    check_finished(folder)
    path = folder / "config.json"
    try:
        summary = read_json(folder / "summary.json", Summary)
        science = read_json(path, dict[str, Any])
        if data_root is None:
            data_root = _data_root(folder / "where.json")
        config = read_options(path, data_root)
        if not trust:
            check_trusted(config, path)
        history: list[list[dict[str, Tensor]]] = []
        if layers := len(summary["routing"]):
            routing = folder / f"seed-{config.seeds[0]}" / "routing.csv"
            history = _history(routing, config.epochs, layers)
    except FileNotFoundError as error:
        legal = "the folder of a finished run"
        raise ValueError(f"{error.filename}: is missing, expected {legal}") from error
    name = folder.resolve().name
    return RunFolder(
        folder=folder, name=name, config=config, science=science, summary=summary, history=history
    )


def _data_root(where: Path) -> Path:
    """Where the data lay as a run was trained, if they still do; else ``data``."""
    if not where.exists():
        return Path("data")
    data_root = Path(read_json(where, dict[str, str]).get("data_root", "data"))
    return data_root if data_root.exists() else Path("data")


def _history(path: Path, epochs: int, layers: int) -> list[list[dict[str, Tensor]]]:
    table = read_csv(path, dtype=float, index_col=False).filter(like="load_")
    legal = f"{epochs} an MoE layer, one an epoch"
    check(len(table) == epochs * layers, str(path), f"{len(table)} rows", legal)
    loads = [{"load": torch.tensor(row.dropna().to_numpy())} for _, row in table.iterrows()]
    return [loads[row : row + layers] for row in range(0, len(loads), layers)]
