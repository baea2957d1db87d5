"""One fault at a time befalls a command that writes files: a number is a command and a moment.

``faults 0 320`` runs a range, ``faults 0 320 kill trains`` those of one fault and of training runs.
Without arguments each command meets each fault at least once. The command is killed at a moment of
its run or before one of its file operations, its disk is full or cannot be written, an operation
fails, its clock goes back, or it runs twice at once. Then the same command, with ``--resume`` for a
training run, has to give the files of a run that nothing befell: metrics, predictions and weights
to the bit. Else the command has to end by one line that names a file. What fails is a bug, of the
commands or of this file.

Each command is a fork of this process, which has imported everything. Linux only. A full disk and
a disk that is mounted read-only need the right to mount; without it, files may not grow, and the
mount is left out.
"""

from __future__ import annotations

import atexit
import csv
import ctypes
import errno
import gzip
import io
import json
import math
import mmap
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from experiments.study import measured, questions, routers
from experiments.train import checkpoint, jobs
from experiments.train.presets import DIGITS_GRAPH, PRESETS
from experiments.train.results import commit
from tests.helpers.made_images import write_images
from tests.helpers.molecule_data import write_table
from tools.trust.numbers import parse

LIMIT = 600.0
"""Seconds after which a command hangs."""
TRAIN = "experiments.train.command"
VIT = "--layers 2 --hidden 16 --epochs 2 --batch-size 200 --dropout 0.1"
TINY = "--patch 4 --dim 8 --vit-heads 2 --hidden 8 --layers 2 --batch-size 4 --augment standard"
IMAGES = f"images --data-root {{data}}/images --router token_choice {TINY} --epochs 3"
GRAPH = "digits-graph --router token_choice --hidden 8 --dropout 0.3 --noise True"
PARTS = "--sampling neighbor --conv sage --fanout 4 3 --batch-size 300 --evaluation sampled"


class Command(NamedTuple):
    """A command; ``{out}`` is where it writes, ``{data}`` where its inputs are."""

    module: str
    args: str
    again: str = ""
    """The option that continues what was cut off."""
    ranks: int = 1
    """Processes that ``torchrun`` would start."""
    reads: tuple[str, ...] = ()
    """Commands whose folders it reads, as ``{name}``."""

    @property
    def trains(self) -> bool:
        """It is a training run."""
        return self.module == TRAIN


def _train(args: str, ranks: int = 1) -> Command:
    return Command(TRAIN, f"{args} --no-progress --out {{out}}/run", "--resume", ranks)


