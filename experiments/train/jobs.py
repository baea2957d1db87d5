"""Train the seeds of runs side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from experiments.train.command_line import fail
from experiments.train.config import RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.loop import train_seeds
from experiments.train.processes import make_fabric
from experiments.train.progress import Progress
from experiments.train.run_folder import so_far
from experiments.train.signals import InterruptedRunError, interrupt

FORKS = multiprocessing.get_context("forkserver")
"""A server imports torch once, for five seconds; each process is a fork of it."""
FORKS.set_forkserver_preload(["experiments.train.loop"])


@dataclass
class Job:
    """A seed in training, and the end of what its process has said."""

    process: Any
    pipe: Connection
    place: int
    seed: int
    said: bytes = b""


def train_apart(configs: Sequence[RunConfig]) -> Generator[tuple[int, str], None, None]:
    """Train the seeds that runs lack, as many at once as their ``jobs``;
    :func:`experiments.train.loop.run` then summarizes.

    With one job the seeds are left to ``run``. Results do not depend on it, and a process that
    ends leaves the others alone. Closing the iterator ends all processes, which save what was
    trained.

    Yields a place in ``configs`` and why its run failed, or ``""``, as soon as its last seed is
    done.
    """
    jobs = max((config.jobs for config in configs), default=1)
    if jobs == 1:
        yield from ((place, "") for place in range(len(configs)))
        return
    threads = max(torch.get_num_threads() // jobs, 1)
    torch.set_num_threads(threads)  # which the summaries name
    todo: list[tuple[int, int]] = []
    loaded: set[Any] = set()
    for place, config in enumerate(configs):
        try:
            summary, results = so_far(config)
            missing = [seed for seed in config.seeds if summary is None and seed not in results]
            data = (config.dataset, config.data, config.data_root)
            # Or the processes would download and prepare the same at once
            if missing and data not in loaded:
                load_tasks(config)
                loaded.add(data)
        except (ValueError, OSError) as error:
            yield place, str(error)
            continue
        if not missing:
            yield place, ""
        todo += [(place, seed) for seed in missing]
    number = len(todo)
    left = Counter(place for place, _ in todo)
    failed = defaultdict[int, list[str]](list)
    running: dict[Any, Job] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                place, seed = todo.pop(0)
                pipe, theirs = FORKS.Pipe(duplex=False)
                args = (configs[place], seed, threads, theirs)
                process = FORKS.Process(target=_train_seed, args=args, name=f"seed {seed}")
                process.start()
                theirs.close()
                running[pipe] = Job(process, pipe, place, seed)
            for end in wait(list(running)):
                job = running[end]
                if text := os.read(job.pipe.fileno(), 1 << 16):
                    job.said = (job.said + text)[-4096:]
                    print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
                    continue
                job.process.join()  # it has closed its end of the pipe
                del running[end]
                if status := job.process.exitcode:
                    last = job.said.decode(errors="replace").strip().rpartition("\n")[2]
                    failed[job.place].append(
                        f"seed {job.seed} ended with status {status}: {last or 'without a word'}"
                    )
                if configs[job.place].progress:
                    print(
                        f"{number - len(todo) - len(running)} of {number} seeds ended",
                        file=sys.stderr,
                        flush=True,
                    )
                left[job.place] -= 1
                if not left[job.place]:
                    yield job.place, "; ".join(failed[job.place])
    finally:
        for job in running.values():
            job.process.terminate()
        for job in running.values():
            job.process.join()


def _train_seed(config: RunConfig, seed: int, threads: int, pipe: Connection) -> None:
    """The process of a seed; what it says goes to the first process."""
    os.setsid()  # Ctrl-C is for the first process, which ends the others by SIGTERM
    # Whole lines
    sys.stdout = sys.stderr = os.fdopen(pipe.fileno(), "w", buffering=1, closefd=False)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]  # there is one
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        train_seeds(make_fabric(config), config, [seed], Progress(config.epochs, config.progress))
    except (ValueError, OSError) as error:
        fail(error)
    except InterruptedRunError as stopped:
        sys.exit(128 + stopped.number)
