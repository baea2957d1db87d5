"""The page of the docs that shows what the machines found: text between marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "trust.md"


def with_text(page: str, mark: str, text: str) -> str:
    """The page with the text between ``<!-- mark -->`` and the next ``<!-- end -->``."""
    begin, end = f"<!-- {mark} -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"page: got none of {begin} and {end}, expected both")
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def write(mark: str, text: str) -> None:
    """Put the text on the page."""
    PAGE.write_text(with_text(PAGE.read_text(), mark, text))
