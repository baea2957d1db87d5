"""Mutation score: one small fault after another is put into the code, and the tests must notice.

``python -m tests.mutants`` draws mutants of :data:`MODULES` with a fixed seed, runs each against
the tests that reach it, and writes ``results/mutants.json`` after every one; it continues where
it was stopped. ``--survivors`` runs those that survived again, for tests written since: both
scores are kept. Either writes ``docs/trust.md`` at its end; ``--report`` does that alone. Needs
``pip install "gmoe[mutants]"``; takes an hour of one core.

A *place* is a token of the code that a family of cosmic-ray's operators changes, such as one
``+`` or one number. The sample is a random order of all places, with one of each place's mutants
drawn at random; so any prefix of it is a random sample too. Places in annotations, f-strings (the
texts of errors), assertions, ``__all__`` and blocks for the type checker are left out, since no
test should look at them.

How one runs fast: this process collects the tests once, and forks. The child swaps the code
objects of the functions that the mutant changes, and runs the tests that reach its statement,
those of the mirrored file first, then the quickest. A statement that an import or the collection
has run already is changed in a child that has imported nothing of gmoe yet, and loads the mutant.
The source tree is never written.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import version
from importlib.util import spec_from_file_location
from itertools import accumulate, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from coverage import Coverage

ROOT = Path(__file__).parent.parent
FILE = ROOT / "results" / "mutants.json"
PAGE = ROOT / "docs" / "trust.md"
MARKS = ("<!-- mutants -->", "<!-- end -->")
KEPT = ROOT / "build" / "mutants-measured.pickle"
SEED = 20261201
SIZE = 1000

IN_CONV = "additive adjacency aggregate attention graph kinds matrix"
IN_GMOE = "convert edges folder losses padded places products routing routers sums"
ROOMS = tuple(f"gmoe/conv/{name}" for name in IN_CONV.split()) + tuple(
    f"gmoe/{name}" for name in IN_GMOE.split()
)
"""The mathematics, and what decides which of it runs: a score of their own."""

MODULES = tuple(
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "gmoe").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "routers"
    )
)
"""What is mutated: all of gmoe but the ``__init__`` files that only name what others define."""

NAMES = "compile compose contract export loss_curves saved_models"
TESTS = (
    "tests/gmoe",
    "tests/vision",
    *(f"tests/test_{name}.py" for name in NAMES.split()),
    *(f"tests/test_{name}.py" for name in ("stateful", "support", "training_loops")),
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

NOTICED = ("killed", "crashed", "timeout")

OF_A_MATRIX = "of a matrix, the last dimension is the second"
SLOWER = "only slower, or of more memory"
BY_NAME = "an option could be given by position, too"
OF_A_CLASS = "it is called by its class, which gives the plain function"
OF_A_VECTOR = "of a vector, the last dimension is the first"
EQUALLY_LONG = "both are equally long by construction"
ON_CUDA = "only off the CPU"
IN_ONNX = "only in ONNX, whose tests are slow ones"
ABSTRACT = "the type checker finds a subclass that lacks a method"
UNWRITTEN = "nobody writes to it"
A_SIZE = "a size that is a matter of taste"
A_TRIAL = "which numbers a trial takes"
A_HINT = "which of two similar names a hint takes"
EQUIVALENT: dict[int, str] = {
    43: OF_A_MATRIX,
    64: "a layer has one expert at least",
    125: "it is replaced before it is read",
    152: OF_A_MATRIX,
    195: "of equal numbers, the last is the first",
    373: "no conv looks at its own node alone",
    431: "a shared expert is a stack of one",
    668: "of a legal pair, both are strings or none is",
    670: "any negative number stands for a removed expert",
    863: "a number of groups is not negative",
    882: "graphs are compared by identity",
    895: "a layout is one object",
    902: "neither no heads nor one divide a width",
    912: "what is above zero is not minus infinity",
    977: "a gated MLP has one layer up at least",
    989: "of no rows, the first is none",
    991: "the convs of a stack have the same options",
}
"""Mutants, by their number, that compute the same under every legal value; and why.

