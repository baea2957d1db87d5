"""What the random composers share: what a number comes to, how it is judged, and the command.

A composer draws a configuration from a number, runs it, and compares it with its definition. What
fails is a bug, of the library or of the composer. Refusals in the library's own words are counted
apart.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from random import Random
from typing import Any, NamedTuple

import torch

from tests.gmoe.conv.masked import default_float64

OWN_WORDS = re.compile(r"[\w., ]+: got .*(expected|but)|inference: ", re.DOTALL)
"""How gmoe's refusals begin, and what they say."""

CHUNK = 25
"""How many numbers one test runs."""


class Outcome(NamedTuple):
    """``"equal"`` up to a difference, ``"refused"`` or ``"failed"``."""

    difference: float
    kind: str
    message: str = ""


def flip(random: Random, probability: float = 0.5) -> bool:
    return random.random() < probability


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float) -> Outcome:
    """What an option leaves unused has no gradient in the definition; NaN is as far as can be.

    Differences are relative where values exceed 1. In deep models gradients reach 1e6, and the
    definition itself moves by more than the tolerance if its input changes in the last digit.
    """
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} and {sorted(theirs)}"
    found = Outcome(0.0, "equal")
    for name, expected in theirs.items():
        if expected is None:
            continue
        assert ours[name].shape == expected.shape, name
        scale = difference = 0.0
        if expected.numel():
            scale = float(expected.abs().max().clamp(min=1))
            difference = float((ours[name] - expected).abs().max()) / scale
        if difference != difference:
            difference = torch.inf
        kind = "equal" if difference <= tolerance else "failed"
        found = max(found, Outcome(difference, kind, name))
    return found


def judged(
    draw: Callable[[int], Any],
    compute: Callable[[Any], Outcome],
    may_refuse: Callable[[Any, str], bool],
    number: int,
) -> Outcome:
    """What a number comes to; an error is a refusal only in gmoe's own words.

    Args:
        draw: see :class:`Composer`.
        compute: compares a configuration with its definition.
        may_refuse: whether a refusal is one that the configuration can get.
        number: which is drawn.
    """
    with warnings.catch_warnings(), default_float64():
        warnings.simplefilter("ignore")
        c = draw(number)
        try:
            return compute(c)
        except Exception as error:
            text = str(error)
            is_own = isinstance(error, ValueError | RuntimeError | NotImplementedError)
            is_own &= OWN_WORDS.match(text) is not None
            kind = "refused" if is_own and may_refuse(c, text) else "failed"
            return Outcome(torch.inf, kind, f"{type(error).__name__}: {text}")


class Composer(NamedTuple):
    """A composer: ``python -m tests.NAME`` runs its :meth:`main`."""

    name: str
    draw: Callable[[int], Any]
    """The configuration of a number, a dataclass."""
    run: Callable[[int], Outcome]
    """What the number comes to; it raises nothing."""
    traits: Callable[[Any], Iterable[str]]
    """What of a configuration is counted."""

    def show(self, number: int) -> str:
        """The configuration and its outcome."""
        c, (difference, kind, message) = self.draw(number), self.run(number)
        lines = [f"{field.name:15} {getattr(c, field.name)}" for field in fields(c)]
        return "\n".join([*lines, f"{kind:15} {message} ({difference:.1e})"])

    def main(self, first: int, last: int | None = None) -> int:
        """Print a number, or a range's progress and summary; 1 if some number failed."""
        torch.set_num_threads(1)
        if last is None:
            print(self.show(first))
            return int(self.run(first).kind == "failed")
        numbers = range(first, last)
        counts, begin, failures = Counter[tuple[str, str]](), time.perf_counter(), list[int]()
        for done, number in enumerate(numbers, 1):
            traits, outcome = {*self.traits(self.draw(number))}, self.run(number)
            counts.update((trait, outcome.kind) for trait in traits | {"all"})
            if outcome.kind == "failed":
                failures.append(number)
                said = f"{outcome.message[:300]} ({outcome.difference:.1e})"
                print(f"{number} {', '.join(sorted(traits))}: {said}", flush=True)
            if done % 500 == 0:
                print(f"{done} of {len(numbers)}", file=sys.stderr, flush=True)
        for trait in sorted({trait for trait, _ in counts}):
            kinds = ("equal", "refused", "failed")
            print(f"{trait:22}", *(f"{kind} {counts[trait, kind]:5}" for kind in kinds))
        each = 1000 * (time.perf_counter() - begin) / len(numbers)
        print(f"{len(numbers)} numbers, {each:.0f} ms each; failed: {failures or 'none'}")
        return int(bool(failures))

    def check(self, first: int, equal: float) -> None:
        """For a test: no number of a chunk fails, and a share of them at least is equal.

        Among hundreds of chunks, a few have far fewer equal numbers than the mean.
        """
        kinds = Counter[str]()
        for number in range(first, first + CHUNK):
            outcome = self.run(number)
            kinds[outcome.kind] += 1
            assert outcome.kind != "failed", f"python -m tests.{self.name} {number}: {outcome}"
        assert kinds["equal"] >= equal * CHUNK
