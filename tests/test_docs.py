"""README and pages: their code runs, their figures are the lab book's, and the API page has every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gmoe
from docs.check_links import broken
from experiments.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
EXECUTED = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text())
"""The pages with code; of ``your-own-router.md``, ``tests/gmoe/test_own_parts.py`` tests more than that it runs."""
EXECUTED.remove("your-own-router.md")


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, those in lists without their indentation."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@pytest.mark.parametrize("page", EXECUTED)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it saves its figures
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^   ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    elsewhere = {"__version__", "ROUTERS", "plot"}  # the latter two as names of routers and a section
    assert {name for name in gmoe.__all__ if name not in listed} <= elsewhere


def test_the_presets_are_there() -> None:
    page = (DOCS / "tutorials" / "command-line.md").read_text()
    named = set(re.findall(r"`([\w-]+)`", page[page.index("| data | presets") : page.index("`--data-root DIR`")]))
    assert len(named - {"-tuned"}) > 20
    assert named - {"-tuned"} <= set(PRESETS)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="#x">y</a><a href="b.html#z">y</a><a href="c.html">y</a></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#x">y</a><a href="https://example.org">y</a><img src="d.png">')
    assert sorted(broken(tmp_path)) == ["a.html: b.html#z", "a.html: c.html", "b.html: d.png"]


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["swap", "upcycle"])
def test_a_snippet_of_the_readme_runs_and_prints_what_it_says(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", snippet, re.MULTILINE)
    words = [re.sub(r"[\d.…]+", "N", line) for line in said]  # figures may differ by machine
    assert re.sub(r"[\d.…]+", "N", capsys.readouterr().out).splitlines() == words


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


LAB = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "lab").glob("*.md"))).replace("−", "-")
FIGURE = re.compile(r"[+-]?\d+\.\d\d(?: ± \d\.\d\d| \(± \d\.\d\d\))?|\d+ of \d+")


@pytest.mark.parametrize("page", ["README.md", "docs/which-settings-first.md", "docs/when-moe-helps.md"])
def test_the_figures_are_those_of_the_lab_book(page: str) -> None:
    """Whose tables are generated from the results."""
    text = (ROOT / page).read_text().replace("−", "-")
    found = FIGURE.findall(text[text.index("## Does it help?") :] if page == "README.md" else text)
    assert len(found) > 9
    assert [figure for figure in found if figure not in LAB] == []
