"""Save a model with experts that was made from somebody else's dense model, and load it again.

A folder holds these files, none of which is code:

- ``gmoe.json``: which layers have experts, and how they were made;
- ``model.safetensors``: all weights of the model, or an index of several such files;
- ``receipt.safetensors``: what the model gave for one input, if there was one;
- ``config.json``: the configuration of a model of transformers.

:class:`gmoe.GNNMoE` and :class:`gmoe.ViTMoE` know how they are built, and need no base: they have
``save_pretrained`` (:mod:`gmoe.hub`). Once layers of theirs were pruned or folded, they are saved
here, too.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._calls import Batch, arguments_of, finite, largest_difference, outputs_of
from gmoe._checks import (
    changed_option,
    check,
    check_at_least,
    check_counts,
    check_module,
    described,
    in_short,
    naming_extras,
    says_what_misfits,
)
from gmoe.candidates import MLP
from gmoe.convert import moefy
from gmoe.dense import densify_like
from gmoe.experts import Experts
from gmoe.hub import (
    ONE_FILE,
    build_from_config,
    check_sizes,
    is_of_transformers,
    read_weights,
    write_config,
)
from gmoe.layer_groups import groups_of
from gmoe.moe import MoELayer
from gmoe.routers import ROUTERS, Router
from gmoe.stack import fold, has_base
from gmoe.start import build_layer_router
from gmoe.unstacked import UnstackedLinears

LAYERS = "gmoe.json"
WEIGHTS = "model.safetensors"
SHARD = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
RECEIPT = "receipt.safetensors"

FORMAT = 1
"""The version of the files; a reader refuses others."""


@dataclass(frozen=True)
class SavedLayer:
    """How a layer was made, as it stands in the file.

    Args:
        moefied: the arguments of :func:`gmoe.moefy`; ``None`` for a layer that the base has itself.
        folded: the base of its experts was added to them, see :func:`gmoe.fold`.
        kept: the experts that stayed when others were pruned; ``None`` for all.
        dense: it was folded back to one MLP, see :func:`gmoe.densify`.
    """

    moefied: dict[str, Any] | None
    folded: bool
    kept: list[int] | None
    dense: bool


OPTIONS = ("num_experts", "k", "router", "router_kwargs", "upcycle", "start", "backend")
"""The arguments of :func:`gmoe.moefy` that a file may hold."""


@says_what_misfits
def save(model: nn.Module, folder: str | Path, inputs: Batch | None = None) -> Path:
    """Write a moefied model to a folder: how its layers were made, and all its weights.

    It takes models of timm, Hugging Face's transformers, PyG and your own that :func:`gmoe.moefy`
    has changed, also after :func:`gmoe.fold`, :func:`gmoe.prune` and :func:`gmoe.densify`, which
    may leave no experts. The dense model itself is described only if it is of transformers, whose
    ``save_pretrained`` and ``Trainer`` write the same files; else :func:`load` gets it as ``base``.

    Args:
        model: the model.
        folder: where to write; created if it does not exist.
        inputs: what the model is called with: a tensor, a tuple of tensors, or a dictionary of
            them by name. They are saved with the model's outputs, and :func:`load` compares
            (default ``None``: it compares no outputs).

    Returns:
        The folder.

    Raises:
        ImportError: ``safetensors`` or ``huggingface_hub`` is not installed.
        ValueError: an option of a router that was changed after :func:`gmoe.moefy`; a router or
            experts of a class of your own, parts that were replaced (LoRA, quantized, unstacked
            layers): no code runs from a file, and the message says what to do;
            inputs that are no tensors, or of which the model makes NaN.

    Example:
        >>> gmoe.save(vit, "folder", images[:2])
        >>> vit = gmoe.load("folder", base=timm.create_model("vit_tiny_patch16_224"))
    """
    return write(model, folder, inputs=inputs)


def write(
    model: nn.Module,
    folder: str | Path,
    *,
    inputs: Batch | None = None,
    state: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = ONE_FILE,
) -> Path:
    """What :func:`save` does.

    Args:
        model, folder, inputs: see :func:`save`.
        state: the weights (default: those of the model).
        max_shard_size: the largest file of weights, in bytes or as ``"5GB"``.
    """
    check_module("model", model)
    check(isinstance(folder, str | Path), "folder", described(folder), "a path")
    with naming_extras():
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file
    layers = {name: asdict(layer) for name, layer in _layers_of(model).items()}
    state = model.state_dict() if state is None else state
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: got {name}, a {type(value).__name__}, expected tensors: save before "
                "layers are quantized"
            )
    receipt = {} if inputs is None else _receipt_of(model, inputs)
    weights = _saveable(state)
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern=SHARD, max_shard_size=max_shard_size
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Of an earlier model; and this file is the last to come: cut off, the folder holds no model.
    (folder / LAYERS).unlink(missing_ok=True)
    earlier = folder.glob(SHARD.format(suffix="-*-of-*"))
    for path in [*earlier, folder / WEIGHTS, folder / INDEX, folder / RECEIPT]:
        path.unlink(missing_ok=True)
    has_config = is_of_transformers(model)
    if has_config:
        write_config(model, folder)
    # Older versions of transformers, and accelerate, refuse a format that they do not know.
    metadata = {"format": "gmoe" if has_config else "pt"}
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata=metadata)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if receipt:
        save_file(_saveable(receipt), folder / RECEIPT)
    description = {"format": FORMAT, "model": type(model).__name__, "layers": layers}
    (folder / LAYERS).write_text(json.dumps(description, indent=2) + "\n")
    return folder


@says_what_misfits
def load(
    folder: str | Path, base: nn.Module | None = None, *, tolerance: float = 1e-4
) -> nn.Module:
    """Make a dense model into the one that :func:`save` wrote.

    Args:
        folder: what :func:`save` wrote, or ``save_pretrained`` or the ``Trainer`` of transformers.
        base: the dense model, built as it was before :func:`gmoe.moefy`; its weights do not matter.
            It is changed in place, so throw it away after an error. Of buffers that no state holds
            (rotary frequencies, say), the base's dtype counts. ``None`` (default) for a model of
            transformers, which is built from the folder's ``config.json``.
        tolerance: the largest difference of the outputs on the inputs that were saved, as a share
            of the largest output (default 1e-4, for float32; say 0.02 for bfloat16 on another
            device).

    Returns:
        The model, in evaluation mode, on the devices of the base and with the saved dtypes.

    Raises:
        ImportError: ``safetensors`` is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file that is damaged; a base of another class or size; outputs that differ.
            The message names the file.
    """
    if base is not None:
        check_module("base", base)
    check(isinstance(folder, str | Path), "folder", described(folder), "a path")
    check_at_least(0, tolerance=tolerance)
    folder = Path(folder)
    name, layers = _read_layers(folder / LAYERS, base)
    state = _read_state(folder)
    if base is None:
        base = build_from_config(name, folder, state)
    try:
        for layer in layers.values():
            check_sizes(layer.moefied or {}, state)
        model = _rebuilt(base, layers)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder / LAYERS}: got {in_short(error)}, expected layers that can be made of the "
            "base"
        ) from error
    try:
        for name, value in model.state_dict(keep_vars=True).items():
            saved = state.get(name, value)
            if saved.dtype != value.dtype:
                value.data = value.data.to(saved.dtype)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS}: got {in_short(error)}, expected the weights of the layers in "
            f"{LAYERS} and of the base"
        ) from error
    model.eval()

    if (folder / RECEIPT).exists():
        difference, largest = _compared(model, folder)
        if not difference <= tolerance * largest:
            raise ValueError(
                f"{folder / RECEIPT}: got outputs that differ by up to {difference:.3g} from the "
                f"saved ones, expected at most {tolerance:g} times the largest, {largest:.3g}: is "
                "the base built with the same arguments?"
            )
    return model


def receipt(model: nn.Module, folder: str | Path) -> float:
    """The largest absolute difference of a model's outputs from those that were saved.

    Args:
        model: what :func:`gmoe.load` returned.
        folder: what :func:`gmoe.save` wrote, with inputs.

    Raises:
        FileNotFoundError: the model was saved without inputs.
    """
    return _compared(model, Path(folder))[0]


# how layers were made -----------------------------------------------------------------------------


def _layers_of(model: nn.Module) -> dict[str, SavedLayer]:
    """How each layer with experts, or MLP that was one, was made."""
    layers = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, MoELayer | MLP):
            continue
        moefied = layer.moefied
        if moefied is not None:
            for value in moefied.values():
                if isinstance(value, ValueError):
                    raise ValueError(f"{value}; {_BY_HAND}")
        if isinstance(layer, MLP):
            if moefied is not None:
                layers[name] = SavedLayer(moefied, folded=False, kept=None, dense=True)
            continue
        _check_parts(name, layer)
        layers[name] = SavedLayer(
            moefied,
            folded=layer.start == "copies" and not has_base(layer.experts),
            kept=None if layer.kept is None else list(layer.kept),
            dense=False,
        )
    return layers


_BY_HAND = (
    "no code runs from a file: torch.save(model.state_dict(), path), and to load it, moefy the "
    "base in the same way and call load_state_dict"
)
"""What to do with a model that cannot be saved."""


def _check_parts(name: str, layer: MoELayer) -> None:
    """Refuse a router or experts of classes that a file cannot name."""
    router = getattr(layer, "router", None)
    if router is not None and layer.moefied is not None:
        built = ROUTERS[layer.moefied["router"]]
        if isinstance(built, type) and type(router) is not built:
            raise ValueError(
                f"router: got {type(router).__name__} in {name}, expected "
                f"{layer.moefied['router']!r}, with which the layer was made; {_BY_HAND}"
            )
        changed = changed_option(router, _router_as_loaded(layer, router.dim))
        if changed is not None:
            option, value, before = changed
            raise ValueError(
                f"{option}: got {value!r} of the router of {name}, expected {before!r}, with which "
                "the layer was made: give it to moefy, in router_kwargs"
            )
    for path, part in layer.experts.named_modules(prefix=f"{name}.experts"):
        if isinstance(part, UnstackedLinears):
            replaced = part.replaced()
            if replaced is not None:
                raise ValueError(
                    f"model: got {path} with {replaced}, expected experts as they were "
                    f"built; {_BY_HAND}"
                )
            raise ValueError(
                f"model: got {path}, unstacked layers, expected stacked ones: gmoe.restack(model) "
                "before it is saved, gmoe.unstack(model) after it is loaded"
            )
        # The convs that run one by one, and norms and activations, are those of the base.
        has_parameters = any(True for _ in part.parameters(recurse=False))
        if (
            (has_parameters or isinstance(part, Experts))
            and not _is_known(part)
            and ".members." not in path
        ):
            raise ValueError(
                f"model: got {path}, a {type(part).__name__}, expected experts as they were built; "
                f"{_BY_HAND}"
            )


def _router_as_loaded(layer: MoELayer, dim: int) -> Router:
    """The router that :func:`load` would build for a layer, without values."""
    made: Any = layer.moefied
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = build_layer_router(
            layer.start,
            made["router"],
            dim,
            made["num_experts"],
            made["k"],
            made["router_kwargs"],
        )
        if layer.kept is not None:
            built.keep(layer.kept)
    return built


def _is_known(part: nn.Module) -> bool:
    """True for a class of gmoe's."""
    return type(part).__module__.partition(".")[0] == "gmoe"