They are excused.
"""

UNSEEN: dict[int, str] = {
    13: SLOWER,
    16: OF_A_CLASS,
    24: "the layers of an MLP have one type",
    51: SLOWER,
    54: SLOWER,
    97: OF_A_CLASS,
    105: EQUALLY_LONG,
    106: A_SIZE,
    111: OF_A_VECTOR,
    112: SLOWER,
    131: SLOWER,
    147: OF_A_CLASS,
    156: "no module is in a stack twice",
    158: EQUALLY_LONG,
    160: OF_A_VECTOR,
    172: OF_A_CLASS,
    185: SLOWER,
    193: SLOWER,
    202: ABSTRACT,
    204: BY_NAME,
    230: A_SIZE,
    258: OF_A_VECTOR,
    277: SLOWER,
    305: BY_NAME,
    309: UNWRITTEN,
    316: "no argument of PyG's convs is given by position alone",
    362: A_HINT,
    380: ON_CUDA,
    392: EQUALLY_LONG,
    394: "only of graphs of two billion nodes",
    399: A_SIZE,
    423: SLOWER,
    426: SLOWER,
    501: A_SIZE,
    507: "nobody compares matrices",
    520: OF_A_VECTOR,
    539: IN_ONNX,
    557: A_SIZE,
    561: SLOWER,
    564: OF_A_VECTOR,
    577: "what is copied too much is overwritten",
    591: "a sum of columns apart is the same sum",
    611: BY_NAME,
    631: OF_A_CLASS,
    636: A_TRIAL,
    655: "parts of an MLP are called with one argument",
    661: EQUALLY_LONG,
    676: UNWRITTEN,
    681: OF_A_VECTOR,
    682: "Python keeps one object of each small number",
    698: A_TRIAL,
    708: EQUALLY_LONG,
    717: IN_ONNX,
    736: A_HINT,
    743: BY_NAME,
    766: SLOWER,
    770: SLOWER,
    771: SLOWER,
    794: OF_A_CLASS,
    813: EQUALLY_LONG,
    814: OF_A_VECTOR,
    822: BY_NAME,
    834: IN_ONNX,
    844: BY_NAME,
    855: SLOWER,
    862: A_TRIAL,
    875: ON_CUDA,
    883: ABSTRACT,
    886: "no part of a router has such buffers",
    904: ABSTRACT,
    916: SLOWER,
    917: SLOWER,
    924: EQUALLY_LONG,
    936: A_TRIAL,
    943: OF_A_VECTOR,
    975: A_TRIAL,
    987: SLOWER,
    998: OF_A_CLASS,
}
"""Why no test sees the other survivors, which count."""


# ------------------------------------------------------------------------------------- drawing


class Mutant(NamedTuple):
    """Some lines of a file, and what replaces them."""

    file: str
    operator: str
    line: int
    before: list[str]
    after: list[str]

    def source(self, original: str) -> str | None:
        """The mutated source; None if the lines are gone. They may have moved meanwhile."""
        lines = original.splitlines(keepends=True)
        size = len(self.before)
        found = [i for i in range(len(lines)) if lines[i : i + size] == self.before]
        if not found:
            return None
        start = min(found, key=lambda i: abs(i + 1 - self.line))
        return "".join([*lines[:start], *self.after, *lines[start + size :]])


def unseen(node: ast.AST) -> ast.expr | ast.stmt | None:
    """What of a node no test should look at."""
    if isinstance(node, ast.arg | ast.AnnAssign):
        return node.annotation
    if isinstance(node, ast.FunctionDef):
        return node.returns
    if isinstance(node, ast.JoinedStr | ast.Assert):
        return node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return node
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return node
    return None


def unseen_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Their spans."""
    lines = source.splitlines()

    def column(line: int, offset: int) -> int:
        """In characters; that of ``ast`` is in bytes."""
        return len(lines[line - 1].encode()[:offset].decode())

    spans = []
    found = map(unseen, ast.walk(ast.parse(source)))
    for node in (node for node in found if node is not None):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = (node.lineno, column(node.lineno, node.col_offset))
        spans.append((start, (node.end_lineno, column(node.end_lineno, node.end_col_offset))))
    return spans


