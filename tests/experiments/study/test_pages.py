"""The tables of the docs are those of the result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.study.pages import update


def test_the_docs_are_up_to_date() -> None:
    update(check=True)


def test_check_fails_on_an_old_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: digits-graph -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match=r"page\.md is out of date"):
        update((page,), check=True)
    update((page,))
    before, _, rest = page.read_text().partition("\n| variant |")
    assert before == "before\n<!-- table: digits-graph -->"
    assert rest.endswith("\n<!-- end -->\nafter\n")


def test_marks_that_nothing_fills_in_are_refused(tmp_path: Path) -> None:
    """They would stay as they are, or take the page away up to the next end."""
    good = "<!-- table: digits -->\n<!-- end -->\n"
    for bad, message in (
        ("<!-- tabel: mosaic -->\n<!-- end -->\n", "mark: got 'tabel', expected one of table"),
        ("<!-- table: mosaic -->\n", "mark: got table, expected <!-- end --> behind it"),
    ):
        (tmp_path / "page.md").write_text(bad + good)
        with pytest.raises(SystemExit, match=rf"error: .*page\.md: {message}"):
            update((tmp_path / "page.md",))


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("table: nothing", r"No such file.*nothing\.json"),
        ("table: digits: nobody", "only: got nobody, expected"),
        ("benchmark: mosaic", r"results/mosaic\.json: lacks .* 'benchmark' shows .AttributeError"),
        ("pairs: benchmark-step: a/b", r"results/benchmark-step\.json: lacks .* .TypeError"),
        ("table: presets", r"results/presets\.json: lacks .* .KeyError.'reference'"),
        ("cells: routers: nowhere", "columns: got 'nowhere', expected one of digits"),
    ],
)
def test_what_a_page_asks_in_vain(mark: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"<!-- {mark} -->\n<!-- end -->")
    with pytest.raises(SystemExit, match=rf"error: .*page\.md: .*{message}"):
        update((tmp_path / "page.md",))
