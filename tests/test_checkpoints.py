"""Upcycled models of transformers that ``save_pretrained`` and ``Trainer`` save and take back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import accelerate
import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import Tensor

import gmoe
from tests.helpers.huggingface import MODELS, build, run
from tests.helpers.shrunk import moved

MESSAGE = r"expert.*gmoe\.load\(folder\)"
SHARDED = "20KB"


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


def save_with_gmoe(model: Any, folder: Path) -> None:
    gmoe.save(model, folder)


def save_with_trainer(model: Any, folder: Path) -> None:
    arguments = hf.TrainingArguments(str(folder), report_to="none", use_cpu=True)
    hf.Trainer(model=model, args=arguments).save_model()


WAYS: dict[str, Callable[[Any, Path], object]] = {
    "gmoe.save": save_with_gmoe,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(str(folder), max_shard_size=SHARDED),
    "Trainer": save_with_trainer,
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "save_pretrained") for name in MODELS),
        *(("ViT", way) for way in WAYS if way != "save_pretrained"),
        ("DINOv2, gated", "sharded"),
    ],
)
def test_a_saved_model_comes_back_with_its_experts_or_not_at_all(
    name: str, way: str, tmp_path: Path
) -> None:
    model = upcycled(name, start="copies" if way == "sharded" else "shared")
    WAYS[way](model, tmp_path)
    is_sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert is_sharded == (way == "sharded")
    assert is_sharded != (tmp_path / "model.safetensors").exists()
    check_comes_back(model, tmp_path)
    check_plain_transformers_raise(model, tmp_path)


def test_a_part_of_a_model_saves_its_experts_too(tmp_path: Path) -> None:
    model = upcycled("ViT").vit
    model.save_pretrained(tmp_path)
    # It has no pooling layer, of which the configuration says nothing.
    with pytest.raises(ValueError, match=r"model\.safetensors: got .*pooler"):
        gmoe.load(tmp_path)
    check_comes_back(model, tmp_path, hf.ViTModel(model.config, add_pooling_layer=False))
    check_plain_transformers_raise(model, tmp_path)


def test_dtypes_come_back(tmp_path: Path) -> None:
    model = upcycled().bfloat16()
    model.save_pretrained(tmp_path)
    again: Any = gmoe.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert value.dtype == again.state_dict()[name].dtype, name
    assert again.config.dtype == torch.bfloat16


def test_a_folder_that_is_written_again_has_no_old_files(tmp_path: Path) -> None:
    model = upcycled()
    model.save_pretrained(tmp_path, max_shard_size=SHARDED)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "gmoe.json",
        "model.safetensors",
    }
    model.save_pretrained(tmp_path, max_shard_size=SHARDED)
    assert not (tmp_path / "model.safetensors").exists()
    check_comes_back(model, tmp_path)


def test_other_readers_of_weights_refuse_the_files(tmp_path: Path) -> None:
    """Versions of transformers before 5 look at the format, as accelerate does."""
    upcycled().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "gmoe"}
    with pytest.raises(OSError, match="metadata"):
        accelerate.load_checkpoint_in_model(build("ViT"), str(path))


def test_options_that_would_change_the_files_are_refused(tmp_path: Path) -> None:
    model = upcycled()
    for option, value in (("variant", "fp16"), ("push_to_hub", True), ("anything", 3)):
        with pytest.raises(ValueError, match=rf"^{option}: got {value!r}, expected none"):
            model.save_pretrained(tmp_path / "model", **{option: value})
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", token=None, safe_serialization=True)
    check_comes_back(model, tmp_path / "model")


def test_the_weights_that_trainer_gathered_are_written(tmp_path: Path) -> None:
    """Of a model in several processes it passes them."""
    model, gathered = upcycled(), moved(upcycled())
    model.save_pretrained(tmp_path, state_dict=gathered.state_dict())
    check_comes_back(gathered, tmp_path)
    assert not torch.equal(run(gathered), run(model))


def test_adapters_beside_experts_are_refused(tmp_path: Path) -> None:
    model = upcycled()
    model._hf_peft_config_loaded = True  # as ``add_adapter`` sets it
    with pytest.raises(ValueError, match=r"^save_pretrained: got .* with adapters beside experts"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


class Own(hf.ViTForImageClassification):
    """A class that transformers does not have."""


def test_a_base_that_cannot_be_built_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own: Any = moved(gmoe.moefy(Own(build("ViT").config).eval(), num_experts=4))
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^base: got None, expected a Own"):
        gmoe.load(tmp_path)
    again = gmoe.load(tmp_path, base=Own(build("ViT").config))
    assert torch.equal(run(again), run(own))

    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^base: got None, .*no config\.json"):
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
    upcycled().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        gmoe.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("names", ["{", "[]", '{"weight_map": {"x": "../elsewhere.safetensors"}}'])
def test_a_tampered_index_is_an_error(names: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    upcycled().save_pretrained(folder, max_shard_size=SHARDED)
    (folder / "model.safetensors.index.json").write_text(names)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: got "):
        gmoe.load(folder)


# Trainer ------------------------------------------------------------------------------------------


def images(count: int = 24) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=drawn)
    return [{"pixel_values": one, "labels": i % 2} for i, one in enumerate(pixels)]


def trainer_of(model: Any, folder: Path, **options: Any) -> Any:
    options = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    arguments = hf.TrainingArguments(str(folder), **options)
    return hf.Trainer(model=model, args=arguments, train_dataset=images(), eval_dataset=images(8))


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
    whole = trainer_of(upcycled(**options), tmp_path / "whole")
    whole.train()
    again = trainer_of(upcycled(**options), tmp_path / "again")
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
    model = upcycled()
    hf.Trainer(model=model, args=arguments, train_dataset=images()).train()
    check_comes_back(model.eval(), tmp_path / "checkpoint-2")
    arguments.max_steps = 3
    resumed = hf.Trainer(model=upcycled(), args=arguments, train_dataset=images())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer = trainer_of(upcycled(), tmp_path, **evaluated, **best)
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


def test_old_checkpoints_go_away(tmp_path: Path) -> None:
    trainer_of(upcycled(), tmp_path, save_total_limit=2).train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_the_model_alone_can_be_saved(tmp_path: Path) -> None:
    trainer = trainer_of(upcycled(), tmp_path, save_only_model=True)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert not (folder / "optimizer.pt").exists()
    check_comes_back(trainer.model.eval(), folder)
    check_plain_transformers_raise(trainer.model, folder)


def test_shards_are_resumed(tmp_path: Path) -> None:
    """Trainer has no option for their size, so that the model is told it."""
    whole = trainer_of(upcycled(), tmp_path / "whole", save_steps=3)
    save = whole.model.save_pretrained
    whole.model.save_pretrained = lambda *args, **options: save(
        *args, **options, max_shard_size=SHARDED
    )
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    again = trainer_of(upcycled(), tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(folder))
    assert losses_of(again)[3:] == losses_of(whole)[3:]


# the Hub ------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the Hub: keeps a copy of each upload, with what the folder held."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.commits = folder, list[Path]()
        self.api = MagicMock()
        self.api.create_repo.return_value = SimpleNamespace(repo_id="me/vit")
        self.api.upload_folder.side_effect = self.upload_folder
        self.api.create_commit.side_effect = self.create_commit
        for module in (hf.utils.hub, hf.trainer):
            # a function of this name in new versions, the calls themselves in older ones
            patch.setattr(module, "hf_api", lambda: self.api, raising=False)
            for name in ("create_repo", "create_commit", "upload_folder"):
                patch.setattr(module, name, getattr(self.api, name), raising=False)
        for module in (hf.utils.hub, hf.trainer):
            patch.setattr(module.ModelCard, "load", lambda *_, **__: ModelCard("---\n---\n"))

    def upload_folder(self, *, folder_path: Path, **_: Any) -> Any:
        """As ``Trainer`` pushes its folder; checkpoints stay here."""
        self.commits.append(self.folder / str(len(self.commits)))
        ignored = shutil.ignore_patterns("checkpoint-*", "_*")
        shutil.copytree(folder_path, self.commits[-1], ignore=ignored)
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)

    def create_commit(self, *, operations: Any, **_: Any) -> Any:
        """As a model pushes itself."""
        self.commits.append(self.folder / str(len(self.commits)))
        self.commits[-1].mkdir(parents=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.commits[-1] / operation.path_in_repo)
        return SimpleNamespace(commit_url="the commit")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("size", ["50GB", SHARDED])
def test_a_model_pushes_its_experts(size: str, hub: Hub) -> None:
    model = upcycled()
    model.push_to_hub("vit", max_shard_size=size)
    (commit,) = hub.commits
    assert (commit / "README.md").exists()
    assert (commit / "model.safetensors").exists() == (size == "50GB")
    check_comes_back(model, commit)
    check_plain_transformers_raise(model, commit)


def test_trainer_pushes_experts_at_each_checkpoint_and_at_the_end(hub: Hub, tmp_path: Path) -> None:
    """Of a checkpoint it pushes the files that it knows by name, which ``gmoe.json`` is not."""
    pushed = {"push_to_hub": True, "hub_model_id": "me/vit", "hub_always_push": True}
    trainer = trainer_of(upcycled(), tmp_path / "run", max_steps=4, **pushed)
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.commits) >= 3
    for commit in hub.commits:
        gmoe.load(commit)
        check_plain_transformers_raise(trainer.model, commit)
    check_comes_back(trainer.model.eval(), hub.commits[-1])
