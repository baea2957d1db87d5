"""The tables of the docs are those of the result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.study.pages import update


def test_the_docs_are_up_to_date() -> None:
    update(check=True)


def test_check_fails_on_an_old_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- presets: presets -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match=r"page\.md is out of date"):
        update((page,), check=True)
    update((page,))
    before, _, rest = page.read_text().partition("\n| run |")
    assert before == "before\n<!-- presets: presets -->"
    assert rest.endswith("\n<!-- end -->\nafter\n")


def test_marks_that_nothing_fills_in_are_refused(tmp_path: Path) -> None:
    """They would stay as they are, or take the page away up to the next end."""
    good = "<!-- presets: presets -->\n<!-- end -->\n"
    for bad, message in (
        ("<!-- preset: presets -->\n<!-- end -->\n", "mark: got 'preset', expected one of presets"),
        ("<!-- presets: presets -->\n", "mark: got presets, expected <!-- end --> behind it"),
    ):
        (tmp_path / "page.md").write_text(bad + good)
        with pytest.raises(SystemExit, match=rf"error: .*page\.md: {message}"):
            update((tmp_path / "page.md",))


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("presets: nothing", r"No such file.*nothing\.json"),
        ("benchmark: forces", r"No such file.*forces\.json"),
        ("presets: benchmark-step", r"results/benchmark-step\.json: lacks .* .TypeError"),
        ("study: unseen: nowhere", "columns: got 'nowhere', expected one of chameleon"),
    ],
)
def test_what_a_page_asks_in_vain(mark: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"<!-- {mark} -->\n<!-- end -->")
    with pytest.raises(SystemExit, match=rf"error: .*page\.md: .*{message}"):
        update((tmp_path / "page.md",))
