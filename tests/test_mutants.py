"""The tool that measures how many faults the tests notice."""

from __future__ import annotations

import json
import os
import textwrap
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from gmoe import losses
from gmoe.routers import TokenChoice
from tests import mutants
from tests.mutants import (
    EQUIVALENT,
    FILE,
    MODULES,
    PAGE,
    ROOT,
    UNSEEN,
    Measured,
    Mutant,
    Mutated,
    Outcome,
)

SOURCE = textwrap.dedent(
    """\
    from typing import TYPE_CHECKING

    if TYPE_CHECKING and 1 > 0:
        SIZE = 1

    if TYPE_CHECKING:
        SIZE = 2

    __all__ = ["twice"] + ["thrice"]

    LIMIT = 3


    def twice(x: "int | float") -> "int | float":
        assert x > 0
        if x > LIMIT:
            raise ValueError(f"x: got {x + 1}")
        return 2 * x


    class Thrice:
        factor = 3

        @staticmethod
        def of(x):
            def product(y):
                return y * 3

            return product(x)
    """
)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(SOURCE.splitlines(), 1) if text in line)


def mutant(before: str, after: str) -> Mutant:
    lines = SOURCE.splitlines(keepends=True)
    line = line_of(before)
    return Mutant("file", "", line, [lines[line - 1]], [lines[line - 1].replace(before, after)])


def test_places_are_where_a_test_could_look() -> None:
    pytest.importorskip("cosmic_ray")
    found = {
        (SOURCE.splitlines()[start[0] - 1].strip(), name) for start, name in mutants.places(SOURCE)
    }
    lines = {line for line, _ in found}
    assert lines == {
        "if TYPE_CHECKING and 1 > 0:",
        "SIZE = 1",
        "LIMIT = 3",
        "if x > LIMIT:",
        "return 2 * x",
        "factor = 3",
        "@staticmethod",
        "return y * 3",
    }
    assert ("return y * 3", "core/ReplaceBinaryOperator") in found
    assert ("return y * 3", "core/NumberReplacer") in found


def test_a_drawn_mutant_is_one_that_python_takes_without_a_warning() -> None:
    pytest.importorskip("cosmic_ray")
    source = 'same = name == "value"\n'
    assert mutants.drawn("file", source, "core/ReplaceComparisonOperator_Eq_Is", 0) is None
    found = mutants.drawn("file", source, "core/ReplaceComparisonOperator_Eq_NotEq", 0)
    assert found is not None
    assert found.source(source) == 'same = name != "value"\n'


@pytest.mark.parametrize(
    ("text", "symbol"),
    [
        ("LIMIT = 3", "LIMIT"),
        ("def twice", "twice"),
        ("2 * x", "twice"),
        ("factor = 3", "Thrice.factor"),
        ("@staticmethod", "Thrice.of"),
        ("return product", "Thrice.of"),
        ("y * 3", "Thrice.of.product"),
    ],
)
def test_a_mutant_is_named_by_what_holds_it(text: str, symbol: str) -> None:
    lines = SOURCE.splitlines(keepends=True)
    changed = Mutant("file", "", line_of(text), [lines[line_of(text) - 1]], [])
    assert mutants.symbol_of(changed, SOURCE) == symbol
    # One that takes a decorator begins in the blank line above.
    above = changed._replace(line=changed.line - 1, before=["\n", *changed.before])
    assert mutants.symbol_of(above, SOURCE) == symbol


def test_a_mutant_is_found_where_its_line_has_moved() -> None:
    changed = mutant("2 * x", "3 * x")
    moved = "# A comment.\n" + SOURCE
    assert changed.source(moved) == moved.replace("2 * x", "3 * x")
    assert changed.source(SOURCE.replace("2 * x", "x + x")) is None


def test_of_equal_lines_the_nearest_is_the_mutants() -> None:
    source = "a = 1\nb = 2\na = 1\n"
    assert Mutant("file", "", 3, ["a = 1\n"], ["a = 2\n"]).source(source) == "a = 1\nb = 2\na = 2\n"