def places(source: str) -> dict[tuple[tuple[int, int], str], list[tuple[str, int]]]:
    """The mutants of each place: an operator, and which of its occurrences in the file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    # The rest asks for arguments: names of variables to replace.
    operators = {
        name: get_operator(name)()
        for name in operator_names()
        if not get_operator(name).arguments()
    }
    spans = unseen_spans(source)
    seen = Counter[str]()
    found = defaultdict(list)
    for node in ast_nodes(get_ast(source)):
        if node.type in ("name", "string", "newline"):
            continue
        for name, operator in operators.items():
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in spans):
                    found[start, name.split("_")[0]].append((name, seen[name]))
                seen[name] += 1
    return found


def drawn(file: str, source: str, operator: str, occurrence: int) -> Mutant | None:
    """One mutant as a change of lines; None if it reads the same.

    Or if Python refuses it, or warns, as of ``is`` beside a literal.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    mutated = mutate_code(source, get_operator(operator)(), occurrence)
    try:
        if mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(mutated, file, "exec", dont_inherit=True)
    except (SyntaxError, SyntaxWarning):
        return None
    old, new = source.splitlines(keepends=True), mutated.splitlines(keepends=True)
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changes = [change for change in changes if change[0] != "equal"]
    (_, first, _, start, _), (_, _, last, _, stop) = changes[0], changes[-1]
    return Mutant(file, operator.removeprefix("core/"), first + 1, old[first:last], new[start:stop])


def sample(seed: int, size: int) -> tuple[int, list[Mutant]]:
    """The number of places, and the first mutants of a random order of them."""
    order, rng = [], random.Random(seed)
    for file, source in sources().items():
        order += [(file, *item) for item in sorted(places(source).items())]
    rng.shuffle(order)
    mutants: list[Mutant] = []
    for file, _, choices in order:
        rng.shuffle(choices)
        found = (drawn(file, (ROOT / file).read_text(), *choice) for choice in choices)
        mutants += [mutant for mutant in [next(filter(None, found), None)] if mutant]
        if len(mutants) == size:
            break
    return len(order), mutants


def symbols(source: str) -> Iterator[tuple[str, range]]:
    """Functions, classes, and names that a module or a class assigns, from the outside in.

    Each with its dotted name and its lines, decorators included.
    """

    def inside(parent: ast.AST, prefix: str) -> Iterator[tuple[str, range]]:
        assigns = isinstance(parent, ast.Module | ast.ClassDef)
        for node in ast.iter_child_nodes(parent):
            names, within = list[str](), prefix
            first = getattr(node, "lineno", 0)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names, within = [node.name], f"{prefix}{node.name}."
                first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
            elif assigns and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                yield prefix + name, range(first, (getattr(node, "end_lineno", 0) or first) + 1)
            yield from inside(node, within)

    yield from inside(ast.parse(source), "")


def symbol_of(mutant: Mutant, source: str) -> str:
    """The innermost symbol that a mutant changes, by which the page refers to it.

    Line numbers would be wrong after the next change of the file.
    """
    # A mutant that takes a decorator may begin in the blank lines above it.
    line = mutant.line + len(mutant.before) - 1
    return [name for name, lines in symbols(source) if line in lines][-1]


# ------------------------------------------------------------------------------------- running


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


def sources() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in MODULES}


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
        self, record: dict[str, Any], again: bool, options: Sequence[str], imports: Coverage
    ) -> None:
        self.record, self.again, self.options, self.imports = record, again, options, imports

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
            write(self.record)
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


# -------------------------------------------------------------------------------------- report


@cache
def environment() -> dict[str, Any]:
    from experiments.train.results import environment

    return environment()


def write(record: dict[str, Any]) -> None:
    fresh = FILE.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    fresh.replace(FILE)


def pending(record: dict[str, Any], again: bool) -> list[dict[str, Any]]:
    """Those to run: the ones that have no outcome but an error of this tool, or that survived."""
    if not again:
        return [entry for entry in record["mutants"] if last(entry) in (None, "error")]
    return [entry for entry in record["mutants"] if last(entry) == "survived"]


def last(entry: dict[str, Any]) -> str | None:
    return {**entry.get("first", {}), **entry.get("again", {})}.get("outcome")


