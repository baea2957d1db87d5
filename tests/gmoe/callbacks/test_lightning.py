"""The health of experts under Lightning is what a count beside it finds."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gmoe

EVERY = 2


class Classifier(L.LightningModule):
    """Counts beside the callback what its router decides."""

    def __init__(self, automatic: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = gmoe.ViTMoE(8, num_experts=4, router="token_choice", **options)
        self.automatic_optimization = automatic
        self.counts = list[gmoe.Routing]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Train, and keep the first routing."""
        images, labels = batch
        logits, routings = self.vit(images, return_routing=True)
        self.counts.append(routings[0])
        loss = nn.functional.cross_entropy(logits, labels)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """An evaluation, which does not count."""
        self.vit(batch[0])

    def configure_optimizers(self) -> Any:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> Any:
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 8, 8, generator=drawn)
    return DataLoader(TensorDataset(images, torch.arange(32) % 10), batch_size=4)


def fit(module: Classifier, folder: Path, **options: Any) -> Any:
    trainer = L.Trainer(
        max_epochs=1,
        log_every_n_steps=EVERY,
        callbacks=[gmoe.LightningHealth()],
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, loader(), loader())
    return trainer


@pytest.mark.parametrize(
    ("automatic", "options"),
    [
        (True, {}),
        (True, {"accumulate_grad_batches": 2}),
        (True, {"precision": "bf16-mixed"}),
        (False, {}),
    ],
    ids=["plain", "accumulated", "half", "by hand"],
)
def test_it_logs_what_a_count_beside_it_finds(
    automatic: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    module = Classifier(automatic)
    trainer = fit(module, tmp_path, **options)
    batches = EVERY * options.get("accumulate_grad_batches", 1)
    assert len(module.counts) == 8
    expected = {}
    for end in range(batches, 9, batches):
        load = sum((routing.load for routing in module.counts[end - batches : end]), torch.zeros(4))
        expected[end // batches * EVERY - 1] = float(load.max() / load.mean())
    assert len(set(expected.values())) > 1

    # In the logger, at the steps at which Lightning itself logs; the last one in the metrics.
    path = next(name for name, part in module.named_modules() if isinstance(part, gmoe.Router))
    column = f"experts/{path.removesuffix('.router')}/max_load"
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    found = {int(row["step"]): float(row[column]) for row in rows}
    assert found == pytest.approx(expected, abs=1e-5)
    last = float(trainer.callback_metrics[column])
    assert last == pytest.approx([*expected.values()][-1], abs=1e-5)


def test_it_says_once_what_to_do_about_a_collapse(tmp_path: Path) -> None:
    module = Classifier(router_kwargs={"balance": None, "noise": False})
    for part in module.modules():
        if isinstance(part, gmoe.TokenChoice):
            nn.init.zeros_(part.gate.weight)  # ties go to the first expert
            part.requires_grad_(False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, tmp_path)
    said = [str(w.message) for w in found if "of the load" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("1 of 4 experts has 100% of the load in vit.")


def test_it_leaves_no_hook_and_needs_a_router(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, tmp_path)
    assert not any(part._forward_hooks for part in module.modules())
    module.vit = nn.Linear(2, 2)  # type: ignore[assignment]
    module.validation_step = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^model: got Classifier without a router"):
        fit(module, tmp_path)
