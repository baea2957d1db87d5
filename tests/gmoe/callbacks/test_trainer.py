"""The health of experts under transformers' Trainer is what a count beside it finds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import gmoe
from tests.helpers.huggingface import build, trainer_of

STEPS = 4


class Seen(hf.TrainerCallback):
    """Stands in for TensorBoard or W&B: keeps what is logged."""

    def __init__(self) -> None:
        self.logs = list[dict[str, float]]()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the log."""
        self.logs.append(dict(kwargs["logs"]))


def unsaved(model: Any, folder: Path, **options: Any) -> Any:
    """A Trainer that writes nothing."""
    options = {"max_steps": STEPS, "logging_steps": 2, "save_strategy": "no", **options}
    return trainer_of(model, folder, (32, 32), **options)


CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
        CHECKPOINTING,
        {"logging_strategy": "epoch", "max_steps": 8},
    ],
    ids=["plain", "accumulated", "evaluated", "checkpointed", "by epoch"],
)
def test_it_logs_what_a_count_beside_it_finds(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = gmoe.moefy(build("ViT"), num_experts=4)
    trainer = unsaved(model, tmp_path, **options)
    seen = Seen()
    trainer.callback_handler.callbacks.insert(0, seen)  # where reporters stand
    trainer.add_callback(gmoe.TrainerHealth(trainer))

    # Count beside it: all that the first layer decides in training, outside of backward passes.
    expected, counted = list[dict[str, float]](), gmoe.RoutingStats(num_experts=4)
    router = next(part for part in model.modules() if isinstance(part, gmoe.Router))
    name = next(name for name, part in model.named_modules() if part is router)

    def count(_: nn.Module, __: Any, routing: gmoe.Routing) -> None:
        if router.training and torch._C._current_graph_task_id() == -1:
            counted.update(routing)

    class Collect(hf.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                health = gmoe.expert_health(counted, [name.removesuffix(".router")])
                expected.append(health.figures())
                counted.reset()

    router.register_forward_hook(count)
    trainer.add_callback(Collect())
    trainer.train()

    logged = [log for log in seen.logs if any(key.startswith("experts/") for key in log)]
    losses = [log for log in seen.logs if "loss" in log]
    assert len(logged) == len(losses) == len(expected) == (1 if "max_steps" in options else 2)
    for found, wanted in zip(logged, expected, strict=True):
        assert {key: found[key] for key in wanted} == pytest.approx(wanted)
        layers = {key.rpartition("/")[0] for key in found if key.startswith("experts/")}
        assert len(layers) == 2
    # In the history, too, at the same steps as the losses.
    history = trainer.state.log_history
    steps = [entry["step"] for entry in history if any("experts/" in key for key in entry)]
    assert steps == [entry["step"] for entry in history if "loss" in entry]


def test_it_says_once_what_to_do_about_a_collapse(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gmoe.moefy(build("ViT"), num_experts=8, router_kwargs={"balance": None, "noise": False})
    for part in model.modules():
        if isinstance(part, gmoe.TokenChoice):
            nn.init.zeros_(part.gate.weight)  # ties go to the first expert
            part.requires_grad_(False)
    trainer = unsaved(model, tmp_path, logging_steps=1)
    trainer.add_callback(gmoe.TrainerHealth(trainer))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in found if "of the load" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("1 of 8 experts has 100% of the load in vit.")
    assert ", and 1 more layers are alike: balance them" in said[0]


def test_it_leaves_no_hook_and_trains_again(tmp_path: Path) -> None:
    model: Any = gmoe.moefy(build("ViT"), num_experts=4)
    trainer = unsaved(model, tmp_path)
    callback = gmoe.TrainerHealth(trainer)
    trainer.add_callback(callback)
    for _ in range(2):
        trainer.train()
        assert not any(part._forward_hooks for part in model.modules())
    assert not callback.monitor.handles


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    trainer = unsaved(build("ViT"), tmp_path)
    trainer.add_callback(gmoe.TrainerHealth(trainer))
    with pytest.raises(ValueError, match=r"^model: got ViTForImageClassification without a router"):
        trainer.train()
