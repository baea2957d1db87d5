"""Configurations as files hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.train.checks import check
from experiments.train.config import RECORDS, RunConfig, config_class
from experiments.train.files import parse_json, read_json


def restore(science: Mapping[str, Any], data_root: Path) -> RunConfig:
    """Return the configuration that :meth:`RunConfig.science` wrote down.

    ``data_root`` is where the data are here: your own graph, or the folder that holds it.
    An option that is missing has its default.

    Raises:
        ValueError: an unknown option, or a value that is not legal.
    """
    name = science.get("dataset")
    is_name = isinstance(name, str) and len(name) <= 100
    check(is_name, "dataset", f"{name!r:.100}", "the name of one")
    given = {option: value for option, value in science.items() if option not in RECORDS}
    file = str(science.get("file", data_root.name))
    root = data_root if file == data_root.name else data_root / file
    text = json.dumps({"data_root": str(root)} | given)
    return parse_json(text, config_class(science["dataset"]))


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
