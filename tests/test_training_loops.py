"""What ``docs/training-loops.md`` shows: the losses of the routers are in what is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmoe
from tests.test_docs import blocks

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


def a_batch() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(6, 3, 8, 8, generator=drawn), "labels": torch.arange(6)}


def parts(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's own loss of a batch, and the losses of its routers."""
    with gmoe.record_routing(model) as routings:
        loss = model(**batch)["loss"]
    return loss, gmoe.aux_loss(routings)


def trainer_of(page: Page, model: nn.Module, folder: Path, **options: Any) -> Any:
    options = {"output_dir": str(folder), "save_strategy": "no", "report_to": "none", **options}
    arguments = page["TrainingArguments"](**options)
    return page["MoETrainer"](model=model, args=arguments, train_dataset=page["images"])


def test_the_trainers_loss_has_the_balance_loss_in_it(page: Page, tmp_path: Path) -> None:
    model = page["Classifier"]().train()
    trainer = trainer_of(page, model, tmp_path)
    own, balance = parts(model, a_batch())
    assert balance > 0.01
    torch.testing.assert_close(page["Trainer"].compute_loss(trainer, model, a_batch()), own)
    torch.testing.assert_close(trainer.compute_loss(model, a_batch()), own + balance)


def test_an_evaluation_has_the_models_own_loss(page: Page, tmp_path: Path) -> None:
    model = page["Classifier"]().eval()
    trainer = trainer_of(page, model, tmp_path)
    loss, outputs = trainer.compute_loss(model, a_batch(), return_outputs=True)
    own, balance = parts(model, a_batch())
    assert balance > 0.01
    torch.testing.assert_close(loss, own)
    assert outputs["logits"].shape == (6, 10)


def test_the_default_balance_adds_nothing(page: Page) -> None:
    _, balance = parts(page["Classifier"](balance="bias").train(), a_batch())
    assert balance == 0


class OfAllItems(nn.Module):
    """Normalizes its loss over all accumulated batches, as the models of transformers do."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        outputs = self.classifier(pixel_values, labels)
        loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
        return {**outputs, "loss": loss / kwargs.get("num_items_in_batch", len(labels))}


@pytest.mark.parametrize("of_all_items", [False, True])
def test_accumulated_batches_train_their_mean_loss(
    of_all_items: bool, page: Page, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = OfAllItems(page["Classifier"]()) if of_all_items else page["Classifier"]()
    before, seen = copy.deepcopy(model), list[dict[str, Tensor]]()
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    # one step of plain gradient descent
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer_of(page, model, tmp_path, **options, **sizes, max_grad_norm=0.0, use_cpu=True).train()

    assert len(seen) == 2
    for batch in seen:
        batch = {name: batch[name] for name in ("pixel_values", "labels")}
        own, balance = parts(before.train(), batch)
        ((own + balance) / 2).backward()
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter - after[name], parameter.grad, atol=1e-5, rtol=1e-3)
    gates = [p.grad for name, p in before.named_parameters() if "gate" in name]
    assert all(grad.abs().max() > 0 for grad in gates if grad is not None)


def test_lightnings_loss_has_the_balance_loss_in_it(page: Page) -> None:
    classifier, batch = page["Classifier"]().train(), a_batch()
    own, balance = parts(classifier, batch)
    module = page["LitClassifier"](classifier.vit)
    loss = module.training_step((batch["pixel_values"], batch["labels"]), 0)
    assert balance > 0.01
    torch.testing.assert_close(loss, own + balance)
