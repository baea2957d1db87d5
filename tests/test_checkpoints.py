"""Upcycled models of transformers that ``gmoe.save`` and ``Trainer`` save and take back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor

import gmoe
from tests.helpers.huggingface import MODELS, build, labeled_images, run, trainer_of
from tests.helpers.shrunk import moved

MESSAGE = r"expert.*gmoe\.load\(folder\)"


def upcycled(name: str = "ViT", **options: Any) -> Any:
    """A model with experts, not at its start."""
    return moved(gmoe.moefy(build(name), num_experts=4, **options)).eval()


def auto_classes(model: Any) -> list[Any]:
    """The automatic classes that could read a model's folder."""
    names = ["AutoModel", "AutoModelForImageClassification", "AutoModelForPreTraining"]
    found = [getattr(hf, name) for name in names]
    return [auto for auto in found if type(model.config) in auto._model_mapping]


def check_plain_transformers_raise(model: Any, folder: Path) -> None:
    """By the model's class and by each automatic class, whatever they are asked for."""
    autos = auto_classes(model)
    assert autos
    for reader in (type(model), *autos):
        for options in ({}, {"dtype": "auto"}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match=MESSAGE):
                reader.from_pretrained(str(folder), **options)
    config = hf.AutoConfig.from_pretrained(folder)  # as scripts do
    with pytest.raises(ValueError, match=MESSAGE):
        type(model).from_pretrained(folder, config=config)


def check_comes_back(model: Any, folder: Path, base: Any = None) -> None:
    """By one call, with the same class, configuration, outputs and weights."""
    again: Any = gmoe.load(folder, base)
    assert type(again) is type(model)
    assert not hasattr(again.config, "transformers_weights")
    assert torch.equal(run(again), run(model))
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype, name


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_with_its_experts_or_not_at_all(name: str, tmp_path: Path) -> None:
    model = upcycled(name, start="copies" if name == "ViT" else "shared")
    gmoe.save(model, tmp_path)
    check_comes_back(model, tmp_path)
    check_plain_transformers_raise(model, tmp_path)


def test_a_part_of_a_model_saves_its_experts_too(tmp_path: Path) -> None:
    model = upcycled("ViT").vit
    gmoe.save(model, tmp_path)
    # It has no pooling layer, of which the configuration says nothing.
    with pytest.raises(ValueError, match=r"model\.safetensors: got .*pooler"):
        gmoe.load(tmp_path)
    check_comes_back(model, tmp_path, hf.ViTModel(model.config, add_pooling_layer=False))
    check_plain_transformers_raise(model, tmp_path)


def test_other_readers_of_weights_refuse_the_files(tmp_path: Path) -> None:
    """Accelerate looks at the format."""
    gmoe.save(upcycled(), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "gmoe"}
    with pytest.raises(OSError, match="metadata"):
        accelerate.load_checkpoint_in_model(build("ViT"), str(path))


