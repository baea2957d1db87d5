"""Running mutants against the tests that reach them.

This process collects the tests once, and forks. The child swaps the code objects of the functions
that the mutant changes, and runs the tests that reach its statement, those of the mirrored file
first, then the quickest. A statement that an import or the collection has run already is changed in
a child that has imported nothing of gmoe yet, and loads the mutant. The source tree is never
written.
"""

from __future__ import annotations

import ast
import gc
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import accumulate, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from tools.trust.mutants.drawing import MODULES, Mutant, sources
from tools.trust.mutants.record import environment, pending
from tools.trust.page import ROOT

if TYPE_CHECKING:
    from coverage import Coverage

KEPT = ROOT / "build" / "mutants-measured.pickle"

TESTS = (
    "tests/gmoe",
    "tests/vision",
    "tests/test_compile.py",
    "tests/test_compose.py",
    "tests/test_contract.py",
    "tests/test_export.py",
    "tests/test_loss_curves.py",
    "tests/test_saved_models.py",
    "tests/test_stateful.py",
    "tests/test_support.py",
    "tests/test_training_loops.py",
)
"""What may notice: the default tests of the library, without those of commands and pages."""

OPTIONS = (
    *("-o", "addopts=", "-m", "not slow", "-q", "-s"),
    *("--import-mode=importlib", "-p", "no:cacheprovider"),
    "--ignore=tests/gmoe/test_distributed.py",
)
"""Those of pyproject.toml are replaced: no workers, and no processes that would run without the
mutant."""

OTHER_SECONDS = 8.0
"""How long the tests beside the mirrored file may take for one mutant, as measured without it."""


class Outcome(NamedTuple):
    """``killed``, ``crashed``, ``timeout``, ``survived`` or ``gone``; and the test that saw it.

    ``error`` is one of this tool, with its text; it counts as a survivor.
    """

    outcome: str
    test: str | None = None


