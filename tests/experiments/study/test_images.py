"""The studies of images: each cell is legal, costs what its row says, and runs in small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.study.images import (
    PRETRAINING,
    ROUTED_SHARE,
    UPCYCLING,
)
from experiments.train.build import build_model, flops
from experiments.train.command import parse
from experiments.train.data.load import load_tasks
from experiments.train.presets import PACS
from tests.helpers.command import QUICK, refused
from tests.helpers.made_images import write_imagenette, write_pacs
from vision.datasets import DOMAINS

TINY: dict[str, Any] = {
    "image_size": 8,
    "patch": 4,
    "dim": 16,
    "vit_heads": 2,
    "hidden": 32,
    "layers": 2,
    "batch_size": 32,
    "epochs": 1,
    "augment": "none",
    "precision": "32-true",
    "seeds": (0,),
    "progress": False,
}


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pacs(tmp_path_factory.mktemp("pacs"), count=10)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_that_is_held_out_is_the_test_set_and_nothing_else(
    domain: str, pacs: Path
) -> None:
    config = replace(PACS, router="dense", held_out=domain)
    task = load_tasks(replace(config, **TINY, data_root=pacs))(0)
    number = DOMAINS.index(domain)
    seen = {}
    for part in ("train", "val", "test"):
        batches = list(task.loader(part, 32, None))
        seen[part] = torch.cat([batch.domain for batch in batches if batch.domain is not None])
        brightness = torch.cat([batch.inputs[0].mean(dim=(1, 2, 3)) for batch in batches])
        held = brightness[seen[part] == number]
        assert len(held) == (70 if part == "test" else 0)
    assert set(seen["test"].tolist()) == {number}
    assert len(seen["train"]) + len(seen["val"]) == 210
    assert seen["val"].bincount(minlength=4).max() > 0


def test_a_domain_that_is_not_there_is_refused(capsys: Any, pacs: Path) -> None:
    args = ["pacs", *QUICK, "--data-root", str(pacs), "--image-size", "8", "--held-out", "painting"]
    assert "held_out: got 'painting', expected one of art_painting" in refused(args, capsys)


def test_the_cells_of_the_routed_share_cost_what_their_rows_say(tmp_path: Path) -> None:
    """Copies at K = 1 the dense FLOPs and a router; a matched dense model its cell's."""
    write_imagenette(tmp_path, count=3)
    costs = {}
    cells = [row for row in ROUTED_SHARE.rows if not row.startswith("dense-")]
    rows = [*cells, "dense-all-shared-k2"]
    for cell, given in ROUTED_SHARE.cells(["imagenette"], rows).items():
        config = replace(given, **TINY, experts=4, data_root=tmp_path)
        task = load_tasks(config)(0)
        torch.manual_seed(0)
        inputs = next(iter(task.loader("train", 32, None))).inputs
        costs[cell.partition("/")[2]] = flops(build_model(config, task), inputs)
    dense = costs["dense"]
    assert costs["all-copies-k1"] == pytest.approx(dense, rel=0.06)
    assert dense < costs["half-copies-k1"] < costs["all-copies-k1"]
    assert costs["all-copies-k2"] - dense == pytest.approx(
        2 * (costs["half-copies-k2"] - dense), rel=0.01
    )
    assert costs["dense-all-shared-k2"] == pytest.approx(costs["all-shared-k2"], rel=0.03)
    assert len(cells) == 9
    assert all(f"dense-{cell}" in ROUTED_SHARE.rows for cell in cells[1:])
    assert set(ROUTED_SHARE.columns) == {
        "imagenette", "imagenette-others", "imagenette-wide", "cifar10"
    }  # fmt: skip


def test_upcycling_goes_on_from_its_pretraining() -> None:
    (trained,) = PRETRAINING.cells().values()
    for config in UPCYCLING.cells().values():
        assert config.checkpoint == (  # type: ignore[attr-defined]
            f"runs/{PRETRAINING.name}/imagenette/dense/seed-0/checkpoint/best.safetensors"
        )
        assert config.model == trained.model
        assert config.model_kwargs == trained.model_kwargs  # type: ignore[attr-defined]
        assert set(config.seeds).isdisjoint(trained.seeds)
    assert parse(["imagenette", "--model", str(trained.model)]).model == trained.model
