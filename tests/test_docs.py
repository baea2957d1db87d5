"""README and pages: their code runs, and their figures are the lab book's.

The API page has every public name.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

import gmoe
from docs.check_links import broken
from docs.plots.__main__ import every_drawing, pages, render
from docs.plots.results import read_finished
from docs.plots.style import FIGURES
from experiments.show.cells import differences
from experiments.study.front import at_best_step, difference, read_front, verdicts
from experiments.study.width import COLUMNS
from experiments.train.files import read_json
from experiments.train.presets import DIGITS_GRAPH, MOSAIC, PRESETS
from experiments.train.scores import Difference
from tests.helpers.pages import DOCS, blocks
from tests.helpers.symbols import symbols

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
DRAWINGS = every_drawing()
EXECUTED = sorted(
    str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()
)
"""The pages with code.

``tests/gmoe/test_own_parts.py`` tests more of ``your-own-router.md`` than that it runs.
"""
EXECUTED.remove("your-own-router.md")
EXECUTED.remove("timm-train.md")  # a script, which ``tests/test_timm_train.py`` imports


@pytest.mark.parametrize("page", EXECUTED)
def test_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it saves its figures
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


def test_the_api_pages_have_every_public_name() -> None:
    listed = [
        name
        for page in ("api.md", "api-authors.md")
        for name in re.findall(r"^   ([\w.]+)$", (DOCS / page).read_text(), re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    # The latter two as names of routers and a section
    elsewhere = {
        "__version__",
        "ROUTERS",
        "plot",
    }
    assert {name for name in gmoe.__all__ if name not in listed} <= elsewhere


def test_the_presets_are_there() -> None:
    page = (DOCS / "tutorials" / "command-line.md").read_text()
    named = set(
        re.findall(
            r"`([\w-]+)`", page[page.index("| data | presets") : page.index("`--data-root DIR`")]
        )
    )
    assert len(named) > 20
    assert named <= set(PRESETS)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="#x">y</a><a href="b.html#z">y</a><a href="c.html">y</a></p>'
    )
    (tmp_path / "b.html").write_text(
        '<a href="a.html#x">y</a><a href="https://example.org">y</a><img src="d.png">'
    )
    assert sorted(broken(tmp_path)) == ["a.html: b.html#z", "a.html: c.html", "b.html: d.png"]


def test_what_a_page_loads_from_another_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://example.org/">y</a><script src="https://example.org/x.js"></script>'
        '<link rel="stylesheet" href="https://example.org/x.css"><img src="data:image/png;base64,">'
    )
    found = ["a.html: https://example.org/x.js", "a.html: https://example.org/x.css"]
    assert broken(tmp_path) == found


def test_the_install_page_has_the_versions_of_the_package() -> None:
    package = (ROOT / "pyproject.toml").read_text()
    page = (DOCS / "install.md").read_text()
    for name, said in (
        ("torch", r"torch>=([\d.]+),<2.16"),
        ("PyTorch Geometric", r"torch-geometric>=([\d.]+)"),
        ("torchvision", r"torchvision>=([\d.]+)"),
        ("Python", r'requires-python = ">=([\d.]+)"'),
    ):
        least = re.findall(said, package)[0]
        assert f"| {name} | {least} " in page
    assert "| torch | 2.10 to 2.15 |" in page


def test_each_version_that_runs_has_a_date_until_which_it_is_supported() -> None:
    package = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: ([\d.]+)"', package)
    (first, above) = re.findall(r'"torch>=2\.(\d+),<2\.(\d+)"', package)[0]
    torches = [f"2.{minor}" for minor in range(int(first), int(above))]
    page = (ROOT / "SUPPORT.md").read_text()
    assert re.findall(r"^\| Python ([\d.]+) \|", page, re.MULTILINE) == pythons
    assert re.findall(r"^\| torch ([\d.]+) \|", page, re.MULTILINE) == torches
    geometric = re.findall(r"torch-geometric>=([\d.]+)", package)[0]
    assert re.findall(r"^\| PyTorch Geometric ([\d.]+) \|", page, re.MULTILINE)[0] == geometric

    assert f"{pythons[0]} to {pythons[-1]}" in README
    matrix = re.findall(r"python: (\[.*\])", (ROOT / ".github/workflows/ci.yml").read_text())[0]
    assert ast.literal_eval(matrix) == [*pythons, "3.14"]


def test_the_citation_is_that_of_the_file() -> None:
    title = re.findall(r'title: "(.*)"', (ROOT / "CITATION.cff").read_text())[0]
    page = (DOCS / "citation.md").read_text()
    assert f"title   = {{{title}}}" in page
    assert f"version = {{{gmoe.__version__}}}" in page


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MARKED = re.compile(r"^ *```[\w{].*?^ *```", re.DOTALL | re.MULTILINE)
COMMANDS = MARKED.sub("", README)


def test_installing_comes_first_and_then_a_command_that_shows_experts_at_work() -> None:
    """``.ci/run`` runs the two set-up commands to the letter, so both stand at a line's start."""
    install, first, *_ = re.findall(r"^```\n(.*?)^```", COMMANDS, re.DOTALL | re.MULTILINE)
    assert install.startswith('pip install ".[graph]" ')
    command = 'pip install -e ".[experiments]" && python -m experiments.train mosaic'
    assert first == f"{command}\n"
    assert re.findall("^pip install -e .*$", README, re.MULTILINE) == [
        command,
        'pip install -e ".[test]" && python -m pytest',
    ]
    assert "grep -E '^pip install -e ' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_first_command_ends_as_the_readme_says() -> None:
    variants = read_json(RESULTS / "presets.json", dict[str, Any])["variants"]
    found = {run["variant"]: run for run in variants}
    moe, dense = found["mosaic-moe"], found["mosaic-dense"]
    assert list(MOSAIC.seeds) == moe["config"]["seeds"] == [0, 1, 2, 3, 4]
    assert "train five seeds" in in_a_line(README)
    scores = [f"{100 * run['test']['mean']:.0f}" for run in (moe, dense)]
    said = f"It ends at {scores[0]} % test accuracy, where the dense model has {scores[1]} %"
    assert said in in_a_line(README)
    assert moe["routing"][0]["nmi"]["mean"] > 0.5
    assert "its experts follow the graph's regions" in in_a_line(README)

    seeds = len(DIGITS_GRAPH.seeds)
    for name in ("digits-graph-moe", "digits-graph-dense"):
        assert f"{100 * fmean(found[name]['test']['values'][:seeds]):.1f}" == "98.6", name
    assert "both models end at 98.6 %" in in_a_line(README)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["first screen", "swap", "upcycle"])
