"""Argument checks: every message names the argument, the value got, and the legal values."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from gmoe._torch import backward_hooks, forward_hooks, is_tracing, parameter_names

EXTRAS = {
    "torch_geometric": "graph",
    "torchmetrics": "graph",
    "torchvision": "vision",
    "matplotlib": "plot",
    "safetensors": "hub",
    "huggingface_hub": "hub",
}
"""The extra of gmoe that installs a package."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""The dtypes of indices."""

LONGEST_NAME = 100
"""Characters that are compared with names: a broken file may hold a word of megabytes."""

SIMILAR = 0.65
"""Least similarity of names, from 0 to 1, at which one is suggested for the other."""


@contextmanager
def naming_extras() -> Iterator[None]:
    """If a package cannot be imported inside the block, name the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ImportError(
            f'this part of gmoe needs {package}: pip install "gmoe[{EXTRAS[package]}]"'
        ) from error


def check(valid: object, name: str, got: object, expected: object) -> None:
    """Raise a ``ValueError`` unless ``valid``.

    Do not check sizes of tensors with it in a forward: compilers would take them as fixed.
    """
    if not valid:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def fixed(name: str) -> Any:
    """An attribute that a module is built with: it keeps it as ``_name``, and nobody sets it."""

    def refuse(module: object, value: object) -> None:
        raise AttributeError(
            f"{name}: got {value!r}, expected the {name} of {type(module).__name__} as it is: "
            "build another, or see keep(kept)"
        )

    return property(lambda module: getattr(module, f"_{name}"), refuse)


def is_whole(value: object) -> bool:
    """True for whole numbers, NumPy's too; booleans are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_at_least(least: float, **values: float) -> None:
    """Refuse arguments, by name, below ``least``, and non-numbers."""
    for name, value in values.items():
        is_number = isinstance(value, Real)
        check(is_number and value >= least, name, repr(value), f"a number of at least {least}")


def check_counts(**values: int) -> None:
    """Refuse arguments, by name, that are not whole numbers of at least 1."""
    for name, value in values.items():
        check(is_whole(value), name, repr(value), "a whole number")
        check(value >= 1, name, value, "at least 1")


def check_positive(name: str, value: float) -> None:
    """Refuse ``value <= 0``, infinity, and non-numbers."""
    is_number = isinstance(value, Real)
    check(is_number and 0 < value < math.inf, name, repr(value), "a positive number")


def in_short(said: object, most: int = 500) -> str:
    """Shorten a text to one line of at most ``most`` characters: a file may be one long line."""
    text = " ".join(str(said)[: 4 * most].split())
    return text if len(text) <= most else f"{text[:most]} …"


def described(value: object) -> str:
    """Describe an argument for an error: the shape and dtype of a tensor, or a type."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def readable(value: Tensor) -> bool:
    """True for values that can be read without a host sync: not on a GPU, compiled or fake.

    In ``torch.jit.trace`` they can, but what follows would hold for other values, too.
    """
    is_on_cpu = type(value) is Tensor and value.device.type == "cpu"
    return is_on_cpu and not torch.compiler.is_compiling() and not is_tracing()


def check_range(name: str, index: Tensor, end: int) -> None:
    """Refuse indices outside 0..end-1, if they can be read without a host sync."""
    if not readable(index):
        return
    outside = index[(index.long() < 0) | (index.long() >= end)]
    if len(outside):
        raise ValueError(f"{name}: got {outside[:3].tolist()}, expected values in 0..{end - 1}")


def check_one_device(names: str, one: Tensor, other: Tensor) -> None:
    """Refuse two tensors, by their names, that are not on one device."""
    if one.device != other.device:
        got = f"values on {one.device} and {other.device}"
        raise ValueError(f"{names}: got {got}, expected both on one device")


def check_kept(kept: Sequence[int], num_experts: int, k: int = 1) -> None:
    """Refuse experts to keep that are not there, or fewer than K."""
    is_legal = [*kept] == sorted({*kept} & {*range(num_experts)})
    legal = f"k={k} or more of 0 to {num_experts - 1}, ascending"
    check(is_legal and len(kept) >= k, "kept", [*kept], legal)


def check_can_shrink(part: Any) -> None:
    """Refuse a router or experts of which no expert can be taken away.

    Of a class of somebody's own nothing is known, unless it has a ``keep`` itself.
    """
    cls = type_before_parametrizations(part)
    is_known = cls.__module__.partition(".")[0] == "gmoe" or "keep" in vars(cls)
    legal = (
        "routers and experts of gmoe that can be pruned, or a class with a method keep(kept) of "
        "its own (a router that calls Router.keep chooses among self.of_alive(scores))"
    )
    got = f"{cls.__name__}, of which no expert can be taken away"
    check(part.can_shrink and is_known, "model", got, legal)


def check_choice(name: str, value: object, legal: Any) -> None:
    """Refuse a value that is not one of ``legal``.

    Args:
        name: of the argument.
        value: its value.
        legal: some values, or a ``Literal`` of them.
    """
    legal = get_args(legal) or tuple(legal)
    if value not in legal:  # layers ask in each call, where a similar name takes long to find
        expected = f"one of {', '.join(map(repr, legal))}{nearest(value, legal)}"
        check(False, name, repr(value), expected)


def check_module(name: str, value: object) -> None:
    """Refuse what is no module, such as the name of one or its class."""
    if not isinstance(value, nn.Module):
        got = shown(value) if isinstance(value, str) else described(value)
        if isinstance(value, type):
            got = f"the class {value.__name__}"
        raise ValueError(f"{name}: got {got}, expected a module: an instance of nn.Module")


def shown(value: object) -> str:
    """A value for a message: a tensor's shape, or else the value itself, in short."""
    return described(value) if isinstance(value, Tensor) else in_short(repr(value), 60)


