"""Image folders and torchvision's sets on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.build import build_model, build_twin
from experiments.config import ImageConfig
from experiments.data import load_tasks
from experiments.train import main
from tests.vision.made_images import write_images

SHAPE = ["--layers", "2", "--patch", "4", "--dim", "8", "--vit-heads", "2", "--hidden", "8", "--experts", "2"]
QUICK = [*SHAPE, "--epochs", "1", "--batch-size", "8", "--seeds", "0", "--no-progress"]


def folder_task(root: Path, **changes: Any) -> Any:
    return load_tasks(ImageConfig(dataset="images", data_root=root, **changes))(0)


def rows(task: Any, part: Any, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = list(task.loader(part, 5, seed))
    return torch.cat([batch.inputs[0] for batch in found]), torch.cat([batch.target for batch in found])


def test_parts_do_not_overlap_and_only_training_is_augmented(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    plain, changed = folder_task(root), folder_task(root, augment="standard", label_smoothing=0.3)
    seen = [{image.numpy().tobytes() for image in rows(plain, part)[0]} for part in ("train", "val", "test")]
    assert [len(part) for part in seen] == [21, 3, 9]
    assert len(set.union(*seen)) == 33
    for part in ("val", "test"):
        assert all(torch.equal(one, two) for one, two in zip(rows(plain, part), rows(changed, part), strict=True))
    images = rows(changed, "train", 1)[0]
    assert torch.equal(images, rows(changed, "train", 1)[0])
    assert not torch.equal(images, rows(changed, "train", 2)[0])
    assert changed.steps(5) == len(list(changed.loader("train", 5, 0))) == 5
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    share = nn.functional.one_hot(target, 3) * 0.7 + 0.1
    torch.testing.assert_close(changed.loss(logits, target), -(share * logits.log_softmax(-1)).sum(dim=1).mean())


def test_kmeans_sees_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders list class by class."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("experiments.loop.init_centroids", lambda *call: seen.extend(call[1]))
    root = write_images(tmp_path / "data", train=30)
    args = ["--router", "multi_centroid", "--kmeans-init", "--batch-size", "24", "--data-root", str(root)]
    main(["images", *QUICK, *args, "--out", str(tmp_path / "run")])
    assert len(seen[0].mean(dim=(2, 3)).argmax(dim=1).unique()) == 3  # a class is bright in one channel


def test_a_baseline_with_scaled_mlps(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 3, "patch": 4, "dim": 8, "vit_heads": 2, "hidden": 8, "experts": 2}
    root = write_images(tmp_path / "data")
    config = ImageConfig(dataset="images", data_root=root, router="dense", every=2, mlp_scale=0.25, **sizes)
    task = load_tasks(config)(0)
    blocks: Any = build_model(config, task)
    x = torch.randn(2, 3, 8)
    for block, scale in zip(blocks.encoder.layers, (1, 0.25, 1), strict=True):
        torch.testing.assert_close(block.mlp(x), scale * block.mlp.forward(x))
    twin = build_twin(replace(config, equal="flops", equal_to="expert_choice"), task)
    assert not any(module._forward_hooks for module in twin.modules())
