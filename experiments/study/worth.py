"""Which differences are worth having: the rule of the questions and of the comparison."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.train.scores import Difference

WORTH = 0.5
"""Points that are worth having."""


@dataclass(frozen=True, kw_only=True)
class Gain(Difference):
    """A mean of paired differences, in points, and its 95 % interval."""

    @property
    def is_worth(self) -> bool:
        """Whether it is above 0, and worth having."""
        return self.low > 0 and self.mean >= WORTH

    def __str__(self) -> str:
        return f"{self.mean:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]"
