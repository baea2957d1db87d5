"""Training steps of two checkouts of this project in turns.

One process cannot hold both: torch knows an operator by its name. So each checkout has a process,
which runs a step when it is asked to, and the other checkout has two: how far these are apart is
the noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from experiments.benchmark.measure import take_turns
from experiments.benchmark.models import (
    WARMUP,
    Times,
    Training,
    build_row,
    enough_repeats,
    least,
)
from experiments.train.results import commit
from gmoe._checks import check

HERE = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Elsewhere:
    """A training in another process; a call is one step."""

    def __init__(self, process: Connection, variant: str) -> None:
        self.process = process
        self.variant = variant
        self.times: list[Times] = []

    def __call__(self) -> None:
        """Let the process run one step."""
        self.times.append(Times(*ask(self.process, self.variant)))


@contextmanager
def compared_with(
    folder: Path, threads: int, repeats: int, seconds: float
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What compares a row of this checkout, by its name, with that of the one in the folder.

    By model ``ratio``, the least time of a step over that of the other checkout; ``noise``, that
    of the other checkout over itself; and its ``commit``.

    Raises:
        ValueError: a folder that is no checkout with this benchmark.
    """
    is_checkout = (folder / "experiments/benchmark/before.py").exists()
    check(is_checkout, "before", folder, "a checkout of this project that has this benchmark")
    with ExitStack() as stack:
        places = {"now": HERE, "before": folder.resolve(), "before again": folder.resolve()}
        processes = {
            name: stack.enter_context(process_of(place, threads)) for name, place in places.items()
        }
        other = ask(processes["before"], "commit")

        def compare(row: str) -> dict[str, Any]:
            # 1. Build the models of the row in all processes.
            trainings: dict[str, dict[str, Elsewhere]] = {}
            for name, process in processes.items():
                trainings[name] = {
                    variant: Elsewhere(process, variant) for variant in ask(process, f"row {row}")
                }
            # 2. Let them take turns. What one of the checkouts lacks is compared with nothing.
            shared = [variant for variant in trainings["now"] if variant in trainings["before"]]
            turns = {
                f"{variant}, {name}": of_place[variant]
                for variant in shared
                for name, of_place in trainings.items()
            }
            enough = enough_repeats(turns.values(), repeats, seconds)
            take_turns(turns, enough, CPU, warmup=WARMUP)
            # 3. Compare the fastest steps.
            by_variant = {}
            for variant in shared:
                now, before, again = (
                    least(turns[f"{variant}, {name}"], enough).step for name in places
                )
                by_variant[variant] = {
                    "ratio": now / before,
                    "noise": again / before,
                    "commit": other,
                }
            return by_variant

        yield compare


@contextmanager
def process_of(checkout: Path, threads: int) -> Iterator[Connection]:
    """A process that has imported a checkout, and answers by :func:`serve`."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, threads), daemon=True)
    # A new process takes over this one's path when it starts.
    with patch.object(sys, "path", [str(checkout), *sys.path]):
        process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join()


def serve(asked: Connection, threads: int) -> None:
    """Answer until nobody asks: ``"commit"``; ``"row NAME"``, which builds the models of a row,
    by their names; or the name of one of these, which runs a step, by its times."""
    torch.set_num_threads(threads)
    trainings: dict[str, Training] = {}
    while True:
        try:
            name: str = asked.recv()
        except EOFError:
            return
        if name == "commit":
            asked.send(commit())
        elif name.startswith("row "):
            row = build_row(name.removeprefix("row "), CPU)
            trainings = {variant: Training(made, CPU) for variant, made in row.items()}
            asked.send(list(trainings))
        else:
            trainings[name]()
            # Plain numbers: the other end has its own class of this name.
            asked.send(tuple(trainings[name].times[-1]))


def ask(process: Connection, name: str) -> Any:
    """What :func:`serve` answers in a process.

    Raises:
        ValueError: the process has ended.
    """
    try:
        process.send(name)
        return process.recv()
    except (EOFError, ConnectionError) as error:
        raise ValueError(
            f"before: got a checkout whose process ended at {name!r}, expected an answer"
        ) from error
