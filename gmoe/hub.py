"""Save a model to a folder or the Hugging Face Hub and load it again; imports torch alone until it is asked to.

The files are those of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json``, ``model.safetensors`` and a card,
``README.md``. That mixin is not the base class here: it would make ``huggingface_hub`` a requirement of every model,
and it leaves out what JSON cannot hold (a router's class, a list with a factory) without a word, so that another model
comes back. Here that is refused when the model is saved, and nothing that a file names is ever imported.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import Tensor

from gmoe._checks import check
from gmoe.flops import active_parameters

Model = TypeVar("Model", bound="HubMixin")

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

HINTS: dict[str, set[type]] = {"bool": {bool}, "int": {int}, "float": {int, float}, "str": {str}, "None": {type(None)}}
"""Hints that a saved value is checked by, with the types that JSON gives; constructors check what has other hints."""


class HubMixin:
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor records its arguments: ``self.config = recorded(locals())`` is its first line. A subclass with a
    constructor of its own does so after ``super().__init__(...)``, with a ``recorded(locals())`` of its first line.
    Classes are saved by the names that it is told: ``recorded(locals(), router=gmoe.ROUTERS)``.
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
            ValueError: an argument that JSON cannot hold and no name stands for: a function, a ``partial``, an
                instance, your own class; a subclass that does not record its arguments.
        """
        with _imports():
            from safetensors.torch import save_file
        model: Any = self
        config = {"model": type(self).__name__, "arguments": _checked_arguments(self)}
        # clones: safetensors refuses tensors that share their memory, as tied layers do
        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
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
            **arguments: arguments of the constructor in place of the saved ones.

        Raises:
            ImportError: ``safetensors`` is not installed, or, for a repository, ``huggingface_hub``.
            FileNotFoundError: a file is missing.
            ValueError: a file, by its name, that is damaged or of another class; weights that do not fit the
                configuration.
        """
        if not Path(folder).is_dir():
            with _imports():
                from huggingface_hub import snapshot_download
            options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options |= {"local_files_only": local_files_only, "allow_patterns": [CONFIG, WEIGHTS]}
            folder = snapshot_download(str(folder), **options)
        config = Path(folder) / CONFIG
        saved = _read_arguments(config, cls)
        try:
            model: Any = cls(**(saved | arguments))
        except Exception as error:  # PyG's constructors raise all kinds of errors for a value of a wrong type
            got = f"arguments that {cls.__name__} refuses ({type(error).__name__}: {error})"
            raise ValueError(f"{config}: got {got}, expected those of a saved {cls.__name__}") from error
        weights = _read_weights(Path(folder) / WEIGHTS, model.state_dict())
        model.load_state_dict(weights, assign=True)  # assign: in the dtypes of the file
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


class Refused(str):
    """Why an argument cannot be saved; what a configuration holds in its place."""


def recorded(given: Mapping[str, Any], extra: str = "", **names: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments as JSON, tuples as lists; what has no such form is refused when the model is saved.

    Nothing is kept but names and numbers, so that the model stays as light, and as picklable, as it is.

    Args:
        given: the constructor's ``locals()`` in its first line.
        extra: the name of its ``**`` argument.
        **names: for an argument, what may be given in place of a name, by that name: ``router=gmoe.ROUTERS``.
    """
    named = {name: value for name, value in given.items() if name not in ("self", "__class__", extra)}
    found: dict[str, Any] = {}
    for name, value in (named | dict(given.get(extra, {}))).items():
        known = names.get(name, {})
        try:
            found[name] = _encoded(value, known)
        except ValueError as error:
            legal = f"the name or class of {', '.join(known)}" if known else "names, numbers, lists or dicts of them"
            found[name] = Refused(f"{name}: got {error}, expected {legal}, to be saved")
    return found


def _encoded(value: Any, known: Mapping[str, Any]) -> Any:
    """A value as JSON."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_encoded(part, known) for part in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _encoded(part, known) for name, part in value.items()}
    found = [name for name, own in known.items() if value is own]
    if not found:
        shown = str(value) if isinstance(value, Real) else f"an instance of {type(value).__name__}"
        raise ValueError(getattr(value, "__qualname__", shown))
    return found[0]


def _checked_arguments(model: Any) -> dict[str, Any]:
    """The recorded arguments, if they build the model again."""
    config: dict[str, Any] = getattr(model, "config", {})
    for value in config.values():
        if isinstance(value, Refused):
            raise ValueError(value)
    try:
        inspect.signature(type(model)).bind(**config)
    except TypeError as error:
        got = f"{type(model).__name__}, whose constructor does not take the recorded arguments ({error})"
        legal = "one that records its own, see gmoe.hub.HubMixin"
        raise ValueError(f"model: got {got}, expected {legal}") from error
    return config


def _read_arguments(path: Path, model: type) -> dict[str, Any]:
    """The saved arguments of a model; the file may come from the network, so that nothing in it is taken for code."""
    legal = f"the JSON that save_pretrained writes of a {model.__name__}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, allow_nan=False)  # raises for NaN and infinities, 1e999 among them
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected {legal}") from error
    check(isinstance(found, dict) and found.keys() == {"model", "arguments"}, str(path), "other JSON", legal)
    check(found["model"] == model.__name__, str(path), f"a {found['model']}", f"a {model.__name__}")
    arguments: Any = found["arguments"]
    check(isinstance(arguments, dict), str(path), "arguments that are no object", legal)
    for name, parameter in inspect.signature(model).parameters.items():
        hints = str(parameter.annotation).split(" | ")
        if name in arguments and HINTS.keys() >= set(hints):
            valid = any(type(arguments[name]) in HINTS[hint] for hint in hints)
            check(valid, f"{path}: {name}", repr(arguments[name]), parameter.annotation)
    return dict(arguments)


def _read_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors of the names and shapes of the model's own; floating ones may be of other precisions."""
    with _imports():
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        found: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: got no tensors ({error}), expected what save_pretrained writes") from error
    got, legal = _forms(found), _forms(own)
    for name in sorted(got.keys() | legal.keys()):
        check(got.get(name) == legal.get(name), f"{path}: {name}", got.get(name), legal.get(name))
    return found


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The shapes of tensors, and the dtypes of those that are no floats of at least 16 bits."""
    kinds = {n: "floats" if t.is_floating_point() and t.element_size() > 1 else t.dtype for n, t in tensors.items()}
    return {name: f"{kinds[name]} of shape {tuple(tensor.shape)}" for name, tensor in tensors.items()}


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
