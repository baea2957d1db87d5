"""The README's snippets run as they stand, and its set-up commands are the two that CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_seven_snippets_and_two_set_up_commands() -> None:
    assert len(SNIPPETS) == 7
    assert len(re.findall(r"^pip install -e ", README, re.MULTILINE)) == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["conv", "gnn", "kinds", "batches", "hetero", "vit", "stats"])
def test_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