def test_what_transformers_itself_saves_is_no_folder_of_gmoe_and_is_not_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``save_pretrained`` is that of the class; its reader names each weight that is missing."""
    model = upcycled("CLIP")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: got .*expected what gmoe\.save, "):
        gmoe.load(tmp_path)
    logger = hf.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    type(model).from_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert "mlp.experts.up.weight" in caplog.text
    assert "UNEXPECTED" in caplog.text
    assert "mlp.fc1.weight" in caplog.text
    assert "MISSING" in caplog.text


class Own(hf.ViTForImageClassification):
    """A class that transformers does not have."""


def test_a_base_that_cannot_be_built_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own: Any = moved(gmoe.moefy(Own(build("ViT").config).eval(), num_experts=4))
    gmoe.save(own, tmp_path)
    with pytest.raises(ValueError, match=r"^base: got None, expected a Own"):
        gmoe.load(tmp_path)
    again = gmoe.load(tmp_path, base=Own(build("ViT").config))
    assert torch.equal(run(again), run(own))

    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^base: got None, expected a Own"):
        gmoe.load(tmp_path)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "no model": lambda _: {},
    "another model": lambda found: found | {"model_type": "bert"},
    "code": lambda found: found | {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}},
    "a list": lambda _: [],
    "a width as text": lambda found: found | {"hidden_size": "wide"},
    "layers without end": lambda found: found | {"num_hidden_layers": 2**40},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_tampered_configuration_is_an_error(change: Callable[[Any], Any], tmp_path: Path) -> None:
    gmoe.save(upcycled(), tmp_path)
    path = tmp_path / "config.json"
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        gmoe.load(tmp_path)
    assert not (tmp_path / "ran").exists()


# Trainer ------------------------------------------------------------------------------------------


def saving(model: Any, folder: Path, **options: Any) -> Any:
    """A Trainer that saves by gmoe every second step, of six."""
    options = {"save_steps": 2, "learning_rate": 1e-2, **options}
    trainer = trainer_of(model, folder, (24, 8), max_steps=6, logging_steps=1, **options)
    trainer.add_callback(gmoe.TrainerSave())
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


START: list[dict[str, Any]] = [
    {},
    {"start": "copies", "k": 2},
    {"router": "expert_choice", "router_kwargs": {"inference": "threshold"}},
]


@pytest.mark.parametrize("options", START, ids=["shared", "copies", "thresholds"])
def test_a_training_that_was_cut_off_goes_on_to_the_same_losses(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, counters of the routers, optimizer and schedule come back."""
    whole = saving(upcycled(**options), tmp_path / "whole")
    whole.train()
    again = saving(upcycled(**options), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses_of(again)[4:] == losses_of(whole)[4:]
    assert len(losses_of(whole)) == 6
    before, after = weights_of(whole.model), weights_of(again.model)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    check_comes_back(whole.model.eval(), tmp_path / "whole" / "checkpoint-6")


def test_the_default_arguments_save_and_resume(tmp_path: Path) -> None:
    """``save_steps`` is 500: the first checkpoint is that of the end, which needs no option."""
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    options: Any = {"train_dataset": labeled_images(24), "callbacks": [gmoe.TrainerSave()]}
    model = upcycled()
    hf.Trainer(model=model, args=arguments, **options).train()
    check_comes_back(model.eval(), tmp_path / "checkpoint-2")
    arguments.max_steps = 3
    resumed = hf.Trainer(model=upcycled(), args=arguments, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer = saving(upcycled(), tmp_path, **evaluated, **best)
    trainer.compute_metrics = lambda _: {"score": -trainer.state.global_step}
    first: dict[str, Tensor] = {}

    class Keep(hf.TrainerCallback):
        """Keeps the weights of the checkpoint that will be the best."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                first.update(weights_of(kwargs["model"]))

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert first.keys() == trainer.model.state_dict().keys()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, first[name]), name
    check_comes_back(trainer.model.eval(), tmp_path / "checkpoint-2")


def test_the_model_alone_can_be_saved(tmp_path: Path) -> None:
    trainer = saving(upcycled(), tmp_path, save_only_model=True)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert not (folder / "optimizer.pt").exists()
    check_comes_back(trainer.model.eval(), folder)
    check_plain_transformers_raise(trainer.model, folder)


def test_what_would_fail_at_the_first_checkpoint_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    trainer = saving(upcycled(router=partial(gmoe.TokenChoice, noise=False)), tmp_path)
    with pytest.raises(ValueError, match=r"^router: got an instance of partial, .*state_dict"):
        trainer.train()
    trainer = saving(upcycled(), tmp_path)
    trainer.args.push_to_hub = True
    with pytest.raises(ValueError, match=r"^push_to_hub: got True, .*upload_folder"):
        trainer.train()
    assert trainer.state.global_step == 0


class Wrapped(torch.nn.Module):
    """A model of one's own around one of gmoe's, of which Trainer saves the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = gmoe.ViTMoE(8, 2, "token_choice", num_experts=2)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.vit(pixel_values[:, :, :8, :8])
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_of_ones_own_is_saved_and_resumed(tmp_path: Path) -> None:
    whole, again = (saving(moved(Wrapped()), tmp_path / name) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses_of(again)[4:] == losses_of(whole)[4:]
    loaded = gmoe.load(tmp_path / "whole" / "checkpoint-6", base=Wrapped())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
