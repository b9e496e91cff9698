"""The site: pages of Markdown where they lie in the repository, and a reference from docstrings: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ringred  # noqa: E402

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
suppress_warnings: list[str] = []
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
html_static_path = ["_static"]
html_extra_path = ["_extra"]
html_show_sphinx = False
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
