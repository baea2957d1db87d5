"""Broken files are read, or refused in one clear line.

A number is one damaged input: its kind of file, which of its files, and what was done to it
(:mod:`tools.trust.damage`) follow from ``random.Random(number)``. A number alone shows that input,
and keeps its folder. Whole files are made once, by the code under test
(:mod:`tools.trust.file_kinds`).

An input passes if it is read and can be used, or if it ends in one error of a declared class that
names the file, within ``SECONDS`` of the processor and ``MEMORY``; nothing may be written outside
its folder, and no code run. Inputs are read in forked children, so that a crash is a finding too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from tools.trust.damage import Around, damage
from tools.trust.file_kinds import KINDS, Kind
from tools.trust.numbers import parse

EVERY = 10_000
"""Numbers of a run without arguments; half an hour of one core."""
SECONDS = 5
"""Of the processor, for one input."""
WAIT = 60
"""Seconds by the clock, after which an input hangs: other programs may run beside it."""
MEMORY = 2**30
"""Bytes that reading may take beyond what the process has."""
LARGEST = 2**26
"""Bytes of a file that reading may write."""
BATCH = 200
"""Inputs that a child reads."""
LONGEST = 2_000
"""Characters of an error."""
TAKEN = ("MemoryError", "allocate", "bad_alloc", "Out of Memory", "File too large")
"""What an error says where memory or disk was asked for."""


class Outcome(NamedTuple):
    """What became of an input."""

    kind: str
    """``"read"``, ``"refused"`` or ``"failed"``."""
    message: str = ""
    seconds: float = SECONDS
    """Of the processor."""
    cause: str = ""
    """The class of the error behind a refusal."""


class Case(NamedTuple):
    """What a number draws."""

    name: str
    kind: Kind
    random: random.Random


def draw(number: int, kinds: Collection[str] = tuple(KINDS)) -> Case:
    """The kind of file that a number draws, and what it draws from then on."""
    drawn = random.Random(number)
    weights = [kind.weight for kind in KINDS.values()]
    while (name := drawn.choices(list(KINDS), weights)[0]) not in kinds:
        pass
    return Case(name, KINDS[name], drawn)


@dataclass(frozen=True)
class Workshop:
    """A folder with whole files, the input that is read, and a folder that nothing may write to."""

    base: Path

    def __post_init__(self) -> None:
        for name in ("whole", "outside", "temporary", "working"):
            (self.base / name).mkdir()
        (self.base / "outside" / "file").write_text("1,2\n3,4\n")

    @property
    def input(self) -> Path:
        """The folder of the input."""
        return self.base / "input"

    def whole(self, name: str) -> Path:
        """The whole files of a kind, made where they are not there yet."""
        folder = self.base / "whole" / name.replace(" ", "_").replace("'", "")
        if not folder.exists():
            torch.manual_seed(0)
            folder.mkdir()
            with quiet(self.base / "said"):
                KINDS[name].write(folder)
        return folder

    @cached_property
    def around(self) -> Around:
        """Files of other kinds, and where nothing may be written."""
        files = [
            path
            for path in sorted((self.base / "whole").rglob("*"))
            if path.is_file() and 0 < path.stat().st_size < 100_000
        ]
        by_suffix = {path.suffix: path.read_bytes() for path in files}
        return Around(self.base / "outside", tuple(by_suffix.values()))

    def damaged(self, case: Case) -> tuple[Path, str]:
        """Make the input; returns which file is damaged, and how."""
        shutil.rmtree(self.input, ignore_errors=True)
        shutil.copytree(self.whole(case.name), self.input)
        files = sorted(path for path in self.input.glob(case.kind.files) if path.is_file())
        path = case.random.choice(files)
        return path.relative_to(self.input), damage(case.random, path, self.around)

    def written(self) -> list[tuple[str, int]]:
        """What lies outside the input, with its times."""
        places = [self.base, *(self.base / name for name in ("outside", "temporary", "working"))]
        skipped = ("input", "said", "outside", "temporary", "working")
        return sorted(
            (entry.path, entry.stat(follow_symlinks=False).st_mtime_ns)
            for place in places
            for entry in os.scandir(place)
            if place != self.base or entry.name not in skipped
        )

    def read(self, case: Case, path: Path) -> Outcome:
        """Read the input, whose file ``path`` is damaged, and judge what comes of it."""
        before = self.written()
        try:
            with quiet(self.base / "said"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.kind.read(self.input)
            found = Outcome("read")
        except (Exception, SystemExit) as error:
            found = self.judged(error, path)
        if new := {path for path, _ in set(self.written()) ^ set(before)}:
            self.tidy()
            return Outcome("failed", f"wrote {', '.join(sorted(new))}; then {found.message}")
        return found

    def tidy(self) -> None:
        """Remove what was written."""
        for name in ("outside", "temporary", "working"):
            shutil.rmtree(self.base / name)
            (self.base / name).mkdir()
        (self.base / "outside" / "file").write_text("1,2\n3,4\n")

    def judged(self, error: BaseException, path: Path) -> Outcome:
        """An error is a refusal if it is of a declared class, in one line, and names the file.

        The option ``--x`` with which ``x.npy`` was given is as good a name.
        """
        text = str(error)
        if isinstance(error, SystemExit):
            lines = (self.base / "said").read_text(errors="replace").splitlines()
            text = lines[-1] if lines else ""
            declared = error.code in (1, 2) and text.startswith("error: ")
        else:
            declared = isinstance(error, ValueError | OSError) and not is_internal(error)
        chain = [repr(one)[:10_000] for one in causes(error)]
        taken = [word for word in TAKEN if any(word in one for one in chain)]
        wrong = {
            "undeclared": not declared,
            f"asked for more than there is ({', '.join(taken)})": bool(taken),
            "names no file": str(self.input) not in text and f"{path.stem}: " not in text,
            "several lines": "\n" in text.strip(),
            f"{len(text)} characters": len(text) > LONGEST,
        }
        if reasons := [reason for reason, is_so in wrong.items() if is_so]:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            said = f"{type(error).__name__}: {text[:300]!r} ({where})"
            return Outcome("failed", f"{', '.join(reasons)}: {said}")
        return Outcome("refused", text, cause=type(error.__cause__ or error).__name__)


def is_internal(error: BaseException) -> bool:
    """A subclass of ValueError that a library raises where nobody has looked at the input."""
    return isinstance(error, UnicodeError | json.JSONDecodeError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def quiet(path: Path) -> Iterator[None]:
    """What is printed goes to a file: that of Python, wherever it goes now, and of libraries in C.

    Under pytest, ``sys.stderr`` is not where the second descriptor leads.
    """
    kept = os.dup(1), os.dup(2)
    with path.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            file.flush()
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)


# Children ----------------------------------------------------------------------------------------


def bound() -> None:
    """Bound memory and files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def child(shop: Workshop, numbers: Iterable[int], kinds: Collection[str], pipe: int) -> None:
    """Read some inputs of one kind; before each, and after, a line in the pipe."""

    def say(*values: object) -> None:
        os.write(pipe, (json.dumps(values) + "\n").encode())

    tempfile.tempdir = str(shop.base / "temporary")
    os.chdir(shop.base / "working")
    is_ready = False
    for number in numbers:
        case = draw(number, kinds)
        if not is_ready:  # once the whole files, which imports what reading takes
            shutil.rmtree(shop.input, ignore_errors=True)
            shutil.copytree(shop.whole(case.name), shop.input)
            say(-1, "whole files")
            whole = shop.read(case, Path())
            assert whole.kind == "read", f"{case.name}, whole: {whole.message}"
            bound()
            is_ready = True
        path, how = shop.damaged(case)
        say(number, what := f"{path}, {how}")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        begin = time.process_time()
        found = shop.read(case, path)
        seconds = time.process_time() - begin
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(number, what, *found._replace(seconds=seconds))


