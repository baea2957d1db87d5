"""One HTML file that needs nothing else, for wide screens and phones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; background: #f4f6f8; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem clamp(.8rem, 4vw, 2rem) 4rem; background: #fff;
       overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { margin-top: 2.4rem; border-bottom: 2px solid #1f77b4; }
h3 { margin: 1.8rem 0 .4rem; }
.lead { font-size: 1.15rem; border-left: 4px solid #1f77b4; padding-left: .8rem; }
.warn { background: #fff4e0; border-left: 4px solid #ff9f1c; padding: .4rem .8rem; }
p, figcaption { max-width: 80ch; } figcaption, .note { color: #52606d; font-size: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e8ed; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #c9d2dc; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 7em; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: .6rem 0; max-width: 100%; } img { max-width: 100%; height: auto; display: block; }
"""


class Page:
    """A page that is written from top to bottom."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading: 2 for sections, 3 inside them."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; ``kind`` is "lead", "note", "warn" or nothing."""
        self._parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, which scrolls by itself where it is too wide; the first column is to the left."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def figures(self, figures: Sequence[Figure], caption: str) -> None:
        """Figures side by side, where there is room, and one caption below."""
        images = []
        for figure in figures:
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=150)
            data, width = base64.b64encode(content.getvalue()).decode(), round(96 * figure.get_figwidth())
            images.append(f'<img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">')
        row = f'<div class="row">{"".join(images)}</div>'
        self._parts.append(f"<figure>{row}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the page, and the folders that it needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><main>{''.join(self._parts)}</main></body></html>\n",
            encoding="utf-8",
        )
