"""Draw every figure that shows results, and write it into the pages: ``python -m docs.plots``.

A page has a figure between ``<!-- figure: NAME -->`` and ``<!-- end -->``. What stands there, with
the alternative text, is generated, as are ``docs/figures/NAME-light.png`` and ``NAME-dark.png``.
"""

from __future__ import annotations

import re
from pathlib import Path

from docs.plots import controls, published, routers, times, width
from docs.plots.style import FIGURES, ROOT, Drawing, save

MARKED = re.compile(
    r"^(?P<indent> *)<!-- figure: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL | re.MULTILINE
)
README = """\
<!-- figure: {name} -->
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/figures/{name}-dark.png">
  <img src="docs/figures/{name}-light.png" width="600" alt="{alt}">
</picture>
<!-- end -->"""
PAGE = """\
<!-- figure: {name} -->
````{{container}} {container}
```{{image}} {folder}/{name}-light.png
:class: only-light
:alt: {alt}
```
```{{image}} {folder}/{name}-dark.png
:class: only-dark
:alt: {alt}
```
````
<!-- end -->"""


def every_drawing(results: Path = ROOT / "results") -> dict[str, Drawing]:
    """By name."""
    found = [
        drawing
        for module in (routers, controls, published, times, width)
        for drawing in module.drawings(results)
    ]
    return {drawing.name: drawing for drawing in found}


def pages() -> list[Path]:
    """All that may have a figure."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(page: Path, drawings: dict[str, Drawing]) -> str:
    """The text of a page with its figures generated anew.

    Raises:
        ValueError: a page asks for a figure that is not there.
    """
    up = "../" * (len(page.relative_to(ROOT).parts) - 2)

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name in width.NAMES and name not in drawings:  # nothing of that study is finished
            return "\n".join(
                match["indent"] + f"<!-- {mark} -->" for mark in (f"figure: {name}", "end")
            )
        if name not in drawings:
            expected = ", ".join(drawings)
            raise ValueError(f"figure: got {name} in {page.name}, expected one of {expected}")
        form = README if page.name == "README.md" else PAGE
        container = "wide-figure" if drawings[name].is_wide else "figure"
        text = form.format(
            name=name, alt=drawings[name].alt, folder=f"{up}figures", container=container
        )
        return "\n".join(match["indent"] + line for line in text.splitlines())

    return MARKED.sub(block, page.read_text())


def main() -> None:
    """Draw them all."""
    drawings = every_drawing()
    for drawing in drawings.values():
        save(drawing, FIGURES)
    for page in pages():
        page.write_text(render(page, drawings))


if __name__ == "__main__":
    main()