def _read_layers(path: Path, base: nn.Module | None) -> tuple[str, dict[str, SavedLayer]]:
    """Read and check the class of the model and the description of its layers.

    Raises:
        ValueError: anything but what :func:`save` writes, or for a base of another class.
    """
    text = path.read_bytes()
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format: got {found['format']!r}, expected {FORMAT}")
        model = str(found["model"])
        if base is not None and model != type(base).__name__:
            raise ValueError(f"base: got a {type(base).__name__}, expected {model!r}")
        return model, {str(name): _checked(layer) for name, layer in found["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}: {in_short(error)}, expected what gmoe.save writes"
        ) from error


def _checked(layer: Any) -> SavedLayer:
    """A layer of the file, if all of it has the types that it should have."""
    legal = {field.name for field in fields(SavedLayer)}
    if set(layer) != legal:
        raise ValueError(f"layers: got one with {sorted(layer)}, expected {sorted(legal)}")
    saved = SavedLayer(**layer)
    moefied = saved.moefied
    if moefied is not None:
        has_router = isinstance(moefied.get("router"), str) and moefied["router"] in ROUTERS
        if set(moefied) != set(OPTIONS) or not has_router:
            raise ValueError(
                f"moefied: got {moefied}, expected {', '.join(OPTIONS)}, with a router of "
                f"{', '.join(ROUTERS)}"
            )
        check_counts(num_experts=moefied["num_experts"], k=moefied["k"])
    kept = saved.kept
    if kept is not None and not all(type(expert) is int for expert in kept):
        raise ValueError(f"kept: got {kept}, expected numbers of experts")
    for name in ("folded", "dense"):
        if not isinstance(getattr(saved, name), bool):
            raise ValueError(f"{name}: got {getattr(saved, name)!r}, expected true or false")
    return saved


def _rebuilt(base: nn.Module, layers: Mapping[str, SavedLayer]) -> nn.Module:
    """Make the layers of the base again, with any values."""
    # 1. moefy, once for all layers that were made with the same arguments.
    made: list[tuple[dict[str, Any], list[str]]] = []
    for name, layer in layers.items():
        if layer.moefied is None or isinstance(base.get_submodule(name), MoELayer):
            continue
        names = next((names for arguments, names in made if arguments == layer.moefied), None)
        if names is None:
            names = []
            made.append((layer.moefied, names))
        names.append(name)
    for arguments, names in made:
        moefy(base, targets=[glob.escape(name) for name in names], **arguments)

    # 2. fold, prune and densify.
    for group in groups_of(base):
        saved = {name: layers[name] for name in group.layers if name in layers}
        for name, description in saved.items():
            if description.folded:
                fold(group.layers[name].experts)
        kept = next((description.kept for description in saved.values()), None)
        if kept is not None:
            if any(description.kept != kept for description in saved.values()):
                raise ValueError(
                    f"kept: got {kept} for some of {', '.join(group.layers)}, expected the same "
                    "for all, which share a router"
                )
            group.keep(kept)
        dense = [name for name in group.layers if name not in saved or saved[name].dense]
        base = densify_like(base, group, dense)
    return base


# weights and receipts -----------------------------------------------------------------------------


def _read_state(folder: Path) -> dict[str, Tensor]:
    """All weights, which are in one file or in those that an index lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one that is damaged, or an index that names a file elsewhere.
    """
    path = folder / INDEX
    if not path.exists():
        return read_weights(folder / WEIGHTS, "gmoe.save")
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        for name in names:
            check(Path(name).name == name, "weight_map", name, "a file of the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}: {in_short(error)}, expected what gmoe.save writes"
        ) from error
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_weights(folder / name, "gmoe.save")
    return state


def _saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones, since safetensors refuses tensors that share their memory, as tied layers do."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _receipt_of(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """The inputs and the outputs by name."""
    args, kwargs = arguments_of(inputs, "inputs")
    named = {f"args.{number}": value for number, value in enumerate(args)}
    named |= {f"kwargs.{name}": value for name, value in kwargs.items()}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ValueError(
                f"inputs: got {type(value).__name__} as {name}, expected dense tensors"
            )
    outputs = outputs_of(model, [inputs], "inputs")
    if any(value.isnan().any() for value in outputs):
        raise ValueError(
            "inputs: got some for which the model returns NaN, expected numbers, to compare"
        )
    return named | {f"outputs.{number}": value for number, value in enumerate(outputs)}


def _compared(model: nn.Module, folder: Path) -> tuple[float, float]:
    """The largest difference of a model's outputs from the saved ones; and the largest of these."""
    device = next(model.parameters()).device
    read = read_weights(folder / RECEIPT, "gmoe.save")
    saved = {name: value.to(device) for name, value in read.items()}
    try:
        args = _numbered(saved, "args")
        kwargs = {
            name.removeprefix("kwargs."): value
            for name, value in saved.items()
            if name.startswith("kwargs.")
        }
        before = _numbered(saved, "outputs")
        # Inputs of another shape or type are whatever the model's layers make of them.
        after = outputs_of(model, [tuple(args) if args else kwargs])
        largest = max(
            (float(part.abs().max()) for part in map(finite, before) if len(part)), default=0.0
        )
        return largest_difference(before, after), largest
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{folder / RECEIPT}: got {type(error).__name__}: {in_short(error)}, expected inputs "
            "that the model takes, as gmoe.save writes them"
        ) from error


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """The tensors ``prefix.0``, ``prefix.1``, ... in order."""
    count = sum(name.startswith(f"{prefix}.") for name in tensors)
    return [tensors[f"{prefix}.{number}"] for number in range(count)]
