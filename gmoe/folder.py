"""The folder of a saved model: what it says, its one writer and its one reader.

A folder holds these files, none of which is code:

- the spec, JSON: the class of the model, the arguments of its constructor, and what was done to its
  layers. A model of gmoe's own has it as ``config.json``, which is what the Hub looks for. Somebody
  else's has it as ``gmoe.json``, beside the ``config.json`` of transformers if it is theirs;
- ``model.safetensors``: all weights, or an index of several such files;
- ``receipt.safetensors``: what the model gave for one input, if there was one;
- ``README.md``: a card, of a model of gmoe's own.

Importing this module takes torch alone; writing and reading import the rest.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import changed_option, check, in_short, naming_extras
from gmoe.candidates import MLP
from gmoe.experts import Experts
from gmoe.flops import active_parameters
from gmoe.moe import MoELayer
from gmoe.recorded import BuildsItself
from gmoe.routers import Router
from gmoe.stack import has_base
from gmoe.start import build_layer_router
from gmoe.unstacked import UnstackedLinears

LAYERS = "gmoe.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SHARD = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
RECEIPT = "receipt.safetensors"
CARD = "README.md"

ONE_FILE = "50GB"
"""The largest file of weights, as in transformers."""

SMALL = 10_000
"""A size that is taken as it is, however few weights there are."""

FORMAT = 2
"""The version of the files; a reader refuses others."""

WRITTEN = "what gmoe.save and save_pretrained write"

BY_HAND = (
    "no code runs from a file: torch.save(model.state_dict(), path), and to load it, build the "
    "model in the same way and call load_state_dict"
)
"""What to do with a model that cannot be saved."""

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


# what a folder says -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """What was done to a layer of the base, as it stands in the file.

    Args:
        moefied: the arguments of :func:`gmoe.moefy`; ``None`` for a layer that the base has itself.
        folded: the base of its experts was added to them, see :func:`gmoe.stack.fold`.
        kept: the experts that stayed when others were pruned; ``None`` for all.
        dense: it was folded back to one MLP, see :func:`gmoe.densify`.
    """

    moefied: dict[str, Any] | None
    folded: bool
    kept: list[int] | None
    dense: bool


MOEFIED = (
    *("num_experts", "k", "router", "router_kwargs", "start", "backend"),
    *("router_input", "mix"),
)
"""The arguments of :func:`gmoe.moefy` that a file may hold; files of 0.1.0 lack the last two."""


@dataclass(frozen=True)
class Spec:
    """How a model is made again: build its base, then edit the layers.

    Args:
        model: the name of its class.
        arguments: of its constructor, which builds the base; ``None`` if somebody else builds it.
        layers: the edits of each layer with experts, and of each MLP that was one, by name. A layer
            of the base that is not among them became dense.
    """

    model: str
    arguments: dict[str, Any] | None
    layers: dict[str, Edits]

    @property
    def file(self) -> str:
        """The name of the file that holds it."""
        return LAYERS if self.arguments is None else CONFIG


def spec_of(model: nn.Module, arguments: dict[str, Any] | None = None) -> Spec:
    """How a model was made; ``arguments`` are those of its constructor if that builds the base."""
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, MoELayer | MLP):
            continue
        moefied = None
        if layer.moefied is not None:
            moefied = layer.moefied.values
            for reason in layer.moefied.unsavable.values():
                raise ValueError(f"{reason}; {BY_HAND}")
        if isinstance(layer, MoELayer):
            if layer.experts is None:
                raise ValueError(f"model: got {name}, whose widths are open: call it once before")
            _refuse_unstacked(name, layer)
            if arguments is None:  # else the whole model is compared with one that is built anew
                _check_experts(name, layer)
                _check_router(name, layer)
            kept = None if layer.kept is None else list(layer.kept)
            layers[name] = Edits(moefied, is_folded(layer), kept, dense=False)
        elif moefied is not None:
            layers[name] = Edits(moefied, folded=False, kept=None, dense=True)
    return Spec(type(model).__name__, arguments, layers)


def is_folded(layer: MoELayer) -> bool:
    """True if experts started as copies, and share no base (any more)."""
    return layer.start == "copies" and not has_base(layer.experts)


def _refuse_unstacked(name: str, layer: MoELayer) -> None:
    for path, part in layer.named_modules(prefix=name):
        if isinstance(part, UnstackedLinears):
            replaced = part.replaced()
            raise ValueError(
                f"model: got {path} with {replaced or 'unstacked layers'}, expected experts as "
                "they were built: gmoe.restack(model) before it is saved, gmoe.unstack(model) "
                f"after it is loaded; of parts that were replaced, {BY_HAND}"
            )


def _check_experts(name: str, layer: MoELayer) -> None:
    """Refuse experts with parts of classes that neither gmoe nor the base has."""
    holders = [part for part in layer.experts.modules() if getattr(part, "holds_any_conv", False)]
    of_base = {part for one in holders for child in one.children() for part in child.modules()}
    for path, part in layer.experts.named_modules(prefix=f"{name}.experts"):
        is_of_gmoe = type(part).__module__.partition(".")[0] == "gmoe"
        # Norms and activations without parameters are those of the base, too.
        has_parameters = any(True for _ in part.parameters(recurse=False))
        if is_of_gmoe or part in of_base or not (has_parameters or isinstance(part, Experts)):
            continue
        raise ValueError(
            f"model: got {path}, a {type(part).__name__}, expected experts as they were built; "
            f"{BY_HAND}"
        )


def _check_router(name: str, layer: MoELayer) -> None:
    """Refuse a router of another class or options than :func:`gmoe.moefy` builds."""
    router: Any = getattr(layer, "router", None)
    if router is None or layer.moefied is None:
        return
    made = layer.moefied.values
    options = made["num_experts"], made["k"], made["router_kwargs"], layer.mix
    dim = getattr(router, "dim", 1)
    # As it is built when the model is loaded, without values.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = build_layer_router(layer.start, made["router"], dim, *options)
        if layer.kept is not None:
            built.keep(layer.kept)
    refuse_other(f"{name}.router", router, built)


def refuse_other(path: str, part: nn.Module, built: nn.Module | None) -> None:
    """Refuse a part of another class than a reader builds there, or a router of other options."""
    if built is None or type(part) is not type(built):
        expected = "none" if built is None else f"a {type(built).__name__}"
        raise ValueError(
            f"model: got {path}, a {type(part).__name__}, expected {expected}, as it was built; "
            f"{BY_HAND}"
        )
    changed = changed_option(part, built) if isinstance(part, Router) else None
    if changed is not None:
        option, value, before = changed
        raise ValueError(
            f"{option}: got {value!r} of {path}, expected {before!r}, with which it was built: "
            "give it in router_kwargs"
        )


# writing ------------------------------------------------------------------------------------------


def write(
    model: nn.Module,
    folder: str | Path,
    spec: Spec,
    weights: Mapping[str, Tensor],
    *,
    receipt: Mapping[str, Tensor] = {},
    max_shard_size: int | str = ONE_FILE,
) -> Path:
    """Write a model to a folder, which is created if it does not exist, and return the folder.

    Args:
        model, folder: the model, and where to write.
        spec: see :func:`spec_of`.
        weights, receipt: tensors by name; see :func:`saveable`.
        max_shard_size: the largest file of weights, in bytes or as ``"5GB"``.
    """
    with naming_extras():
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file
    shards = split_torch_state_dict_into_shards(
        dict(weights), filename_pattern=SHARD, max_shard_size=max_shard_size
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. The files of an earlier model go. What says what the model is goes first, and comes last:
    # cut off in between, the folder holds no model. A card and a config.json of others stay.
    for name in (LAYERS, spec.file, WEIGHTS, INDEX, RECEIPT):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(SHARD.format(suffix="-*-of-*")):
        path.unlink()
    for name in (CARD, CONFIG):
        if _is_ours(folder / name):
            (folder / name).unlink()

    # 2. What describes the model to others.
    has_config = is_of_transformers(model)
    if has_config:
        _write_config(model, folder)
    if spec.file == CONFIG:
        total = sum(parameter.numel() for parameter in model.parameters())
        active = active_parameters(model)
        card = CARD_TEXT.format(name=spec.model, total=total, active=active)
        (folder / CARD).write_text(card)

    # 3. Weights and receipt. Older versions of transformers, and accelerate, refuse a format that
    # they do not know.
    metadata = {"format": "gmoe" if has_config else "pt"}
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata=metadata)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / INDEX, index)
    if receipt:
        save_file(dict(receipt), folder / RECEIPT)
    _write_json(folder / spec.file, {"format": FORMAT, **asdict(spec)})
    return folder


def _is_ours(path: Path) -> bool:
    """True for the card or the configuration of a model of gmoe's own."""
    if not path.exists():
        return False
    text = path.read_text(errors="replace")
    if path.name == CARD:
        return text.startswith(CARD_TEXT.partition("# ")[0])
    try:
        written = json.loads(text)
    except ValueError:
        return False
    return isinstance(written, dict) and written.keys() == {"format", *Spec.__dataclass_fields__}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def saveable(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Clones, since safetensors refuses tensors that share their memory, as tied layers do."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: got {name}, a {type(value).__name__}, expected tensors: save before "
                "layers are quantized"
            )
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


