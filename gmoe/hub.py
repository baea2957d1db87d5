"""Save a model to a folder or the Hugging Face Hub and load it again; imports torch alone until it is asked to.

The files are those of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json``, ``model.safetensors`` and a card,
``README.md``. That mixin is not the base class here: it would make ``huggingface_hub`` a requirement of every model,
and it leaves out what JSON cannot hold (a router's class, a list with a factory) without a word, so that another model
comes back.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from gmoe._checks import check
from gmoe.flops import active_parameters

TRUSTED = ("gmoe", "torch.nn", "torch_geometric.nn")
"""Packages whose layers a configuration, which may come from the network, may name. All else the caller has to give."""

Model = TypeVar("Model", bound="HubMixin")

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class HubMixin:
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor records its arguments: ``self.config = recorded(locals())`` is its first line. A subclass with a
    constructor of its own does so after ``super().__init__(...)``, with a ``recorded(locals())`` of its first line.
    """

    config: dict[str, Any]
    """The arguments of the constructor, as in ``config.json``."""

    def save_pretrained(
        self, folder: str | Path, *, summary: Mapping[str, Any] | None = None, dense: Mapping[str, Any] | None = None
    ) -> Path:
        """Write configuration, weights and card, and return the folder.

        Args:
            folder: where to; made if it is not there.
            summary, dense: what the card says of a run and of its dense baseline; see :func:`card`.

        Raises:
            ImportError: ``safetensors`` is not installed.
            ValueError: an argument of the model that no name stands for: a lambda, an instance, a class of a script; a
                subclass that does not record its arguments; lazy parameters before the first call.
        """
        with _imports():
            from safetensors.torch import save_file
        model: Any = self
        check_recorded(model)
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        check(not lazy, "model", f"{', '.join(lazy)} without values", "a call that fills in lazy widths before")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model": type(self).__name__, "arguments": self.config}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        # clones: safetensors refuses tensors that share their memory, as tied layers do
        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CARD).write_text(card(model, summary, dense))
        return folder

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Model:
        """Build a saved model on the CPU, with the saved weights in their own dtypes, in evaluation mode.

        Args:
            folder: a folder, or the name of a repository on the Hub, ``"owner/name"``.
            revision, token, cache_dir, local_files_only: as in ``huggingface_hub.snapshot_download``.
            **arguments: arguments of the constructor in place of the saved ones. A class or function that is neither
                gmoe's, nor in ``torch.nn`` or ``torch_geometric.nn``, has to be given so: it is never imported because
                a configuration says so.

        Raises:
            ImportError: ``safetensors`` is not installed, or, for a repository, ``huggingface_hub``.
            ValueError: another class's folder; a name that may not be imported.
            RuntimeError: weights that do not fit the configuration.
        """
        with _imports():
            from safetensors.torch import load_file
        if not Path(folder).is_dir():
            with _imports():
                from huggingface_hub import snapshot_download
            options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options |= {"local_files_only": local_files_only, "allow_patterns": [CONFIG, WEIGHTS]}
            folder = snapshot_download(str(folder), **options)
        folder = Path(folder)
        config = json.loads((folder / CONFIG).read_text())
        check(config["model"] == cls.__name__, "folder", f"a {config['model']}", f"a {cls.__name__}")
        saved = {name: value for name, value in config["arguments"].items() if name not in arguments}
        model: Any = cls(**{name: _decoded(name, value) for name, value in saved.items()}, **arguments)
        model.load_state_dict(load_file(folder / WEIGHTS), assign=True)  # assign: in the dtypes of the file
        found: Model = model.eval()
        return found

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Push model",
        revision: str | None = None,
        summary: Mapping[str, Any] | None = None,
        dense: Mapping[str, Any] | None = None,
    ) -> str:
        """Make the repository if it is not there, upload what :meth:`save_pretrained` writes, return the commit's URL.

        Args:
            repo_id: the repository's name, ``"owner/name"``.
            private, token, commit_message, revision: as in ``huggingface_hub.HfApi``.
            summary, dense: see :func:`card`.

        Raises:
            ImportError: ``huggingface_hub`` or ``safetensors`` is not installed.
            ValueError: as :meth:`save_pretrained`, before anything is uploaded.
        """
        with _imports():
            from huggingface_hub import HfApi
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, summary=summary, dense=dense)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
            )
        return str(done.commit_url)


