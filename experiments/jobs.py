"""Seeds of many runs side by side: each in a process of its own, or over several machines as tasks of Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from experiments.build import make_fabric
from experiments.config import InterruptedRunError, RunConfig
from experiments.data import load_tasks
from experiments.loop import Progress, train_seeds
from experiments.run_folder import so_far

SECONDS = 1.0
"""Between two looks at how far they are."""


class Workers(ABC):
    """Who trains seeds, several at once."""

    @abstractmethod
    def start(self, config: RunConfig, seed: int) -> Any:
        """Begin with a seed; a job, which the other methods take."""

    @abstractmethod
    def ended(self, jobs: Sequence[Any], seconds: float) -> list[Any]:
        """Those of the jobs that have ended, after so many seconds at most if none has."""

    @abstractmethod
    def why(self, job: Any) -> str:
        """Why an ended job failed, or "" if it did not."""

    @abstractmethod
    def stop(self, jobs: Sequence[Any]) -> None:
        """End jobs, which save what was trained."""


def train_apart(
    configs: Sequence[RunConfig], jobs: int, workers: Workers, shown: bool
) -> Generator[tuple[int, str | None], None, None]:
    """Train the seeds that runs lack, so many at once.

    What they give does not depend on how many there are at once. Closing the iterator ends those that are under way,
    which save what was trained.

    Args:
        configs: the runs.
        jobs: so many.
        workers: which train them.
        shown: whether to report progress.

    Returns:
        an iterator over (place in ``configs``, why it failed, else ``None``), each as soon as its last seed is done.
    """
    todo: list[tuple[int, int]] = []
    failed: dict[int, str] = {}
    known: set[Any] = set()
    running: dict[Any, tuple[int, int]] = {}
    try:
        for place, config in enumerate(configs):
            try:
                summary, results = so_far(config)
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
        while todo or running:
            while todo and len(running) < jobs:
                place, seed = todo.pop(0)
                running[workers.start(configs[place], seed)] = (place, seed)
            for job in workers.ended(list(running), SECONDS):
                place, seed = running.pop(job)
                done += configs[place].epochs
                why = workers.why(job)
                result = configs[place].folder() / f"seed-{seed}" / "result.json"
                if not why and not result.exists():
                    why = f"{result} is not there; all machines need the same folders"
                if why:
                    failed.setdefault(place, f"seed {seed}: {why}")
                left[place] -= 1
                if not left[place]:
                    yield place, failed.get(place)
            if running:
                now = done + sum(_epochs(configs[place], seed) for place, seed in running.values())
                names = ", ".join(f"{configs[place].folder().name} seed {seed}" for place, seed in running.values())
                where = f"{number - len(todo) - len(running)} of {number} seeds done", now
                if where != last:
                    progress.show(*where, epochs, names)
                    last = where
        progress.finish(epochs)
    finally:
        workers.stop(list(running))


def _epochs(config: RunConfig, seed: int) -> int:
    """How many of a seed are done."""
    log = config.folder() / f"seed-{seed}" / "metrics.csv"
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


def train_here(config: RunConfig, seed: int, threads: int) -> str:
    """Train a seed in this process; why it failed, or "" if it did not."""
    torch.set_num_threads(threads)
    try:
        with redirect_stdout(None):
            train_seeds(make_fabric(config), config, [seed], Progress(config.epochs, shown=False))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


class Processes(Workers):
    """Processes of this machine.

    Args:
        threads: CPU threads of each.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["experiments.loop"])  # a process then begins in no time
        self.reasons: dict[Any, Connection] = {}

    def start(self, config: RunConfig, seed: int) -> Any:
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_job, args=(config, seed, self.threads, send))
        process.start()
        send.close()
        self.reasons[process] = receive
        return process

    def ended(self, jobs: Sequence[Any], seconds: float) -> list[Any]:
        wait([process.sentinel for process in jobs], timeout=seconds)
        return [process for process in jobs if not process.is_alive()]

    def why(self, job: Any) -> str:
        with self.reasons.pop(job) as reason:
            try:
                said: str = reason.recv()
            except EOFError:  # it ended without a word
                return f"its process ended with status {job.exitcode}"
        return said

    def stop(self, jobs: Sequence[Any]) -> None:
        for process in jobs:
            process.terminate()
        for process in jobs:
            process.join()


def _job(config: RunConfig, seed: int, threads: int, reason: Connection) -> None:
    os.setsid()  # Ctrl-C is for the first process, which ends the others by SIGTERM

    def stop(number: int, _: FrameType | None) -> None:
        raise InterruptedRunError(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        reason.send(train_here(config, seed, threads))
    except InterruptedRunError as stopped:
        sys.exit(128 + stopped.number)


class RayTasks(Workers):
    """Tasks of `Ray <https://docs.ray.io>`_, over the machines of a cluster, which have the same folders.

    Args:
        address: of the cluster, ``"auto"`` for the one of this machine, or ``"local"``, which starts one.
        threads: CPU threads of each task, which it reserves, with a GPU where the cluster has any.

    Raises:
        ValueError: Ray is not installed, there is no such cluster, or no machine of it has as many CPUs.
    """

    def __init__(self, address: str, threads: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(f"ray: got {address!r} without Ray, expected pip install 'gmoe[ray]'") from error
        self.ray: Any = ray
        self.threads = threads
        root = str(Path(__file__).parents[1])
        env = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        ours = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": env})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"ray: got {address!r}, expected a cluster that is there ({error})") from error
        signal.signal(signal.SIGTERM, ours)  # Ray's own would end this process before the tasks have saved
        largest = max(int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"])
        if threads > largest:
            self.ray.shutdown()
            raise ValueError(f"threads: got {threads}, expected at most {largest}, the CPUs of the largest machine")
        self.has_gpus = bool(self.ray.cluster_resources().get("GPU"))
        self.task = self.ray.remote(num_cpus=threads)(train_here)

    def start(self, config: RunConfig, seed: int) -> Any:
        own = replace(config, out=config.folder().absolute(), data_root=config.data_root.absolute())
        on_gpu = self.has_gpus and config.device not in ("cpu", "mps")
        return self.task.options(num_gpus=int(on_gpu)).remote(own, seed, self.threads)

    def ended(self, jobs: Sequence[Any], seconds: float) -> list[Any]:
        try:
            found: list[Any] = self.ray.wait(jobs, timeout=seconds)[0]
        except SystemError as error:  # so Ray passes on what a signal's handler raises
            raise error.__cause__ or error from None
        return found

    def why(self, job: Any) -> str:
        try:
            reason: str = self.ray.get(job)
        except self.ray.exceptions.RayError as error:
            return f"its task failed: {str(error).strip().splitlines()[-1]}"
        return reason

    def stop(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            self.ray.cancel(job)
        if jobs:
            self.ray.wait(jobs, num_returns=len(jobs))
        self.ray.shutdown()