COMMANDS: dict[str, Command] = {
    "digits": _train(f"digits --router token_choice {VIT} --noise True --seeds 0"),
    "digits-jobs": _train(f"digits --router expert_choice {VIT} --seeds 0 1 --jobs 2"),
    "images-workers": _train(f"{IMAGES} --epochs 2 --workers 2 --seeds 0"),
    "images-ranks": _train(f"{IMAGES} --devices 2 --seeds 0", ranks=2),
    "graph": _train(f"{GRAPH} --correct-and-smooth --epochs 8 --seeds 0 1"),
    "graph-jobs": _train("mosaic --router expert_choice --epochs 4 --seeds 0 1 --jobs 2"),
    "graph-compare": _train("mosaic --router token_choice --epochs 4 --seeds 0 --compare"),
    "graph-workers": _train(f"{GRAPH} {PARTS} --epochs 2 --workers 2 --seeds 0"),
    "graph-ranks": _train(f"{GRAPH} {PARTS} --epochs 3 --devices 2 --seeds 0", ranks=2),
    "sweep": Command(
        "experiments.sweep",
        "grid --preset digits-graph --routers random --experts 2 --ks 1 --seeds 0 --no-progress "
        "--runs {out}/runs --results {out}/results",
    ),
    "sweep-own": Command(
        "experiments.sweep",
        "routers --router tests/helpers/own_parts.py:FirstBits --columns digits-graph "
        "--no-progress --runs {out}/runs --results {out}/results",
    ),
    "benchmark": Command(
        "experiments.benchmark.__main__",
        "router --tokens 64 --repeats 1 --json {out}/router.json",
    ),
    "report": Command(
        "experiments.report", "{graph-workers}/run --out {out}", reads=("graph-workers",)
    ),
    "patches": Command(
        "experiments.patches",
        "{images-workers}/run --images {data}/images/test/a/0.png --out {out}",
        reads=("images-workers",),
    ),
    "tables": Command("experiments.tables", "--pages {out}/page.md"),
    "advise": Command("experiments.advise", "digits-graph --out {out}"),
    "convert": Command(
        "experiments.convert.__main__",
        "{data}/edges.npy --x {data}/x.npy --y {data}/y.npy --train {data}/train.npy "
        "--to {out}/stored",
    ),
    "molecules": Command("experiments.convert.__main__", "molecules {data}/HIV.csv --out {out}"),
    "planted": Command("experiments.planted", "ogbn-mag --nodes 400 --edges 900 --root {out}"),
}
ONE = ("kill", "operation", "full", "read-only", "error", "clock", "twice")
TRAINED = ("kill", "kill", "kill", "operation", "operation", *ONE[2:])
PAIRS = [
    (name, fault)
    for turn in range(len(TRAINED))
    for name, command in COMMANDS.items()
    for fault in (TRAINED if command.trains else ONE)[turn : turn + 1]
]
"""Command and fault of the first numbers; then they come again, at other moments."""
LATE = (
    *sorted({command.module for command in COMMANDS.values()}),
    *("experiments.show.report_page", "experiments.study.questions", "experiments.train.loop"),
    *("experiments.study.own_router", "gmoe.plot", "duckdb", "rdkit.Chem.Scaffolds.MurckoScaffold"),
    *("ogb.utils.features", "experiments.train.routing_stats", "pandas", "pydantic"),
    "fsspec.implementations.local",
)
"""What commands import when they need it."""
CLOCKS = {"seconds", "peak_memory", "environment", "wall", "cpu", "ratio", "memory", "step_seconds"}
"""Figures of time and place in files, which differ between runs."""


class Whole(NamedTuple):
    """What a command does that nothing befalls."""

    folder: Path
    seconds: float
    operations: int
    """File operations in its folder."""
    bytes: int
    content: dict[str, Any]


class Outcome(NamedTuple):
    """``resumed`` to the same files, ``told`` in one line and then done again to the same files,
    ``unmoved``, ``left out`` or ``failed``."""

    kind: str
    message: str = ""


# What is in a folder


def content(folder: Path) -> dict[str, Any]:
    """By path what the files of a folder say, times and temporary files aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not is_temporary(name):
            found[name] = read(path)
    return found


def is_temporary(name: str) -> bool:
    """A lock, or what is about to become a file."""
    return bool(re.search(r"\.new($|/)|(^|/)(lock|[\w-]+\.lock)$", name))


def read(path: Path) -> Any:
    """The content of a file, which has to be whole."""
    if path.suffix == ".json":
        return without_clocks(json.loads(path.read_bytes()))
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text())))
        timed = {place for place, name in enumerate(rows[0]) if name in CLOCKS} if rows else set()
        return [[cell for place, cell in enumerate(row) if place not in timed] for row in rows]
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".ckpt":
        return without_clocks(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: without_clocks(file.get_tensor(name)) for name in sorted(file.keys())}
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image).tobytes()
    if path.suffix == ".html":
        assert path.read_text().endswith("</html>\n"), f"{path} is not whole"
    if path.suffix == ".svg":  # its names are drawn, and it says when it was drawn
        assert path.read_text().endswith("</svg>\n"), f"{path} is not whole"
        return "svg"
    return path.read_bytes()


def without_clocks(value: Any) -> Any:
    """Plain values, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: without_clocks(of) for key, of in value.items() if key not in CLOCKS}
    if isinstance(value, list | tuple):
        return [without_clocks(of) for of in value]
    return value


def difference(found: dict[str, Any], whole: dict[str, Any]) -> str:
    """The files that differ; empty if none does."""
    names = sorted(
        {name for name in {*found, *whole} if found.get(name, "none") != whole.get(name, "none")}
    )
    return ", ".join(
        f"{name} is {'missing' if name not in found else 'new' if name not in whole else 'other'}"
        for name in names
    )