@contextmanager
def _imports() -> Iterator[None]:
    """Name the extra that brings what cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise ImportError(f'gmoe.hub needs {name}: pip install "gmoe[hub]"') from error


# Arguments ------------------------------------------------------------------------------------------------------------


def recorded(given: Mapping[str, Any], extra: str = "") -> dict[str, Any]:
    """A constructor's arguments as JSON; what has none is refused only when the model is saved.

    Nothing is kept but names and numbers, so that the model stays as light, and as picklable, as it is.

    Args:
        given: the constructor's ``locals()`` in its first line.
        extra: the name of its ``**`` argument.
    """
    named = {name: value for name, value in given.items() if name not in ("self", "__class__", extra)}
    found = {}
    for name, value in (named | dict(given.get(extra, {}))).items():
        try:
            found[name] = _encoded(value)
        except ValueError as error:
            found[name] = {"$refused": str(error)}
    return found


def check_recorded(model: Any) -> None:
    """Refuse a model that its configuration would not build again."""
    for name, value in model.config.items():
        if isinstance(value, dict) and "$refused" in value:
            legal = "a name, a class or function that can be imported, a partial of one, or numbers, texts and lists"
            raise ValueError(f"{name}: got {value['$refused']}, expected {legal}, to be saved")
    try:
        inspect.signature(type(model)).bind(**model.config)
    except TypeError as error:
        got = f"{type(model).__name__}, whose constructor does not take the recorded arguments ({error})"
        legal = "one that records its own, see gmoe.hub.HubMixin"
        raise ValueError(f"model: got {got}, expected {legal}") from error


def _encoded(value: Any) -> Any:
    """A value as JSON; what JSON has no form of is a dictionary of one key, which begins with ``$``."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, list):
        return [_encoded(part) for part in value]
    if isinstance(value, tuple):
        return {"$tuple": [_encoded(part) for part in value]}
    if isinstance(value, Mapping) and all(isinstance(name, str) and name[:1] != "$" for name in value):
        return {name: _encoded(part) for name, part in value.items()}
    if isinstance(value, functools.partial):
        return {"$partial": [_encoded(value.func), _encoded(list(value.args)), _encoded(value.keywords)]}
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}
        return {"$dataclass": _path(type(value)), "fields": kept}
    return {"$import": _path(value)}


