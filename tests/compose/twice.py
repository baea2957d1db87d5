"""Second gradients of composed cases: those of a module are those of its definition."""

from __future__ import annotations

from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.compose.frame import MISSING, Outcome, Output, Target
from tests.helpers.flat import gradients_of


def twice(target: Target) -> Target:
    """A target whose cases are judged by first and second gradients of their inputs."""
    base: Any = type(target)

    class Twice(base):
        def found(self, case: Any, module: Any, given: Any, output: Output) -> dict[str, Any]:
            return gradients_of(output.bent, given.leaves)

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