def test_a_snippet_of_the_readme_runs_and_prints_what_it_says(
    snippet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
    said = re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", snippet, re.MULTILINE)
    words = [re.sub(r"[\d.…]+", "N", line) for line in said]  # figures may differ by machine
    assert re.sub(r"[\d.…]+", "N", capsys.readouterr().out).splitlines() == words


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r'(?:\]\(|src="|srcset=")([^):"]+)[)"]', README)
    expected = {
        "docs/figures/width-dark.png",
        "docs/serving.md#export",
        "docs/lab/does-it-help.md",
    }
    assert expected <= set(links)
    for link in links:
        path, _, anchor = link.partition("#")
        page = ROOT / (path or "README.md")
        assert page.exists(), link
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs | {""}, link


FOLDERS = "gmoe|vision|experiments|tests|tools|docs|examples"
REFERRING = [*pages(), ROOT / "CONTRIBUTING.md"]


def stale(text: str) -> list[str]:
    """What a page refers to in the code that is not there, and references by line number."""
    found = re.findall(r"[\w/]+\.py:\d+", text)
    paths = rf"\b((?:{FOLDERS})/[\w/]+\.py)(?::([A-Za-z_]\w*(?:\.\w+)*))?"
    for path, symbol in re.findall(paths, text):
        if not (ROOT / path).exists():
            found.append(path)
        elif symbol and symbol not in dict(symbols((ROOT / path).read_text())):
            found.append(f"{path}:{symbol}")
    for module in re.findall(rf"python -m ((?:{FOLDERS})(?:\.\w+)*)", text):
        if not find_spec(module):
            found.append(f"python -m {module}")
    for name in set(re.findall(r"\bgmoe(?:\.[A-Za-z_]\w*)+", text)) - {"gmoe.json"}:
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            found.append(name)
    return found


@pytest.mark.parametrize("page", REFERRING, ids=lambda page: page.name)
def test_what_a_page_refers_to_is_there(page: Path) -> None:
    assert stale(page.read_text()) == []


