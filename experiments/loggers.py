"""TensorBoard and Weights & Biases, beside the CSV files that every run writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Logger(Protocol):
    """Where the figures of an epoch go."""

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Numbers by name."""

    def draw(self, name: str, figure: Figure, epoch: int) -> None:
        """A drawing."""

    def close(self) -> None:
        """Bring everything to where it belongs."""


class TensorBoard:
    """Event files in ``seed-N/tensorboard``; what lies behind the checkpoint is hidden when a run goes on."""

    def __init__(self, folder: Path, science: dict[str, Any], epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch or None)
        self._writer.add_text("config", "\n".join(f"- {name}: {value}" for name, value in science.items()), epoch)

    def log(self, values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def draw(self, name: str, figure: Figure, epoch: int) -> None:
        self._writer.add_figure(name, figure, epoch)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project ``gmoe``, by the name of the run folder and the seed."""

    def __init__(self, folder: Path, science: dict[str, Any], epoch: int) -> None:
        import wandb

        self._wandb = wandb
        name = f"{folder.parent.name}-{folder.name}"
        self._run = wandb.init(project="gmoe", name=name, id=name, resume="allow", dir=str(folder), config=science)

    def log(self, values: dict[str, float], epoch: int) -> None:
        self._run.log(values, step=epoch)

    def draw(self, name: str, figure: Figure, epoch: int) -> None:
        self._run.log({name: self._wandb.Image(figure)}, step=epoch)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def make_loggers(names: Sequence[str], folder: Path, science: dict[str, Any], epoch: int) -> list[Logger]:
    """The loggers of a seed.

    Args:
        names: of ``LOGGERS``.
        folder: ``seed-N`` of the run folder.
        science: the configuration.
        epoch: at which it begins, or goes on.
    """
    return [LOGGERS[name](folder, science, epoch) for name in names]


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ValueError: one is not; says what to install.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"logger: got {name!r}, which needs its package: pip install {name}")
