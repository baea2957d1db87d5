"""Call any model in evaluation, and replace its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from gmoe._torch import is_compiler_loaded


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation inside the block, without gradients; its modes come back.

    A compiled model runs eagerly: compiled code does not call hooks that came after it.
    """
    # If the model is compiled, the compiler is loaded.
    stance = torch.compiler.set_stance("force_eager") if is_compiler_loaded() else nullcontext()
    modes = {part: part.training for part in model.modules()}
    try:
        with stance, torch.no_grad():
            model.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def with_modules(model: Any, new: Mapping[Any, nn.Module]) -> Any:
    """The model with some of its modules replaced, wherever they stand."""
    if model in new:
        return new[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    return model
