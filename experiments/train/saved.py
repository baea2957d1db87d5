"""Configurations as files hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.train.checks import check
from experiments.train.config import FANOUT, RECORDS, RunConfig, config_class
from experiments.train.files import parse_json, read_json

RETIRED: dict[str, Any] = {
    "ema": 0.0, "warmup": 0.1, "heads": 1, "edge_features": False, "in_proj": False, "self_loops": False,
    "moe_blocks": [], "mixup": 0.0, "cutmix": 0.0, "val_share": 0.1, "split_seed": 0, "skip_broken": False,
    "tie_experts": False, "tie_routers": False, "sharing": None, "anneal_noise": False,
    # once of all kinds of data
    "conv": ["gcn"], "jk": None, "norm": None, "residual": "identity", "router_input": ["node"], "sampling": "full",
    "shared_router": False, "adjacency": "auto", "evaluation": "full", "fanout": list(FANOUT), "input_dropout": 0.0,
    "label_reuse": 0.0, "metric": None, "undirected": True, "augment": "none", "dim": None, "image_size": None,
    "label_smoothing": 0.0, "patch": None, "vit_heads": None,
}  # fmt: skip
"""Options that older configurations hold where there are none now, each with the only value that is still meant."""


def restore(science: Mapping[str, Any], data_root: Path) -> RunConfig:
    """The configuration of which :meth:`RunConfig.science` was written, also by an earlier version.

    ``data_root`` is where the data are here, if it does not say: your own graph, or the folder that holds it.
    """
    check(
        isinstance(science.get("dataset"), str),
        "dataset",
        repr(science.get("dataset")),
        "the name of one",
    )
    science = _with_start(science)
    kind = config_class(science["dataset"])
    retired = RETIRED.keys() - {option.name for option in fields(kind)}
    for name in retired & science.keys():
        legal = f"{RETIRED[name]!r}: there is no such option now"
        check(science[name] in (RETIRED[name], None), name, repr(science[name]), legal)
    given = {name: value for name, value in science.items() if name not in retired | set(RECORDS)}
    file = str(science.get("file", data_root.name))
    root = data_root if file == data_root.name else data_root / file
    return parse_json(json.dumps({"data_root": str(root)} | given), kind)


def _with_start(science: Mapping[str, Any]) -> dict[str, Any]:
    """The same with ``start`` in place of the two options that it stands for."""
    known = dict(science)
    is_old = "shared_expert" in known or "dense_start" in known
    shared, dense_start = known.pop("shared_expert", None), known.pop("dense_start", None)
    if not is_old:
        return known
    if known.get("shared_router") is False:
        known["shared_router"] = None  # which means the same beside a shared expert
    if shared is None and dense_start is None:
        return (
            known
            if known.get("router") == "dense"
            else known | {"start": known.get("start") or "shared"}
        )
    gone = shared is not False and dense_start is False and known.get("router") != "dense"
    check(
        not gone,
        "dense_start",
        "False beside a shared expert",
        "another: there are no such layers any more",
    )
    return known | {"start": "plain" if shared is False else "shared"}


def read_options(path: Path, data_root: Path, base: RunConfig | None = None) -> RunConfig:
    """Return the configuration in a JSON file, such as the ``config.json`` of a run.

    Options that it lacks are those of ``base``.
    """
    try:
        given = read_json(path, dict[str, Any])
        if base is not None:
            name = given.get("dataset", base.dataset)
            legal = f"{base.dataset}, that of the preset"
            check(name == base.dataset, "dataset", repr(name), legal)
            given = base.science() | given
        return restore(given, data_root)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
