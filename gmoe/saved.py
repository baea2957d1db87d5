"""Save a model with experts to a folder, and load it again.

There are two doors, which write and read the same folders (:mod:`gmoe.folder`):

- :func:`save` and :func:`load` take any model. A dense model of somebody else's, which
  :func:`gmoe.moefy` has changed, has to be built by the caller, as ``base``;
- :class:`gmoe.GNNMoE` and :class:`gmoe.ViTMoE` know how they are built: their base is their own
  constructor, and ``save_pretrained`` is :func:`save`.
"""

from __future__ import annotations

import glob
import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe._calls import Batch, arguments_of, finite, largest_difference, outputs_of
from gmoe._checks import (
    check,
    check_at_least,
    check_module,
    described,
    in_short,
    naming_extras,
    says_what_misfits,
)
from gmoe.convert import moefy
from gmoe.dense import densify_like
from gmoe.folder import (
    BY_HAND,
    CONFIG,
    RECEIPT,
    WEIGHTS,
    WRITTEN,
    Edits,
    Spec,
    build_from_config,
    naming,
    read,
    read_tensors,
    refuse_other,
    saveable,
    spec_of,
    write,
)
from gmoe.layer_groups import groups_of
from gmoe.moe import MoELayer
from gmoe.recorded import BuildsItself
from gmoe.routers import Router
from gmoe.stack import fold

Model = TypeVar("Model", bound="HubMixin")

OWN = {"GNNMoE": "gmoe.models.gnn", "ViTMoE": "gmoe.models.vit"}
"""The modules of the classes that a folder may name to be built."""


@says_what_misfits
def save(model: nn.Module, folder: str | Path, inputs: Batch | None = None) -> Path:
    """Write a model with experts to a folder: how it was made, and all its weights.

    It takes gmoe's own models, and models of timm, Hugging Face's transformers, PyG and your own
    that :func:`gmoe.moefy` has changed, also after :func:`gmoe.stack.fold`, :func:`gmoe.prune` and
    :func:`gmoe.densify`, which may leave no experts. The dense model itself is described only for
    gmoe's own models and those of transformers, whose ``save_pretrained`` and ``Trainer`` write the
    same files. For all others, and for a model of gmoe's own with an argument that JSON cannot
    hold, such as an activation of your own, pass it to :func:`load` as ``base``.

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
        ValueError: an option of a router that was changed after the model was made; a router or
            experts of a class of your own, parts that were replaced (LoRA, quantized, unstacked
            layers): no code runs from a file, and the message says what to do;
            inputs that are no tensors, or of which the model makes NaN.

    Example:
        >>> gmoe.save(vit, "folder", images[:2])
        >>> vit = gmoe.load("folder", base=timm.create_model("vit_tiny_patch16_224"))
    """
    check_module("model", model)
    check(isinstance(folder, str | Path), "folder", described(folder), "a path")
    arguments = None  # of a constructor that builds the base; else the caller does
    if isinstance(model, HubMixin) and not model.recorded.unsavable:
        arguments = model.config
    spec = spec_of(model, arguments)
    if arguments is not None:
        _check_is_built_so(model, arguments, spec)
    weights = saveable(model.state_dict())
    receipt = {} if inputs is None else saveable(_receipt_of(model, inputs))
    return write(model, folder, spec, weights, receipt=receipt)


@says_what_misfits
def load(
    folder: str | Path, base: nn.Module | None = None, *, tolerance: float = 1e-4
) -> nn.Module:
    """Build the model that :func:`save` wrote.

    Args:
        folder: what :func:`save` wrote, or ``save_pretrained`` or the ``Trainer`` of transformers.
        base: the dense model, built as it was before :func:`gmoe.moefy`; its weights do not matter.
            It is changed in place, so throw it away after an error. Of buffers that no state holds
            (rotary frequencies, say), the base's dtype counts. ``None`` (default) for gmoe's own
            models and for those of transformers, which are built from the folder's ``config.json``.
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
    spec, state = read(folder)
    if base is None:
        base = _base_of(spec, folder, state)
    model = _made(base, spec, folder, state)
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


class HubMixin(BuildsItself):
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The files are those of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json``,
    ``model.safetensors`` and a card, ``README.md``. That mixin is not the base class here, for two
    reasons: every model would require ``huggingface_hub``, and it silently leaves out arguments
    that JSON cannot hold (a router's class, a list with a factory), so that another model comes
    back. See ``gmoe.recorded.BuildsItself`` for what a subclass has to do.
    """

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write configuration, weights and card, and return the folder; see :func:`gmoe.save`.

        Args:
            folder: where to write; created if it does not exist.

        Raises:
            ImportError: ``safetensors`` or ``huggingface_hub`` is not installed.
            ValueError: an argument that has no form in JSON and no name: a function, a ``partial``,
                an instance, your own class; a subclass that does not record its arguments; what
                :func:`gmoe.save` refuses.
        """
        assert isinstance(self, nn.Module)
        for reason in self.recorded.unsavable.values():
            raise ValueError(reason)
        return save(self, folder)

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
            patterns = [CONFIG, "model*.safetensors*"]
            folder = snapshot_download(str(folder), revision=revision, allow_patterns=patterns)
        folder = Path(folder)
        spec, state = read(folder)
        build: Any = cls
        with naming(folder / spec.file, f"{WRITTEN} of a {cls.__name__}"):
            check(spec.model == cls.__name__, "model", spec.model, cls.__name__)
            base = build(**((spec.arguments or {}) | arguments))
        made: Any = _made(base, spec, folder, state)
        return made

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


# from a spec to a model ---------------------------------------------------------------------------


def _base_of(spec: Spec, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The base that a folder describes by itself, with any values."""
    if spec.arguments is None:
        return build_from_config(spec.model, folder, state)
    if spec.model not in OWN:
        raise ValueError(
            f"base: got None, expected a {spec.model}, which is no class of gmoe: "
            f"{spec.model}.from_pretrained(folder)"
        )
    with naming_extras():
        module = importlib.import_module(OWN[spec.model])
    with naming(folder / spec.file, WRITTEN):
        built: nn.Module = getattr(module, spec.model)(**spec.arguments)
    return built


