"""What is on a page, as text."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def words_of(path: Path) -> str:
    """The text of a page."""
    return unescape(re.sub("<[^>]*>", "\n", path.read_text(encoding="utf-8")))


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, those in lists without their indentation."""
    found = re.findall(
        r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]