def unreadable(folder: Path) -> str:
    """The first file under its final name that is not whole; logs may lack their end."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not is_temporary(name) and path.suffix != ".csv":
            try:
                read(path)
            except Exception as error:
                return f"{name} is half written ({type(error).__name__}: {error})"
    return ""


# Processes


libc = ctypes.CDLL(None, use_errno=True)
SUBREAPER, NEW_MOUNTS, READ_ONLY, REMOUNT, PRIVATE = 36, 0x20000, 1, 32, 0x44000


def has_own_mounts() -> bool:
    """Whether this process may mount, and nobody else sees it."""
    return libc.unshare(NEW_MOUNTS) == 0 and libc.mount(b"none", b"/", None, PRIVATE, None) == 0


def mount(folder: Path, options: str, flags: int = 0) -> None:
    """Mount memory at a folder, or mount it anew."""
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")


def descendants() -> list[int]:
    """All processes below this one, which adopts those whose parent has ended."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def end_all() -> None:
    """SIGKILL for every process below this one, until there is none."""
    while found := descendants():
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap()


def reap() -> dict[int, int]:
    """The exit codes of children that have ended."""
    ended = dict[int, int]()
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not process:
            return ended
        ended[process] = os.waitstatus_to_exitcode(status)


@dataclass
class Blow:
    """What befalls a command inside its processes, and when."""

    fault: str = ""
    pace: float = 60.0
    """Seconds between two checkpoints."""
    at: int = 0
    """The file operation."""
    code: int = errno.ENOSPC
    lasts: bool = False
    """Later operations fail, too."""
    count: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 16))
    """In all processes of the command: operations so far, and whether all are to be killed."""

    def number(self, place: int = 0) -> int:
        """A number that all processes share."""
        return int.from_bytes(self.count[8 * place : 8 * place + 8], "little")

    def store(self, value: int, place: int = 0) -> None:
        """Set such a number."""
        self.count[8 * place : 8 * place + 8] = value.to_bytes(8, "little")

    def arm(self, out: Path) -> None:
        """Count the file operations in a folder, and strike at one."""
        checkpoint.SECONDS = self.pace
        if self.fault == "clock":
            begin, calls = time.time(), iter(range(1 << 62))
            time.time = lambda: begin - 3600.0 * next(calls)
        if self.fault == "full" and self.at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, resource.RLIM_INFINITY))
        sys.addaudithook(lambda event, args: self.see(str(out), event, args))

    def see(self, out: str, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook."""
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if event == "open":
            changes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not changes or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(args[0])
        if not path.startswith(out):
            return
        self.store(now := self.number() + 1)
        if self.fault == "operation" and now == self.at:
            self.store(1, place=1)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "error" and (now == self.at or (self.lasts and now > self.at)):
            raise OSError(self.code, os.strerror(self.code), path)


def start(command: Command, out: Path, log: Path, blow: Blow, again: bool = False) -> list[int]:
    """Fork the processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {name: whole_of(name).folder / "out" for name in command.reads}
    args = [
        word.format(out=out, data=inputs(), **places)
        for word in f"{command.args} {command.again if again else ''}".split()
    ]
    processes = []
    for rank in range(command.ranks):
        if process := os.fork():
            processes.append(process)
            continue
        if command.ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
            names |= {"WORLD_SIZE": command.ranks, "LOCAL_WORLD_SIZE": command.ranks}
            names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "faults"}
            os.environ.update({name: str(value) for name, value in names.items()})
        be(command.module, args, out, log, blow)
    return processes


def be(module: str, args: list[str], out: Path, log: Path, blow: Blow) -> None:
    """Become the process of a command, and end."""
    status = 70
    try:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        blow.arm(out)
        import_module(module).main(args)
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as of a process that ends: of loaders, and of groups
        os._exit(status)


def wait(processes: list[int], seconds: float, blow: Blow | None = None) -> list[int] | None:
    """The exit codes, or None where time is over or the blow asks to kill all."""
    end, codes = time.monotonic() + seconds, dict[int, int]()
    while time.monotonic() < end and not (blow and blow.number(place=1)):
        codes |= reap()
        if all(process in codes for process in processes):
            return [codes[process] for process in processes]
        time.sleep(0.003)
    return None


