"""Sphinx: builds offline, from Markdown, and treats every warning as an error (`make docs`)."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "Strongroom"
author = "The Strongroom authors"
copyright = "The Strongroom authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["adr/template.md"]
source_suffix = {".md": "markdown"}
# The specification shows JSON with names in place of values.
suppress_warnings = ["misc.highlighting_failure"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
# Headings are link targets, as they are where the repository is hosted.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"Strongroom {version}"
# Nothing is loaded from elsewhere, and no page says where it was built.
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
