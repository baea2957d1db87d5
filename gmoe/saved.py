"""Save a model with experts to a folder, and load it again.

A folder holds these files, none of which is code:

- the spec, JSON: the class of the model, and what makes it again: the arguments of its constructor,
  if it is one of gmoe's own, and those of :func:`gmoe.moefy`. A model of gmoe's own has it as
  ``config.json``, which is what the Hub looks for; any other as ``gmoe.json``, beside the
  ``config.json`` of transformers if it is theirs;
- ``model.safetensors``: all weights.

Importing this module takes torch alone; writing and reading import the rest.
"""

from __future__ import annotations

import glob
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe._checks import check, check_module, described, in_short, naming_extras
from gmoe._torch import unwrapped
from gmoe.convert import moefy
from gmoe.moe import MoELayer, check_built
from gmoe.pruning import groups_of
from gmoe.recorded import BY_HAND, AsBuilt, Recorded
from gmoe.routers.from_call import part_of

Model = TypeVar("Model", bound="Pretrained")

SPEC = "gmoe.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"

OWN = {
    "BlockGNN": "gmoe.models.blocks",
    "GNNMoE": "gmoe.models.gnn",
    "ViTMoE": "gmoe.models.vit",
}
"""The modules of the classes that a folder may name to be built."""

WRITTEN = "what gmoe.save, gmoe.TrainerSave, or save_pretrained of a model of gmoe's own writes"

EXPLAINED = "none: the model has experts, read it with gmoe.load(folder)"
"""Stands in ``config.json`` where ``from_pretrained`` looks for the file of the weights.

It is the end of transformers' error. Without it a dense model would come back, with a warning.
"""

SMALL = 10_000
"""A size that is taken as it is, however few weights there are."""


@dataclass(frozen=True)
class Spec:
    """How a model is made again, as it stands in the file.

    Args:
        model: the name of its class.
        arguments: of its constructor; ``None`` if gmoe does not know them.
        moefy: the arguments of each call of :func:`gmoe.moefy`, with the names of the layers that
            it made, and of the part whose calls decide for them, ``""`` for the model.
        kept: the experts that stayed in layers in which others were pruned, by name.
    """

    model: str
    arguments: dict[str, Any] | None
    moefy: list[dict[str, Any]]
    kept: dict[str, list[int]]


# writing ------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a model with experts to a folder: the arguments that made it, and all weights.

    It takes gmoe's own models, and those of timm, Hugging Face's transformers, PyG and your own
    that :func:`gmoe.moefy` has changed, once or several times, also after :func:`gmoe.prune`. The
    dense model itself is described only for gmoe's own models and those of transformers. For all
    others, and for a model of gmoe's own with an argument that JSON cannot hold, such as an
    activation of your own, pass it to :func:`load` as ``base``.

    Args:
        model: the model; if it is compiled, parallel, or averaged, the one inside.
        folder: where to write; created if it does not exist.

    Returns:
        The folder.

    Raises:
        ImportError: ``safetensors`` is not installed.
        ValueError: a router or experts of a class of your own; an option or a part that was changed
            after the layer was built (LoRA, quantized or unstacked experts): no code runs
            from a file, and the message says what to do.

    Example:
        >>> gmoe.save(vit, "folder")
        >>> vit = gmoe.load("folder", base=timm.create_model("vit_tiny_patch16_224"))
    """
    check_module("model", model)
    model = unwrapped(model)
    check(isinstance(folder, str | Path), "folder", described(folder), "a path")
    with naming_extras():
        from safetensors.torch import save_file
    spec = spec_of(model)
    weights = _saveable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # What says what the model is goes first, and comes last: cut off in between, the folder holds
    # no model.
    path = folder / (SPEC if spec.arguments is None else CONFIG)
    for old in (folder / SPEC, path):
        old.unlink(missing_ok=True)
    if _is_of_transformers(model):
        _write_config(model, folder)
    # Older versions of transformers, and accelerate, refuse a format that they do not know.
    save_file(weights, folder / WEIGHTS, metadata={"format": "gmoe"})
    _write_json(path, asdict(spec))
    return folder


def spec_of(model: nn.Module) -> Spec:
    """How a model was made, if what it was made with is all that there is to it."""
    arguments = None
    if isinstance(model, Pretrained) and not model.recorded.unsavable:
        arguments = model.config
    kept = {}
    names_of: dict[str, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, MoELayer):
            continue
        check_built(name, layer)
        if layer.kept is not None:
            kept[name] = list(layer.kept)
        if layer.moefied is None:
            continue
        for reason in layer.moefied.unsavable.values():
            raise ValueError(f"{reason}; {BY_HAND}")
        if layer.as_built is not None:
            layer.as_built.check(layer, name)
        part = part_of(model, layer.router)
        start = f"{part}." if part else ""
        if name.startswith(start):  # else the part, too, has another name
            call = json.dumps({**layer.moefied.values, "model": part})
            names_of.setdefault(call, []).append(name.removeprefix(start))
    calls = [{**json.loads(call), "targets": names} for call, names in names_of.items()]
    spec = Spec(type(model).__name__, arguments, calls, kept)
    if arguments is not None:
        _check_is_built_so(model, spec)
    return spec


def _check_is_built_so(model: nn.Module, spec: Spec) -> None:
    """Refuse a model of gmoe's own that is not what a reader of its folder builds."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model has given them when it was built
            built = _with_experts(type(model)(**(spec.arguments or {})), spec)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model: got a {spec.model} that its recorded arguments do not make "
            f"({in_short(error, 200)}), expected a class that records its own arguments; {BY_HAND}"
        ) from error
    AsBuilt.of(built).check(model, "")


