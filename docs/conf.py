"""Sphinx: `sphinx-build -W docs OUT`. Pages are Markdown; the reference is made from docstrings."""

from __future__ import annotations

import freemerge

project = "freemerge"
author = "The freemerge authors"
copyright = "The freemerge authors, Apache-2.0"
version = release = freemerge.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "freemerge"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
