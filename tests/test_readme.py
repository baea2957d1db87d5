"""The README's snippets run and print what it says, its set-up commands are CI's, its figures are those of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["swap", "upcycle"])
def test_snippet_runs_and_prints_what_it_says(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
    said = re.findall(r"^print\(.*\)  # (.*)$", snippet, re.MULTILINE)
    words = [re.sub(r"[\d.…]+", "N", line) for line in said]  # figures may differ by machine
    assert re.sub(r"[\d.…]+", "N", capsys.readouterr().out).splitlines() == words


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


LAB = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "lab").glob("*.md"))).replace("−", "-")
FIGURE = re.compile(r"[+-]?\d+\.\d\d(?: ± \d\.\d\d| \(± \d\.\d\d\))?|\d+ of \d+")


@pytest.mark.parametrize("page", ["README.md", "docs/which-settings-first.md", "docs/when-moe-helps.md"])
def test_the_figures_are_those_of_the_lab_book(page: str) -> None:
    """Whose tables are generated from the results."""
    text = (ROOT / page).read_text().replace("−", "-")
    found = FIGURE.findall(text[text.index("| data | experts against") :] if page == "README.md" else text)
    assert len(found) > 9
    assert [figure for figure in found if figure not in LAB] == []
