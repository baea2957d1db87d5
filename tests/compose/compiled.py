"""The layers and models of :mod:`tests.compose.graphs`, compiled.

Two calls, of two graphs, have to give the outputs, the routings, the gradients and the counters of
the same module without ``torch.compile``. Layers with breaks are compiled in pieces. What is
refused without is refused with it, and is not compiled.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.compose.frame import require_equal
from tests.compose.graphs import Config, Graphs

BACKEND = "aot_eager"
"""It traces forward and backward, and computes as eager code does."""


def comparable(value: Tensor | None) -> Tensor | None:
    """NaN as a number: what an option leaves unused is NaN on both sides."""
    return None if value is None else value.double().nan_to_num(1e5)


class Compiled(Graphs):
    """Random layers and models, compiled; models run on the whole graph."""

    name = "compile"
    tolerance = 1e-9

    def of(self, number: int) -> Config:
        case = super().of(number)
        way = "layer" if case.way == "layer" else "forward"
        return replace(case, way=way, before=(), after="nothing", low="", as_on_gpus=False)

    def steps(self, case: Config, module: Any, called: Any) -> list[dict[str, Any]]:
        """Outputs, gradients and counters of a call on each of two graphs."""
        found = []
        for seed in (case.seed, case.seed + 1):
            module.zero_grad()
            given = self.given_of(case, seed)
            values = self.found(case, module, given, self.seeded(self.call, case, called, given))
            values |= {name: value.clone() for name, value in module.named_buffers()}
            found.append({name: comparable(value) for name, value in values.items()})
        return found

    def compute(self, case: Config) -> None:
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # or it tells of each break
        module = self.ready(case)
        # Two modules, since each step moves the counters.
        twin = copy.deepcopy(module)
        expected = self.steps(case, module, module)
        # Else a limit of recompilations ends in eager code, which equals itself.
        torch.compiler.reset()
        try:
            found = self.steps(case, twin, torch.compile(twin, backend=BACKEND))
        except Exception as error:
            raise AssertionError(f"compiled: {type(error).__name__}: {error}") from error
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            require_equal(f"compiled, call {number}", ours, theirs, self.tolerance)
