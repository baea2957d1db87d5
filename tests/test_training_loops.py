"""What ``docs/training-loops.md`` shows: the losses of the routers are in what is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gmoe
from tests.helpers.pages import blocks

Page = dict[str, Any]
"""The names that the page defines."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    names: Page = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in blocks("training-loops.md"):
            exec(compile(block, "training-loops.md", "exec"), names)
    return names


def parts(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's own loss of a batch, and the losses of its routers."""
    with gmoe.record_routing(model) as routings:
        loss = model(**batch)["loss"]
    return loss, gmoe.aux_loss(routings)


def trainer_of(page: Page, model: nn.Module, folder: Path, **options: Any) -> Any:
    options = {"output_dir": str(folder), "save_strategy": "no", "report_to": "none", **options}
    arguments = page["TrainingArguments"](**options, use_cpu=True, disable_tqdm=True)
    images = page["images"]
    return page["Trainer"](model=model, args=arguments, train_dataset=images, eval_dataset=images)


class OfAllItems(nn.Module):
    """Normalizes its loss over all accumulated batches, as the models of transformers do."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        outputs = self.classifier(pixel_values, labels)
        loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
        return {**outputs, "loss": loss / kwargs.get("num_items_in_batch", len(labels))}


class Checkpointed(nn.Module):
    """A classifier that runs again in the backward pass."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        """As the classifier does."""
        checkpoint = torch.utils.checkpoint.checkpoint
        return checkpoint(self.classifier, pixel_values, labels, use_reentrant=False)


def by_trainer(page: Page, model: Any, folder: Path, accumulated: int) -> None:
    """One step of plain gradient descent."""
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0}
    trainer = trainer_of(
        page, model, folder, **options, **sizes, gradient_accumulation_steps=accumulated
    )
    trainer.train()


def by_accelerate(page: Page, model: Any, folder: Path, accumulated: int) -> None:
    """The same."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    images = page["images"][: 8 * accumulated]
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(images, batch_size=8)
    )
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()


class Lit(L.LightningModule):
    """Knows nothing of the routers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> Any:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def by_lightning(page: Page, model: Any, folder: Path, accumulated: int) -> None:
    """The same."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_steps=1, accumulate_grad_batches=accumulated, accelerator="cpu", **quiet
    )
    trainer.fit(Lit(model), DataLoader(page["images"], batch_size=8))


LOOPS: dict[str, Callable[..., None]] = {
    "Trainer": by_trainer,
    "accelerate": by_accelerate,
    "Lightning": by_lightning,
}
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda classifier: classifier,
    "checkpointed": Checkpointed,
    "of all items": OfAllItems,
}


STEPS = [
    *(
        (loop, kind, accumulated)
        for loop in ("accelerate", "Lightning")
        for kind in ("plain", "checkpointed")
        for accumulated in (1, 2, 3)
    ),
    # It takes a second or two to start; only it tells a model how many items there are.
    ("Trainer", "plain", 1),
    ("Trainer", "checkpointed", 2),
    ("Trainer", "of all items", 3),
]
"""Loops, models, and how many batches a step accumulates."""


@pytest.mark.parametrize(("loop", "kind", "accumulated"), STEPS)
def test_a_step_trains_the_mean_of_the_batches_with_their_losses(
    loop: str, kind: str, accumulated: int, page: Page, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = MODELS[kind](page["Classifier"]()).train()
    before, seen = copy.deepcopy(model), list[dict[str, Tensor]]()
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    gmoe.attach_aux_loss(model, scale=1 / accumulated)
    LOOPS[loop](page, model, tmp_path, accumulated)

    assert len(seen) == accumulated
    for batch in seen:
        own, balance = parts(before, {name: batch[name] for name in ("pixel_values", "labels")})
        assert balance > 0.01
        ((own + balance) / accumulated).backward()
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter - after[name], parameter.grad, atol=1e-5, rtol=1e-3)
    gates = [p.grad for name, p in before.named_parameters() if "gate" in name]
    assert all(grad.abs().max() > 0 for grad in gates if grad is not None)


@pytest.mark.parametrize(
    "loop", ["accelerate", "Lightning", pytest.param("Trainer", marks=pytest.mark.slow)]
)
def test_a_loop_that_forgets_the_losses_is_told(loop: str, page: Page, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = page["Classifier"]().train()
    LOOPS[loop](page, model, tmp_path, 1)
    with pytest.warns(UserWarning, match=r"gmoe\.attach_aux_loss\(model\) once"):
        LOOPS[loop](page, model, tmp_path, 1)


def test_an_evaluation_has_the_models_own_loss(page: Page, tmp_path: Path) -> None:
    model = page["Classifier"]()
    gmoe.attach_aux_loss(model)
    found = trainer_of(page, model, tmp_path, per_device_eval_batch_size=32).evaluate()
    (batch,) = DataLoader(page["images"], batch_size=32)
    own, balance = parts(model.eval(), batch)
    assert balance > 0.01
    assert found["eval_loss"] == pytest.approx(own.item(), rel=1e-4)


def test_the_default_balance_adds_nothing(page: Page) -> None:
    (batch,) = DataLoader(page["images"], batch_size=32)
    _, balance = parts(page["Classifier"](balance="bias").train(), batch)
    assert balance == 0


def test_the_page_logs_the_health_of_experts(page: Page) -> None:
    assert all("experts/" in name for name in page["figures"])
    assert any("experts/" in name for name in page["trainer"].callback_metrics)
