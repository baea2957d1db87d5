"""What a module goes through, before the call that counts and after it; once for all targets."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from gmoe import Graph
from tests.helpers.kernels import kernel_is

BEFORE = (
    *("no_grad", "inference_mode", "step", "other thread", "other input"),
    *("deepcopy", "pickle", "x changed in place"),
)
"""What every target's module may have been through, and its input."""

AFTER = ("nothing", "deepcopy", "pickle", "state dict", "save", "unstack", "prune")


def in_mode(step: str, call: Callable[[], Any]) -> Any:
    """What the call gives under a step's mode, or in another thread."""
    if step == "other thread":
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(step, nullcontext)():
        return call()


def through_state_dict(module: nn.Module, build: Callable[[], Any]) -> Any:
    other = build().train(module.training)
    other.load_state_dict(module.state_dict())
    return other


def through_files(module: nn.Module, build: Callable[[], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        # Files end with the folder: what is loaded may not read them later.
        gmoe.save(module, folder)
        return gmoe.load(folder, base=build()).train(module.training)


COPIES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "unstack": gmoe.unstack,
}
"""What gives a module of the same outputs, by the module alone."""


REBUILT: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "state dict": through_state_dict,
    "save": through_files,
}
"""The same by a new module, too."""


def zero_gradients(module: nn.Module, leaves: Iterable[Tensor]) -> None:
    for leaf in (*leaves, *module.parameters()):
        leaf.grad = None


@torch.no_grad()
def change_in_place(features: Iterable[Tensor]) -> None:
    for x in features:
        x.mul_(-1.5)


@contextmanager
def weights_change(module: nn.Module) -> Iterator[None]:
    """In place behind the call, as an optimizer's step or a loaded state changes them."""
    yield
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-0.8)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter learns in the call."""
    trained = [value for value in module.parameters() if value.requires_grad]
    module.requires_grad_(False)
    yield
    for value in trained:
        value.requires_grad_()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """The module, and what PyG makes in the call, in single precision."""
    torch.set_default_dtype(torch.float32)  # :meth:`Target.run` sets it back after an error
    module.float()
    yield
    module.double()
    torch.set_default_dtype(torch.float64)


CHANGES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "in blocks": lambda _: kernel_is("padded"),
    "weights changed": weights_change,
    "frozen": frozen,
    "other precision": in_float32,
}
"""What surrounds a call right before the one that counts."""


def told_of_the_change(adj: Any) -> Any:
    """A graph is frozen: another is made for features that changed, unless they learn."""
    if not isinstance(adj, Graph) or adj.x is None or adj.x.requires_grad:
        return adj
    return adj.with_x(adj.x)
