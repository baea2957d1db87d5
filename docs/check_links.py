"""Check every link inside a built site: ``python docs/check_links.py DIR``. Nothing is fetched.

A page that loads a script, a style sheet or a picture from another site fails, too: whoever reads
without a network sees a whole page.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: set[str] = set()
        """Those of the links that a browser follows by itself."""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag != "base":
                self.links.append(value)
                if name == "src" or ("rel", "stylesheet") in attrs:
                    self.loaded.add(value)


def broken(site: Path) -> list[str]:
    """``"PAGE: LINK"`` of each link to what is not there, and of what is loaded from elsewhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    found.append(f"{path.relative_to(site.resolve())}: {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {""}
            if not target.is_file() or unquote(parts.fragment) not in anchors | {""}:
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return found


if __name__ == "__main__":
    if problems := broken(Path(sys.argv[1])):
        sys.exit("\n".join(["links that lead nowhere:", *problems]))
