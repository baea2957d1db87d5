"""What transformers' ``Trainer`` does not know of experts: their health, and how to save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from gmoe._checks import check, shown
from gmoe.metrics import HealthMonitor
from gmoe.saved import save, spec_of


class TrainerHealth(TrainerCallback):
    """Log how evenly experts are used wherever transformers' ``Trainer`` logs its loss.

    The figures are those of :func:`gmoe.expert_health`, over all training since the
    last log and over all processes. If a few experts have nearly all of the load, a warning says
    once what to do.

    Args:
        trainer: the trainer, through whose ``log`` the figures go.

    Raises:
        ValueError: something other than a trainer.

    Example:
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=images)
        >>> trainer.add_callback(gmoe.TrainerHealth(trainer))
        >>> trainer.train()
    """

    def __init__(self, trainer: Trainer) -> None:
        check(isinstance(trainer, Trainer), "trainer", shown(trainer), "a Trainer of transformers")
        self.trainer = trainer
        self.monitor = HealthMonitor()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count; see ``gmoe.metrics.HealthMonitor``."""
        self.monitor.watch(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the health behind the training's loss.

        By now other callbacks have the loss already, so that this is a log of its own, which comes
        here again, without a loss.
        """
        if self.monitor.stats and "loss" in kwargs["logs"]:
            health = self.monitor.collect(advises=state.is_world_process_zero)
            self.trainer.log(health.figures())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count no more."""
        self.monitor.remove()


class TrainerSave(TrainerCallback):
    """Let transformers' ``Trainer`` write checkpoints that :func:`gmoe.load` reads.

    Each checkpoint gets what :func:`gmoe.save` writes, in place of the ``Trainer``'s own weights
    and configuration. It resumes from it and finds its best model in it by its own methods, and a
    plain ``from_pretrained`` raises. Without this callback, ``from_pretrained`` of a checkpoint
    gives a dense model, with a warning; and a few models, ViT among them, do not resume, with or
    without experts, since transformers 5 writes their weights under other names than it reads.

    The model has to be whole in each process, as under DDP.

    Raises:
        ValueError: ``push_to_hub``; a model that :func:`gmoe.save` refuses. Both before the first
            step.

    Example:
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=images)
        >>> trainer.add_callback(gmoe.TrainerSave())
        >>> trainer.train()
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would fail, or be wrong, after hours."""
        expected = "False: upload what gmoe.save writes, by huggingface_hub.upload_folder"
        check(not args.push_to_hub, "push_to_hub", args.push_to_hub, expected)
        spec_of(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write over the checkpoint."""
        if args.should_save:
            save(kwargs["model"], Path(args.output_dir, f"checkpoint-{state.global_step}"))
