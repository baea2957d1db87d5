"""The studies of images: each cell is legal, costs what its row says, and runs in small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.study.images import (
    BY_IMAGE,
    HELD_OUT,
    PRETRAINING,
    ROUTED_SHARE,
    UPCYCLING,
)
from experiments.train.build import build_model, flops
from experiments.train.command import main, parse
from experiments.train.data.load import load_tasks
from experiments.train.loop import run
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


@pytest.mark.parametrize("row", BY_IMAGE.rows)
def test_a_row_by_image_trains(row: str, pacs: Path, tmp_path: Path) -> None:
    (config,) = BY_IMAGE.cells(["pacs"], [row]).values()
    summary = run(replace(config, **TINY, data_root=pacs, out=tmp_path / "run"))
    dense = replace(BY_IMAGE.cells(["pacs"], ["dense"])["pacs/dense"], **TINY, data_root=pacs)
    task = load_tasks(dense)(0)
    inputs = next(iter(task.loader("train", 32, None))).inputs
    more = summary["flops"] / flops(build_model(dense, task), inputs)
    assert 1 <= more < 1.35  # a token of five more, or a router
    decisions = {"patch": 1, "image": 1, "view": 1, "random-view": 1, "told": 1}
    assert len(summary["routing"]) == decisions.get(row, 0)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_that_is_held_out_is_the_test_set_and_nothing_else(
    domain: str, pacs: Path
) -> None:
    (config,) = HELD_OUT.cells([domain], ["dense"]).values()
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


def test_what_is_told_or_seen_is_refused_where_it_cannot_be(capsys: Any, pacs: Path) -> None:
    for words, message in (
        ("--held-out painting", "held_out: got 'painting', expected one of art_painting"),
        ("--router dense --router-input view", "router_input: got 'view' with router='dense'"),
        ("--router oracle --experts 4 --extra-input view", "extra_input: got 'view', expected"),
        ("--router dense --extra-input domain --cutmix 1", "extra_input: got 'domain' with mixup"),
    ):
        args = ["pacs", *QUICK, "--data-root", str(pacs), "--image-size", "8", *words.split()]
        assert message in refused(args, capsys)
    with pytest.raises(SystemExit):
        main(["digits", *QUICK, "--router", "dense", "--extra-input", "domain"])
    assert "extra_input: got 'domain' without domains" in capsys.readouterr().err


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