def apart(task: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process of its own, which adopts orphans."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def call() -> None:
        libc.prctl(SUBREAPER, 1)
        shrink_studies()
        # Its server would import everything again
        jobs.FORKS = context  # type: ignore[assignment]
        try:
            theirs.send(task(*args))
        except BaseException:
            theirs.send(Outcome("failed", traceback.format_exc()))
        finally:
            end_all()

    process = context.Process(target=call)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


# What a command does undisturbed


@cache
def scratch() -> Path:
    """A folder that goes when this process ends."""
    folder, owner = Path(tempfile.mkdtemp(prefix="faults-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # forks end, too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def inputs() -> Path:
    """The data that commands read."""
    folder, draw = scratch() / "data", np.random.default_rng(0)
    folder.mkdir()
    write_images(folder / "images")
    write_table(folder / "HIV.csv")
    np.save(folder / "edges.npy", draw.integers(0, 50, (2, 4_000)))
    np.save(folder / "x.npy", draw.standard_normal((50, 400), np.float32))
    np.save(folder / "y.npy", draw.integers(0, 3, 50))
    np.save(folder / "train.npy", np.arange(30))
    return folder


def shrink_studies() -> None:
    """Make studies those of few epochs, in this process."""
    small = replace(DIGITS_GRAPH, epochs=2, hidden=8, seeds=(0, 1))
    PRESETS["digits-graph"] = ("", small)
    routers.TABLE = replace(routers.TABLE, columns={"digits-graph": small})
    measured.step_times = lambda *_: {}
    told = questions.Answer("rules", None, "a line", ["a figure"], {}, torch.arange(500) % 3)
    setattr(questions.Survey, "answer", lambda _: told)  # noqa: B010 (mypy)


def prepare(name: str, out: Path) -> None:
    """What is in a folder before its command writes there."""
    out.mkdir(parents=True, exist_ok=True)
    if name == "tables":
        marks = "<!-- presets: presets -->\n<!-- end -->\n"
        (out / "page.md").write_text(f"Written by hand.\n\n{marks}")


@cache
def whole_of(name: str) -> Whole:
    """Run a command in peace."""
    for other in COMMANDS[name].reads:
        whole_of(other)
    inputs()
    found: Whole | Outcome = apart(_run_whole, name, scratch() / f"whole-{name}")
    if isinstance(found, Outcome):
        raise RuntimeError(f"{name}: {found.message}")
    return found


def _run_whole(name: str, folder: Path) -> Whole | Outcome:
    out, log, blow = folder / "out", folder / "log", Blow()
    prepare(name, out)
    begin = time.monotonic()
    codes = wait(start(COMMANDS[name], out, log, blow), LIMIT)
    seconds = time.monotonic() - begin
    if codes is None or any(codes):
        return Outcome("failed", f"ended with {codes}: {log.read_text()}")
    size = sum(4096 * math.ceil(path.stat().st_size / 4096) for path in out.rglob("*"))
    return Whole(folder, seconds, blow.number(), size, content(out))


# Faults


def draw(number: int) -> tuple[str, str, Random]:
    """Command, fault, and what draws the moment."""
    name, fault = PAIRS[number % len(PAIRS)]
    return name, fault, Random(number)


def run(number: int) -> Outcome:
    """The outcome of a number."""
    name, fault, random = draw(number)
    whole = whole_of(name)
    folder = scratch() / f"number-{number}"
    try:
        found: Outcome = apart(strike, name, fault, random, whole, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def strike(name: str, fault: str, random: Random, whole: Whole, folder: Path) -> Outcome:
    """Let one fault befall a command, look at what is there, and run the command again."""
    command, out, log = COMMANDS[name], folder / "out", folder / "log"
    out.mkdir(parents=True)
    blow = Blow(fault, pace=random.choice((0.0, 0.2, 60.0)))
    has_mount = fault in ("full", "read-only") and has_own_mounts()
    room = random.randrange(4096, max(whole.bytes, 8192))
    if has_mount:
        mount(out, f"size={room}" if fault == "full" else "")
    elif fault == "full":
        blow.at = random.randrange(1, 20_000)
    elif fault == "read-only":
        return Outcome("left out", "no right to mount")
    try:
        prepare(name, out)
        if fault == "read-only":
            mount(out, "", REMOUNT | READ_ONLY)
        codes = befall(command, random, whole, blow, out, log)
    finally:
        if has_mount:
            mount(out, f"size={10 * whole.bytes + (1 << 24)}", REMOUNT)
    said = log.read_text() if log.exists() else ""
    if wrong := unreadable(out):
        return Outcome("failed", f"{wrong}; it said: {said}")
    found = content(out)
    if codes is not None and (wrong := untold(codes, said, out, found, whole.content)):
        return Outcome("failed", f"{wrong}; it said: {said}")
    if difference(found, whole.content):
        log.unlink(missing_ok=True)
        ended = wait(start(command, out, log, Blow(), again=True), LIMIT)
        if ended is None or any(ended):
            why = log.read_text()
            return Outcome("failed", f"the second run ended with {ended}: {why}; after: {said}")
        if wrong := difference(content(out), whole.content):
            return Outcome("failed", f"after the second run {wrong}; it said: {said}")
    elif codes is not None and not any(codes):
        return Outcome("unmoved")
    return Outcome("told" if codes is not None and any(codes) else "resumed", last_line(said))


def befall(
    command: Command, random: Random, whole: Whole, blow: Blow, out: Path, log: Path
) -> list[int] | None:
    """The exit codes of a command that something befalls, or None where it was killed."""
    moment = random.random() * whole.seconds
    if blow.fault in ("operation", "error"):
        blow.at = random.randint(1, max(whole.operations, 1))
        blow.code = random.choice((errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES))
        blow.lasts = random.random() < 0.5
    processes = start(command, out, log, blow)
    if blow.fault == "twice":
        time.sleep(moment)
        processes += start(command, out, log, blow, again=True)
    if blow.fault == "kill":
        codes = wait(processes, moment)
        if codes is None and random.random() < 0.3:  # one of them: the others notice
            os.kill(random.choice(processes), signal.SIGKILL)
            wait(processes, LIMIT)
            wait_for_the_rest()
        end_all()
        return codes
    codes = wait(processes, 2 * LIMIT, blow)
    is_killed = bool(blow.number(place=1))
    if codes is None and not is_killed:
        raise TimeoutError(f"hangs: {log.read_text()}")
    end_all()
    return None if is_killed else codes


def wait_for_the_rest() -> None:
    """Until the processes that lost another have ended by themselves."""
    end = time.monotonic() + LIMIT
    while descendants() and time.monotonic() < end:
        reap()
        time.sleep(0.01)
    if found := descendants():
        raise TimeoutError(f"{len(found)} processes go on without the one that was killed")


def untold(codes: list[int], said: str, out: Path, found: Any, whole: Any) -> str:
    """What is wrong with the end of a command; empty if nothing is."""
    if "Traceback" in said:
        return "a traceback"
    if not any(codes):
        return difference(found, whole)
    if any(code not in (0, 1, 2) for code in codes):
        return f"ended with {codes}"
    tells = re.compile(rf".*{re.escape(str(out))}")
    why = re.compile(r"\b(error|Errno|cannot be|being)\b")
    if not any(tells.match(line) and why.search(line) for line in said.splitlines()):
        return "no line names a file"
    return ""


def last_line(said: str) -> str:
    """The end of what a command said."""
    return next(iter(reversed(said.strip().splitlines())), "")


def main(arguments: Sequence[str]) -> int:
    """Run a number, or a range, and count; 1 if some number failed."""
    torch.set_num_threads(1)
    names = (*COMMANDS, *ONE, "trains", "writes")
    given = parse("faults", __doc__, len(PAIRS), names, arguments)
    for module in LATE:
        import_module(module)
    # Read now: a git that is killed in a command would leave this checkout locked.
    commit()
    counts = Counter[tuple[str, str]]()
    failed = list[int]()
    begin = time.monotonic()
    for number in given.numbers:
        name, fault, _ = draw(number)
        if not {*given.only} <= {name, fault, "trains" if COMMANDS[name].trains else "writes"}:
            continue
        found = run(number)
        counts[fault, found.kind] += 1
        if found.kind == "failed":
            failed.append(number)
        if found.kind == "failed" or given.is_alone:
            print(f"{number} {name} {fault}: {found.kind}: {found.message}", flush=True)
    for (fault, kind), count in sorted(counts.items()):
        print(f"{fault:12} {kind:10} {count}")
    if not counts:
        raise SystemExit("faults: no number has all these names")
    minutes = (time.monotonic() - begin) / 60
    print(f"{sum(counts.values())} faults in {minutes:.0f} min; failed: {failed or 'none'}")
    return int(bool(failed))
