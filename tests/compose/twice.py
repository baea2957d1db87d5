"""Second gradients of composed cases: those of a module are those of its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.compose.frame import MISSING, Outcome, Output, Target, spread


def twice(target: Target) -> Target:
    """A target whose cases are judged by first and second gradients of their inputs."""
    base: Any = type(target)

    class Twice(base):
        def found(self, case: Any, module: Any, given: Any, output: Output) -> dict[str, Any]:
            leaves = {name: leaf for name, leaf in given.leaves.items() if leaf.requires_grad}
            if not leaves:
                return {}
            values = [*leaves.values()]
            loss = torch.stack([spread(y) + y.square().sum() for y in output.y.values()]).sum()
            first = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
            size = torch.stack([spread(gradient.square()) for gradient in first]).sum()
            second = [torch.zeros_like(value) for value in values]
            if size.requires_grad:
                second = [*torch.autograd.grad(size, values, materialize_grads=True)]
            both = zip(leaves, first, second, strict=True)
            return {name: torch.stack([one.detach(), two]) for name, one, two in both}

        def run(self, case: Any) -> Outcome:
            # torch's other kernels of attention have no second gradients.
            with sdpa_kernel(SDPBackend.MATH):
                outcome: Outcome = super().run(case)
            if any(reason in outcome.message for reason in MISSING):
                return Outcome("refused", outcome.message)
            return outcome

        def check_start(self, case: Any) -> None:
            """Others compare the starts."""

        def check_low_precision(self, *_: Any) -> None:
            """And what float32 gives."""

        def check_same_after(self, *_: Any) -> None:
            """And what comes after the call."""

    return Twice()
