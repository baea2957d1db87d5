"""What training asks of a kind of data."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

import gmoe
from experiments.train.config import MoleculeConfig, NodeConfig, RunConfig
from experiments.train.data.task import Task
from experiments.train.user_code import load_object
from gmoe._checks import check

Config = TypeVar("Config", bound=RunConfig)
GNNConfig = TypeVar("GNNConfig", bound=NodeConfig | MoleculeConfig)


class Kind(ABC, Generic[Config]):
    """A kind of data: how a run loads it, builds a model for it, and calls that model.

    Args:
        config: the options of the run, of which each kind has a class of its own.
    """

    has_slots: ClassVar = False
    """Whether there are models with the router ``soft_slots``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def tasks(self) -> Callable[[int], Task]:
        """Load the data set; the result gives the task of a seed, whose split it chooses where
        there are several.

        Raises:
            ValueError: an unknown name, a broken file, or something else than data from ``--data``.
            FileNotFoundError: files are missing and cannot be fetched.
        """

    @abstractmethod
    def model(self, task: Task) -> nn.Module:
        """The model as the options say, but for ``model`` and ``equal``."""

    def example(self, task: Task) -> tuple[Any, ...]:
        """The inputs of one call of the model in training."""
        return next(iter(task.loader("train", self.config.batch_size, None))).inputs

    def note_data(self, digest: Any) -> dict[str, Any]:
        """Add to a ``hashlib`` digest what may differ in data of the same name.

        Returns what ``config.json`` says of these beside the digest.
        """
        return {}

    def sizes(self, task: Task) -> list[Any]:
        """What one's own model is made with: the sizes of input and output."""
        return [task.in_channels, task.num_classes]

    def num_images(self, inputs: tuple[Any, ...]) -> int | None:
        """How many images the model is called with, where these are images."""
        return None

    def check_evaluation(self, model: nn.Module, task: Task) -> None:
        """Refuse a model that cannot be evaluated as the options say."""

    def model_options(self, task: Task) -> dict[str, Any]:
        """The options that all of gmoe's models take, their router among them."""
        config = self.config
        router, router_kwargs = self.router(task)
        return {
            "router": router,
            "router_kwargs": router_kwargs,
            "num_experts": config.experts,
            "k": config.k,
            "every": config.every,
            "dropout": config.dropout,
            **config.layer_options(),
        }

    def router(self, task: Task) -> tuple[Any, dict[str, Any]]:
        """The router by name or factory, or none, and its options."""
        name = self.config.router
        given = self.config.options.given()
        if name in ("dense", "soft_slots"):
            check(not given, "options", f"{given} with router={name!r}", "none")
            legal = "another, or images"
            check(name == "dense" or self.has_slots, "router", f"{name!r} for {task.name}", legal)
            return None, {}
        router: Any = name
        if ":" in name:
            router = load_object("router", name)
            is_router = isinstance(router, type) and issubclass(router, gmoe.Router)
            check(is_router, "router", repr(name), "a subclass of gmoe.Router")
        elif name == "oracle":
            router = self.oracle(task)
        known = inspect.signature(gmoe.ROUTERS.get(router, router)).parameters
        for option, value in given.items():
            legal = f"none, since the router {name!r} has no such option"
            check(option in known, option, repr(value), legal)
        if given.get("balance") == "none":
            given["balance"] = None
        return router, given

    def oracle(self, task: Task) -> Callable[..., gmoe.Router]:
        """The router that knows the right expert of each token, where the data say it."""
        if task.planted is None:
            legal = "another, since no routing is planted"
            raise ValueError(f"router: got 'oracle' for {task.name}, expected {legal}")
        planted = int(task.planted.max()) + 1
        experts = self.config.experts
        check(experts == planted, "experts", experts, f"the {planted} planted ones")
        return partial(gmoe.OracleRouter, assignment=task.planted)


class GNNKind(Kind[GNNConfig]):
    """A kind of data whose models are GNNs."""

    def conv_of_experts(self) -> str | list[str]:
        """The conv of all experts by name, or of each; the first alone for the dense model."""
        convs = self.config.convs()
        if len(convs) == 1 or self.config.router == "dense":
            return convs[0]
        experts = self.config.experts
        legal = f"a multiple of the {len(convs)} kinds of conv"
        check(experts % len(convs) == 0, "experts", experts, legal)
        return list(convs) * (experts // len(convs))