def _made(base: nn.Module, spec: Spec, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The model that a folder holds, made of its base."""
    with naming(folder / spec.file, "layers that can be made of the base"):
        if spec.model != type(base).__name__:
            raise ValueError(f"base: got a {type(base).__name__}, expected {spec.model!r}")
        model = _edited(base, spec.layers)
    with naming(folder / WEIGHTS, f"the weights of the base and its layers in {spec.file}"):
        for name, value in model.state_dict(keep_vars=True).items():
            saved = state.get(name, value)
            if saved.dtype != value.dtype:
                value.data = value.data.to(saved.dtype)
        model.load_state_dict(state)
    return model.eval()


def _edited(base: nn.Module, layers: Mapping[str, Edits]) -> nn.Module:
    """Make the layers of the base again, with any values."""
    # 1. moefy, once for all layers that were made with the same arguments.
    targets: dict[str, list[str]] = {}
    for name, edits in layers.items():
        if edits.moefied is not None and not isinstance(base.get_submodule(name), MoELayer):
            targets.setdefault(json.dumps(edits.moefied), []).append(glob.escape(name))
    for arguments, names in targets.items():
        moefy(base, targets=names, **json.loads(arguments))

    # 2. fold, prune and densify.
    groups = groups_of(base)
    unknown = layers.keys() - {name for group in groups for name in group.layers}
    check(not unknown, "layers", sorted(unknown), "those of the model that have experts")
    for group in groups:
        saved = {name: layers[name] for name in group.layers if name in layers}
        for name, edits in saved.items():
            if edits.folded:
                fold(group.layers[name].experts)
        kept = [edits.kept for edits in saved.values()]
        if any(kept[0] != others for others in kept):
            where = ", ".join(group.layers)
            raise ValueError(f"kept: got {kept} of {where}, expected one list: they share a router")
        if kept and kept[0] is not None:
            group.keep(kept[0])
        dense = [name for name in group.layers if name not in saved or saved[name].dense]
        base = densify_like(base, group, dense)
    return base


def _check_is_built_so(model: nn.Module, arguments: dict[str, Any], spec: Spec) -> None:
    """Refuse a model of gmoe's own that is not what a reader of its folder builds."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model has given them when it was built
            built = _edited(type(model)(**arguments), spec.layers)
        built.load_state_dict(model.state_dict())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model: got a {spec.model} that its recorded arguments do not make "
            f"({in_short(error, 200)}), expected it as it was built, pruned, folded or made dense, "
            f"of a class that records its own arguments; {BY_HAND}"
        ) from error
    parts = dict(built.named_modules())
    for path, part in model.named_modules():
        if isinstance(part, Router):
            refuse_other(path, part, parts.get(path))
        elif isinstance(part, MoELayer):
            for inner, expert in part.experts.named_modules(prefix=f"{path}.experts"):
                refuse_other(inner, expert, parts.get(inner))


# receipts -----------------------------------------------------------------------------------------


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
    path = folder / RECEIPT
    saved = {name: value.to(device) for name, value in read_tensors(path).items()}
    with naming(path, "inputs that the model takes"):
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


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """The tensors ``prefix.0``, ``prefix.1``, ... in order."""
    count = sum(name.startswith(f"{prefix}.") for name in tensors)
    return [tensors[f"{prefix}.{number}"] for number in range(count)]