def wilson(killed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, killed / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def score(outcomes: Iterable[str | None]) -> str:
    """Killed of all that ran; equivalent ones are no part of ``outcomes``."""
    counts = Counter(outcome for outcome in outcomes if outcome not in (None, "gone"))
    total = counts.total()
    if not total:
        return "none has run"
    killed = sum(counts[outcome] for outcome in NOTICED)
    low, high = wilson(killed, total)
    parts = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    return f"{killed / total:.1%} ({low:.1%} to {high:.1%}) of {total}: {parts}"


def report(record: dict[str, Any]) -> str:
    """Both scores, by folder, and the survivors: what the page says."""
    ran = [entry for entry in record["mutants"] if "first" in entry]
    real = [entry for entry in ran if entry["number"] not in EQUIVALENT]
    files = {entry["file"] for entry in real}
    groups = {"all": files, "routing, dispatch, aggregation": files.intersection(rooms())}
    for folder in sorted({folder_of(file) for file in files}):
        groups[folder] = {file for file in files if folder_of(file) == folder}
    gone = sum(last(entry) == "gone" for entry in real)
    lines = [
        f"{len(ran)} of a sample of {len(record['mutants'])} mutants have run, drawn with seed "
        f"{record['seed']} from {record['places']} places; {len(ran) - len(real)} of them compute "
        f"the same and do not count, nor do {gone} in the second score whose lines are gone.",
        "",
        "| | before tests were written for mutants | after |",
        "|---|---|---|",
    ]
    for name, files in groups.items():
        some = [entry for entry in real if entry["file"] in files]
        first = [entry["first"]["outcome"] for entry in some]
        ran_again = any("again" in entry for entry in some)
        now = (
            score([last(entry) for entry in some]) if ran_again else "survivors have not run again"
        )
        lines.append(f"| {name} | {score(first)} | {now} |")
    lines += ["", "Survivors:", ""]
    lines += ["| | where | change | why no test sees it |", "|---|---|---|---|"]
    for entry in ran:
        if last(entry) in ("survived", "error"):
            number = entry["number"]
            why = UNSEEN.get(number, "")
            if number in EQUIVALENT:
                why = f"**excused**: {EQUIVALENT[number]}"
            lines.append(
                f"| {number} | {where(entry)} | "
                f"`{cell(entry['before'])}` → `{cell(entry['after'])}` | {why} |"
            )
    return "\n".join(lines)


def where(entry: dict[str, Any]) -> str:
    """The file and the symbol of a mutant; the file alone where its symbol is gone, or it is."""
    path = ROOT / entry["file"]
    source = path.read_text() if path.exists() else ""
    if any(name == entry["symbol"] for name, _ in symbols(source)):
        return f"`{entry['file']}:{entry['symbol']}`"
    if not path.exists():
        return f"{path.stem}, a file that is gone"
    return f"`{entry['file']}`, code that is gone"


def rooms() -> list[str]:
    """The modules of :data:`ROOMS`, each a file or all files of a folder."""
    return [file for file in MODULES if {file.removesuffix(".py"), folder_of(file)} & {*ROOMS}]


def folder_of(file: str) -> str:
    return str(Path(file).parent)


def cell(lines: Sequence[str]) -> str:
    """Code that fits a cell of a table."""
    return " ".join(line.strip() for line in lines).replace("|", "\\|") or " "


def on_page(page: str, text: str) -> str:
    """A page with the text between its marks."""
    before, _, rest = page.partition(f"{MARKS[0]}\n")
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"


def draw() -> dict[str, Any]:
    """A record of the sample, in which nothing has run."""
    total, mutants = sample(SEED, SIZE)
    entries = [
        {"number": i, **mutant._asdict(), "symbol": symbol_of(mutant, sources()[mutant.file])}
        for i, mutant in enumerate(mutants)
    ]
    versions = {name: version(name) for name in ("cosmic-ray", "coverage", "pytest", "hypothesis")}
    return {
        "seed": SEED,
        "places": total,
        "environment": environment(),
        "tools": versions,
        "mutants": entries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Mutation score.")
    parser.add_argument("--survivors", action="store_true", help="run those that survived again")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch_geometric", "pytest", "hypothesis"])
    imports = coverage_of_modules()
    imports.start()
    record = json.loads(FILE.read_text()) if FILE.exists() else draw()
    if pending(record, args.survivors) and not args.report:
        write(record)
        with TemporaryDirectory() as folder:
            options = [*OPTIONS, f"--basetemp={folder}/tests"]
            pytest.main(
                [*options, *TESTS], plugins=[Runner(record, args.survivors, options, imports)]
            )
    PAGE.write_text(on_page(PAGE.read_text(), report(record)))
    print(report(record))


if __name__ == "__main__":
    main()