def _path(value: Any) -> str:
    """``module:name`` of a class or function that an import finds there."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        shown = repr(value) if isinstance(value, float) else f"an instance of {type(value).__name__}"
        raise ValueError(shown)
    try:
        found: Any = functools.reduce(getattr, name.split("."), sys.modules.get(module))
    except AttributeError:
        found = None
    if found is not value or module == "__main__":
        raise ValueError(f"{module}.{name}, which no other program can import")
    return f"{module}:{name}"


def _decoded(argument: str, value: Any) -> Any:
    """The value that :func:`_encoded` was given."""
    decode = functools.partial(_decoded, argument)
    if isinstance(value, list):
        return [decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(value["$tuple"]))
    if "$import" in value:
        return _imported(argument, value["$import"])
    if "$dataclass" in value:
        return _imported(argument, value["$dataclass"])(**decode(value["fields"]))
    if "$partial" in value:
        func, args, keywords = decode(value["$partial"])
        return functools.partial(func, *args, **keywords)
    return {name: decode(part) for name, part in value.items()}


def _imported(argument: str, path: str) -> Any:
    """A class of layers, a dataclass or a function of ``torch.nn.functional``, where it is defined."""
    module, _, name = path.partition(":")
    expected = f"{argument}= in the call of from_pretrained: only modules of {', '.join(TRUSTED)} are imported"
    check(any(f"{module}.".startswith(f"{package}.") for package in TRUSTED), argument, path, expected)
    found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    is_layer = isinstance(found, type) and (issubclass(found, nn.Module) or is_dataclass(found))
    own = getattr(found, "__module__", None) == module
    check(own and (is_layer or module == "torch.nn.functional"), argument, path, expected)
    return found


# The card -------------------------------------------------------------------------------------------------------------


def card(model: HubMixin, summary: Mapping[str, Any] | None = None, dense: Mapping[str, Any] | None = None) -> str:
    """Write a model card: how to load the model, and what a run and its dense baseline came to.

    Args:
        model: the model.
        summary: the ``summary.json`` of the run it comes from, as a dictionary (default: no results).
        dense: the ``summary.json`` of the dense baseline.

    Raises:
        ValueError: a baseline on other data or by another metric, or without the run that it is the baseline of.
    """
    of: Any = model
    name, total = type(model).__name__, sum(parameter.numel() for parameter in of.parameters())
    tags = "library_name: gmoe\ntags: [mixture-of-experts, pytorch]"
    about = f"{total:,} parameters, of which an average token meets {active_parameters(of):,}."
    use = f'import gmoe\n\nmodel = gmoe.{name}.from_pretrained("THIS FOLDER OR REPOSITORY")'
    parts = [f"---\n{tags}\n---\n", f"# {name}\n", f"{about}\n", f"```python\n{use}\n```\n"]
    if summary is not None:
        parts.append(_results(summary, dense))
    check(summary is not None or dense is None, "summary", None, "the run that `dense` is the baseline of")
    return "\n".join(parts)


def _results(summary: Mapping[str, Any], dense: Mapping[str, Any] | None) -> str:
    """What was measured, on what, and how."""
    config, made = summary["config"], summary["environment"]
    runs = {"this model": summary}
    if dense is not None:
        for what, here, there in (
            ("data", config["dataset"], dense["config"]["dataset"]),
            ("metric", summary["metric"], dense["metric"]),
        ):
            check(here == there, "dense", f"a run of {what} {there}", f"{what} {here}")
        runs["dense baseline"] = dense
    rows = {
        f"{part} {summary['metric']} (%)": [_spread(run[part]) for run in runs.values()] for part in ("test", "val")
    }
    rows["active FLOPs of a forward"] = [f"{run['flops']:,}" for run in runs.values()]
    rows["active parameters"] = [f"{run['active_parameters']:,}" for run in runs.values()]
    rows["parameters"] = [f"{run['parameters']:,}" for run in runs.values()]
    split = "the data set's own"
    if "val_share" in config:  # image sets, whose validation images are drawn
        split = f"{config['val_share']:.0%} of the training images validate (seed {config['split_seed']})"
    hardware = made["gpu"] or made["cpu"]
    return "\n".join(
        [
            "## Results\n",
            f"| | {' | '.join(runs)} |",
            f"|---|{'---:|' * len(runs)}",
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
            "",
            "Mean ± sample standard deviation over seeds. Validation selects the epoch; the test set is read once.",
            "",
            f"- Data: {config['dataset']}; split: {split}.",
            f"- Router: {config['router']}; experts: {config['experts']}; K = {config['k']}.",
            f"- Seeds: {', '.join(map(str, config['seeds']))}; epochs: {config['epochs']}.",
            f"- Commit {made['commit']}; torch {made['versions']['torch']}; {hardware}.",
            "",
        ]
    )


def _spread(figure: Mapping[str, Any]) -> str:
    """Mean ± standard deviation of shares, in percent, and n."""
    std = "" if figure["std"] is None else f" ± {100 * figure['std']:.2f}"
    return f"{100 * figure['mean']:.2f}{std} (n = {figure['n']})"