def in_a_line(page: str) -> str:
    """The text of a page, however its lines are broken."""
    return " ".join(page.split())


def test_the_times_of_the_readme_are_those_of_the_results() -> None:
    variants = read_json(RESULTS / "benchmark-step.json", dict[str, Any])["variants"]

    def span(*names: str, digits: int = 1) -> str:
        times = sorted(variants[name]["ratio"]["step"] for name in names)
        return " to ".join(f"{time:.{digits}f}" for time in dict.fromkeys([times[0], times[-1]]))

    def graph(*names: str, digits: int = 1) -> str:
        return span(*(f"{name}, gmoe, Graph" for name in names), digits=digits)

    raw = (
        f"SAGE and GIN {graph('cora-sage', 'cora-gin')}, "
        f"GCN {graph('cora-gcn')}, GAT {graph('cora-gat')}"
    )
    small = graph("small-gcn", "small-sage", "small-gin", "small-gat", digits=0)
    section = README.partition("## What does it cost?\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (.* \| .*) \|$", section, re.MULTILINE)[1:] == [
        f"`GNNMoE` | Cora's 1,433 raw features | {raw}",
        f"`GNNMoE` | molecules, 300 wide | {graph('molecules-gine', 'molecules-gcn')}",
        f"`GNNMoE` | a graph of 30 nodes | {small}",
        f"a ViT after `moefy` | four images | "
        f"{span('vit-tiny, gmoe, moefy', 'vit-tiny, gmoe, moefy, plain')}",
    ]

    variants = read_json(RESULTS / "benchmark-step-compiled.json", dict[str, Any])["variants"]
    cora, molecules = (
        variants[f"{row}, gmoe, edge_index, compiled"]["ratio"]["step"]
        / variants[f"{row}, PyG, compiled"]["ratio"]["step"]
        for row in ("cora-gcn", "molecules-gcn")
    )
    said = f"takes {cora:.1f} times PyG's on Cora, and {molecules:.1f} times on molecules"
    assert said in in_a_line(section)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_shows_the_results(name: str, theme: str) -> None:
    """If it does not, run ``python -m docs.plots``."""
    committed = Image.open(FIGURES / f"{name}-{theme}.png").info["Description"]
    assert committed == DRAWINGS[name].numbers


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_has_the_figures_of_today(page: Path) -> None:
    """If it does not, run ``python -m docs.plots``."""
    assert render(page, DRAWINGS) == page.read_text()


def test_what_the_readme_says_of_simpler_changes_is_measured() -> None:
    cells = read_finished(RESULTS / "published-controls")

    def beyond(column: str, row: str, other: str) -> Difference:
        return Difference.of(differences(cells[column][row], cells[column][other]))

    text = in_a_line(README)
    again = "a dense model whose layers see the raw input again gains more than experts"
    assert f"On minesweeper, {again}" in text
    assert beyond("minesweeper", "dense-input-again", "experts").side == "above"
    left = beyond("facebook", "experts", "dense-lr2")
    assert left.side == "above"
    assert f"gives the dense model most of it; {left.mean:.1f} points are left" in text
    gain = beyond("facebook", "experts", "dense").mean
    assert left.mean < gain / 2


def test_what_the_readme_says_of_large_graphs_is_measured() -> None:
    """Each model at its better step size, the graphs by what experts gain."""
    front = read_front(RESULTS / "width")
    gains = []
    for column in COLUMNS:
        narrow, experts = (at_best_step(front[column], row) for row in ("dense-64", "experts-64"))
        gain, wide = difference(experts, narrow), difference(front[column]["dense-256"], narrow)
        assert gain is not None
        assert wide is not None
        assert gain.side == "above"
        gains.append((gain.mean, wide.mean, column))
    first, second, third = sorted(gains, reverse=True)
    text = in_a_line(README)
    assert f"experts gain {first[0]:.1f}, {second[0]:.1f}, and {third[0]:.1f} points" in text
    said = f"{first[1]:.1f}, {second[1]:.1f}, and {third[1]:.1f}"
    assert f"Four times the width gains {said}, at four times the FLOPs" in text
    assert verdicts(front[first[2]])[0].endswith("experts win at 32, 64, 128 wide")
    assert "On the first, experts win by FLOPs at 32, 64, and 128 wide" in text
