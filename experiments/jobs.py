"""Seeds of many runs side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import redirect_stdout
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import torch

from experiments.checkpoint import InterruptedRunError
from experiments.config import RunConfig
from experiments.data import load_tasks
from experiments.progress import Progress
from experiments.runs import so_far, train_one

SECONDS = 1.0
"""Between two looks at how far they are."""


def train_apart(
    configs: Sequence[RunConfig], jobs: int, threads: int, shown: bool
) -> Generator[tuple[int, str | None], None, None]:
    """Train the seeds that runs lack, so many at once.

    What they give does not depend on how many there are at once. Closing the iterator ends those that are under way,
    which save what was trained.

    Args:
        configs: the runs.
        jobs: processes.
        threads: of each.
        shown: whether to report progress.

    Returns:
        an iterator over (place in ``configs``, why it failed, else ``None``), each as soon as its last seed is done.
    """
    todo: list[tuple[int, int]] = []
    failed: dict[int, str] = {}
    known: set[Any] = set()
    for place, config in enumerate(configs):
        try:
            _, summary, results = so_far(config)
            missing = [] if summary is not None else [seed for seed in config.seeds if seed not in results]
            data = (config.dataset, config.data, config.data_root)
            if missing and data not in known:  # or the processes would download and prepare the same at once
                load_tasks(config)
                known.add(data)
        except (ValueError, OSError) as error:
            failed[place], missing = str(error), []
        if not missing:
            yield place, failed.get(place)
        todo += [(place, seed) for seed in missing]
    left = Counter(place for place, _ in todo)
    epochs = sum(configs[place].epochs for place, _ in todo)
    done, number = sum(_epochs(configs[place], seed) for place, seed in todo), len(todo)
    progress = Progress(epochs, shown)
    progress.skip(done)
    done = 0
    last: tuple[str, int] | None = None
    running: dict[int, tuple[int, int, Any, Connection]] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                place, seed = todo.pop(0)
                process, reason = _start(configs[place], seed, threads)
                running[process.sentinel] = (place, seed, process, reason)
            wait(list(running), timeout=SECONDS)
            for sentinel in [one for one, (_, _, process, _) in running.items() if not process.is_alive()]:
                place, seed, process, reason = running.pop(sentinel)
                done += configs[place].epochs
                why = reason.recv() if reason.poll() else f"its process ended with status {process.exitcode}"
                if why:
                    failed.setdefault(place, f"seed {seed}: {why}")
                left[place] -= 1
                if not left[place]:
                    yield place, failed.get(place)
            if running:
                now = done + sum(_epochs(configs[place], seed) for place, seed, *_ in running.values())
                names = ", ".join(f"{configs[place].folder().name} seed {seed}" for place, seed, *_ in running.values())
                where = f"{number - len(todo) - len(running)} of {number} seeds done", now
                if where != last:
                    progress.show(*where, epochs, names)
                    last = where
        progress.finish(epochs)
    finally:
        for _, _, process, _ in running.values():
            process.terminate()
        for _, _, process, _ in running.values():
            process.join()


def _epochs(config: RunConfig, seed: int) -> int:
    """How many of a seed are done."""
    log = config.folder() / f"seed-{seed}" / "metrics.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def _start(config: RunConfig, seed: int, threads: int) -> tuple[Any, Connection]:
    """A process, and from where it will be said why it failed, or "" if it did not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.runs"])  # a process then begins in no time
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_job, args=(config, seed, threads, send))
    process.start()
    send.close()
    return process, receive


def _job(config: RunConfig, seed: int, threads: int, reason: Connection) -> None:
    os.setsid()  # Ctrl-C is for the first process, which ends the others by SIGTERM

    def stop(number: int, _: FrameType | None) -> None:
        raise InterruptedRunError(number)

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(threads)
    try:
        with redirect_stdout(None):
            train_one(config, seed)
    except (ValueError, OSError) as error:
        reason.send(str(error))
    except InterruptedRunError as stopped:
        sys.exit(128 + stopped.number)
    else:
        reason.send("")
