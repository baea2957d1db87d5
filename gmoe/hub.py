"""Save a model to a folder or the Hugging Face Hub, and load it again.

The files are those of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json``,
``model.safetensors`` and a card, ``README.md``. That mixin is not the base class here, for two
reasons: every model would require ``huggingface_hub``, and it silently leaves out arguments that
JSON cannot hold (a router's class, a list with a factory), so that another model comes back. Here,
saving such a model is an error, and loading never imports anything that a file names.

Importing this module takes torch alone; saving and loading import the rest.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe._checks import changed_option, in_short, naming_extras
from gmoe.flops import active_parameters
from gmoe.moe import MoELayer
from gmoe.routers import Router

Model = TypeVar("Model", bound="HubMixin")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ONE_FILE = "50GB"
"""The largest file of weights, as in transformers."""

SMALL = 10_000
"""A size that is taken as it is, however few weights there are."""

CARD_TEXT = """---
library_name: gmoe
tags: [mixture-of-experts, pytorch]
---

# {name}

{total:,} parameters, of which an average token uses {active:,}.

```python
import gmoe

model = gmoe.{name}.from_pretrained("THIS FOLDER OR REPOSITORY")
```
"""


class HubMixin:
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor resolves defaults that follow from other arguments, calls
    ``config = recorded(locals())`` before it has any other local name, and assigns the result to
    ``self.config`` after ``super().__init__(...)``; so does a subclass with its own constructor.
    Classes that ``known`` lists are saved by name: ``recorded(locals(), known=gmoe.ROUTERS)``.
    """

    config: dict[str, object]
    """The arguments of the constructor, as in ``config.json``."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write configuration, weights and card, and return the folder.

        Args:
            folder: where to write; created if it does not exist.

        Raises:
            ImportError: ``safetensors`` is not installed.
            ValueError: an argument that has no form in JSON and no name: a function, a ``partial``,
                an instance, your own class; a subclass that does not record its arguments.
        """
        with naming_extras():
            from safetensors.torch import save_file
        assert isinstance(self, nn.Module)
        name = type(self).__name__
        for value in self.config.values():
            if isinstance(value, ValueError):
                raise ValueError(value)  # a new one, which does not keep old frames alive
        try:
            inspect.signature(type(self)).bind(**self.config)
        except TypeError as error:
            raise ValueError(
                f"model: got a {name} ({error}), expected one that records its own arguments"
            ) from error
        self._check_fits()
        # Clones, since safetensors refuses tensors that share their memory, as tied layers do.
        state = {
            key: value.detach().cpu().contiguous().clone()
            for key, value in self.state_dict().items()
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier model, and the last to come: cut off, the folder holds no model.
        (folder / CONFIG).unlink(missing_ok=True)
        total = sum(parameter.numel() for parameter in self.parameters())
        card = CARD_TEXT.format(name=name, total=total, active=active_parameters(self))
        (folder / CARD).write_text(card)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = {"model": name, "arguments": self.config}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return folder

    def _check_fits(self) -> None:
        """Refuse a model of other weights or router options than its configuration builds."""
        model: Any = self
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model has given them when it was built
            built: Any = type(self)(**self.config)
        try:
            built.load_state_dict(model.state_dict())
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise ValueError(
                f"model: got a {type(self).__name__} with other weights than its configuration "
                f"says ({first} ...), expected the model as it was built; with layers that were "
                "pruned or folded to dense ones, gmoe.save(model, folder)"
            ) from error
        parts = dict(built.named_modules())
        for path, router in model.named_modules():
            changed = None
            if isinstance(router, Router) and path in parts:
                changed = changed_option(router, parts[path])
            if changed is not None:
                option, value, before = changed
                raise ValueError(
                    f"{option}: got {value!r} of {path}, expected {before!r}, with which the model "
                    "was built: give it to the model, in router_kwargs"
                )

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | Path, *, revision: str | None = None, **arguments: object
    ) -> Model:
        """Build a saved model in evaluation mode on the CPU, with the dtypes of the saved weights.

        Args:
            folder: a folder, or the name of a repository on the Hub, ``"owner/name"``; log in first
                to load a private one (``hf auth login``, or ``HF_TOKEN``).
            revision: a branch, tag or commit of the repository.
            **arguments: arguments of the constructor in place of the saved ones.

        Raises:
            ImportError: ``safetensors`` is not installed, or, for a repository,
                ``huggingface_hub``.
            FileNotFoundError: a file is missing.
            ValueError: a file that is damaged or holds another class; weights that do not fit the
                configuration. The message names the file.
        """
        if not Path(folder).is_dir():
            with naming_extras():
                from huggingface_hub import snapshot_download
            folder = snapshot_download(
                str(folder), revision=revision, allow_patterns=[CONFIG, WEIGHTS]
            )
        config = Path(folder) / CONFIG
        weights = Path(folder) / WEIGHTS
        text = config.read_bytes()
        state = read_weights(weights, "save_pretrained")
        try:
            saved = json.loads(text)
            if saved["model"] != cls.__name__:
                raise ValueError(f"model: got {saved['model']}, expected {cls.__name__}")
            build: Callable[..., Model] = cls
            check_sizes(saved["arguments"], state)
            model = build(**(saved["arguments"] | arguments))
        except Exception as error:  # a file from the network may hold anything
            raise ValueError(
                f"{config}: got {type(error).__name__}: {in_short(error)}, expected what "
                f"save_pretrained writes of a {cls.__name__}"
            ) from error
        assert isinstance(model, nn.Module)
        try:
            # assign: the parameters take the dtypes of the file.
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{weights}: got {in_short(error)}, expected the weights of the model in {CONFIG}"
            ) from error
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Upload what :meth:`save_pretrained` writes, and return the commit's URL.

        Creates the repository if it does not exist.

        Args:
            repo_id: the repository's name, ``"owner/name"``.
            private: make a new repository private (default: the owner's setting).

        Raises:
            ImportError: ``huggingface_hub`` or ``safetensors`` is not installed.
            ValueError: as :meth:`save_pretrained`, before anything is uploaded.
        """
        with naming_extras():
            from huggingface_hub import HfApi
        api = HfApi()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)


class SavesExperts:
    """Stands in for the ``save_pretrained`` of a model of another library that has experts.

    The class's own files would say nothing of the experts, and the dense model would come back.
    Models of transformers are written as :func:`gmoe.save` writes them; ``Trainer`` and
    ``push_to_hub`` call this, too. Others are refused.

    Args:
        model: the model, whose class has the method.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        max_shard_size: int | str = ONE_FILE,
        **options: Any,
    ) -> Any:
        """Save with the experts, or as the class does once no layer has any.

        Args:
            save_directory: where to write; created if it does not exist.
            is_main_process: false for a process that writes nothing.
            state_dict: the weights, if they are not those of the model (default: the model's own).
            max_shard_size: the largest file of weights, in bytes or as ``"5GB"``.
            **options: those of the class, for a model without experts.

        Raises:
            ValueError: experts in a model of a library other than transformers, adapters beside
                experts, or an option that changes the files; what :func:`gmoe.save` refuses.
        """
        given = {"is_main_process": is_main_process, "state_dict": state_dict}
        if not any(isinstance(part, MoELayer) for part in self.model.modules()):
            sized = {} if max_shard_size == ONE_FILE else {"max_shard_size": max_shard_size}
            save: Any = type(self.model).save_pretrained
            return save(self.model, save_directory, **given, **sized, **options)
        name = type(self.model).__name__
        if not is_of_transformers(self.model):
            raise ValueError(
                f"save_pretrained: got a {name} with layers of experts, which from_pretrained "
                f"would leave out, expected gmoe.save(model, {str(save_directory)!r})"
            )
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_pretrained: got a {name} with adapters beside experts, of which "
                "transformers would save the adapters alone, expected them merged"
            )
        for option, value in options.items():
            if value and option not in WITHOUT_EFFECT:
                raise ValueError(f"{option}: got {value!r}, expected none: the model has experts")
        if not is_main_process:
            return None
        from gmoe.saved import LAYERS, write  # which imports this module

        folder = write(self.model, save_directory, state=state_dict, max_shard_size=max_shard_size)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # Trainer pushes the folder above, to which it copies only the files that it knows.
            shutil.copy(folder / LAYERS, folder.parent)
        return folder


