"""One HTML file that needs nothing else: figures are in it, and beside it as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f4f6f8; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem 2rem 4rem; background: #fff; }
nav { font-size: 13px; columns: 2; border-bottom: 1px solid #d8dee5; padding-bottom: .8rem; }
nav a { display: block; color: #1f5f9e; text-decoration: none; }
nav a.sub { padding-left: 1.2em; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.6rem; border-bottom: 2px solid #1f77b4; } h3 { margin-top: 1.8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e8ed; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #eef2f6; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #52606d; font-size: 13px; max-width: 80ch; }
p { max-width: 80ch; } .warn { background: #fff4e0; border-left: 4px solid #ff9f1c; padding: .4rem .8rem; }
"""


class Page:
    """A page that is written from top to bottom.

    Args:
        title: of the page.
        folder: where figures go, into ``figures``, and the page itself.
    """

    def __init__(self, title: str, folder: Path) -> None:
        self.title = title
        self.folder = folder
        self._parts: list[str] = []
        self._contents: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading, which the table of contents lists: 2 for sections, 3 inside them."""
        anchor = f"s{len(self._contents)}"
        self._contents.append((level, anchor, text))
        self._parts.append(f'<h{level} id="{anchor}">{escape(text)}</h{level}>')

    def text(self, text: str, *, warn: bool = False) -> None:
        """A paragraph."""
        self._parts.append(f"<p{' class=warn' if warn else ''}>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is to the left."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """A figure, also as ``figures/NAME.png``."""
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        path = self.folder / "figures" / f"{file_name(name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
        data = base64.b64encode(content.getvalue()).decode()
        self._parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def write(self) -> Path:
        """Write ``index.html`` and return its path."""
        links = "".join(
            f'<a href="#{anchor}"{" class=sub" if level > 2 else ""}>{escape(text)}</a>'
            for level, anchor, text in self._contents
        )
        path = self.folder / "index.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><main><h1>{escape(self.title)}</h1><nav>{links}</nav>"
            f"{''.join(self._parts)}</main></body></html>\n",
            encoding="utf-8",
        )
        return path


def file_name(text: str) -> str:
    """``text`` as a name that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", text)
