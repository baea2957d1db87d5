"""The tests in old and new environments: what is noted of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import versions


def test_the_last_line_is_counted() -> None:
    output = "....F\n1 failed, 6117 passed, 877 skipped, 67 warnings in 299.09s (0:04:59)\n"
    assert versions.counts(output) == {
        "failed": 1,
        "passed": 6117,
        "skipped": 877,
        "warnings": 67,
    }


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No environment is made: this one stands for both, and its tests are two."""
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert not WRONG\n")
    page = "before\n<!-- versions -->\nold\n<!-- end -->\nafter\n<!-- end -->\n"
    (tmp_path / "page.md").write_text(page)
    packages = [{"name": name, "version": "1.2"} for name in versions.SHOWN]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than the tests
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "FILE", tmp_path / "found.json")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(versions, "install", lambda _: None)
    monkeypatch.setattr(versions, "python_of", lambda _: Path(sys.executable))
    monkeypatch.setattr(versions, "uv", lambda *_: json.dumps(packages))
    monkeypatch.setattr(versions, "commit_of", lambda: "abc")
    return tmp_path


@pytest.mark.parametrize("wrong", [False, True])
def test_what_passed_and_failed_is_on_the_page(made: Path, wrong: bool) -> None:
    tests = made / "test_two.py"
    tests.write_text(tests.read_text().replace("WRONG", str(wrong)))
    assert versions.main([]) == wrong
    found: dict[str, Any] = json.loads((made / "found.json").read_text())
    assert list(found) == ["oldest", "newest"]
    for environment in found.values():
        assert environment["tests"]["passed"] == 2 - wrong
        assert environment["failed"] == ["test_two.py::test_b"] * wrong
    page = (made / "page.md").read_text()
    assert page.startswith("before\n<!-- versions -->\n| | date |")
    assert page.endswith("<!-- end -->\nafter\n<!-- end -->\n")
    outcome = "1 passed, 1 failed" if wrong else "2 passed"
    assert page.count(f"| 1.2 | {outcome} |") == 2


def test_a_part_of_the_tests_is_not_kept(made: Path) -> None:
    assert versions.main(["newest", "-k", "test_a"]) == 0
    assert not (made / "found.json").exists()


def test_a_resolution_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "uv")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        versions.install("oldest")