def _saveable(model: nn.Module) -> dict[str, Tensor]:
    """Clones, since safetensors refuses tensors that share their memory, as tied layers do."""
    state = model.state_dict()
    for name, value in state.items():
        got = f"{name}, a {type(value).__name__}"
        legal = f"plain tensors, neither quantized nor sharded; {BY_HAND}"
        check(type(value) is Tensor, "model", got, legal)
    return {name: value.cpu().contiguous().clone() for name, value in state.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _is_of_transformers(model: object) -> bool:
    """Whether it is a model of transformers; that there is one implies that it was imported."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _write_config(model: Any, folder: Path) -> None:
    """Write the configuration of a model of transformers that has experts.

    Plain ``from_pretrained`` of the folder raises, by the class and by ``AutoModel``.
    """
    model.config.save_pretrained(folder)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    dtype = str(model.dtype).removeprefix("torch.")
    config |= {"architectures": [type(model).__name__], "dtype": dtype}
    _write_json(path, config | {"transformers_weights": EXPLAINED})


# reading ------------------------------------------------------------------------------------------


def load(folder: str | Path, base: nn.Module | None = None) -> nn.Module:
    """Build the model that :func:`save` wrote.

    Args:
        folder: what :func:`save` wrote, or :class:`gmoe.TrainerSave`, or ``save_pretrained`` of a
            model of gmoe's own.
        base: the dense model, built as it was before :func:`gmoe.moefy`; its weights do not matter,
            its options do (an activation, dropout): the folder does not hold them. It is changed in
            place, so throw it away after an error. ``None`` (default) for gmoe's own models and for
            those of transformers, which are built from the folder's ``config.json``.

    Returns:
        The model, in evaluation mode, on the devices of the base and with the saved dtypes.

    Raises:
        ImportError: ``safetensors`` is not installed.
        FileNotFoundError: a file is missing.
        ValueError: a file that is damaged; a base of another class or size. The message names the
            file.
    """
    if base is not None:
        check_module("base", base)
    check(isinstance(folder, str | Path), "folder", described(folder), "a path")
    folder = Path(folder)
    spec, state = _read(folder)
    if base is None:
        base = _base_of(spec, folder, state)
    return _made(base, spec, folder, state)


@contextmanager
def _naming(path: Path, expected: str) -> Iterator[None]:
    """Name the file in whatever error its contents cause, which may be anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}: {in_short(error)}, expected {expected}"
        ) from error


def _path_of(folder: Path) -> Path:
    """The file of a folder that says what the model is."""
    return folder / (SPEC if (folder / SPEC).exists() else CONFIG)


