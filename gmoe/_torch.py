"""What gmoe uses of torch that is private there, each with the reason; each has a test.

Two uses cannot be here: :class:`gmoe.Router` overrides ``nn.Module._apply``, and
:mod:`gmoe.flops` lists operators by their names.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# compilers and transforms -------------------------------------------------------------------------

untraced = torch._compile._disable_dynamo
"""``torch.compiler.disable``, which imports the compiler at once: that takes seconds."""

in_transform = torch._C._are_functorch_transforms_active
"""True inside a transform of ``torch.func``, which has no public test."""

is_batched = torch._C._functorch.is_legacy_batchedtensor
"""True for a batch of gradients (``vectorize=True``), which looks like any other tensor."""


def is_compiler_loaded() -> bool:
    """True once the compiler was imported; to ask the compiler itself would import it."""
    return "torch._dynamo" in sys.modules


is_tracing = torch._C._get_tracing_state
"""Not ``None`` inside ``torch.jit.trace``: the test of it that compiled code answers, too."""


def is_watched() -> bool:
    """True under fake tensors and while operators are counted (FLOPs); never in compiled code.

    The modes that watch are on a stack without a public view.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def in_backward() -> bool:
    """True in a backward pass, as where checkpointing runs a forward again; its own test."""
    return backward_number() != NO_BACKWARD


NO_BACKWARD = -1
"""What :func:`backward_number` gives outside of backward passes."""

backward_number = torch._C._current_graph_task_id
"""The number of the backward pass that is running: each has another."""


def hooks_of_saved() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The hooks that pack and unpack what autograd saves now; only the innermost pair is used."""
    found: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


def version_of(value: Tensor) -> int:
    """How often a tensor's memory was written to in place."""
    return value._version


# kernels ------------------------------------------------------------------------------------------

row_pointers = torch._convert_indices_from_coo_to_csr
"""The row pointers of ascending rows, in one pass and without the host sync of ``bincount``."""

rows_of_pointers = torch._convert_indices_from_csr_to_coo
"""The opposite; gives (rows, columns)."""

index_put = torch._index_put_impl_
"""``index_put_`` that can skip its check of the range, for which older versions of torch sync."""

copy_all = torch._foreach_copy_
"""Copies a list of tensors into others, on a GPU in one launch."""

assert_async = torch._assert_async
"""A check on the device, without a host sync: its message appears when the device gets to it."""


# what tensors and modules hold --------------------------------------------------------------------


def num_stored(value: Tensor) -> int:
    """The number of values of a sparse tensor, also of one that is not coalesced."""
    return value._nnz()


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parameters, also of those that are ``None``."""
    return tuple(module._parameters)


def forward_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """The tables of the hooks before and after a forward; there is no public list of them."""
    return module._forward_pre_hooks, module._forward_hooks


def remove_forward_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove the hooks of some classes; their handles may be gone, or those of a model copied."""
    before: list[dict[int, Any]] = [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    ]
    after: list[dict[int, Any]] = [
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    for tables in (before, after):
        found = [key for key, hook in tables[0].items() if isinstance(hook, kinds)]
        for key in found:
            for table in tables:
                table.pop(key, None)


def shallow_copy(module: nn.Module, of_part: Callable[[nn.Module], nn.Module]) -> Any:
    """A copy that shares hooks, options and tensors with a module, and has other parts.

    torch.compile follows it, which it does not with ``copy.copy``.

    Args:
        module: the module.
        of_part: gives what stands in place of a part.
    """
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = {
        name: None if part is None else of_part(part) for name, part in module._modules.items()
    }
    return copied


_LIBRARIES_OF_WRAPPERS = ("torch", "torch_geometric", "timm", "lightning")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of a library's wrappers: compiled, parallel, averaged, set up by Fabric."""
    while type(model).__module__.partition(".")[0] in _LIBRARIES_OF_WRAPPERS:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or {*inner.parameters()} != {*model.parameters()}:
            break  # a part of it, such as one of a Sequential that is named so
        model = inner
    return model


def backward_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """The tables of the hooks before and after a backward."""
    return module._backward_pre_hooks, module._backward_hooks


def given_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula so that ``FlopCounterMode`` gives it tensors, not their shapes.

    A custom mapping has no public way to ask for them.
    """

    def count(*args: Any, **_: Any) -> int:
        return formula(*args)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


# modules -----------------------------------------------------------------------------------------


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first parameter of floating-point numbers; ``None`` without one.

    Layers ask for it in each call, and ``parameters()`` walks over all modules.
    """
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter.dtype
    for part in module._modules.values():
        if part is not None and (found := dtype_of(part)) is not None:
            return found
    return None


class NotesChanges(nn.Module):
    """A module that notes what somebody changes in it, so that its kernels need not look for it.

    That is a hook around its forward or backward, a patched forward, a parametrization, and a part
    that is added or replaced. What is undone is no change any more.

    Attributes:
        changes: empty if there are none; several modules may note theirs in one place.
    """

    changes: OrderedDict[Hashable, Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.changes = OrderedDict()

    def __setattr__(self, name: str, value: Any) -> None:
        key = (id(self), name)
        if name == "__class__" and self.changes.get(key) is value:
            del self.changes[key]
        elif name == "__class__":
            self.changes.setdefault(key, type(self))
        elif name == "forward" or isinstance(value, nn.Module):
            self.changes[key] = None
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self.changes[id(self), name] = None

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.changes.pop((id(self), name), None)

    def _noted(self, handle: RemovableHandle) -> RemovableHandle:
        """The handle of a hook, which takes its note away with the hook."""
        self.changes[handle.id] = None
        handle.extra_dict_ref = (*handle.extra_dict_ref, weakref.ref(self.changes))
        return handle

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        return self._noted(super().register_forward_pre_hook(*args, **options))

    def register_forward_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        return self._noted(super().register_forward_hook(*args, **options))

    def register_full_backward_pre_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_pre_hook(*args, **options))

    def register_full_backward_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        return self._noted(super().register_full_backward_hook(*args, **options))

    def register_backward_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        return self._noted(super().register_backward_hook(*args, **options))


class LateState(nn.Module):
    """A module that has no state until it is built.

    Torch's hooks around a state come after it was read, and a parameter without a size cannot be.
    """

    def is_built(self) -> bool:
        """Say whether there is a state."""
        raise NotImplementedError

    def refuse_state(self) -> None:
        """Raise, since no parameter could take a state; with ``strict=False`` torch would not."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.is_built():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.is_built():
            super()._load_from_state_dict(state_dict, prefix, *args)
        elif any(name.startswith(prefix) for name in state_dict):
            self.refuse_state()
