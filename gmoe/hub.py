"""Save a model to a folder or the Hugging Face Hub and load it again; imports torch alone until it
is asked to.

The files are those of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json``,
``model.safetensors`` and a card, ``README.md``. That mixin is not the base class here: it would
make ``huggingface_hub`` a requirement of every model, and it leaves out what JSON cannot hold (a
router's class, a list with a factory) without a word, so that another model comes back. Here that
is refused when the model is saved, and nothing that a file names is ever imported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from gmoe._checks import check, naming_extras
from gmoe.flops import active_parameters

Model = TypeVar("Model", bound="HubMixin")

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class HubMixin:
    """Give a model ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The constructor records its arguments: ``self.config = recorded(locals())`` is its first line. A
    subclass with a constructor of its own does so after ``super().__init__(...)``, with a
    ``recorded(locals())`` of its first line. Classes are saved by the names that it is told:
    ``recorded(locals(), known=gmoe.ROUTERS)``.
    """

    config: dict[str, Any]
    """The arguments of the constructor, as in ``config.json``."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write configuration, weights and card, and return the folder.

        Args:
            folder: where to; made if it is not there.

        Raises:
            ImportError: ``safetensors`` is not installed.
            ValueError: an argument that JSON cannot hold and no name stands for: a function, a
                ``partial``, an instance, your own class; a subclass that does not record its
                arguments.
        """
        with naming_extras():
            from safetensors.torch import save_file
        model: Any = self
        name = type(self).__name__
        for value in self.config.values():
            if isinstance(value, ValueError):
                raise ValueError(value)  # a new one, that keeps no frames alive
        try:
            inspect.signature(type(self)).bind(**self.config)
        except TypeError as error:
            raise ValueError(
                f"model: got a {name} ({error}), expected one that records its own arguments"
            ) from error
        # clones: safetensors refuses tensors that share their memory, as tied layers do
        state = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in model.state_dict().items()
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(
            json.dumps({"model": name, "arguments": self.config}, indent=2) + "\n"
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        (folder / "README.md").write_text(
            f"---\nlibrary_name: gmoe\ntags: [mixture-of-experts, pytorch]\n---\n\n# {name}\n\n"
            f"{total:,} parameters, of which an average token uses {active_parameters(model):,}.\n\n"
            f'```python\nimport gmoe\n\nmodel = gmoe.{name}.from_pretrained("THIS FOLDER OR REPOSITORY")\n```\n'
        )
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | Path, *, revision: str | None = None, **arguments: Any
    ) -> Model:
        """Build a saved model on the CPU, with the saved weights in their own dtypes, in evaluation
        mode.

        Args:
            folder: a folder, or the name of a repository on the Hub, ``"owner/name"``; for a
                private one log in first (``hf auth login``, or ``HF_TOKEN``).
            revision: a branch, tag or commit of the repository.
            **arguments: arguments of the constructor in place of the saved ones.

        Raises:
            ImportError: ``safetensors`` is not installed, or, for a repository,
                ``huggingface_hub``.
            FileNotFoundError: a file is missing.
            ValueError: a file, by its name, that is damaged or of another class; weights that do
                not fit the configuration.
        """
        with naming_extras():
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        if not Path(folder).is_dir():
            with naming_extras():
                from huggingface_hub import snapshot_download
            folder = snapshot_download(
                str(folder), revision=revision, allow_patterns=[CONFIG, WEIGHTS]
            )
        config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        text = config.read_bytes()
        try:  # whatever is wrong with a file from the network; PyG's constructors raise all kinds of errors
            saved = json.loads(text)
            check(saved["model"] == cls.__name__, "model", saved["model"], cls.__name__)
            model: Any = cls(**(_with_start(saved["arguments"]) | arguments))
        except Exception as error:
            legal = f"what save_pretrained writes of a {cls.__name__}"
            raise ValueError(
                f"{config}: got {type(error).__name__}: {error}, expected {legal}"
            ) from error
        try:
            model.load_state_dict(
                load_file(weights), assign=True
            )  # assign: in the dtypes of the file
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{weights}: got {error}, expected the weights of the model in {CONFIG}"
            ) from error
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Make the repository if it is not there, upload what :meth:`save_pretrained` writes,
        return the commit's URL.

        Args:
            repo_id: the repository's name, ``"owner/name"``.
            private: a new repository is private (default: the owner's setting).

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


def _with_start(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that was saved before ``start`` took the place of two.

    Raises:
        ValueError: a shared expert without a dense start, which there is no longer.
    """
    known = dict(arguments)
    if not {"shared_expert", "dense_start"} & known.keys():
        return known
    shared, dense_start = known.pop("shared_expert", True), known.pop("dense_start", True)
    is_known = shared is False or (shared is True and dense_start)
    got = f"{shared!r} with dense_start={dense_start!r}"
    check(
        is_known,
        "shared_expert",
        got,
        "False, or True with dense_start=True: other layers no longer exist",
    )
    return known | {"start": "shared" if shared else "plain"}


def recorded(
    given: Mapping[str, Any], extra: str = "", known: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """A constructor's arguments as JSON, tuples as lists; what has no such form is an error, which
    saving raises.

    Nothing is kept but names and numbers, so that the model stays as light, and as picklable, as it
    is.

    Args:
        given: the constructor's ``locals()`` in its first line.
        extra: the name of its ``**`` argument.
        known: classes and factories that are saved by their names, such as ``gmoe.ROUTERS``
            (default: none).
    """

    def encode(part: Any) -> Any:
        if isinstance(part, Real):  # NumPy's
            return int(part) if isinstance(part, Integral) else float(part)
        for name, registered in known.items():
            if part is registered:
                return name
        raise TypeError(getattr(part, "__qualname__", f"an instance of {type(part).__name__}"))

    config = {
        name: value for name, value in given.items() if name not in ("self", "__class__", extra)
    }
    for name, value in (config | given.get(extra, {})).items():
        try:
            config[name] = json.loads(json.dumps(value, default=encode, allow_nan=False))
        except (TypeError, ValueError) as error:
            legal = "names, numbers, lists or dicts of them, or a class that has a name"
            config[name] = ValueError(f"{name}: got {error}, expected {legal}, to be saved")
    return config
