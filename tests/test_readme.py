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


@pytest.mark.parametrize(
    ("row", "page"),
    [
        ("mosaic", "when-moe-helps"),
        ("minesweeper", "when-moe-helps"),
        ("facebook", "when-moe-helps"),
        ("Cora", "lab/swap"),
        ("CIFAR-10", "lab/claims"),
    ],
)
def test_the_figures_are_those_of_the_page(row: str, page: str) -> None:
    """Whose tables are generated from the results."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}") and line.count("|") == 6]
    figures = re.findall(r"[+-]\d+\.\d\d(?: ± \d\.\d\d| \(± \d\.\d\d\))?|\d of \d+|\d\d\.\d\d|\d\.\d\d times", line)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert figures
    assert [figure for figure in figures if figure.removesuffix(" times") not in text] == []