DEATHS = {
    signal.SIGPROF: f"took more than {SECONDS} s of the processor",
    signal.SIGALRM: f"took more than {WAIT} s",
    signal.SIGKILL: "was killed, for memory?",
}


def outcomes(
    shop: Workshop, numbers: list[int], kinds: Collection[str]
) -> Iterator[tuple[int, str, Outcome]]:
    """What becomes of inputs of one kind, whatever becomes of the children."""
    left = list(numbers)
    while left:
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(reader)
                child(shop, left[:BATCH], kinds, writer)
                status = 0
            except BaseException:  # tested code may raise anything; the parent reads the status
                traceback.print_exc()
            os._exit(status)
        os.close(writer)
        begun = None
        try:
            with os.fdopen(reader) as lines:
                for line in lines:
                    number, what, *found = json.loads(line)
                    begun = None if found else (number, what)
                    if found:
                        left.remove(number)
                        yield number, what, Outcome(*found)
        except GeneratorExit:  # nobody wants to know of the others
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(pid, 0)
        if status and (begun is None or begun[0] < 0 or not os.WIFSIGNALED(status)):
            raise RuntimeError(f"a child ended with status {status} at {begun}")
        if begun is not None:
            number, what = begun
            name = signal.Signals(os.WTERMSIG(status))
            left.remove(number)
            yield number, what, Outcome("failed", DEATHS.get(name, f"died of {name.name}"))


def run(
    numbers: Iterable[int], kinds: Collection[str] = tuple(KINDS), keep: bool = False
) -> Iterator[tuple[int, str, str, Outcome]]:
    """Each number with its kind, what is damaged, and what became of it, kind by kind."""
    by_kind = defaultdict[str, list[int]](list)
    for number in numbers:
        by_kind[draw(number, kinds).name].append(number)
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        shop = Workshop(base)
        for name in kinds:
            shop.whole(name)
        for name in kinds:
            for number, what, found in outcomes(shop, by_kind[name], kinds):
                yield number, name, what, found
    finally:
        if not keep:
            shutil.rmtree(base)


def main(arguments: Sequence[str]) -> int:
    """Print a number, or a range's progress and summary; 1 if some input failed."""
    torch.set_num_threads(1)
    given = parse("fuzz", __doc__, EVERY, KINDS, arguments)
    begin = time.perf_counter()
    failures = list[int]()
    counts = defaultdict[str, Counter[str]](Counter)
    times = defaultdict[str, float](float)
    behind = Counter[str]()
    kinds = given.only or tuple(KINDS)
    for number, name, what, found in run(given.numbers, kinds, keep=given.is_alone):
        counts[name][found.kind] += 1
        times[name] += found.seconds
        behind[found.cause] += found.kind == "refused"
        if found.kind == "failed" or given.is_alone:
            print(f"{number} {name}: {what}: {found.kind} {found.message}", flush=True)
        failures += [number] if found.kind == "failed" else []
    for name, count in sorted(counts.items()):
        line = [f"{kind} {count[kind]:5}" for kind in ("read", "refused", "failed")]
        print(f"{name:22}", *line, f"{1000 * times[name] / count.total():5.0f} ms each")
    print("behind refusals:", ", ".join(f"{name} {n}" for name, n in behind.most_common() if n))
    seconds = time.perf_counter() - begin
    print(f"{len(given.numbers)} inputs, {seconds:.0f} s; failed: {failures or 'none'}")
    return int(bool(failures))