WITHOUT_EFFECT = ("safe_serialization", "save_original_format", "save_peft_format", "token")
"""Options of ``save_pretrained`` that change nothing in what gmoe writes."""

EXPLAINED = "none: the model has experts, read it with gmoe.load(folder)"
"""Stands in ``config.json`` where ``from_pretrained`` looks for the file of the weights.

It is the end of transformers' error. Without it a dense model would come back, with a warning.
"""


def is_of_transformers(model: object) -> bool:
    """Whether it is a model of transformers; that there is one implies that it was imported."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def write_config(model: Any, folder: Path) -> None:
    """Write the configuration of a model of transformers that has experts.

    Plain ``from_pretrained`` of the folder raises, by the class and by ``AutoModel``.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    path = folder / CONFIG
    saved = json.loads(path.read_text()) | {"transformers_weights": EXPLAINED}
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def build_from_config(name: str, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The dense model that :func:`write_config` described, with any values.

    No code runs from the folder: the class is looked up in transformers.

    Args:
        name: of its class.
        folder: holds the configuration.
        state: the weights, which limit the sizes.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(
            f"base: got None, expected the dense model, a {name}: the folder has no {CONFIG} of "
            "transformers, to build it from"
        )
    import transformers

    build = getattr(transformers, name, None)
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        raise ValueError(f"base: got None, expected a {name}, which is no model of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config.to_dict(), state)
        vars(config).pop("transformers_weights", None)
        built: nn.Module = build(config)
    except Exception as error:  # a file from the network may hold anything
        raise ValueError(
            f"{path}: got {type(error).__name__}: {in_short(error)}, expected the configuration "
            f"of a {name}"
        ) from error
    return built


def save_with_experts(model: Any) -> None:
    """Let ``save_pretrained`` of other libraries keep, or refuse, the experts of a model."""
    for part in model.modules():
        is_other = hasattr(type(part), "save_pretrained") and not isinstance(part, HubMixin)
        if is_other and any(isinstance(layer, MoELayer) for layer in part.modules()):
            part.save_pretrained = SavesExperts(part)


def read_weights(path: Path, writer: str) -> dict[str, Tensor]:
    """The tensors in a file that ``writer`` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    with naming_extras():
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        return load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: got {in_short(error)}, expected what {writer} writes") from error


def check_sizes(arguments: Mapping[str, object], state: Mapping[str, Tensor]) -> None:
    """Refuse arguments from a file that hold a number larger than its weights have numbers.

    No width and no number of experts or layers is: what was merely claimed would be allocated.
    """
    most = max(SMALL, sum(value.numel() for value in state.values()))
    for name, value in arguments.items():
        if isinstance(value, dict):
            check_sizes(value, state)
        elif isinstance(value, list):
            check_sizes({f"{name}.{place}": part for place, part in enumerate(value)}, state)
        elif isinstance(value, int) and abs(value) > most:
            raise ValueError(f"{name}: got {value}, expected at most {most}")


def recorded(
    arguments: Mapping[str, object], extra: str = "", known: Mapping[str, object] = {}
) -> dict[str, object]:
    """A constructor's arguments as JSON holds them, with tuples as lists.

    An argument without such a form becomes an error, which saving raises. The result holds names
    and numbers only, so that the model stays as light and as picklable as it is.

    Args:
        arguments: the constructor's ``locals()`` while they hold nothing but its arguments.
        extra: the name of its ``**`` argument.
        known: classes and factories that are saved by name, such as ``gmoe.ROUTERS`` (default:
            none).
    """

    def encode(value: object) -> str | int | float:
        if isinstance(value, Real):  # a number of NumPy's
            return int(value) if isinstance(value, Integral) else float(value)
        for name, registered in known.items():
            if value is registered:
                return name
        raise TypeError(getattr(value, "__qualname__", f"an instance of {type(value).__name__}"))

    ignored = ("self", "__class__", extra)
    config = {name: value for name, value in arguments.items() if name not in ignored}
    further = arguments.get(extra, {})
    assert isinstance(further, Mapping)
    for name, value in {**config, **further}.items():
        try:
            config[name] = json.loads(json.dumps(value, default=encode, allow_nan=False))
        except (TypeError, ValueError) as error:
            config[name] = ValueError(
                f"{name}: got {error}, expected names, numbers, lists or dicts of them, or a class "
                "that has a name, to be saved"
            )
    return config
