"""The layers and models of :mod:`tests.compose`, compiled: a number is one of its numbers.

``python -m tests.compose_compile 4711`` shows a number, ``python -m tests.compose_compile 0 300``
runs a range, a few seconds each. Two calls, of two graphs, have to give the outputs, the routings,
the gradients and the counters of the same module without ``torch.compile``. Layers with breaks are
compiled in pieces. What is refused without is refused with it, and is not compiled.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests import compose
from tests.composer import Composer, Outcome, compare
from tests.gmoe.conv import masked as ref

BACKEND = "aot_eager"
"""It traces forward and backward, and computes as eager code does."""
TOLERANCE = 1e-9


def draw(number: int) -> compose.Config:
    """The configuration of a number; models run on the whole graph."""
    c = compose.draw(number)
    return c if c.way == "layer" else replace(c, way="forward")


def step(c: compose.Config, module: Any, called: Any, seed: int) -> dict[str, Any]:
    """Outputs, gradients and counters of one call on the graph of a seed."""
    module.zero_grad()
    given = compose.given_of(c, seed)
    found = compose.finish(*compose.call(called, c, given), given, module, None)
    counters = {name: value.clone() for name, value in module.named_buffers()}
    return {name: comparable(value) for name, value in (found | counters).items()}


def comparable(value: Tensor | None) -> Tensor | None:
    """NaN as a number: what an option leaves unused is NaN on both sides."""
    return None if value is None else value.double().nan_to_num(1e5)


def compute(c: compose.Config) -> Outcome:
    """Compare two steps; raises what compiled code raises."""
    seeds = (c.number, c.number + 1)
    try:
        module: nn.Module = compose.build(c)
        twin = copy.deepcopy(module)
        expected = [step(c, module, module, seed) for seed in seeds]
    except (ValueError, RuntimeError, NotImplementedError) as error:  # :mod:`tests.compose` judges
        return Outcome(torch.inf, "refused", str(error))
    torch.compiler.reset()
    compiled = torch.compile(twin, backend=BACKEND)
    found = [step(c, twin, compiled, seed) for seed in seeds]
    return max(
        compare(ours, theirs, TOLERANCE) for ours, theirs in zip(found, expected, strict=True)
    )


def run(number: int) -> Outcome:
    """A number's outcome; an error of compiled code is a failure."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # or it tells of each break
    with warnings.catch_warnings(), ref.default_float64():
        warnings.simplefilter("ignore")
        try:
            return compute(draw(number))
        except Exception as error:
            return Outcome(torch.inf, "failed", f"{type(error).__name__}: {error}")


COMPOSER = Composer("compose_compile", draw, run, compose.COMPOSER.traits)

if __name__ == "__main__":
    raise SystemExit(COMPOSER.main(*map(int, sys.argv[1:])))
