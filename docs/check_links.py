"""Checks every link of the built site that stays on it: the file is there, and so is the place in it.

    python docs/check_links.py out/site

Links to other sites are counted only; `sphinx-build -b linkcheck -c docs . out/linkcheck` follows them.
"""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the places in it that others may link to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


@cache
def read(path: Path) -> Page:
    return Page(path)


def broken(site: Path) -> tuple[list[str], int, set[str]]:
    """What is wrong, how many links were checked, and the links to other sites."""
    wrong, checked = [], 0
    elsewhere: set[str] = set()
    for path in sorted(site.rglob("*.html")):
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                elsewhere.add(link)
                continue
            checked += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                wrong.append(f"{path.relative_to(site)}: no file {link}")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).places:
                wrong.append(f"{path.relative_to(site)}: no place {link}")
    return wrong, checked, elsewhere


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    wrong, checked, elsewhere = broken(site)
    print("\n".join(wrong))
    print(f"{checked} links within the site, {len(wrong)} broken; {len(elsewhere)} to other sites, not followed")
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