def codes(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def changed(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Pairs of code objects that differ, from the outside in."""
    if old == new:
        return
    yield old, new
    if len(codes(old)) == len(codes(new)):
        for pair in zip(codes(old), codes(new), strict=True):
            yield from changed(*pair)


def functions() -> list[FunctionType]:
    """Those of the modules, wherever they are held."""
    gc.unfreeze()  # tests/conftest.py freezes what was collected, which gc then no longer lists
    paths = {str(ROOT / file) for file in MODULES}
    found = (thing for thing in gc.get_objects() if isinstance(thing, FunctionType))
    return [function for function in found if function.__code__.co_filename in paths]


def swap(held: Iterable[FunctionType], path: Path, mutated: str) -> None:
    """Give the functions of an imported module their mutated code; an error if none has it."""
    old = compile(path.read_text(), str(path), "exec", dont_inherit=True)
    fresh = dict(changed(old, compile(mutated, str(path), "exec", dont_inherit=True)))
    found = [function for function in held if function.__code__ in fresh]
    for function in found:
        function.__code__ = fresh[function.__code__]
    if not found:
        raise ValueError(f"{path}: no function has the code of the mutant")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


class Mutated(SourceFileLoader):
    """Loads one module from another source; a finder of itself."""

    def __init__(self, path: Path, source: str) -> None:
        super().__init__(module_of(path), str(path))
        self.source = source

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Measured(NamedTuple):
    """What a test does without a mutant."""

    seconds: float
    lines: dict[str, frozenset[int]]


class FailedError(Exception):
    """The test that failed."""


def run_items(items: Sequence[pytest.Item]) -> None:
    """Run the tests until one fails."""
    for item, following in zip_longest(items, items[1:]):
        torch.manual_seed(0)
        random.seed(0)
        failed = []
        plugin = type("Plugin", (), {})()
        plugin.pytest_runtest_logreport = lambda report: failed.append(report.failed)  # noqa: B023
        item.config.pluginmanager.register(plugin)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item.config.pluginmanager.unregister(plugin)
        if any(failed):
            raise FailedError(item.nodeid)


def coverage_of_modules() -> Coverage:
    from coverage import Coverage

    include = [str(ROOT / file) for file in MODULES]
    return Coverage(data_file=None, config_file=False, include=include)


def measure(items: Sequence[pytest.Item]) -> dict[str, Measured]:
    """Time every test, and record the lines that it reaches."""
    coverage = coverage_of_modules()
    seconds = {}
    coverage.start()
    for item in items:
        coverage.switch_context(item.nodeid)
        start = time.process_time()
        run_items([item])
        seconds[item.nodeid] = time.process_time() - start
    coverage.stop()
    lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in MODULES:
        for line, tests in coverage.get_data().contexts_by_lineno(str(ROOT / file)).items():
            for test in tests:
                lines[test][file].add(line)
    return {
        test: Measured(spent, {file: frozenset(found) for file, found in lines[test].items()})
        for test, spent in seconds.items()
    }


def measured_before() -> dict[str, Measured]:
    """What an earlier run has measured, if the modules are still the same."""
    if not KEPT.exists():
        return {}
    then, measured = pickle.loads(KEPT.read_bytes())
    return measured if then == sources() else {}


def mirrored(file: str) -> str:
    """The test file of a module; of a package, that of what it builds."""
    path = Path("tests") / file
    name = path.name.replace("__init__", "build").removeprefix("_")
    return str(path.with_name(f"test_{name}"))


def reach(source: str, line: int) -> tuple[range, bool]:
    """The lines of the statement that holds a line, and whether only calls run them."""
    lines, in_body = range(line, line + 1), False
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    # From the outside in: the last that holds the line is the innermost one.
    for node in statements:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if not first <= line <= (node.end_lineno or node.lineno):
            continue
        body = getattr(node, "body", None)
        if body and line < body[0].lineno:
            lines = range(first, body[0].lineno)
        elif body:
            in_body |= isinstance(node, ast.FunctionDef)
        else:
            lines = range(first, (node.end_lineno or node.lineno) + 1)
    return lines, in_body


def chosen(
    measured: dict[str, Measured], file: str, lines: range | None
) -> tuple[list[str], list[str]]:
    """The tests that reach some lines (None: any), the mirrored ones and others, as to run."""

    def reaches(found: Measured) -> bool:
        reached = found.lines.get(file, frozenset())
        # Tests that run no line at all look at what an import has made, such as signatures.
        return bool(reached or not found.lines) if lines is None else bool(reached & {*lines})

    tests = [test for test, found in measured.items() if reaches(found)]
    tests.sort(key=lambda test: measured[test].seconds)
    own = [test for test in tests if test.startswith(mirrored(file) + "::")]
    # Of the others the quickest case of each function, then the second of each, and so on.
    seen = Counter[str]()
    ranked = []
    for test in tests:
        if not test.startswith(mirrored(file) + "::"):
            function = test.partition("[")[0]
            ranked.append((seen[function], measured[test].seconds, test))
            seen[function] += 1
    ranked.sort()
    so_far = accumulate(seconds for _, seconds, _ in ranked)
    pairs = zip(ranked, so_far, strict=True)
    return own, [test for (_, _, test), spent in pairs if spent < OTHER_SECONDS]


def in_child(context: str, seconds: float, target: Callable[..., Any], *args: Any) -> Any:
    """What the target sends from a child, or an :class:`Outcome` of one that dies.

    The limit is on seconds of the processor, as machines are busy; a hundred times as many on the
    clock are for a child that waits for ever.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    start: Any = multiprocessing.get_context(context)
    child = start.Process(target=guarded, args=(there, seconds, target, *args))
    child.start()
    there.close()
    sent = None
    if here.poll(100 * seconds):
        try:
            sent = here.recv()
        except EOFError:
            child.join()
            sent = Outcome("timeout" if child.exitcode == -signal.SIGXCPU else "crashed")
    else:
        sent = Outcome("timeout")
    child.kill()
    child.join()
    return sent


def guarded(there: Connection, seconds: float, target: Callable[..., Any], *args: Any) -> None:
    """Run a target in a child with limits and without output, and send what it returns."""
    used = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (used, used + 5))
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        sent = target(*args)
    except BaseException as error:
        sent = Outcome("error", repr(error))
    there.send(sent)
    there.close()
    os._exit(0)


def run_swapped(
    items: Sequence[pytest.Item], held: Sequence[FunctionType], file: str, mutated: str
) -> Outcome:
    """Run a mutant in a copy of this process."""
    swap(held, ROOT / file, mutated)
    try:
        run_items(items)
    except FailedError as failed:
        return Outcome("killed", str(failed))
    return Outcome("survived")


class Chosen:
    """Collects some tests, and runs them in their order until one fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests = {test: i for i, test in enumerate(tests)}
        self.outcome = Outcome("error", "pytest has run no test")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            self.outcome = Outcome("killed", "collection")
            return True
        # A mutant may have taken cases away, which is no failure.
        items = [item for item in session.items if item.nodeid in self.tests]
        items.sort(key=lambda item: self.tests[item.nodeid])
        try:
            run_items(items)
        except FailedError as failed:
            self.outcome = Outcome("killed", str(failed))
        else:
            self.outcome = Outcome("survived")
        return True


def run_imported(options: Sequence[str], tests: Sequence[str], file: str, mutated: str) -> Outcome:
    """Run a mutant in a process that has not imported gmoe: the file is loaded mutated."""
    assert not any(name.split(".")[0] == "gmoe" for name in sys.modules)
    sys.meta_path.insert(0, Mutated(ROOT / file, mutated))
    plugin = Chosen(tests)
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    pytest.main([*options, *files], plugins=[plugin])
    return plugin.outcome


class Runner:
    """A plugin that runs mutants in place of the tests that pytest has collected."""

    def __init__(
        self,
        record: dict[str, Any],
        again: bool,
        options: Sequence[str],
        imports: Coverage,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self.record = record
        self.again = again
        self.options = options
        self.imports = imports
        self.keep = keep

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        for file in MODULES:  # some are imported where a function needs them
            import_module(module_of(ROOT / file))
        self.imports.stop()
        self.items = {item.nodeid: item for item in session.items}
        self.measured = measured_before()
        missing = [item for test, item in self.items.items() if test not in self.measured]
        found = in_child("fork", 3600, measure, missing) if missing else {}
        if isinstance(found, Outcome):
            raise session.Interrupted(f"the tests without a mutant: {found}")
        self.measured = {test: {**self.measured, **found}[test] for test in self.items}
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_bytes(pickle.dumps((sources(), self.measured)))
        print(f"{len(found)} tests measured", flush=True)
        self.functions = functions()
        gc.freeze()  # a child's collector would copy every page
        for entry in pending(self.record, self.again):
            start = time.time()
            mutant = Mutant(*(entry[field] for field in Mutant._fields))
            outcome = self.run(mutant)
            entry["again" if self.again else "first"] = {
                **outcome._asdict(),
                "seconds": round(time.time() - start, 1),
                "commit": environment()["commit"],
            }
            self.keep(self.record)
            print(f"{entry['number']} {mutant.file}:{mutant.line} {outcome}", flush=True)
        return True

    def run(self, mutant: Mutant) -> Outcome:
        file = mutant.file
        original = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        mutated = mutant.source(original)
        if mutated is None:
            return Outcome("gone")
        pairs = zip(original.splitlines(), mutated.splitlines(), strict=False)
        line = next(i for i, (old, new) in enumerate(pairs, 1) if old != new)
        lines, in_body = reach(original, line)
        imported = self.imports.get_data().lines(str(ROOT / file)) or []
        change = (file, mutated)
        if in_body and not set(lines).intersection(imported):
            own, others = chosen(self.measured, file, lines)
            items = [self.items[test] for test in own + others]
            limit = 10 + self.limit(own + others)
            return in_child("fork", limit, run_swapped, items, self.functions, *change)
        outcome = Outcome("survived")
        for tests in filter(None, chosen(self.measured, file, None)):
            if outcome.outcome == "survived":  # a second import costs less than all test files
                limit = 60 + self.limit(tests)
                target = (run_imported, self.options, tests)
                outcome = in_child("forkserver", limit, *target, *change)
        return outcome

    def limit(self, tests: Sequence[str]) -> float:
        """A few times the seconds that tests take without a mutant."""
        return 4 * sum(self.measured[test].seconds for test in tests)