def nearest(value: object, legal: Iterable[object]) -> str:
    """The end of a message: the legal name most similar to an unknown one, if one is similar."""
    unknown = str(value)[:LONGEST_NAME].lower()
    names = [name for name in legal if isinstance(name, str)]
    found = [name for name in names if name in unknown.split("_")]  # the k of top_k
    found = found or difflib.get_close_matches(unknown, names, cutoff=SIMILAR)
    return f"; did you mean {found[0]!r}?" if found else ""


_parameters: dict[type, tuple[str, ...]] = {}
"""What :func:`parameters_of` gave for a class.

To read a signature takes as long as a small matmul. Not by ``functools.cache``, of which
``torch.compile`` warns.
"""


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    cls = type(module)
    if cls not in _parameters:
        _parameters[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _parameters[cls]


def must_be_called(module: nn.Module) -> bool:
    """True if a module has to be called, since reading its weights would miss something.

    That is a forward or backward hook, or a patched forward.
    """
    hooks = (*forward_hooks(module), *backward_hooks(module))
    return any(hooks) or "forward" in vars(module)


def change_of(module: nn.Module) -> str | None:
    """What a user added to a module or changed in it, and a reader of its weights would miss.

    Returns:
        Words for a message, or ``None`` for a module that is as its class makes it.
    """
    for name, table in vars(module).items():
        if not name.endswith("_hooks") or not isinstance(table, dict):
            continue
        for hook in table.values():
            function = getattr(hook, "hook", hook)  # torch wraps hooks on states
            # PyG's own layers, and stacks, have hooks on their states.
            owner = str(getattr(function, "__module__", "")).partition(".")[0]
            if owner not in ("gmoe", "torch_geometric"):
                return "hooks"
    patched = [
        name for name in vars(module) if inspect.isfunction(getattr(type(module), name, None))
    ]
    if patched:
        return f"a {patched[0]} of its own"
    if is_parametrized(module):
        return "a parametrized weight"
    if any(type(parameter) is not nn.Parameter for parameter in module.parameters(recurse=False)):
        return "parameters of their own class"
    for linear in linear_classes():
        if isinstance(module, linear):
            has_plain_forward = type(module).forward is linear.forward
            if not has_plain_forward or set(parameter_names(module)) != {"weight", "bias"}:
                return f"a linear layer of its own class, {type(module).__name__}"
    return None


def linear_classes() -> tuple[Any, ...]:
    """Torch's linear layer, and PyG's if somebody imported it: ``import gmoe`` does not."""
    pyg = sys.modules.get("torch_geometric.nn")
    return (nn.Linear,) if pyg is None else (nn.Linear, pyg.Linear)


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """True for a single linear layer, torch's or PyG's, which has the same tensors."""
    return isinstance(module, linear_classes())


def refuse_functions(argument: str, name: str, conv: nn.Module) -> None:
    """Refuse a conv with a function in place of a method, where experts would be copies of it.

    Such a function may hold the conv, and would run it, not its copy.

    Args:
        argument: which the conv was given as.
        name: of the conv.
        conv: any module.

    Raises:
        ValueError: such a function, on the conv or on a part of it.
    """
    for path, part in conv.named_modules(prefix=name):
        patched = [
            key
            for key, value in vars(part).items()
            if inspect.isfunction(value) and hasattr(type(part), key)
        ]
        if patched:
            raise ValueError(
                f"{argument}: got {path} with a function as its {', '.join(patched)}, expected a "
                "conv whose methods are those of a class, since experts are copies of it"
            )


def refuse_computed(argument: str, name: str, conv: nn.Module) -> None:
    """Refuse a conv with a weight that a hook computes anew in each call: torch copies no such.

    Args:
        argument: which the conv was given as.
        name: of the conv.
        conv: any module.

    Raises:
        ValueError: a weight under ``torch.nn.utils.prune``, or under one of torch's norms of
            weights that are no parametrizations, on the conv or on a part of it.
    """
    for path, part in conv.named_modules(prefix=name):
        parameters = dict(part.named_parameters(recurse=False))
        for key, value in vars(part).items():
            if not isinstance(value, Tensor):
                continue
            # What a spectral norm computes has a gradient from the first call on.
            source = parameters.get(f"{key}_orig", value)
            if value.grad_fn is not None or source.requires_grad:
                raise ValueError(
                    f"{argument}: got {path} with a {key} that a hook computes, as those of "
                    "torch.nn.utils.prune do, expected a parameter or a parametrization, since "
                    f"experts are copied: torch.nn.utils.prune.remove(module, {key!r}) before"
                )