@pytest.mark.parametrize(
    ("before", "after", "expected"), [("2 * x", "2 + x", (5, 9)), ("y * 3", "y + 3", (6, 6))]
)
def test_functions_that_are_held_already_get_the_mutated_code(
    tmp_path: Path, before: str, after: str, expected: tuple[int, int]
) -> None:
    path = tmp_path / "swapped.py"
    path.write_text(SOURCE)
    spec = spec_from_file_location("swapped", path, loader=SourceFileLoader("swapped", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    held: list[FunctionType] = [module.twice, module.Thrice.of]
    assert (held[0](3), held[1](3)) == (6, 9)
    mutated = mutant(before, after).source(SOURCE)
    assert mutated is not None
    mutants.swap(held, path, mutated)
    assert (held[0](3), held[1](3)) == expected
    assert path.read_text() == SOURCE
    with pytest.raises(ValueError, match="no function has the code of the mutant"):
        mutants.swap([], path, mutated)


def test_functions_are_found_after_the_suite_has_frozen_what_it_collected() -> None:
    found = mutants.functions()
    assert losses.z_loss in found
    assert TokenChoice.forward in found
    assert line_of not in found


def test_an_import_loads_the_mutant_and_leaves_the_file_alone() -> None:
    path = ROOT / "gmoe" / "losses.py"
    source = path.read_text()
    loader = Mutated(path, source + "\nMUTATED = 1\n")
    assert loader.find_spec("gmoe.routing") is None
    spec = loader.find_spec("gmoe.losses")
    assert spec is not None
    module: Any = module_from_spec(spec)
    loader.exec_module(module)
    assert module.MUTATED == 1
    assert path.read_text() == source


@pytest.mark.parametrize(
    ("text", "lines", "in_body"),
    [
        ("LIMIT = 3", 1, False),
        ("def twice", 1, False),
        ("if x > LIMIT", 1, True),
        ("raise ValueError", 1, True),
        ("factor = 3", 1, False),
        ("@staticmethod", 2, False),
        ("def product", 1, True),
        ("y * 3", 1, True),
    ],
)
def test_the_statement_of_a_line_and_whether_only_calls_run_it(
    text: str, lines: int, in_body: bool
) -> None:
    line = line_of(text)
    assert mutants.reach(SOURCE, line) == (range(line, line + lines), in_body)


def test_tests_that_reach_a_statement_run_the_mirrored_ones_first_then_one_of_each_function() -> (
    None
):
    file, there = "gmoe/losses.py", {"gmoe/losses.py": frozenset({2})}
    measured = {
        "tests/gmoe/test_routing.py::slow": Measured(mutants.OTHER_SECONDS, there),
        "tests/gmoe/test_routing.py::quick[b]": Measured(0.2, there),
        "tests/gmoe/test_routing.py::quick[a]": Measured(0.1, there),
        "tests/gmoe/test_hub.py::quick": Measured(0.3, there),
        "tests/gmoe/test_losses.py::elsewhere": Measured(0.1, {file: frozenset({9})}),
        "tests/gmoe/test_losses.py::here": Measured(2.0, {file: frozenset({2, 3})}),
        "tests/gmoe/test_hub.py::other": Measured(0.1, {"gmoe/hub.py": frozenset({2})}),
        "tests/gmoe/test_signatures.py::no_line": Measured(0.4, {}),
    }
    here, elsewhere = "tests/gmoe/test_losses.py::here", "tests/gmoe/test_losses.py::elsewhere"
    own, others = mutants.chosen(measured, file, range(2, 3))
    assert own == [here]
    assert others == [
        "tests/gmoe/test_routing.py::quick[a]",
        "tests/gmoe/test_hub.py::quick",
    ]
    own, others = mutants.chosen(measured, file, None)
    assert own == [elsewhere, here]
    assert "tests/gmoe/test_signatures.py::no_line" in others
    assert "tests/gmoe/test_hub.py::other" not in others


def loop() -> None:
    while True:
        pass


def die() -> None:
    os._exit(3)


def fail() -> None:
    raise KeyError("of the tool")


@pytest.mark.parametrize(
    ("target", "outcome"), [(loop, "timeout"), (die, "crashed"), (fail, "error")]
)
def test_a_child_that_dies_says_how(target: Any, outcome: str) -> None:
    assert mutants.in_child("fork", 1, target).outcome == outcome


def test_a_child_sends_what_it_found() -> None:
    assert mutants.in_child("fork", 5, Outcome, "killed", "a test") == Outcome("killed", "a test")


def test_the_score_counts_what_was_noticed_with_wilsons_interval() -> None:
    outcomes = ["killed"] * 530 + ["timeout"] * 10 + ["survived"] * 59 + ["error"] + ["gone"] * 5
    assert mutants.score(outcomes).startswith("90.0% (87.3% to 92.2%) of 600: 530 killed")
    assert mutants.score([None]) == "none has run"


@pytest.mark.parametrize("file", MODULES)
def test_every_module_has_a_mirrored_test_among_those_that_run(file: str) -> None:
    path = mutants.mirrored(file)
    assert (ROOT / path).is_file()
    assert path.startswith(mutants.TESTS)


def test_rooms_are_files_and_folders() -> None:
    found = {Path(file).parent / Path(file).stem for file in mutants.rooms()}
    assert {room for room in mutants.ROOMS if Path(room) not in found} == {"gmoe/routers"}
    assert Path("gmoe/routers/soft") in found
    assert Path("gmoe/plot") not in found


def entry(number: int, first: str, again: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"number": number, "file": "gmoe/losses.py", "line": 3}
    found["symbol"] = "z_loss"
    found |= {"before": ["a | b\n"], "after": ["a & b\n"], "first": {"outcome": first}}
    return found | ({"again": {"outcome": again}} if again else {})


def test_a_report_has_both_scores_and_lists_who_still_survives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mutants, "EQUIVALENT", {3: "a and b are equal"})
    monkeypatch.setattr(mutants, "UNSEEN", {2: "only slower"})
    entries = [
        entry(0, "killed"),
        entry(1, "survived", "killed"),
        entry(2, "survived", "survived"),
        entry(3, "survived"),
        {"number": 4},
    ]
    text = mutants.report({"seed": 7, "places": 99, "mutants": entries})
    assert "4 of a sample of 5 mutants have run, drawn with seed 7 from 99 places; 1 of" in text
    assert "| all | 33.3% (6.1% to 79.2%) of 3: " in text
    assert "| 66.7% (20.8% to 93.9%) of 3: 2 killed, 1 survived |" in text
    rows = [line.split()[1:4] for line in text.splitlines() if "gmoe/losses.py" in line]
    assert rows == [[number, "|", "`gmoe/losses.py:z_loss`"] for number in ("2", "3")]
    assert "`a \\| b` → `a & b` | only slower |" in text
    assert "`a \\| b` → `a & b` | **excused**: a and b are equal |" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"symbol": "y_loss"}, "`gmoe/losses.py`, code that is gone"),
        ({"file": "gmoe/lost.py"}, "lost, a file that is gone"),
    ],
    ids=["symbol", "file"],
)
def test_a_report_does_not_refer_to_what_is_gone(change: dict[str, str], named: str) -> None:
    survivor = entry(1, "survived") | change
    text = mutants.report({"seed": 7, "places": 99, "mutants": [survivor]})
    assert f"| 1 | {named} |" in text


def test_a_second_score_is_that_of_survivors_that_ran_again() -> None:
    entries = [entry(0, "killed"), entry(1, "survived")]
    text = mutants.report({"seed": 7, "places": 99, "mutants": entries})
    assert "1 killed, 1 survived | survivors have not run again |" in text


def test_the_page_has_the_report_and_few_mutants_are_excused() -> None:
    record = json.loads(FILE.read_text())
    page = PAGE.read_text()
    assert mutants.on_page(page, mutants.report(record)) == page
    ran = {entry["number"]: entry for entry in record["mutants"] if "first" in entry}
    for number in (*EQUIVALENT, *UNSEEN):
        assert mutants.last(ran[number]) == "survived", number
    assert not EQUIVALENT.keys() & UNSEEN.keys()
    assert len(EQUIVALENT) <= 0.03 * len(ran)
