"""The site: pages of Markdown where they lie in the repository, and a reference from docstrings: `make docs`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

import ringred
from ringred.testing.command.main import make_parser

os.environ["COLUMNS"] = "100"  # of the command's help

project = "ringred"
author = "the ringred developers"
copyright = "the ringred developers"
version = release = ringred.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
# The source is the repository, so that a link between two files is the same on the site as in the repository.
include_patterns = [
    "docs/*.md",
    "docs/*/*.md",
    "benchmarks/results/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["README.md", ".*", "out", "build", "dist", "ringred", "tests", "examples", "launch", "*.egg-info"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r".*")]  # types of torch and Python: their pages are not looked up here

myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings write `names` as Markdown does

html_theme = "furo"
html_title = f"ringred {release}"
html_extra_path = ["_extra"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

ANIMATIONS = {
    "ring": (8, None, 1),
    "torus": (12, (4, 3), 1),
    "halving_doubling": (8, None, 1),
    "tree": (8, None, 1),
    "double_tree": (12, None, 4),
    "hierarchical": (12, (4, 3), 1),
    "direct": (6, None, 1),
    "central": (6, None, 1),
}  # name: ranks, grid, segments


def animate(app: Sphinx, failure: Exception | None) -> None:
    """Writes the pages that show all-reduces (docs/see.md)."""
    from ringred.collectives.registry import lookup
    from ringred.testing.command.animation import page
    from ringred.topology.model import flat

    folder = Path(app.outdir) / "docs" / "animations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (ranks, grid, segments) in ANIMATIONS.items():
        entry = lookup("all_reduce", name)
        group = entry.group(ranks, 0, grid, segments)
        text = page(entry, group, 25 << 20, flat(ranks, 20e-6, 0.32e-9, 0.1e-9))
        (folder / f"{name}.html").write_text(text, "utf-8")


def describe_commands(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts the help of every command in its page."""
    if name == "docs/reference/command":
        source[0] = source[0].replace("{{commands}}", "\n".join(helps(make_parser())))


def helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The help of a command and of those below it, as Markdown."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield f"## {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```\n"
    for action in below:
        for child in action.choices.values():
            yield from helps(child)


def read_as_markdown(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are written as Markdown: an indented block is code, and an asterisk is an asterisk."""
    if any(line.lstrip().startswith(".. ") for line in lines):  # one of torch's
        return
    found: list[str] = []
    code = False
    for line in lines:
        if line.strip():
            indented = line.startswith("    ")
            if indented and not code:
                found += [*([] if not found or not found[-1] else [""]), ".. code-block:: python", ""]
            elif code and not indented:
                found += [] if not found[-1] else [""]
            code = indented
        found.append(line if code else line.replace("*", "\\*"))
    lines[:] = found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_as_markdown)
    app.connect("build-finished", animate)
    app.connect("source-read", describe_commands)