# reading ------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Name the file in whatever error its contents cause, which may be anything."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}: {in_short(error)}, expected {expected}"
        ) from error


def read(folder: Path) -> tuple[Spec, dict[str, Tensor]]:
    """What a folder says of its model, and all weights."""
    path = folder / LAYERS
    if not path.exists():
        path = folder / CONFIG
    with naming(path, WRITTEN):
        spec = _checked(json.loads(path.read_bytes()))
    state = _read_state(folder)
    with naming(path, WRITTEN):
        check_sizes(spec.arguments or {}, state)
        for layer in spec.layers.values():
            check_sizes(layer.moefied or {}, state)
    return spec, state


def _checked(found: Any) -> Spec:
    """The spec in a file, if it has the form that it should have.

    What builds the model checks the values: they are names and numbers, whatever they are.
    """
    check(found["format"] == FORMAT, "format", repr(found["format"]), FORMAT)
    layers = {}
    for name, saved in found["layers"].items():
        edits = Edits(**saved)
        if edits.moefied is not None:
            got = sorted(edits.moefied)
            is_legal = {*MOEFIED[:-2]} <= {*got} <= {*MOEFIED}
            check(is_legal, "moefied", got, ", ".join(MOEFIED))
        for key in ("folded", "dense"):
            value = getattr(edits, key)
            check(isinstance(value, bool), key, repr(value), "true or false")
        layers[name] = edits
    return Spec(str(found["model"]), found["arguments"], layers)


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


