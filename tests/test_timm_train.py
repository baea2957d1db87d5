"""What ``docs/timm-train.md`` shows, under the parts that timm's ``train.py`` calls.

The script itself is in neither timm's wheel nor its source distribution.
"""

from __future__ import annotations

import copy
import runpy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import gmoe
from gmoe.moe import MoELayer
from tests.helpers.pages import blocks

SIZES: dict[str, Any] = {
    "num_classes": 10,
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
}
"""What ``--num-classes`` and ``--model-kwargs`` say: a smaller one of the same form."""

STARTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "copies": {"start": "copies", "k": 2},
    "expert choice": {"router": "expert_choice", "router_kwargs": {"inference": "threshold"}},
    "switch": {"router_kwargs": {"balance": "switch"}},
}


@pytest.fixture(scope="module", autouse=True)
def script(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names of the page's script, which was imported and so does not train."""
    path = tmp_path_factory.mktemp("script") / "train_moe.py"
    (block,) = blocks("timm-train.md")
    path.write_text(block)
    return runpy.run_path(str(path), run_name="train_moe")


def create(**sizes: Any) -> Any:
    """As ``train.py`` makes its model."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_moe", pretrained=False, in_chans=3, **{**SIZES, **sizes})


def batches(count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(10, (8,), generator=drawn)
        yield torch.randn(8, 3, 16, 16, generator=drawn), labels


def test_the_factory_is_found_by_its_name_and_starts_as_the_dense_model() -> None:
    assert timm.is_model("vit_tiny_moe")
    model = create()
    assert sum(isinstance(part, MoELayer) for part in model.modules()) == 2
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", **SIZES)
    images, _ = next(batches())
    assert torch.equal(model.eval()(images), dense.eval()(images))
    assert model.pretrained_cfg == dense.pretrained_cfg
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)


def test_pretrained_weights_are_upcycled(tmp_path: Path) -> None:
    """As ``--pretrained --pretrained-path`` has it, which draws the head anew."""
    torch.manual_seed(1)
    dense: Any = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    overlay = {"file": str(tmp_path / "dense.pth"), "num_classes": -1}
    model: Any = timm.create_model("vit_tiny_moe", True, pretrained_cfg_overlay=overlay, **SIZES)
    images, _ = next(batches())
    expected = dense.forward_features(images)
    assert torch.equal(model.eval().forward_features(images), expected)
    assert not torch.equal(create().eval().forward_features(images), expected)


class Run:
    """The state of ``train.py``: model, optimizer, average, schedule and checkpoints."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model.train()
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, sched="cosine", num_epochs=4)
        self.average = ModelEmaV3(model, decay=0.5)
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
        self.criterion = SoftTargetCrossEntropy()
        self.saver = CheckpointSaver(
            model=model,
            optimizer=self.optimizer,
            args=Namespace(model="vit_tiny_moe"),
            model_ema=self.average,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=1,
        )

    def epoch(self, number: int) -> list[float]:
        """The losses of one, which depend on its number."""
        losses = []
        torch.manual_seed(number)
        for images, labels in batches():
            mixed, targets = images, nn.functional.one_hot(labels, 10).float()
            loss = self.criterion(self.model(mixed), targets)
            self.optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.average.update(self.model)
            losses.append(loss.item())
        self.scheduler.step(number + 1)
        return losses


def start(name: str) -> Any:
    """A model like the page's, with other experts."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", **SIZES)
    return gmoe.moefy(dense, num_experts=4, **STARTS[name])


@pytest.mark.parametrize("name", STARTS)
def test_a_training_that_was_cut_off_goes_on_to_the_same_losses(name: str, tmp_path: Path) -> None:
    whole = Run(start(name), tmp_path)
    whole.epoch(0)
    whole.saver.save_checkpoint(0, metric=1.0)
    averaged = copy.deepcopy(whole.average.module).eval()
    expected = whole.epoch(1)

    path = str(tmp_path / "last.pth.tar")
    again = Run(start(name), tmp_path / "again")
    assert resume_checkpoint(again.model, path, again.optimizer, log_info=False) == 1
    load_checkpoint(again.average.module, path, use_ema=True)
    again.scheduler.step(1)
    images, _ = next(batches())
    assert torch.equal(again.average.module.eval()(images), averaged(images))
    assert again.epoch(1) == expected
    for (key, value), other in zip(
        whole.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    assert torch.equal(again.average.module(images), whole.average.module.eval()(images))
    # The best checkpoint is what ``validate.py --use-ema`` reads.
    best = load_checkpoint(start(name), str(tmp_path / "model_best.pth.tar"), use_ema=True)
    assert not best.missing_keys
    assert not best.unexpected_keys
