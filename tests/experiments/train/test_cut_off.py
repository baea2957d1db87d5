"""Runs that are cut off at a moment that is hard to hit, and go on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from experiments.train.build import build_model
from experiments.train.command import parse
from experiments.train.loop import run
from experiments.train.results import write_json
from experiments.train.run_folder import begin, so_far
from experiments.train.training import set_up
from tests.helpers.command import QUICK
from tests.helpers.made_graph import make_config, make_task


def test_a_run_that_is_killed_inside_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are on disk in the end."""
    config = parse(["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped_at("checkpoint", 2, Path.replace))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    folder = tmp_path / "seed-0" / "checkpoint"
    state = torch.load(folder / "state.ckpt", weights_only=True)
    torch.testing.assert_close(load_file(folder / "best.safetensors"), state["best"])


def stopped_at(folder: str, number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of paths whose n-th call in a folder of that name stops, and all after it."""
    calls = list[Path]()

    def counted(path: Path, *args: Any) -> Any:
        calls.extend([path] * (path.parent.name == folder))
        if len(calls) >= number and path.parent.name == folder:
            raise KeyboardInterrupt
        return call(path, *args)

    return counted


def test_a_process_that_has_nothing_left_to_train_or_test_ends_well() -> None:
    """As the second one does where a run was killed behind its last epoch."""
    config = make_config(router="token_choice")
    task = make_task(config)
    model = build_model(config, task)
    for is_first, ends in ((False, nullcontext()), (True, pytest.raises(RuntimeError))):
        fabric = Fabric(accelerator="cpu", devices=1)
        at = mock.patch.object(Fabric, "is_global_zero", is_first)
        with at, ends, set_up(fabric, model, config, task):
            pass


def test_a_summary_of_fewer_seeds_is_not_that_of_more(tmp_path: Path) -> None:
    """Another command, of fewer seeds, may end after the folder has become one of more."""
    one = parse(["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path)])
    summary, two = run(one), replace(one, seeds=(0, 1))
    begin(two)
    write_json(tmp_path / "summary.json", summary)
    found, results = so_far(two)
    assert found is None
    assert list(results) == [0]