def _read(folder: Path) -> tuple[Spec, dict[str, Tensor]]:
    """What a folder says of its model, and all weights."""
    with naming_extras():
        from safetensors.torch import load_file
    path = _path_of(folder)
    for file in (path, folder / WEIGHTS):
        if not file.exists():
            raise FileNotFoundError(f"{file}: got no such file, expected {WRITTEN}")
    with _naming(folder / WEIGHTS, WRITTEN):
        state = load_file(folder / WEIGHTS)
    with _naming(path, WRITTEN):
        spec = Spec(**json.loads(path.read_bytes()))
        check_sizes(asdict(spec), state)
    return spec, state


def check_sizes(values: object, state: Mapping[str, Tensor]) -> None:
    """Refuse values from a file that hold a number larger than its weights have numbers.

    No width and no number of experts or layers is: what was merely claimed would be allocated.
    """
    most = max(SMALL, sum(value.numel() for value in state.values()))
    if isinstance(values, dict):
        values = [*values.values()]
    if isinstance(values, list):
        for value in values:
            check_sizes(value, state)
    elif isinstance(values, int):
        check(abs(values) <= most, "sizes", values, f"at most {most}")


def _base_of(spec: Spec, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The base that a folder describes by itself, with any values.

    No code runs from the folder: the class is looked up in gmoe or transformers by its name.
    """
    build: Any = None
    if spec.model in OWN and spec.arguments is not None:
        with naming_extras():
            build = getattr(importlib.import_module(OWN[spec.model]), spec.model)
    elif spec.arguments is None and (folder / CONFIG).exists():
        import transformers

        found = getattr(transformers, spec.model, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            build = found
    legal = (
        f"a {in_short(spec.model, 100)} as it was before moefy, or one with the layers of experts "
        "that you wrote: the folder does not say how to build it"
    )
    check(build is not None, "base", None, legal)
    with _naming(folder / CONFIG, f"the configuration of a {spec.model}"):
        if spec.arguments is not None:
            return build(**spec.arguments)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config.to_dict(), state)
        vars(config).pop("transformers_weights", None)
        return build(config)


def _made(base: nn.Module, spec: Spec, folder: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """The model that a folder holds, made of its base."""
    path = _path_of(folder)
    with _naming(path, "what makes the layers of the base"):
        check(
            spec.model == type(base).__name__, "base", f"a {type(base).__name__}", repr(spec.model)
        )
        model = _with_experts(base, spec)
    with _naming(folder / WEIGHTS, f"the weights of the base and of its layers in {path.name}"):
        for name, value in model.state_dict(keep_vars=True).items():
            value.data = value.data.to(state[name].dtype if name in state else value.dtype)
        model.load_state_dict(state)
    return model.eval()


def _with_experts(base: nn.Module, spec: Spec) -> nn.Module:
    """Make the layers of the base again, with any values."""
    for call in spec.moefy:
        names = [glob.escape(name) for name in call["targets"]]
        moefy(**{**call, "model": base.get_submodule(call["model"]), "targets": names})
    for group in groups_of(base):
        kept = [spec.kept[name] for name in group.layers if name in spec.kept]
        if kept:  # layers that share a router have one list
            group.keep(kept[0])
    return base


# the Hub ------------------------------------------------------------------------------------------


class Pretrained:
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The files are those that the Hub knows: ``config.json`` and ``model.safetensors``.
    ``huggingface_hub.PyTorchModelHubMixin`` is not the base class, for two reasons: every model
    would require ``huggingface_hub``, and it silently leaves out arguments that JSON cannot hold (a
    conv's class, a list with a factory), so that another model comes back.

    A constructor sets ``self.recorded = Recorded.of(given_to(Class, locals()), known)`` while its
    local names are still its arguments; so does a subclass with its own constructor.
    """

    recorded: Recorded

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the constructor, as in ``config.json``."""
        return self.recorded.values

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write configuration and weights, and return the folder; see :func:`gmoe.save`.

        Args:
            folder: where to write; created if it does not exist.

        Raises:
            ImportError: ``safetensors`` is not installed.
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
            files = [CONFIG, SPEC, WEIGHTS]
            folder = snapshot_download(str(folder), revision=revision, allow_patterns=files)
        folder = Path(folder)
        spec, state = _read(folder)
        build: Any = cls
        with _naming(_path_of(folder), f"{WRITTEN} of a {cls.__name__}"):
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
