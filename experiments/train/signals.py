"""How a command is stopped: by a signal, which it raises."""

from __future__ import annotations

from types import FrameType
from typing import NoReturn


class InterruptedRunError(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; what was trained is on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt(number: int, _: FrameType | None = None) -> NoReturn:
    """A handler of signals, which raises."""
    raise InterruptedRunError(number)
