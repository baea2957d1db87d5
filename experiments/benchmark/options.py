"""What all benchmarks take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where and how long to measure."""

    device: str = "cpu"
    """Device, by torch's name."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    repeats: int = 7
    """Timed runs of each arm."""
    seed: int = 0
    """Of all that is drawn."""
    json: Path | None = None
    """Where to write the figures."""

    def run(self) -> dict[str, Any]:
        """By arm, the seconds of :func:`~experiments.timing.take_turns` and their ratio to the reference arm's."""
        raise NotImplementedError

    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ValueError: there is none of that name.
        """
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {self.device!r}, expected one that torch finds here ({error})") from error
        return device


def with_ratios(found: dict[str, dict[str, Any]], reference: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """Each arm with ``ratio``: its median wall and CPU time over those of its reference arm.

    Args:
        found: what :func:`~experiments.timing.take_turns` returned.
        reference: from the name of an arm to that of its reference.
    """
    for name, figures in found.items():
        base = found[reference(name)]
        figures["ratio"] = {kind: figures[kind]["median"] / base[kind]["median"] for kind in ("wall", "cpu")}
    return found
