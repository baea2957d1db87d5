"""How far a command is, and how long it still takes."""

from __future__ import annotations

import sys

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines of progress, where the output is a file."""


class Progress(tqdm):
    """Epochs over all seeds and variants of a command, with an estimate of the time that is left.

    A bar in a terminal, elsewhere a line now and then.
    """

    def __init__(self, epochs: float, shown: bool = True) -> None:
        self.epochs = epochs
        self.done = 0.0
        self.initial = 0.0
        self.in_terminal = sys.stderr.isatty()
        super().__init__(
            total=epochs,
            disable=not shown,
            leave=False,
            delay=1e-9,
            miniters=0,
            mininterval=0.1 if self.in_terminal else SECONDS,
            bar_format="{percentage:3.0f}%|{bar}| " * self.in_terminal
            + "{desc}; about {remaining} left",
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print a line."""
        if self.in_terminal:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

    def skip(self, epochs: float) -> None:
        """So many of a seed were done before, and are no part of the estimate."""
        self.initial += epochs

    def show(self, name: str, epoch: float, epochs: int, figures: str) -> None:
        """Where a seed is; whole epochs, or parts of one."""
        self.n = min(self.done + epoch, self.epochs)
        self.set_description_str(
            f"{name}: epoch {epoch:.3g} of {epochs}, {figures}", refresh=epoch >= epochs
        )
        self.update(0)

    def finish(self, epochs: int) -> None:
        """A seed is done."""
        self.done += epochs
        if self.done >= self.epochs:
            self.close()
