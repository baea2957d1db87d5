"""The site's pages: their code runs from top to bottom, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
EXECUTED = ["concepts.md", "tutorials/recipes.md", "tutorials/swap.md", "tutorials/upcycle.md"]
"""And ``your-own-router.md``, of which ``tests/gmoe/test_own_parts.py`` tests more than that it runs."""


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, those in lists without their indentation."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@pytest.mark.parametrize("page", EXECUTED)
def test_a_page_runs_from_top_to_bottom(page: str) -> None:
    names: dict[str, object] = {"__name__": "page"}
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_every_page_with_code_is_executed() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()}
    assert pages == {*EXECUTED, "your-own-router.md"}