def _read_state(folder: Path) -> dict[str, Tensor]:
    """All weights, which are in one file or in those that an index lists."""
    path = folder / INDEX
    if not path.exists():
        return read_tensors(folder / WEIGHTS)
    with naming(path, WRITTEN):
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        for name in names:
            check(Path(name).name == name, "weight_map", name, "a file of the folder")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_tensors(folder / name)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file."""
    with naming_extras():
        from safetensors.torch import load_file
    with naming(path, WRITTEN):
        return load_file(path)


# models of transformers ---------------------------------------------------------------------------

EXPLAINED = "none: the model has experts, read it with gmoe.load(folder)"
"""Stands in ``config.json`` where ``from_pretrained`` looks for the file of the weights.

It is the end of transformers' error. Without it a dense model would come back, with a warning.
"""

WITHOUT_EFFECT = ("safe_serialization", "save_original_format", "save_peft_format", "token")
"""Options of ``save_pretrained`` that change nothing in what gmoe writes."""


def is_of_transformers(model: object) -> bool:
    """Whether it is a model of transformers; that there is one implies that it was imported."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _write_config(model: Any, folder: Path) -> None:
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
    """The dense model of transformers that a folder describes, with any values.

    No code runs from the folder: the class is looked up in transformers by its name. The weights
    limit the sizes.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(
            f"base: got None, expected the model as it was before moefy, a {name}, or, if you "
            "wrote its layers with experts yourself, a new one with them: the folder has no "
            f"{CONFIG} of transformers, to build it from"
        )
    import transformers

    build = getattr(transformers, name, None)
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        raise ValueError(f"base: got None, expected a {name}, which is no model of transformers")
    with naming(path, f"the configuration of a {name}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config.to_dict(), state)
        vars(config).pop("transformers_weights", None)
        built: nn.Module = build(config)
    return built


class SavesExperts:
    """Stands in for the ``save_pretrained`` of a model of another library that has experts.

    The class's own files would say nothing of the experts, and the dense model would come back.
    Models of transformers are written as :func:`gmoe.save` writes them; ``Trainer`` and
    ``push_to_hub`` call this, too. Others are refused.
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

        Arguments are those of transformers; refused are options that would change the files,
        adapters beside experts, and what :func:`gmoe.save` refuses.
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
        spec = spec_of(self.model)
        weights = saveable(self.model.state_dict() if state_dict is None else state_dict)
        folder = write(self.model, save_directory, spec, weights, max_shard_size=max_shard_size)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # Trainer pushes the folder above, to which it copies only the files that it knows.
            shutil.copy(folder / spec.file, folder.parent)
        return folder


def save_with_experts(model: nn.Module) -> None:
    """Let ``save_pretrained`` of other libraries keep, or refuse, the experts of a model."""
    for part in model.modules():
        is_other = hasattr(type(part), "save_pretrained") and not isinstance(part, BuildsItself)
        if is_other and any(isinstance(layer, MoELayer) for layer in part.modules()):
            part.save_pretrained = SavesExperts(part)  # type: ignore[assignment]
