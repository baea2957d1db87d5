"""Graphs that stay on disk: where they are, and the options that fit them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.train.config import PAPERS, RunConfig
from experiments.train.files import read_json

STORED = "ogbn_papers100M_stored"
"""The folder it is converted to, in the data root."""


def stored_folder(config: RunConfig) -> Path | None:
    """The folder of a graph that stays on disk, see ``experiments.convert``; ``None`` in memory."""
    if config.dataset == PAPERS:
        return config.data_root / STORED
    is_stored = config.dataset == "graph" and (config.data_root / "graph.json").is_file()
    return config.data_root if is_stored else None


def fit_to_disk(config: RunConfig) -> RunConfig:
    """The same; of a graph on disk with the only sampling, evaluation and direction that fit it."""
    folder = stored_folder(config)
    if folder is None or not (folder / "graph.json").is_file():
        return config
    said = read_json(folder / "graph.json", dict[str, Any])
    legal: dict[str, Any] = {"sampling": "neighbor", "evaluation": "sampled"}
    return replace(config, **legal | {"undirected": said.get("undirected", True)})
